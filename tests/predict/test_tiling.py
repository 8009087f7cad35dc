"""Large pictures in tiles: which tiles there are, that they blend, and that little memory is needed."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lcrf_jax.predict import tiling
from lcrf_jax.predict.resizing import labels_and_confidence
from lcrf_jax.predict.segmenter import Segmentation, Segmenter, segment


def colour_segmenter(num_classes=3, sharpness=8.0):
    """Each cell of four pixels is told by its colour alone: channel k is class k."""

    def log_probs_of(images):
        cells = images.reshape(len(images), 8, images.shape[1] // 8, 8, images.shape[2] // 8, 3).mean(axis=(2, 4))
        scores = sharpness * jnp.asarray(cells, jnp.float32) / 255
        return scores - jnp.log(jnp.exp(scores).sum(axis=-1, keepdims=True))

    def enlarge(log_probs, rows, columns):
        return jnp.einsum("Hh,hwk,Ww->HWk", rows, log_probs, columns)

    def refine(log_probs, image, valid, capacity=None):
        return jnp.where(jnp.arange(num_classes) == 2, 0.0, -30.0) + 0 * log_probs

    return Segmenter(("background", "a", "b"), (32,), lambda images: images, log_probs_of, enlarge, refine)


@pytest.mark.parametrize("length, tile, overlap, expected", [
    (100, 100, 0.25, [0]), (30, 100, 0.25, [0]), (101, 100, 0.25, [0, 1]), (175, 100, 0.25, [0, 75]), (176, 100, 0.25, [0, 38, 76]),
    (300, 100, 0.0, [0, 100, 200]),
])  # fmt: skip
def test_where_tiles_begin(length, tile, overlap, expected):
    starts = tiling.tile_starts(length, tile, overlap)
    assert starts == expected
    covered = {pixel for start in starts for pixel in range(start, start + tile)}
    assert covered >= set(range(length)) and starts[-1] + tile == max(length, tile)
    assert all(b - a <= tile * (1 - overlap) for a, b in itertools.pairwise(starts))


def quarters(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 255
    image[height // 2 :, : width // 2, 1] = 255
    image[:, width // 2 :, 2] = 255
    return image


@pytest.mark.slow_except("size2")
@pytest.mark.parametrize("size", [(256, 256), (240, 400), (40, 300), (300, 40)])
def test_tiles_see_what_is_in_them(size):
    image = quarters(*size)
    labels, confidence = tiling.segment_in_tiles(colour_segmenter(), image, tile=64, crf=False)
    assert labels.shape == confidence.shape == size and labels.dtype == np.uint8
    assert (labels == image.argmax(axis=-1)).mean() > 0.95
    inner = labels[size[0] // 8, size[1] // 8], labels[-size[0] // 8, size[1] // 8], labels[size[0] // 8, -size[1] // 8]
    assert inner == (0, 1, 2)
    assert 1 / 3 < confidence.min() and confidence.max() <= 1
    np.testing.assert_allclose(confidence[size[0] // 8, -size[1] // 8], 1 / (1 + 2 * np.exp(-8)), atol=1e-3)
    refined, _ = tiling.segment_in_tiles(colour_segmenter(), image, tile=64, crf=True)
    assert (refined == 2).all()
    restricted, _ = tiling.segment_in_tiles(colour_segmenter(), image, tile=64, crf=False, tags=np.array([True, True, False]))
    assert set(np.unique(restricted)) == {0, 1}


def test_one_tile_is_the_image_itself():
    image = quarters(60, 90)
    labels, confidence = tiling.segment_in_tiles(colour_segmenter(), image, tile=90, crf=False)
    result = segment(colour_segmenter(), image, crf=False)
    expected = labels_and_confidence(result.log_probs, result.size)
    np.testing.assert_array_equal(labels, expected[0])
    np.testing.assert_allclose(confidence, expected[1], atol=1e-3)


def test_what_overlaps_is_averaged(monkeypatch):
    """Two tiles that disagree: the probability runs from one to the other over the overlap."""
    class_of = iter((0, 1))

    def one_class(segmenter, tiles, **_):
        results = []
        for tile in tiles:
            log_probs = np.full((*tile.shape[:2], 2), np.log(0.1), np.float32)
            log_probs[..., next(class_of)] = np.log(0.9)
            results.append(Segmentation(tile.shape[:2], log_probs, None))
        return results

    monkeypatch.setattr(tiling, "segment_batch", one_class)
    segmenter = colour_segmenter()._replace(class_names=("background", "a"))
    labels, confidence = tiling.segment_in_tiles(segmenter, np.zeros((16, 28, 3), np.uint8), tile=16, crf=False)
    assert (labels[:, :14] == 0).all() and (labels[:, 14:] == 1).all()
    np.testing.assert_allclose(confidence[0, :12], 0.9, atol=1e-3)
    # Weights at distance d + 1/2 from the border of a tile rise over 4 pixels: 7/8 : 1/8, then 5/8 : 3/8.
    np.testing.assert_allclose(confidence[0, 12:14], [0.9 * 7 / 8 + 0.1 / 8, 0.9 * 5 / 8 + 0.1 * 3 / 8], atol=1e-3)


def test_wrong_tiles_are_refused():
    for options in ({"tile": 8}, {"tile": 64, "overlap": 0.95}):
        with pytest.raises(ValueError, match="at least 16 pixels and an overlap"):
            tiling.segment_in_tiles(colour_segmenter(), quarters(64, 64), crf=False, **options)
