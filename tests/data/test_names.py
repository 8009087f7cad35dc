"""Names of classes that may be slips are asked, not guessed; a list of classes is the answer."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data.example import tag_vector
from lcrf_jax.data.files.names import are_twins, name_doubts
from lcrf_jax.data.files.tags import read_tag_file
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
        (("ring", "ring ring"), "'ring ring' has the tag 'ring' in it"),
        (("traffic light", "stop sign", "traffic light stop sign"), "has the tags 'traffic light' and 'stop sign' in it"),
        (("ring star", "star dots", "ring dots"), "'star dots' and 'ring star' look like tags joined by spaces"),
        (("ring|star",), "'ring|star' looks like several tags"),
        (("ring/star",), "several tags"),
        (("ring;star",), "several tags"),
        (("ring\nstar",), "several tags"),
        (("ring + star",), "several tags"),
        (("['ring', 'star']",), "several tags"),
        (("ring:0.9",), "looks like a score; write its name alone ('ring')"),
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
    for name in ("images", "Train", "masks", "JPEGImages", "2023-05-01", "100CANON", "raw", "originals", "thumbs", "images_1",
                 "New folder (2)", "train2017", "DCIM", "cat - Copy"):  # fmt: skip
        assert "does not look like a class" in doubts(name, of_folders=True)[0] and not doubts(name)
    assert len(doubts("raw", "processed", of_folders=True)) == len(doubts("train", "val", of_folders=True)) == 2
    assert not doubts("train", "bus", of_folders=True) and not doubts("raw", "cooked", of_folders=True)
    [line] = doubts("ring", "star", "ring star", of_folders=True)
    assert "rename the folder, or write a tags.csv" in line
    assert "give the folders of one class one name" in doubts("Cat", "cat", of_folders=True)[0]


@pytest.mark.parametrize(
    "one, other",
    [("cat", "cats"), ("bus", "buses"), ("lady", "ladies"), ("person", "people"), ("café", "cafe"),
     ("tv monitor", "tvmonitor"), ("pot-plant", "pot plant")],
)  # fmt: skip
def test_twins(one, other):
    assert are_twins(one, other, 9, 9) and are_twins(other, one, 9, 9)


def test_a_rare_slip_is_a_twin_and_another_word_is_none():
    assert are_twins("horse", "house", 30, 1) and not are_twins("horse", "house", 30, 20) and not are_twins("truck", "track", 100, 8)
    for one, other in (("bicycle", "bicyle"), ("horse", "hosre"), ("horse", "horsse"), ("Katze", "Katzen"), ("triangle", "triagle"),
                       ("glass", "glasses"), ("angel", "angle"), ("wine glass", "wine glasses")):  # fmt: skip
        assert are_twins(one, other, 30, 1) and not are_twins(one, other, 30, 30) and not are_twins(one, other, 6, 6), (one, other)
    for one, other in (("cat", "car"), ("cat", "cow"), ("part 1", "part 2"), ("glass", "gas"), ("train", "rain"), ("bus", "bush"),
                       ("defect a", "defect b"), ("iphone 6", "iphone 6s"), ("C#", "C++"), ("bar", "barn"), ("ハス", "バス"),
                       ("かき", "かぎ"), ("बस", "बाँस"), ("chick", "chicken")):  # fmt: skip
        assert not are_twins(one, other, 9, 9) and not are_twins(one, other, 100, 8), (one, other)


COMMON = [
    CLASSES[1:],
    # Names of large public lists: with other names in them, or near to others.
    ("bear", "teddy bear", "dog", "hot dog", "cat", "car", "bus", "truck", "traffic light", "stop sign", "wine glass", "cup", "train",
     "baseball bat", "baseball glove", "tennis racket", "bird", "mouse", "horse", "potted plant", "cell phone", "couch", "orange"),
    ("apple", "aquarium_fish", "maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree", "man", "woman", "boy", "girl", "bee",
     "beetle", "sea", "seal", "ray", "trout", "train", "lawn_mower", "sweet_pepper", "plain", "plate", "mountain", "snail", "snake"),
    ("dotted", "polka-dotted", "striped", "stratified", "lined", "grid", "porous", "potholed", "marbled", "matted", "meshed"),
    ("eggs_benedict", "deviled_eggs", "bread_pudding", "garlic_bread", "macaroni_and_cheese", "cheese_plate", "macarons", "crab_cakes",
     "cup_cakes", "carrot_cake", "chocolate_cake", "chocolate_mousse", "grilled_cheese_sandwich", "grilled_salmon", "club_sandwich",
     "hot_dog", "hot_and_sour_soup", "miso_soup", "fried_rice", "spring_rolls", "onion_rings", "french_onion_soup", "fish_and_chips"),
    ("school bus", "bus", "t-shirt", "shirt", "Vulpes vulpes", "Vulpes zerda", "sea lion", "lion cub", "red car", "car wash", "mug"),
    ("salt & pepper", "C#", "C++", "empty", "occupied", "mitt", "mitten", "desert", "dessert", "model s", "model x", "new", "old"),
    ("fire", "truck", "fire truck"),
]  # fmt: skip


@pytest.mark.parametrize("of_folders", [False, True])
@pytest.mark.parametrize("names", COMMON)
def test_common_lists_of_classes_raise_no_doubt(names, of_folders):
    assert not doubts(*names, of_folders=of_folders, **dict.fromkeys(names, 30))


def test_a_tag_that_was_joined_is_rarer_than_its_parts_or_the_folder_is_small():
    tags = ("ring", "star", "ring star")
    for counts, told in (((3, 3, 3), 1), ((15, 15, 15), 1), ((300, 200, 60), 1), ((300, 300, 300), 0), ((2, 2, 12), 0)):
        assert len(doubts(*tags, **dict(zip(tags, counts, strict=True)))) == told, counts


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


def test_text_files_that_are_none(tmp_path):
    (tmp_path / "tags.csv").write_bytes(b"PK\x03\x04xl/worksheets")
    with pytest.raises(ValueError, match="tags.csv is a spreadsheet or an archive, whatever its name; export it as text"):
        read_tag_file(tmp_path / "tags.csv")
    for encoding in ("utf-16", "utf-16-le", "utf-32"):  # with a byte-order mark and without one
        (tmp_path / "tags.csv").write_bytes("image,tags\na,dog\n".encode(encoding))
        with pytest.raises(ValueError, match="tags.csv is text in UTF-16, or no text; save the file as UTF-8"):
            read_tag_file(tmp_path / "tags.csv")
    with pytest.raises(FileNotFoundError, match=r"tag.csv does not exist; did you mean .*tags.csv\?"):
        read_tag_file(tmp_path / "tag.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(FileNotFoundError, match="pipe.csv is no file"):
        read_tag_file(tmp_path / "pipe.csv")


def test_photographs_without_folders_and_tags_are_told_once_with_what_is_near(folder):
    (folder / "tag.csv").touch()
    [problem] = scan_folder(folder).problems
    assert problem.startswith("0.png, 1.png, 2.png and 1 more: there is no tag file; did you mean 'tag.csv'?, and these 4 of 4")


def test_text_for_a_list_of_tags():
    with pytest.raises(ValueError, match=r"expected a list of class names, got the text 'ring'; give a list: \['ring'\]"):
        tag_vector("ring", ("background", "ring"))
