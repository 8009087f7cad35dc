"""Overlays: colours that stay apart for readers who are blind to some, outlines, and what a Labelling draws and writes."""

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.pictures.palette import bright_palette, index_picture, overlay, palette
from lcrf_jax.predict.model import Labelling, as_rgb

# What of linear RGB is seen without one kind of cone: Machado, Oliveira and Fernandes 2009, severity 1.
SEEN = {
    "all cones": np.eye(3),
    "no long": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no medium": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no short": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
XYZ = np.array(((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)))


def lab(colours, cones):
    """CIE Lab of sRGB colours as they are seen."""
    shares = np.asarray(colours) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    white = np.clip(linear @ np.array(SEEN[cones]).T, 0, 1) @ XYZ.T / XYZ.sum(axis=1)
    x, y, z = np.where(white > 0.008856, np.cbrt(white), 7.787 * white + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def least_difference(colours, cones):
    seen = lab(colours, cones)
    apart = np.linalg.norm(seen[:, None] - seen, axis=-1)
    return apart[~np.eye(len(seen), dtype=bool)].min()


@pytest.mark.parametrize(("cones", "least"), [("all cones", 14), ("no long", 13), ("no medium", 13), ("no short", 7)])
def test_bright_colours_stay_apart_and_are_bright(cones, least):
    colours = bright_palette(25)[1:]
    assert least_difference(colours, cones) > least
    assert lab(colours, "all cones")[:, 0].min() > 40
    assert least_difference(palette(25)[1:], "no medium") < 7 and lab(palette(25)[1:], "all cones")[:, 0].min() < 15  # those of VOC


def test_bright_colours_of_many_classes():
    colours = bright_palette(256)
    assert colours.dtype == np.uint8 and len(np.unique(colours, axis=0)) == 256
    np.testing.assert_array_equal(colours[[0, 255]], palette(256)[[0, 255]])
    np.testing.assert_array_equal(bright_palette(30), colours[:30])
    with pytest.raises(ValueError, match="num_classes in 1..256"):
        bright_palette(0)


def test_an_outline_is_as_wide_as_it_is_asked_for_and_stays_inside():
    image, labels = np.zeros((12, 12, 3), np.uint8), np.zeros((12, 12), int)
    labels[2:10, 2:10] = 1
    full = bright_palette(2)[1]
    for width in (0, 1, 2, 3, 9):
        drawn = overlay(image, labels, 0.5, outline=width)
        inner = np.zeros((12, 12), bool)
        inner[2 + width : 10 - width, 2 + width : 10 - width] = True
        expected = np.where(inner[..., None], np.round(full / 2), np.where((labels == 1)[..., None], full, 0))
        np.testing.assert_array_equal(drawn, expected)
    with pytest.raises(ValueError, match="outline of 0 pixels or more, got -1"):
        overlay(image, labels, outline=-1)


def test_the_outline_grows_with_the_photograph():
    labels = np.zeros((8, 800), int)
    labels[:, 400:] = 1
    drawn = overlay(np.zeros((8, 800, 3), np.uint8), labels)
    assert (drawn[4] == bright_palette(2)[1]).all(axis=-1).sum() == 4


def test_colours_of_ones_own():
    image, labels = np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), int)
    assert (overlay(image, labels, 1, colours=palette(256)) == (128, 0, 0)).all()
    with pytest.raises(ValueError, match=r"colours \[256, 3\], one for each label, got \[1, 3\]"):
        overlay(image, labels, colours=palette(1))
    assert index_picture(labels, bright_palette(256)).getpalette()[3:6] == bright_palette(2)[1].tolist()


@pytest.fixture
def found():
    labels = np.zeros((6, 8), np.uint8)
    labels[:, 4:6] = 2
    confidence = np.full((6, 8), 0.75, np.float16)
    image = np.full((6, 8, 3), 90, np.uint8)
    return Labelling(labels, confidence, np.zeros((6, 8, 3), np.float32), ("background", "cat", "dog"), bright_palette(3), image)


def test_a_labelling_draws_itself(found):
    drawn = found.overlay(alpha=0.25, outline=0)
    assert isinstance(drawn, Image.Image) and drawn.size == (8, 6)
    np.testing.assert_array_equal(np.asarray(drawn), overlay(found.image, found.labels, 0.25, outline=0))


@pytest.mark.parametrize(("words", "message"), [
    ({"outline": 1.5}, "outline of whole pixels, got 1.5; round it"),
    ({"outline": "x"}, "outline of 0 pixels or more, got 'x'; 0 draws none"),
    ({"outline": float("nan")}, "outline of 0 pixels or more, got nan"),
    ({"alpha": "x"}, r"alpha in 0\.\.1, got 'x'; 0 shows the image alone"),
    ({"alpha": None}, r"alpha in 0\.\.1, got None"),
    ({"alpha": float("nan")}, r"alpha in 0\.\.1, got nan"),
])
def test_what_cannot_be_drawn_is_told(found, words, message):
    with pytest.raises(ValueError, match=message):
        found.overlay(**words)


def test_an_outline_wider_than_the_picture_fills_its_objects(found):
    wide = np.asarray(found.overlay(outline=10**12))
    np.testing.assert_array_equal(wide, np.asarray(found.overlay(outline=2.0)))
    assert (wide[:, 4:6] == bright_palette(3)[2]).all()


def test_a_labelling_is_written_as_indices(found, tmp_path):
    found.save(tmp_path / "mask.png")
    with Image.open(tmp_path / "mask.png") as read:
        np.testing.assert_array_equal(np.asarray(read), found.labels)
    with pytest.raises(ValueError, match=r"mask\.jpg: expected a name that ends with \.png.*overlay\(\)\.save"):
        found.save(tmp_path / "mask.jpg")
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name/mask.png: there is no home folder"):
        found.save("~nobody-of-this-name/mask.png")
    assert [path.name for path in tmp_path.iterdir()] == ["mask.png"]


def test_a_labelling_says_what_was_found(found):
    assert repr(found) == "<Labelling, 6 x 8: background 75 %, dog 25 %; mean confidence 0.75>"


def test_a_labelling_says_of_labels_that_they_are_no_class(found):
    labels = np.where(found.labels == 2, np.uint8(255), found.labels)
    assert "background 75 %, 255 (no class) 25 %" in repr(found._replace(labels=labels))


def test_masked_arrays_are_refused():
    image, labels = np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), np.uint8)
    with pytest.raises(TypeError, match=r"expected labels without a mask, .* \.filled\(255\) for void"):
        overlay(image, np.ma.masked_array(labels, labels == 1))
    with pytest.raises(TypeError, match="expected an image without a mask"):
        overlay(np.ma.masked_array(image), labels)
    with pytest.raises(TypeError, match="expected an image without a mask"):
        as_rgb(np.ma.masked_array(image))
