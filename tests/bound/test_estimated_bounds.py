"""The bound with every estimator: invariances, gradients, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import likelihood, random_case
from jax.test_util import check_grads

from lcrf_jax.bound.estimators import ESTIMATORS, elbo, reinforce_likelihood, straight_through_likelihood
from lcrf_jax.bound.likelihoods import IMAGE_LIKELIHOODS, TAG_LIKELIHOODS

every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


# within the bound


def sum_of_likelihoods(names, tags, vouching):
    """As a function of the labels: finite, and right in its slope, if each of them is."""
    return lambda z: sum(likelihood(name, tags, vouching)(z) for name in names)


@jax.jit
def every_bound(key, logits, kernel, tags, vouching):
    """[4] of all estimators."""
    log_likelihood = likelihood("evidence", tags, vouching)
    return jnp.stack([elbo(key, logits, kernel, log_likelihood, estimator=estimator).bound
                      for estimator in ESTIMATORS.values()])


def test_the_bound_does_not_change_when_pixels_are_reordered_or_logits_shifted():
    logits, kernel, tags, vouching = random_case(10)
    bounds = every_bound(jax.random.key(0), logits, kernel, tags, vouching)
    shifted = every_bound(jax.random.key(0), logits + 7, kernel, tags, vouching)
    np.testing.assert_allclose(shifted, bounds, rtol=1e-5)
    # The noise is drawn per position, so only the control is the same in another order.
    order = np.random.default_rng(0).permutation(6)
    permuted = every_bound(jax.random.key(0), logits[order], kernel[np.ix_(order, order)], tags, vouching[order])
    same = np.isclose(permuted, bounds, rtol=1e-5)
    assert dict(zip(ESTIMATORS, same)) == {name: name == "mean" for name in ESTIMATORS}


def test_vmap_equals_a_loop():
    cases = [random_case(seed) for seed in range(3)]
    arrays = [jnp.stack([jnp.asarray(case[i]) for case in cases]) for i in range(4)]
    keys = jax.random.split(jax.random.key(0), 3)
    loop = [every_bound(*one) for one in zip(keys, *arrays)]
    np.testing.assert_allclose(jax.jit(jax.vmap(every_bound))(keys, *arrays), loop, rtol=1e-5)


@pytest.mark.slow_except("reinforce")
@every_estimator
def test_gradients(estimator):
    """In the kernel and the evidence of every estimator; in the logits of those whose gradient is that of their value."""
    logits, kernel, tags, vouching = random_case(11)
    options = {"temperature": 0.8, "num_samples": 3}

    def bound(kernel, vouching, logits):
        log_likelihood = sum_of_likelihoods(("gwrp", "evidence", "frozen_classifier"), tags, vouching)
        terms = elbo(jax.random.key(0), logits, kernel, log_likelihood, estimator=functools.partial(estimator, **options))
        return terms.bound

    with jax.enable_x64(True):
        arguments = kernel, vouching, jnp.asarray(logits)
        if estimator in (reinforce_likelihood, straight_through_likelihood):
            bound, arguments = functools.partial(bound, logits=arguments[2]), arguments[:2]
        check_grads(jax.jit(bound), arguments, order=1, modes=["rev"])


@jax.jit
def at_a_low_temperature(logits, kernel, tags, vouching):
    """Of every estimator the bound, with all likelihoods, and its gradient in the logits and the kernel."""
    log_likelihood = sum_of_likelihoods((*TAG_LIKELIHOODS, *IMAGE_LIKELIHOODS), tags, vouching)

    def bound(logits, kernel, estimator):
        estimator = functools.partial(estimator, temperature=0.05, num_samples=2)
        return elbo(jax.random.key(0), logits, kernel, log_likelihood, estimator=estimator).bound

    run = jax.value_and_grad(bound, argnums=(0, 1))
    return {name: run(logits, kernel, estimator) for name, estimator in ESTIMATORS.items()}


def extreme_logits(num_pixels, num_classes):
    yield np.random.default_rng(0).choice([-1e4, 0.0, 1e4], (num_pixels, num_classes))
    yield np.full((num_pixels, num_classes), 1e4)
    yield np.full((num_pixels, num_classes), -1e4)
    for certain in (0, num_classes - 1):
        yield np.tile(np.where(np.arange(num_classes) == certain, 0.0, -np.inf), (num_pixels, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("num_pixels", "num_classes", "dtype"), [
    (9, 4, "float32"), (9, 4, "float16"), (9, 4, "bfloat16"), (1, 4, "float32"), (9, 1, "float32"),
])
def test_extremes_are_finite_in_value_and_gradient(num_pixels, num_classes, dtype):
    kernel = jnp.full((num_pixels, num_pixels), 100, dtype)
    vouching = np.eye(num_classes)[np.random.default_rng(0).integers(num_classes, size=num_pixels)]
    for logits in extreme_logits(num_pixels, num_classes):
        for tags in (np.ones(num_classes, bool), np.arange(num_classes) == 0):
            results = at_a_low_temperature(jnp.asarray(logits, dtype), kernel, tags, vouching)
            for name, (value, gradients) in results.items():
                assert value.dtype == jnp.float32 and np.isfinite(value), name
                assert all(gradient.dtype == dtype for gradient in gradients), name
                # float16 ends at 65504: what is steeper in float32 is infinite there.
                wrong = np.isnan if dtype == "float16" else lambda gradient: ~np.isfinite(gradient)
                assert not any(wrong(gradient).any() for gradient in gradients), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_promoted(dtype):
    logits, kernel, tags, vouching = random_case(13, num_pixels=9, num_classes=4)
    half = jnp.asarray(logits, dtype), jnp.asarray(kernel, dtype)
    expected = at_a_low_temperature(*(array.astype(jnp.float32) for array in half), tags, vouching)
    for name, (value, _) in at_a_low_temperature(*half, tags, vouching).items():
        np.testing.assert_allclose(value, expected[name][0], rtol=1e-6, err_msg=name)
