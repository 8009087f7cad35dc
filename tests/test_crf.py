import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads

from lcrf_jax.crf import (
    exact_image_kernel,
    filter_symmetric,
    filter_with,
    image_kernel,
    kl_to_prior,
    mean_field,
    pairwise_energy,
    refine,
)
from lcrf_jax.kernels import KernelParams, dense_kernel
from lcrf_jax.lattice import lattice_overflowed

COARSE = KernelParams(10.0, 20.0, 13.0, 3.0, 0.75)


def random_case(seed, num_pixels=7, num_classes=3, symmetric=True):
    """Logits and a positive kernel with something on its diagonal."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 0.6, (num_pixels, num_pixels))
    kernel = (kernel + kernel.T) / 2 if symmetric else kernel
    return rng.normal(size=(num_pixels, num_classes)) * 1.5, kernel


@pytest.fixture(scope="module")
def picture():
    """A 32x32 picture, soft labels on it, its dense kernel, and its fast one."""
    image = reference.smooth_image(1, 32, 32)
    logits = np.repeat(np.repeat(np.random.default_rng(1).normal(size=(8, 8, 4)) * 2, 4, axis=0), 4, axis=1)
    fast = jax.jit(lambda x: image_kernel(x, COARSE))(image)
    return image, logits.reshape(-1, 4).astype(np.float32), dense_kernel(image, COARSE), fast


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_compatibility", [True, False])
def test_energy_equals_the_loops(symmetric, with_compatibility):
    logits, kernel = random_case(0, symmetric=symmetric)
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
    # q_2 is uniform, so one update adds 2 * 1/2 to both classes of pixel 1 and leaves it as it is; pixel 2 sees (.8, .2).
    unary = np.log([[0.8, 0.2], [0.5, 0.5]])
    expected = [[0.8, 0.2], reference.softmax([2 * 0.8, 2 * 0.2])]
    np.testing.assert_allclose(np.exp(mean_field(unary, kernel, num_iterations=1)), expected, rtol=1e-5)


def test_energy_invariances():
    logits, kernel = random_case(2, symmetric=False)
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
    logits, kernel = random_case(3, symmetric=False)
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
    logits, kernel = random_case(7, num_pixels=9)
    every = reference.labellings(9, 3)
    log_p = -reference.labelling_energies(kernel, 3) - reference.log_partition(kernel, 3)

    def enumerated(logits):
        log_q = jax.nn.log_softmax(logits)[jnp.arange(9), every].sum(axis=1)
        return jnp.sum(jnp.exp(log_q) * (log_q - log_p))

    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.grad(kl_to_prior)(logits, kernel), jax.grad(enumerated)(logits), atol=1e-10)


@pytest.mark.parametrize("num_iterations", [0, 1, 3])
@pytest.mark.parametrize("with_compatibility", [True, False])
def test_mean_field_equals_the_loops(num_iterations, with_compatibility):
    logits, kernel = random_case(8)
    compatibility = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 0.5], [3.0, 0.5, 0.0]]) if with_compatibility else None
    log_probs = jax.jit(
        lambda x, k: mean_field(x, k, num_iterations=num_iterations, compatibility=compatibility)
    )(logits, kernel)
    expected = reference.mean_field(logits, kernel, num_iterations, compatibility)
    np.testing.assert_allclose(np.exp(log_probs), expected, rtol=1e-4, atol=1e-6)


def test_a_fixed_point_of_mean_field_is_stationary_for_the_enumerated_free_energy():
    unary, kernel = random_case(9, num_pixels=6)
    kernel = kernel / 3

    def free_energy(logits):
        return kl_to_prior(logits, kernel) - jnp.sum(jax.nn.softmax(logits) * unary)

    with jax.enable_x64(True):
        fixed = mean_field(unary, kernel, num_iterations=200)
        np.testing.assert_allclose(mean_field(unary, kernel, num_iterations=201), fixed, atol=1e-10)
        np.testing.assert_allclose(jax.grad(free_energy)(fixed), 0, atol=1e-10)
        assert free_energy(fixed) < free_energy(jnp.asarray(unary)) - 1e-3
        for seed in range(5):
            nearby = fixed + 0.1 * np.random.default_rng(seed).normal(size=fixed.shape)
            assert free_energy(nearby) > free_energy(fixed)
        # The free energy bounds -log of the partition function of unary and pairwise terms together.
        every = reference.labellings(6, 3)
        scores = unary[np.arange(6), every].sum(axis=1) - reference.labelling_energies(kernel, 3)
        assert free_energy(fixed) > -np.logaddexp.reduce(scores)
        log_q = reference.factorised_log_probs(np.exp(fixed))
        np.testing.assert_allclose(free_energy(fixed), np.sum(np.exp(log_q) * (log_q - scores)), rtol=1e-10)


@pytest.mark.parametrize(("num_pixels", "num_classes"), [(1, 3), (4, 1), (1, 1), (5, 3)])
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_extremes_are_finite_in_value_and_gradient(num_pixels, num_classes, size):
    logits, kernel = random_case(10, num_pixels, num_classes)
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
    logits, kernel = random_case(11)
    half = jnp.asarray(logits, dtype)
    value = kl_to_prior(half, kernel)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, kl_to_prior(np.asarray(half, np.float32), kernel), rtol=1e-6)
    assert jax.grad(kl_to_prior)(half, kernel).dtype == half.dtype
    assert mean_field(half, kernel).dtype == jnp.float32


def test_vmap_equals_a_loop():
    cases = [random_case(seed) for seed in range(4)]
    logits, kernels = (np.stack(part) for part in zip(*cases, strict=True))
    looped = [jax.value_and_grad(kl_to_prior)(x, k) for x, k in cases]
    values, gradients = jax.vmap(jax.value_and_grad(kl_to_prior))(logits, kernels)
    np.testing.assert_allclose(values, [v for v, _ in looped], rtol=1e-5)
    np.testing.assert_allclose(gradients, np.stack([g for _, g in looped]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(mean_field)(logits, kernels), np.stack([mean_field(x, k) for x, k in cases]), rtol=1e-4, atol=1e-5
    )


def test_filters_leave_self_pairs_out():
    logits, kernel = random_case(12, symmetric=False)
    off_diagonal = kernel - np.diag(np.diagonal(kernel))
    np.testing.assert_allclose(filter_with(kernel, logits), off_diagonal @ logits, rtol=1e-4, atol=1e-5)
    symmetric = (off_diagonal + off_diagonal.T) / 2
    np.testing.assert_allclose(filter_symmetric(kernel, logits), symmetric @ logits, rtol=1e-4, atol=1e-5)


def test_the_exact_kernel_without_its_matrix_equals_the_dense_one(picture):
    image, logits, dense, _ = picture
    kernel = jax.jit(lambda x: exact_image_kernel(x, COARSE))(image)
    value, gradient = jax.jit(jax.value_and_grad(kl_to_prior))(logits, kernel)
    expected, expected_gradient = jax.value_and_grad(kl_to_prior)(logits, dense)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-3 * np.abs(expected_gradient).max())
    expected = reference.dense_kernel(image[:5, :6], COARSE, "symmetric")
    matrix = filter_with(exact_image_kernel(image[:5, :6], COARSE), np.eye(30))
    np.testing.assert_allclose(matrix, expected, rtol=1e-4, atol=2e-3)


def test_the_fast_kernel_approximates_the_dense_one(picture):
    _, logits, dense, fast = picture
    probs = jax.nn.softmax(logits)
    assert not lattice_overflowed(fast.bilateral)
    expected = np.asarray(filter_with(dense, probs))
    for filtered in jax.jit(lambda k, p: (filter_with(k, p), filter_symmetric(k, p)))(fast, probs):
        assert np.linalg.norm(filtered - expected) < 0.06 * np.linalg.norm(expected)
    energy, gradient = jax.jit(jax.value_and_grad(pairwise_energy))(probs, fast)
    exact_energy, exact_gradient = jax.value_and_grad(pairwise_energy)(probs, dense)
    np.testing.assert_allclose(energy, exact_energy, rtol=0.03)
    assert np.linalg.norm(gradient - exact_gradient) < 0.06 * np.linalg.norm(exact_gradient)


def test_the_fast_energy_has_its_own_exact_gradient(picture):
    _, logits, _, fast = picture
    probs = jax.nn.softmax(logits)
    energy, gradient = jax.jit(jax.value_and_grad(pairwise_energy))(probs, fast)
    # The energy is quadratic, so the difference of two values is the gradient half-way, without an error.
    direction = np.random.default_rng(2).uniform(size=probs.shape).astype(np.float32)
    energies = jax.jit(pairwise_energy)
    ahead, behind = energies(probs + direction, fast), energies(probs - direction, fast)
    np.testing.assert_allclose((ahead - behind) / 2, jnp.sum(gradient * direction), rtol=1e-3)
    np.testing.assert_allclose(jnp.sum(gradient * probs) / 2, energy, rtol=1e-5)


def test_weights_of_the_fast_kernel_can_be_learnt(picture):
    _, logits, _, fast = picture
    probs = jax.nn.softmax(logits)

    @jax.jit
    def energy(weights):
        return pairwise_energy(probs, fast._replace(bilateral_weight=weights[0], gaussian_weight=weights[1]))

    gradient = jax.grad(energy)(jnp.array([10.0, 3.0]))
    np.testing.assert_allclose(gradient[0], energy(jnp.array([1.0, 0.0])), rtol=1e-4)
    np.testing.assert_allclose(gradient[1], energy(jnp.array([0.0, 1.0])), rtol=1e-4)


@pytest.mark.parametrize("make", [image_kernel, exact_image_kernel])
def test_padding_that_is_not_valid_changes_nothing(make):
    image = np.random.default_rng(6).uniform(0, 255, (12, 14, 3))
    image[:9, :11] = reference.smooth_image(2, 9, 11)
    valid = np.zeros((12, 14), bool)
    valid[:9, :11] = True
    values = np.random.default_rng(7).normal(size=(12, 14, 2))
    padded = jax.jit(lambda x, v: filter_with(make(x, COARSE, valid=valid), v.reshape(-1, 2)).reshape(v.shape))
    plain = jax.jit(lambda x, v: filter_with(make(x, COARSE), v.reshape(-1, 2)).reshape(v.shape))
    filtered = np.asarray(padded(image, values))
    np.testing.assert_allclose(filtered[:9, :11], plain(image[:9, :11], values[:9, :11]), atol=2e-4)
    np.testing.assert_array_equal(filtered[~valid], 0)


def test_refine_and_the_energy_under_shard_map_equal_the_single_device():
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices: XLA_FLAGS=--xla_force_host_platform_device_count=2")
    mesh = jax.sharding.Mesh(np.array(devices), ("image",))
    images = np.stack([reference.smooth_image(seed, 7, 9) for seed in range(2)])
    logits = np.random.default_rng(8).normal(size=(2, 7, 9, 3)).astype(np.float32)

    def both(image, logits):
        kernel = image_kernel(image, COARSE)
        return refine(image, logits, COARSE, num_iterations=2), jax.grad(kl_to_prior)(logits.reshape(-1, 3), kernel)

    spec = jax.sharding.PartitionSpec("image")
    spread = jax.shard_map(jax.vmap(both), mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec))
    got, expected = jax.jit(spread)(images, logits), jax.jit(jax.vmap(both))(images, logits)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_refine_is_mean_field_with_the_kernel_of_the_image(picture):
    image, logits, dense, _ = picture
    log_probs = jax.jit(lambda x, u: refine(x, u, COARSE))(image, logits.reshape(32, 32, 4))
    assert log_probs.shape == (32, 32, 4)
    exact = np.asarray(mean_field(logits, dense)).reshape(32, 32, 4)
    assert np.mean(np.argmax(log_probs, -1) != np.argmax(exact, -1)) < 0.05
    assert np.mean(np.argmax(exact, -1) != np.argmax(logits.reshape(32, 32, 4), -1)) > 0.1


def test_refine_follows_an_edge_that_noisy_logits_do_not_see():
    truth = np.zeros((24, 40), int)
    truth[:, 17:] = 1
    image = np.where(truth[..., None] == 1, [200.0, 60.0, 60.0], [60.0, 60.0, 200.0])
    rng = np.random.default_rng(3)
    logits = 2.0 * np.eye(2)[truth] + rng.normal(size=(24, 40, 2)) * 2
    before = np.mean(np.argmax(logits, -1) != truth)
    params = KernelParams(8.0, 20.0, 13.0, 2.0, 1.0)
    after = np.argmax(jax.jit(lambda x, u: refine(x, u, params))(image.astype(np.uint8), logits), -1)
    assert before > 0.15
    assert np.mean(after != truth) < 0.005


def test_refine_under_vmap_equals_a_loop():
    images = np.stack([reference.smooth_image(seed, 10, 9) for seed in range(2)])
    logits = np.random.default_rng(4).normal(size=(2, 10, 9, 3))

    def refined(image, logits):
        return refine(image, logits, COARSE, num_iterations=3)

    one = jax.jit(refined)
    looped = np.stack([one(x, u) for x, u in zip(images, logits, strict=True)])
    np.testing.assert_allclose(jax.jit(jax.vmap(refined))(images, logits), looped, rtol=1e-3, atol=1e-4)


def test_an_overflow_of_the_lattice_is_not_silent():
    refined = jax.jit(lambda x: refine(x, np.zeros((8, 8, 2)), COARSE, num_iterations=1, capacity=60))
    assert np.all(np.isnan(refined(np.random.default_rng(5).uniform(0, 255, (8, 8, 3)))))
    assert np.all(np.isfinite(refined(np.full((8, 8, 3), 200.0))))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: pairwise_energy(np.ones((2, 3, 4)), np.ones((3, 3))), r"probs: expected shape \[m, K\].*jax\.vmap"),
    (lambda: pairwise_energy(np.ones((2, 3)), np.ones((3, 3))), r"kernel: expected shape \[2, 2\]"),
    (lambda: pairwise_energy(np.ones((2, 3)), np.ones((2, 2)), compatibility=np.ones((2, 2))), "compatibility"),
    (lambda: kl_to_prior(np.ones(3), np.ones((3, 3))), "logits"),
    (lambda: mean_field(np.ones((2, 3)), np.ones((3, 3))), "kernel"),
    (lambda: mean_field(np.ones((2, 3)), np.ones((2, 2)), num_iterations=-1), "num_iterations"),
    (lambda: filter_with(np.ones((2, 2)), np.ones(2)), "values"),
    (lambda: refine(np.ones((4, 6, 3)), np.ones((6, 4, 2)), COARSE), r"logits: expected shape \[4, 6, K\]"),
    (lambda: refine(np.ones((4, 6)), np.ones((4, 6, 2)), COARSE), "image"),
    (lambda: refine(np.ones((4, 6, 3)), np.ones((4, 6, 2)), COARSE._replace(bilateral_position_width=0)), "position_width"),
])
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
