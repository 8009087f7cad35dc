"""The objectives: against float64 transcriptions, term by term, and what they refuse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from records import (
    BATCH,
    CONFIG,
    EVIDENCE,
    GRID,
    KERNEL,
    NUM_CLASSES,
    SIZE,
    STRIDE,
    config_with,
    feature_batch,
    image_batch,
    record,
)

from lcrf_jax.bound import estimators, likelihoods, objective
from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.record import Record
from lcrf_jax.bound.sampling import block_groups
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.nets.inputs import guide_image
from lcrf_jax.train.methods import make_objective

OPTIONS = {
    "area": {"beta": 15.0, "foreground_share": 0.2, "background_share": 0.4},
    "evidence": EVIDENCE,
    "frozen_classifier": {"scale": 1.5},
    "gwrp": {"foreground_decay": 0.99, "background_decay": 0.999},
    "log_mean_exp": {"sharpness": 4.0},
    "max_pool": {},
    "noisy_or": {"rho": 0.2},
}


def with_likelihood(name, **changes):
    return config_with(likelihood=name, likelihood_options={name: OPTIONS[name]}, **changes)


def random_logits(seed, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, (GRID, GRID, NUM_CLASSES)).astype(np.float32)


def objective_from(config):
    return objective.latent_crf_objective(config, stride=STRIDE, steps_per_epoch=10)


def objective_of(config):
    return jax.jit(objective_from(config))


@functools.cache
def mean_objective(name):
    return objective_of(with_likelihood(name, estimator="mean"))


def evidence_of(given):
    maps = given.class_maps.reshape(-1, given.class_maps.shape[-1])
    return reference.class_evidence(maps, given.peaks, given.tags, **EVIDENCE)


def expected_terms(name, logits, given):
    """(log-likelihood of the probabilities, entropy, pairwise energy) in float64, in nats of the image."""
    probs = reference.softmax(logits).reshape(-1, NUM_CLASSES)
    kernel = reference.dense_kernel(given.guide, KernelParams(**KERNEL).at_stride(STRIDE), "symmetric")
    if name == "evidence":
        log_likelihood = np.log((probs * evidence_of(given)).sum(axis=1)).sum()
    else:
        maps = given.class_maps.reshape(-1, NUM_CLASSES - 1)
        seen = {"class_maps": maps, "bias": given.bias} if name == "frozen_classifier" else {}
        log_likelihood = reference.tag_log_likelihood(name, probs, given.tags, **OPTIONS[name], **seen)
    return log_likelihood, -(probs * np.log(probs)).sum(), reference.pairwise_energy(probs, kernel)


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("index", [0, 1, 2], ids=["every tag", "no tag", "some tags"])
def test_the_objective_equals_its_definition(name, index):
    logits, given = random_logits(index), record(index)
    loss, terms = mean_objective(name)(jax.random.key(0), logits, given, jnp.int32(4))
    log_likelihood, entropy, energy = expected_terms(name, logits, given)
    num_cells, ramp = GRID * GRID, 5 / 20
    expected = -(1.7 * log_likelihood + 0.9 * entropy - 0.6 * ramp * energy) / num_cells
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert set(terms) == {"log_likelihood", "entropy", "pairwise_energy"}
    named = {"log_likelihood": log_likelihood, "entropy": entropy, "pairwise_energy": energy}
    for term, value in named.items():
        np.testing.assert_allclose(terms[term], value / num_cells, rtol=2e-5)


FURTHER = {"area": 2.0, "gwrp": 0.5, "noisy_or": 0.0}


def product_config(name="evidence", **changes):
    """The likelihood times an area likelihood squared and the root of a gwrp."""
    return config_with(likelihood=name, likelihood_options=OPTIONS, further_likelihoods=FURTHER, **changes)


@pytest.mark.slow_except("some tags-evidence", "some tags-max_pool")
@pytest.mark.parametrize("name", ["evidence", "frozen_classifier", "max_pool"])
@pytest.mark.parametrize("index", [0, 1, 2], ids=["every tag", "no tag", "some tags"])
def test_further_likelihoods_are_multiplied_in_their_powers(name, index):
    logits, given = random_logits(index), record(index)
    loss, terms = objective_of(product_config(name, estimator="mean"))(jax.random.key(0), logits, given, jnp.int32(4))
    factors = {factor: expected_terms(factor, logits, given)[0] for factor in (name, "area", "gwrp")}
    log_likelihood = factors[name] + 2 * factors["area"] + 0.5 * factors["gwrp"]
    np.testing.assert_allclose(terms["log_likelihood"], log_likelihood / GRID**2, rtol=2e-5)
    rest = -0.9 * terms["entropy"] + 0.6 * 5 / 20 * terms["pairwise_energy"]
    np.testing.assert_allclose(loss - rest, -1.7 * log_likelihood / GRID**2, rtol=1e-4)


def test_further_likelihoods_stay_when_evidence_of_an_earlier_round_takes_over():
    logits, evidence = random_logits(3), reference.softmax(random_logits(4)).astype(np.float32)
    given = record(2)._replace(pixel_evidence=evidence)
    area, gwrp = (expected_terms(name, logits, given)[0] for name in ("area", "gwrp"))
    given = given._replace(class_maps=None, peaks=None)
    _, terms = objective_of(product_config(estimator="mean"))(jax.random.key(0), logits, given, jnp.int32(0))
    of_pixels = np.log((reference.softmax(logits) * np.float64(evidence)).sum(axis=-1)).sum()
    np.testing.assert_allclose(terms["log_likelihood"], (of_pixels + 2 * area + 0.5 * gwrp) / GRID**2, rtol=1e-5)


def test_cues_are_multiplied_to_the_evidence_of_the_class_maps():
    logits, given = random_logits(3), record(2)
    cues = np.random.default_rng(0).choice([0, 1, 2, 255], (GRID, GRID)).astype(np.uint8)
    given = given._replace(cues=cues)
    objective = objective_of(config_with(estimator="mean", cue_confidence=0.9))
    _, terms = objective(jax.random.key(0), logits, given, jnp.int32(0))
    evidence = evidence_of(given) * reference.cue_evidence(cues.reshape(-1), given.tags, 0.9, 0.01)
    evidence /= evidence.sum(axis=1, keepdims=True)
    expected = np.log((reference.softmax(logits).reshape(evidence.shape) * evidence).sum(axis=1)).mean()
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-5)
    # An earlier round's evidence knows the cues already.
    given = given._replace(pixel_evidence=reference.softmax(random_logits(4)).astype(np.float32))
    _, terms = objective(jax.random.key(0), logits, given, jnp.int32(0))
    expected = np.log((reference.softmax(logits) * given.pixel_evidence).sum(axis=-1)).mean()
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-5)


def test_saliency_of_the_record_moves_the_background_of_the_evidence():
    logits, saliency = random_logits(3), np.random.default_rng(1).random((GRID, GRID, 1)).astype(np.float32)
    given, options = record(2)._replace(gradient_saliency=saliency), {**EVIDENCE, "saliency_weight": 2.0}
    config = config_with(estimator="mean", likelihood_options={"evidence": options})
    _, terms = objective_of(config)(jax.random.key(0), logits, given, jnp.int32(0))
    maps = given.class_maps.reshape(-1, NUM_CLASSES - 1)
    of_pixels = reference.class_evidence(maps, given.peaks, given.tags, saliency=saliency.reshape(-1), **options)
    expected = np.log((reference.softmax(logits).reshape(of_pixels.shape) * of_pixels).sum(axis=1)).mean()
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"cue_confidence": 0.9, "likelihood": "gwrp"}, "cues are a part of the likelihood 'evidence', got 'gwrp'"),
    ({"likelihood_options": {"evidence": {"saliency_weight": -1.0}}}, r"evidence\.saliency_weight: expected .* >= 0"),
    ({"cue_confidence": -0.1}, r"objective\.cue_confidence: expected a finite number >= 0"),
    ({"cue_confidence": 1.0}, r"objective\.cue_confidence: expected a probability below 1, got 1.0"),
])
def test_cues_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        objective_from(config_with(**changes))


@pytest.mark.parametrize(("further", "message"), [
    ({"evidence": 1.0}, r"further_likelihoods\.evidence: expected one of .*'gwrp'.*'evidence'"),
    ({"noisy_and": 0.0}, r"further_likelihoods\.noisy_and: expected one of .*'noisy_or'"),
    ({"gwrp": -1.0}, r"further_likelihoods\.gwrp: expected a finite number >= 0, got -1.0"),
    ({"area": 1.0}, r"further_likelihoods\.area: area is the likelihood already"),
])
def test_further_likelihoods_that_cannot_be_are_refused(further, message):
    with pytest.raises(ValueError, match=message):
        objective_from(with_likelihood("area", further_likelihoods=further))


def test_exact_needs_a_closed_form_of_every_factor():
    with pytest.raises(ValueError, match="'exact' needs a likelihood .*'evidence', 'area', 'gwrp'"):
        objective_from(product_config(estimator="exact"))


def test_the_gradient_is_that_of_the_definition():
    """The slope along a random direction, by a central difference in float64."""
    logits, given, direction = np.float64(random_logits(10)), record(2), np.float64(random_logits(11, 1.0))

    def definition(logits):
        log_likelihood, entropy, energy = expected_terms("evidence", logits, given)
        return -(1.7 * log_likelihood + 0.9 * entropy - 0.6 * 5 / 20 * energy) / GRID**2

    expected = (definition(logits + 1e-4 * direction) - definition(logits - 1e-4 * direction)) / 2e-4
    slopes = jax.jit(jax.grad(lambda x: mean_objective("evidence")(jax.random.key(0), x, given, jnp.int32(4))[0]))
    np.testing.assert_allclose(np.sum(direction * np.float64(slopes(np.float32(logits)))), expected, rtol=1e-4)


def test_evidence_of_an_earlier_round_takes_the_place_of_the_class_maps():
    logits, evidence = random_logits(3), reference.softmax(random_logits(4)).astype(np.float32)
    given = record(2)._replace(pixel_evidence=evidence)
    given = given._replace(class_maps=None, peaks=None)
    config = config_with(estimator="mean")
    _, terms = objective_of(config)(jax.random.key(0), logits, given, jnp.int32(0))
    expected = np.log((reference.softmax(logits) * np.float64(evidence)).sum(axis=-1)).mean()
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-5)


@pytest.mark.slow_except("2.0-9-0.5", "0-0-1")
@pytest.mark.parametrize(("epochs", "step", "expected"), [
    (2.0, 0, 1 / 20), (2.0, 9, 0.5), (2.0, 19, 1.0), (2.0, 500, 1.0), (0.5, 0, 0.2), (0.5, 5, 1.0), (0, 0, 1),
])
def test_only_the_pairwise_term_warms_up(epochs, step, expected):
    logits, given, key = random_logits(5), record(2), jax.random.key(0)
    config = config_with(estimator="mean", pairwise_warmup_epochs=epochs)
    loss, terms = objective_of(config)(key, logits, given, jnp.int32(step))
    rest = -1.7 * terms["log_likelihood"] - 0.9 * terms["entropy"]
    np.testing.assert_allclose(loss - rest, 0.6 * expected * terms["pairwise_energy"], rtol=1e-4)


def test_all_weights_one_is_the_negative_bound_per_cell():
    weights = {f"{term}_weight": 1.0 for term in ("likelihood", "entropy", "pairwise")}
    config = config_with(estimator="mean", pairwise_warmup_epochs=0, **weights)
    logits, given = random_logits(6), record(3)
    loss, _ = objective_of(config)(jax.random.key(0), logits, given, jnp.int32(0))
    log_likelihood, entropy, energy = expected_terms("evidence", logits, given)
    np.testing.assert_allclose(loss, -(log_likelihood + entropy - energy) / GRID**2, rtol=2e-5)


def bilinear(values, size):
    """[h, w, C] as [size, size, C], float64, borders repeated."""
    centres = np.clip((np.arange(size) + 0.5) * len(values) / size - 0.5, 0, len(values) - 1)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(len(values))))
    return np.einsum("Hh,hwk,Ww->HWk", weights, np.float64(values), weights)


@pytest.mark.slow_except("8-exact")
@pytest.mark.parametrize(("stride", "form"), [(STRIDE // 2, "exact"), (STRIDE // 4, ""), (STRIDE // 4, "lattice")])
def test_the_pairwise_term_on_a_finer_grid_than_the_logits(stride, form):
    guide = np.asarray(guide_image(image_batch().image[2:3], stride)[0])
    logits, given = random_logits(8), record(2)._replace(guide=guide)
    config = config_with(estimator="mean", pairwise_stride=stride, pairwise_form=form)
    loss, terms = objective_of(config)(jax.random.key(0), logits, given, jnp.int32(4))
    fine = reference.softmax(bilinear(logits, SIZE // stride)).reshape(-1, NUM_CLASSES)
    kernel = reference.dense_kernel(given.guide, KernelParams(**KERNEL).at_stride(stride), "symmetric")
    energy = reference.pairwise_energy(fine, kernel) / len(fine)
    np.testing.assert_allclose(terms["pairwise_energy"], energy, rtol=0.1 if form == "lattice" else 2e-4)
    rest = -1.7 * terms["log_likelihood"] - 0.9 * terms["entropy"]
    np.testing.assert_allclose(loss - rest, 0.6 * 5 / 20 * terms["pairwise_energy"], rtol=1e-4)
    _, coarse = mean_objective("evidence")(jax.random.key(0), logits, record(2), jnp.int32(4))
    assert abs(coarse["pairwise_energy"] / energy - 1) > 0.2


def test_an_unknown_form_of_the_kernel_is_told():
    with pytest.raises(ValueError, match="objective.pairwise_form: expected one of .*'lattice'.*got 'grid'"):
        objective_from(config_with(pairwise_form="grid"))


def relaxed_log_likelihood(key, logits, given, temperature, num_samples):
    """Mean of log p(y | z, x) per cell over relaxed samples, with the noise of the key."""
    values = []
    for sample_key in jax.random.split(key, num_samples):
        noise = np.asarray(jax.random.gumbel(sample_key, (GRID * GRID, NUM_CLASSES)))
        sample = reference.softmax((logits.reshape(-1, NUM_CLASSES) + noise) / temperature)
        values.append(np.log((sample * evidence_of(given)).sum(axis=1)).mean())
    return np.mean(values)


def test_samples_are_drawn_from_the_key_at_the_given_temperature():
    logits, given = random_logits(7), record(2)
    loss = objective_of(CONFIG)
    _, terms = loss(jax.random.key(1), logits, given, jnp.int32(0))
    _, again = loss(jax.random.key(1), logits, given, jnp.int32(0))
    _, other = loss(jax.random.key(2), logits, given, jnp.int32(0))
    assert terms["log_likelihood"] == again["log_likelihood"] != other["log_likelihood"]
    assert terms["entropy"] == other["entropy"]
    expected = relaxed_log_likelihood(jax.random.key(1), logits, given, 0.8, num_samples=2)
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-4)


@functools.cache
def annealed_objective(first, last, epochs):
    return objective_of(config_with(temperature=first, final_temperature=last, anneal_epochs=epochs, num_samples=1))


@pytest.mark.parametrize(("schedule", "step", "expected"), [
    ((2.0, 0.5, 4.0), 0, 2.0), ((2.0, 0.5, 4.0), 10, 2**0.5), ((2.0, 0.5, 4.0), 20, 1.0),
    ((2.0, 0.5, 4.0), 40, 0.5), ((2.0, 0.5, 4.0), 500, 0.5),
    ((2.0, 0.0, 4.0), 0, 2.0), ((2.0, 0.0, 4.0), 20, 2.0), ((2.0, 0.0, 4.0), 500, 2.0),
    ((2.0, 0.5, 0.0), 0, 0.5),
])
def test_the_temperature_falls_along_a_geometric_path_and_stays_there(schedule, step, expected):
    """4 epochs of 10 steps; without a final temperature it is constant, without epochs the final one from the start."""
    logits, given, key = random_logits(7), record(2), jax.random.key(1)
    _, terms = annealed_objective(*schedule)(key, logits, given, jnp.int32(step))
    relaxed = relaxed_log_likelihood(key, logits, given, expected, num_samples=1)
    np.testing.assert_allclose(terms["log_likelihood"], relaxed, rtol=1e-4)


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


@pytest.mark.slow_except("4-0.25-from the record's chain-evidence")
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


@functools.cache
def losses_and_gradients():
    """One function for all likelihoods: the kernel is then compiled once."""
    every = {name: objective_from(with_likelihood(name)) for name in OPTIONS}

    def of_all(logits, given, key):
        def loss(objective):
            return jax.value_and_grad(lambda x: objective(key, x, given, jnp.int32(0))[0])(logits)

        return {name: loss(objective) for name, objective in every.items()}

    return jax.jit(jax.vmap(of_all, in_axes=(0, 0, None)))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_value_and_gradient_of_every_likelihood_are_finite(scale):
    logits = np.stack([random_logits(i, scale) for i in range(BATCH)])
    found = losses_and_gradients()(logits, feature_batch(), jax.random.key(0))
    for name, (values, gradients) in found.items():
        assert np.isfinite(values).all() and np.isfinite(gradients).all(), name
        assert scale != 1 or np.abs(gradients).max(axis=(1, 2, 3)).min() > 0, name


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"objective\.likelihood: expected one of .*'noisy_or'.*got 'noisy_and'"):
        objective_from(config_with(likelihood="noisy_and"))
    known = ["exact", "gumbel_softmax", "mcmc", "mean", "reinforce", "straight_through"]
    with pytest.raises(ValueError) as error:
        objective_from(config_with(estimator="nuts"))
    assert str(error.value) == f"objective.estimator: expected one of {known}, got 'nuts'"


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


def full_supervision(mask, logits):
    objective = make_objective({"method": "full_supervision"}, stride=STRIDE, steps_per_epoch=1)
    run = jax.jit(jax.value_and_grad(lambda x: objective(jax.random.key(0), x, Record(np.ones(NUM_CLASSES, bool), mask=mask), 0)[0]))
    return run(jnp.asarray(logits))


def test_full_supervision_is_the_cross_entropy_of_the_cells_that_are_not_void():
    mask = np.random.default_rng(0).integers(0, NUM_CLASSES, (SIZE, SIZE)).astype(np.uint8)
    mask[: SIZE // 2] = 255
    logits = random_logits(8)
    loss, gradient = full_supervision(mask, logits)
    log_probs, losses = np.log(reference.softmax(logits)), []
    for row, column in itertools.product(range(GRID // 2, GRID), range(GRID)):
        label = mask[row * STRIDE + STRIDE // 2, column * STRIDE + STRIDE // 2]
        losses.append(-log_probs[row, column, label])
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert not np.any(gradient[: GRID // 2]) and np.all(gradient[GRID // 2 :])


def test_an_image_that_is_void_altogether_teaches_nothing():
    loss, gradient = full_supervision(np.full((SIZE, SIZE), 255, np.uint8), random_logits(9))
    assert loss == 0 and not np.any(gradient)
