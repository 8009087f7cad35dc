"""Seeded views of an image: which part of it, mirrored or not, and the same part of any map of it.

A view is a box in fractions of the image and a flip, so one view applies alike to a photograph, to its
mask and to a map of features or evidence at any stride. Pixel i of n covers [i / n, (i + 1) / n]: samples
lie at half-integer centres, and nothing shifts when the resolution changes.

The views of an image are numbered. 0 is the whole image, 1 the whole image mirrored, 2 and up are random
crops, each fixed by (seed, index, number). A fixed number of views can therefore be cached.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

_VIEW_SEED = 0x71E3


class View(NamedTuple):
    """A part of an image.

    Attributes:
      box: (top, left, height, width) in fractions of the image's height and width.
      flip: whether left and right are exchanged, after cropping.
    """

    box: tuple[float, float, float, float]
    flip: bool


FULL = View((0.0, 0.0, 1.0, 1.0), False)
MIRRORED = View((0.0, 0.0, 1.0, 1.0), True)


def sample_view(
    seed: int,
    index: int,
    view_number: int,
    *,
    scale_range: tuple[float, float] = (0.4, 1.0),
    ratio_range: tuple[float, float] = (0.75, 4 / 3),
) -> View:
    """A view of an image, by its number.

    Args:
      seed: 0 or more.
      index: index of the image, 0 or more.
      view_number: 0 whole, 1 mirrored, 2 and up a random crop, mirrored every second time on average.
      scale_range: least and greatest area of a crop, as a share of the image, in (0, 1].
      ratio_range: least and greatest width / height of a crop in units of the image's own; positive.
    Returns:
      The view. It depends on the arguments alone.
    Raises:
      ValueError: if a number is negative, or a range is empty or out of bounds.
    References:
      Szegedy et al. 2015, Going deeper with convolutions (crops of random area and aspect).
    """
    if min(seed, index, view_number) < 0:
        raise ValueError(f"seed, index and view_number must be 0 or more, got {seed}, {index}, {view_number}")
    if not 0 < scale_range[0] <= scale_range[1] <= 1:
        raise ValueError(
            f"scale_range must be 0 < least <= greatest <= 1, a share of the area, got {scale_range}"
        )
    if not 0 < ratio_range[0] <= ratio_range[1] < math.inf:
        raise ValueError(f"ratio_range must be 0 < least <= greatest, width over height, got {ratio_range}")
    if view_number < 2:
        return (FULL, MIRRORED)[view_number]
    words = [_VIEW_SEED, seed, index, view_number]
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words))).random(5).tolist()
    area = scale_range[0] + (scale_range[1] - scale_range[0]) * draw[0]
    least, greatest = (math.log(ratio) for ratio in ratio_range)
    ratio = math.exp(least + (greatest - least) * draw[1])
    ratio = min(max(ratio, area), 1 / area)  # both sides at most 1
    height, width = math.sqrt(area / ratio), math.sqrt(area * ratio)
    height, width = min(height, 1.0), min(width, 1.0)
    return View(((1 - height) * draw[2], (1 - width) * draw[3], height, width), draw[4] < 0.5)


def apply_view(image: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """The part of an image, or of a map of it, that the view shows, at a given size.

    A uint8 image goes through Pillow's antialiased bilinear filter. A float map is sampled bilinearly at
    the centres of the output's pixels, with the border repeated, and without antialiasing: it is meant
    for maps of about the output's resolution.

    Args:
      image: [H, W, C] uint8 with C = 3, or [h, w, K] floating point.
      view: which part.
      size: (height, width) of the output in pixels; the aspect is not kept.
    Returns:
      [height, width, C] of the same dtype.
    Raises:
      ValueError: if the shape, the dtype, the box or the size is not one of these.
    """
    image = np.asarray(image)
    _check_geometry(image, view, size, ndim=3)
    if image.dtype == np.uint8:
        if image.shape[2] != 3:
            raise ValueError(f"a uint8 image must be [H, W, 3], got {image.shape}; give maps as floats")
        out = _resize(
            Image.fromarray(np.ascontiguousarray(image)), image.shape, view, size, Image.Resampling.BILINEAR
        )
    elif np.issubdtype(image.dtype, np.floating):
        out = _sample(
            _sample(image, 0, view.box[0], view.box[2], size[0]), 1, view.box[1], view.box[3], size[1]
        )
        out = out.astype(image.dtype, copy=False)
    else:
        raise ValueError(
            f"expected a uint8 image or a floating-point map, got {image.dtype}; "
            "use apply_view_to_mask for class indices"
        )
    return np.ascontiguousarray(out[:, ::-1]) if view.flip else out


def apply_view_to_mask(mask: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """The part of a mask of class indices that the view shows, by nearest neighbour.

    Args:
      mask: [H, W] uint8 class indices.
      view: which part.
      size: (height, width) of the output in pixels.
    Returns:
      [height, width] uint8; no index occurs that is not in the mask.
    Raises:
      ValueError: if the shape, the dtype, the box or the size is not one of these.
    """
    mask = np.asarray(mask)
    _check_geometry(mask, view, size, ndim=2)
    if mask.dtype != np.uint8:
        raise ValueError(f"expected uint8 class indices, got {mask.dtype}")
    rows = _nearest(mask.shape[0], view.box[0], view.box[2], size[0])
    columns = _nearest(mask.shape[1], view.box[1], view.box[3], size[1])
    return mask[rows[:, None], columns[::-1] if view.flip else columns]


def _check_geometry(image: np.ndarray, view: View, size: tuple[int, int], *, ndim: int) -> None:
    """Rejects what has no pixels to show."""
    if image.ndim != ndim or 0 in image.shape:
        expected = "[height, width, channels]" if ndim == 3 else "[height, width]"
        raise ValueError(f"expected one image {expected} with at least one pixel, got {image.shape}")
    top, left, height, width = view.box
    inside = min(top, left) >= 0 and top + height <= 1 + 1e-6 and left + width <= 1 + 1e-6
    if not (inside and height > 0 and width > 0):
        raise ValueError(
            f"expected a box (top, left, height, width) within 0 .. 1, got {view.box}; "
            "a box is in fractions of the image, not in pixels"
        )
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected size=(height, width) of at least one pixel, got {size}")


def _resize(
    image: Image.Image, shape: tuple[int, ...], view: View, size: tuple[int, int], how: int
) -> np.ndarray:
    """Pillow's resize of a box in fractions."""
    top, left, height, width = view.box
    rows, columns = shape[:2]
    box = (
        left * columns,
        top * rows,
        min((left + width) * columns, columns),
        min((top + height) * rows, rows),
    )
    return np.array(image.resize((size[1], size[0]), how, box=box))


def _centres(length: int, start: float, extent: float, num_samples: int) -> np.ndarray:
    """Positions of the output's pixel centres, in input pixels counted from the first one's centre."""
    return (start + (np.arange(num_samples) + 0.5) / num_samples * extent) * length - 0.5


def _nearest(length: int, start: float, extent: float, num_samples: int) -> np.ndarray:
    """Index of the input pixel that holds each output pixel's centre."""
    return np.clip(
        np.floor(_centres(length, start, extent, num_samples) + 0.5).astype(np.intp), 0, length - 1
    )


def _sample(values: np.ndarray, axis: int, start: float, extent: float, num_samples: int) -> np.ndarray:
    """Linear interpolation along one axis."""
    length = values.shape[axis]
    at = np.clip(_centres(length, start, extent, num_samples), 0, length - 1)
    below = np.minimum(np.floor(at).astype(np.intp), max(length - 2, 0))
    above = np.minimum(below + 1, length - 1)
    shape = [1] * values.ndim
    shape[axis] = num_samples
    weight = (at - below).astype(np.float32 if values.dtype.itemsize < 8 else np.float64).reshape(shape)
    return np.take(values, below, axis) * (1 - weight) + np.take(values, above, axis) * weight
