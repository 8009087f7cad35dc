"""The Gibbs sampler at its limits: extremes, types, batches, devices, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gibbs_chains import (
    KERNEL,
    LIKELIHOODS,
    NUM_CLASSES,
    NUM_PIXELS,
    TAGS,
    UNARY,
    chains,
    exact_samples,
    keys_of,
    posterior,
    random_case,
    with_and_without,
)
from jax.sharding import PartitionSpec

from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.likelihoods import area


@pytest.mark.slow_except("area")
@with_and_without
def test_the_diagonal_of_the_kernel_is_ignored(name):
    start = exact_samples(8, posterior(name), 50)
    diagonal = np.diag(np.float32([3, -2, 0.5, 1e6, 7]))
    expected = chains(keys_of(9, 50), start, KERNEL, UNARY, name, 3, 2)
    samples = chains(keys_of(9, 50), start, KERNEL + diagonal, UNARY, name, 3, 2)
    np.testing.assert_array_equal(samples.labels, expected.labels)
    np.testing.assert_array_equal(samples.marginals, expected.marginals)


def test_the_symmetric_part_of_the_kernel_counts_and_a_diagonal_may_be_infinite():
    skew = np.triu(np.float32(np.random.default_rng(0).normal(size=KERNEL.shape)), 1)
    odd = KERNEL + skew - skew.T + np.diag(np.float32([np.inf] * NUM_PIXELS))
    start = exact_samples(8, posterior("none"), 50)
    expected = chains(keys_of(9, 50), start, (KERNEL + KERNEL.T) / 2, UNARY, "none", 3, 2)
    samples = chains(keys_of(9, 50), start, odd, UNARY, "none", 3, 2)
    np.testing.assert_array_equal(samples.labels, expected.labels)
    np.testing.assert_allclose(samples.marginals, expected.marginals, atol=1e-5)


def check_valid(samples, num_pixels, num_classes):
    assert samples.labels.shape == (num_pixels,) and samples.labels.dtype == jnp.int32
    assert samples.marginals.shape == (num_pixels, num_classes) and samples.marginals.dtype == jnp.float32
    assert set(np.unique(samples.labels)) <= set(range(num_classes))
    assert np.min(samples.marginals) >= 0
    np.testing.assert_allclose(samples.marginals.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.slow
@with_and_without
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_large_unaries_decide(num_blocks, name):
    unary = np.float32([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [0, -np.inf, -np.inf], [1e4, 1e4, -np.inf], [-1e4, 0, 1e4]])
    samples = chains(keys_of(12, 200), jnp.ones((200, NUM_PIXELS), jnp.int32), KERNEL, unary, name, 20, num_blocks)
    for labels, marginals in zip(samples.labels, samples.marginals):
        check_valid(type(samples)(labels, marginals), NUM_PIXELS, NUM_CLASSES)
    np.testing.assert_array_equal(samples.labels[:, [0, 2, 4]], np.broadcast_to([0, 0, 2], (200, 3)))
    assert set(np.unique(samples.labels[:, 1])) == {0, 1, 2}
    assert set(np.unique(samples.labels[:, 3])) == {0, 1}


@pytest.mark.slow_except("8")
@pytest.mark.parametrize("num_blocks", [1, 8, 60])
def test_a_strong_kernel_keeps_labels_equal_or_apart(num_blocks):
    """Row sums of 1e3: what agrees stays so, whatever the unary says. Where they repel, no class has all pixels."""
    kernel = np.full((60, 60), 1e3 / 59, np.float32)
    unary = np.random.default_rng(13).normal(size=(60, 3)).astype(np.float32)
    run = jax.jit(functools.partial(gibbs, jax.random.key(14), num_sweeps=20, num_blocks=num_blocks))
    for label in range(3):
        samples = run(np.full(60, label), kernel, unary)
        check_valid(samples, 60, 3)
        np.testing.assert_array_equal(samples.labels, label)
    samples = run(np.zeros(60, int), -kernel, unary)
    check_valid(samples, 60, 3)
    assert np.bincount(samples.labels).max() <= (21 if num_blocks == 60 else 40)


@pytest.mark.slow
@pytest.mark.parametrize("num_pixels, num_classes", [(1, 3), (1, 1), (NUM_PIXELS, 1)])
@with_and_without
def test_one_pixel_and_one_class(num_pixels, num_classes, name):
    kernel, unary = random_case(16, num_pixels, num_classes)
    likelihood = None if name == "none" else lambda z: area(z, TAGS[:num_classes])
    start = np.zeros(num_pixels, int)
    samples = gibbs(jax.random.key(17), start, kernel, unary, log_likelihood=likelihood, num_sweeps=2)
    check_valid(samples, num_pixels, num_classes)
    if num_classes == 1:
        np.testing.assert_array_equal(samples.marginals, 1)
    elif name == "none":
        np.testing.assert_allclose(samples.marginals, reference.softmax(unary), atol=0.06)


@pytest.mark.slow
def test_a_state_that_the_likelihood_excludes_is_left_and_never_entered():
    """Minus infinity: all pixels of one class is impossible."""
    def likelihood(z):
        return jnp.where(z.mean(axis=0).max() == 1, -jnp.inf, 0.0)

    run = jax.jit(jax.vmap(lambda key: gibbs(key, jnp.zeros(3, int), 0.5 - 0.5 * jnp.eye(3), jnp.zeros((3, 2)),
                                             log_likelihood=likelihood, num_sweeps=30, num_blocks=2)))
    labels = np.asarray(run(keys_of(18, 2000)).labels)
    assert set(labels.sum(axis=1)) == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_short_types_are_sampled_in_float32(dtype):
    kernel, unary = jnp.asarray(4 * KERNEL, dtype), jnp.asarray(4 * UNARY, dtype)
    start = np.zeros(NUM_PIXELS, np.uint8)
    samples = gibbs(jax.random.key(19), start, kernel, unary)
    check_valid(samples, NUM_PIXELS, NUM_CLASSES)
    expected = gibbs(jax.random.key(19), start, kernel.astype(jnp.float32), unary.astype(jnp.float32))
    np.testing.assert_array_equal(samples.labels, expected.labels)
    np.testing.assert_allclose(samples.marginals, expected.marginals, rtol=1e-5)


def test_float64_is_kept():
    with jax.enable_x64(True):
        arguments = [jax.ShapeDtypeStruct(array.shape, jnp.float64) for array in (KERNEL, UNARY)]
        start = jax.ShapeDtypeStruct((NUM_PIXELS,), jnp.int32)
        samples = jax.eval_shape(gibbs, jax.random.key(0), start, *arguments)
    assert samples.marginals.dtype == jnp.float64 and samples.labels.dtype == jnp.int32


@pytest.mark.slow_except("40")
@pytest.mark.parametrize("num_pixels", [40, 400])
def test_the_field_of_a_kernel_with_many_pixels_is_finite(num_pixels):
    """Smooth kernels are next to singular, and one whose rows differ a lot is scaled badly: one block of either."""
    features = np.linspace(0, 3, num_pixels)[:, None]
    smooth = reference.gaussian_kernel(features)
    scales = np.logspace(-4, 4, num_pixels)
    run = jax.jit(functools.partial(gibbs, jax.random.key(20), num_blocks=1))
    for kernel in (smooth, -smooth, np.sqrt(np.outer(scales, scales)) * smooth):
        start = np.zeros(num_pixels, int)
        samples = run(start, np.float32(kernel), np.zeros((num_pixels, 2), np.float32))
        check_valid(samples, num_pixels, 2)


@pytest.mark.slow
@with_and_without
def test_vmap_equals_a_loop(name):
    cases = [random_case(seed, NUM_PIXELS, NUM_CLASSES) for seed in range(3)]
    kernels, unaries = (np.stack(arrays) for arrays in zip(*cases))
    labels, keys = exact_samples(21, posterior(name), 3), keys_of(22, 3)
    one = jax.jit(functools.partial(gibbs, log_likelihood=LIKELIHOODS[name], num_sweeps=3, num_blocks=2))
    many = jax.jit(jax.vmap(one))(keys, labels, kernels, unaries)
    for number, case in enumerate(zip(keys, labels, kernels, unaries)):
        expected = one(*case)
        np.testing.assert_array_equal(many.labels[number], expected.labels)
        np.testing.assert_allclose(many.marginals[number], expected.marginals, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@with_and_without
@pytest.mark.parametrize("shared", [(), ("kernel", "unary"), ("labels", "kernel", "unary")],
                         ids=["nothing", "image", "all but the keys"])
def test_four_devices_equal_one(shared, name):
    """A batch of images, or chains of one image, or images with the same start, spread over the devices."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    cases = [random_case(seed, NUM_PIXELS, NUM_CLASSES) for seed in range(8)]
    kernels, unaries = (np.stack(arrays) for arrays in zip(*cases))
    arguments = {"labels": exact_samples(23, posterior(name), 8), "kernel": kernels, "unary": unaries}
    arrays = [keys_of(24, 8), *(array[0] if what in shared else array for what, array in arguments.items())]
    axes = (0, *(None if what in shared else 0 for what in arguments))
    one = functools.partial(gibbs, log_likelihood=LIKELIHOODS[name], num_sweeps=2, num_blocks=2)
    many = jax.vmap(one, in_axes=axes)
    mesh, data = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data")
    specs = tuple(PartitionSpec() if axis is None else data for axis in axes)
    got = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=data))(*arrays)
    expected = jax.jit(many)(*arrays)
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.marginals, expected.marginals, rtol=1e-4, atol=1e-6)


@with_and_without
def test_the_key_alone_decides(name):
    start = exact_samples(25, posterior(name), 50)
    first = chains(keys_of(26, 50), start, KERNEL, UNARY, name, 3, 2)
    again = chains(keys_of(26, 50), start, KERNEL, UNARY, name, 3, 2)
    np.testing.assert_array_equal(again.labels, first.labels)
    np.testing.assert_array_equal(again.marginals, first.marginals)
    assert (chains(keys_of(27, 50), start, KERNEL, UNARY, name, 3, 2).labels != first.labels).any()


@with_and_without
def test_no_gradient_flows_through(name):
    def total(kernel, unary, scale):
        likelihood = None if name == "none" else lambda z: scale * LIKELIHOODS[name](z)
        samples = gibbs(jax.random.key(28), np.zeros(NUM_PIXELS, int), kernel, unary, log_likelihood=likelihood)
        return jnp.sum(samples.marginals * UNARY)

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(KERNEL, UNARY, 1.0):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("changes, message", [
    ({"unary_logits": np.zeros((2, 5, 3))}, r"unary_logits: expected shape \[m, K\], got \[2, 5, 3\]; .*flatten"),
    ({"unary_logits": np.zeros((5, 0))}, r"unary_logits: expected shape \[m, K\], got \[5, 0\]"),
    ({"labels": np.zeros((5, 3))}, r"labels: expected shape \[5\], got \[5, 3\]; .*number of a class"),
    ({"labels": np.zeros(4, int)}, r"labels: expected shape \[5\], got \[4\]"),
    ({"kernel": np.zeros((5, 4))}, r"kernel: expected shape \[5, 5\], got \[5, 4\]; .*dense"),
    ({"num_sweeps": 0}, r"num_sweeps: expected a finite number >= 1, got 0"),
    ({"num_blocks": 0}, r"num_blocks: expected a finite number >= 1, got 0"),
    ({"num_blocks": -2}, r"num_blocks: expected a finite number >= 1, got -2"),
    ({"num_blocks": 2.5}, r"num_blocks: expected a whole number, got 2.5"),
    ({"num_sweeps": 1.5}, r"num_sweeps: expected a whole number, got 1.5"),
    ({"log_likelihood": lambda z: z.sum(axis=0)}, r"log_likelihood: expected shape \[\], got \[3\]"),
])
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"labels": np.zeros(NUM_PIXELS, int), "kernel": KERNEL, "unary_logits": UNARY}
    with pytest.raises(ValueError, match=message):
        gibbs(jax.random.key(0), **{**arguments, **changes})
