"""The losses and targets of the compared methods: float64 transcriptions, cases by hand, images without tags or cues."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled_functions
from scipy.optimize import minimize

from lcrf_jax import baselines

majority_labels = baselines.majority_labels  # of NumPy
baselines = compiled_functions(baselines)

M, K = 24, 4
TAGS = {"some": [1, 0, 1, 0], "none": [1, 0, 0, 0], "every": [1, 1, 1, 1]}
KERNEL = np.random.default_rng(5).uniform(0, 0.1, (M, M))
KERNEL = (KERNEL + KERNEL.T) * (1 - np.eye(M))


def tags_of(name):
    return np.array(TAGS[name], bool)


def logits_of(seed, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, (M, K)).astype(np.float32)


def cues_of(seed):
    return np.random.default_rng(seed).choice([0, 1, 2, 3, 255, 255], M)


def floored(logits, min_prob=1e-4):
    return min_prob + (1 - K * min_prob) * reference.softmax(logits)


# Definitions in float64


def mil(logits, tags, sharpness=5.0):
    scores = [np.log(np.mean([np.exp(sharpness * g) for g in np.float64(column)])) / sharpness for column in logits.T]
    probs = reference.softmax(scores)
    return -np.mean([np.log(probs[k]) for k in range(K) if tags[k]])


def em_labels(order, logits, tags, foreground=0.2, background=0.4):
    """Labels after giving each class of the order its bias."""
    scores = {k: np.float64(logits)[:, k] for k in range(K) if tags[k]}
    winner = np.array([max(scores, key=lambda k: scores[k][i]) for i in range(len(logits))])
    for k in [k for k in order if tags[k]]:
        best = np.max(list(scores.values()), axis=0)
        rank = int(np.ceil((background if k == 0 else foreground) * len(logits)))
        missing = best - scores[k]
        bias = np.sort(missing)[rank - 1]
        if bias > 0:
            winner[missing <= bias] = k
            scores[k] = scores[k] + bias
    return winner


def seed(probs, cues):
    losses = [-np.log(probs[j, c]) for j, c in enumerate(cues) if c < K]
    return np.mean(losses) if losses else 0.0


def ranked(values, decay):
    weights = [decay ** (1681 / len(values) * i) for i in range(len(values))]
    return np.dot(weights, sorted(values, reverse=True)) / np.sum(weights)


def expand(probs, tags):
    present = [-np.log(ranked(probs[:, k], 0.996)) for k in range(1, K) if tags[k]]
    absent = [-np.log(1 - probs[:, k].max()) for k in range(1, K) if not tags[k]]
    means = sum(np.mean(part) for part in (present, absent) if part)
    return means - np.log(ranked(probs[:, 0], 0.999))


def constrain(probs):
    refined = reference.mean_field(np.log(probs), KERNEL, 10)
    return np.sum(refined * np.log(refined / probs)) / M


def sec(logits, tags, cues):
    probs = floored(logits)
    return seed(probs, cues) + expand(probs, tags) + constrain(probs)


def cross_entropy(logits, labels):
    probs = reference.softmax(logits)
    losses = [-np.log(probs[j, z]) for j, z in enumerate(labels) if 0 <= z < K]
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("sharpness", [0.5, 5.0])
def test_mil_is_its_definition(name, sharpness):
    loss = jax.jit(functools.partial(baselines.mil_lse_loss, sharpness=sharpness))
    np.testing.assert_allclose(loss(logits_of(1), tags_of(name)), mil(logits_of(1), tags_of(name), sharpness), rtol=1e-5)


def test_mil_scores_lie_between_mean_and_maximum():
    logits = logits_of(2)
    np.testing.assert_allclose(baselines.mil_lse_scores(logits, sharpness=1e-3), logits.mean(axis=0), atol=5e-3)
    np.testing.assert_allclose(baselines.mil_lse_scores(logits, sharpness=1e3), logits.max(axis=0), atol=5e-3)


def test_mil_by_hand():
    """Equal scores everywhere: every class has the same probability."""
    np.testing.assert_allclose(baselines.mil_lse_loss(jnp.full((5, K), 3.0), tags_of("some")), np.log(K), rtol=1e-6)


def test_the_image_level_prior_multiplies_the_probabilities():
    logits = logits_of(3)
    prior = reference.softmax(baselines.mil_lse_scores(logits))
    expected = reference.softmax(logits) * prior
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(baselines.ilp_log_probs(logits)), expected, rtol=1e-4)


def test_majority_labels_by_hand():
    labels = np.array([[1, 1, 0], [2, 1, 0], [2, 2, 0]], np.uint8)
    segments = np.array([[0, 0, 1], [0, 0, 3], [3, 3, 3]])
    expected = [[1, 1, 0], [1, 1, 0], [0, 0, 0]]  # a tie of 0 and 2 in segment 3 goes to 0
    found = majority_labels(labels, segments)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="one shape"):
        majority_labels(labels, segments[:2])
    with pytest.raises(ValueError, match=">= 0"):
        majority_labels(labels, segments - 1)


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("seed", range(4))
def test_the_e_step_is_its_definition(name, seed):
    key, logits = jax.random.key(seed), logits_of(seed)
    order = [0, *(1 + np.asarray(jax.random.permutation(key, K - 1)))]
    found = jax.jit(baselines.em_adapt_labels)(key, logits, tags_of(name))
    np.testing.assert_array_equal(found, em_labels(order, logits, tags_of(name)))


def test_the_e_step_gives_a_present_class_its_share_and_an_absent_one_nothing():
    """Scores in favour of an absent class and of background: with one tag the share is exact."""
    logits = np.zeros((100, K), np.float32)
    logits[:, 3], logits[:, 0] = 50.0, 5.0
    logits[:, 1] = np.linspace(0, 1, 100)
    labels = np.asarray(baselines.em_adapt_labels(jax.random.key(0), logits, np.array([1, 1, 0, 0], bool)))
    assert (labels == 1).sum() == 20 and (labels[80:] == 1).all() and (labels[:80] == 0).all()


def test_the_order_of_the_e_step_depends_on_the_key():
    """Two classes want the same pixels: the one whose turn comes last keeps them."""
    logits = np.tile(np.linspace(0, 1, 10)[:, None], (1, K)) * [0, 1, 1, 0] + [3, 0, 0, 0]
    found = {tuple(np.asarray(baselines.em_adapt_labels(jax.random.key(i), logits, np.array([1, 1, 1, 0], bool))))
             for i in range(20)}
    assert {labels[-1] for labels in found} == {1, 2}


OPTIONS = {"foreground_share": 0.1, "background_least": 0.3, "background_most": 0.7, "slack": 2.0}


def solved_areas(logits, tags):
    """Areas of the constrained distribution by an independent solver of the dual."""
    present = [k for k in range(K) if tags[k] or k == 0]
    scores = np.float64(logits)[:, present]
    least = np.array([0.3 if k == 0 else 0.1 for k in present])

    def dual(variables):
        lower, upper = variables[:-1], variables[-1]
        shifted = scores + lower
        shifted[:, 0] -= upper
        top = shifted.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(shifted - top).sum(axis=1)) + top[:, 0]
        areas = np.exp(shifted - log_sums[:, None]).mean(axis=0)
        return log_sums.mean() - lower @ least + 0.7 * upper, np.append(areas - least, 0.7 - areas[0])

    bounds = [(0, None), *[(0, 2)] * (len(present) - 1), (0, None if len(present) > 1 else 0)]
    options = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 5000}
    best = minimize(dual, np.zeros(len(bounds)), jac=True, bounds=bounds, method="L-BFGS-B", options=options).x
    shifted = scores + best[:-1]
    shifted[:, 0] -= best[-1]
    return dict(zip(present, reference.softmax(shifted).mean(axis=0)))


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
def test_the_latent_distribution_of_ccnn_is_that_of_another_solver(name, scale):
    solve = jax.jit(functools.partial(baselines.ccnn_distribution, num_iterations=100, **OPTIONS))
    for seed in range(5):
        logits = logits_of(seed, scale) + logits_of(seed + 50, scale)[:1]
        latent = solve(logits, tags_of(name))
        assert latent.residual < 2e-5
        areas = np.exp(latent.log_probs).mean(axis=0)
        for k, expected in solved_areas(logits, tags_of(name)).items():
            np.testing.assert_allclose(areas[k], expected, atol=5e-5)
        np.testing.assert_allclose(areas[~tags_of(name)], 0)


def test_the_residual_tells_that_ccnn_has_not_converged():
    logits = logits_of(0, 8.0) + np.float32([12, 0, 0, 0])
    few, many = (
        baselines.ccnn_distribution(logits, tags_of("some"), num_iterations=n, **OPTIONS).residual for n in (1, 200)
    )
    assert few > 0.1 and many < 1e-4


def test_ccnn_by_hand():
    """All pixels alike: the areas are the probabilities, and background is lowered to its upper bound."""
    logits = jnp.tile(jnp.array([5.0, 0.0, 0.0, 0.0]), (7, 1))
    latent = baselines.ccnn_distribution(logits, np.array([1, 1, 0, 0], bool), num_iterations=50)
    np.testing.assert_allclose(np.exp(latent.log_probs[0]), [0.7, 0.3, 0, 0], atol=1e-5)
    np.testing.assert_allclose(latent.shifts[0], np.log(0.7 / 0.3) - 5, atol=1e-4)


def test_slack_bounds_what_ccnn_forces_on_a_class():
    """Without enough slack the least area of a class that the network does not see stays out of reach."""
    logits = jnp.tile(jnp.array([0.0, -9.0, 0.0, 0.0]), (7, 1))
    latent = baselines.ccnn_distribution(logits, np.array([1, 1, 1, 0], bool), num_iterations=100, slack=2.0)
    assert latent.shifts[1] == 2.0 and np.exp(latent.log_probs).mean(axis=0)[1] < 1e-3 and latent.residual < 1e-5


def test_the_gradient_of_ccnn_is_q_minus_p():
    logits, tags = logits_of(4), tags_of("some")
    latent = baselines.ccnn_distribution(logits, tags)
    expected = (reference.softmax(logits) - np.exp(latent.log_probs)) / M
    np.testing.assert_allclose(jax.grad(baselines.ccnn_loss)(logits, tags), expected, atol=1e-6)


@pytest.mark.parametrize("name", TAGS)
@pytest.mark.parametrize("cued", [True, False])
def test_sec_is_its_definition(name, cued):
    logits, cues = logits_of(6), cues_of(0) if cued else np.full(M, 255)
    expected = sec(logits, tags_of(name), cues)
    np.testing.assert_allclose(jax.jit(baselines.sec_loss)(logits, tags_of(name), cues, KERNEL), expected, rtol=1e-4)


def test_the_losses_of_sec_by_hand():
    probs = jnp.full((M, K), 0.25)
    np.testing.assert_allclose(baselines.seed_loss(probs, cues_of(1)), np.log(4), rtol=1e-6)
    # Whatever the decay, the pooled value of a constant is the constant: two tags, one absent class.
    expected = np.log(4) + np.log(4 / 3) + np.log(4)
    np.testing.assert_allclose(baselines.expand_loss(probs, np.array([1, 1, 1, 0], bool)), expected, rtol=1e-5)
    np.testing.assert_allclose(baselines.constrain_loss(probs, KERNEL), 0, atol=1e-6)
    assert baselines.seed_loss(probs, np.full(M, 255)) == 0


def test_no_gradient_flows_through_the_refinement_of_sec():
    probs = jnp.asarray(floored(logits_of(7)), jnp.float32)
    refined = reference.mean_field(np.log(np.float64(probs)), KERNEL, 10)
    np.testing.assert_allclose(jax.grad(baselines.constrain_loss)(probs, KERNEL), -refined / probs / M, rtol=2e-3, atol=1e-6)


def test_cues_by_hand():
    """Class 1 claims three cells and class 2 one of them, which it gets; of the free cells the quietest are background."""
    maps = np.array([[1.0, 0.0], [0.5, 2.0], [0.3, 0.1], [0.1, 0.0], [0.0, 0.0], [0.0, 0.3]])
    saliency = np.array([0.0, 9.0, 9.0, 2.0, 1.0, 3.0])
    find = functools.partial(baselines.localisation_cues, maps, maps.max(axis=0), saliency=saliency)
    every = np.array([1, 1, 1], bool)
    np.testing.assert_array_equal(find(every, background_share=0.34), [1, 2, 1, 255, 0, 255])
    np.testing.assert_array_equal(find(every, background_share=0.5), [1, 2, 1, 0, 0, 255])
    np.testing.assert_array_equal(find(np.array([1, 1, 0], bool), background_share=0.34), [1, 1, 1, 255, 0, 255])
    np.testing.assert_array_equal(find(np.array([1, 0, 0], bool), background_share=0.34), [0, 255, 255, 255, 0, 255])
    dead = baselines.localisation_cues(-maps, -maps.min(axis=0) * 0 - 1, every, saliency)
    assert not {1, 2} & set(np.asarray(dead).tolist())  # peaks below 0 are no evidence


@pytest.mark.parametrize(("name", "expected"), [
    ("some", [[0.25, 0, 0.75, 0], [1, 0, 0, 0]]),
    ("none", [[1, 0, 0, 0], [1, 0, 0, 0]]),
    ("every", [[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0]]),
])
def test_the_saliency_target_by_hand(name, expected):
    np.testing.assert_allclose(baselines.saliency_target(np.array([0.75, 0.0]), tags_of(name)), expected)


def test_tagged_labels_by_hand():
    logits = np.array([[0.0, 5.0, 1.0, 9.0], [2.0, 5.0, 1.0, 9.0]])
    np.testing.assert_array_equal(baselines.tagged_labels(logits, tags_of("some")), [2, 0])
    np.testing.assert_array_equal(baselines.tagged_labels(logits, np.zeros(K, bool)), [0, 0])


def test_cam_is_the_threshold_on_the_maps_of_the_classes_found():
    rng = np.random.default_rng(8)
    maps = rng.normal(0.3, 1, (M, K - 1))
    image_logits = np.array([0.4, -0.1, 2.0])
    ratio = np.where(image_logits >= 0, maps / maps.max(axis=0), 0)
    expected = np.concatenate([np.full((M, 1), 0.2), ratio], axis=1).argmax(axis=1)
    log_probs = jax.jit(baselines.cam_log_probs)(maps, image_logits)
    np.testing.assert_array_equal(log_probs.argmax(axis=1), expected)
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
    assert (baselines.cam_log_probs(maps, np.full(3, -1.0)).argmax(axis=1) == 0).all()


def test_cross_entropies_are_their_definitions():
    logits, labels = logits_of(9), cues_of(2)
    np.testing.assert_allclose(baselines.label_cross_entropy(logits, labels), cross_entropy(logits, labels), rtol=1e-5)
    np.testing.assert_allclose(baselines.label_cross_entropy(logits, np.full(M, 255)), 0)
    np.testing.assert_allclose(baselines.label_cross_entropy(logits, np.full(M, -1)), 0)
    target = reference.softmax(logits_of(10))
    expected = -np.sum(target * np.log(reference.softmax(logits))) / M
    np.testing.assert_allclose(baselines.soft_cross_entropy(logits, target), expected, rtol=1e-5)


def test_soft_targets_are_held_fixed():
    """Targets made of the logits themselves: the gradient is (phi - p) / m all the same, here 0."""
    gradient = jax.grad(lambda x: baselines.soft_cross_entropy(x, jax.nn.softmax(x, axis=-1)))(logits_of(0))
    np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-7)


def losses_of(tags, cues, saliency):
    """Every loss as a function of the logits alone."""
    key = jax.random.key(0)
    return {
        "mil": lambda x: baselines.mil_lse_loss(x, tags),
        "em_adapt": lambda x: baselines.label_cross_entropy(x, baselines.em_adapt_labels(key, x, tags)),
        "ccnn": lambda x: baselines.ccnn_loss(x, tags),
        "sec": lambda x: baselines.sec_loss(x, tags, cues, KERNEL),
        "stc": lambda x: baselines.soft_cross_entropy(x, baselines.saliency_target(saliency, tags)),
        "stc, later": lambda x: baselines.label_cross_entropy(x, baselines.tagged_labels(x, tags)),
    }


NAMES = sorted(losses_of(None, None, None))


@pytest.mark.slow_except("*-some-*")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tags", TAGS)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_every_loss_and_gradient_is_finite(name, tags, size):
    """With and without tags, without cues, with equal and with enormous logits."""
    logits = size * logits_of(11, 1.0)
    loss = losses_of(tags_of(tags), np.full(M, 255), np.zeros(M))[name]
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_images_one_by_one(name):
    """vmap over images with different tags, cues and saliency."""
    rng = np.random.default_rng(12)
    images = [(logits_of(i), tags_of(tags), cues_of(i), rng.random(M)) for i, tags in enumerate(TAGS)]

    def value_and_gradient(logits, tags, cues, saliency):
        return jax.value_and_grad(losses_of(tags, cues, saliency)[name])(logits)

    together = jax.vmap(value_and_gradient)(*(np.stack(part) for part in zip(*images)))
    for i, image in enumerate(images):
        alone = value_and_gradient(*image)
        np.testing.assert_allclose(together[0][i], alone[0], rtol=1e-5)
        np.testing.assert_allclose(together[1][i], alone[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_down_the_gradient_lowers_every_loss(name):
    loss = losses_of(tags_of("some"), cues_of(3), np.linspace(0, 1, M))[name]
    logits = logits_of(13, 0.5)
    value, gradient = jax.value_and_grad(loss)(logits)
    assert loss(logits - 0.5 * gradient) < value


@pytest.mark.parametrize("name", NAMES)
def test_descent_ends_with_the_tags(name):
    """Gradient descent on the logits alone: each tagged class is the most probable one somewhere, an absent one nowhere."""
    cues, saliency = np.repeat([0, 2, 255], M // 3), np.linspace(0, 1, M)
    gradient = jax.jit(jax.grad(losses_of(tags_of("some"), cues, saliency)[name]))
    logits = jnp.asarray(logits_of(14, 0.1))
    for _ in range(300):
        logits = logits - 2.0 * gradient(logits)
    assert set(np.asarray(logits.argmax(axis=1)).tolist()) == {0, 2}


@pytest.mark.parametrize(("call", "message"), [
    (lambda: baselines.mil_lse_loss(jnp.zeros((2, 3, K)), tags_of("some")), "flatten the pixels"),
    (lambda: baselines.mil_lse_loss(logits_of(0), np.ones(K + 1, bool)), "one tag per class"),
    (lambda: baselines.mil_lse_loss(logits_of(0), tags_of("some"), sharpness=0), "sharpness: expected a finite number > 0"),
    (lambda: baselines.em_adapt_labels(jax.random.key(0), logits_of(0), tags_of("some"), foreground_share=1.2), "at most 1"),
    (lambda: baselines.ccnn_distribution(logits_of(0), tags_of("some"), background_most=0.2), "background_most"),
    (lambda: baselines.ccnn_distribution(logits_of(0), tags_of("some"), slack=-1), "slack"),
    (lambda: baselines.ccnn_distribution(logits_of(0), tags_of("some"), num_iterations=2.5), "whole number"),
    (lambda: baselines.floored_probs(logits_of(0), min_prob=0.5), r"K \* min_prob"),
    (lambda: baselines.seed_loss(logits_of(0), np.zeros(M + 1)), "one label per cell"),
    (lambda: baselines.expand_loss(logits_of(0), tags_of("some"), foreground_decay=0), "foreground_decay"),
    (lambda: baselines.localisation_cues(np.zeros((M, K)), np.zeros(K), tags_of("some"), np.zeros(M)), "one tag per class"),
    (lambda: baselines.saliency_target(np.zeros((3, 3)), tags_of("some")), "flatten the pixels"),
    (lambda: baselines.label_cross_entropy(logits_of(0), np.zeros((M, K))), "one class index per cell"),
    (lambda: baselines.soft_cross_entropy(logits_of(0), np.zeros(M)), "one distribution per cell"),
])
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
