import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads

from lcrf_jax.crf import kl_to_prior
from lcrf_jax.elbo import ESTIMATORS, elbo, gumbel_softmax_likelihood, mean_likelihood
from lcrf_jax.kernels import KernelParams, dense_kernel
from lcrf_jax.observation import TAG_LIKELIHOODS, evidence
from lcrf_jax.sampling import gumbel_softmax

every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS)


def random_case(seed, num_pixels=6, num_classes=3):
    """Logits, a positive kernel, tags and evidence of one image."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 1, (num_pixels, num_pixels))
    tags = np.array([True, *(rng.uniform(size=num_classes - 1) < 0.5)])
    vouching = rng.dirichlet(np.ones(num_classes), num_pixels) + 0.01
    return 1.5 * rng.normal(size=(num_pixels, num_classes)), (kernel + kernel.T) / 2, tags, vouching


def likelihoods(name, tags, vouching):
    """The likelihood under test, and the same in NumPy, as functions of the labels."""
    if name == "evidence":
        return (lambda z: evidence(z, tags, vouching),
                lambda z: np.log(np.sum(np.asarray(z) * vouching, axis=1)).sum())
    return (lambda z: TAG_LIKELIHOODS[name](z, tags),
            lambda z: reference.tag_log_likelihood(name, z, tags))


def enumerated(key, logits, log_likelihood):
    """The exact E_q log p(y|z,x), as an estimator: the sum over all labellings."""
    num_pixels, num_classes = logits.shape
    every = reference.labellings(num_pixels, num_classes)
    log_q = jax.nn.log_softmax(logits)[jnp.arange(num_pixels), every].sum(axis=1)
    return jnp.sum(jnp.exp(log_q) * jax.vmap(log_likelihood)(jnp.eye(num_classes)[every]))


@functools.partial(jax.jit, static_argnames="name")
def _exact_terms(name, logits, kernel, tags, vouching, compatibility, log_partition):
    terms = elbo(None, logits, kernel, likelihoods(name, tags, vouching)[0], estimator=enumerated,
                 compatibility=compatibility, log_partition=log_partition)
    return terms, terms.bound


_exact_gradient = jax.jit(jax.grad(lambda *args: _exact_terms(*args)[1], argnums=1), static_argnums=0)


def exact_terms(name, logits, kernel, tags, vouching, compatibility=None, function=_exact_terms):
    """Terms and value of the true bound: the expectation by enumeration, log Z by enumeration."""
    log_partition = reference.log_partition(kernel, logits.shape[1], compatibility)
    return function(name, logits, kernel, tags, vouching, compatibility, log_partition)


@pytest.mark.parametrize("name", ["evidence", *TAG_LIKELIHOODS])
@pytest.mark.parametrize("seed", range(2))
def test_the_bound_is_the_log_probability_of_the_tags_minus_the_kl_to_the_posterior(name, seed):
    logits, kernel, tags, vouching = random_case(seed)
    _, by_loops = likelihoods(name, tags, vouching)
    with jax.enable_x64(True):
        bound = float(exact_terms(name, logits, kernel, tags, vouching)[1])
    log_probability = reference.log_tag_probability(by_loops, kernel, 3)
    assert bound < log_probability

    log_q = reference.factorised_log_probs(reference.softmax(logits))
    every = np.eye(3)[reference.labellings(6, 3)]
    log_joint = np.array([by_loops(z) for z in every]) - reference.labelling_energies(kernel, 3)
    log_joint = log_joint - reference.log_partition(kernel, 3)
    kl_to_posterior = np.sum(np.exp(log_q) * (log_q - (log_joint - log_probability)))
    np.testing.assert_allclose(bound, log_probability - kl_to_posterior, rtol=1e-9)


def test_the_bound_holds_for_any_kernel_and_compatibility():
    image = np.random.default_rng(0).uniform(0, 60, (2, 2, 3))
    compatibility = np.array([[0.0, 2.0], [2.0, 0.5]])
    gaps = []
    for seed in range(5):
        logits, _, tags, vouching = random_case(seed, num_pixels=4, num_classes=2)
        _, by_loops = likelihoods("evidence", tags, vouching)
        for weight in (0.0, 1.0, 8.0):
            kernel = np.asarray(dense_kernel(image, KernelParams(weight, 2.0, 20.0, weight / 2, 1.0)))
            for mu in (None, compatibility):
                bound = exact_terms("evidence", logits, kernel, tags, vouching, mu)[1]
                gaps.append(reference.log_tag_probability(by_loops, kernel, 2, mu) - bound)
    assert min(gaps) > 0


def test_the_bound_is_tight_where_the_posterior_is_factorised():
    """Without a kernel the pixels are independent, and q proportional to the evidence is the posterior."""
    _, _, tags, vouching = random_case(4)
    _, by_loops = likelihoods("evidence", tags, vouching)
    nothing = np.zeros((6, 6))
    with jax.enable_x64(True):
        case = "evidence", np.log(vouching), nothing, tags, vouching
        bound, gradient = exact_terms(*case)[1], exact_terms(*case, function=_exact_gradient)
    log_probability = np.log(vouching.mean(axis=1)).sum()
    np.testing.assert_allclose(bound, log_probability, rtol=1e-12)
    enumerated_log_probability = reference.log_tag_probability(by_loops, nothing, 3)
    np.testing.assert_allclose(enumerated_log_probability, log_probability, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_two_pixels_by_hand():
    # One pair of weight 2 that differs with probability 1/2: energy 1. Z = 2 + 2 / e^2.
    logits, kernel = np.log([[0.8, 0.2], [0.5, 0.5]]), np.array([[0.0, 2.0], [2.0, 0.0]])
    tags, vouching = np.array([True, True]), np.array([[0.9, 0.1], [0.25, 0.75]])
    log_likelihood, _ = likelihoods("evidence", tags, vouching)
    terms, value = exact_terms("evidence", logits, kernel, tags, vouching)
    expected = {
        "log_likelihood": 0.8 * np.log(0.9) + 0.2 * np.log(0.1) + 0.5 * np.log(0.25 * 0.75),
        "entropy": -0.8 * np.log(0.8) - 0.2 * np.log(0.2) + np.log(2),
        "pairwise_energy": 1.0,
        "log_partition": np.log(2 + 2 / np.e**2),
    }
    for name, term in expected.items():
        np.testing.assert_allclose(getattr(terms, name), term, rtol=1e-6, err_msg=name)
    bound = expected["log_likelihood"] + expected["entropy"] - 1 - expected["log_partition"]
    np.testing.assert_allclose([value, terms.bound], bound, rtol=1e-6)
    mean = np.log(0.8 * 0.9 + 0.2 * 0.1) + np.log(0.5)
    control = elbo(jax.random.key(0), logits, kernel, log_likelihood, estimator=mean_likelihood)
    np.testing.assert_allclose(control.log_likelihood, mean, rtol=1e-6)
    assert control.log_partition == 0


def test_energy_and_entropy_make_up_the_kl():
    logits, kernel, _, _ = random_case(5)
    compatibility = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 0.5], [3.0, 0.5, 0.0]])
    for mu in (None, compatibility):
        terms = elbo(jax.random.key(0), logits, kernel, jnp.sum, estimator=mean_likelihood, compatibility=mu)
        kl = kl_to_prior(logits, kernel, compatibility=mu)
        np.testing.assert_allclose(terms.pairwise_energy - terms.entropy, kl, rtol=1e-5)
        np.testing.assert_allclose(terms.bound, 6 - kl, rtol=1e-5)


def test_mean_likelihood_is_the_expectation_of_a_linear_one():
    logits, _, _, vouching = random_case(6)
    expected = reference.expectation(lambda z: np.sum(z * np.log(vouching)), reference.softmax(logits))
    value = mean_likelihood(None, logits, lambda z: jnp.sum(z * jnp.log(vouching)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_mean_likelihood_is_above_the_expectation_of_a_concave_one():
    logits, _, tags, vouching = random_case(7)
    log_likelihood, by_loops = likelihoods("evidence", tags, vouching)
    expected = reference.expectation(by_loops, reference.softmax(logits))
    assert mean_likelihood(None, logits, log_likelihood) > expected + 0.1


def test_cold_samples_estimate_the_expectation():
    """50,000 samples: within four standard errors of the enumeration, which warm samples are not."""
    logits, _, tags, vouching = random_case(8)
    log_likelihood, by_loops = likelihoods("evidence", tags, vouching)
    probs = reference.softmax(logits)
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


def test_the_estimate_is_the_mean_over_samples_of_their_own_keys():
    logits, _, tags, vouching = random_case(9)
    log_likelihood, _ = likelihoods("gwrp", tags, vouching)

    @jax.jit
    def estimate(key):
        return gumbel_softmax_likelihood(key, logits, log_likelihood, temperature=0.7, num_samples=3)

    several = estimate(jax.random.key(2))
    assert several.shape == () and several.dtype == jnp.float32
    assert estimate(jax.random.key(2)) == several != estimate(jax.random.key(3))
    samples = [gumbel_softmax(key, logits, temperature=0.7) for key in jax.random.split(jax.random.key(2), 3)]
    np.testing.assert_allclose(several, np.mean([log_likelihood(z) for z in samples]), rtol=1e-5)


@every_estimator
def test_the_bound_does_not_change_when_pixels_are_reordered_or_logits_shifted(estimator):
    logits, kernel, tags, vouching = random_case(10)
    order = np.random.default_rng(0).permutation(6)
    # The noise is drawn per position, so only the control is compared under another order.
    if estimator is mean_likelihood:
        log_likelihood, _ = likelihoods("evidence", tags, vouching)
        permuted, _ = likelihoods("evidence", tags, vouching[order])
        first = elbo(None, logits, kernel, log_likelihood, estimator=estimator).bound
        second = elbo(None, logits[order], kernel[np.ix_(order, order)], permuted, estimator=estimator).bound
        np.testing.assert_allclose(second, first, rtol=1e-5)
    log_likelihood, _ = likelihoods("area", tags, vouching)
    bounds = [elbo(jax.random.key(0), logits + shift, kernel, log_likelihood, estimator=estimator).bound
              for shift in (0.0, 7.0)]
    np.testing.assert_allclose(bounds[1], bounds[0], rtol=1e-5)


@every_estimator
@pytest.mark.parametrize("name", ["evidence", "gwrp"])
def test_gradients(name, estimator):
    logits, kernel, tags, vouching = random_case(11)
    bound = functools.partial(elbo, estimator=functools.partial(estimator, temperature=0.8, num_samples=2))
    with jax.enable_x64(True):
        log_likelihood, _ = likelihoods(name, tags, vouching)
        check_grads(
            jax.jit(lambda x, k: bound(jax.random.key(0), x, k, log_likelihood).bound),
            (logits, kernel), order=1, modes=["rev"],
        )


def test_the_gradient_of_the_exact_bound_is_that_of_the_kl_to_the_posterior():
    logits, kernel, tags, vouching = random_case(12)
    _, by_loops = likelihoods("noisy_or", tags, vouching)
    every = reference.labellings(6, 3)
    log_joint = np.array([by_loops(z) for z in np.eye(3)[every]]) - reference.labelling_energies(kernel, 3)

    def negative_kl(logits):
        log_q = jax.nn.log_softmax(logits)[jnp.arange(6), every].sum(axis=1)
        return jnp.sum(jnp.exp(log_q) * (log_joint - log_q))

    with jax.enable_x64(True):
        gradient = exact_terms("noisy_or", logits, kernel, tags, vouching, function=_exact_gradient)
        np.testing.assert_allclose(gradient, jax.jit(jax.grad(negative_kl))(logits), atol=1e-9)


@every_estimator
@pytest.mark.parametrize("name", ["evidence", "noisy_or"])
def test_extremes_are_finite_in_value_and_gradient(name, estimator):
    @jax.jit
    @jax.value_and_grad
    def bound(logits, kernel, tags, vouching):
        log_likelihood, _ = likelihoods(name, tags, vouching)
        return elbo(jax.random.key(0), logits, kernel, log_likelihood, estimator=estimator).bound

    rng = np.random.default_rng(0)
    for num_pixels, num_classes in ((9, 4), (1, 4), (9, 1)):
        for logits in (
            rng.choice([-1e4, 0.0, 1e4], (num_pixels, num_classes)),
            np.full((num_pixels, num_classes), 1e4),
            np.tile(np.where(np.arange(num_classes) == 0, 0.0, -np.inf), (num_pixels, 1)),
        ):
            vouching = np.eye(num_classes)[rng.integers(num_classes, size=num_pixels)]
            for tags in (np.ones(num_classes, bool), np.arange(num_classes) == 0):
                value, gradient = bound(logits, 100 * np.ones((num_pixels, num_pixels)), tags, vouching)
                assert np.isfinite(value) and np.isfinite(gradient).all()


@every_estimator
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_promoted(estimator, dtype):
    logits, kernel, tags, vouching = random_case(13)
    log_likelihood, _ = likelihoods("evidence", tags, vouching)
    logits = jnp.asarray(logits, dtype)
    terms = elbo(jax.random.key(0), logits, kernel, log_likelihood, estimator=estimator)
    assert {value.dtype.name for value in terms} == {"float32"}
    logits = logits.astype(jnp.float32)
    promoted = elbo(jax.random.key(0), logits, kernel, log_likelihood, estimator=estimator)
    np.testing.assert_array_equal(np.stack(terms), np.stack(promoted))


@every_estimator
def test_vmap_equals_a_loop(estimator):
    cases = [random_case(seed) for seed in range(3)]
    logits, kernels, tags, vouching = (jnp.stack([jnp.asarray(case[i]) for case in cases]) for i in range(4))
    keys = jax.random.split(jax.random.key(0), 3)

    def bound(key, logits, kernel, tags, vouching):
        log_likelihood, _ = likelihoods("evidence", tags, vouching)
        return elbo(key, logits, kernel, log_likelihood, estimator=estimator).bound

    loop = [jax.jit(bound)(*arrays) for arrays in zip(keys, logits, kernels, tags, vouching)]
    mapped = jax.jit(jax.vmap(bound))(keys, logits, kernels, tags, vouching)
    np.testing.assert_allclose(mapped, loop, rtol=1e-5)


def test_what_does_not_fit_is_refused():
    logits, kernel, _, _ = random_case(0)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"logits: expected shape \[m, K\], got \[2, 6, 3\]; .*jax.vmap"):
        elbo(key, np.stack([logits] * 2), kernel, jnp.sum)
    with pytest.raises(ValueError, match=r"kernel: expected shape \[6, 6\], got \[5, 6\]"):
        elbo(key, logits, kernel[1:], jnp.sum)
    with pytest.raises(ValueError, match=r"compatibility: expected shape \[3, 3\], got \[2, 2\]"):
        elbo(key, logits, kernel, jnp.sum, compatibility=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"log_likelihood: expected shape \[\], got \[6\]"):
        elbo(key, logits, kernel, lambda z: z.sum(axis=1), estimator=mean_likelihood)
    with pytest.raises(ValueError, match=r"num_samples: expected .* >= 1, got 0; .*mean_likelihood"):
        gumbel_softmax_likelihood(key, logits, jnp.sum, num_samples=0)
    with pytest.raises(ValueError, match=r"temperature: expected a finite number > 0, got 0"):
        gumbel_softmax_likelihood(key, logits, jnp.sum, temperature=0.0)
