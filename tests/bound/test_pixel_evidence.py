"""Evidence of class maps and of cues, pixel by pixel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import relaxed_case
from compiled import compiled

from lcrf_jax.bound.likelihoods import evidence
from lcrf_jax.bound.pixel_evidence import class_evidence, cue_evidence, log_evidence

class_evidence, cue_evidence, evidence, log_evidence = map(compiled, (class_evidence, cue_evidence, evidence, log_evidence))


def test_class_evidence_equals_its_definition():
    _, tags, maps, _ = relaxed_case(5)
    peaks = maps.max(axis=0) * [1.0, 1.5, 0.8]
    options = {"background_level": 0.22, "sharpness": 2.5, "floor": 1e-2}
    for tags in ([True, True, False, True], [True] * 4, [True, False, False, False]):
        value = jax.jit(lambda t: class_evidence(maps, peaks, t, **options))(np.array(tags))
        np.testing.assert_allclose(value, reference.class_evidence(maps, peaks, tags, **options), rtol=1e-4)


@pytest.mark.parametrize("tags", [[1, 1, 0], [1, 1, 1], [1, 0, 0]], ids=["one class", "two classes", "no class"])
def test_objectness_takes_the_place_of_a_share_of_the_maps(tags):
    rng, tags = np.random.default_rng(5), np.array(tags, bool)
    maps, objects = rng.normal(1, 1, size=(12, 2)), np.linspace(0, 1, 12)
    options = {"background_level": 0.3, "sharpness": 2.0, "floor": 1e-2}
    value = jax.jit(lambda o: class_evidence(maps, maps.max(axis=0), tags, objectness=o, objectness_weight=0.8, **options))(objects)
    expected = reference.class_evidence(maps, maps.max(axis=0), tags, objectness=objects, objectness_weight=0.8, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-7)
    without = class_evidence(maps, maps.max(axis=0), tags, **options)
    unused = class_evidence(maps, maps.max(axis=0), tags, objectness=objects, **options)
    np.testing.assert_allclose(unused, without, rtol=1e-6)
    gradient = jax.grad(lambda m: jnp.log(class_evidence(m, m.max(axis=0), tags, objectness=objects, objectness_weight=1.0, **options)).sum())(maps)
    assert np.isfinite(gradient).all()


def test_objectness_that_cannot_be_is_refused():
    maps, tags = np.ones((3, 1)), np.array([True, True])
    for given, said in (
        ({"objectness_weight": 1.0}, "objectness: expected .* got None"),
        ({"objectness_weight": -1.0, "objectness": np.ones(3)}, "objectness_weight"),
        ({"objectness": np.ones(2)}, "objectness.*one value per pixel"),
    ):
        with pytest.raises(ValueError, match=said):
            class_evidence(maps, maps.max(axis=0), tags, background_level=0.2, **given)


def test_saliency_moves_the_background_of_class_evidence():
    _, tags, maps, _ = relaxed_case(5)
    options = {"background_level": 0.22, "sharpness": 2.5, "floor": 1e-2, "saliency_weight": 1.7}
    saliency = np.linspace(0, 1, len(maps))
    value = jax.jit(lambda s: class_evidence(maps, maps.max(axis=0), tags, saliency=s, **options))(saliency)
    expected = reference.class_evidence(maps, maps.max(axis=0), tags, saliency=saliency, **options)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    odds = np.log(value[:, 0] / value[:, 1])
    constant = reference.class_evidence(maps, maps.max(axis=0), tags, **options)
    np.testing.assert_allclose(odds - np.log(constant[:, 0] / constant[:, 1]), 1.7 * (0.5 - saliency), atol=1e-4)
    with pytest.raises(ValueError, match="saliency_weight"):
        class_evidence(maps, maps.max(axis=0), tags, background_level=0.2, saliency_weight=-1.0)
    with pytest.raises(ValueError, match="saliency: expected .* got None"):
        class_evidence(maps, maps.max(axis=0), tags, background_level=0.2, saliency_weight=1.0)
    with pytest.raises(ValueError, match="saliency.*one value per pixel"):
        class_evidence(maps, maps.max(axis=0), tags, background_level=0.2, saliency=saliency[1:], saliency_weight=1.0)


def test_cue_evidence_equals_its_definition():
    cues = np.array([0, 3, 255, 1, 2, 4, 255], np.uint8)  # 4 is no class either
    for tags in ([True, True, False, True], [True] * 4, [True, False, False, False], [False] * 4):
        value = jax.jit(lambda t: cue_evidence(cues, t, confidence=0.9, absent_level=0.05))(np.array(tags))
        np.testing.assert_allclose(value, reference.cue_evidence(cues, tags, 0.9, 0.05), rtol=1e-6)


def test_cue_evidence_by_hand():
    value = cue_evidence(np.array([1, 255]), np.array([True, True, False]), confidence=0.8)
    np.testing.assert_allclose(value, [[0.1, 0.8, 0.1], [1 / 2.01, 1 / 2.01, 0.01 / 2.01]], rtol=1e-6)


@pytest.mark.parametrize(("options", "message"), [
    ({"confidence": 0.0}, "confidence"), ({"confidence": 1.0}, "confidence: expected a probability below 1"),
    ({"confidence": 1.5}, "confidence"), ({"absent_level": 0.0}, "absent_level"), ({"absent_level": 1.2}, "absent_level"),
])
def test_numbers_of_cue_evidence_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        cue_evidence(np.array([0, 1]), np.array([True, True]), **{"confidence": 0.9, **options})


def test_shapes_of_cue_evidence_are_checked():
    with pytest.raises(ValueError, match="cues.*flatten the pixels"):
        cue_evidence(np.zeros((2, 2), int), np.array([True, True]), confidence=0.9)
    with pytest.raises(ValueError, match="tags"):
        cue_evidence(np.zeros(4, int), np.ones((1, 2), bool), confidence=0.9)


def test_log_evidence_is_kept_above_that_of_the_floor():
    values = log_evidence(np.array([0.0, 1e-20, 1e-6, 0.5, 1.0, 2.0]))
    np.testing.assert_allclose(values, np.log([1e-12, 1e-12, 1e-6, 0.5, 1.0, 2.0]), rtol=1e-6)
    assert log_evidence(jnp.ones(2, "bfloat16")).dtype == jnp.float32
    _, tags, _, vouching = relaxed_case(3)
    assigned = np.arange(12) % 4
    chosen = log_evidence(vouching)[np.arange(12), assigned].sum()
    np.testing.assert_allclose(evidence(np.eye(4)[assigned], tags, vouching), chosen, rtol=1e-6)


def test_class_evidence_by_hand():
    """At the background level foreground and background tie; an absent class stays at the floor."""
    maps = jnp.array([[1.0, 8.0], [5.0, 8.0], [-3.0, 8.0], [12.0, 8.0]])
    peaks, tags = jnp.array([10.0, 8.0]), jnp.array([True, True, False])
    value = class_evidence(maps, peaks, tags, background_level=0.1, floor=0.01)
    expected = [[0.1, 0.1, 0.01], [0.1, 0.5, 0.01], [0.1, 0.01, 0.01], [0.1, 1.0, 0.01]]
    expected = np.array(expected) / np.sum(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    odds = class_evidence(maps, peaks, tags, background_level=0.1, floor=0.01, sharpness=3.0)
    np.testing.assert_allclose(odds[1, 1] / odds[1, 0], 5.0**3, rtol=1e-5)
    np.testing.assert_allclose(odds[1, 1] / odds[1, 2], 50.0**3, rtol=1e-4)


def test_class_evidence_is_positive_and_normalised_at_extremes():
    maps = jnp.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-1e4, 1e4, 1e-30]])
    sharp = functools.partial(class_evidence, background_level=0.2, sharpness=4.0)
    jacobian = jax.jit(jax.jacrev(sharp))
    for tags in (jnp.array([True] * 4), jnp.array([True, False, False, False])):
        for peaks in (maps.max(axis=0), jnp.zeros(3), jnp.array([-1.0, 1e-20, 1e4])):
            value = jax.jit(sharp)(maps, peaks, tags)
            np.testing.assert_allclose(value.sum(axis=1), 1, rtol=1e-6)
            assert (value > 0).all() and np.isfinite(jacobian(maps, peaks, tags)).all()


@pytest.mark.parametrize("options", [
    {"background_level": 0.0}, {"background_level": 1.5}, {"sharpness": 0.0}, {"floor": 0.0}, {"floor": 2.0},
])
def test_numbers_of_class_evidence_out_of_range_are_refused(options):
    _, tags, maps, _ = relaxed_case(0)
    [argument] = options
    with pytest.raises(ValueError, match=rf"{argument}: expected a .* got .*; "):
        class_evidence(maps, maps.max(axis=0), tags, **{"background_level": 0.2, **options})
