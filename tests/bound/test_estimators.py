"""The estimators of E_q log p(y|z,x): against enumeration, closed forms, and their own definitions."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import likelihood, random_case

from lcrf_jax.bound.estimators import (
    ESTIMATORS,
    gumbel_softmax_likelihood,
    mean_likelihood,
    reinforce_likelihood,
    straight_through_likelihood,
)
from lcrf_jax.bound.likelihoods import EXPECTATIONS
from lcrf_jax.bound.sampling import block_groups, categorical, gumbel_softmax, straight_through

every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)
every_closed_form = pytest.mark.parametrize("name", EXPECTATIONS)


def closed_form(name, logits, tags, vouching):
    """E_q log p(y|z,x) and its gradient in the logits."""
    options = {"evidence": {"pixel_evidence": vouching}, "max_pool": {"flip_probability": 0.1}}[name]
    return jax.value_and_grad(lambda x: EXPECTATIONS[name](x, tags, **options))(jnp.asarray(logits, jnp.float32))


def picture():
    """5x5 pixels, mostly background, on which a present and an absent class are there about every second time."""
    logits, _, _, vouching = random_case(0, num_pixels=25)
    logits = logits / 1.5 + np.array([2.0, -2.4, -2.2])
    return np.float32(logits), np.array([True, True, False]), vouching


@functools.partial(jax.jit, static_argnames=("estimator", "name", "number"))
def estimates(seed, logits, tags, vouching, temperature=1.0, *, estimator, name, number=5000):
    """Independent estimates [number] of four samples each, and their gradients [number, m, K]."""

    def estimate(key, logits):
        options = {"temperature": temperature, "num_samples": 4}
        return ESTIMATORS[estimator](key, logits, likelihood(name, tags, vouching), **options)

    keys = jax.random.split(jax.random.key(seed), number)
    return jax.vmap(jax.value_and_grad(estimate, argnums=1), in_axes=(0, None))(keys, logits)


def mean_and_error(estimates):
    """Mean of independent estimates and its standard error."""
    estimates = np.float64(estimates)
    return estimates.mean(axis=0), estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))


def along(estimates, exact):
    """Each estimate's component along the exact number or gradient, as a multiple of it."""
    exact = np.float64(exact)
    return np.tensordot(np.float64(estimates), exact, exact.ndim) / np.vdot(exact, exact)


def assert_unbiased(estimates, exact):
    """To four standard errors in every component and along the exact gradient, where 3% of bias would be seen."""
    mean, error = mean_and_error(estimates)
    assert np.all(np.abs(mean - exact) <= 4 * error + 1e-6)
    share, error = mean_and_error(along(estimates, exact))
    assert 4 * error < 0.03
    assert abs(share - 1) < 4 * error


def relative_error(gradients, exact):
    return np.linalg.norm(np.float64(gradients).mean(axis=0) - exact) / np.linalg.norm(exact)


def test_the_estimators_share_one_signature():
    for estimator in ESTIMATORS.values():
        parameters = inspect.signature(estimator).parameters
        assert list(parameters) == ["key", "logits", "log_likelihood", "temperature", "num_samples", "groups"]


# values, and gradients by their definitions


def test_two_pixels_and_three_samples_by_hand():
    """The formula of reinforce in loops; the same key gives the same labels to both estimators with exact samples."""
    logits, _, tags, vouching = random_case(0, num_pixels=2)
    log_likelihood = likelihood("area", tags, vouching)
    probs, key = reference.softmax(logits), jax.random.key(3)
    labels = [np.asarray(categorical(k, logits)) for k in jax.random.split(key, 3)]
    values = [reference.tag_log_likelihood("area", z, tags) for z in labels]
    assert len(set(values)) > 1
    gradient = 0
    for s in range(3):
        others = [values[t] for t in range(3) if t != s]
        gradient = gradient + (values[s] - np.mean(others)) * (labels[s] - probs) / 3
    run = jax.jit(jax.value_and_grad(lambda x: reinforce_likelihood(key, x, log_likelihood, num_samples=3)))
    value, got = run(logits)
    np.testing.assert_allclose(value, np.mean(values), rtol=1e-5)
    np.testing.assert_allclose(got, gradient, atol=1e-5 * np.abs(values).max())
    through = jax.jit(lambda x: straight_through_likelihood(key, x, log_likelihood, num_samples=3))
    np.testing.assert_allclose(through(logits), np.mean(values), rtol=1e-5)


@pytest.mark.slow
def test_the_estimate_is_the_mean_over_samples_of_their_own_keys():
    logits, _, tags, vouching = random_case(9)
    log_likelihood = likelihood("gwrp", tags, vouching)
    groups, keys = block_groups(2, 3, 2), jax.random.split(jax.random.key(2), 3)

    @functools.partial(jax.jit, static_argnums=0)
    def estimate(estimator, key, groups):
        return estimator(key, logits, log_likelihood, temperature=0.7, num_samples=3, groups=groups)

    @functools.partial(jax.jit, static_argnums=0)
    def value_of_a_sample(sampler, key, groups):
        return log_likelihood(sampler(key, logits, temperature=0.7, groups=groups))

    for estimator, sampler in (
        (gumbel_softmax_likelihood, gumbel_softmax), (straight_through_likelihood, straight_through)
    ):
        for shared in (None, groups):
            several = estimate(estimator, jax.random.key(2), shared)
            assert several.shape == () and several.dtype == jnp.float32
            assert several != estimate(estimator, jax.random.key(3), shared)
            samples = [value_of_a_sample(sampler, key, shared) for key in keys]
            np.testing.assert_allclose(several, np.mean(samples), rtol=1e-5)


@every_estimator
def test_a_q_that_is_certain_gives_the_likelihood_of_its_labelling(estimator):
    _, _, tags, vouching = random_case(1)
    labels = np.eye(3)[[0, 1, 1, 2, 0, 0]]
    for name in EXPECTATIONS:
        log_likelihood = likelihood(name, tags, vouching)
        value = estimator(jax.random.key(0), 200 * labels, log_likelihood, temperature=0.5, num_samples=2)
        np.testing.assert_allclose(value, log_likelihood(labels), rtol=1e-5)


# against enumeration and closed forms


@pytest.mark.slow
@every_closed_form
def test_reinforce_is_unbiased_in_value_and_gradient(name):
    """25 pixels. Without the factor S / (S - 1) of the baseline a quarter of the gradient would be missing."""
    logits, tags, vouching = picture()
    value, gradient = closed_form(name, logits, tags, vouching)
    values, gradients = estimates(1, logits, tags, vouching, estimator="reinforce", name=name, number=20_000)
    assert_unbiased(values, value)
    assert_unbiased(gradients, gradient)


@pytest.mark.slow
def test_reinforce_needs_no_slope_of_the_likelihood():
    """A step function of the labels, against enumeration; the other estimators see no gradient."""
    logits, _, _, _ = random_case(2, num_pixels=4)

    def step(z):
        return jnp.where(jnp.sum(z[:, 1] > 0.5) + 2 * jnp.sum(z[:, 2] > 0.5) >= 5, -0.1, -2.0)

    value, gradient = reference.expectation_and_gradient(jax.jit(step), logits)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients_of(estimator, keys):
        run = jax.value_and_grad(lambda x, key: estimator(key, x, step, num_samples=2))
        return jax.vmap(run, in_axes=(None, 0))(jnp.asarray(logits), keys)

    values, gradients = gradients_of(reinforce_likelihood, jax.random.split(jax.random.key(0), 30_000))
    assert_unbiased(values, value)
    assert_unbiased(gradients, gradient)
    for estimator in (straight_through_likelihood, gumbel_softmax_likelihood, mean_likelihood):
        np.testing.assert_array_equal(gradients_of(estimator, jax.random.split(jax.random.key(0), 2))[1], 0)


@pytest.mark.slow_except("evidence")
@every_closed_form
def test_straight_through_is_unbiased_in_value_only(name):
    logits, tags, vouching = picture()
    value, gradient = closed_form(name, logits, tags, vouching)
    values, gradients = estimates(2, logits, tags, vouching, 0.3, estimator="straight_through", name=name)
    assert_unbiased(values, value)
    assert relative_error(gradients, gradient) > 0.5


@pytest.mark.slow
@every_closed_form
def test_the_bias_of_relaxed_samples_falls_with_the_temperature(name):
    """In value about in proportion to it; what exact samples with the same noise give is taken off."""
    logits, tags, vouching = picture()
    _, gradient = closed_form(name, logits, tags, vouching)
    exact, _ = estimates(3, logits, tags, vouching, estimator="straight_through", name=name)
    biases, errors = [], []
    for temperature in (1.0, 0.3, 0.1, 0.03):
        values, gradients = estimates(3, logits, tags, vouching, temperature, estimator="gumbel_softmax", name=name)
        biases.append(np.mean(values - exact))
        errors.append(relative_error(gradients, gradient))
    assert np.all(np.diff(np.abs(biases)) < 0)
    assert 0.05 < biases[3] / biases[1] < 0.2
    # That of the gradient too, until its variance takes over.
    assert errors[0] > 2 * errors[1] > 2.5 * errors[2] and errors[2] < 0.15


@pytest.mark.slow
@every_closed_form
def test_under_a_uniform_q_relaxed_samples_of_a_concave_likelihood_are_too_high(name):
    """They lie between the expectation and the likelihood of the probabilities, the higher the warmer they are.

    With all tags absent `max_pool` is concave in the labels; `evidence` always is.
    """
    _, _, vouching = picture()
    logits, tags = np.zeros((25, 3), np.float32), np.zeros(3, bool)
    value, _ = closed_form(name, logits, tags, vouching)
    values = [
        np.mean(estimates(4, logits, tags, vouching, temperature, estimator="gumbel_softmax", name=name)[0])
        for temperature in (0.5, 1.0, 2.0)
    ]
    mean = mean_likelihood(None, logits, likelihood(name, tags, vouching))
    assert np.all(np.diff([value, *values, mean]) > 0.05)


@pytest.mark.slow
def test_two_classes_and_the_slopes_of_evidence_when_it_is_cold():
    """With evidence in the ratio r the exact slope is p (1 - p) log r, and that of straight-through p (1 - p) sinh log r.

    Relaxed samples integrate the slope of log (z e) from corner to corner; straight-through takes that of the corners.
    """
    one_logits, log_ratio = np.float32([-0.4, 0.3]), np.log(4)
    # The gradient of each pixel's logits is an estimate of its own.
    logits, vouching = np.tile(one_logits, (400_000, 1)), np.tile([0.8, 0.2], (400_000, 1))
    log_likelihood = likelihood("evidence", np.array([True, True]), vouching)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(estimator):
        return jax.grad(lambda x: estimator(jax.random.key(5), x, log_likelihood, temperature=0.05, num_samples=1))(logits)

    scale = reference.softmax(one_logits).prod()
    assert_unbiased(gradient(gumbel_softmax_likelihood)[:, 0], scale * log_ratio)
    assert_unbiased(gradient(straight_through_likelihood)[:, 0], scale * np.sinh(log_ratio))


def test_cold_samples_of_a_linear_likelihood_have_the_right_gradient():
    """Straight-through and relaxed samples then have the same one, and the probabilities have the exact one."""
    rng = np.random.default_rng(3)
    weights, one_logits = rng.normal(size=3), np.float32(rng.normal(size=3))
    logits, probs = np.tile(one_logits, (200_000, 1)), reference.softmax(one_logits)
    exact = probs * (weights - probs @ weights)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(estimator, logits, temperature):
        options = {"temperature": temperature, "num_samples": 1}
        return jax.grad(lambda x: estimator(jax.random.key(6), x, lambda z: jnp.sum(z * weights), **options))(logits)

    relaxed = gradient(gumbel_softmax_likelihood, logits, 0.1)
    assert_unbiased(relaxed, exact)
    np.testing.assert_allclose(gradient(straight_through_likelihood, logits, 0.1), relaxed, atol=1e-4)
    np.testing.assert_allclose(gradient(mean_likelihood, logits[:2], 1.0)[1], exact, rtol=1e-4)
    share, error = mean_and_error(along(gradient(gumbel_softmax_likelihood, logits, 1.0), exact))
    assert share < 1 - 10 * error and share < 0.9


def test_mean_likelihood_is_above_the_expectation_of_a_concave_one():
    for seed, name, tags in ((7, "evidence", [1, 1, 0]), (8, "max_pool", [0, 0, 0])):
        logits, _, _, vouching = random_case(seed)
        log_likelihood = likelihood(name, np.array(tags, bool), vouching)
        expected = reference.expectation(jax.jit(log_likelihood), reference.softmax(logits))
        assert mean_likelihood(None, logits, log_likelihood) > expected + 0.1


def test_mean_likelihood_of_weak_evidence_has_nearly_the_right_gradient():
    """log (1 + d) is nearly d: an error in proportion to the evidence."""
    logits, tags, vouching = picture()

    @jax.jit
    def of_the_probabilities(weak):
        return jax.value_and_grad(lambda x: mean_likelihood(None, x, likelihood("evidence", tags, weak)))(logits)

    errors, strengths = [], np.array([0.02, 0.1, 0.5])
    for weak in 1 + strengths[:, None, None] * (vouching - vouching.mean()):
        value, gradient = closed_form("evidence", logits, tags, weak)
        mean, got = of_the_probabilities(weak)
        assert mean > value
        errors.append(np.linalg.norm(got - gradient) / np.linalg.norm(gradient))
    assert errors[0] < 0.02
    np.testing.assert_allclose(errors / strengths, errors[1] / strengths[1], rtol=0.5)


def test_cold_samples_estimate_the_expectation():
    """50,000 samples: within four standard errors of the enumeration, which warm samples are not."""
    logits, _, tags, vouching = random_case(8)
    log_likelihood = likelihood("evidence", tags, vouching)
    probs = reference.softmax(logits)

    def by_loops(z):
        return np.log(np.sum(z * vouching, axis=1)).sum()

    expected = reference.expectation(by_loops, probs)
    variance = reference.expectation(lambda z: (by_loops(z) - expected) ** 2, probs)
    tolerance = 4 * np.sqrt(variance / 50_000)
    assert tolerance < 0.05

    @jax.jit
    def estimate(temperature):
        return gumbel_softmax_likelihood(
            jax.random.key(1), logits, log_likelihood, temperature=temperature, num_samples=50_000
        )

    assert abs(estimate(1e-3) - expected) < tolerance
    assert estimate(1.0) > expected + 10 * tolerance


def test_what_does_not_fit_is_refused():
    logits, key = random_case(0)[0], jax.random.key(0)
    for estimator in (gumbel_softmax_likelihood, straight_through_likelihood):
        with pytest.raises(ValueError, match=r"num_samples: expected .* >= 1, got 0; .*mean_likelihood"):
            estimator(key, logits, jnp.sum, num_samples=0)
        with pytest.raises(ValueError, match=r"temperature: expected a finite number > 0, got 0"):
            estimator(key, logits, jnp.sum, temperature=0.0)
        with pytest.raises(ValueError, match=r"groups: expected shape \[6\], got \[4\]; .*each pixel"):
            estimator(key, logits, jnp.sum, groups=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"num_samples: expected .* >= 2, got 1; .*mean of the others"):
        reinforce_likelihood(key, logits, jnp.sum, num_samples=1)
    with pytest.raises(ValueError, match="groups: expected None, .*use gumbel_softmax"):
        reinforce_likelihood(key, logits, jnp.sum, groups=np.arange(6))
