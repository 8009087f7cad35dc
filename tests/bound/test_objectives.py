"""The objectives: against float64 transcriptions, term by term, and what they refuse."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from objectives import OPTIONS, evidence_of, objective_from, product_config, random_logits, with_likelihood
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

from lcrf_jax.bound.record import Record
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.nets.inputs import guide_image
from lcrf_jax.train.methods import make_objective


def objective_of(config):
    return jax.jit(objective_from(config))


@functools.cache
def mean_objective(name):
    return objective_of(with_likelihood(name, estimator="mean"))


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


@pytest.mark.slow_except("some tags-*")
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
