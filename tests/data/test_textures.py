"""The procedural data: reproducible, told by the emblem, masks that are whole bodies."""

import concurrent.futures

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data.example import Example, Source
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sources import emblems, textures
from lcrf_jax.data.sources.emblems import EMBLEMS
from lcrf_jax.data.sources.textures import TexturesSource

NUM = 60


@pytest.fixture(scope="module")
def examples():
    source = TexturesSource("val", masks=True)
    return [source[i] for i in range(NUM)]


def test_open_source_gives_a_source():
    source = open_source("textures", "train", num_train=7)
    assert isinstance(source, Source)
    assert source.class_names == ("background", *EMBLEMS)
    assert (len(source), source.split) == (7, "train")
    assert len(open_source("textures", "val", num_val=3)) == 3
    assert [len(TexturesSource(split)) >= least for split, least in (("train", 2000), ("val", 500))] == [
        True
    ] * 2


def test_same_arguments_same_bytes_in_any_order_and_thread(examples):
    other = TexturesSource("val", masks=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        again = list(pool.map(other.__getitem__, reversed(range(NUM))))[::-1]
    for first, second in zip(examples, again):
        assert first.name == second.name
        np.testing.assert_array_equal(first.image, second.image)
        np.testing.assert_array_equal(first.tags, second.tags)
        np.testing.assert_array_equal(first.mask, second.mask)


def test_tags_are_made_once_for_all_sources_of_the_same_images(monkeypatch):
    first = TexturesSource("train", seed=77, num_train=3)
    tags = first.tags
    monkeypatch.setattr(textures, "_scene", None)
    tags_again = TexturesSource("train", seed=77, num_train=2, masks=True).tags
    np.testing.assert_array_equal(tags_again, tags[:2])
    tags_again[:] = False
    np.testing.assert_array_equal(first.tags, tags)
    for other in ({"seed": 78}, {"seed": 77, "size": 100}):
        with pytest.raises(TypeError):
            len(TexturesSource("train", num_train=3, **other).tags)


def test_a_known_scene():
    # A change of the images changes every published figure: it must be a decision, not an accident.
    example = TexturesSource("train", masks=True)[3]
    assert [EMBLEMS[k - 1] for k in np.flatnonzero(example.tags) if k] == ["chequer", "dots"]
    counts = np.bincount(example.mask.ravel(), minlength=7)
    np.testing.assert_allclose(counts, [7793, 0, 0, 0, 0, 2897, 1854], atol=10)


def test_splits_and_seeds_do_not_share_images(examples):
    seen = {example.image.tobytes() for example in examples}
    assert len(seen) == NUM
    for source in (TexturesSource("train"), TexturesSource("val", seed=1)):
        assert not seen & {source[i].image.tobytes() for i in range(NUM)}


def test_masks_are_made_only_when_asked_for(examples, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a mask was made")

    monkeypatch.setattr(textures, "_mask", refuse)
    source = TexturesSource("val")
    for i in range(10):
        assert source[i].mask is None
        np.testing.assert_array_equal(source[i].image, examples[i].image)


@pytest.mark.parametrize("size", [96, 128])
def test_shapes_and_types(size):
    example = TexturesSource("train", size=size, masks=True)[0]
    assert isinstance(example, Example)
    assert (example.image.shape, example.image.dtype) == ((size, size, 3), np.uint8)
    assert (example.mask.shape, example.mask.dtype) == ((size, size), np.uint8)
    assert (example.tags.shape, example.tags.dtype) == ((len(EMBLEMS) + 1,), bool)


def test_tags_are_the_classes_of_the_mask_and_large_enough(examples):
    for example in examples:
        present = np.bincount(example.mask.ravel(), minlength=example.tags.size)
        np.testing.assert_array_equal(present > 0, example.tags)
        # 60 % of the smallest body: a disc of 0.33 of the side
        assert present[example.tags].min() > 0.55 * np.pi / 4 * (0.33 * 112) ** 2
    shares = np.mean([example.tags for example in examples], 0)
    assert shares[0] == 1 and (shares[1:] > 0.08).all() and (shares[1:] < 0.6).all()


@pytest.mark.slow
def test_objects_keep_their_emblem_and_most_of_the_body_visible():
    num_objects, num_distractors = [], []
    for index in range(150):
        _image, labels, bodies = textures._scene(np.random.default_rng(index), 112)
        owner = np.full((112, 112), -1)
        for i, body in enumerate(bodies):
            owner[textures._window(body)][body.cover > 0.5] = i
        for i, (label, body) in enumerate(zip(labels, bodies)):
            area = (body.cover > 0.5).sum()
            assert (owner == i).sum() >= 0.6 * area
            assert (body.emblem is not None) == (label > 0)
            if label:
                top, left, drawing = body.emblem
                height, width = drawing.shape
                window = owner[
                    body.top + top : body.top + top + height, body.left + left : body.left + left + width
                ]
                assert (window[drawing > 0.1] == i).all()
                # ink is a part of the square of about 15 to 20 % of the body that it is drawn in
                assert (body.cover[top : top + height, left : left + width][drawing > 0.3] > 0.6).all()
                assert 0.03 < (drawing > 0.5).sum() / area < 0.25
        num_objects.append(sum(label > 0 for label in labels))
        num_distractors.append(sum(label == 0 for label in labels))
    assert set(num_objects) == {1, 2, 3} and set(num_distractors) == {0, 1, 2}


def test_emblems_differ_from_each_other():
    drawings = [emblems._draw_emblem(label, 20.0, 0.0) for label in range(1, len(EMBLEMS) + 1)]
    for i, first in enumerate(drawings):
        for second in drawings[:i]:
            assert np.abs(first - second).mean() > 0.1


def test_bodies_stand_out_by_colour_and_are_uniform(examples):
    contrasts, spreads = [], []
    for example in examples:
        pixels = example.image.astype(np.float64)
        for label in np.unique(example.mask[example.mask > 0]):
            inside = example.mask == label
            median = np.median(pixels[inside], 0)
            outside = np.median(pixels[example.mask == 0], 0)
            contrasts.append(np.linalg.norm(median - outside))
            spreads.append(np.median(np.linalg.norm(pixels[inside] - median, axis=1)))
    assert np.median(contrasts) > 70
    assert np.median(spreads) < 25


def test_image_survives_a_lossless_file(examples, tmp_path):
    Image.fromarray(examples[0].image).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "a.png")), examples[0].image)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"split": "test"}, "train, val"),
        ({"split": "train", "size": 64}, "96 to 128"),
        ({"split": "train", "seed": -1}, "seed"),
        ({"split": "train", "num_train": 0}, "num_train"),
    ],
)
def test_rejections(arguments, message):
    with pytest.raises(ValueError, match=message):
        TexturesSource(**arguments)


def test_index_out_of_range_ends_iteration():
    source = TexturesSource("train", num_train=2)
    with pytest.raises(IndexError, match="2 images of textures/train"):
        source[2]
    assert [example.name for example in source] == ["train_00000", "train_00001"]


def test_unknown_kind_and_wrong_root():
    with pytest.raises(ValueError, match="folder, shards, textures"):
        open_source("texture", "train")
    with pytest.raises(ValueError, match="leave root out"):
        open_source("textures", "train", root="/data")
    with pytest.raises(ValueError, match="needs root"):
        open_source("folder", "train")


@pytest.fixture(scope="module")
def crowds():
    source = TexturesSource("val", size=192, masks=True, scene="crowd")
    return [source[i] for i in range(20)]


def test_a_crowd_has_many_small_objects_and_some_are_cut_by_the_border(crowds):
    objects, touching = [], []
    for example in crowds:
        assert example.image.shape == (192, 192, 3) and example.mask.shape == (192, 192)
        np.testing.assert_array_equal(np.bincount(example.mask.ravel(), minlength=7) > 0, example.tags)
        assert 1 <= example.tags[1:].sum() <= 3
        border = np.concatenate([example.mask[0], example.mask[-1], example.mask[:, 0], example.mask[:, -1]])
        touching.append(border.any())
        objects.append((example.mask > 0).sum())
    assert sum(touching) >= 10
    assert np.median(objects) > 3 * np.pi / 4 * (0.33 * 112) ** 2, "several bodies each"
    again = TexturesSource("val", size=192, masks=True, scene="crowd")[3]
    np.testing.assert_array_equal(again.image, crowds[3].image)
    assert TexturesSource("val", size=192, scene="crowd").fingerprint != TexturesSource("val", size=128).fingerprint


def test_an_object_that_is_cut_through_its_emblem_is_background():
    cut = 0
    for index in range(20):
        _image, labels, bodies = textures._crowd(np.random.default_rng(index), 160)
        for label, body in zip(labels, bodies):
            inside = body.emblem is not None and textures._emblem_within(body, textures._MARGIN, 160)
            assert (label > 0) == inside
            cut += body.emblem is not None and not inside
    assert cut > 3


def test_a_crowd_needs_room():
    with pytest.raises(ValueError, match="160 to 256"):
        TexturesSource("val", size=128, scene="crowd")
    with pytest.raises(ValueError, match="few, crowd, got 'crowds'"):
        TexturesSource("val", scene="crowds")
