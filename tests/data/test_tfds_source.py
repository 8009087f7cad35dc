"""Data sets of TensorFlow Datasets, on small ones in the true format, without TensorFlow."""

import io
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lcrf_jax.data.example import Source
from lcrf_jax.data.opening import open_source
from lcrf_jax.machine.errors import SettingError

NUM = {"train": 5, "test": 3}


class Pets(tfds.core.GeneratorBasedBuilder):
    """The features of oxford_iiit_pet, and labels in lists and objects."""

    VERSION = tfds.core.Version("1.2.0")
    name = "pets"

    def _info(self):
        features = tfds.features
        return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict({
            "image": features.Image(), "label": features.ClassLabel(names=["siamese", "beagle", "pug"]),
            "species": features.ClassLabel(names=["Cat", "Dog"]), "file_name": features.Text(),
            "labels": features.Sequence(features.ClassLabel(names=["background", "x", "y"])),
            "objects": features.Sequence({"label": features.ClassLabel(names=["u", "v"]), "bbox": features.BBoxFeature()}),
            "segmentation_mask": features.Image(shape=(None, None, 1)), "indices": features.Image(shape=(None, None, 1)),
        }))  # fmt: skip

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(count) for split, count in NUM.items()}

    def _generate_examples(self, count):
        for i in range(count):
            content = io.BytesIO()
            Image.fromarray(np.full((6 + i, 8, 3), 10 * i, np.uint8)).save(content, "PNG")
            trimap = np.repeat(np.arange(8, dtype=np.uint8)[None] % 3 + 1, 6 + i, axis=0)
            box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
            yield i, {
                "image": content.getvalue(), "label": i % 3, "species": i % 2, "file_name": f"im{i}.jpg",
                "labels": [1, 2][: i % 3], "objects": [{"label": i % 2, "bbox": box}] * (i % 3),
                "segmentation_mask": Image.fromarray(trimap), "indices": Image.fromarray(np.where(trimap == 3, 255, trimap).astype(np.uint8)),
            }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Pets(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def opened(root, split="train", **options):
    return open_source("tfds", split, root=root, **{"name": "pets", **options})


def test_images_names_and_tags(root):
    source = opened(root, labels="species")
    assert isinstance(source, Source) and len(source) == 5 and source.class_names == ("background", "Cat", "Dog")
    assert sorted(source.names) == [f"im{i}.jpg" for i in range(5)] and source.tags.shape == (5, 3)
    for index, name in enumerate(source.names):
        example, number = source[index], int(name[2])
        assert example.name == name and example.mask is None
        np.testing.assert_array_equal(example.image, np.full((6 + number, 8, 3), 10 * number))
        assert example.tags.tolist() == [True, number % 2 == 0, number % 2 == 1] == source.tags[index].tolist()
    assert "tensorflow" not in sys.modules
    with pytest.raises(IndexError, match="outside the 5 examples of pets"):
        source[5]


def test_lists_of_labels_and_labels_of_objects(root):
    several = opened(root, labels="labels")
    assert several.class_names == ("background", "x", "y")
    by_name = dict(zip(several.names, several.tags[:, 1:].tolist(), strict=True))
    assert [by_name[f"im{i}.jpg"] for i in range(3)] == [[False, False], [True, False], [True, True]]
    objects = opened(root, "test", labels="objects/label")
    by_name = dict(zip(objects.names, objects.tags[:, 1:].tolist(), strict=True))
    assert by_name == {"im0.jpg": [False, False], "im1.jpg": [False, True], "im2.jpg": [True, False]}


def test_masks_of_indices_and_trimaps(root):
    pets = opened(root, labels="species", masks=True, mask_meaning="trimap")
    for index, name in enumerate(pets.names):
        label = 1 + int(name[2]) % 2
        expected = np.array([label, 0, 255] * 3)[:8]
        np.testing.assert_array_equal(pets[index].mask, np.repeat(expected[None], 6 + int(name[2]), axis=0))
    indices = opened(root, labels="species", masks=True, mask="indices")
    assert set(np.unique(indices[0].mask)) == {1, 2, 255} and indices[0].mask.dtype == np.uint8
    with pytest.raises(ValueError, match=r"labels up to 3 in the mask; expected below 3, .*trimap"):
        opened(root, labels="species", masks=True)[0]
    with pytest.raises(ValueError, match="expected a mask of 1, 2, 3 and one label"):
        opened(root, labels="species", masks=True, mask="indices", mask_meaning="trimap")[0]


def test_parts_of_splits_and_fingerprints(root):
    whole, part = opened(root), opened(root, "train[:60%]")
    assert len(part) == 3 and set(part.names) < set(whole.names)
    assert whole.fingerprint != part.fingerprint and whole.fingerprint == opened(root).fingerprint


@pytest.mark.parametrize("options, error, message", [
    ({"name": "dogs"}, FileNotFoundError, r"dogs holds no prepared data set; prepare it once: tfds build dogs"),
    ({"name": ""}, ValueError, "needs options.name"),
    ({"split": "val"}, FileNotFoundError, r"has no split 'val' .*: there are (train, test|test, train)"),
    ({"labels": "breed"}, ValueError, r"has no feature 'breed': there are .*label.*; choose with image="),
    ({"labels": "objects/name"}, ValueError, r"has no feature 'objects/name': there are bbox, label"),
    ({"labels": "file_name"}, ValueError, "the feature 'file_name' is no class label"),
    ({"image": "label"}, ValueError, "the feature 'label' is no image"),
    ({"masks": True, "mask": "masks"}, ValueError, "has no feature 'masks'"),
    ({"mask_meaning": "colour"}, ValueError, "mask_meaning: expected one of index, trimap"),
])  # fmt: skip
def test_what_is_refused(root, options, error, message):
    with pytest.raises(error, match=message):
        opened(root, **options)


def test_parts_with_a_step_are_of_the_names_and_others_are_those_of_tensorflow_datasets(root):
    whole, part, own = (opened(root, split) for split in ("train", "train[0::2]", "train[:2]"))
    assert sorted(part.names) == ["im0.jpg", "im2.jpg", "im4.jpg"] and part.split == "train[0::2]"
    assert [name for name in whole.names if name in part.names] == list(part.names)
    assert own.names == whole.names[:2] and opened(root, "train[:2][0::2]").names == (min(own.names),)
    with pytest.raises(FileNotFoundError, match=r"has no split 'tran' .*did you mean 'train'"):
        opened(root, "tran[0::2]")
    with pytest.raises(SettingError, match=r"expected NAME\[START::STEP\] with whole numbers"):
        opened(root, "train[:80%:2]")
