"""Cues and saliency of a source: gradients against differences, the median by hand, files of cues and what is wrong with them."""

import functools
import pickle

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled
from records import NETWORK, network_and_variables

from lcrf_jax.baselines import localisation_cues
from lcrf_jax.baselines.saliency import barrier_saliency
from lcrf_jax.data.example import Example
from lcrf_jax.nets.tag_classifier import TagClassifier
from lcrf_jax.train import cues
from lcrf_jax.train.class_maps import ClassMaps

barrier_saliency = compiled(barrier_saliency)

SIZE, GRID, K = 64, 4, 4


class Source:
    """Three images with some, no and every tag."""

    names, fingerprint = ("a", "b", "c"), ("three images",)
    tags = np.array([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)

    def __len__(self):
        return 3

    def __getitem__(self, index):
        image = reference.smooth_image(index, SIZE, SIZE).astype(np.uint8)
        return Example(self.names[index], image, self.tags[index], None)


@functools.cache
def classifier():
    rng = np.random.default_rng(0)
    return TagClassifier(jnp.asarray(rng.normal(size=(96, K - 1)), jnp.float32), jnp.zeros(K - 1))


def gradient_maps(directory, tags=None):
    network, variables = network_and_variables()
    source = Source()
    if tags is not None:
        source.tags = tags
    return cues.gradient_saliency(source, network, variables, classifier(), size=SIZE, grid=GRID, identity={},
                                  directory=directory, batch_size=2)


@pytest.mark.slow
def test_gradient_saliency_is_the_modulus_of_differences(tmp_path):
    """One pixel moved by a little in each colour: the change of the tagged logits, largest over the colours."""
    network, variables = network_and_variables()
    source, found = Source(), gradient_maps(tmp_path)
    assert found.shape == (3, GRID, GRID) and not found[1].any() and (found[[0, 2]] > 0).all()

    def score(image, tags):
        pooled = network.head(variables, network.features(variables, image[None])).mean(axis=(1, 2))[0]
        return float(np.sum((np.asarray(pooled) @ np.asarray(classifier().weights)) * tags[1:]))

    # Cells before the median: one cell by differences in all of its pixels would take hours, so the mean of a sample.
    image, tags = np.float32(source[0].image), source.tags[0]
    rng, moduli = np.random.default_rng(0), []
    for row, column in rng.integers(0, SIZE, (24, 2)):
        slopes = []
        for colour in range(3):
            above, below = image.copy(), image.copy()
            above[row, column, colour] += 4
            below[row, column, colour] -= 4
            slopes.append(abs(score(above, tags) - score(below, tags)) / 8)
        moduli.append(max(slopes))
    assert 0.4 < np.mean(moduli) / found[0].mean() < 2.5


def test_saliency_is_read_back_from_the_cache_and_depends_on_the_tags(tmp_path):
    first = gradient_maps(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(gradient_maps(tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1
    assert not gradient_maps(tmp_path, np.array([[1, 0, 0, 0]] * 3, bool)).any()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_image_saliency_is_that_of_the_squares(tmp_path):
    found = cues.image_saliency(Source(), image_size=SIZE, contrast=8.0, level=1.2, grid=SIZE, directory=tmp_path, batch_size=2)
    assert found.shape == (3, SIZE, SIZE, 1) and found.dtype == np.float16
    for index in range(3):
        expected = barrier_saliency(Source()[index].image, contrast=8.0, level=1.2)
        np.testing.assert_allclose(np.float32(found[index, ..., 0]), expected, atol=1e-3)


def test_the_median_by_hand():
    maps = np.arange(9.0).reshape(1, 3, 3)
    maps[0, 1, 1] = 100
    # The border is repeated: a corner sees itself four times, its two neighbours twice each, and the middle.
    np.testing.assert_array_equal(cues.median_3x3(maps)[0], [[1, 2, 2], [3, 5, 5], [6, 7, 8]])


def test_saliency_ranks_by_hand():
    ranks = cues.saliency_rank(jnp.array([[[3.0, 1.0], [2.0, 10.0]], [[5.0, 5.0], [5.0, 5.0]], [[1.0, 1.0], [4.0, 0.0]]]))
    expected = [[[2 / 3, 0], [1 / 3, 1]], [[0.5, 0.5], [0.5, 0.5]], [[0.5, 0.5], [1, 0]]]
    np.testing.assert_allclose(ranks, expected, atol=1e-6)
    np.testing.assert_array_equal(cues.saliency_rank(jnp.ones((1, 1, 1))), [[[0]]])


def test_cues_of_all_images_are_those_of_each():
    rng = np.random.default_rng(1)
    maps, saliency = rng.normal(size=(3, GRID, GRID, K - 1)).astype(np.float16), rng.random((3, GRID, GRID))
    peaks = np.float32(maps).max(axis=(1, 2))
    found = cues.classifier_cues(ClassMaps(maps, peaks, saliency), Source.tags, saliency, foreground_level=0.4, background_share=0.2)
    assert found.dtype == np.uint8 and found.shape == (3, GRID, GRID)
    for i in range(3):
        expected = localisation_cues(np.float32(maps[i]).reshape(-1, K - 1), peaks[i], Source.tags[i], saliency[i].reshape(-1),
                                     foreground_level=0.4, background_share=0.2)
        np.testing.assert_array_equal(found[i].reshape(-1), expected)
        assert set(found[i].flat) <= {0, 255, *np.flatnonzero(Source.tags[i])}


def write_cues(path, **changes):
    stored = {"ids": np.array(["b", "x", "a"]), "cues": np.full((3, 2, 2), 255, np.uint8)}
    stored["cues"][0, 0], stored["cues"][2] = [1, 2], [[3, 0], [255, 255]]
    np.savez(path, **{**stored, **changes})
    return path


def test_cues_of_a_file_come_in_the_order_of_the_images_and_at_the_size_of_the_grid(tmp_path):
    found = cues.read_cues(write_cues(tmp_path / "cues.npz"), ("a", "b"), K, 4)
    np.testing.assert_array_equal(found[0], np.repeat(np.repeat([[3, 0], [255, 255]], 2, axis=0), 2, axis=1))
    np.testing.assert_array_equal(found[1][:2], [[1, 1, 2, 2]] * 2)
    np.testing.assert_array_equal(cues.read_cues(tmp_path / "cues.npz", ("a",), K, 1), [[[255]]])


@pytest.mark.parametrize(("changes", "message"), [
    ({"ids": np.array(["b", "x"])}, "expected a .npz"),
    ({"cues": np.zeros((3, 2, 2), np.int64)}, "expected a .npz"),
    ({"cues": np.zeros((3, 4), np.uint8)}, "expected a .npz"),
    ({"cues": np.full((3, 2, 2), 9, np.uint8)}, r"expected indices of 4 classes or 255, got \[9\]"),
    ({"ids": np.array(["b", "x", "y"])}, "no cues for 1 of 2 images, the first is 'a'"),
])
def test_a_file_of_cues_that_does_not_fit_is_refused(tmp_path, changes, message):
    path = write_cues(tmp_path / "cues.npz", **changes)
    with pytest.raises(ValueError, match=f"cues.npz: {message}"):
        cues.read_cues(path, ("a", "b"), K, 4)


def test_what_is_no_file_of_cues_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of cues"):
        cues.read_cues(tmp_path / "none.npz", ("a",), K, 4)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(write_cues(tmp_path / "whole.npz").read_bytes()[:100])
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"ids": ["a"]}))
    np.savez(tmp_path / "objects.npz", ids=np.array([{"a": 1}], object), cues=np.zeros((1, 2, 2), np.uint8))
    for name in ("broken", "other", "pickle", "objects"):
        with pytest.raises(ValueError, match=f"{name}.npz: expected a .npz"):
            cues.read_cues(tmp_path / f"{name}.npz", ("a",), K, 4)


def test_the_small_network_is_what_these_tests_assume():
    assert NETWORK["backbone"] == "small" and classifier().weights.shape[0] == 96
