"""From images of any size to masks: resizing, padding, mirroring, tags and refinement."""

import concurrent.futures
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image
from small_segmenter import KERNEL, NETWORK, NUM_CLASSES, SETTINGS, parameters, picture, segmenter

from lcrf_jax.crf.inference import refine
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.nets.inputs import square_image
from lcrf_jax.nets.network import build_network
from lcrf_jax.predict import outputs, resizing
from lcrf_jax.predict.segmenter import (
    begin_batch,
    image_workers,
    make_segmenter,
    network_features,
    segment,
    segment_batch,
)


def grid_by_hand(image, size):
    """log q on the network's grid, in float64 from its logits on."""
    network, params = build_network(NETWORK), parameters()
    features = network.features(params["backbone"], square_image(image, size)[None])
    return np.log(reference.softmax(network.logits(params["decoder"], params["backbone"], features)[0]))


def resized(values, height, width):
    """Bilinear with half-pixel centres and the border repeated, pixel by pixel."""
    rows, columns, _ = values.shape
    result = np.zeros((height, width, values.shape[-1]))
    for i, j in np.ndindex(height, width):
        y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
        x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
        top, left = min(int(y), max(rows - 2, 0)), min(int(x), max(columns - 2, 0))
        bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        upper = values[top, left] * (1 - x + left) + values[top, right] * (x - left)
        lower = values[bottom, left] * (1 - x + left) + values[bottom, right] * (x - left)
        result[i, j] = upper * (1 - y + top) + lower * (y - top)
    return result


@pytest.mark.parametrize(("cells", "pixels", "padded"), [
    (4, 16, 16), (4, 37, 64), (1, 5, 8), (5, 1, 1), (5, 1, 64), (8, 8, 8), (24, 7, 7), (3, 91, 128),
])
def test_interpolation_weights(cells, pixels, padded):
    weights = resizing.interpolation_weights(cells, pixels, padded)
    assert weights.shape == (padded, cells) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert weights.min() >= 0 and (weights > 0).sum(axis=1).max() <= 2
    values = np.random.default_rng(0).normal(size=(1, cells, 2))
    np.testing.assert_allclose(weights[:pixels] @ values[0], resized(values, 1, pixels)[0], atol=1e-5)
    np.testing.assert_array_equal(weights[pixels:], np.repeat(weights[pixels - 1:pixels], padded - pixels, axis=0))


def test_a_map_is_enlarged_as_pillow_does_it():
    values = np.random.default_rng(0).random((5, 4, 1)).astype(np.float32)
    expected = Image.fromarray(values[..., 0]).resize((31, 43), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(resizing.resized_map(values, (43, 31))[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 64), (37, 91), (1, 1), (70, 1), (1, 130), (64, 65)])
def test_log_probabilities_at_the_size_of_the_image(size):
    image = picture(0, *size)
    result = segment(segmenter(), image, crf=False)
    assert result.log_probs.shape == (*size, NUM_CLASSES) and result.refined_log_probs is None
    expected = np.log(reference.softmax(resized(grid_by_hand(image, 64), *size)))
    np.testing.assert_allclose(result.log_probs, expected, atol=1e-4)
    assert result.labels.shape == size and result.labels.dtype == np.uint8
    np.testing.assert_array_equal(result.labels, result.log_probs.argmax(axis=-1))
    np.testing.assert_array_equal(result.labels, result.network_labels)


@pytest.mark.slow
def test_the_log_probabilities_of_several_sizes_are_averaged():
    image = picture(1, 30, 40)
    result = segment(segmenter(input_sizes=(64, 96)), image, crf=False)
    each = [np.log(reference.softmax(resized(grid_by_hand(image, size), 30, 40))) for size in (64, 96)]
    np.testing.assert_allclose(result.log_probs, np.log(reference.softmax(sum(each) / 2)), atol=1e-4)
    assert np.abs(each[0] - each[1]).max() > 0.1


@pytest.mark.slow
def test_with_mirroring_the_mirrored_image_has_the_mirrored_result():
    image = picture(2, 64, 64)
    for crf in (False, True):
        straight = segment(segmenter(mirror=True), image, crf=crf)
        turned = segment(segmenter(mirror=True), image[:, ::-1], crf=crf)
        np.testing.assert_allclose(turned.log_probs[:, ::-1], straight.log_probs, atol=1e-4)
    assert (straight.labels == turned.labels[:, ::-1]).mean() > 0.98  # the lattice itself is not symmetric
    single = segment(segmenter(), image, crf=False).log_probs
    other = segment(segmenter(), image[:, ::-1], crf=False).log_probs[:, ::-1]
    np.testing.assert_allclose(straight.log_probs, np.log(reference.softmax((single + other) / 2)), atol=0.02)
    assert np.abs(single - other).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 64), (50, 70), (1, 30)])
def test_refinement_of_a_padded_image_is_that_of_the_image(size):
    image = picture(3, *size)
    result = segment(segmenter(), image, crf=True)
    unary = 0.7 * jnp.asarray(result.log_probs)
    # The size that it is padded to decides the form of the kernel.
    form = "exact" if resizing.padded_to(size[0]) * resizing.padded_to(size[1]) <= 64**2 else "lattice"
    expected = jax.jit(lambda i, u: refine(i, u, KernelParams(**KERNEL), form=form, num_iterations=3))(image, unary)
    assert result.refined_log_probs.shape == (*size, NUM_CLASSES)
    # A lattice of few pixels takes longer paths into account in its self-pairs.
    np.testing.assert_allclose(np.exp(result.refined_log_probs), np.exp(expected), atol=1e-3)
    np.testing.assert_array_equal(result.labels, result.refined_log_probs.argmax(axis=-1))
    np.testing.assert_array_equal(result.network_labels, result.log_probs.argmax(axis=-1))


@pytest.mark.slow
def test_noise_that_needs_many_lattice_vertices_is_refined_all_the_same():
    image = np.random.default_rng(0).integers(0, 256, (128, 64, 3)).astype(np.uint8)
    unary = segment(segmenter(), image, crf=False).log_probs
    assert np.isnan(segmenter().refine(unary, image, np.ones(image.shape[:2], bool))).all()
    result = segment(segmenter(), image, crf=True)
    np.testing.assert_allclose(np.exp(result.refined_log_probs).sum(axis=-1), 1, atol=1e-4)
    assert (result.labels == result.network_labels).mean() > 0.5


def test_a_diverged_network_is_an_error_and_not_a_mask_of_background():
    params = {**parameters(), "decoder": jax.tree.map(lambda leaf: leaf * np.nan, parameters()["decoder"])}
    description = {"network": NETWORK, "class_names": ["background", "a", "b", "c"], "inference": SETTINGS}
    broken = make_segmenter(description, params)
    with pytest.raises(ValueError, match="diverged"):
        segment(broken, picture(0, 20, 20), crf=False)


@pytest.mark.slow
def test_classes_that_are_not_tagged_are_excluded():
    image, tags = picture(4, 40, 60), np.array([True, False, True, False])
    free = segment(segmenter(), image, crf=True)
    given = segment(segmenter(), image, crf=True, tags=tags)
    assert set(np.unique(free.network_labels)) - {0, 2}
    for labels in (given.labels, given.network_labels):
        assert set(np.unique(labels)) <= {0, 2}
    odds = [each.log_probs[..., 0] - each.log_probs[..., 2] for each in (free, given)]
    np.testing.assert_allclose(odds[0], odds[1], atol=5e-3)
    everything = segment(segmenter(), image, crf=False, tags=np.ones(NUM_CLASSES, bool))
    np.testing.assert_allclose(everything.log_probs, free.log_probs, atol=1e-6)
    nothing = segment(segmenter(), image, crf=True, tags=np.eye(NUM_CLASSES, dtype=bool)[0])
    assert not nothing.labels.any()


def test_of_no_images_there_are_no_results():
    assert segment_batch(segmenter(), [], crf=True) == segment_batch(segmenter(), [], crf=False, tags=[], batch_size=4) == []


def test_images_of_a_batch_do_not_touch_each_other():
    images = [picture(5, 40, 60), picture(6, 64, 30), picture(7, 20, 20)]
    tags = [np.array([True, True, False, True]), np.array([True, False, True, True]), np.ones(4, bool)]
    together = segment_batch(segmenter(), images, crf=False, tags=tags)
    padded = segment_batch(segmenter(), images, crf=False, tags=tags, batch_size=5)
    assert len(together) == len(padded) == 3
    for image, present, one, other in zip(images, tags, together, padded, strict=True):
        alone = segment(segmenter(), image, crf=False, tags=present)
        for result in (one, other):
            np.testing.assert_allclose(result.log_probs, alone.log_probs, atol=1e-3)


class Gate:
    """A refinement that waits for a sign, and says how many are in it at once."""

    def __init__(self, seconds=0.0):
        self.open, self.inside, self.most, self.lock, self.seconds = threading.Event(), 0, 0, threading.Lock(), seconds
        self.entered = threading.Semaphore(0)

    def __call__(self, log_probs, image, valid):
        with self.lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.entered.release()
        assert self.open.wait(60)
        time.sleep(self.seconds)
        with self.lock:
            self.inside -= 1
        return -log_probs


def test_the_network_of_the_next_batch_runs_beside_the_refinement_of_this_one():
    gate, images = Gate(), [picture(seed, 40, 60) for seed in range(4)]
    waiting = segmenter()._replace(refine=gate)
    with image_workers() as workers:
        first = begin_batch(waiting, images[:2], workers, crf=True)
        second = begin_batch(waiting, images[2:], workers, crf=True)  # comes back, though nothing is refined
        assert all(gate.entered.acquire(timeout=60) for _ in range(2))  # two images at once
        gate.open.set()
        found = [*first, *second]
    expected = [result for at in (0, 2) for result in segment_batch(segmenter(), images[at : at + 2], crf=False)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.log_probs, other.log_probs)
        np.testing.assert_array_equal(one.refined_log_probs, -other.log_probs)


def test_images_that_fill_the_memory_are_refined_one_at_a_time(monkeypatch):
    monkeypatch.setattr("lcrf_jax.predict.segmenter._LARGE", 40 * 60 - 1)
    gate = Gate(seconds=0.05)
    gate.open.set()
    waiting = segmenter()._replace(refine=gate)
    assert len(segment_batch(waiting, [picture(seed, 40, 60) for seed in range(4)], crf=True)) == 4
    assert gate.most == 1


def test_what_is_wrong_with_an_image_is_told_at_its_turn():
    calls = iter([1.0, np.nan, 1.0])
    spoilt = segmenter()._replace(enlarge=lambda *grid: next(calls) * resizing.enlarged_grid(*grid))
    with concurrent.futures.ThreadPoolExecutor(1) as single:
        results = begin_batch(spoilt, [picture(seed, 40, 60) for seed in range(3)], single, crf=False)
        assert np.isfinite(next(results).log_probs).all()
        with pytest.raises(ValueError, match="training has diverged"):
            next(results)


@pytest.mark.slow
def test_images_refined_at_once_have_the_bits_of_those_refined_alone():
    images = [picture(seed, 70 + seed, 100) for seed in range(6)]
    with image_workers() as workers, concurrent.futures.ThreadPoolExecutor(1) as single:
        found, alone = (list(begin_batch(segmenter(), images, pool, crf=True)) for pool in (workers, single))
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one.refined_log_probs, other.refined_log_probs)


@pytest.mark.parametrize("image", [
    np.zeros((4, 5), np.uint8), np.zeros((4, 5, 1), np.uint8), np.zeros((4, 5, 4), np.uint8),
    np.zeros((4, 5, 3), np.float32), np.zeros((1, 4, 5, 3), np.uint8),
], ids=["grey", "one channel", "RGBA", "float", "batch"])
def test_other_images_are_refused(image):
    with pytest.raises(ValueError, match=r"expected an RGB image \[H, W, 3\] uint8, got .*convert it first"):
        segment(segmenter(), image, crf=False)


@pytest.mark.slow
def test_read_only_and_non_contiguous_images_are_fine():
    image = picture(8, 40, 60)
    view = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    view.flags.writeable = False
    expected = segment(segmenter(), image, crf=True)
    result = segment(segmenter(), view, crf=True)
    np.testing.assert_array_equal(result.refined_log_probs, expected.refined_log_probs)


def test_the_classifier_comes_back_from_the_parameters():
    classifier = outputs.restored_classifier({"classifier": {"weights": np.ones((3, 2)), "bias": np.zeros(2)}})
    assert classifier.weights.shape == (3, 2) and classifier.bias.shape == (2,)


def segmenter_with(output, options, params, mirror):
    settings = {**SETTINGS, "mirror": mirror, "output": output, "output_options": options}
    description = {"network": NETWORK, "class_names": ["background", "a", "b", "c"], "inference": settings}
    return make_segmenter(description, params)


@pytest.mark.parametrize("mirror", [False, True])
def test_the_image_level_prior_at_test_time(mirror):
    """Of each view alone, then averaged over mirroring as any other output."""
    image = picture(3, 64, 64)
    found = segmenter_with("ilp", {"sharpness": 3.0}, parameters(), mirror).network_log_probs(image[None])[0]
    views = []
    for view in (image, image[:, ::-1])[: 1 + mirror]:
        network, params = build_network(NETWORK), parameters()
        logits = np.float64(network.logits(params["decoder"], params["backbone"], network.features(params["backbone"], view[None]))[0])
        scores = np.log(np.mean(np.exp(3 * logits), axis=(0, 1))) / 3
        views.append(np.log(reference.softmax(logits + np.log(reference.softmax(scores)))))
    expected = views[0] if not mirror else np.log(reference.softmax((views[0] + views[1][:, ::-1]) / 2))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("mirror", [False, True])
def test_the_classifier_says_which_classes_are_likely(mirror):
    """It moves the foreground classes against each other; the likeliest keeps its odds against the background."""
    rng, image = np.random.default_rng(4), picture(3, 64, 64)
    classifier = {"weights": rng.normal(size=(96, 3)).astype(np.float32), "bias": np.float32([0.1, -2, 0.3])}
    params, settings = {**parameters(), "classifier": classifier}, {**SETTINGS, "mirror": mirror}
    description = {"network": NETWORK, "class_names": ["background", "a", "b", "c"], "inference": settings}
    plain = np.asarray(make_segmenter(description, params).network_log_probs(image[None]))[0]
    weighted = {**description, "inference": {**settings, "prior_weight": 0.7}}
    found = np.asarray(make_segmenter(weighted, params).network_log_probs(image[None]))[0]
    network = build_network(NETWORK)
    pooled = [np.float64(network.head(params["backbone"], network.features(params["backbone"], view[None]))).mean(axis=(0, 1, 2))
              for view in (image, image[:, ::-1])[: 1 + mirror]]  # fmt: skip
    log_probs = [-np.log1p(np.exp(-(mean @ classifier["weights"] + classifier["bias"]))) for mean in pooled]
    prior = np.concatenate([[0], 0.7 * np.mean([values - values.max() for values in log_probs], axis=0)])
    np.testing.assert_allclose(found, np.log(reference.softmax(plain + prior)), atol=1e-4)
    assert np.abs(found - plain).max() > 0.1
    maps = {"output": "class_maps", "output_options": {"background_level": 0.3}}
    one, other = (make_segmenter({**description, "inference": {**settings, **maps, "prior_weight": weight}}, params) for weight in (0.0, 0.7))
    np.testing.assert_array_equal(one.network_log_probs(image[None]), other.network_log_probs(image[None]))


@pytest.mark.parametrize("mirror", [False, True])
def test_offsets_are_added_to_the_log_probabilities_of_the_classes(mirror):
    image, settings, offsets = picture(3, 64, 64), {**SETTINGS, "mirror": mirror}, [0.0, 1.5, 0.25, 0.0]
    description = {"network": NETWORK, "class_names": ["background", "a", "b", "c"], "inference": settings}
    plain = np.float64(make_segmenter(description, parameters()).network_log_probs(image[None]))
    with_offsets = {**description, "inference": {**settings, "class_offsets": offsets}}
    found = make_segmenter(with_offsets, parameters()).network_log_probs(image[None])
    np.testing.assert_allclose(found, np.log(reference.softmax(plain + offsets)), atol=1e-5)


@pytest.mark.slow
def test_class_maps_as_the_output():
    """The labels are those of the thresholded maps of the classes that the classifier finds; no decoder is needed."""
    rng = np.random.default_rng(4)
    classifier = {"weights": rng.normal(size=(96, 3)).astype(np.float32), "bias": np.float32([0.1, -50, 0.3])}
    params = {"backbone": parameters()["backbone"], "classifier": classifier}
    options = {"background_level": 0.3, "sharpness": 2.0, "floor": 0.01}
    images = np.stack([picture(seed, 64, 64) for seed in (5, 6)])
    found = np.asarray(segmenter_with("class_maps", options, params, mirror=True).network_log_probs(images))
    network = build_network(NETWORK)

    def maps_of(views):
        features = network.features(params["backbone"], views)
        return np.float64(network.head(params["backbone"], features)) @ classifier["weights"]

    maps = (maps_of(images) + maps_of(images[:, :, ::-1])[:, :, ::-1]) / 2
    present = maps.mean(axis=(1, 2)) + classifier["bias"] >= 0
    assert not present[:, 1].any() and present.any()
    ratio = np.where(present[:, None, None], maps / maps.max(axis=(1, 2), keepdims=True), 0)
    ratio = np.where(maps.max(axis=(1, 2), keepdims=True) > 0, ratio, 0)
    expected = np.concatenate([np.full((*maps.shape[:3], 1), 0.3), ratio], axis=-1).argmax(axis=-1)
    np.testing.assert_array_equal(found.argmax(axis=-1), expected)


def test_features_that_are_known_take_the_place_of_the_network():
    images = [picture(seed, 50, 70) for seed in (1, 2)]
    known = network_features(segmenter(mirror=True), images, batch_size=3)
    assert len(known) == 1 and all(len(taps) == 6 for taps in known[0].values())
    expected = segment_batch(segmenter(mirror=True), images, crf=False, batch_size=3)
    found = segment_batch(segmenter(mirror=True), images, crf=False, batch_size=3, features=known)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one.log_probs, other.log_probs)
    swapped = segment_batch(segmenter(mirror=True), images[::-1], crf=False, batch_size=3, features=known)
    np.testing.assert_array_equal(swapped[0].log_probs, expected[0].log_probs)


def test_superpixels_are_regions_of_one_colour():
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, 25:], image[10:20, 5:15] = 120, 250
    segments = outputs.superpixels(image)
    assert segments.shape == (40, 60) and segments.min() == 0
    assert len({segments[0, 0], segments[15, 10], segments[20, 50]}) == 3
    assert len(np.unique(segments[:, 30:])) == 1


@pytest.mark.slow
def test_large_images_are_worked_on_at_a_smaller_size():
    image = picture(9, 90, 200)
    small = segmenter()._replace(max_side=100)
    result = segment(small, image, crf=True)
    assert result.size == (90, 200) and result.log_probs.shape == (45, 100, NUM_CLASSES)
    shrunk = np.asarray(Image.fromarray(image).resize((100, 45), Image.Resampling.BICUBIC, reducing_gap=3.0))
    assert result.refined_log_probs.shape == result.log_probs.shape
    padded, valid = np.pad(shrunk, ((0, 19), (0, 28), (0, 0)), mode="edge"), np.pad(np.ones((45, 100), bool), ((0, 19), (0, 28)))
    unary = np.pad(result.log_probs, ((0, 19), (0, 28), (0, 0)), mode="edge")
    expected = small.refine(unary, padded, valid)[:45, :100]
    np.testing.assert_allclose(np.exp(result.refined_log_probs), np.exp(expected), atol=2e-3)
    assert result.labels.shape == result.network_labels.shape == (90, 200)
    np.testing.assert_array_equal(result.labels, resized(result.refined_log_probs, 90, 200).argmax(axis=-1))


@pytest.mark.parametrize("size", [(5, 7), (11, 3), (40, 60)])
def test_labels_and_confidence_at_another_size(size, monkeypatch):
    monkeypatch.setattr(resizing, "_STRIP_PIXELS", 200)  # several strips
    log_probs = np.log(reference.softmax(np.random.default_rng(0).normal(size=(5, 7, 3)) * 2)).astype(np.float32)
    labels, confidence = resizing.labels_and_confidence(log_probs, size)
    probs = reference.softmax(resized(log_probs, *size))
    np.testing.assert_array_equal(labels, probs.argmax(axis=-1))
    np.testing.assert_allclose(confidence, probs.max(axis=-1), atol=1e-3)
    assert labels.dtype == np.uint8 and confidence.dtype == np.float16
    np.testing.assert_array_equal(resizing.labels_of(log_probs, size), labels)
    assert resizing.labels_of(log_probs, size).dtype == np.uint8
    np.testing.assert_allclose(resizing.interpolated_probs(log_probs, size), probs, atol=1e-5)


def test_area_and_confidence_of_each_class(monkeypatch):
    monkeypatch.setattr(resizing, "_STRIP_PIXELS", 30)  # several strips
    rng = np.random.default_rng(0)
    labels, confidence = rng.integers(0, 3, (17, 11), np.uint8), rng.random((17, 11)).astype(np.float16)
    counts, sums = resizing.class_statistics(labels, confidence, 5)
    assert counts.tolist() == [int((labels == k).sum()) for k in range(5)]
    np.testing.assert_allclose(sums, [np.float64(confidence)[labels == k].sum() for k in range(5)])


@pytest.mark.parametrize(("side", "step", "expected"), [(428, 32, 416), (389, 14, 392), (5, 14, 42), (5, 32, 32), (5, 16, 32), (340, 1, 352)])
def test_scales_give_sides_that_the_network_takes(side, step, expected):
    assert resizing.nearest_side(side, step) == expected
