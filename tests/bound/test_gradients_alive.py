"""The gradient of every likelihood and every loss: not 0 where a tag is far from the labels, and finite at extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled

from lcrf_jax import baselines
from lcrf_jax.bound import likelihoods, pixel_evidence
from lcrf_jax.bound.estimators import expected_log_prob

M, K = 12, 3
TAGS = np.array([True, True, False])
EVIDENCE = np.float32([[1.0, 1e-15, 1e-15]] * (M // 2) + [[1e-15, 1.0, 1e-15]] * (M - M // 2))


def of_probs(likelihood, **more):
    return lambda logits: likelihood(jax.nn.softmax(logits, axis=-1), TAGS, **more)


FUNCTIONS = {
    **{name: of_probs(function) for name, function in likelihoods.TAG_LIKELIHOODS.items()},
    "log_mean_exp, nearly the mean": of_probs(likelihoods.log_mean_exp, sharpness=1e-3),
    "log_mean_exp, nearly the maximum": of_probs(likelihoods.log_mean_exp, sharpness=1e3),
    "max_pool, rarely flipped": of_probs(likelihoods.max_pool, flip_probability=1e-20),
    "frozen_classifier": of_probs(likelihoods.frozen_classifier, class_maps=np.ones((M, K - 1), np.float32), bias=0.5),
    "evidence": of_probs(likelihoods.evidence, pixel_evidence=EVIDENCE),
    "expected_evidence": lambda logits: likelihoods.expected_evidence(logits, TAGS, EVIDENCE),
    "expected_max_pool": lambda logits: likelihoods.expected_max_pool(logits, TAGS),
    "expected_log_prob": lambda logits: expected_log_prob(logits, np.eye(K, dtype=np.float32)[np.arange(M) % K]),
    "mil": lambda logits: -baselines.mil_lse_loss(logits, TAGS),
    "ccnn": lambda logits: -baselines.ccnn_loss(logits, TAGS),
    "sec": lambda logits: -baselines.sec_loss(logits, TAGS, np.arange(M) % K, 0.1 * np.ones((M, M), np.float32)),
}
PROGRAMS = {name: jax.jit(jax.value_and_grad(function)) for name, function in FUNCTIONS.items()}


def lagging(size):
    """Every pixel sure of the background, where class 1 is tagged: its logits lag by twice the size."""
    return np.float32(size) * np.array([[1.0, -1.0, -1.0]] * M, np.float32) + np.linspace(0, 0.1, M * K, dtype=np.float32).reshape(M, K)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [8, 20])
def test_a_class_that_lags_is_still_pulled_up(name, size):
    """16 and 40 behind: clipped probabilities had no gradient from 13.8 on."""
    value, gradient = PROGRAMS[name](lagging(size))
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert (gradient[:, 1] > 0).any() and gradient[:, 1].sum() > 0


ABSENT = {name: FUNCTIONS[name] for name in (*likelihoods.TAG_LIKELIHOODS, "expected_max_pool", "log_mean_exp, nearly the mean")}


@pytest.mark.parametrize("name", ABSENT)
def test_an_absent_class_that_is_sure_is_still_pushed_down(name):
    """One pixel sure of the class that is not tagged, by 40: where nearly all of its probability is gone, others rise."""
    logits = lagging(2.0)
    logits[0] = [-20, -20, 20]
    _, gradient = PROGRAMS[name](logits)
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).max() > 0
    assert (gradient[0, :2] >= 0).all() and gradient[0, :2].max() > 0


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("winner", range(K))
def test_value_and_gradient_are_finite_at_any_size(name, winner):
    for size in (0.0, 88.0, 1e4, 1e30):
        logits = np.full((M, K), -size, np.float32)
        logits[:, winner] = size
        value, gradient = PROGRAMS[name](logits)
        assert np.isfinite(value) and np.isfinite(gradient).all(), size


@pytest.mark.parametrize("tag", [True, False])
def test_expected_max_pool_is_the_sum_over_labellings_where_pixels_are_sure(tag):
    """In float32, with the pixels sure by up to 20: 1 - phi would round to 0, and so would its gradient."""
    logits, tags = np.array([[9.0, -9.0], [8.0, -8.0], [-10.0, 10.0]]), np.array([True, tag])

    def of_labels(z):
        return reference.tag_log_likelihood("max_pool", z, tags, flip_probability=1e-6)

    value, gradient = reference.expectation_and_gradient(of_labels, logits)
    found = jax.jit(jax.value_and_grad(lambda x: likelihoods.expected_max_pool(x, tags)))(np.float32(logits))
    np.testing.assert_allclose(found[0], value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found[1], gradient, rtol=0.02)  # the sums of float64 are no better
    assert (np.abs(found[1]) > 0).all() and np.abs(gradient).max() < 1e-6


def test_a_class_that_is_impossible_keeps_the_closed_form_finite():
    logits = np.array([[0.0, -np.inf], [0.0, -np.inf]], np.float32)
    for tags in ([True, True], [True, False]):
        value, gradient = jax.value_and_grad(compiled(likelihoods.expected_max_pool))(logits, np.array(tags))
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_the_mixtures_by_hand():
    """One pixel that is sure of the background: the tag of the other class is there by epsilon alone."""
    labels, epsilon = np.array([[1.0, 0.0]], np.float32), 1e-6
    both, one = np.array([True, True]), np.array([True, False])
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    for function in (likelihoods.log_mean_exp, likelihoods.gwrp, likelihoods.max_pool):
        near(function(labels, both), np.log(epsilon) + np.log1p(-epsilon))
        near(function(labels, one), 2 * np.log1p(-epsilon), atol=3e-7)
    near(likelihoods.noisy_or(labels, both, rho=0.5), np.log(epsilon) + np.log(0.5))
    near(likelihoods.noisy_or(labels, one, rho=0.5), np.log(0.5), atol=3e-6)
    near(pixel_evidence.log_evidence(np.array([0.0, 1e-12])), np.log([1e-12, 2e-12]))


@pytest.mark.parametrize("sharpness", [1e-4, 1e-2, 1.0, 100.0, 1e5])
def test_the_smooth_maximum_keeps_its_digits_at_any_sharpness(sharpness):
    values = np.random.default_rng(0).random((500, 2)).astype(np.float32)
    exact = np.float64(values)
    top = exact.max(axis=0)
    expected = top + np.log(np.mean(np.exp(sharpness * (exact - top)), axis=0)) / sharpness
    np.testing.assert_allclose(jax.jit(baselines.mil_lse_scores)(jnp.asarray(values), sharpness=sharpness), expected, rtol=2e-6)
