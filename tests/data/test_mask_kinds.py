"""Masks that were erased in part, greys that are colours, and black and white masks."""

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data.files.masks import read_mask, refuse_black_and_white

COLOURS = {(0, 0, 0): 0, (255, 0, 0): 1, (255, 255, 255): 2, (128, 128, 128): 3, (2, 2, 2): 1, (1, 1, 1): 1}
LABELS = np.array([[0, 1, 2], [0, 2, 1]], np.uint8)


def rgba(alpha):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[LABELS == 1, :3], pixels[LABELS == 2, :3] = (255, 0, 0), 255
    pixels[..., 3] = 255
    pixels[1, 1:, 3] = alpha
    return Image.fromarray(pixels)


def test_what_was_erased_is_background(tmp_path):
    path, expected = tmp_path / "a.png", LABELS.copy()
    expected[1, 1:] = 0
    rgba(0).save(path)
    np.testing.assert_array_equal(read_mask(path, 4, colours=COLOURS), expected)
    odd = np.array(rgba(0))
    odd[1, 1, :3] = 7, 8, 9  # what lies under it is not looked at
    Image.fromarray(odd).save(path)
    np.testing.assert_array_equal(read_mask(path, 4, colours=COLOURS), expected)
    rgba(255).save(path)
    np.testing.assert_array_equal(read_mask(path, 4, colours=COLOURS), LABELS)
    rgba(254).save(path)
    with pytest.raises(ValueError, match=r"a.png: the pixel at row 1, column 1 is transparent in part \(33.33% of the pixels are\); save"):
        read_mask(path, 4, colours=COLOURS)


@pytest.mark.parametrize("clear, expected", [(1, [[0, 0, 2], [0, 2, 0]]), (bytes([255, 255, 0]), [[0, 1, 0], [0, 0, 1]]), (bytes([0]), LABELS)])
def test_palettes_that_are_transparent(tmp_path, clear, expected):
    image = Image.fromarray(LABELS, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 255, 255, 255])
    image.save(tmp_path / "a.png", transparency=clear)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", 4, colours=COLOURS), expected)
    if expected is LABELS:  # the background alone
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png", 4), LABELS)
    else:
        with pytest.raises(ValueError, match=r"a.png: its number [12] is transparent, which may mean erased; save"):
            read_mask(tmp_path / "a.png", 4)


def test_a_grey_that_is_transparent(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "a.png", transparency=0)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", 4), LABELS)
    Image.fromarray(LABELS).save(tmp_path / "a.png", transparency=2)
    with pytest.raises(ValueError, match="a.png: its number 2 is transparent"):
        read_mask(tmp_path / "a.png", 4)


@pytest.mark.parametrize("greys, expected", [([0, 255, 255], [0, 2, 2]), ([0, 128, 255], [0, 3, 2]), ([0, 1, 1], [0, 1, 1]),
                                             ([0, 3, 1], [0, 3, 1]), ([0, 0, 0], [0, 0, 0])])  # fmt: skip
def test_greys_are_colours_where_all_are_named(tmp_path, greys, expected):
    Image.fromarray(np.array([greys], np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", 4, colours=COLOURS), [expected])


def test_black_and_white_of_one_bit_are_colours(tmp_path):
    Image.fromarray(LABELS == 2).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", 4, colours=COLOURS), 2 * (LABELS == 2))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png", 4), LABELS == 2)


def test_greys_that_may_be_indices_or_colours_are_refused(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: its greys \[0, 1, 2\] may be indices, and are colours of other classes in colours.csv"):
        read_mask(tmp_path / "a.png", 4, colours=COLOURS)


def test_small_objects_in_white_are_refused_where_most_masks_are_black_and_white(tmp_path):
    mask, tags = np.zeros((20, 20), np.uint8), np.array([True, True])
    mask[:2, :3] = 255
    path = tmp_path / "a.png"
    Image.fromarray(mask).save(path)
    refuse_black_and_white(mask, tags, path)  # alone it may be an object too small to be judged
    Image.fromarray(mask * 0).save(tmp_path / "0.png")
    refuse_black_and_white(mask, tags, path)
    for name in ("b.png", "c.png"):
        Image.fromarray(mask).save(tmp_path / name)
        with pytest.raises(ValueError, match=r"a.png: holds only 0 and 255 although the image has tags"):
            refuse_black_and_white(mask, tags, path)
        refuse_black_and_white(mask, np.array([True, False]), path)
    mask[5, 5] = 1
    for name in ("b.png", "c.png"):
        Image.fromarray(mask).save(tmp_path / name)
    refuse_black_and_white(np.where(mask == 1, 0, mask), tags, path)
