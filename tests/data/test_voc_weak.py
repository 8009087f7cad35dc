"""VOC 2012 with SBD as a data set, from a small development kit in the true layout; TensorFlow stays out."""

import hashlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
from devkits import SIZES, annotation, write_devkit
from PIL import Image
from programs import run
from scipy.io import savemat

from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sources import devkit as devkit_module
from lcrf_jax.data.sources.devkit import (
    CLASSES,
    LISTS,
    Devkit,
    KnownList,
    archive_problem,
    box_tags,
    list_problem,
    sbd_mask,
)
from lcrf_jax.data.sources.voc_weak import prepared

NUM = {"train": 4, "train_aug": 8, "val": 3, "test": 2}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return write_devkit(tmp_path_factory.mktemp("kit"))


@pytest.fixture
def own_kit(tmp_path):
    """One that a test may spoil."""
    return write_devkit(tmp_path)


@pytest.fixture(scope="module")
def data_sets(kit, tmp_path_factory):
    """Both, by the program."""
    folder = tmp_path_factory.mktemp("tfds")
    for tags in ("boxes", "masks"):
        ended = run("build_voc", f"--devkit={kit}", f"--data_dir={folder}", f"--tags={tags}", "--any_lists")
        assert ended.code == 0, ended.err
    return folder


def opened(folder, split, tags="boxes", **options):
    return open_source("tfds", split, root=folder, name=f"voc_weak/{tags}", labels="labels", masks=True, **options)


def test_splits_images_masks_and_tags(kit, data_sets):
    for split, count in NUM.items():
        source, ids = opened(data_sets, split), Devkit(kit).ids(split)
        assert source.class_names == CLASSES and len(CLASSES) == 21
        assert len(source) == count and sorted(source.names) == sorted(ids)
        for index, name in enumerate(source.names):
            example = source[index]
            photograph = np.asarray(Image.open(kit / "VOC2012" / "JPEGImages" / f"{name}.jpg"))
            np.testing.assert_array_equal(example.image, photograph)
            if split == "test":
                assert (example.mask == 255).all() and example.tags.tolist() == [True] + [False] * 20
                continue
            truth = np.asarray(Image.open(kit / "VOC2012" / "SegmentationClassAug" / f"{name}.png"))
            np.testing.assert_array_equal(example.mask, truth)
            assert 255 in truth and set(np.flatnonzero(example.tags)) == set(np.unique(truth)) - {255} | {0}
    assert "tensorflow" not in sys.modules


def test_the_photographs_are_the_bytes_of_their_files(kit, data_sets):
    source = opened(data_sets, "val")
    stored = {record["file_name"].decode(): record["image"] for record in (source._records[i] for i in range(len(source)))}
    for name, content in stored.items():
        assert content == (kit / "VOC2012" / "JPEGImages" / f"{name}.jpg").read_bytes()
        assert Image.open(io.BytesIO(content)).format == "JPEG"


def test_tags_from_boxes_and_tags_from_masks_are_two_data_sets(own_kit, tmp_path):
    """A box of an object that the mask does not show is a tag of the one and not of the other."""
    name = Devkit(own_kit).ids("val")[0]
    path = own_kit / "VOC2012" / "Annotations" / f"{name}.xml"
    objects = [("sheep", 1, 1, 5, 5), ("person", 2, 2, 9, 9), ("sheep", 3, 3, 8, 8)]
    path.write_text(annotation(name, (60, 80), objects))
    assert box_tags(path) == ("person", "sheep")
    found = {}
    for tags in ("boxes", "masks"):
        info = prepared(own_kit, tmp_path / "tfds", tags_from=tags, any_lists=True)
        assert info.metadata["tags_from"] == tags and info.metadata["lists"] == "as given"
        source = opened(tmp_path / "tfds", "val", tags)
        found[tags] = {CLASSES[at] for at in np.flatnonzero(source.tags[source.names.index(name)])} - {"background"}
    assert found["boxes"] == {"person", "sheep"} and "sheep" not in found["masks"] and found["masks"]
    stored = json.loads((tmp_path / "tfds" / "voc_weak" / "masks" / "1.0.0" / "metadata.json").read_text())
    assert stored == {"tags_from": "masks", "lists": "as given"}


def test_what_the_program_prints(kit, data_sets):
    again = run("build_voc", f"--devkit={kit.parent}", f"--data_dir={data_sets}", "--any_lists")
    assert again.code == 0
    for line in ("train          4 images", "train_aug      8 images", "lists as given; tags from boxes"):
        assert line in again.out
    assert again.last_line.startswith("voc_weak/boxes/1.0.0 in ")


def test_without_its_list_train_aug_is_all_masks_but_those_of_val(tmp_path):
    devkit = Devkit(write_devkit(tmp_path, lists=False))
    expected = set(devkit.ids("train")) | {path.stem for path in (devkit.root / "Annotations").glob("*_001*.xml")}
    assert set(devkit.ids("train_aug")) == expected and len(expected) == SIZES["train"] + SIZES["aug"]


def sbd_of(kit, folder):
    """The masks of train_aug as SBD has them: MATLAB files, without void; of images that VOC has masks of, other ones."""
    cls = folder / "benchmark_RELEASE" / "dataset" / "cls"
    cls.mkdir(parents=True)
    for path in sorted((kit / "VOC2012" / "SegmentationClassAug").glob("*.png")):
        mask = np.asarray(Image.open(path))
        of_voc = (kit / "VOC2012" / "SegmentationClass" / path.name).is_file()
        labels = np.full_like(mask, 20) if of_voc else np.where(mask == 255, 0, mask)
        segmentation = np.array([(labels, np.zeros((20, 1), object), 1)],
                                dtype=[("Segmentation", "O"), ("Boundaries", "O"), ("CategoriesPresent", "O")])  # fmt: skip
        savemat(cls / f"{path.stem}.mat", {"GTcls": segmentation}, do_compression=True)
    return folder / "benchmark_RELEASE"


def test_the_masks_of_sbd_itself(tmp_path):
    kit = write_devkit(tmp_path, lists=False)
    sbd, expected = sbd_of(kit, tmp_path), set(Devkit(kit).ids("train_aug"))
    shutil.rmtree(kit / "VOC2012" / "SegmentationClassAug")
    flags = f"--devkit={kit}", f"--data_dir={tmp_path / 'tfds'}", f"--sbd={sbd}", "--tags=masks", "--any_lists"
    ended = run("build_voc", *flags)
    assert ended.code == 0, ended.err
    source = opened(tmp_path / "tfds", "train_aug", "masks")
    assert set(source.names) == expected
    for index, name in enumerate(source.names):
        mask, own = source[index].mask, kit / "VOC2012" / "SegmentationClass" / f"{name}.png"
        assert (255 in mask) == own.is_file() and 20 not in mask and mask.max() > 0
    broken = sbd / "dataset" / "cls" / f"{next(name for name in expected if '_001' in name)}.mat"
    for spoil, message in (
        (lambda: broken.write_bytes(broken.read_bytes()[:200]), "is no mask of SBD or damaged"),
        (lambda: savemat(broken, {"GTcls": np.array([(np.full((4, 4), 21, np.uint8),)], dtype=[("Segmentation", "O")])}),
         r"expected \[H, W\] labels from 0 to 20, got \[4, 4\] uint8 up to 21"),
        (lambda: savemat(broken, {"other": 1}), "KeyError"),
        (broken.unlink, "does not exist; unpack SBD"),
    ):  # fmt: skip
        spoil()
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            sbd_mask(broken)
    with pytest.raises(FileNotFoundError, match="has no dataset/cls: give the folder benchmark_RELEASE"):
        Devkit(kit, tmp_path)


def test_a_part_that_is_missing_is_left_out_and_said(own_kit, tmp_path):
    (own_kit / "VOC2012" / "ImageSets" / "Segmentation" / "test.txt").unlink()
    ended = run("build_voc", f"--devkit={own_kit}", f"--data_dir={tmp_path / 'tfds'}", "--any_lists")
    assert ended.code == 0 and "test      is left out: the kit has no list of it" in ended.out
    with pytest.raises(FileNotFoundError, match="has no split 'test'"):
        opened(tmp_path / "tfds", "test")


def test_other_lists_are_refused_and_leave_nothing(kit, tmp_path):
    ended = run("build_voc", f"--devkit={kit}", f"--data_dir={tmp_path}")
    assert ended.code == 1
    assert "train has 4 images, not 1,464; train_aug has 8 images, not 10,582; val has 3 images, not 1,449" in ended.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_lists_are_known_by_the_hash_of_their_sorted_ids(kit, tmp_path, monkeypatch):
    known = {}
    for split, one in LISTS.items():
        ids = Devkit(kit).ids(split)
        digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
        known[split] = one._replace(length=len(ids), sha256=digest)
        assert list_problem(split, ids) == f"{split} has {len(ids)} images, not {one.length:,}"
    monkeypatch.setattr(devkit_module, "LISTS", known)
    ids = Devkit(kit).ids("val")
    assert list_problem("val", ids) == list_problem("val", ids[::-1]) == ""
    assert "but not those that the field uses" in list_problem("val", (*ids[:-1], "2011_000001"))
    assert LISTS["train_aug"].length == 10582 and LISTS["val"].length == 1449 and isinstance(LISTS["test"], KnownList)


def spoiled(kit, part, change):
    path = kit / "VOC2012" / part
    change(path)
    return path


@pytest.mark.parametrize(("part", "change", "message"), [
    ("JPEGImages/2007_002000.jpg", lambda path: path.unlink(), "2007_002000.jpg does not exist"),
    ("JPEGImages/2007_002000.jpg", lambda path: path.write_bytes(path.read_bytes()[:300]), "2007_002000.jpg .*(damaged|not an image)"),
    ("SegmentationClass/2007_002000.png", lambda path: path.unlink(), "SegmentationClass/2007_002000.png does not exist"),
    ("SegmentationClass/2007_002000.png", lambda path: Image.fromarray(np.full((60, 80), 21, np.uint8)).save(path),
     "2007_002000.png: label 21 at row 0, column 0; expected 0 to 20"),
    ("SegmentationClass/2007_002000.png", lambda path: Image.fromarray(np.zeros((9, 9), np.uint8)).save(path),
     "2007_002000.png is 9x9 pixels and its photograph"),
    ("SegmentationClass/2007_002000.png", lambda path: Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(path),
     "expected class indices .* got mode 'RGB'"),
    ("Annotations/2007_002000.xml", lambda path: path.unlink(), "2007_002000.xml does not exist; copy Annotations"),
    ("Annotations/2007_002000.xml", lambda path: path.write_text("<annotation><object>"), "2007_002000.xml is damaged"),
    ("Annotations/2007_002000.xml", lambda path: path.write_text(annotation("x", (6, 8), [("unicorn", 1, 1, 2, 2)])),
     "expected an annotation with objects of the 20 classes, got an object 'unicorn'"),
    ("Annotations/2007_002000.xml", lambda path: path.write_text("<html></html>"), "got the element 'html'"),
    ("ImageSets/Segmentation/val.txt", lambda path: path.write_text("2007_002000\n2007_002000\n"), "val.txt, line 2: .* stands on line 1"),
    ("ImageSets/Segmentation/val.txt", lambda path: path.write_text("a?b\n"), "val.txt, line 1: expected an id such as 2007_000032"),
])  # fmt: skip
def test_what_is_broken_is_named(own_kit, tmp_path, part, change, message):
    spoiled(own_kit, part, change)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        prepared(own_kit, tmp_path / "tfds", tags_from="boxes", any_lists=True)
    assert not list((tmp_path / "tfds").rglob("dataset_info.json"))


def test_folders_that_are_no_kit(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give the folder VOCdevkit"):
        Devkit(tmp_path / "nowhere")
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(FileNotFoundError, match="holds JPEGImages: give the folder VOCdevkit"):
        Devkit(tmp_path)
    with pytest.raises(ValueError, match="tags: expected one of boxes, masks, got 'names'"):
        prepared(tmp_path, tmp_path, tags_from="names")


def test_an_archive_is_compared_by_its_md5(tmp_path, monkeypatch):
    path = tmp_path / "VOCtrainval_11-May-2012.tar"
    path.write_bytes(b"not it")
    assert "has the md5" in archive_problem(path) and "6cd6e144f989b92b3379bac3b3de84fd" in archive_problem(path)
    monkeypatch.setitem(devkit_module.ARCHIVES, path.name, hashlib.md5(b"not it").hexdigest())
    assert archive_problem(path) == ""
    with pytest.raises(ValueError, match="the md5 is known of"):
        archive_problem(tmp_path / "other.tar")
    with pytest.raises(FileNotFoundError):
        archive_problem(tmp_path / "below" / path.name)
