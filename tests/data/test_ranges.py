"""Values that overshoot their range, ranges that are not clear, and files that state their largest value."""

import numpy as np
import pytest
from PIL import Image
from test_depth import GREY, as_rgb, deep, save_deep_tiff

from lcrf_jax.data.files.images import is_photograph, read_image
from lcrf_jax.data.files.masks import read_mask
from lcrf_jax.data.sources.listing import scan_folder

UNIT = GREY / np.float32(255)


@pytest.mark.parametrize("top", [np.nextafter(np.float32(1), np.float32(2)), 1.02, 2])
def test_fractions_that_overshoot_1_are_clipped(tmp_path, top):
    values = UNIT.copy()
    values[0, 0] = top
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), as_rgb(GREY))


def test_bytes_as_fractions_that_overshoot_255_are_clipped(tmp_path):
    values = GREY.astype(np.float32)
    values[0, 0], values[0, 1] = 255.6, GREY[0, 1] + 0.2
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), as_rgb(GREY))


@pytest.mark.parametrize("top", [2.1, 3.7, 15.9, 256.5])
def test_fractions_of_no_clear_range_are_refused(tmp_path, top):
    values = UNIT.copy()
    values[0, 0] = top
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=f"a.tif holds values from 0.* to {top}; expected 0..1, 0..255, or whole"):
        read_image(tmp_path / "a.tif")


def test_portable_float_maps_of_any_range(tmp_path):
    for values in (UNIT, GREY, deep(GREY, 12)):
        (tmp_path / "a.pfm").write_bytes(b"Pf\n9 6\n-1.0\n" + np.flipud(values).astype("<f4").tobytes())
        np.testing.assert_array_equal(read_image(tmp_path / "a.pfm"), as_rgb(GREY))


def test_inks_of_16_bits_are_read_or_refused(tmp_path):
    inks = np.repeat(GREY[..., None], 4, -1)
    for bits in (16, 12):
        save_deep_tiff(tmp_path / "a.tif", deep(inks, bits))
        data = bytearray((tmp_path / "a.tif").read_bytes())
        at = data.index(b"\x06\x01\x03\x00\x01\x00\x00\x00\x02")
        data[at + 8] = 5  # separated
        (tmp_path / "a.tif").write_bytes(data)
        if bits == 16:
            expected = np.array(Image.fromarray(inks, "CMYK").convert("RGB"))
            np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), expected)
    with pytest.raises(ValueError, match="a.tif has 16 bits a channel, of which its colours, up to 4095, need fewer"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("most", [1, 2, 20, 254, 255, 4095, 65535])
def test_masks_of_netpbm_hold_the_numbers_that_are_stored(tmp_path, most):
    labels = np.arange(54).reshape(6, 9) % min(most + 1, 21)
    stored = labels.astype(">u2" if most > 255 else "u1").tobytes()
    (tmp_path / "a.pgm").write_bytes(f"P5\n9 6\n{most}\n".encode() + stored)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.pgm", 21), labels)
    (tmp_path / "a.pgm").write_text(f"P2\n9 6\n{most}\n" + " ".join(map(str, labels.ravel())))
    np.testing.assert_array_equal(read_mask(tmp_path / "a.pgm", 21), labels)


def test_records_of_sports_and_icons_are_no_photographs(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.fromarray(as_rgb(GREY)).save(tmp_path / "cat" / "a.png")
    for name in ("run.fit", "folder.ico", "favicon.ICO"):
        (tmp_path / "cat" / name).write_bytes(b"\x0e\x10.FIT")
    found = scan_folder(tmp_path)
    assert found.images == ("cat/a.png",) and not found.problems and is_photograph("a.fits")
    assert "2 .ico (icons; save them as PNG), 1 .fit (records of sports" in found.not_taken
