"""Names of classes that may be slips are asked, not guessed; a list of classes is the answer."""

import json

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data.example import tag_vector
from lcrf_jax.data.files.names import are_twins, name_doubts
from lcrf_jax.data.sources.devkit import CLASSES
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.listing import scan_folder


def doubts(*tags, of_folders=False, **counts):
    return name_doubts(dict.fromkeys(tags, "tags.csv"), counts, of_folders=of_folders)


@pytest.mark.parametrize(
    "tags, words",
    [
        (("ring", "star", "ring star"), "'ring star' has the tags 'ring' and 'star' in it"),
        (("ring", "star", "star_ring"), "'star_ring' has the tags"),
        (("ring", "star", "ring-star"), "'ring-star' has the tags"),
        (("ring", "star", "ring and star"), "'ring and star' has the tags"),
        (("ring", "ring star"), "'ring star' has the tag 'ring' in it"),
        (("ring star", "star dots"), "'star dots' and 'ring star' look like tags joined by spaces"),
        (("ring|star",), "'ring|star' looks like several tags"),
        (("ring/star",), "several tags"),
        (("ring;star",), "several tags"),
        (("ring\nstar",), "several tags"),
        (("ring + star",), "several tags"),
        (("['ring', 'star']",), "several tags"),
        (("ring:0.9",), "several tags"),
        (("ring；star",), "several tags"),
        (("ring、star",), "several tags"),
        (("ring\\\\star",), "several tags"),
        (("'ring'",), "several tags"),
        (("N.A.", "cat"), "word for no tag"),
        (("none", "cat"), "'none' looks like a word for no tag; leave the tags of these photographs empty"),
        (("N/A", "cat"), "'N/A' looks like a word for no tag"),
        (("-", "cat"), "'-' looks like a word for no tag"),
        (("No_Tags", "cat"), "word for no tag"),
        (("unlabeled", "cat"), "word for no tag"),
        (("nan", "cat"), "word for no tag"),
        (("__background__", "cat"), "looks like the background"),
        (("0", "1"), "all tags are numbers"),
        (("7",), "all tags are numbers"),
        (("ring", "rings"), "'ring' (9 photographs) and 'rings' (9) may be one class"),
        (("Ring(s)", "ring"), "may be one class"),
        (("Cat", "cat"), "differ in spelling alone"),
    ],
)
def test_names_that_may_be_slips(tags, words):
    told = doubts(*tags, **dict.fromkeys(tags, 9))
    assert any(words in line for line in told), told
    assert all(line.startswith("tags.csv: ") and ("classes.txt" in line or "choose one" in line) for line in told)


def test_names_of_folders():
    assert "(put them into a folder 'background')" in doubts("unlabeled", "cat", of_folders=True)[0]
    for name in ("images", "Train", "masks", "JPEGImages"):
        assert "does not look like a class" in doubts(name, of_folders=True)[0] and not doubts(name)


@pytest.mark.parametrize(
    "one, other",
    [("cat", "cats"), ("bus", "buses"), ("lady", "ladies"), ("person", "people"), ("café", "cafe"), ("Katze", "Katzen"),
     ("horse", "hosre"), ("horse", "horsse"), ("tv monitor", "tvmonitor"), ("pot-plant", "pot plant")],
)  # fmt: skip
def test_twins(one, other):
    assert are_twins(one, other, 9, 9) and are_twins(other, one, 9, 9)


def test_a_rare_slip_is_a_twin_and_another_word_is_none():
    assert are_twins("horse", "house", 30, 1) and not are_twins("horse", "house", 30, 20)
    assert are_twins("bicycle", "bicyle", 30, 1)
    for one, other in (("cat", "car"), ("cat", "cow"), ("part 1", "part 2"), ("glass", "gas"), ("train", "rain"), ("bus", "bush")):
        assert not are_twins(one, other, 9, 9), (one, other)


def test_common_lists_of_classes_raise_no_doubt():
    voc = CLASSES[1:]
    assert not doubts(*voc, **dict.fromkeys(voc, 9))
    assert not doubts("ring", "cross", "dots", "square", "star", "triangle") and not doubts("traffic light", "fire hydrant", "bird's nest")


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.fromarray(np.full((6, 8, 3), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder, *tags):
    (folder / "tags.json").write_text(json.dumps({str(number): list(names) for number, names in enumerate(tags)}))


def test_doubts_are_problems_until_a_list_of_classes_confirms_the_names(folder):
    write(folder, ["ring"], ["ring star"], ["none"], ["star", "rings"])
    with pytest.raises(ValueError) as raised:
        FolderSource(folder, "train")
    text = str(raised.value)
    assert "3 problems" in text and "'1': the tag 'ring star' has the tags" in text and "'2': the tag 'none'" in text and "'rings'" in text
    names = "background\nring\nring star\nnone\nstar\nrings\n"
    (folder / "classes.txt").write_text(names)
    assert FolderSource(folder, "train").class_names == tuple(names.split("\n")[:-1])
    (folder / "classes.txt").rename(folder / "names.txt")
    assert len(FolderSource(folder, "train", classes="names.txt")) == 4
    (folder / "Classes.TXT").write_text("background\nring\nstar\n")
    with pytest.raises(ValueError, match="unknown class 'rings': expected one of ring, star; did you mean 'ring'"):
        FolderSource(folder, "train")

    write(folder, ["ring"], ["ring star"], ["none"], ["star"])
    with pytest.raises(ValueError) as raised:
        FolderSource(folder, "train")
    assert "unknown class 'ring star': expected one of ring, star (the tag 'ring star' has the tags" in str(raised.value)
    assert "unknown class 'none': expected one of ring, star (the tag 'none' looks like a word for no tag" in str(raised.value)


def test_masks_of_indices_need_a_list_of_classes(folder):
    (folder / "masks").mkdir()
    Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(folder / "masks" / "1.png")
    write(folder, ["ring"], ["ring"])
    assert FolderSource(folder, "val", masks=True, val_share=0.99)[0].mask.max() == 1  # one class: index 1 can mean nothing else
    write(folder, ["ring"], ["star"])
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=r"masks hold indices, and no classes.txt says which class is which.*background, ring, star"):
            FolderSource(folder, split)
    (folder / "classes.txt").write_text("background\nstar\nring\n")
    assert FolderSource(folder, "val", masks=True, val_share=0.99).class_names[1] == "star"
    (folder / "classes.txt").unlink()
    (folder / "colours.csv").write_text("class,colour\nbackground,#000000\nring,#ff0000\nstar,#00ff00\n")
    assert FolderSource(folder, "train").class_names == ("background", "ring", "star")


def test_a_spreadsheet_is_told_once(folder):
    (folder / "Tags.xlsx").write_bytes(b"PK")
    [problem] = scan_folder(folder).problems
    assert "no tag file but the spreadsheet Tags.xlsx; export its sheet as CSV" in problem


def test_photographs_without_folders_and_tags_are_told_once_with_what_is_near(folder):
    (folder / "tag.csv").touch()
    [problem] = scan_folder(folder).problems
    assert problem.startswith("0.png, 1.png, 2.png and 1 more: there is no tag file; did you mean 'tag.csv'?, and these 4 of 4")


def test_text_for_a_list_of_tags():
    with pytest.raises(ValueError, match=r"expected a list of class names, got the text 'ring'; give a list: \['ring'\]"):
        tag_vector("ring", ("background", "ring"))
