"""Mean field against its loops: where it stops, the labels that it drops, and the refined image."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import logits_and_kernel
from compiled import compiled
from pictures import COARSE, case_of, soft_labels

from lcrf_jax.crf import exact, inference, iterations
from lcrf_jax.crf.coarse import coarse_grid
from lcrf_jax.crf.energy import kl_to_prior
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.feature_kernels import feature_kernel
from lcrf_jax.crf.image_kernels import image_kernel
from lcrf_jax.crf.inference import mean_field, refine, refined_posterior

kl_to_prior, mean_field, refine = map(compiled, (kl_to_prior, mean_field, refine))


@pytest.fixture(scope="module")
def picture():
    """A 32x32 picture, logits of soft labels on it, and its dense kernel."""
    image = reference.smooth_image(1, 32, 32)
    logits = np.repeat(np.repeat(np.random.default_rng(1).normal(size=(8, 8, 4)) * 2, 4, axis=0), 4, axis=1)
    return image, logits.reshape(-1, 4).astype(np.float32), dense_kernel(image, COARSE)


@pytest.mark.parametrize("num_iterations", [0, 1, 3])
@pytest.mark.parametrize("with_compatibility", [True, False])
def test_mean_field_equals_the_loops(num_iterations, with_compatibility):
    logits, kernel = logits_and_kernel(8)
    compatibility = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 0.5], [3.0, 0.5, 0.0]]) if with_compatibility else None
    log_probs = jax.jit(
        lambda x, k: mean_field(x, k, num_iterations=num_iterations, compatibility=compatibility)
    )(logits, kernel)
    expected = reference.mean_field(logits, kernel, num_iterations, compatibility)
    np.testing.assert_allclose(np.exp(log_probs), expected, rtol=1e-4, atol=1e-6)


def test_a_fixed_point_of_mean_field_is_stationary_for_the_enumerated_free_energy():
    unary, kernel = logits_and_kernel(9, num_pixels=6)
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


def changes_of_mean_field(unary, kernel, num_iterations):
    """How much the most changed probability changes in every iteration."""
    probs = [reference.mean_field(unary, kernel, n) for n in range(num_iterations + 1)]
    return [np.abs(new - old).max() for old, new in itertools.pairwise(probs)]


def test_mean_field_stops_once_nothing_changes_by_more_than_the_tolerance():
    unary, kernel = logits_and_kernel(13, symmetric=False)
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
    cases = [logits_and_kernel(seed) for seed in range(3)]
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
        logits, kernel = logits_and_kernel(14, num_classes=num_classes)
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


exact_kernel = functools.partial(image_kernel, params=COARSE, form="exact")
KINDS = {  # of kernels, with what mean field is asked for
    "plain": (exact_kernel, lambda _: {}),
    "dropped": (exact_kernel, lambda _: {"tolerance": 1e-3, "drop_below": 1e-3}),
    "coarse": (exact_kernel, lambda image: {"coarse": coarse_grid(image, COARSE, form="exact"), "coarse_iterations": 2}),
    "features": (lambda image: feature_kernel(np.float32(image.reshape(-1, 3)) / 13, weights=2.0), lambda _: {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_mean_field_computes_the_entries_of_a_small_exact_kernel_once(kind, picture, monkeypatch):
    image, logits, _ = picture
    make, options = KINDS[kind]
    kernel, given = make(image), options(image)
    expected = inference.mean_field(logits, kernel, num_iterations=4, **given)

    def anew(*_):
        raise AssertionError("a product computed the kernel anew")

    monkeypatch.setattr(exact, "filter_exact", anew)
    jax.clear_caches()
    np.testing.assert_array_equal(inference.mean_field(logits, kernel, num_iterations=4, **given), expected)
    with pytest.raises(AssertionError, match="anew"):
        kernel.apply(logits)


@pytest.mark.parametrize(("most_kept", "in_turn"), [(2**28, False), (2**22, True)])
def test_a_batch_of_exact_kernels_keeps_no_more_than_it_may(most_kept, in_turn, monkeypatch):
    monkeypatch.setattr(iterations, "_MOST_KEPT", most_kept)
    images = np.stack([reference.smooth_image(seed, 24, 24) for seed in range(4)])
    logits = np.random.default_rng(3).normal(size=(4, 576, 3)).astype(np.float32)

    def found(image, logits):
        return inference.mean_field(logits, exact_kernel(image), num_iterations=2)

    batched = jax.jit(jax.vmap(found))
    looped = np.stack([jax.jit(found)(*each) for each in zip(images, logits, strict=True)])
    np.testing.assert_allclose(batched(images, logits), looped, atol=1e-4)
    shapes = re.findall(r"tensor<([0-9x]*)x?f32>", batched.lower(images, logits).as_text())
    assert ("4x576x576x" in shapes) != in_turn and "576x576x" in shapes
    shared = jax.jit(jax.vmap(found, (None, 0)))  # the batch has one kernel
    np.testing.assert_allclose(shared(images[0], logits)[0], looped[0], atol=1e-4)
    assert re.search("dot_general.*4x576x3x", shared.lower(images[0], logits).as_text())


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
