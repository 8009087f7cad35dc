"""Pictures of more than 8 bits a channel as 8 bits, by the depth that their values have.

A 16-bit file may hold 10, 12 or 14 true bits; read as 16 it would be nearly black. The rule: the depth is the smallest of 8,
10, 12, 14 and 16 bits that holds the largest value of the picture, or the largest that a TIFF file states for its values,
and the highest 8 of these bits count. Formats that say how deep they are, PNM, JPEG 2000 and 12-bit TIFF, are taken at their
word. Floating-point pictures are in 0..1, where up to 2 counts as an overshoot and becomes 1, in 0..255, or whole numbers
that go by the rule; any other range is refused.
"""

from __future__ import annotations

import io
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image

DEPTHS = (8, 10, 12, 14, 16)
_BITS, _PHOTOMETRIC, _MAX, _SMAX = 258, 262, 281, 341  # tags of TIFF
_OVERSHOOT, _CLEAR = 2, 16  # fractions up to the one are in 0..1, and from the other on in 0..255
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class Stated(NamedTuple):
    """What a file says of its values before they are decoded.

    Attributes:
      raw: how Pillow unpacks a pixel, such as ``RGB;16B``; empty if it is decoded already.
      depth: bits of a value, or None if they are to be found from the values.
      largest: the largest value that the file states, or None.
      white_is_zero: whether 0 is white.
    """

    raw: str
    depth: int | None
    largest: float | None
    white_is_zero: bool


def stated(image: Image.Image) -> Stated:
    """What the head of an opened image says of its values.

    Args:
      image: a Pillow image, before ``load``.
    Returns:
      Stated.
    """
    raw = _raw_mode(image)
    if image.format in ("PPM", "JPEG2000") and image.mode != "F":  # Pillow scales both to 16 bits, but PFM
        return Stated(raw, 16, _largest_of_pnm(image), False)
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return Stated(raw, None, None, False)
    bits = tags.get(_BITS, (16,))
    numbers = [number for tag in (_SMAX, _MAX) for number in np.ravel(tags.get(tag, ())).tolist()]
    largest = max((number for number in numbers if isinstance(number, int | float) and np.isfinite(number)), default=None)
    depth = bits[0] if raw == "I;12" and bits else None
    return Stated(raw, depth, largest, tags.get(_PHOTOMETRIC) == 0)


def grey_bytes(values: np.ndarray, said: Stated, name: object) -> np.ndarray:
    """Grey values of any depth as bytes.

    Args:
      values: [H, W], integers or floating-point numbers.
      said: what the file says of them.
      name: the file, for messages.
    Returns:
      [H, W] uint8.
    Raises:
      ValueError: if their range is none of those of the rule; the message has the range.
    """
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} holds values that are no numbers (NaN or infinite); write numbers in 0..1 or 0..255")
    top = max(high, said.largest or 0)
    whole = not np.issubdtype(values.dtype, np.floating) or (top > 1 and not (values % 1).any())
    if low < 0 or top > 65535 or (not whole and (top >= 256 or _OVERSHOOT < top < _CLEAR)):
        raise ValueError(
            f"{name} holds values from {low:.6g} to {high:.6g}; expected 0..1, 0..255, or whole numbers up to 65535: "
            "scale them and save the picture with 8 or 16 bits"
        )
    if whole:
        result = _shifted(values, said.depth or _depth(int(top)))
    else:
        result = np.rint(np.minimum(values * (255.0 if top <= _OVERSHOOT else 1.0), 255)).astype(np.uint8)
    return 255 - result if said.white_is_zero else result


def colour_bytes(image: Image.Image, source: str | io.BytesIO, said: Stated, name: object) -> Image.Image:
    """A colour image of 16 bits a channel, of which Pillow has read the higher 8, scaled by its true depth.

    Args:
      image: the loaded image.
      source: the file to read the lower 8 bits from, a path or its bytes.
      said: what the file says of its values.
      name: the file, for messages.
    Returns:
      The image itself if its values need all 16 bits, else another one of its size, mode and info.
    Raises:
      ValueError: if its values need fewer bits, and the lower ones cannot be read.
    """
    bands = np.asarray(image)
    has_ink = image.mode not in ("RGB", "RGBA")  # a light picture has little ink at any depth
    colours = bands if has_ink else bands[..., :3]
    top = int(colours.max()) if colours.size else 255
    if said.depth is not None or top >= 64 or (said.largest or 0) >= 1 << 14:
        return image
    try:
        if has_ink:
            raise ValueError(f"{image.mode} of few bits")
        low = _lower_bytes(source, image)
    except (OSError, SyntaxError, ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"{name} has 16 bits a channel, of which its colours, up to {top * 256 + 255}, need fewer; save it with 8 bits"
        ) from error
    values = (bands.astype(np.uint16) << 8) | low
    parts = [_shifted(part, _depth(int(part.max()))) for part in (values[..., :3], values[..., 3:]) if part.size]
    scaled = Image.fromarray(np.concatenate(parts, axis=-1), image.mode)
    scaled.info = dict(image.info)
    return scaled


def needs_lower_bytes(image: Image.Image, said: Stated) -> bool:
    """Whether Pillow leaves out the lower half of the values of an image.

    Args:
      image: a Pillow image.
      said: what its file says of its values.
    Returns:
      True or False.
    """
    return ";16" in said.raw and len(image.getbands()) > 1


def index_values(image: Image.Image, said: Stated) -> np.ndarray:
    """The stored numbers of a grey or palette image: what Pillow spreads over 0..255 or 0..65535, undone.

    It does so with those of 2 and 4 bits, and with PNM files that state another largest value.

    Args:
      image: the loaded image.
      said: what its file says of its values.
    Returns:
      [H, W] int64.
    Raises:
      ValueError: if 0 is white: some programs then write indices as they are, others invert them.
    """
    if said.white_is_zero and image.mode in ("1", "L"):
        raise ValueError("0 is white in this file, so that its numbers may be inverted; save it as PNG")
    numbers = np.array(image).astype(np.int64)
    if image.format == "PPM" and said.largest is not None:
        full = 65535 if image.mode == "I" else 255
        return np.rint(numbers * (said.largest / full)).astype(np.int64)
    return numbers // {"L;2": 85, "L;4": 17}.get(said.raw[:3], 1)


def _raw_mode(image: Image.Image) -> str:
    """How the first piece of an image is unpacked."""
    for _, _, _, args in getattr(image, "tile", ())[:1]:
        first = args[0] if isinstance(args, tuple) and args else args
        return first if isinstance(first, str) else ""
    return ""


def _largest_of_pnm(image: Image.Image) -> float | None:
    """The largest value that the head of a PNM file states, None where Pillow takes the values as they are."""
    for _, _, _, args in getattr(image, "tile", ())[:1]:
        if image.format == "PPM" and isinstance(args, tuple) and isinstance(args[-1], int):
            return args[-1]
    return None


def _depth(top: int) -> int:
    return next(depth for depth in DEPTHS if top < 1 << depth)


def _shifted(values: np.ndarray, depth: int) -> np.ndarray:
    integers = values if np.issubdtype(values.dtype, np.integer) else values.astype(np.int64)
    return np.minimum(integers >> (depth - 8), 255).astype(np.uint8)


def _lower_bytes(source: str | io.BytesIO, like: Image.Image) -> np.ndarray:
    """The lower bytes of 16-bit values: read as if their bytes were in the other order."""
    with Image.open(source, formats=[like.format or ""]) as image:
        image.seek(like.tell())
        image.tile = [tile._replace(args=_other_order(tile.args)) for tile in image.tile]
        if not image.tile:
            raise ValueError("no pixels to decode")
        image.load()
        if image.mode != like.mode:
            raise ValueError("another mode")
        return np.asarray(image).astype(np.uint16)


def _other_order(args):
    raw = args[0] if isinstance(args, tuple) else args
    if not raw.endswith((";16L", ";16B", ";16N")):
        raise ValueError(f"unknown raw mode {raw}")
    raw = raw[:-1] + _OTHER_ORDER[raw[-1]]
    return (raw, *args[1:]) if isinstance(args, tuple) else raw
