"""The distribution of the Gibbs sampler, against the enumerated posterior."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from gibbs_chains import (
    EVERY,
    KERNEL,
    LIKELIHOODS,
    MANY_CHAINS,
    NUM_CLASSES,
    NUM_PIXELS,
    ONE_HOT,
    SOME_CHAINS,
    UNARY,
    chains,
    exact_samples,
    keys_of,
    posterior,
    with_and_without,
)
from scipy import stats

from lcrf_jax.bound.estimators import expected_log_prob

every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
# 2 and 3 do not divide the number of pixels: their last blocks are filled up.
every_number_of_blocks = pytest.mark.parametrize("num_blocks", [1, 2, 3, NUM_PIXELS])


def marginals_of(probs):
    return np.einsum("z,zjk->jk", probs, ONE_HOT)


def p_value(labels, probs):
    """Of the chi-square test of the joint distribution of all pixels."""
    labels = np.asarray(labels)
    numbers = labels @ NUM_CLASSES ** np.arange(labels.shape[1])[::-1]
    counts, expected = np.bincount(numbers, minlength=len(probs)), len(labels) * probs
    # The test is an approximation for at least five samples of everything: the rare labellings are counted together.
    rare = expected < 8
    counts, expected = (np.append(numbers[~rare], numbers[rare].sum()) for numbers in (counts, expected))
    return stats.chisquare(*(numbers[expected > 0] for numbers in (counts, expected))).pvalue


def standard_errors_off(samples, expected):
    """How many standard errors the means over the chains lie from what is expected, at most."""
    samples = np.asarray(samples, np.float64)
    return np.max(np.abs(samples.mean(axis=0) - expected) / (samples.std(axis=0) / np.sqrt(len(samples))))


def statistics_of(labels):
    """[n, 2 m + m (m - 1) / 2] indicators of two of the classes, and of equal labels of two pixels."""
    first, second = np.triu_indices(NUM_PIXELS, 1)
    return np.concatenate([labels == 0, labels == 1, labels[:, first] == labels[:, second]], axis=1)


def with_self_pairs(weight, kernel=KERNEL, unary=UNARY):
    """[K^m] what single-site updates lead to if a label sees itself: the stationary distribution of such a sweep."""
    sweep = np.eye(len(EVERY))
    for i in range(NUM_PIXELS):
        weights = np.float64(kernel[i]) + weight * np.eye(NUM_PIXELS)[i]
        probs = reference.softmax(unary[i] + np.einsum("j,zjk->zk", weights, ONE_HOT))
        same_others = (np.delete(EVERY, i, 1)[:, None] == np.delete(EVERY, i, 1)).all(axis=-1)
        sweep = sweep @ (same_others * probs[:, EVERY[:, i]])
    return np.linalg.matrix_power(sweep, 200)[0]


@functools.cache
def from_the_posterior(num_blocks, name):
    """Chains that start from exact samples of the posterior, after a sweep: no question of burn-in."""
    start = exact_samples(31, posterior(name))
    return jax.tree.map(np.asarray, chains(keys_of(32), start, KERNEL, UNARY, name, 1, num_blocks))


@pytest.mark.slow_except("3-area")
@every_likelihood
@every_number_of_blocks
def test_a_sweep_leaves_the_posterior_as_it_is(num_blocks, name):
    # Chi-square at a significance of 1e-3; the seed is fixed, so the test passes always or never.
    labels = from_the_posterior(num_blocks, name).labels
    assert p_value(labels, posterior(name)) > 1e-3
    moved = np.mean(labels != exact_samples(31, posterior(name)))
    assert moved > 0.1, "a chain that stands still would pass too"


@pytest.mark.slow
@every_number_of_blocks
def test_a_sweep_of_another_chain_does_not(num_blocks):
    """What the test above can see: the same samples after one sweep with something wrong."""
    def after_a_sweep(name, kernel, unary):
        return chains(keys_of(32), exact_samples(31, posterior(name)), kernel, unary, "none", 1, num_blocks).labels

    one_pair = KERNEL * (KERNEL == KERNEL.max())
    wrong = {
        "twice the kernel": after_a_sweep("none", 2 * KERNEL, UNARY),
        "a pair left out": after_a_sweep("none", KERNEL - one_pair, UNARY),
        "another unary": after_a_sweep("none", KERNEL, 0.8 * UNARY),
        "area left out": after_a_sweep("area", KERNEL, UNARY),
        "max_pool left out": after_a_sweep("max_pool", KERNEL, UNARY),
    }
    for what, labels in wrong.items():
        name = what.split()[0]
        assert p_value(labels, posterior(name if name in LIKELIHOODS else "none")) < 1e-3, what


@pytest.mark.slow
@with_and_without
@every_number_of_blocks
def test_chains_from_a_fixed_start_reach_the_posterior(num_blocks, name):
    """Means within 4 standard errors; wrong distributions lie further away."""
    start = jnp.zeros((SOME_CHAINS, NUM_PIXELS), jnp.int32)
    labels = np.asarray(chains(keys_of(3, SOME_CHAINS), start, KERNEL, UNARY, name, 20, num_blocks).labels)

    def off(probs):
        return standard_errors_off(statistics_of(labels), probs @ statistics_of(EVERY))

    assert off(posterior(name)) < 4
    wrong = {
        "twice the kernel": posterior(name, kernel=2 * KERNEL),
        "half the kernel": posterior(name, kernel=KERNEL / 2),
        "no kernel": posterior(name, kernel=0 * KERNEL),
        "no unary": posterior(name, unary=0 * UNARY),
        "another likelihood": posterior("area" if name == "none" else "none"),
    }
    if name == "none":
        wrong["a label that sees itself"] = with_self_pairs(1.0)
    for what, probs in wrong.items():
        assert off(probs) > 8, what


def test_the_reference_of_self_pairs_without_any_is_the_posterior():
    np.testing.assert_allclose(with_self_pairs(0.0), posterior(), rtol=1e-5)


@pytest.mark.slow_except("2-none", "3-area", "5-max_pool")
@every_likelihood
@every_number_of_blocks
def test_marginals_are_unbiased_at_stationarity(num_blocks, name):
    marginals = from_the_posterior(num_blocks, name).marginals
    assert standard_errors_off(marginals, marginals_of(posterior(name))) < 4
    for wrong in (posterior(name, kernel=2 * KERNEL), posterior("area" if name == "none" else "none")):
        assert standard_errors_off(marginals, marginals_of(wrong)) > 8


@pytest.mark.slow_except("2")
@every_number_of_blocks
def test_conditional_distributions_vary_less_than_labels(num_blocks):
    """The theorem of Rao and Blackwell: the marginals of one sweep have the labels' mean and a smaller variance."""
    samples = from_the_posterior(num_blocks, "none")
    one_hot = np.eye(NUM_CLASSES)[samples.labels]
    assert (samples.marginals.var(axis=0) < 0.7 * one_hot.var(axis=0)).all()
    # And the labels are drawn from them: given the marginals nothing of the labels' mean is left over.
    assert standard_errors_off(one_hot - samples.marginals, 0) < 4
    assert standard_errors_off((one_hot - samples.marginals) * samples.marginals, 0) < 4


@pytest.mark.parametrize("name", ["area", "max_pool"])
def test_with_a_likelihood_the_marginals_of_a_sweep_are_its_labels(name):
    samples = from_the_posterior(3, name)
    np.testing.assert_array_equal(samples.marginals, np.eye(NUM_CLASSES)[samples.labels])


@pytest.mark.slow
@with_and_without
def test_marginals_are_the_mean_over_the_sweeps(name):
    start = exact_samples(4, posterior(name))
    marginals = np.asarray(chains(keys_of(5), start, KERNEL, UNARY, name, 3, 2).marginals)
    assert standard_errors_off(marginals, marginals_of(posterior(name))) < 4
    if name == "area":
        np.testing.assert_allclose(3 * marginals, np.round(3 * marginals), atol=1e-5)
    # More than a third of the variance, as sweeps are not independent; less than all of it, as in the last one alone.
    ratio = marginals.var(axis=0) / from_the_posterior(2, name).marginals.var(axis=0)
    assert ratio.min() > 0.3 and ratio.max() < 0.85


@pytest.mark.slow_except("2")
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_two_pixels_agree_as_often_as_by_hand(num_blocks):
    """Two pixels, three classes, no unary: P(z_1 = z_2) is e^k / (e^k + 2)."""
    start = jnp.zeros((SOME_CHAINS, 2), jnp.int32)
    kernel = np.float32([[0, 0.9], [0.9, 0]])
    unary = np.zeros((2, 3), np.float32)
    labels = np.asarray(chains(keys_of(6, SOME_CHAINS), start, kernel, unary, "none", 20, num_blocks).labels)
    agree = labels[:, :1] == labels[:, 1:]
    assert standard_errors_off(agree, np.exp(0.9) / (np.exp(0.9) + 2)) < 4
    assert standard_errors_off(labels == 0, 1 / 3) < 4


@pytest.mark.slow_except("3")
@pytest.mark.parametrize("num_blocks", [1, 3, NUM_PIXELS])
def test_without_a_kernel_one_sweep_gives_independent_labels(num_blocks):
    """From any start. The field of a pixel is N(d z_k, d) with d = 1e-3: little is left of it in the softmax."""
    start = jnp.zeros((MANY_CHAINS, NUM_PIXELS), jnp.int32)
    samples = chains(keys_of(7), start, np.zeros_like(KERNEL), UNARY, "none", 1, num_blocks)
    expected = reference.softmax(UNARY)
    assert p_value(samples.labels, np.exp(reference.factorised_log_probs(expected))) > 1e-3
    # A difference of logits has a standard deviation of sqrt(2 d); the slope of a probability is at most 1 / 4.
    np.testing.assert_allclose(samples.marginals, np.broadcast_to(expected, samples.marginals.shape),
                               atol=6 * np.sqrt(2e-3) / 4)
    np.testing.assert_allclose(np.mean(samples.marginals, axis=0), expected, atol=1e-3)


@pytest.mark.slow
@with_and_without
def test_labels_passed_on_go_on_with_the_chain(name):
    """One sweep from a fixed start is not the posterior yet; call after call of one sweep it is."""
    expected = posterior(name) @ statistics_of(EVERY)
    labels, off = jnp.zeros((SOME_CHAINS, NUM_PIXELS), jnp.int32), []
    for call in range(20):
        labels = chains(keys_of(100 + call, SOME_CHAINS), labels, KERNEL, UNARY, name, 1, 1).labels
        off.append(standard_errors_off(statistics_of(np.asarray(labels)), expected))
    assert off[0] > 8 and off[-1] < 4


@with_and_without
def test_the_gradient_of_q_is_unbiased(name):
    """Maximum likelihood on the chain's marginals: within 4 standard errors of the gradient on the posterior's."""
    logits = jnp.asarray(np.random.default_rng(10).normal(size=UNARY.shape), jnp.float32)
    gradient = jax.jit(jax.vmap(jax.grad(expected_log_prob), in_axes=(None, 0)))
    gradients = gradient(logits, from_the_posterior(2, name).marginals)

    def by_definition(probs):
        # A pixel's gradient is target - softmax.
        return marginals_of(probs) - reference.softmax(logits)

    assert standard_errors_off(gradients, by_definition(posterior(name))) < 4
    assert standard_errors_off(gradients, by_definition(posterior("area" if name == "none" else "none"))) > 8


@pytest.mark.slow
@with_and_without
def test_persistent_chains_bring_q_to_the_marginals_of_the_posterior(name):
    # The steps fall as 1 / t, so that the noise of the chains averages out.
    num_chains, num_steps = 500, 200

    @jax.jit
    def fitted(key):
        def step(carry, inputs):
            logits, labels = carry
            step_key, number = inputs
            samples = chains(jax.random.split(step_key, num_chains), labels, KERNEL, UNARY, name, 1, 2)
            loss = jax.grad(lambda x: jax.vmap(expected_log_prob, (None, 0))(x, samples.marginals).mean())
            return (logits + 16 / (number + 4) * loss(logits), samples.labels), None

        start = jnp.zeros_like(UNARY), jnp.zeros((num_chains, NUM_PIXELS), jnp.int32)
        (logits, _), _ = jax.lax.scan(step, start, (jax.random.split(key, num_steps), jnp.arange(num_steps)))
        return jax.nn.softmax(logits)

    got = fitted(jax.random.key(11))
    np.testing.assert_allclose(got, marginals_of(posterior(name)), atol=0.015)
    for wrong in (reference.softmax(UNARY), marginals_of(posterior("area" if name == "none" else "none"))):
        assert np.abs(got - wrong).max() > 0.03
