"""The pairwise energy and the KL to the prior: loops, enumeration, and every form of the kernel."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import logits_and_kernel
from compiled import compiled
from jax.test_util import check_grads
from pictures import COARSE, case_of, soft_labels

from lcrf_jax.crf.energy import checked_compatibility, kl_to_prior, pairwise_energy
from lcrf_jax.crf.exact import NORMALISATIONS, dense_kernel
from lcrf_jax.crf.image_kernels import FORMS, exact_image_kernel, image_kernel
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.crf.params import KernelParams

kl_to_prior, mean_field, pairwise_energy = map(compiled, (kl_to_prior, mean_field, pairwise_energy))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_compatibility", [True, False])
def test_energy_equals_the_loops(symmetric, with_compatibility):
    logits, kernel = logits_and_kernel(0, symmetric=symmetric)
    probs = reference.softmax(logits)
    compatibility = np.random.default_rng(1).normal(size=(3, 3)) if with_compatibility else None
    energy = jax.jit(lambda p, k: pairwise_energy(p, k, compatibility=compatibility))(probs, kernel)
    np.testing.assert_allclose(energy, reference.pairwise_energy(probs, kernel, compatibility), rtol=1e-5)


def test_two_pixels_by_hand():
    kernel = np.array([[9.0, 2.0], [2.0, 9.0]])
    same, different, uniform = np.eye(2)[[0, 0]], np.eye(2)[[0, 1]], np.full((2, 2), 0.5)
    assert pairwise_energy(same, kernel) == 0
    assert pairwise_energy(different, kernel) == 2
    assert pairwise_energy(uniform, kernel) == 1
    np.testing.assert_allclose(kl_to_prior(np.zeros((2, 2)), kernel), 1 - 2 * np.log(2), rtol=1e-6)
    # q_2 is uniform, so one update adds 2 * 1/2 to both classes of pixel 1, for nothing; pixel 2 sees (.8, .2).
    unary = np.log([[0.8, 0.2], [0.5, 0.5]])
    expected = [[0.8, 0.2], reference.softmax([2 * 0.8, 2 * 0.2])]
    np.testing.assert_allclose(np.exp(mean_field(unary, kernel, num_iterations=1)), expected, rtol=1e-5)


def test_energy_invariances():
    logits, kernel = logits_and_kernel(2, symmetric=False)
    probs = reference.softmax(logits)
    energy = pairwise_energy(probs, kernel)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(pairwise_energy(probs[order], kernel[np.ix_(order, order)]), energy, rtol=1e-5)
    np.testing.assert_allclose(pairwise_energy(probs[:, [2, 0, 1]], kernel), energy, rtol=1e-5)
    np.testing.assert_allclose(pairwise_energy(probs, kernel.T), energy, rtol=1e-5)
    np.testing.assert_allclose(pairwise_energy(probs, kernel + 5 * np.eye(7)), energy, rtol=1e-5)
    np.testing.assert_allclose(pairwise_energy(probs, kernel, compatibility=reference.potts(3)), energy, rtol=1e-5)
    np.testing.assert_allclose(kl_to_prior(logits + 3, kernel), kl_to_prior(logits, kernel), rtol=1e-5)


def test_gradients_are_exact_in_probs_kernel_and_compatibility():
    logits, kernel = logits_and_kernel(3, symmetric=False)
    compatibility = np.random.default_rng(4).normal(size=(3, 3))
    with jax.enable_x64(True):
        energy = jax.jit(lambda p, k, c: pairwise_energy(p, k, compatibility=c))
        check_grads(energy, (reference.softmax(logits), kernel, compatibility), order=1, modes=["rev"])
        check_grads(jax.jit(kl_to_prior), (logits, kernel), order=2, modes=["rev"])


def test_kl_and_log_partition_are_the_enumerated_kl():
    image = np.random.default_rng(5).uniform(0, 60, (3, 3, 3))
    logits = np.random.default_rng(6).normal(size=(9, 3))
    with jax.enable_x64(True):
        kernel = np.asarray(dense_kernel(image, KernelParams(2.0, 2.0, 20.0, 1.0, 1.0)))
        value = kl_to_prior(logits, kernel) + reference.log_partition(kernel, 3)
        np.testing.assert_allclose(value, reference.kl_to_prior(reference.softmax(logits), kernel), rtol=1e-10)
        compatibility = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 0.5], [3.0, 0.5, 0.0]])
        value = kl_to_prior(logits, kernel, compatibility=compatibility)
        value = value + reference.log_partition(kernel, 3, compatibility)
        expected = reference.kl_to_prior(reference.softmax(logits), kernel, compatibility)
        np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_kl_gradient_is_that_of_the_enumerated_kl():
    logits, kernel = logits_and_kernel(7, num_pixels=9)
    every = reference.labellings(9, 3)
    log_p = -reference.labelling_energies(kernel, 3) - reference.log_partition(kernel, 3)

    def enumerated(logits):
        log_q = jax.nn.log_softmax(logits)[jnp.arange(9), every].sum(axis=1)
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p))

    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(kl_to_prior)(logits, kernel), jax.grad(enumerated)(logits), atol=1e-10)


@pytest.mark.parametrize(("num_pixels", "num_classes"), [(1, 3), (4, 1), (1, 1), (5, 3)])
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_extremes_are_finite_in_value_and_gradient(num_pixels, num_classes, size):
    logits, kernel = logits_and_kernel(10, num_pixels, num_classes)
    logits = np.float32(np.sign(logits) * size)
    value, gradient = jax.jit(jax.value_and_grad(kl_to_prior))(logits, kernel)
    expected = reference.pairwise_energy(reference.softmax(logits), kernel)
    probs = reference.softmax(logits)
    expected += np.sum(np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-300)), 0))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(gradient))
    log_probs = mean_field(logits, kernel, num_iterations=3)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_promoted(dtype):
    logits, kernel = logits_and_kernel(11)
    half = jnp.asarray(logits, dtype)
    value = kl_to_prior(half, kernel)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, kl_to_prior(np.asarray(half, np.float32), kernel), rtol=1e-6)
    assert jax.grad(kl_to_prior)(half, kernel).dtype == half.dtype
    assert mean_field(half, kernel).dtype == jnp.float32


def test_vmap_equals_a_loop():
    cases = [logits_and_kernel(seed) for seed in range(4)]
    logits, kernels = (np.stack(part) for part in zip(*cases, strict=True))
    looped = [jax.value_and_grad(kl_to_prior)(x, k) for x, k in cases]
    values, gradients = jax.vmap(jax.value_and_grad(kl_to_prior))(logits, kernels)
    np.testing.assert_allclose(values, [v for v, _ in looped], rtol=1e-5)
    np.testing.assert_allclose(gradients, np.stack([g for _, g in looped]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(mean_field)(logits, kernels), np.stack([mean_field(x, k) for x, k in cases]), rtol=1e-4, atol=1e-5
    )


@jax.jit
def energies_and_gradients(probs, kernel, compatibility):
    """Of Potts, in probabilities and kernel weights; and of a compatibility, in that as well."""

    def energy(probs, weights, compatibility):
        weighted = kernel._replace(bilateral_weight=weights[0], gaussian_weight=weights[1])
        return pairwise_energy(probs, weighted, compatibility=compatibility)

    weights = jnp.stack([kernel.bilateral_weight, kernel.gaussian_weight])
    of_potts = jax.value_and_grad(energy, (0, 1))(probs, weights, None)
    return of_potts, jax.value_and_grad(energy, (0, 1, 2))(probs, weights, compatibility)


@pytest.mark.slow_except("lattice-symmetric")
@pytest.mark.parametrize(("form", "normalisation"), list(itertools.product(sorted(FORMS), sorted(NORMALISATIONS))))
def test_energy_of_an_image_kernel_is_that_of_the_matrix_it_stands_for(form, normalisation):
    case = case_of(form, normalisation)
    probs, compatibility = soft_labels(), np.random.default_rng(1).normal(size=(4, 4)) + 1
    one, zero = jnp.float32(1), jnp.float32(0)
    results, *parts = (
        energies_and_gradients(probs, case.kernel._replace(bilateral_weight=w1, gaussian_weight=w2), compatibility)
        for w1, w2 in ((10 * one, 3 * one), (one, zero), (zero, one))
    )
    for i, mu in enumerate((reference.potts(4), compatibility)):
        energy, gradients = results[i]
        mu = (mu + mu.T) / 2
        message = case.symmetric @ probs
        np.testing.assert_allclose(energy, np.vdot(probs, message @ mu) / 2, rtol=1e-4)
        gradient = message @ mu
        np.testing.assert_allclose(gradients[0], gradient, atol=1e-4 * np.abs(gradient).max())
        # The energy is linear in the weights.
        np.testing.assert_allclose(gradients[1], [part[i][0] for part in parts], rtol=2e-4)
    np.testing.assert_allclose(results[1][1][2], probs.T @ message / 2, rtol=1e-4)


@pytest.mark.slow
def test_gradients_of_the_exact_form_in_weights_widths_and_compatibility():
    image, probs = reference.smooth_image(4, 3, 4), soft_labels(12, 3)
    compatibility = np.random.default_rng(4).normal(size=(3, 3))

    @jax.jit
    def energy(probs, weights, colour_width, compatibility):
        params = KernelParams(weights[0], 2.0, colour_width, weights[1], 1.0)
        kernel = exact_image_kernel(image, params, normalisation="row")
        return pairwise_energy(probs, kernel, compatibility=compatibility)

    with jax.enable_x64(True):
        check_grads(energy, (probs, np.array([1.3, 0.7]), 30.0, compatibility), order=1, modes=["rev"])


ON_DEVICES = {
    "anchors": ("anchors", {"tolerance": 1e-3}),
    "exact": ("exact", {}),
    "exact, few labels": ("exact", {"drop_below": 1e-3}),
    "lattice": ("lattice", {}),
}


def outcome_of(case):
    """The energy of an image, its gradient, and what mean field makes of the logits, as a function."""

    form, options = ON_DEVICES[case]

    def outcome(image, logits):
        kernel = image_kernel(image, COARSE, form=form)
        energy, gradient = jax.value_and_grad(pairwise_energy)(jax.nn.softmax(logits), kernel)
        return energy, gradient, mean_field(logits, kernel, num_iterations=3, **options)

    return outcome


@functools.cache
def on_one_device(case):
    """Four images, logits of theirs, and the outcome of the batch."""
    images = np.stack([reference.smooth_image(seed, 7, 9) for seed in range(4)])[..., :1].astype(np.float32)
    logits = np.random.default_rng(8).normal(size=(4, 63, 7)).astype(np.float32)
    logits[:, :, 3:] -= np.array([20, 20, 0, 20], np.float32)[:, None, None]
    return images, logits, jax.jit(jax.vmap(outcome_of(case)))(images, logits)


def spread_by_shard_map(function, devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("image",))
    spec = jax.sharding.PartitionSpec("image")
    return jax.jit(jax.shard_map(jax.vmap(function), mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec, spec)))


def spread_by_pmap(function, devices):
    # Image by image, so that the batch on one device is compared with no batch as well.
    return jax.pmap(function, devices=devices)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_DEVICES)
@pytest.mark.parametrize("spread", [spread_by_shard_map, spread_by_pmap])
def test_four_devices_equal_a_batch_on_one(case, spread):
    devices = jax.devices()[:4]
    if len(devices) < 4:
        pytest.skip("needs four devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    images, logits, expected = on_one_device(case)
    for got, wanted in zip(spread(outcome_of(case), devices)(images, logits), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("costs", [[[0, 1], [1, 0]], [[1, 1], [1, 1]]])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8])
def test_a_compatibility_of_any_type_is_that_of_floats(dtype, costs):
    """Where NumPy subtracts no booleans, and -128 has no magnitude."""
    least = -128 if dtype == np.int8 else 1
    costs = least * np.array(costs)
    found = checked_compatibility(costs.astype(dtype), 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, costs)


def test_costs_that_float64_holds_are_taken_where_it_is_enabled():
    with jax.enable_x64(True):
        assert checked_compatibility(np.full((2, 2), 1e100), 2)[0, 1] == 1e100


@pytest.mark.parametrize(("call", "message"), [
    (lambda: pairwise_energy(np.ones((2, 3, 4)), np.ones((3, 3))), r"probs: expected shape \[m, K\].*jax\.vmap"),
    (lambda: pairwise_energy(np.ones((2, 3)), np.ones((3, 3))), r"kernel: expected shape \[2, 2\]"),
    (lambda: pairwise_energy(np.ones((2, 3)), np.ones((2, 2)), compatibility=np.ones((2, 2))), "compatibility"),
    (lambda: kl_to_prior(np.ones(3), np.ones((3, 3))), "logits"),
])
def test_bad_arguments_are_told(call, message):
    with jax.disable_jit(), pytest.raises(ValueError, match=message):
        call()
