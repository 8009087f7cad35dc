"""A plain folder of photographs: what is read, and that everything wrong is told with file, line and remedy."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data.example import Source
from lcrf_jax.data.files.masks import read_colours, read_mask
from lcrf_jax.data.files.tags import read_tag_file
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.listing import scan_folder

CLASSES = ("background", "cat", "dog")


def picture(seed=0, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)


def save_masks(root, **labels):
    (root / "masks").mkdir(exist_ok=True)
    for name, label in labels.items():
        mask = np.zeros((6, 8), np.uint8)
        mask[1:4, 2:5], mask[0] = label, 255
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")


@pytest.fixture
def folder(tmp_path):
    """Photographs of every format, at several depths, with a tag file of their paths."""
    root = tmp_path / "photographs"
    save(root, "a.png", "barn/b 2.webp", "barn/deep/é.bmp", "d.TIFF", "e.png")
    (root / "tags.csv").write_text("image,tags\na.png,cat\nbarn/b 2.webp,dog;cat\nbarn/deep/é.bmp,\nd.TIFF,dog\ne,dog\n")
    return root


def test_any_names_at_any_depth_in_any_format(folder):
    source = open_source("folder", "train", root=folder)
    assert isinstance(source, Source) and source.class_names == CLASSES
    assert source.names == ("a.png", "barn/b 2.webp", "barn/deep/é.bmp", "d.TIFF", "e.png")
    np.testing.assert_array_equal(source[0].image, picture(0))
    np.testing.assert_array_equal(source[2].image, picture(2))
    assert source.tags.tolist() == [
        [True, True, False], [True, True, True], [True, False, False], [True, False, True], [True, False, True]
    ]  # fmt: skip
    assert source[1].tags.tolist() == [True, True, True] and source[1].mask is None
    with pytest.raises(IndexError, match="index 5 is outside the 5 images"):
        source[5]


ROWS = {"a": ("cat",), "b/c.jpg": ("cat", "dog"), "d": ()}


@pytest.mark.parametrize(
    "name, text",
    [
        ("tags.csv", "\ufeffimage,tags\r\na,cat\r\nb\\c.jpg,cat; dog\r\nd,\r\n"),
        ("tags.csv", 'Image,Tags\n\n./a," cat "\nb/c.jpg,"background;cat;dog;cat"\nd,Background\na,cat\n'),
        ("tags.csv", "image;tags\r\na;cat\r\nb/c.jpg;cat,dog\r\nd;\r\n"),
        ("tags.csv", 'sep=;\nimage;tags;;\na;cat\nb/c.jpg;"cat;dog";;\nd;;\n'),
        ("tags.csv", "sep=,\nimage,tags\na,cat\nb/c.jpg,cat;dog\nd,\n"),
        ("tags.tsv", "image\ttags\na\tcat\nb/c.jpg\tcat| dog\nd\t\n"),
        ("tags.csv", "image\ttags\na\tcat\nb/c.jpg\tcat;dog\nd\t\n"),
        ("tags.json", json.dumps({name: list(tags) for name, tags in ROWS.items()})),
        ("tags.json", json.dumps([{"image": name, "tags": list(tags)} for name, tags in ROWS.items()])),
        ("tags.json", '{"a": "cat", "b/c.jpg": "cat;dog", "d": ""}'),
        ("tags.jsonl", '{"image": "a", "tags": ["cat"]}\n\n{"tags": ["cat", "dog"], "image": "b/c.jpg"}\n{"image": "d", "tags": []}'),
    ],
)  # fmt: skip
def test_tag_files_of_every_form(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert {image: row.tags for image, row in read_tag_file(tmp_path / name).items()} == ROWS


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("tags.csv", "image tags\na cat\n", r"tags.csv, line 1: expected the header 'image,tags', got 'image tags'.*comma"),
        ("tags.csv", "image;tags\na;cat;dog\n", r"line 2: expected 'two columns, image and tags', got 3 column\(s\): 'a;cat;dog'.*tags by commas"),
        ("tags.csv", 'image,tags\na,"cat, dog"\n', "line 2: 'cat, dog' has a comma; separate tags by semicolons"),
        ("tags.csv", "image,tags\na,cat\n./a,dog\n", "line 3: 'a' has other tags than on line 2; join them in one row: cat;dog"),
        ("tags.csv", "image,tags\n,cat\n", "line 2: no image name"),
        ("tags.json", '{"a": ["cat"], "a": ["dog"]}', "tags.json, 'a': 'a' has other tags than on 'a'"),
        ("tags.json", '{"a": ["cat"],\n "b": }', "tags.json, line 2: not JSON"),
        ("tags.json", '{"a": {"cat": 1}}', r"'a': expected tags as \[\"tag\", ...\]"),
        ("tags.json", '{"a": [1]}', "'a': expected tags as"),
        ("tags.json", "7", 'entry 1: expected {"image"'),
        ("tags.json", "[" * 100_000, "not JSON"),
        ("tags.jsonl", '{"image": "a", "tags": []}\n{"image": "b"}', 'tags.jsonl, line 2: expected {"image"'),
        ("tags.jsonl", '{"image": "a", "tags": []}\nhello', "tags.jsonl, line 2: not JSON"),
        ("tags.txt", "a cat", "tags.txt: expected a tag file .csv, .tsv, .json or .jsonl"),
    ],
)
def test_tag_files_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tag_file(tmp_path / name)


def test_photographs_are_found_by_shorter_names_where_there_is_no_doubt(tmp_path):
    save(tmp_path, "one/a.png", "two/b.png", "two/c.png", "one/c.png", "two/d.png", "two/d.webp")
    composed = unicodedata.normalize("NFC", "ü.png")
    save(tmp_path, unicodedata.normalize("NFD", composed))
    (tmp_path / "tags.json").write_text(json.dumps({"a": ["cat"], "b.png": ["cat"], "two/c": ["dog"], composed: ["dog"]}))
    source = FolderSource(tmp_path, "train")
    assert source.names == ("one/a.png", "two/b.png", "two/c.png", unicodedata.normalize("NFD", composed))
    assert scan_folder(tmp_path).untagged == ("one/c.png", "two/d.png", "two/d.webp")
    for name, candidates in (("c.png", "one/c.png, two/c.png"), ("two/d", "two/d.png, two/d.webp")):
        (tmp_path / "tags.json").write_text(json.dumps({name: ["cat"]}))
        with pytest.raises(ValueError, match=f"'{name}' may be {candidates}; write the whole path"):
            FolderSource(tmp_path, "train")
    (tmp_path / "tags.json").write_text(json.dumps({"a": ["cat"], "one/a.png": ["dog"]}))
    with pytest.raises(ValueError, match="'one/a.png' has other tags in another row"):
        FolderSource(tmp_path, "train")


def test_folders_of_classes(tmp_path):
    save(tmp_path, "cat/1.png", "cat/more/2.png", "dog/1.png", "background/3.png", ".hidden/4.png")
    source = open_source("folder", "train", root=tmp_path)
    assert source.class_names == CLASSES
    assert source.names == ("background/3.png", "cat/1.png", "cat/more/2.png", "dog/1.png")
    assert source.tags[:, 1:].tolist() == [[False, False], [True, False], [True, False], [False, True]]
    save(tmp_path, "loose.png")
    with pytest.raises(ValueError, match=r"loose.png: there is no tag file.*write a tags.csv"):
        open_source("folder", "train", root=tmp_path)


def test_folders_of_splits_with_folders_of_classes(tmp_path):
    save(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png")
    found = scan_folder(tmp_path)
    assert found.class_names == CLASSES and not found.problems
    assert {split: [found.images[row] for row in rows] for split, rows in found.splits.items()} == {
        "train": ["train/cat/1.png", "train/dog/2.png"], "val": ["val/cat/3.png"]
    }  # fmt: skip


def test_classes_are_given_or_found(folder):
    (folder / "classes.txt").write_text("background\ndog\nbird\ncat\n")
    source = FolderSource(folder, "train")
    assert source.class_names == ("background", "dog", "bird", "cat") and source.tags[0].tolist() == [True, False, False, True]
    (folder / "classes.txt").write_text("background\ndog\n")
    with pytest.raises(ValueError, match=r"tags.csv, line 2: unknown class 'cat': expected one of dog; .*classes.txt"):
        FolderSource(folder, "train")
    (folder / "classes.txt").rename(folder / "other.txt")
    assert FolderSource(folder, "train").class_names == CLASSES
    with pytest.raises(ValueError, match="unknown class 'cat'"):
        FolderSource(folder, "train", classes="other.txt")
    with pytest.raises(FileNotFoundError, match="classes: .*none.txt does not exist"):
        FolderSource(folder, "train", classes="none.txt")


@pytest.mark.parametrize("one, other", [("Cat", "cat"), ("CAT", "cat"), ("house cat", "house_cat"), ("e\u0301", "\u00e9")])
def test_two_spellings_of_one_class_are_refused(folder, one, other):
    (folder / "tags.csv").write_text(f"image,tags\na.png,{one}\ne.png,{other}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"the tags '{one}' and '{other}' differ in spelling alone; choose one"):
        FolderSource(folder, "train")


def test_nothing_to_learn(folder):
    (folder / "tags.csv").write_text("image,tags\na.png,\ne.png,background\n")
    with pytest.raises(ValueError, match="no photograph has a tag"):
        FolderSource(folder, "train")
    (folder / "tags.json").write_text(json.dumps({"a.png": [f"c{i}" for i in range(255)]}))
    with pytest.raises(ValueError, match=r"expected at most 254 classes, got 255"):
        FolderSource(folder, "train", tags="tags.json")


def test_folders_that_do_not_exist_or_are_empty(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        FolderSource(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="tags.csv is a file"):
        FolderSource(folder / "tags.csv", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no photographs"):
        FolderSource(tmp_path / "empty", "train")
    with pytest.raises(ValueError, match="needs root=FOLDER"):
        open_source("folder", "train")
    (folder / "tags.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds tags.csv, tags.json; keep one"):
        FolderSource(folder, "train")


def test_all_problems_are_told_together(folder):
    (folder / "tags.csv").write_text("image,tags\na.png,cat\nnone.jpg,cat\nd,dog\nd.TIFF,cat\nlost.png,dog\n")
    with pytest.raises(ValueError) as raised:
        FolderSource(folder, "train")
    text = str(raised.value)
    assert "3 problems" in text and text.count("\n") == 3
    assert "line 3: there is no photograph 'none.jpg'" in text and "line 6: there is no photograph 'lost.png'" in text
    with pytest.raises(ValueError, match="'d.TIFF' has other tags in another row"):
        FolderSource(folder, "train", missing_images="skip")
    (folder / "tags.csv").write_text("image,tags\na.png,cat\nnone.jpg,cat\nlost.png,dog\n")
    source = FolderSource(folder, "train", missing_images="skip")
    assert source.names == ("a.png",) and source.left_out == 2
    with pytest.raises(ValueError, match="missing_images: expected"):
        FolderSource(folder, "train", missing_images="maybe")


def test_lists_of_splits(folder):
    (folder / "val.txt").write_text("\ufeffa\r\nbarn/b 2.webp\r\n\r\n", encoding="utf-8")
    assert FolderSource(folder, "val").names == ("a.png", "barn/b 2.webp")
    assert FolderSource(folder, "train").names == ("barn/deep/é.bmp", "d.TIFF", "e.png")
    (folder / "train.txt").write_text("e.png\n")
    assert FolderSource(folder, "train").names == ("e.png",)
    (folder / "some.txt").write_text("d\na\n")
    assert FolderSource(folder, "some").names == ("a.png", "d.TIFF")
    with pytest.raises(FileNotFoundError, match=r"split 'test': the splits there are train \(1\), val \(2\); write test.txt"):
        FolderSource(folder, "test")
    (folder / "train.txt").write_text("e.png\nnone\na\n")
    with pytest.raises(ValueError, match=r"(?s)train.txt, line 2: there is no photograph|train.txt, line 3: 'a.png' stands in val.txt"):
        FolderSource(folder, "train")
    (folder / "tags.csv").write_text("image,tags\na,cat\n")
    (folder / "train.txt").write_text("e.png\n")
    with pytest.raises(ValueError, match=r"train.txt, line 1: 'e.png' has no row in the tag file"):
        FolderSource(folder, "train")


def test_a_share_of_the_photographs_with_masks_is_val(tmp_path):
    save(tmp_path, *(f"{i:02}.png" for i in range(20)))
    (tmp_path / "tags.json").write_text(json.dumps({f"{i:02}": ["cat" if i % 2 else "dog"] for i in range(20)}))
    with pytest.raises(FileNotFoundError, match="no masks and no list val.txt, so there is no split 'val'"):
        FolderSource(tmp_path, "val")
    assert len(FolderSource(tmp_path, "train")) == 20
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\n")
    save_masks(tmp_path, **{"00": 2, "01": 1, "07": 1})
    assert FolderSource(tmp_path, "val", masks=True).names == ("00.png", "01.png", "07.png")
    assert len(FolderSource(tmp_path, "train")) == 17
    save_masks(tmp_path, **{f"{i:02}": 2 - i % 2 for i in range(20)})
    chosen = [FolderSource(tmp_path, "val", split_seed=seed, val_share=0.3).names for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 6
    train = FolderSource(tmp_path, "train", masks=True, val_share=0.3)
    assert not set(train.names) & set(chosen[0]) and len(train) == 14 and train[0].mask.shape == (6, 8)
    with pytest.raises(ValueError, match="val_share"):
        FolderSource(tmp_path, "val", val_share=1.0)


def test_masks_lie_like_the_photographs_or_below_their_first_folder(folder):
    (folder / "masks" / "deep").mkdir(parents=True)
    (folder / "classes.txt").write_text("background\ncat\ndog\n")
    save_masks(folder, a=1)
    for name in ("b 2.png", "deep/é.png"):
        Image.fromarray(np.full((6, 8), 2, np.uint8)).save(folder / "masks" / name)
    (folder / "val.txt").write_text("a\nb 2\né\n", encoding="utf-8")
    source = FolderSource(folder, "val", masks=True)
    assert [int(source[i].mask[2, 3]) for i in range(3)] == [1, 2, 2]
    assert FolderSource(folder, "val").masks is False and FolderSource(folder, "val")[0].mask is None
    (folder / "val.txt").write_text("a\nd\n")
    with pytest.raises(FileNotFoundError, match=r"has no mask for d.TIFF of the split 'val'"):
        FolderSource(folder, "val", masks=True)
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(folder / "masks" / "a.png")
    (folder / "val.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"masks/a.png is 6x8 pixels and its photograph .*a.png 8x6"):
        FolderSource(folder, "val", masks=True)[0]


def test_masks_without_photographs_and_shared_masks_are_problems(folder):
    (folder / "masks").mkdir()
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(folder / "masks" / "other.png")
    with pytest.raises(ValueError, match=r"masks: no mask has the name of a photograph with tags \(other.png\)"):
        FolderSource(folder, "train")
    save(folder, "a.webp")
    (folder / "tags.csv").write_text("image,tags\na.png,cat\na.webp,dog\n")
    (folder / "masks" / "other.png").rename(folder / "masks" / "a.png")
    with pytest.raises(ValueError, match=r"a.png is the mask of a.png and of a.webp"):
        FolderSource(folder, "train")


def test_masks_of_colours(folder):
    (folder / "colours.csv").write_text(
        "class,colour\nbackground,#000000\ncat,#c00080\ndog,#00FF00\ndog,#00f000\nvoid,#e0e0c0\n"
    )
    colours = read_colours(folder / "colours.csv", CLASSES)
    assert colours[0xC0, 0, 0x80] == 1 and colours[0xE0, 0xE0, 0xC0] == 255 and len(colours) == 5
    labels = np.array([[0, 1, 2], [255, 2, 1]], np.uint8)
    rgb = np.zeros((2, 3, 3), np.uint8)
    rgb[labels == 1], rgb[labels == 2], rgb[labels == 255] = (0xC0, 0, 0x80), (0, 255, 0), (0xE0, 0xE0, 0xC0)
    rgb[1, 1] = (0, 0xF0, 0)
    path = folder / "mask.png"
    for image in (Image.fromarray(rgb), Image.fromarray(rgb).quantize(8), Image.fromarray(rgb).convert("RGBA")):
        image.save(path)
        np.testing.assert_array_equal(read_mask(path, 3, colours=colours), labels)
    Image.fromarray(labels).save(path)
    np.testing.assert_array_equal(read_mask(path, 3, colours=colours), labels)  # grey holds indices in any case
    rgb[0, 2] = (1, 2, 3)
    Image.fromarray(rgb).save(path)
    with pytest.raises(ValueError, match=r"mask.png: the colour #010203 at row 0, column 2 \(16.67% of the pixels\)"):
        read_mask(path, 3, colours=colours)
    with pytest.raises(ValueError, match=r"mode 'RGB'; colours cannot be told from classes: .*colours.csv"):
        read_mask(path, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat,#000000\n", "line 1: expected the header 'class,colour'"),
        ("class,colour\ncat,red\n", r"line 2: expected 'horse,#c00080', got 'cat,red'"),
        ("class,color\nbird,#000000\n", r"line 2: unknown class 'bird': expected one of background, cat, dog, void"),
        ("class,colour\ncat,#000000\ndog,#000000\n", r"line 3: the colour #000000 belongs to another class"),
        ("class,colour\n\n", "names no colour"),
    ],
)
def test_colour_files_that_are_refused(tmp_path, text, message):
    (tmp_path / "colours.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_colours(tmp_path / "colours.csv", CLASSES)


def test_names_that_are_not_utf8_are_told(folder):
    try:
        os.rename(os.fsencode(folder / "a.png"), os.fsencode(folder) + b"/\xe9.png")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(ValueError, match=r"the file name '.udce9.png' is not plain UTF-8 text; rename"):
        FolderSource(folder, "train", missing_images="skip")


def test_links_into_a_circle_end(folder):
    (folder / "barn" / "up").symlink_to(folder)
    assert len(FolderSource(folder, "train")) == 5


def test_the_fingerprint_tells_of_changed_photographs_and_masks(folder):
    (folder / "classes.txt").write_text("background\ncat\ndog\n")
    save_masks(folder, a=1)
    before = repr(FolderSource(folder, "val", masks=True).fingerprint)
    assert repr(FolderSource(folder, "val", masks=True).fingerprint) == before
    save_masks(folder, a=2)
    assert repr(FolderSource(folder, "val", masks=True).fingerprint) != before


def test_a_folder_in_voc_layout_is_known_as_one(tmp_path):
    for part in ("JPEGImages", "ImageSets/Segmentation"):
        (tmp_path / part).mkdir(parents=True)
    save(tmp_path, "JPEGImages/a.png")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    (tmp_path / "tags.csv").write_text("image,tags\na,cat\n")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("a\n")
    for kind in ("voc", "folder"):
        assert open_source(kind, "train", root=tmp_path).names == ("a",)
    assert open_source("folder", "train", root=tmp_path, tags="tags.csv").names == ("JPEGImages/a.png",)
    with pytest.raises(ValueError, match=r"data.options: the source 'voc' does not know one of \['val_share'\]"):
        open_source("voc", "train", root=tmp_path, val_share=0.1)
    with pytest.raises(ValueError, match="'voc' needs root=FOLDER"):
        open_source("voc", "train")
