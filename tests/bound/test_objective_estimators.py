"""The objective with each estimator of its likelihood term, and with the marginals of a chain."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from objectives import OPTIONS, evidence_of, objective_from, product_config, random_logits, with_likelihood
from records import EVIDENCE, GRID, KERNEL, NUM_CLASSES, STRIDE, config_with, record

from lcrf_jax.bound import estimators, likelihoods
from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.record import Record
from lcrf_jax.bound.sampling import block_groups
from lcrf_jax.crf.params import KernelParams


def log_likelihood_of(name, given):
    """log p(y | z, x) of a record as a function of the labels, from `lcrf_jax.bound.likelihoods`."""
    tags, maps, function = given.tags, given.class_maps, getattr(likelihoods, name)
    if name == "evidence":
        return lambda labels: function(labels, tags, np.float32(evidence_of(given)))
    if name == "frozen_classifier":
        options = {"bias": given.bias, **OPTIONS[name]}
        return lambda labels: function(labels, tags, maps.reshape(-1, maps.shape[-1]), **options)
    return lambda labels: function(labels, tags, **OPTIONS[name])


ESTIMATORS = {
    "gumbel_softmax": estimators.gumbel_softmax_likelihood,
    "mean": estimators.mean_likelihood,
    "reinforce": estimators.reinforce_likelihood,
    "straight_through": estimators.straight_through_likelihood,
}
LIKELIHOOD_ALONE = {"entropy_weight": 0.0, "pairwise_weight": 0.0}


def likelihood_term(config, given, key, step=0):
    """What a configuration makes of the likelihood alone: a function of the logits to value and gradient, in nats."""
    objective = objective_from({**config, **LIKELIHOOD_ALONE})

    def term(logits):
        loss, terms = objective(key, logits, given, jnp.int32(step))
        num_cells = logits.shape[0] * logits.shape[1]
        return -loss * num_cells / config["likelihood_weight"], terms["log_likelihood"] * num_cells

    return jax.value_and_grad(term, has_aux=True)


def of_pixels(function):
    """A function of the logits of the pixels, as one of the grid's to value and gradient."""
    return jax.value_and_grad(lambda logits: function(logits.reshape(-1, NUM_CLASSES)))


def assert_same_term(found, expected):
    (value, reported), gradient = found
    np.testing.assert_allclose([value, reported], [expected[0]] * 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], atol=1e-5 * np.abs(expected[1]).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evidence", "gwrp"])
def test_every_estimator_is_that_of_the_bound_with_the_likelihood_of_the_record(name):
    """Value and gradient at the same key, half way from a temperature of 1.6 to one of 0.4."""
    given, key, log_likelihood = record(2), jax.random.key(3), log_likelihood_of(name, record(2))
    assert set(ESTIMATORS) == set(estimators.ESTIMATORS)
    annealed = {"temperature": 1.6, "final_temperature": 0.4, "num_samples": 3}
    terms = {estimator: likelihood_term(with_likelihood(name, estimator=estimator, **annealed), given, key, 20)
             for estimator in ESTIMATORS}
    definitions = {
        estimator: of_pixels(functools.partial(
            function, key, log_likelihood=log_likelihood, temperature=0.8, num_samples=3))
        for estimator, function in ESTIMATORS.items()
    }
    logits = random_logits(12)
    found = jax.jit(lambda x: {estimator: term(x) for estimator, term in terms.items()})(logits)
    expected = jax.jit(lambda x: {estimator: term(x) for estimator, term in definitions.items()})(logits)
    for estimator in ESTIMATORS:
        assert_same_term(found[estimator], expected[estimator])
    for one, other in itertools.combinations(ESTIMATORS, 2):
        assert np.abs(expected[one][1] - expected[other][1]).max() > 0.01 * np.abs(expected[one][1]).max()


def exact_by_hand(name, logits, given):
    probs = reference.softmax(logits).reshape(-1, NUM_CLASSES)
    if name == "evidence":
        return np.sum(probs * np.log(evidence_of(given)))
    absent = np.prod(1 - probs, axis=0)
    right = np.where(given.tags, 1 - absent, absent)
    return np.sum(right * np.log(0.9) + (1 - right) * np.log(0.1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evidence", "max_pool"])
def test_exact_is_the_closed_form_of_the_expectation(name):
    options = {"evidence": EVIDENCE, "max_pool": {"flip_probability": 0.1}}
    given, logits = record(2), random_logits(13)
    config = config_with(likelihood=name, likelihood_options=options, estimator="exact")
    found = jax.jit(likelihood_term(config, given, jax.random.key(0)))(logits)
    seen = {"pixel_evidence": np.float32(evidence_of(given))} if name == "evidence" else options[name]
    closed_form = functools.partial(likelihoods.EXPECTATIONS[name], tags=given.tags, **seen)
    assert_same_term(found, jax.jit(of_pixels(closed_form))(logits))
    np.testing.assert_allclose(found[0][0], exact_by_hand(name, logits, given), rtol=1e-5)


@pytest.mark.slow
def test_exact_adds_the_closed_forms_of_the_factors():
    options = {"evidence": EVIDENCE, "max_pool": {"flip_probability": 0.1}}
    given, logits = record(2), random_logits(13)
    config = config_with(likelihood_options=options, further_likelihoods={"max_pool": 3.0}, estimator="exact")
    (found, _), _ = jax.jit(likelihood_term(config, given, jax.random.key(0)))(logits)
    of_pixels, pooled = (exact_by_hand(name, logits, given) for name in ("evidence", "max_pool"))
    np.testing.assert_allclose(found, of_pixels + 3 * pooled, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gumbel_softmax", "straight_through"])
def test_the_cells_of_a_noise_block_share_their_noise(estimator):
    """On a grid of four rows and two columns, so that exchanged sides would be noticed."""
    given, logits, key = record(2), random_logits(14)[:, :2], jax.random.key(5)
    given = given._replace(guide=given.guide[:, :2], class_maps=given.class_maps[:, :2])
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(block_groups(4, 2, 2), groups)
    config = with_likelihood("evidence", estimator=estimator, noise_block=2)
    terms = [likelihood_term({**config, "noise_block": block}, given, key) for block in (2, 1)]
    definition = of_pixels(functools.partial(
        ESTIMATORS[estimator], key, log_likelihood=log_likelihood_of("evidence", given), temperature=0.8,
        num_samples=2, groups=groups))
    shared, independent, expected = jax.jit(lambda x: [term(x) for term in (*terms, definition)])(logits)
    assert_same_term(shared, expected)
    assert abs(independent[0][0] - expected[0]) > 0.1


CHAIN = {"estimator": "mcmc", "entropy_weight": 1.0, "pairwise_weight": 6.0, "num_sweeps": 3}


@functools.cache
def chain_functions(name):
    """The objective with its gradient, and the sampler called by itself."""
    objective = objective_from(with_likelihood(name, **CHAIN))

    def sampled(key, start, kernel, given, log_potentials):
        if name == "evidence":
            return gibbs(key, start, kernel, log_potentials, num_sweeps=3)
        weighted = log_likelihood_of(name, given)
        none = jnp.zeros((GRID * GRID, NUM_CLASSES))
        return gibbs(key, start, kernel, none, log_likelihood=lambda z: 1.7 * weighted(z), num_sweeps=3)

    return jax.jit(jax.value_and_grad(objective, argnums=1, has_aux=True)), jax.jit(sampled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evidence", "frozen_classifier", "gwrp"])
@pytest.mark.parametrize("begun", [False, True], ids=["from q", "from the record's chain"])
@pytest.mark.parametrize(("step", "ramp"), [(4, 5 / 20), (100, 1.0)])
def test_mcmc_fits_q_to_the_marginals_of_a_chain(name, begun, step, ramp):
    """-E log q under the marginals of a Gibbs sampler of p(y | z, x)^1.7 p(z | x)^(6 ramp), which are constants."""
    objective, sampled = chain_functions(name)
    logits, key = random_logits(15), jax.random.key(6)
    chain = np.random.default_rng(0).integers(0, NUM_CLASSES, (GRID, GRID)) if begun else np.full((GRID, GRID), 255)
    given = record(2)._replace(chain=chain.astype(np.uint8))
    (loss, terms), gradient = objective(key, logits, given, jnp.int32(step))

    start_key, chain_key = jax.random.split(key)
    start = chain.reshape(-1) if begun else jax.random.categorical(start_key, logits.reshape(-1, NUM_CLASSES))
    kernel = reference.dense_kernel(given.guide, KernelParams(**KERNEL).at_stride(STRIDE), "symmetric")
    samples = sampled(chain_key, jnp.asarray(start, jnp.int32), np.float32(6 * ramp * kernel), given,
                      np.float32(1.7 * np.log(evidence_of(given))))
    marginals, probs = np.float64(samples.marginals), reference.softmax(logits).reshape(-1, NUM_CLASSES)
    np.testing.assert_allclose(loss, -np.sum(marginals * np.log(probs)) / GRID**2, rtol=1e-4)
    expected = (probs - marginals) / GRID**2
    np.testing.assert_allclose(gradient.reshape(-1, NUM_CLASSES), expected, atol=1e-4 / GRID**2)
    assert set(terms) == {"log_prob", "entropy", "chain"} and terms["log_prob"] == -loss
    np.testing.assert_allclose(terms["entropy"], -np.sum(probs * np.log(probs)) / GRID**2, rtol=1e-5)
    assert terms["chain"].dtype == jnp.uint8
    np.testing.assert_array_equal(terms["chain"], samples.labels.reshape(GRID, GRID))


def small_record():
    """Three by three cells and three classes, one of them not tagged: 19,683 labellings."""
    maps = np.random.default_rng(1).normal(0.4, 0.4, (3, 3, 2)).astype(np.float32)
    return Record(np.array([True, True, False]), guide=reference.smooth_image(3, 3, 3).astype(np.uint8), class_maps=maps,
                  peaks=np.ones(2))


def posterior_marginals(name, given, likelihood_weight, pairwise_weight):
    """[9, 3] of p(y | z, x)^a p(z | x)^b, by enumeration."""
    kernel = reference.dense_kernel(given.guide, KernelParams(**KERNEL).at_stride(STRIDE), "symmetric")
    one_hot = np.eye(3)[reference.labellings(9, 3)]
    log_likelihood = 0.0
    if "evidence" in name:
        log_likelihood += np.einsum("zik,ik->z", one_hot, np.log(evidence_of(given)))
    if "area" in name:
        pi = reference.sigmoid(15 * (one_hot.mean(axis=1) - [0.4, 0.2, 0.2]))
        log_likelihood += np.log(np.where(given.tags, pi, 1 - pi)).sum(axis=1)
    energies = reference.labelling_energies(kernel, 3)
    weights = reference.softmax(likelihood_weight * log_likelihood - pairwise_weight * energies)
    return np.einsum("z,zik->ik", weights, one_hot)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["evidence", "area", "evidence and area"])
def test_chains_that_go_on_reach_the_weighted_posterior(name):
    """600 chains from a q that knows nothing; the marginals of the second call, within 4.5 standard errors."""
    given, num_chains, weights = small_record(), 600, (0.7, 4.0)
    settings = {"num_sweeps": 40, "likelihood_weight": weights[0], "pairwise_weight": weights[1]}
    first, _, further = name.partition(" and ")
    options = {"likelihood": first, "likelihood_options": OPTIONS}
    product = {"further_likelihoods": {further: 1.0} if further else {}}
    config = config_with(**CHAIN | settings | options | product)
    gradient = jax.grad(objective_from(config), argnums=1, has_aux=True)
    step = jax.jit(jax.vmap(
        lambda key, chain: gradient(key, jnp.zeros((3, 3, 3)), given._replace(chain=chain), jnp.int32(100))))
    chains = jnp.full((num_chains, 3, 3), 255, jnp.uint8)
    for seed in range(2):
        gradients, terms = step(jax.random.split(jax.random.key(seed), num_chains), chains)
        chains = terms["chain"]
    marginals = 1 / 3 - 9 * np.float64(gradients).reshape(num_chains, 9, 3)
    errors = marginals.std(axis=0, ddof=1) / np.sqrt(num_chains)

    def deviation(likelihood_weight, pairwise_weight):
        exact = posterior_marginals(name, given, likelihood_weight, pairwise_weight)
        return np.max(np.abs(marginals.mean(axis=0) - exact) / errors)

    assert deviation(*weights) < 4.5
    for others in ((1.4, 4.0), (0.35, 4.0), (0.7, 8.0), (0.7, 2.0)):
        assert deviation(*others) > 9


def test_exact_needs_a_closed_form_of_every_factor():
    with pytest.raises(ValueError, match="'exact' needs a likelihood .*'evidence', 'area', 'gwrp'"):
        objective_from(product_config(estimator="exact"))


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"evidence", "max_pool"}))
def test_exact_is_refused_where_there_is_no_closed_form(name):
    message = rf"objective\.estimator: 'exact' needs .*\['evidence', 'max_pool'\], got '{name}'; use reinforce"
    with pytest.raises(ValueError, match=message):
        objective_from(with_likelihood(name, estimator="exact"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_samples": 0}, "num_samples: expected a finite number >= 1, got 0; gumbel_softmax needs 1"),
    ({"num_samples": 1, "estimator": "reinforce"}, "num_samples: .* >= 2, got 1; reinforce needs 2"),
    ({"temperature": 0.0}, "temperature: expected a finite number > 0, got 0.0; 1 is the default"),
    ({"temperature": float("nan")}, "temperature: .*got nan"),
    ({"final_temperature": -0.1}, "final_temperature: .* >= 0, got -0.1; 0 keeps the temperature"),
    ({"noise_block": 0}, "noise_block: .* >= 1, got 0; 1 is independent noise"),
    ({"noise_block": 2, "estimator": "mean"}, "noise_block: expected 1 with the estimator 'mean', got 2; blocks are"),
    ({"noise_block": 2, "estimator": "exact"}, "noise_block: expected 1 with the estimator 'exact', got 2"),
    ({"noise_block": 2, "estimator": "reinforce"}, "noise_block: expected 1 with the estimator 'reinforce', got 2"),
    ({**CHAIN, "noise_block": 2}, "noise_block: expected 1 with the estimator 'mcmc', got 2"),
    ({"noise_block": 1.5}, "noise_block: expected a whole number, got 1.5"),
    ({"num_sweeps": 0}, "num_sweeps: .* >= 1, got 0; 5 is the default"),
    ({"anneal_epochs": -1}, "anneal_epochs: .* >= 0, got -1; "),
    ({"pairwise_warmup_epochs": -1}, "pairwise_warmup_epochs: .* >= 0, got -1; 0 is no warm-up"),
    ({**CHAIN, "entropy_weight": 0.9}, "'mcmc' samples .*got {'entropy_weight': 0.9}"),
    ({**CHAIN, "pairwise_stride": 8}, "'mcmc' samples .*got {'pairwise_stride': 8}"),
    ({**CHAIN, "pairwise_form": "lattice"}, "'mcmc' samples .*got {'pairwise_form': 'lattice'}"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "")
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf"^objective[.:].*{message}"):
        objective_from(config_with(**changes))
