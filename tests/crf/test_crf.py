import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled
from jax.test_util import check_grads
from pictures import COARSE, case_of, soft_labels

from lcrf_jax.crf.energy import kl_to_prior, pairwise_energy
from lcrf_jax.crf.exact import NORMALISATIONS, dense_kernel
from lcrf_jax.crf.image_kernels import FORMS, exact_image_kernel, image_kernel
from lcrf_jax.crf.inference import mean_field, refine, refined_posterior
from lcrf_jax.crf.params import KernelParams

kl_to_prior, mean_field, pairwise_energy, refine = map(compiled, (kl_to_prior, mean_field, pairwise_energy, refine))


def random_case(seed, num_pixels=7, num_classes=3, symmetric=True):
    """Logits and a positive kernel with something on its diagonal."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 0.6, (num_pixels, num_pixels))
    kernel = (kernel + kernel.T) / 2 if symmetric else kernel
    return rng.normal(size=(num_pixels, num_classes)) * 1.5, kernel


@pytest.fixture(scope="module")
def picture():
    """A 32x32 picture, logits of soft labels on it, and its dense kernel."""
    image = reference.smooth_image(1, 32, 32)
    logits = np.repeat(np.repeat(np.random.default_rng(1).normal(size=(8, 8, 4)) * 2, 4, axis=0), 4, axis=1)
    return image, logits.reshape(-1, 4).astype(np.float32), dense_kernel(image, COARSE)


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
    # q_2 is uniform, so one update adds 2 * 1/2 to both classes of pixel 1, for nothing; pixel 2 sees (.8, .2).
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


def changes_of_mean_field(unary, kernel, num_iterations):
    """How much the most changed probability changes in every iteration."""
    probs = [reference.mean_field(unary, kernel, n) for n in range(num_iterations + 1)]
    return [np.abs(new - old).max() for old, new in itertools.pairwise(probs)]


def test_mean_field_stops_once_nothing_changes_by_more_than_the_tolerance():
    unary, kernel = random_case(13, symmetric=False)
    kernel = kernel / 2
    changes = changes_of_mean_field(unary, kernel, 6)
    assert np.all(np.diff(changes) < 0)
    run = jax.jit(mean_field, static_argnames="num_iterations")
    for last in (1, 3):
        # Stops after the first iteration whose change is not above the tolerance.
        tolerance = (changes[last - 1] + changes[last]) / 2
        stopped = run(unary, kernel, num_iterations=6, tolerance=tolerance)
        np.testing.assert_allclose(stopped, run(unary, kernel, num_iterations=last + 1), atol=1e-5)
        assert np.abs(stopped - run(unary, kernel, num_iterations=last)).max() > 1e-3
    all_of_them = run(unary, kernel, num_iterations=6)
    np.testing.assert_allclose(run(unary, kernel, num_iterations=6, tolerance=0.0), all_of_them, atol=1e-6)
    np.testing.assert_allclose(
        run(unary, kernel, num_iterations=6, tolerance=1.0), run(unary, kernel, num_iterations=1), atol=1e-6
    )


def test_mean_field_stops_for_every_image_by_itself():
    cases = [random_case(seed) for seed in range(3)]
    unary, kernels = (np.stack(part) for part in zip(*cases, strict=True))
    kernels = kernels * np.array([0.05, 0.3, 1.0])[:, None, None]
    changes = [np.array(changes_of_mean_field(*case, 8)) for case in zip(unary, kernels, strict=True)]
    last = [np.argmax(change <= 0.02) + 1 for change in changes]
    assert len(set(last)) == 3
    stopped = jax.jit(jax.vmap(functools.partial(mean_field, num_iterations=8, tolerance=0.02)))(unary, kernels)
    for i, num_iterations in enumerate(last):
        expected = reference.mean_field(unary[i], kernels[i], num_iterations)
        np.testing.assert_allclose(np.exp(stopped[i]), expected, rtol=1e-4, atol=1e-6)


def many_labels(seed, num_kept, num_classes=21, num_pixels=24, peak=3e-4):
    """Logits of many labels of which all but a few, spread over the classes, are below a peak at every pixel."""
    rng = np.random.default_rng(seed)
    kept = rng.permutation(num_classes)[:num_kept]
    probs = peak * rng.uniform(0.1, 1, (num_pixels, num_classes))
    probs[:, kept] = reference.softmax(rng.normal(size=(num_pixels, num_kept)) * 2)
    probs[:, kept] *= (1 - np.delete(probs, kept, axis=1).sum(axis=1))[:, None] / probs[:, kept].sum(axis=1)[:, None]
    kernel = rng.uniform(0, 1, (num_pixels, num_pixels))
    np.fill_diagonal(kernel, 0)
    kernel = 8 * (kernel + kernel.T) / (kernel + kernel.T).sum(axis=1).max()
    return np.log(probs).astype(np.float32), kernel.astype(np.float32), np.sort(kept)


dropping = jax.jit(functools.partial(mean_field, num_iterations=5, drop_below=1e-3))
keeping = jax.jit(functools.partial(mean_field, num_iterations=5))


@pytest.mark.parametrize(("num_kept", "bucket"), [(1, 4), (3, 4), (4, 4), (5, 8), (9, 21)])
def test_labels_that_are_dropped_and_those_that_fill_the_bucket(num_kept, bucket):
    unary, kernel, _ = many_labels(num_kept, num_kept)
    order = np.argsort(-unary.max(axis=0), kind="stable")
    log_probs, full = np.asarray(dropping(unary, kernel)), np.asarray(keeping(unary, kernel))
    np.testing.assert_array_equal(log_probs.argmax(axis=1), full.argmax(axis=1))
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(log_probs), np.exp(full), atol=np.e * 1e-3)
    # The labels of the bucket are iterated as if there were no others; the rest keeps its logit, without a message.
    inside, outside = order[:bucket], order[bucket:]
    alone = np.asarray(mean_field(unary[:, inside], kernel, num_iterations=5))
    np.testing.assert_allclose(jax.nn.log_softmax(log_probs[:, inside], axis=-1), alone, atol=1e-4)
    assert np.all(log_probs[:, outside] <= unary[:, outside] + 1e-5)
    if outside.size:
        last = np.exp(mean_field(unary[:, inside], kernel, num_iterations=4))
        message = kernel @ last[:, :1]
        difference = log_probs[:, outside] - log_probs[:, inside[:1]]
        np.testing.assert_allclose(difference, unary[:, outside] - unary[:, inside[:1]] - message, atol=1e-3)


def test_no_label_that_may_be_dropped_becomes_e_times_as_probable():
    # Where the others are many and small, a label that is as probable everywhere as the bound allows grows most.
    num_pixels, num_classes, row_sum = 24, 1000, 8
    kernel = np.full((num_pixels, num_pixels), row_sum / (num_pixels - 1), np.float32)
    peak = 1 / (np.e * row_sum)
    unary = np.full((num_pixels, num_classes), np.log((1 - peak) / (num_classes - 1)), np.float32)
    unary[:, 5] = np.log(peak)
    grown = [
        float(np.exp(mean_field(unary, kernel, num_iterations=num_iterations)[:, 5].max())) / peak
        for num_iterations in (1, 2, 5, 10, 50)
    ]
    assert max(grown) <= np.e
    assert max(grown) > 1.5


def test_labels_above_the_bound_of_the_kernel_are_kept_whatever_is_asked_for():
    # Row sums of 8 ask for labels above 1 / (8 e) = .046 to be kept, even if all could be dropped: 4 and one of .06.
    unary, kernel, kept = many_labels(7, 4, peak=0.01)
    outside = np.delete(np.arange(21), kept)
    assert np.exp(unary[:, kept]).max(axis=0).min() > 1 / 8
    unary[:, outside[0]] = np.log(0.06 / 0.94)
    unary = jax.nn.log_softmax(unary, axis=-1)
    log_probs = np.asarray(mean_field(unary, kernel, num_iterations=5, drop_below=1.0))
    bucket = np.argsort(-unary.max(axis=0), stable=True)[:8]
    alone = mean_field(unary[:, bucket], kernel, num_iterations=5)
    np.testing.assert_allclose(jax.nn.log_softmax(log_probs[:, bucket], axis=-1), alone, atol=1e-4)


def test_labels_above_what_is_asked_for_are_kept():
    unary, kernel, kept = many_labels(8, 4)
    unary[:, np.delete(np.arange(21), kept)[0]] = np.log(0.01)
    unary = jax.nn.log_softmax(unary, axis=-1)
    order = np.argsort(-unary.max(axis=0), stable=True)
    for drop_below, bucket in ((0.02, 4), (0.005, 8)):
        log_probs = np.asarray(mean_field(unary, kernel, num_iterations=5, drop_below=drop_below))
        alone = mean_field(unary[:, order[:bucket]], kernel, num_iterations=5)
        np.testing.assert_allclose(jax.nn.log_softmax(log_probs[:, order[:bucket]], axis=-1), alone, atol=1e-4)


def test_dropping_with_few_labels_no_iterations_and_a_tolerance():
    for num_classes in (1, 2, 4):
        logits, kernel = random_case(14, num_classes=num_classes)
        dropped = mean_field(logits - 9 * np.arange(num_classes), kernel, num_iterations=2, drop_below=1e-3)
        expected = mean_field(logits - 9 * np.arange(num_classes), kernel, num_iterations=2)
        np.testing.assert_allclose(dropped, expected, atol=1e-5)
    unary, kernel, _ = many_labels(15, 3)
    np.testing.assert_allclose(mean_field(unary, kernel, num_iterations=0, drop_below=0.1), unary, atol=1e-5)
    once = mean_field(unary, kernel, num_iterations=1, drop_below=1e-3)
    np.testing.assert_allclose(mean_field(unary, kernel, tolerance=1.0, drop_below=1e-3), once, atol=1e-5)


def test_dropping_under_vmap_equals_a_loop():
    cases = [many_labels(seed, num_kept) for seed, num_kept in enumerate((3, 6, 20))]
    unary, kernels, _ = zip(*cases, strict=True)
    looped = np.stack([dropping(u, k) for u, k in zip(unary, kernels, strict=True)])
    got = jax.jit(jax.vmap(functools.partial(mean_field, num_iterations=5, drop_below=1e-3)))
    np.testing.assert_allclose(got(np.stack(unary), np.stack(kernels)), looped, atol=1e-4)
    shared = jax.vmap(functools.partial(mean_field, num_iterations=5, drop_below=1e-3), in_axes=(0, None))
    np.testing.assert_allclose(shared(np.stack(unary), kernels[0])[0], looped[0], atol=1e-4)


ON_DEVICES = {
    "anchors": {"tolerance": 1e-3},
    "exact": {"drop_below": 1e-3},
    "lattice": {},
}


def outcome_of(form):
    """The energy of an image, its gradient, and what mean field makes of the logits, as a function."""

    def outcome(image, logits):
        kernel = image_kernel(image, COARSE, form=form)
        energy, gradient = jax.value_and_grad(pairwise_energy)(jax.nn.softmax(logits), kernel)
        return energy, gradient, mean_field(logits, kernel, num_iterations=3, **ON_DEVICES[form])

    return outcome


@functools.cache
def on_one_device(form):
    """Four images, logits of theirs, and the outcome of the batch."""
    images = np.stack([reference.smooth_image(seed, 7, 9) for seed in range(4)])[..., :1].astype(np.float32)
    logits = np.random.default_rng(8).normal(size=(4, 63, 7)).astype(np.float32)
    logits[:, :, 3:] -= np.array([20, 20, 0, 20], np.float32)[:, None, None]
    return images, logits, jax.jit(jax.vmap(outcome_of(form)))(images, logits)


def spread_by_shard_map(function, devices):
    mesh = jax.sharding.Mesh(np.array(devices), ("image",))
    spec = jax.sharding.PartitionSpec("image")
    return jax.jit(jax.shard_map(jax.vmap(function), mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec, spec)))


def spread_by_pmap(function, devices):
    # Image by image, so that the batch on one device is compared with no batch as well.
    return jax.pmap(function, devices=devices)


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("spread", [spread_by_shard_map, spread_by_pmap])
def test_four_devices_equal_a_batch_on_one(form, spread):
    devices = jax.devices()[:4]
    if len(devices) < 4:
        pytest.skip("needs four devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    images, logits, expected = on_one_device(form)
    for got, wanted in zip(spread(outcome_of(form), devices)(images, logits), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_mean_field_takes_the_two_orders_of_a_lattice_in_turn():
    case = case_of("lattice", "symmetric")
    logits = np.log(soft_labels()).astype(np.float32)
    probs = reference.softmax(logits)
    for matrix in (case.matrix, case.matrix.T, case.matrix):
        probs = reference.softmax(logits + matrix @ probs)
    log_probs = jax.jit(functools.partial(mean_field, num_iterations=3))(logits, case.kernel)
    np.testing.assert_allclose(np.exp(log_probs), probs, atol=1e-3)
    one_order = reference.softmax(logits + case.matrix @ reference.softmax(logits + case.matrix @ probs))
    assert np.abs(one_order - probs).max() > 1e-2


refined = jax.jit(lambda image, logits: refine(image, logits, COARSE))


def test_refine_is_mean_field_with_the_kernel_of_the_image(picture):
    image, logits, dense = picture
    log_probs = refined(image, logits.reshape(32, 32, 4))
    assert log_probs.shape == (32, 32, 4)
    exact = np.asarray(mean_field(logits, dense)).reshape(32, 32, 4)
    assert np.mean(np.argmax(log_probs, -1) != np.argmax(exact, -1)) < 0.05
    assert np.mean(np.argmax(exact, -1) != np.argmax(logits.reshape(32, 32, 4), -1)) > 0.1


def test_refine_follows_an_edge_that_noisy_logits_do_not_see():
    truth = np.zeros((32, 32), int)
    truth[:, 17:] = 1
    image = np.where(truth[..., None] == 1, [200.0, 60.0, 60.0], [60.0, 60.0, 200.0])
    rng = np.random.default_rng(3)
    logits = 2.0 * np.eye(4)[truth] + rng.normal(size=(32, 32, 4)) * [2, 2, 1, 1]
    before = np.mean(np.argmax(logits, -1) != truth)
    after = np.argmax(refined(image, logits.astype(np.float32)), -1)
    assert before > 0.15
    assert np.mean(after != truth) < 0.005


@pytest.mark.slow
def test_an_overflow_of_the_lattice_is_not_silent():
    run = jax.jit(lambda x, z: refined_posterior(x, z, COARSE, form="lattice", num_iterations=3, capacity=60))
    noise, logits = np.random.default_rng(5).uniform(0, 255, (8, 8, 1)), np.random.default_rng(6).normal(size=(8, 8, 2))
    posterior = run(noise, logits)
    assert posterior.overflowed and posterior.num_iterations == 0 and np.isnan(posterior.free_energy)
    np.testing.assert_allclose(posterior.log_probs, jax.nn.log_softmax(np.float32(logits)), rtol=1e-5)
    posterior = run(np.full((8, 8, 1), 200.0), logits)
    assert not posterior.overflowed and posterior.num_iterations == 3 and np.isfinite(posterior.free_energy)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: pairwise_energy(np.ones((2, 3, 4)), np.ones((3, 3))), r"probs: expected shape \[m, K\].*jax\.vmap"),
    (lambda: pairwise_energy(np.ones((2, 3)), np.ones((3, 3))), r"kernel: expected shape \[2, 2\]"),
    (lambda: pairwise_energy(np.ones((2, 3)), np.ones((2, 2)), compatibility=np.ones((2, 2))), "compatibility"),
    (lambda: kl_to_prior(np.ones(3), np.ones((3, 3))), "logits"),
    (lambda: mean_field(np.ones((2, 3)), np.ones((3, 3))), "kernel"),
    (lambda: mean_field(np.ones((2, 3)), np.ones((2, 2)), num_iterations=-1), "num_iterations"),
    (lambda: mean_field(np.ones((2, 3)), np.ones((2, 2)), tolerance=-0.1), "tolerance: .* >= 0, got -0.1"),
    (lambda: mean_field(np.ones((2, 3)), np.ones((2, 2)), drop_below=-0.1), "drop_below: .* >= 0, got -0.1"),
    (lambda: mean_field(np.ones((2, 3)), np.ones((2, 2)), drop_below=0.1, compatibility=np.ones((3, 3))),
     "drop_below: expected None with a compatibility"),
    (lambda: refine(np.full((4, 6, 3), 2.0), np.ones((4, 6, 2)), COARSE, colour_max=1.0), "image.*got 2..2"),
    (lambda: refine(np.arange(72).reshape(4, 6, 3) / 72, np.ones((4, 6, 2)), COARSE), "pass colour_max=1"),
    (lambda: refine(np.ones((4, 6, 3)), np.ones((6, 4, 2)), COARSE), r"logits: expected shape \[4, 6, K\]"),
    (lambda: refine(np.ones((4, 6)), np.ones((4, 6, 2)), COARSE), "image"),
    (lambda: refine(np.ones((4, 6, 3)), np.ones((4, 6, 2)), COARSE._replace(bilateral_position_width=0)),
     "position_width"),
])
def test_bad_arguments_are_told(call, message):
    with jax.disable_jit(), pytest.raises(ValueError, match=message):
        call()
