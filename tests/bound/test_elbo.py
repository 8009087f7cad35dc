import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import random_case
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lcrf_jax.bound.estimators import ElboTerms, elbo, expected_log_prob, mean_likelihood
from lcrf_jax.bound.likelihoods import TAG_LIKELIHOODS, evidence, frozen_classifier
from lcrf_jax.crf.energy import kl_to_prior
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.image_kernels import exact_image_kernel
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.crf.params import KernelParams

COMPATIBILITY = np.array([[0.0, 1.0, 3.0], [1.0, 0.0, 0.5], [3.0, 0.5, 0.0]])


def likelihoods(name, tags, vouching):
    """The likelihood under test, and the same in NumPy, as functions of the labels."""
    if name == "evidence":
        return (lambda z: evidence(z, tags, vouching),
                lambda z: np.log(np.sum(np.asarray(z) * vouching, axis=1) + 1e-12).sum())
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


def test_the_enumeration_of_two_pixels_by_hand():
    # Pairs that differ weigh 1/2: Z = 2 + 2/2. Times p(y|z): .1, .2/2, .3/2, .4, together .75.
    kernel = np.log([[1.0, 2.0], [2.0, 1.0]])
    exact = reference.enumeration(np.log([0.1, 0.2, 0.3, 0.4]), kernel, 2)
    np.testing.assert_allclose(np.exp([exact.log_partition, exact.log_tag_probability]), [3, 0.75 / 3])
    np.testing.assert_allclose(np.exp(exact.log_posterior), np.array([0.1, 0.1, 0.15, 0.4]) / 0.75)
    np.testing.assert_allclose(exact.marginals, np.array([[0.2, 0.55], [0.25, 0.5]]) / 0.75)


def test_the_enumeration_of_nine_pixels_and_three_labels():
    """Where the pixels are independent all of it is known; the posterior is then q of the log-evidence."""
    _, _, tags, vouching = random_case(1, num_pixels=9)
    _, by_loops = likelihoods("evidence", tags, vouching)
    one_hot = np.eye(3)[reference.labellings(9, 3)]
    assert one_hot.shape == (19_683, 9, 3)
    exact = reference.enumeration(list(map(by_loops, one_hot)), np.zeros((9, 9)), 3)
    np.testing.assert_allclose(exact.log_partition, 9 * np.log(3))
    np.testing.assert_allclose(exact.log_tag_probability, np.log(vouching.mean(axis=1)).sum())
    probs = vouching / vouching.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(exact.marginals, probs)
    np.testing.assert_allclose(exact.log_posterior, reference.factorised_log_probs(probs))


@pytest.mark.parametrize("name", ["evidence", *TAG_LIKELIHOODS])
def test_the_bound_is_the_log_probability_of_the_tags_minus_the_kl_to_the_posterior(name):
    logits, kernel, tags, vouching = random_case(0)
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


@jax.jit
def every_log_likelihood(one_hot, tags, vouching):
    """[n, 7] log p(y | z, x) of labellings [n, m, K] under every likelihood of the library."""

    def of_one(z):
        values = [likelihoods(name, tags, vouching)[0](z) for name in ("evidence", *TAG_LIKELIHOODS)]
        return jnp.stack([*values, frozen_classifier(z, tags, jnp.log(vouching[:, 1:]), bias=0.5)])

    return jax.vmap(of_one)(one_hot)


@jax.jit
def every_bound(logits, kernel, compatibility, log_partition, every, log_likelihoods):
    """[n] the bound with n tables of log p(y | z, x), the expectation by enumeration."""

    def bound(table):
        def by_enumeration(key, logits, log_likelihood):
            return jnp.exp(jax.nn.log_softmax(logits)[jnp.arange(len(logits)), every].sum(axis=1)) @ table

        return elbo(None, logits, kernel, None, estimator=by_enumeration, compatibility=compatibility,
                    log_partition=log_partition).bound

    return jax.vmap(bound)(log_likelihoods)


def symmetric(matrix):
    return (matrix + matrix.T) / 2


@st.composite
def tiny_images(draw, num_pixels, num_classes):
    """Logits, a kernel and a compatibility of any sign, tags, evidence, and a table of log-likelihoods."""

    def numbers(size, *shape):
        return draw(arrays(np.float64, shape, elements=st.floats(-size, size), fill=st.nothing()))

    with_potts, table_seed = draw(st.booleans()), draw(st.integers(0, 999))
    return (
        numbers(20, num_pixels, num_classes),
        numbers(6, num_pixels, num_pixels),
        reference.potts(num_classes) if with_potts else numbers(3, num_classes, num_classes),
        draw(arrays(bool, num_classes)),
        np.exp(numbers(5, num_pixels, num_classes)),
        draw(st.floats(0, 10)) * np.random.default_rng(table_seed).normal(size=num_classes**num_pixels),
    )


@pytest.mark.slow_except("2-1")
@pytest.mark.parametrize(("num_pixels", "num_classes"), [(9, 3), (4, 2), (1, 3), (2, 1)])
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])  # to shrink would take minutes
@given(data=st.data())
def test_the_bound_never_exceeds_the_log_probability_of_the_tags(num_pixels, num_classes, data):
    """What it lacks is the divergence of q from the posterior, under every likelihood and any other function of z."""
    logits, kernel, compatibility, tags, vouching, table = data.draw(tiny_images(num_pixels, num_classes))
    every = reference.labellings(num_pixels, num_classes)
    log_q = reference.factorised_log_probs(reference.softmax(logits))
    with jax.enable_x64(True):
        values = np.column_stack([every_log_likelihood(np.eye(num_classes)[every], tags, vouching), table]).T
        # A pair is one of i and j: it sees the symmetric parts alone.
        exact = [reference.enumeration(row, symmetric(kernel), num_classes, symmetric(compatibility)) for row in values]
        bounds = np.asarray(every_bound(logits, kernel, compatibility, exact[0].log_partition, every, values))
    for bound, (_, log_probability, log_posterior, _) in zip(bounds, exact, strict=True):
        assert bound <= log_probability + 1e-9
        divergence = np.sum(np.exp(log_q) * (log_q - log_posterior))
        np.testing.assert_allclose(bound, log_probability - divergence, rtol=1e-9, atol=1e-9)


def test_the_bound_holds_for_any_kernel_and_compatibility():
    image = np.random.default_rng(0).uniform(0, 60, (2, 2, 3))
    compatibility = np.array([[0.0, 2.0], [2.0, 0.5]])
    gaps = []
    for seed in range(5):
        logits, _, tags, vouching = random_case(seed, num_pixels=4, num_classes=2)
        _, by_loops = likelihoods("evidence", tags, vouching)
        for weight in (0.0, 1.0, 8.0):
            kernel = np.asarray(dense_kernel(image, KernelParams(weight, 2.0, 20.0, weight / 2, 1.0)))
            assert not np.diagonal(kernel).any()
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
        case = "evidence", np.log(vouching + 1e-12), nothing, tags, vouching
        bound, gradient = exact_terms(*case)[1], exact_terms(*case, function=_exact_gradient)
    log_probability = np.log(vouching.mean(axis=1) + 1e-12).sum()
    np.testing.assert_allclose(bound, log_probability, rtol=1e-12)
    enumerated_log_probability = reference.log_tag_probability(by_loops, nothing, 3)
    np.testing.assert_allclose(enumerated_log_probability, log_probability, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_the_bound_is_tight_where_the_pairs_factorise_too():
    """With mu(a, b) = c_a + c_b every pixel pays c of its label once for each of its pairs, whatever the others are."""
    rng = np.random.default_rng(14)
    _, _, tags, vouching = random_case(14, num_pixels=9)
    kernel, costs = rng.normal(size=(9, 9)), np.array([0.3, -0.8, 1.1])
    kernel = kernel + kernel.T
    weights = kernel.sum(axis=1) - np.diagonal(kernel)
    logits = np.log(vouching + 1e-12) - weights[:, None] * costs
    compatibility = costs[:, None] + costs
    with jax.enable_x64(True):
        case = "evidence", logits, kernel, tags, vouching, compatibility
        bound, gradient = exact_terms(*case)[1], exact_terms(*case, function=_exact_gradient)
        # log p(y|x) = log sum_z prod_j e_j exp(-w_j c) - log sum_z prod_j exp(-w_j c), pixel by pixel.
        log_probability = np.logaddexp.reduce(logits, axis=1) - np.logaddexp.reduce(-weights[:, None] * costs, axis=1)
        np.testing.assert_allclose(bound, log_probability.sum(), rtol=1e-12)
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
        # A step away from the posterior, in any direction, is a step down.
        away = logits + 0.1 * rng.normal(size=logits.shape)
        assert exact_terms("evidence", away, *case[2:])[1] < bound - 1e-3


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
    for mu in (None, COMPATIBILITY):
        terms = elbo(jax.random.key(0), logits, kernel, jnp.sum, estimator=mean_likelihood, compatibility=mu)
        kl = kl_to_prior(logits, kernel, compatibility=mu)
        np.testing.assert_allclose(terms.pairwise_energy - terms.entropy, kl, rtol=1e-5)
        np.testing.assert_allclose(terms.bound, 6 - kl, rtol=1e-5)


@pytest.mark.parametrize("compatibility", [None, COMPATIBILITY], ids=["Potts", "general"])
def test_the_gradient_of_the_kl_is_that_of_the_enumerated_kl(compatibility):
    """3x3 pixels and 3 labels, with a kernel of both signs and something on its diagonal."""
    rng = np.random.default_rng(15)
    kernel = rng.normal(size=(9, 9))
    kernel = kernel + kernel.T
    every = reference.labellings(9, 3)
    energies = reference.labelling_energies(kernel, 3, compatibility)
    log_partition = reference.log_partition(kernel, 3, compatibility)

    def enumerated_kl(logits):
        log_q = jax.nn.log_softmax(logits)[jnp.arange(9), every].sum(axis=1)
        return jnp.sum(jnp.exp(log_q) * (log_q + energies + log_partition))

    with jax.enable_x64(True):
        expected = jax.jit(jax.value_and_grad(enumerated_kl))
        closed = jax.jit(jax.value_and_grad(functools.partial(kl_to_prior, compatibility=compatibility)))
        for size in (0.5, 3.0):
            logits = size * rng.normal(size=(9, 3))
            (value, gradient), (wanted, wanted_gradient) = closed(logits, kernel), expected(logits)
            np.testing.assert_allclose(value + log_partition, wanted, rtol=1e-9)
            np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-9)
            assert np.abs(gradient).max() > 0.1


@pytest.mark.slow_except("image")
@pytest.mark.parametrize("form", ["matrix", "compatibility", "image"])
def test_the_fixed_point_of_mean_field_is_stationary_for_the_bound(form):
    """With log p(y|z,x) linear in z the bound is the free energy of mean field, the expectation by enumeration."""
    rng = np.random.default_rng(16)
    unary = rng.normal(size=(9, 3))
    compatibility = COMPATIBILITY if form == "compatibility" else None

    def bound(logits, kernel):
        return elbo(None, logits, kernel, lambda z: jnp.sum(z * unary), estimator=enumerated,
                    compatibility=compatibility).bound

    with jax.enable_x64(True):
        if form == "image":
            params = KernelParams(1.0, 2.0, 20.0, 0.5, 1.0)
            kernel = jax.jit(lambda image: exact_image_kernel(image, params))(rng.uniform(0, 60, (3, 3, 3)))
        else:
            kernel = rng.uniform(0, 0.3, (9, 9))
            kernel = (kernel + kernel.T) / (1 if compatibility is None else 4)
        gradient = jax.jit(jax.grad(bound))
        run = jax.jit(functools.partial(mean_field, num_iterations=300, compatibility=compatibility))
        fixed = run(unary, kernel)
        np.testing.assert_allclose(gradient(fixed, kernel), 0, atol=1e-8)
        for elsewhere in (unary, rng.normal(size=(9, 3)), 1.1 * fixed):
            assert np.abs(gradient(elsewhere, kernel)).max() > 1e-2


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


def test_every_weight_multiplies_its_own_term():
    terms = ElboTerms(log_likelihood=-7.0, entropy=2.0, pairwise_energy=3.0, log_partition=5.0)
    assert terms.bound == -7 + 2 - 3 - 5
    assert terms.reweighted() == terms.bound + terms.log_partition
    assert terms.reweighted(likelihood=10.0) == -70 + 2 - 3
    assert terms.reweighted(entropy=10.0) == -7 + 20 - 3
    assert terms.reweighted(pairwise=10.0) == -7 + 2 - 30
    assert terms.reweighted(likelihood=0.5, entropy=0.0, pairwise=2.0) == -3.5 - 6
    with pytest.raises(TypeError):
        terms.reweighted(2.0)


fit = jax.jit(jax.value_and_grad(expected_log_prob, argnums=(0, 1)))


def test_expected_log_prob_is_the_expectation_of_log_q_under_the_posterior():
    logits, kernel, tags, vouching = random_case(17)
    _, by_loops = likelihoods("noisy_or", tags, vouching)
    values = [by_loops(z) for z in np.eye(3)[reference.labellings(6, 3)]]
    posterior, marginals = reference.enumeration(values, kernel, 3)[2:]
    probs = reference.softmax(logits)
    with jax.enable_x64(True):
        value, (gradient, of_target) = fit(logits, marginals)
        np.testing.assert_allclose(value, np.exp(posterior) @ reference.factorised_log_probs(probs), rtol=1e-10)
        np.testing.assert_allclose(gradient, marginals - probs, atol=1e-12)
        np.testing.assert_array_equal(of_target, 0)
        # No q is better than the one with the same marginals.
        best, (gradient, _) = fit(np.log(marginals), marginals)
        np.testing.assert_allclose(gradient, 0, atol=1e-12)
        for seed in range(5):
            nearby = np.log(marginals) + 0.1 * np.random.default_rng(seed).normal(size=(6, 3))
            assert fit(nearby, marginals)[0] < best - 1e-4


def test_expected_log_prob_by_hand_and_at_extremes():
    value, _ = fit(np.log([[0.8, 0.2], [0.5, 0.5]]), np.array([[1.0, 0.0], [0.25, 0.75]]))
    np.testing.assert_allclose(value, np.log(0.8) + np.log(0.5), rtol=1e-6)
    one_hot = np.eye(3)[[0, 2, 1, 1]]
    # Labels that q rules out cost nothing where they do not occur, and no more than their logits where they do.
    for logits, expected in (
        (np.where(one_hot == 1, 0.0, -np.inf), 0),
        (np.where(one_hot == 1, 1e4, -1e4), 0),
        (np.where(one_hot == 1, -1e4, 1e4), -4 * (2e4 + np.log(2))),
        (np.full((4, 3), -1e4), -4 * np.log(3)),
    ):
        value, (gradient, _) = fit(logits, one_hot)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient, one_hot - reference.softmax(logits), atol=1e-6)
    for num_pixels, num_classes in ((1, 3), (4, 1)):
        value, (gradient, _) = fit(np.zeros((num_pixels, num_classes)), np.full((num_pixels, num_classes), 1 / num_classes))
        np.testing.assert_allclose(value, -num_pixels * np.log(num_classes), rtol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_expected_log_prob_of_half_precision_is_promoted(dtype):
    logits, _, _, vouching = random_case(18)
    logits, target = jnp.asarray(logits, dtype), jnp.asarray(vouching, dtype)
    value, (gradient, _) = fit(logits, target)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    expected, _ = fit(logits.astype(jnp.float32), target.astype(jnp.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_expected_log_prob_under_vmap_equals_a_loop():
    cases = [random_case(seed) for seed in range(3)]
    logits, targets = (np.stack([case[i] for case in cases]) for i in (0, 3))
    loop = [fit(*pair)[0] for pair in zip(logits, targets)]
    np.testing.assert_allclose(jax.jit(jax.vmap(expected_log_prob))(logits, targets), loop, rtol=1e-6)


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
    with pytest.raises(ValueError, match=r"logits: expected shape \[m, K\], got \[3\]"):
        expected_log_prob(logits[0], logits[0])
    with pytest.raises(ValueError, match=r"target_probs: expected shape \[6, 3\], got \[6\]; give one row per pixel"):
        expected_log_prob(logits, np.zeros(6, int))
