"""Frozen features and class maps: what the cache gives is what the network says of the same view."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lcrf_jax.data.example import Example
from lcrf_jax.data.pipeline import ViewDataset
from lcrf_jax.data.views import apply_view, apply_view_to_mask, sample_view
from lcrf_jax.nets import inputs, tag_classifier
from lcrf_jax.nets.network import backbone_variables, build_network
from lcrf_jax.nets.objectness import objectness
from lcrf_jax.nets.tag_classifier import average_precision
from lcrf_jax.train import class_maps, features

SIZE, NUM_IMAGES, NUM_CLASSES = 64, 5, 4
NETWORK = {"backbone": "small", "last_stride": 16, "taps": ["head", "s16", "s8"], "widths": [12, 10, 8],
           "dropout": 0.0, "num_classes": NUM_CLASSES}
VIEWS = {"seed": 3, "scale_range": (0.3, 0.6), "ratio_range": (0.8, 1.25)}


class Pictures:
    """Smooth pictures of several sizes; the masks are there on request."""

    class_names = ("background", "a", "b", "c")
    split = "train"

    def __init__(self, *, masks=False, seed=0):
        self.masks, self._seed = masks, seed
        self.names = tuple(f"picture {i}" for i in range(NUM_IMAGES))
        self.tags = np.random.default_rng(seed).random((NUM_IMAGES, NUM_CLASSES)) < 0.5
        self.tags[:, 0] = True
        self.fingerprint = ("pictures", masks, seed)
        self.times_read = 0

    def __len__(self):
        return NUM_IMAGES

    def __getitem__(self, index):
        self.times_read += 1
        height, width = 50 + 7 * index, 90 - 5 * index
        image = reference.smooth_image(100 * self._seed + index, height, width).astype(np.uint8)
        mask = np.random.default_rng(index).integers(0, NUM_CLASSES, image.shape[:2]).astype(np.uint8)
        return Example(self.names[index], image, self.tags[index], mask if self.masks else None)


@pytest.fixture
def one_device(monkeypatch):
    """Batches are those of one device: with more of them a batch is as many times as large."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)


@functools.cache
def network_and_variables():
    return build_network(NETWORK), backbone_variables(NETWORK)[0]


@functools.cache
def network_inputs():
    return jax.jit(functools.partial(inputs.network_inputs, *network_and_variables()))


def cached(
    directory, source, *, num_views=3, digest="weights", network=None, size=SIZE, counted=None, **options
):
    views = ViewDataset(source, num_views, size, **{**VIEWS, **options})
    progress = features.no_progress if counted is None else lambda count, earlier=False: counted.append(count)
    network, variables = (network or network_and_variables()[0]), network_and_variables()[1]
    plain = ViewDataset(Pictures(), num_views, size, **{**VIEWS, **options}) if source.masks else views
    return views, features.CachedViews(
        plain, network, variables, digest, directory=directory, batch_size=4, progress=progress,
        masks=views if source.masks else None)


def test_guide_image_is_the_mean_colour_of_each_cell():
    image = reference.smooth_image(0, 16, 24).astype(np.uint8)
    guide = inputs.guide_image(image[None], 8)
    assert guide.shape == (1, 2, 3, 3) and guide.dtype == jnp.float32
    np.testing.assert_allclose(guide[0, 1, 2], image[8:, 16:].reshape(-1, 3).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(inputs.guide_image(image[None], 1)[0], image)


@pytest.mark.parametrize(("size", "stride", "cells"), [(65, 8, 9), (321, 8, 41), (30, 7, 5)])
def test_cells_that_do_not_hold_whole_pixels_cover_the_image_evenly(size, stride, cells):
    """A ramp stays the ramp at the middle of each cell, but for the borders, where there is nothing beyond."""
    ramp = np.broadcast_to(np.arange(size, dtype=np.float32)[:, None, None] + 0.5, (size, size, 3))
    guide = np.asarray(inputs.guide_image(ramp[None], stride))
    assert guide.shape == (1, cells, cells, 3)
    middles = (np.arange(cells) + 0.5) * size / cells
    np.testing.assert_allclose(guide[0, 1:-1, 3, 0], middles[1:-1], rtol=1e-3)
    np.testing.assert_allclose(guide[0, [0, -1], 3, 0], middles[[0, -1]], atol=size / cells / 2)
    np.testing.assert_allclose(guide[0, :, 1], guide[0, :, -2], rtol=1e-5)
    np.testing.assert_allclose(inputs.guide_image(np.full((1, size, size, 3), 77, np.uint8), stride), 77, rtol=1e-5)


@pytest.mark.parametrize("masks", [False, True], ids=["tags only", "masks"])
def test_cached_records_are_those_of_the_network(tmp_path, masks):
    views, records = cached(tmp_path, Pictures(masks=masks))
    assert len(records) == len(views) == 3 * NUM_IMAGES
    shared = {"name", "tags", "index", "view"} | ({"mask"} if masks else set())
    for position in range(len(views)):
        plain, record = views[position], records[position]
        assert {name for name, value in record._asdict().items() if value is not None} == shared | {"features", "guide"}
        for name in shared:
            np.testing.assert_array_equal(getattr(record, name), getattr(plain, name))
        expected, guide = network_inputs()(plain.image[None])
        assert record.guide.dtype == np.uint8
        np.testing.assert_allclose(record.guide, guide[0], atol=0.501)
        for tap in ("s32", "s16", "s8"):
            assert record.features[tap].dtype == np.float16
            np.testing.assert_allclose(record.features[tap], expected[tap][0], rtol=2e-3, atol=1e-3)


def test_the_guide_can_be_finer_than_the_logits(tmp_path):
    _, coarse = cached(tmp_path, Pictures(), num_views=1)
    views = ViewDataset(Pictures(), 1, SIZE, **VIEWS)
    network, variables = network_and_variables()
    fine = features.CachedViews(views, network, variables, "weights", directory=tmp_path, guide_stride=1)
    assert fine[0].guide.shape == (SIZE, SIZE, 3)
    np.testing.assert_array_equal(fine[2].guide, views[2].image)
    assert coarse[0].guide.shape[0] == SIZE // network.stride
    np.testing.assert_array_equal(fine[2].features["s16"], coarse[2].features["s16"])


def test_a_tap_of_all_images_in_one_view(tmp_path):
    _, records = cached(tmp_path, Pictures())
    for view in range(3):
        taps = records.tap("s16", view)
        assert taps.shape == (NUM_IMAGES, 4, 4, 32)
        for index in range(NUM_IMAGES):
            np.testing.assert_array_equal(taps[index], records[view * NUM_IMAGES + index].features["s16"])


def test_the_second_time_neither_images_nor_backbone_are_needed(one_device, tmp_path):
    counted = []
    _, first = cached(tmp_path, Pictures(), counted=counted)
    assert counted == [4, 4, 4, 3]

    def fail(*_):
        raise AssertionError("the backbone ran again")

    source, network = Pictures(), network_and_variables()[0]._replace(features=fail)
    _, again = cached(tmp_path, source, network=network, counted=counted)
    assert len(counted) == 4 and source.times_read == 0
    np.testing.assert_array_equal(first[7].features["s8"], again[7].features["s8"])


def test_methods_with_and_without_masks_share_the_features(tmp_path):
    cached(tmp_path, Pictures())
    counted = []
    _, records = cached(tmp_path, Pictures(masks=True), counted=counted)
    assert not counted and records[0].mask is not None
    _, plain = cached(tmp_path, Pictures(), counted=counted)
    assert not counted and plain[0].mask is None


def test_features_of_an_interrupted_run_are_continued(one_device, tmp_path):
    expected = cached(tmp_path / "whole", Pictures())[1]
    counted, original = [], Pictures.__getitem__

    def broken(self, index):
        if self.times_read == 6:
            raise OSError("the disk is gone")
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pictures, "__getitem__", broken)
        with pytest.raises(OSError, match="gone"):
            cached(tmp_path / "broken", Pictures(), counted=counted)
    assert counted == [4]
    _, found = cached(tmp_path / "broken", Pictures(), counted=counted)
    assert counted[1] == 4 and sum(counted) == 4 + len(found)  # four were there already
    for position in range(len(found)):
        jax.tree.map(np.testing.assert_array_equal, found[position], expected[position])


@pytest.mark.parametrize("change", [
    {"digest": "other weights"}, {"size": 32}, {"num_views": 2}, {"seed": 4}, {"scale_range": (0.3, 0.7)},
    {"ratio_range": (1, 1)}, {"source": Pictures(seed=1)},
    {"network": build_network({**NETWORK, "last_stride": 32})},
    {"network": build_network({**NETWORK, "taps": ["head", "s8"], "widths": [12, 8]})},
], ids=lambda change: next(iter(change)))
def test_what_the_features_depend_on_makes_another_cache(tmp_path, change):
    cached(tmp_path, Pictures())
    counted = []
    source = change.get("source", Pictures())
    rest = {key: value for key, value in change.items() if key != "source"}
    cached(tmp_path, source, counted=counted, **rest)
    assert counted


def test_what_the_features_do_not_depend_on_does_not(tmp_path):
    cached(tmp_path, Pictures())
    counted = []
    network = build_network({**NETWORK, "widths": [4, 4, 4], "dropout": 0.5})
    cached(tmp_path, Pictures(), counted=counted, network=network)
    assert not counted


@pytest.mark.slow
def test_the_bits_do_not_depend_on_the_number_of_devices(tmp_path, monkeypatch):
    """Each device works on batches of the same size by the same program, on the CPU at least to the same bits."""
    network, variables = network_and_variables()

    def made(directory):
        counted = []
        _, records = cached(directory, Pictures(), counted=counted)
        test_time = features.test_time_features(
            Pictures(), network, variables, "weights", size=SIZE, mirror=True, directory=directory, batch_size=2
        )
        return counted, [[records.tap(tap, view) for tap in ("s32", "s8")] + [records.guide(view)] for view in range(3)], test_time

    counted, *spread = made(tmp_path / "spread")
    assert counted == [len(Pictures()) * 3] and jax.local_device_count() == 4
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    counted, *alone = made(tmp_path / "alone")
    assert counted == [4, 4, 4, 3]
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other, strict=True), spread, alone)


def mapped(records, maps, grid, constants=None):
    return class_maps.MappedViews(records, maps=maps, constants=constants or {}, grid=grid, view_options=VIEWS)


def test_maps_are_cut_out_by_the_view_of_the_image(tmp_path):
    """Maps that are the image itself at a quarter of the size have to stay on top of the image."""
    source = Pictures()
    pictures = np.stack([inputs.square_image(source[i].image, 64) for i in range(NUM_IMAGES)])
    maps = inputs.guide_image(pictures, 4) / 255
    views = ViewDataset(source, 5, SIZE, **VIEWS)
    records = mapped(views, {"class_maps": np.asarray(maps, np.float16)}, 16, {"peaks": np.arange(NUM_IMAGES)})
    assert len(records) == len(views)
    for position in range(len(views)):
        record = records[position]
        assert record.peaks == record.index and record.class_maps.dtype == np.float32
        expected = inputs.guide_image(record.image[None], 4)[0] / 255
        # Bilinear sampling of means is not the mean of pixels, but a view off by a cell would miss by more.
        assert np.abs(record.class_maps - expected).mean() < 0.02
        np.testing.assert_array_equal(
            record.class_maps,
            apply_view(np.float32(np.float16(maps[position % NUM_IMAGES])),
                       sample_view(3, position % NUM_IMAGES, position // NUM_IMAGES,
                                   scale_range=(0.3, 0.6), ratio_range=(0.8, 1.25)), (16, 16)))


def test_labels_are_cut_out_by_nearest_neighbour(tmp_path):
    labels = np.random.default_rng(1).choice(np.uint8([0, 3, 255]), (NUM_IMAGES, 8, 8))
    records = mapped(ViewDataset(Pictures(), 5, SIZE, **VIEWS), {"cues": labels}, 8)
    for position in range(len(records)):
        number, index = divmod(position, NUM_IMAGES)
        view = sample_view(3, index, number, scale_range=(0.3, 0.6), ratio_range=(0.8, 1.25))
        found = records[position].cues
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, apply_view_to_mask(labels[index], view, (8, 8)))
    np.testing.assert_array_equal(records[NUM_IMAGES].cues, labels[0][:, ::-1])


def test_the_mirrored_view_has_mirrored_maps(tmp_path):
    maps = np.random.default_rng(0).random((NUM_IMAGES, 8, 8, 3)).astype(np.float16)
    _, records = cached(tmp_path, Pictures())
    whole = mapped(records, {"class_maps": maps}, 8)
    for index in range(NUM_IMAGES):
        np.testing.assert_array_equal(whole[index].class_maps, maps[index])
        np.testing.assert_array_equal(whole[NUM_IMAGES + index].class_maps, maps[index][:, ::-1])


def test_mean_map():
    rng = np.random.default_rng(0)
    plain, mirrored, other = rng.random((3, 2, 4, 4, 3))
    turned_back = (plain + mirrored[:, :, ::-1]) / 2
    np.testing.assert_array_equal(class_maps.mean_map(plain, None, []), plain)
    np.testing.assert_allclose(class_maps.mean_map(plain, mirrored, []), turned_back)
    np.testing.assert_allclose(class_maps.mean_map(plain, None, [other]), (plain + other) / 2)
    mean = class_maps.mean_map(plain, mirrored, [other, plain])
    np.testing.assert_allclose(mean, (turned_back + other + plain) / 3)


def maps_of(directory, source, *, num_views=2, extra_sizes=(96,), grid=8, weights=None, counted=None):
    _, records = cached(directory, source, num_views=num_views)
    weights = some_weights() if weights is None else weights
    progress = features.no_progress if counted is None else lambda count, earlier=False: counted.append(count)
    return class_maps.class_maps(
        source, records, *network_and_variables(), weights, extra_sizes=extra_sizes, grid=grid,
        identity={"source": repr(source.fingerprint), "weights": float(weights[0, 0])}, directory=directory,
        batch_size=2, progress=progress)


def some_weights(seed=0):
    return np.random.default_rng(seed).normal(size=(96, NUM_CLASSES - 1)).astype(np.float32) / 10


def map_by_hand(image, grid):
    """The class maps and the objectness of one square image, through the head of the backbone as the network has it."""
    network, variables = network_and_variables()
    taps = network.features(variables, image[None])
    head = network.head(variables, taps)
    maps = jnp.concatenate([head @ some_weights(), objectness(taps["s32"], head)[..., None]], axis=-1)
    return np.asarray(jax.image.resize(maps, (1, grid, grid, NUM_CLASSES), "linear"))[0]


@pytest.mark.slow
def test_class_maps_are_averaged_over_sizes_and_mirroring(tmp_path):
    source = Pictures()
    result = maps_of(tmp_path, source)
    assert result.maps.shape == (NUM_IMAGES, 8, 8, NUM_CLASSES - 1) and result.maps.dtype == np.float16
    np.testing.assert_array_equal(result.peaks, np.float32(result.maps).max(axis=(1, 2)))
    for index in (0, 4):
        plain, mirrored = (map_by_hand(ViewDataset(source, 2, SIZE)[index + view * NUM_IMAGES].image, 8) for view in (0, 1))
        larger = map_by_hand(inputs.square_image(source[index].image, 96), 8)
        expected = ((plain + mirrored[:, ::-1]) / 2 + larger) / 2
        np.testing.assert_allclose(result.maps[index], expected[..., :-1], atol=3e-3 * np.abs(expected).max())
        np.testing.assert_allclose(result.objectness[index], expected[..., -1], atol=1e-2)


def test_class_maps_of_one_view_and_one_size_are_those_of_the_whole_image(tmp_path):
    source = Pictures()
    result = maps_of(tmp_path, source, num_views=1, extra_sizes=())
    expected = map_by_hand(ViewDataset(source, 1, SIZE)[2].image, 8)
    np.testing.assert_allclose(result.maps[2], expected[..., :-1], atol=3e-3 * np.abs(expected).max())


def test_class_maps_are_kept_by_what_they_depend_on(one_device, tmp_path):
    source, counted = Pictures(), []
    first = maps_of(tmp_path, source, counted=counted)
    assert counted == [2, 2, 1]
    again = maps_of(tmp_path, source, counted=counted)
    assert len(counted) == 3
    np.testing.assert_array_equal(first.maps, again.maps)
    for change in ({"weights": some_weights(1)}, {"grid": 4}, {"extra_sizes": (64, 96)}, {"num_views": 1}):
        before = len(counted)
        maps_of(tmp_path, source, counted=counted, **change)
        assert len(counted) > before, change


@pytest.mark.slow
def test_the_maps_average_to_the_logits_of_the_classifier(tmp_path):
    """Mean over cells and linear classifier commute: the map has the bias left out and nothing else."""
    source = Pictures()
    _, records = cached(tmp_path, source)
    network, variables = network_and_variables()
    s32 = records.tap("s32")
    classifier, scores = class_maps.fitted_classifier(
        network, variables, s32, source.tags, l2=1e-4, identity={}, directory=tmp_path)
    assert scores.shape == (NUM_IMAGES, NUM_CLASSES - 1)
    seen = source.tags[:, 1:].any(axis=0)
    assert seen.any() and np.all(average_precision(scores, source.tags[:, 1:])[seen] == 1)
    from_tap, from_images = class_maps.map_functions(network, variables, classifier.weights, s32.shape[1])
    logits = from_tap(s32)[..., :-1].mean(axis=(1, 2)) + classifier.bias
    np.testing.assert_allclose(logits, scores, rtol=1e-3, atol=1e-3)
    images = np.stack([ViewDataset(source, 1, SIZE)[i].image for i in range(NUM_IMAGES)])
    maps = from_tap(s32)
    np.testing.assert_allclose(from_images(images), maps, atol=1e-2 * np.abs(maps).max())  # float16 taps


def test_the_classifier_is_kept_by_what_it_depends_on(tmp_path, monkeypatch):
    (network, variables), tags = network_and_variables(), Pictures().tags
    s32, fits = np.random.default_rng(0).random((NUM_IMAGES, 3, 3, 48)).astype(np.float16), []

    def counting(*arguments, **options):
        fits.append(options)
        return tag_classifier.fit_tag_classifier(*arguments, **options)

    def fitted(s32=s32, tags=tags, l2=0.1, **identity):
        classifier, scores = class_maps.fitted_classifier(
            network, variables, s32, tags, l2=l2, identity=identity, directory=tmp_path)
        assert all(isinstance(array, np.ndarray) for array in (*classifier, scores))
        return *classifier, scores

    monkeypatch.setattr(class_maps, "fit_tag_classifier", counting)
    first = fitted(weights="a")
    again = fitted(None, weights="a")  # the features are not read
    assert len(fits) == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    for number, change in enumerate(({"weights": "b"}, {"l2": 0.2}, {"tags": ~tags}), 2):
        fitted(**{"weights": "a", **change})
        assert len(fits) == number, change


def test_pooled_head_does_not_depend_on_the_batch():
    network, variables = network_and_variables()
    s32 = np.random.default_rng(0).random((5, 3, 3, 48)).astype(np.float16)
    head = np.maximum(np.float64(s32) @ variables["params"]["head"]["kernel"][0, 0]
                      + variables["params"]["head"]["bias"], 0)
    for batch_size in (2, 5):
        pooled = class_maps.pooled_head(network, variables, s32, batch_size=batch_size)
        assert pooled.dtype == np.float32
        np.testing.assert_allclose(pooled, head.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)


def test_square_image():
    image = reference.smooth_image(0, 37, 91).astype(np.uint8)
    square = inputs.square_image(image, 32)
    assert square.shape == (32, 32, 3) and square.dtype == np.uint8
    assert np.abs(square.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 1
    np.testing.assert_array_equal(inputs.square_image(image[:, :37], 37), image[:, :37])
