import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled
from jax.test_util import check_grads

from lcrf_jax.bound import likelihoods
from lcrf_jax.bound.likelihoods import (
    EXPECTATIONS,
    IMAGE_LIKELIHOODS,
    TAG_LIKELIHOODS,
    area,
    evidence,
    expected_evidence,
    expected_max_pool,
    frozen_classifier,
    gwrp,
    log_mean_exp,
    max_pool,
    noisy_or,
)
from lcrf_jax.bound.pixel_evidence import class_evidence, cue_evidence, log_evidence

area, class_evidence, cue_evidence, evidence, expected_evidence, expected_max_pool, frozen_classifier = map(
    compiled, (area, class_evidence, cue_evidence, evidence, expected_evidence, expected_max_pool, frozen_classifier)
)
gwrp, log_evidence, log_mean_exp, max_pool, noisy_or = map(compiled, (gwrp, log_evidence, log_mean_exp, max_pool, noisy_or))
TAG_LIKELIHOODS, IMAGE_LIKELIHOODS, EXPECTATIONS = (
    {name: compiled(function) for name, function in table.items()}
    for table in (TAG_LIKELIHOODS, IMAGE_LIKELIHOODS, EXPECTATIONS)
)
OPTIONS = {
    "noisy_or": {"rho": 0.3},
    "max_pool": {"flip_probability": 0.2},
    "log_mean_exp": {"sharpness": 3.0},
    "area": {"beta": 12.0, "foreground_share": 0.15, "background_share": 0.4},
    "gwrp": {"foreground_decay": 0.99, "background_decay": 0.995, "reference_cells": 400},
    "frozen_classifier": {"scale": 1.7},
}
every_likelihood = pytest.mark.parametrize("name", [*TAG_LIKELIHOODS, *IMAGE_LIKELIHOODS])
every_expectation = pytest.mark.parametrize("name", EXPECTATIONS)


def random_case(seed, num_pixels=12, num_classes=4):
    """Relaxed labels, tags, class maps, and evidence of one image."""
    rng = np.random.default_rng(seed)
    labels = reference.softmax(2 * rng.normal(size=(num_pixels, num_classes)))
    tags = np.array([True, *(rng.uniform(size=num_classes - 1) < 0.5)])
    maps = 3 * rng.normal(size=(num_pixels, num_classes - 1))
    vouching = reference.softmax(rng.normal(size=(num_pixels, num_classes)))
    return labels, tags, maps, vouching


def likelihood(name, maps, vouching, **options):
    """Function of labels and tags."""
    if name == "evidence":
        return lambda labels, tags: evidence(labels, tags, vouching)
    if name == "frozen_classifier":
        bias = jnp.linspace(-1.0, 1.0, maps.shape[1])
        return lambda labels, tags: frozen_classifier(labels, tags, maps, bias=bias, **options)
    return functools.partial(TAG_LIKELIHOODS[name], **options)


@functools.partial(jax.jit, static_argnames="name")
def log_prob(name, labels, tags, maps, vouching):
    """With the defaults of every likelihood, compiled once for each size."""
    return likelihood(name, maps, vouching)(labels, tags)


log_prob_gradient = jax.jit(jax.value_and_grad(log_prob, argnums=1), static_argnames="name")


@functools.partial(jax.jit, static_argnames=("name", "flip_probability"))
def expected(name, logits, tags, vouching, flip_probability=1e-6):
    """Closed form of E_q, and its gradient in the logits."""
    options = {"evidence": {"pixel_evidence": vouching}, "max_pool": {"flip_probability": flip_probability}}[name]
    return jax.value_and_grad(lambda x: EXPECTATIONS[name](x, tags, **options))(logits)


def test_every_likelihood_has_a_name():
    assert set(TAG_LIKELIHOODS) | set(IMAGE_LIKELIHOODS) == {*OPTIONS, "evidence"}
    assert likelihoods.TAG_LIKELIHOODS["gwrp"] is likelihoods.gwrp
    assert likelihoods.IMAGE_LIKELIHOODS["evidence"] is likelihoods.evidence
    assert likelihoods.EXPECTATIONS == {
        "evidence": likelihoods.expected_evidence, "max_pool": likelihoods.expected_max_pool}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("changed", [True, False], ids=["options", "defaults"])
def test_equals_the_definition(name, changed):
    for seed in range(4):
        labels, tags, maps, vouching = random_case(seed)
        options = OPTIONS[name] if changed else {}
        value = jax.jit(likelihood(name, maps, vouching, **options))(labels, tags)
        if name == "frozen_classifier":
            options = {**options, "class_maps": maps, "bias": np.linspace(-1, 1, 3)}
        expected = reference.tag_log_likelihood(name, labels, tags, **options)
        np.testing.assert_allclose(value, expected, rtol=2e-5)
        assert value.dtype == jnp.float32


def test_evidence_equals_its_definition():
    for seed in range(4):
        labels, tags, _, vouching = random_case(seed)
        expected = sum(np.log(labels[j] @ vouching[j]) for j in range(12))
        np.testing.assert_allclose(jax.jit(evidence)(labels, tags, vouching), expected, rtol=1e-5)


def test_evidence_of_a_labelling_is_the_sum_of_logarithms():
    _, tags, _, vouching = random_case(3)
    assigned = np.random.default_rng(0).integers(4, size=12)
    value = evidence(np.eye(4)[assigned], tags, vouching)
    np.testing.assert_allclose(value, np.log(vouching[np.arange(12), assigned]).sum(), rtol=1e-6)


def test_class_evidence_equals_its_definition():
    _, tags, maps, _ = random_case(5)
    peaks = maps.max(axis=0) * [1.0, 1.5, 0.8]
    options = {"background_level": 0.22, "sharpness": 2.5, "floor": 1e-2}
    for tags in ([True, True, False, True], [True] * 4, [True, False, False, False]):
        value = jax.jit(lambda t: class_evidence(maps, peaks, t, **options))(np.array(tags))
        np.testing.assert_allclose(value, reference.class_evidence(maps, peaks, tags, **options), rtol=1e-4)


def test_saliency_moves_the_background_of_class_evidence():
    _, tags, maps, _ = random_case(5)
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


def test_two_pixels_by_hand():
    # Pixel 1 is background, pixel 2 is half background and half class 1; class 2 is absent.
    labels, tags = jnp.array([[1.0, 0, 0], [0.5, 0.5, 0]]), jnp.array([True, True, False])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(max_pool(labels, tags), np.log(1 - 1e-6) + np.log(0.5) + np.log(1 - 1e-6))
    close(max_pool(labels, tags, flip_probability=0.1), 2 * np.log(0.9) + np.log(0.5))
    close(noisy_or(labels, tags, rho=0.2), np.log(1 - 0.8 * 0.9) + np.log(0.1))
    wide = {"foreground_share": 0.25, "background_share": 0.75}
    close(area(labels, tags, beta=4.0, **wide), 2 * np.log(0.5) + np.log(1 - 1 / (1 + np.e)))
    # Two cells for two: the decays are taken as they are; (1 + .5 / 2) / 1.5 and .5 / (1 + .25).
    value = gwrp(labels, tags, foreground_decay=0.25, background_decay=0.5, reference_cells=2)
    close(value, np.log(1.25 / 1.5) + np.log(0.4) + np.log(1 - 1e-6))
    pooled = np.log([(np.exp(2) + np.e) / 2, (1 + np.e) / 2]) / 2
    close(log_mean_exp(labels, tags, sharpness=2.0), np.log(pooled).sum() + np.log(1 - 1e-6))
    # Class 1 sees .5 * 4 / 2 - 1 = 0, class 2 sees nothing but its bias.
    maps = jnp.array([[7.0, 5.0], [4.0, 3.0]])
    close(frozen_classifier(labels, tags, maps, bias=-1.0), np.log(0.5) + np.log(1 / (1 + np.exp(-1.0))))
    vouching = jnp.array([[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]])
    close(evidence(labels, tags, vouching), np.log(0.5) + np.log(0.4))


@pytest.mark.parametrize("flip", [0.3, 1e-6, 1e-10])
def test_max_pool_of_a_labelling_is_a_hard_or_that_is_flipped(flip):
    # Class 1 is there and class 2 is not: of the tags none is wrong, then one of either kind, then both.
    labels = np.eye(3)[[0, 1, 0, 1]]
    for tags, num_wrong in (([1, 1, 0], 0), ([1, 0, 0], 1), ([1, 1, 1], 1), ([1, 0, 1], 2)):
        value = max_pool(labels, np.array(tags, bool), flip_probability=flip)
        np.testing.assert_allclose(value, num_wrong * np.log(flip) + (3 - num_wrong) * np.log1p(-flip), rtol=1e-6, atol=1e-6)


@every_expectation
def test_an_expectation_is_the_sum_over_all_labellings(name):
    """In value and gradient, with six pixels of which two are nearly certain."""
    for seed, tags in enumerate(([1, 1, 0], [0, 0, 0], [1, 1, 1])):
        logits, _, _, vouching = random_case(seed, num_pixels=6, num_classes=3)
        logits, tags = np.log(logits) + 12 * np.eye(6, 3, 1), np.array(tags, bool)
        options = {"evidence": {"pixel_evidence": vouching}, "max_pool": {"flip_probability": 0.2}}[name]
        likelihoods = {"evidence": evidence, "max_pool": max_pool}
        with jax.enable_x64(True):
            function = jax.jit(functools.partial(likelihoods[name], tags=tags, **options))
            value, gradient = reference.expectation_and_gradient(function, logits)
            got, got_gradient = expected(name, logits, tags, vouching, flip_probability=0.2)
            np.testing.assert_allclose(got, value, rtol=1e-10)
            np.testing.assert_allclose(got_gradient, gradient, atol=1e-10)
            assert np.abs(gradient).max() > 0.01


def test_expectations_by_hand():
    # Class 1 is at neither pixel with probability .5 * .8, class 0 with .5 * .2; y has class 1 alone.
    logits, tags = np.log([[0.5, 0.5], [0.8, 0.2]]), np.array([False, True])
    vouching = np.array([[0.5, 0.25], [0.1, 1.0]])
    right = 0.5 * 0.2 + (1 - 0.5 * 0.8)
    np.testing.assert_allclose(expected_max_pool(logits, tags, flip_probability=0.1),
                               right * np.log(0.9) + (2 - right) * np.log(0.1), rtol=1e-6)
    np.testing.assert_allclose(expected_evidence(logits, tags, vouching),
                               0.5 * np.log(0.5 * 0.25) + 0.8 * np.log(0.1), rtol=1e-6)


@every_expectation
def test_the_expectation_under_a_certain_q_is_the_likelihood_of_its_labelling(name):
    for seed in range(3):
        _, tags, maps, vouching = random_case(seed)
        labels = np.eye(4)[np.random.default_rng(seed).integers(3, size=12)]
        value, gradient = expected(name, 1e4 * labels, tags, vouching)
        np.testing.assert_allclose(value, log_prob(name, labels, tags, maps, vouching), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@every_expectation
def test_expectations_are_finite_in_value_and_gradient_at_extremes(name):
    rng = np.random.default_rng(0)
    for num_pixels, num_classes in ((16, 4), (1, 4), (16, 1)):
        vouching = np.eye(num_classes)[np.arange(num_pixels) % num_classes]
        for logits in (
            rng.choice([-1e4, 0.0, 1e4], (num_pixels, num_classes)),
            np.full((num_pixels, num_classes), -1e4),
            np.tile(np.where(np.arange(num_classes) == num_classes - 1, 0.0, -np.inf), (num_pixels, 1)),
            np.where(rng.uniform(size=(num_pixels, num_classes)) * np.arange(num_classes) < 0.5, 0.0, -np.inf),
        ):
            for tags in (np.ones(num_classes, bool), np.arange(num_classes) == 0, np.zeros(num_classes, bool)):
                value, gradient = expected(name, logits, tags, vouching)
                assert np.isfinite(value) and value <= 1e-5, f"{value} is the mean of logarithms of probabilities"
                assert np.isfinite(gradient).all()


@every_expectation
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_expectations_promote_half_precision(name, dtype):
    labels, tags, _, vouching = random_case(12, num_pixels=2000)
    logits, vouching = jnp.asarray(np.log(labels), dtype), jnp.asarray(vouching, dtype)
    value, gradient = expected(name, logits, tags, vouching)
    assert value.dtype == jnp.float32 and gradient.dtype == dtype
    logits, vouching = logits.astype(jnp.float32), vouching.astype(jnp.float32)
    np.testing.assert_allclose(value, expected(name, logits, tags, vouching)[0], rtol=1e-5)


@every_expectation
def test_expectations_under_vmap_equal_a_loop(name):
    cases = [random_case(seed) for seed in range(3)]
    logits, tags, vouching = (np.stack([case[i] for case in cases]) for i in (0, 1, 3))
    loop = [expected(name, *arrays)[0] for arrays in zip(logits, tags, vouching)]
    mapped = jax.jit(jax.vmap(functools.partial(expected, name)))(logits, tags, vouching)[0]
    np.testing.assert_allclose(mapped, loop, rtol=1e-5)


def test_log_evidence_is_kept_above_that_of_the_floor():
    values = log_evidence(np.array([0.0, 1e-20, 1e-6, 0.5, 1.0, 2.0]))
    np.testing.assert_allclose(values, np.log([1e-12, 1e-12, 1e-6, 0.5, 1.0, 2.0]), rtol=1e-6)
    assert log_evidence(jnp.ones(2, "bfloat16")).dtype == jnp.float32
    _, tags, _, vouching = random_case(3)
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


@every_likelihood
def test_the_order_of_the_pixels_does_not_matter(name):
    labels, tags, maps, vouching = random_case(6)
    order = np.random.default_rng(0).permutation(12)
    value = log_prob(name, labels, tags, maps, vouching)
    permuted = log_prob(name, labels[order], tags, maps[order], vouching[order])
    np.testing.assert_allclose(permuted, value, rtol=1e-5)
    reversed_classes = log_prob(name, labels[:, ::-1], tags, maps, vouching)
    assert abs(reversed_classes - value) > 1e-3, "that of the classes does"


@every_likelihood
def test_the_order_of_the_foreground_classes_does_not_matter(name):
    labels, _, maps, vouching = random_case(7)
    tags, order = np.array([True, True, False, False]), np.array([0, 3, 1, 2])
    options = {"bias": -0.5}
    if name == "frozen_classifier":
        value = frozen_classifier(labels, tags, maps, **options)
        permuted = frozen_classifier(labels[:, order], tags[order], maps[:, order[1:] - 1], **options)
    else:
        value = log_prob(name, labels, tags, maps, vouching)
        permuted = log_prob(name, labels[:, order], tags[order], maps, vouching[:, order])
    np.testing.assert_allclose(permuted, value, rtol=1e-5)


@pytest.mark.parametrize("name", ["area", "gwrp", "log_mean_exp", "max_pool", "frozen_classifier"])
def test_the_resolution_does_not_matter(name):
    """Every pixel cut into 3 x 3: exact for means and maxima; for ranks up to the steps of the weights."""
    labels, tags, maps, vouching = random_case(8, num_pixels=300)
    value = log_prob(name, labels, tags, maps, vouching)
    fine_labels, fine_maps = np.repeat(labels, 9, axis=0), np.repeat(maps, 9, axis=0)
    finer = log_prob(name, fine_labels, tags, fine_maps, vouching)
    np.testing.assert_allclose(finer, value, rtol=1e-2 if name == "gwrp" else 1e-5)
    if name == "gwrp":
        unscaled = gwrp(fine_labels, tags, reference_cells=9 * 1681)
        assert abs(unscaled - value) > 0.1, "with the decays taken as they are it would"


@every_likelihood
def test_gradients(name):
    labels, tags, maps, vouching = random_case(9, num_pixels=6)
    with jax.enable_x64(True):
        function = likelihood(name, maps, vouching, **OPTIONS.get(name, {}))
        check_grads(jax.jit(lambda x: function(jax.nn.softmax(x), tags)), (2 * labels,), order=1)
        assert function(jnp.asarray(labels), tags).dtype == jnp.float64


def extreme_labels():
    rng = np.random.default_rng(0)
    yield np.eye(4)[rng.integers(4, size=16)]  # one-hot
    yield np.eye(4)[np.zeros(16, int)]  # background alone
    yield np.eye(4)[np.full(16, 2)]  # one class alone
    yield np.eye(4)[[3] + [0] * 15]  # a single pixel of a class
    yield np.full((16, 4), 0.25)
    yield np.zeros((16, 4))
    yield reference.softmax(20 * rng.normal(size=(16, 4)))  # nearly one-hot
    yield np.eye(4)[[1]]  # one pixel
    yield np.full((1, 4), 0.25)
    yield np.ones((16, 1))  # one class


@every_likelihood
def test_extremes_are_finite_in_value_and_gradient(name):
    some_tags = np.array([[True] * 4, [True] + [False] * 3, [False] * 4, [True, False, True, True]])
    for labels in extreme_labels():
        num_pixels, num_classes = labels.shape
        maps = np.random.default_rng(1).choice([-1e4, 0.0, 1e4], (num_pixels, num_classes - 1))
        vouching = np.eye(num_classes)[np.arange(num_pixels) % num_classes]
        for tags in some_tags[:, :num_classes]:
            value, gradient = log_prob_gradient(name, labels, tags, maps, vouching)
            assert np.isfinite(value) and value <= 1e-5, f"{value} is the logarithm of a probability"
            assert np.isfinite(gradient).all()


@every_likelihood
def test_evidence_for_a_present_class_pulls_towards_it(name):
    """The gradient of a present tag is not negative in its class, that of an absent one not positive."""
    labels, _, maps, vouching = random_case(10)
    tags = jnp.array([True, True, False, False])
    _, gradient = log_prob_gradient(name, labels, tags, np.abs(maps), vouching)
    assert (gradient[:, 1] >= 0).all() and gradient[:, 1].max() > 0
    if name != "evidence":
        assert (gradient[:, 2:] <= 0).all() and gradient[:, 2:].min() < 0


@pytest.mark.slow_except("*-gwrp", "*-evidence")
@every_likelihood
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_promoted(name, dtype):
    labels, tags, maps, vouching = random_case(11, num_pixels=2000)
    labels, maps, vouching = (jnp.asarray(array, dtype) for array in (labels, maps, vouching))
    value = likelihood(name, maps, vouching)(labels, tags)
    jitted = jax.jit(functools.partial(log_prob, name))(labels, tags, maps, vouching)
    labels, maps, vouching = (array.astype(jnp.float32) for array in (labels, maps, vouching))
    expected = log_prob(name, labels, tags, maps, vouching)
    assert value.dtype == jitted.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(jitted, expected, rtol=1e-5)


@every_likelihood
def test_vmap_equals_a_loop(name):
    cases = [random_case(seed) for seed in range(3)]
    labels, tags, maps, vouching = (jnp.stack([jnp.asarray(case[i]) for case in cases]) for i in range(4))

    loop = [log_prob(name, *arrays) for arrays in zip(labels, tags, maps, vouching)]
    mapped = jax.jit(jax.vmap(functools.partial(log_prob, name)))(labels, tags, maps, vouching)
    np.testing.assert_allclose(mapped, jnp.stack(loop), rtol=1e-5)


@every_likelihood
def test_wrong_shapes_are_refused(name):
    labels, tags, maps, vouching = random_case(0)
    function = likelihood(name, maps, vouching)
    with pytest.raises(ValueError, match=r"labels: expected shape \[m, K\], got \[2, 12, 4\]; .*jax.vmap"):
        function(np.stack([labels] * 2), tags)
    with pytest.raises(ValueError, match=r"tags: expected shape \[4\], got \[3\]; one tag per class"):
        function(labels, tags[1:])
    with pytest.raises(ValueError, match="real"):
        function(labels + 0j, tags)


def test_wrong_maps_and_evidence_are_refused():
    labels, tags, maps, vouching = random_case(0)
    with pytest.raises(ValueError, match=r"class_maps: expected shape \[12, 3\], got \[12, 4\]"):
        frozen_classifier(labels, tags, vouching, bias=0.0)
    with pytest.raises(ValueError, match=r"bias: expected shape \[3\], got \[4\]"):
        frozen_classifier(labels, tags, maps, bias=np.zeros(4))
    with pytest.raises(ValueError, match=r"bias: expected shape \[3\], got \[12, 1\]"):
        frozen_classifier(labels, tags, maps, bias=np.zeros((12, 1)))
    for function in (evidence, expected_evidence):
        with pytest.raises(ValueError, match=r"pixel_evidence: expected shape \[12, 4\], got \[12, 3\]"):
            function(labels, tags, maps)
    for function in (expected_max_pool, functools.partial(expected_evidence, pixel_evidence=vouching)):
        with pytest.raises(ValueError, match=r"tags: expected shape \[4\], got \[3\]"):
            function(labels, tags[1:])
    options = {"background_level": 0.2}
    with pytest.raises(ValueError, match=r"class_maps: expected shape \[m, K - 1\], got \[3, 4, 3\]"):
        class_evidence(maps.reshape(3, 4, 3), maps.max(axis=0), tags, **options)
    with pytest.raises(ValueError, match=r"peaks: expected shape \[3\], got \[12\]"):
        class_evidence(maps, maps.max(axis=1), tags, **options)
    with pytest.raises(ValueError, match=r"tags: expected shape \[4\], got \[3\]"):
        class_evidence(maps, maps.max(axis=0), tags[1:], **options)


@pytest.mark.parametrize(("name", "options"), [
    ("noisy_or", {"rho": 0.0}),
    ("noisy_or", {"rho": 1}),
    ("noisy_or", {"rho": np.float32(1.5)}),
    ("log_mean_exp", {"sharpness": 0.0}),
    ("area", {"beta": -1.0}),
    ("area", {"foreground_share": 1.2}),
    ("area", {"background_share": float("nan")}),
    ("gwrp", {"foreground_decay": 0.0}),
    ("gwrp", {"background_decay": 1.01}),
    ("gwrp", {"reference_cells": 0}),
    ("frozen_classifier", {"scale": -1.0}),
])
def test_numbers_out_of_range_are_refused(name, options):
    labels, tags, maps, vouching = random_case(0)
    [argument] = options
    with jax.disable_jit(), pytest.raises(ValueError, match=rf"{argument}: expected a .* got .*; "):
        likelihood(name, maps, vouching, **options)(labels, tags)


@pytest.mark.parametrize("options", [
    {"background_level": 0.0}, {"background_level": 1.5}, {"sharpness": 0.0}, {"floor": 0.0}, {"floor": 2.0},
])
def test_numbers_of_class_evidence_out_of_range_are_refused(options):
    _, tags, maps, _ = random_case(0)
    [argument] = options
    with pytest.raises(ValueError, match=rf"{argument}: expected a .* got .*; "):
        class_evidence(maps, maps.max(axis=0), tags, **{"background_level": 0.2, **options})


@pytest.mark.parametrize("flip", [0, -0.1, 0.5, 1.0, float("nan"), np.float32(0.7)])
@pytest.mark.parametrize("function", [max_pool, expected_max_pool])
def test_flip_probabilities_out_of_range_are_refused(function, flip):
    labels, tags, _, _ = random_case(0)
    with jax.disable_jit(), pytest.raises(ValueError, match=r"flip_probability: expected a number in \(0, 0.5\), got "):
        function(labels, tags, flip_probability=flip)


def test_options_may_be_traced():
    labels, tags, _, _ = random_case(0)
    for function in (max_pool, expected_max_pool):
        traced = jax.jit(lambda flip, function=function: function(labels, tags, flip_probability=flip))(0.2)
        np.testing.assert_allclose(traced, function(labels, tags, flip_probability=0.2), rtol=1e-6)
    value = jax.jit(lambda rho: noisy_or(labels, tags, rho=rho))(0.3)
    np.testing.assert_allclose(value, noisy_or(labels, tags, rho=0.3), rtol=1e-6)
    assert jax.grad(lambda beta: area(labels, tags, beta=beta))(12.0) != 0
