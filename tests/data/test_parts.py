"""Parts of a split, such as val[0::2]: what is in them, what they tell, and what is refused."""

import importlib
import re

import numpy as np
import pytest
from PIL import Image
from programs import run

from lcrf_jax.data.example import PartOfSource, Source, about
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.parts import SliceOfSource, in_parts, whole_of, written_part
from lcrf_jax.machine.errors import SettingError
from lcrf_jax.train.splits import checked_split, open_data

NAMES = ("c", "a", "e", "b", "d")  # as a list has them


def save_photographs(folder, masks):
    folder.mkdir(parents=True)
    masks.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        Image.fromarray(np.full((6, 8, 3), 40 * number, np.uint8)).save(folder / f"{name}.png")
        mask = np.zeros((6, 8), np.uint8)
        mask[1:3] = 1 + number % 2
        Image.fromarray(mask).save(masks / f"{name}.png")


@pytest.fixture
def plain(tmp_path):
    """A folder whose photographs all stand in val.txt but one of their own in train.txt."""
    root = tmp_path / "plain"
    save_photographs(root / "images", root / "masks" / "images")
    Image.fromarray(np.full((6, 8, 3), 9, np.uint8)).save(root / "images" / "t.png")
    rows = [f"images/{name}.png,{('cat', 'dog')[number % 2]}" for number, name in enumerate(NAMES)]
    (root / "tags.csv").write_text("\n".join(["image,tags", *rows, "images/t.png,cat"]) + "\n")
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    (root / "val.txt").write_text("".join(f"images/{name}.png\n" for name in NAMES))
    (root / "train.txt").write_text("images/t.png\n")
    return root


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "voc"
    save_photographs(root / "JPEGImages", root / "SegmentationClass")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("".join(f"{name}\n" for name in NAMES))
    (root / "tags.csv").write_text("image,tags\n" + "".join(f"{name},cat;dog\n" for name in NAMES))
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    return root


def stems(source):
    return "".join(name.rpartition("/")[2].removesuffix(".png") for name in source.names)


@pytest.mark.parametrize(("text", "whole", "rows"), [
    ("val[0::2]", "val", slice(0, None, 2)), ("val[1::2]", "val", slice(1, None, 2)), ("val[::3]", "val", slice(None, None, 3)),
    ("val[:100]", "val", slice(None, 100)), ("val[-10:]", "val", slice(-10, None)), (" val[ 0 : 4 : 2 ] ", "val", slice(0, 4, 2)),
    ("val[0::2][1::2]", "val[0::2]", slice(1, None, 2)), ("odd[1][0::2]", "odd[1]", slice(0, None, 2)), ("val", None, None),
])
def test_how_a_part_is_written(text, whole, rows):
    assert written_part(text) == (None if whole is None else (whole, rows))


@pytest.mark.parametrize(("text", "message"), [
    ("val[0::0]", r"'val\[0::0\]': expected a step of 1 or more, got 0; val\[0::2\] is every other name"),
    ("val[::-1]", "a step of 1 or more, got -1"),
    *((text, r"expected NAME\[START::STEP\] with whole numbers, such as val\[0::2\], and there is no list") for text in (
        "val[0]", "val[]", "val[a::2]", "val[0::2", "val0::2]", "val[0::2]x", "val[:80%]", "val[0:1:2:3]", "val[0::٢]", "[0::2]",
        "val[9999999999999999999::2]")),
])
def test_what_is_no_part(text, message):
    with pytest.raises(SettingError, match=message):
        written_part(text)


def test_parts_of_tfds_that_are_its_own():
    for text in ("train[:80%]", "train[10:20]", "train", "train[0::2]+test[0::2]"):
        assert written_part(text, of_tfds=True) is None
    assert written_part("test[:10%][0::2]", of_tfds=True) == ("test[:10%]", slice(0, None, 2))
    assert whole_of("val[0::2][1::2]") == whole_of("val") == "val" and whole_of("test[:10%]") == "test[:10%]"


@pytest.mark.parametrize("kind", ["folder", "voc"])
def test_parts_are_of_the_names_in_order_and_keep_the_order_of_their_source(request, kind):
    root = request.getfixturevalue("plain" if kind == "folder" else kind)
    whole = open_source(kind, "val", root=root, masks=True)
    one, other = (open_source(kind, f"val[{k}::2]", root=root, masks=True) for k in (0, 1))
    assert (stems(whole), stems(one), stems(other)) == (("abcde", "ace", "bd") if kind == "folder" else ("caebd", "cae", "bd"))
    assert stems(open_source(kind, "val[0::2][1::2]", root=root)) == "c" and stems(open_source(kind, "val[-2:]", root=root)) in ("de", "ed")
    for part in (one, other):
        assert isinstance(part, Source) and part.masks and part.class_names == whole.class_names and part.left_out == 0
        at = [whole.names.index(name) for name in part.names]
        np.testing.assert_array_equal(part.tags, whole.tags[at])
        for row, example in zip(at, part, strict=True):
            assert example.name == whole.names[row]
            np.testing.assert_array_equal(example.image, whole[row].image)
            np.testing.assert_array_equal(example.mask, whole[row].mask)
        assert part.paths == tuple(whole.paths[row] for row in at)
    assert one.split == "val[0::2]" and about(one).endswith(", val[0::2], 3 images")
    assert len({repr(source.fingerprint) for source in (whole, one, other)}) == 3
    again = open_source(kind, "val[0::2]", root=root, masks=True).fingerprint
    assert again == one.fingerprint
    Image.fromarray(np.full((6, 8, 3), 1, np.uint8)).save(one.paths[0])
    assert open_source(kind, "val[0::2]", root=root, masks=True).fingerprint != again


def test_a_part_tells_what_its_source_tells(plain, voc):
    whole, part = (open_source("folder", split, root=plain) for split in ("val", "val[1::2]"))
    for name in ("untagged", "tag_source", "not_taken", "untagged_in_masks"):
        assert getattr(part, name) == getattr(whole, name)
    assert not hasattr(open_source("voc", "val[1::2]", root=voc), "tag_source")
    textures = open_source("textures", "val[1::2]", num_val=6)
    assert textures.names == ("val_00001", "val_00003", "val_00005") and not hasattr(textures, "paths")
    assert textures[2].name == "val_00005"
    with pytest.raises(IndexError, match=r"outside the 3 examples of val\[1::2\]"):
        textures[3]


def test_a_list_whose_own_name_has_brackets(plain, voc):
    for kind, root, folder, line in (("folder", plain, plain, "images/d.png"), ("voc", voc, voc / "ImageSets/Segmentation", "d")):
        for name in ("val[0::2]", "odd[1]"):
            (folder / f"{name}.txt").write_text(f"{line}\n")
            source = open_source(kind, name, root=root)
            assert stems(source) == "d" and source.split == name and not isinstance(source, SliceOfSource)
        assert stems(open_source(kind, "odd[1][0::2]", root=root)) == "d"


@pytest.mark.parametrize(("split", "message"), [
    ("vall[0::2]", "did you mean .*val"), ("val[5::2]", r"'val\[5::2\]' is empty: val has 5 examples, from 0 to 4; val\[0::2\]"),
    ("val[3:3]", "is empty"), ("val[0::0]", "a step of 1 or more"), ("val[0]", r"expected NAME\[START::STEP\]"),
])
def test_parts_that_are_not_there(plain, voc, split, message):
    for kind, root in (("folder", plain), ("voc", voc), ("textures", None)):
        options = {} if root else {"num_val": 5}
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_source(kind, split, root=root, **options)


def config_of(root, train, val, kind="folder", **more):
    data = {"kind": kind, "root": str(root), "train_split": train, "val_split": val, "options": {}, **more}
    return {"method": "latent_crf", "data": data}


def test_best_is_chosen_on_a_part(plain):
    train, val = open_data(config_of(plain, "train", "val[0::2]"))
    assert stems(train) == "t" and stems(val) == "ace" and val.masks
    (plain / "val.txt").unlink()
    (plain / "masks").rename(plain / "other")
    (plain / "train.txt").write_text("".join(f"images/{name}.png\n" for name in NAMES))
    assert open_data(config_of(plain, "train[0::2]", "val[0::2]"))[1] is None  # as for val: there are no masks to score on


@pytest.mark.parametrize(("train", "val"), [("val", "val[0::2]"), ("val[0::2]", "val"), ("val[0::2]", "val[0::3]")])
def test_parts_that_share_photographs_with_the_training_split_are_refused(plain, train, val):
    with pytest.raises(SettingError, match=r"data.val_split: val.* and the training split val.* share [135] examples? ?.*images/a.png"):
        open_data(config_of(plain, train, val))
    train, val = open_data(config_of(plain, "val[0::2]", "val[1::2]"))
    assert (stems(train), stems(val)) == ("ace", "bd")


def test_parts_of_a_source_are_those_that_are_opened_by_themselves(plain):
    whole = open_source("folder", "val", root=plain, masks=True)
    parts = in_parts(whole, 2)
    assert parts.numbers.tolist() == [0, 1, 0, 1, 0] and parts.splits == ("val[0::2]", "val[1::2]") and parts.source is whole
    for number, split in enumerate(parts.splits):
        assert open_source("folder", split, root=plain).names == tuple(np.array(whole.names)[parts.numbers == number])
    nested = in_parts(open_source("folder", "val[0::2]", root=plain), 3)
    assert nested.numbers.tolist() == [0, 1, 2] and nested.splits[0] == "val[0::2][0::3]"
    for number in (0, 6):
        with pytest.raises(SettingError, match=f"parts: expected 1 to 5, the number of examples of val, got {number}"):
            in_parts(whole, number)


def test_a_photograph_that_is_left_out_changes_no_part(plain):
    (plain / "images" / "b.png").write_bytes(b"no picture")
    config = config_of(plain, "train", "val", on_bad_image="skip")
    source = checked_split(config, "val", masks=True)
    assert isinstance(source, PartOfSource) and stems(source) == "acde" and source.left_out == 1
    assert in_parts(source, 2).numbers.tolist() == [0, 0, 1, 0]
    alone = checked_split(config, "val[1::2]", masks=True)
    assert stems(alone) == "d" and alone.split == "val[1::2]" and alone.left_out == 1
    assert in_parts(alone, 2).numbers.tolist() == [1]


def test_check_data_reads_the_whole_of_a_split_of_which_a_part_is_chosen_on(voc):
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("a\nb\n")
    arguments = ("--config=experiments/configs/voc_animals.py", f"--config.data.root={voc}")
    assert re.search(r"^val +5 +5 +0$", run("check_data", *arguments).out, re.MULTILINE)
    (voc / "ImageSets" / "Segmentation" / "val.txt").rename(voc / "ImageSets" / "Segmentation" / "vall.txt")
    assert "no masks to score on" in run("check_data", *arguments).out
    ended = run("check_data", *arguments, "--config.data.train_split=vall[0::2]", "--config.data.val_split=vall[1::2]")
    assert re.search(r"^vall\[1::2\] +2 +2 +0$", ended.out, re.MULTILINE)


def test_check_data_tells_of_parts_that_share_photographs(voc):
    arguments = ("--config=experiments/configs/voc_animals.py", f"--config.data.root={voc}")
    ended = run("check_data", *arguments, "--config.data.train_split=val[0::2]", "--config.data.val_split=val[0::4]")
    assert ended.code == 1 and re.search(r"share \d examples?", ended.out)


def test_the_halves_of_the_configurations():
    config = {name: importlib.import_module(f"experiments.configs.{name}").get_config() for name in (
        "voc_animals", "compare_voc_animals", "folder", "compare_textures")}  # fmt: skip
    chosen_on = {name: each.data.val_split for name, each in config.items()}
    assert chosen_on == {"voc_animals": "val[0::2]", "compare_voc_animals": "val", "folder": "val", "compare_textures": "val"}
