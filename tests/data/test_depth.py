"""Pictures of more than 8 bits a channel: the same picture, whatever its depth and its format, or a refusal with the range."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from lcrf_jax.data.files.images import image_size, opened_as_rgb, read_image, read_turned_image
from lcrf_jax.data.files.masks import read_mask

GREY = np.random.default_rng(0).integers(0, 256, (6, 9), np.uint8)
GREY[0, 0] = 255
RGB = np.random.default_rng(1).integers(0, 256, (6, 9, 3), np.uint8)
RGB[0, 0] = 255
RGBA = np.concatenate([RGB, np.full((6, 9, 1), 255, np.uint8)], -1)


def as_rgb(grey):
    return np.repeat(grey[..., None], 3, -1)


def deep(values, bits):
    """8-bit values at another depth, with noise in what is below 8 bits."""
    noise = np.random.default_rng(2).integers(0, 1 << (bits - 8), values.shape) if bits > 8 else 0
    return ((values.astype(np.uint16) << (bits - 8)) + noise).astype(np.uint16)


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def save_deep_png(path, values, *, filtered=1):
    """A PNG of 16 bits a channel: Pillow writes no such colours."""
    height, width, bands = values.shape
    big = values.astype(">u2").view(np.uint8).reshape(height, -1)
    if filtered:  # Sub: each byte less that of the pixel before
        big = np.concatenate([big[:, :2 * bands], big[:, 2 * bands:] - big[:, :-2 * bands]], 1)
    rows = np.concatenate([np.full((height, 1), filtered, np.uint8), big], 1).tobytes()
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))


def save_deep_tiff(path, values, *, order="<", exif_turn=1, more=()):
    """A TIFF file of 16 bits a channel, not compressed."""
    height, width, bands = values.shape
    data = values.astype(f"{order}u2").tobytes()
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, bands, None), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 8),
               (274, 3, 1, exif_turn), (277, 3, 1, bands), (278, 4, 1, height), (279, 4, 1, len(data)), *more]  # fmt: skip
    at = 8 + len(data)
    body, extra_at = struct.pack(f"{order}H", len(entries)), at + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries):
        content = struct.pack(f"{order}I", extra_at if value is None else value) if kind == 4 or value is None else \
            struct.pack(f"{order}HH", value, 0)
        body += struct.pack(f"{order}HHI", tag, kind, count) + content
    body += struct.pack(f"{order}I", 0) + struct.pack(f"{order}{bands}H", *[16] * bands)
    path.write_bytes((b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, at) + data + body)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_of_any_true_depth(tmp_path, name, bits):
    Image.fromarray(deep(GREY, bits)).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), as_rgb(GREY))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_colours_of_any_true_depth(tmp_path, bits):
    for filtered in (0, 1):
        save_deep_png(tmp_path / "a.png", deep(RGB, bits), filtered=filtered)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)
    for order in "<>":
        save_deep_tiff(tmp_path / "a.tif", deep(RGB, bits), order=order)
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)
    save_deep_png(tmp_path / "a.png", deep(RGBA, bits))  # opaque at its own depth
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), RGB)
    with Image.open(io.BytesIO((tmp_path / "a.tif").read_bytes())) as image:  # no path to read a second time
        np.testing.assert_array_equal(opened_as_rgb(image, "a")[0], RGB)


def test_deep_colours_are_turned_like_any(tmp_path):
    save_deep_tiff(tmp_path / "a.tif", deep(RGB, 12), exif_turn=6)
    image, turn = read_turned_image(tmp_path / "a.tif")
    assert turn == 6 and image_size(tmp_path / "a.tif") == (9, 6)
    np.testing.assert_array_equal(image, np.rot90(RGB, -1))


def test_compressed_deep_colours(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", deep(RGB, 12), compression="zlib", photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)


def test_grey_with_transparency_of_few_bits_is_refused(tmp_path):
    save_deep_png(tmp_path / "a.png", deep(RGBA[..., 2:], 16))
    assert read_image(tmp_path / "a.png").shape == (6, 9, 3)
    save_deep_png(tmp_path / "a.png", deep(RGBA[..., 2:], 12))
    with pytest.raises(ValueError, match="a.png has 16 bits a channel, of which its colours, up to 4095, need fewer"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("most, expected", [(65535, GREY.astype(int) >> 4), (4095, GREY)])
def test_the_largest_value_that_a_file_states_counts(tmp_path, most, expected):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[281] = most
    Image.fromarray(deep(GREY, 12)).save(tmp_path / "a.tif", tiffinfo=tags)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), as_rgb(expected))


def test_formats_that_say_how_deep_they_are(tmp_path):
    dark = deep(GREY, 12) >> 3  # far from the largest value of 12 bits
    (tmp_path / "a.pgm").write_bytes(b"P5 9 6 4095\n" + dark.astype(">u2").tobytes())
    np.testing.assert_allclose(read_image(tmp_path / "a.pgm")[..., 0], GREY >> 3, atol=1)
    Image.fromarray(deep(GREY, 12)).save(tmp_path / "a.jp2", irreversible=False)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jp2"), as_rgb(GREY >> 4))


@pytest.mark.parametrize(
    "values",
    [GREY / np.float32(255), GREY.astype(np.float32), deep(GREY, 12).astype(np.float32), deep(GREY, 16).astype(np.int32)],
    ids=["0..1", "0..255", "whole", "int32"],
)
def test_floating_point_and_long_numbers(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), as_rgb(GREY))


@pytest.mark.parametrize(
    "value, message",
    [
        (np.float32("nan"), "holds values that are no numbers"),
        (np.float32("inf"), "holds values that are no numbers"),
        (np.float32(-0.5), "holds values from -0.5 to 255"),
        (np.float32(700.25), "holds values from 0 to 700.25; expected 0..1, 0..255, or whole numbers up to 65535"),
        (np.int32(-1000), "holds values from -1000 to 255"),
        (np.int32(70000), "holds values from 0 to 70000"),
    ],
)
def test_ranges_that_are_refused(tmp_path, value, message):
    values = GREY.astype(value.dtype)
    values[2, 3], values[2, 4] = value, 0
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif {message}"):
        read_image(tmp_path / "a.tif")


def test_white_is_zero(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(deep(255 - GREY, 16)).save(tmp_path / "a.tif", tiffinfo=tags)
    assert Image.open(tmp_path / "a.tif").tag_v2[262] == 0
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), as_rgb(GREY))


def test_thumbnails_in_a_file_are_no_photographs(tmp_path):
    full, small = Image.fromarray(RGB), Image.fromarray(RGB[:3, :4])
    full.save(tmp_path / "after.tif", save_all=True, append_images=[small])
    small.save(tmp_path / "before.tif", save_all=True, append_images=[full])
    Image.fromarray(RGB[::-1]).save(tmp_path / "pages.tif", save_all=True, append_images=[full])
    for name, expected in (("after", RGB), ("before", RGB), ("pages", RGB[::-1])):
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.tif"), expected)
        assert image_size(tmp_path / f"{name}.tif") == (6, 9)


@pytest.mark.parametrize("bits, most", [(1, 2), (2, 4), (4, 16), (8, 30)])
def test_masks_of_few_bits_hold_the_numbers_that_are_stored(tmp_path, bits, most):
    labels = np.arange(48, dtype=np.uint8).reshape(6, 8) % most
    packed = np.packbits(np.unpackbits(labels[..., None], axis=-1)[..., 8 - bits:].reshape(6, -1), axis=-1)
    rows = np.concatenate([np.zeros((6, 1), np.uint8), packed], 1).tobytes()
    for kind, palette in ((0, b""), (3, png_chunk(b"PLTE", bytes(range(3 * most))))):
        head = struct.pack(">IIBBBBB", 8, 6, bits, kind, 0, 0, 0)
        (tmp_path / "a.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + palette + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
        )
        np.testing.assert_array_equal(read_mask(tmp_path / "a.png", most), labels)


def test_masks_of_16_bits_in_either_order(tmp_path):
    labels = np.arange(48).reshape(6, 8) % 3
    for mode, kind in (("I;16", "<u2"), ("I;16B", ">u2")):
        Image.frombytes(mode, (8, 6), labels.astype(kind).tobytes()).save(tmp_path / "a.tif")
        np.testing.assert_array_equal(read_mask(tmp_path / "a.tif", 3), labels)


def test_palettes_that_were_numbered_anew(tmp_path):
    labels = np.zeros((6, 8), np.uint8)
    labels[2:, 2:], labels[4:, 4:] = 2, 255
    Image.fromarray(labels).save(tmp_path / "a.gif")  # its palette is black, 2, 255: 0, 1, 2 in the file
    np.testing.assert_array_equal(read_mask(tmp_path / "a.gif", 3), labels)
    packed = Image.fromarray(np.searchsorted([0, 2, 255], labels).astype(np.uint8)).convert("P")
    packed.putpalette([value for value in (0, 2, 255) for _ in range(3)])
    packed.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a.png: its numbers \[0, 1, 2\] have the greys \[0, 2, 255\]"):
        read_mask(tmp_path / "a.png", 3)
    packed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    packed.save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="a.gif: GIF files may number their colours anew"):
        read_mask(tmp_path / "a.gif", 3)
    packed.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png", 3).max() == 2
    packed.putpalette([255] * 3 + [0] * 3 + [128] * 3)  # greys to look at, which are no labels
    packed.save(tmp_path / "a.png")
    assert read_mask(tmp_path / "a.png", 3).max() == 2


def test_masks_where_white_is_zero_are_refused(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / "a.tif", tiffinfo=tags)
    with pytest.raises(ValueError, match="a.tif: 0 is white in this file"):
        read_mask(tmp_path / "a.tif", 3)
