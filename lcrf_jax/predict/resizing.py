"""From the grid of the network to the pixels of an image, and sizes that many images share."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from PIL import Image

_SIZE_STEP = 64
_STRIP_PIXELS = 1 << 20


def labels_of(log_probs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The most probable class of every pixel, in little memory for large images.

    Args:
      log_probs: [h, w, K] log-probabilities.
      size: (H, W) in pixels; where it differs from (h, w) the log-probabilities are interpolated, bilinearly.

    Returns:
      [H, W] uint8.
    """
    labels = np.empty(size, np.uint8)
    for strip, values in _strips(log_probs, size):
        labels[strip] = values.argmax(axis=-1)
    return labels


def labels_and_confidence(log_probs: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The most probable class of every pixel and its probability, in little memory for large images.

    Args:
      log_probs: [h, w, K] log-probabilities.
      size: (H, W) in pixels, as for `labels_of`.

    Returns:
      ([H, W] uint8, [H, W] float16 in 0..1).
    """
    labels, confidence = np.empty(size, np.uint8), np.empty(size, np.float16)
    for strip, values in _strips(log_probs, size):
        best = values.argmax(axis=-1)
        labels[strip] = best
        top = np.take_along_axis(values, best[..., None], axis=-1)
        confidence[strip] = 1 / np.exp(values - top).sum(axis=-1)
    return labels, confidence


def _strips(log_probs, size):
    """Slices of rows, and the log-probabilities there."""
    columns = None if log_probs.shape[1] == size[1] else _neighbours(log_probs.shape[1], size[1])
    rows = None if log_probs.shape[0] == size[0] else _neighbours(log_probs.shape[0], size[0])
    step = max(1, _STRIP_PIXELS // size[1])
    for start in range(0, size[0], step):
        strip = slice(start, min(start + step, size[0]))
        values = log_probs[strip] if rows is None else _interpolated(log_probs, [part[strip] for part in rows], 0)
        yield strip, values if columns is None else _interpolated(values, columns, 1)


def class_statistics(
    labels: np.ndarray, confidence: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Area and confidence of each class of an image, in little memory for large ones.

    Args:
      labels: [H, W] class indices.
      confidence: [H, W] probability of each pixel's label.
      num_classes: K.

    Returns:
      ([K] int64 number of pixels, [K] float64 sum of their confidence).
    """
    counts, sums = np.zeros(num_classes, np.int64), np.zeros(num_classes)
    step = max(1, _STRIP_PIXELS // labels.shape[1])
    for start in range(0, len(labels), step):
        strip = labels[start : start + step].ravel()
        counts += np.bincount(strip, minlength=num_classes)
        sums += np.bincount(strip, np.float64(confidence[start : start + step].ravel()), minlength=num_classes)
    return counts, sums


def interpolated_probs(log_probs: ArrayLike, size: tuple[int, int]) -> np.ndarray:
    """Probabilities at another size, from log-probabilities interpolated bilinearly.

    Args:
      log_probs: [h, w, K] log-probabilities.
      size: (H, W) in pixels.

    Returns:
      [H, W, K] float32, summing to one over the classes.
    """
    resized = resized_map(log_probs, size)
    probs = np.exp(resized - resized.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)


def _neighbours(cells, pixels):
    """For each pixel the cell before it, the cell after it and the share of the latter."""
    centres = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    before = np.minimum(centres.astype(np.int64), max(cells - 2, 0))
    return before, np.minimum(before + 1, cells - 1), (centres - before).astype(np.float32)


def _interpolated(values, neighbours, axis):
    before, after, share = neighbours
    share = share.reshape(-1, *[1] * (values.ndim - axis - 1))
    return values.take(before, axis) * (1 - share) + values.take(after, axis) * share


@jax.jit
def enlarged_grid(log_probs: ArrayLike, rows: ArrayLike, columns: ArrayLike) -> jax.Array:
    """Log-probabilities at the pixels of an image, compiled.

    Args:
      log_probs: [h, w, K] on the grid of the network.
      rows: [H, h], see `interpolation_weights`.
      columns: [W, w], the same.

    Returns:
      [H, W, K] float32.
    """
    logits = jnp.einsum("Hh,hwk,Ww->HWk", rows, log_probs, columns, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.log_softmax(logits, axis=-1)


def interpolation_weights(cells: int, pixels: int, padded: int) -> np.ndarray:
    """Bilinear weights that bring a row of cells to a row of pixels, both spanning the image.

    Args:
      cells: number of cells.
      pixels: number of pixels of the image.
      padded: rows of the result, at least `pixels`; the rest repeats the last pixel.

    Returns:
      [padded, cells] float32, rows sum to one.
    """
    centres = (np.minimum(np.arange(padded), pixels - 1) + 0.5) * cells / pixels - 0.5
    centres = np.clip(centres, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(cells)[None, :])).astype(np.float32)


def padded_to(size: int) -> int:
    """The next multiple of 64, so that images of similar size share one compilation."""
    return max(1, math.ceil(size / _SIZE_STEP)) * _SIZE_STEP


def resized_map(values: ArrayLike, size: tuple[int, int]) -> np.ndarray:
    """A map over an image at another resolution, bilinear.

    Args:
      values: [h, w, C] float.
      size: (height, width) in pixels.

    Returns:
      [height, width, C] float32 NumPy array.
    """
    resized = np.asarray(values, np.float32)
    for axis in (0, 1):
        if resized.shape[axis] != size[axis]:
            resized = _interpolated(resized, _neighbours(resized.shape[axis], size[axis]), axis)
    return resized


def working_image(image: np.ndarray, max_side: int) -> np.ndarray:
    """The image at its working size, see `working_size`."""
    size = working_size(image.shape[:2], max_side)
    if size == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))


def working_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """The size at which an image is segmented.

    Args:
      size: (H, W) in pixels.
      max_side: largest side in pixels.

    Returns:
      (h, w) in pixels, of the same aspect; (H, W) if no side is larger than `max_side`.
    """
    scale = min(max_side / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def padded_image(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The image padded by its edges to `padded_to` of each side, and [h, w] bool: true for pixels of the image."""
    height, width = image.shape[:2]
    pad = [(0, padded_to(height) - height), (0, padded_to(width) - width)]
    return np.pad(image, [*pad, (0, 0)], mode="edge"), np.pad(np.ones((height, width), bool), pad)


def nearest_side(side: float, step: int) -> int:
    """The side of an input nearest to one that a network takes.

    Args:
      side: in pixels.
      step: sides of the network's input are multiples of it, see `lcrf_jax.nets.network.Network`; 1 means 32.

    Returns:
      int, at least 32.
    """
    step = step if step > 1 else 32
    return max(round(side / step), math.ceil(32 / step)) * step
