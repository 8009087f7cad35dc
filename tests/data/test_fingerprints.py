"""What caches know a source by: what its photographs and masks hold, wherever they lie."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data.example import PartOfSource, about
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.voc import VocSource


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8))


def photographs(root):
    root.mkdir()
    for number, name in enumerate("abcd"):
        picture(number).save(root / f"{name}.png")
    (root / "tags.csv").write_text("image,tags\na.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n")
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    (root / "masks").mkdir()
    Image.fromarray(np.ones((9, 8), np.uint8)).save(root / "masks" / "a.png")
    return root


def devkit(root):
    for part in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass"):
        (root / part).mkdir(parents=True)
    for number, name in enumerate("abcd"):
        picture(number).save(root / "JPEGImages" / f"{name}.png")
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    (root / "tags.csv").write_text("image,tags\na,cat\nb,dog\nc,cat\nd,dog\n")
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("b\nc\nd\n")
    return root


@pytest.mark.parametrize(("make", "opened"), [
    (photographs, lambda root: FolderSource(root, "train")), (devkit, lambda root: VocSource(root, "train")),
], ids=["folder", "voc"])  # fmt: skip
def test_a_moved_and_touched_folder_is_the_same_and_a_changed_photograph_is_not(tmp_path, make, opened):
    root = make(tmp_path / "photographs")
    before = opened(root).fingerprint
    root = shutil.move(root, tmp_path / "elsewhere")
    for path in root.rglob("*.png"):
        os.utime(path)
    assert opened(root).fingerprint == before
    picture(9).save(next(path for path in root.rglob("c.png")))
    assert opened(root).fingerprint != before


def test_masks_count_where_they_are_used(tmp_path):
    root = photographs(tmp_path / "photographs")
    before = [FolderSource(root, "val", masks=masks).fingerprint for masks in (False, True)]
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(root / "masks" / "a.png")
    after = [FolderSource(root, "val", masks=masks).fingerprint for masks in (False, True)]
    assert before[0] == after[0] and before[1] != after[1] and before[0] != before[1]


def test_a_source_in_a_few_words(tmp_path):
    source = FolderSource(photographs(tmp_path / "photographs"), "train")
    assert about(source) == f"{tmp_path / 'photographs'}, train, 3 images"
    part = PartOfSource(source, [0, 2])
    assert about(part) == f"{tmp_path / 'photographs'}, train, 2 images"
    assert [path.name for path in part.paths] == ["b.png", "d.png"]
