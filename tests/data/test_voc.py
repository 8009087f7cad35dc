"""The VOC folder: what is read, and that everything wrong is refused with file, line and remedy."""

import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data.files.images import image_size, opened, read_image
from lcrf_jax.data.files.masks import read_mask
from lcrf_jax.data.files.tags import read_classes
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sources.voc import VocSource, read_split, read_tags

CLASSES = ("background", "cat", "dog")
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [9] * (765 - 9) + [224, 224, 192]


def picture(seed=0, height=6, width=8):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three photographs: a cat, a cat and a dog, nothing; masks for the split val."""
    root = tmp_path / "voc"
    for part in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass"):
        (root / part).mkdir(parents=True)
    for i, name in enumerate(("a", "b", "é 3")):
        Image.fromarray(picture(i)).save(root / "JPEGImages" / f"{name}.png")
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    (root / "tags.csv").write_text("image,tags\na,cat\nb,dog;cat\né 3,\n", encoding="utf-8")
    (root / "ImageSets/Segmentation/train.txt").write_text("b\né 3\n", encoding="utf-8")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
    for name, label in (("a", 1), ("b", 2)):
        mask = np.zeros((6, 8), np.uint8)
        mask[1:4, 2:5], mask[0] = label, 255
        image = Image.fromarray(mask).convert("L")
        if name == "b":
            image = Image.fromarray(mask, "L")
            image.putpalette(PALETTE)
        image.save(root / "SegmentationClass" / f"{name}.png")
    return root


def test_reads_images_tags_and_masks(folder):
    source = open_source("folder", "val", root=folder, masks=True)
    assert source.class_names == CLASSES and source.split == "val" and len(source) == 2
    first, second = source
    assert (first.name, second.name) == ("a", "b")
    np.testing.assert_array_equal(first.image, picture(0))
    assert first.tags.tolist() == [True, True, False] and second.tags.tolist() == [True, True, True]
    np.testing.assert_array_equal(source.tags, [first.tags, second.tags])
    for example, label in ((first, 1), (second, 2)):
        assert np.unique(example.mask).tolist() == [0, label, 255]
        assert example.mask[2, 3] == label and example.mask.dtype == np.uint8


def test_no_tags_means_background_only_and_masks_are_optional(folder):
    source = VocSource(folder, "train")
    assert source[1].name == "é 3" and source[1].tags.tolist() == [True, False, False]
    assert source[1].mask is None
    assert VocSource(folder, "val")[0].mask is None


def test_masks_are_never_touched_without_being_asked_for(folder):
    for path in (folder / "SegmentationClass").iterdir():
        path.write_bytes(b"this would raise")
    assert VocSource(folder, "val")[0].mask is None
    shutil.rmtree(folder / "SegmentationClass")
    assert VocSource(folder, "val")[0].mask is None
    with pytest.raises(FileNotFoundError, match=r"SegmentationClass has no mask for a, b .*masks=False"):
        VocSource(folder, "val", masks=True)


def test_missing_folder_parts_and_splits(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        VocSource(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="classes.txt is a file"):
        VocSource(folder / "classes.txt", "train")
    with pytest.raises(FileNotFoundError, match="splits there are train, val"):
        VocSource(folder, "test")
    with pytest.raises(FileNotFoundError, match=r"has no JPEGImages: .*found there: voc"):
        VocSource(tmp_path, "train")
    (folder / "tags.csv").unlink()
    with pytest.raises(FileNotFoundError, match="has no tags.csv"):
        VocSource(folder, "train")


def test_missing_row_and_missing_photograph(folder):
    (folder / "tags.csv").write_text("image,tags\na,cat\n")
    with pytest.raises(ValueError, match=r"tags.csv has no row for b of the split 'val'"):
        VocSource(folder, "val")
    (folder / "tags.csv").write_text("image,tags\na,cat\nb,dog\nextra,cat\n")
    (folder / "JPEGImages/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"JPEGImages has no photograph for b .*val.txt"):
        VocSource(folder, "val")


def test_same_stem_with_two_extensions(folder):
    Image.fromarray(picture()).save(folder / "JPEGImages/a.jpg")
    with pytest.raises(ValueError, match=r"more than one file for the id 'a': a.jpg, a.png"):
        VocSource(folder, "val")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffimage,tags\r\na,cat\r\nb,dog;cat\r\n",
        "image,tags\ra,cat\rb,dog;cat",
        "image , tags\n\na.jpg, cat ;\nb,background;dog;cat;cat\nb,cat;dog\n",
        'image,tags\n"a","cat"\n"b","dog;cat"\n',
    ],
)
def test_tag_files_that_are_understood(tmp_path, text):
    path = tmp_path / "tags.csv"
    path.write_bytes(text.encode("utf-8"))
    tags = read_tags(path, CLASSES)
    assert {name: vector.tolist() for name, vector in tags.items()} == {
        "a": [True, True, False],
        "b": [True, True, True],
    }


@pytest.mark.parametrize(
    "text, message",
    [
        ("image,tags\na,cat\nb,bird\n", r"tags.csv, line 3: unknown class 'bird'.*background, cat, dog"),
        ("image,tags\na,cat\na,dog\n", r"line 3: 'a' has other tags than on line 2"),
        ("image tags\na cat\n", r"line 1: expected the header 'image,tags'"),
        ("a,cat\n", r"line 1: expected the header"),
        ("image,tags\na,cat,dog\n", r"line 2: .*3 column.*semicolons"),
        ("image,tags\na\n", r"line 2: .*1 column"),
        ("image,tags\na,cat dog\n", r"line 2: unknown class 'cat dog'.*separated by ;"),
        ("image,tags\n,cat\n", r"line 2: no image name"),
        ('image,tags\n"a,cat\n', r"line 2: not comma-separated"),
        ("", r"tags.csv is empty"),
    ],
)
def test_tag_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "tags.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tags(path, CLASSES)


def test_text_that_is_not_utf8(tmp_path):
    path = tmp_path / "tags.csv"
    path.write_bytes(b"image,tags\n\xe9,cat\n")
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        read_tags(path, CLASSES)


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat\ndog\n", r"line 1: expected 'background', got 'cat'"),
        ("", r"an empty file"),
        ("background\n", r"2 to 255 classes"),
        ("background\ncat\ncat\n", r"line 3: the class 'cat' occurs twice"),
        ("background\n\ncat\n", r"line 2: empty"),
        ("background,cat,dog\n", r"line 1: .*one class a line"),
        (
            "\n".join(["background", *(f"c{i}" for i in range(255))]),
            r"2 to 255 classes with background, got 256",
        ),
    ],
)
def test_class_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(path)


def test_class_file_with_mark_and_windows_ends(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfbackground\r\ncat\r\ndog\r\n\r\n")
    assert read_classes(tmp_path / "classes.txt") == CLASSES


@pytest.mark.parametrize(
    "text, message",
    [
        ("a\nb\na\n", r"line 3: 'a' stands on line 1"),
        ("a.jpg\n", r"line 1: expected an id"),
        ("/JPEGImages/a.jpg /SegmentationClass/a.png\n", r"line 1: expected an id"),
        ("\n\n", r"lists no image"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, message):
    path = tmp_path / "train.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split(path)


def test_masks_that_are_refused(folder):
    path = folder / "SegmentationClass/a.png"

    def reading(array):
        Image.fromarray(array).save(path)
        return VocSource(folder, "val", masks=True)[0]

    good = np.zeros((6, 8), np.uint8)
    assert reading(good).mask.max() == 0
    bad = good.copy()
    bad[2, 5] = 3
    with pytest.raises(ValueError, match=r"a.png: label 3 at row 2, column 5; expected 0 to 2 .* or 255"):
        reading(bad)
    with pytest.raises(ValueError, match=r"a.png is 6x8 pixels and its photograph .*a.png 8x6"):
        reading(good.T.copy())
    with pytest.raises(ValueError, match=r"mode 'RGB'; colours"):
        reading(np.zeros((6, 8, 3), np.uint8))
    binary = good.copy()
    binary[1:5, 1:5] = 255
    with pytest.raises(ValueError, match=r"only 0 and 255"):
        reading(binary)


def test_palette_masks_give_indices_not_grey_levels(tmp_path):
    mask = np.arange(4, dtype=np.uint8).reshape(2, 2)
    image = Image.fromarray(mask, "L")
    image.putpalette(PALETTE)
    image.save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == "P"
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 4), mask)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_rotation(folder, turn):
    """The photograph is turned upright; a mask of either frame is matched, or refused where both fit."""
    shown = np.repeat(np.arange(48, dtype=np.uint8).reshape(6, 8, 1) * 5, 3, 2)
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown),
        7: np.rot90(shown, 2).transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(stored)).save(folder / "JPEGImages/a.png", exif=exif)
    np.testing.assert_array_equal(VocSource(folder, "val")[0].image, shown)
    labels = (shown[..., 0] > 100).astype(np.uint8)
    stored_labels = np.ascontiguousarray((stored[..., 0] > 100).astype(np.uint8))
    source = VocSource(folder, "val", masks=True)
    for frame in (labels, stored_labels):
        Image.fromarray(frame).save(folder / "SegmentationClass/a.png")
        if turn in (2, 3, 4):
            with pytest.raises(ValueError, match=f"a.png carries the EXIF orientation {turn}"):
                source[0]
        else:
            np.testing.assert_array_equal(source[0].mask, labels)


def test_colour_modes(tmp_path):
    def through(image, name="x.png"):
        image.save(tmp_path / name)
        array = read_image(tmp_path / name)
        assert array.dtype == np.uint8 and array.shape == (6, 8, 3)
        return array

    rgb = picture()
    grey = Image.fromarray(rgb[..., 0])
    np.testing.assert_array_equal(through(Image.fromarray(rgb)), rgb)
    np.testing.assert_array_equal(through(grey), np.repeat(rgb[..., :1], 3, 2))
    clear = Image.fromarray(np.dstack([rgb, np.zeros((6, 8), np.uint8)]))
    assert (through(clear) == 255).all()
    assert (through(grey.convert("LA"))[..., 0] == rgb[..., 0]).all()
    deep = Image.fromarray(rgb[..., 0].astype(np.uint16) * 256 + (255 - rgb[..., 0]))
    np.testing.assert_array_equal(through(deep)[..., 2], rgb[..., 0])
    through(Image.fromarray(rgb).convert("P"))
    through(Image.fromarray(rgb).convert("CMYK"), "x.jpg")
    assert read_image(tmp_path / "x.jpg").shape == (6, 8, 3)
    Image.fromarray(rgb).save(
        tmp_path / "a.gif", save_all=True, append_images=[Image.fromarray(rgb[::-1].copy())]
    )
    assert read_image(tmp_path / "a.gif").shape == (6, 8, 3)


def test_files_that_are_not_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg does not exist"):
        read_image(tmp_path / "none.jpg")
    (tmp_path / "zero.jpg").touch()
    with pytest.raises(ValueError, match="zero.jpg has zero bytes"):
        read_image(tmp_path / "zero.jpg")
    (tmp_path / "text.jpg").write_text("hello")
    with pytest.raises(ValueError, match="text.jpg is not an image"):
        read_image(tmp_path / "text.jpg")
    Image.fromarray(picture(0, 64, 64)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-700])
    with pytest.raises(ValueError, match="cut.jpg is damaged or cut short"):
        read_image(tmp_path / "cut.jpg")
    with pytest.raises(ValueError, match=r"whole.jpg is damaged or cut short \(at 417: no data\); copy"), opened(tmp_path / "whole.jpg"):
        raise OSError("at 417:\n  no data\n")
    Image.new("1", (16_000, 11_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="huge.png.*16000x11000 pixels"):
        read_image(tmp_path / "huge.png")


def test_pictures_that_would_fill_the_memory_are_refused_by_their_heads(tmp_path):
    """A PNG that claims 40,000 x 26,000 pixels and has next to none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for width, height in ((40_000, 26_000), (13_000, 13_000)):
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(content)
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match=r"bomb.png.*(pixels).*scale it down or cut it into pieces"):
                read(tmp_path / "bomb.png")


def test_index_out_of_range_names_the_split(folder):
    with pytest.raises(IndexError, match="2 images of .*val"):
        VocSource(folder, "val")[2]


@pytest.mark.photographs
def test_real_photographs(voc_animals):
    source = VocSource(voc_animals, "val", masks=True)
    assert len(source) > 100 and len(source.class_names) == 7
    for i in range(0, len(source), 10):
        example = source[i]
        assert example.image.shape == (*example.mask.shape, 3)
        present = np.setdiff1d(np.unique(example.mask), [0, 255])
        np.testing.assert_array_equal(present, 1 + np.flatnonzero(example.tags[1:]))
    assert VocSource(voc_animals, "train")[0].mask is None
