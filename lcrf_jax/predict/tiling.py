"""Pictures with objects that are small in them: segmented tile by tile, and the tiles blended."""

import math

import numpy as np

from lcrf_jax.predict.resizing import interpolated_probs
from lcrf_jax.predict.segmenter import Segmenter, segment_batch


def segment_in_tiles(
    segmenter: Segmenter,
    image: np.ndarray,
    *,
    tile: int,
    crf: bool,
    tags: np.ndarray | None = None,
    batch_size: int = 8,
    overlap: float = 0.25,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of an image from overlapping square tiles, each of them segmented as an image of its own.

    Where tiles overlap, their probabilities are averaged, with weights that fall towards the border of a tile. Besides
    the result, memory grows with `tile` times the width of the image, not with its area.

    Args:
      segmenter: lcrf_jax.predict.segmenter.Segmenter.
      image: [H, W, 3] uint8 RGB.
      tile: side of the tiles in pixels.
      crf: whether to refine each tile by mean field.
      tags: [K] bool, the classes that may occur, or None for all.
      batch_size: tiles that the network sees at once.
      overlap: share of a tile that the next one covers too, in [0, 0.9].

    Returns:
      ([H, W] uint8 labels, [H, W] float16 probability of each pixel's label).

    Raises:
      ValueError: if tile is below 16 or overlap is out of range.
    """
    if tile < 16 or not 0 <= overlap <= 0.9:
        raise ValueError(f"expected tiles of at least 16 pixels and an overlap in 0..0.9, got {tile} and {overlap}")
    height, width = image.shape[:2]
    rows, columns = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    tall, wide = min(tile, height), min(tile, width)
    window = _window(tall, overlap)[:, None] * _window(wide, overlap)
    labels, confidence = np.empty((height, width), np.uint8), np.empty((height, width), np.float16)
    total = np.zeros((tall, width, len(segmenter.class_names)), np.float32)
    weight = np.zeros((tall, width), np.float32)
    for top, following in zip(rows, [*rows[1:], height], strict=True):
        for start in range(0, len(columns), batch_size):
            lefts = columns[start : start + batch_size]
            tiles = [image[top : top + tall, left : left + wide] for left in lefts]
            results = segment_batch(
                segmenter, tiles, crf=crf, batch_size=batch_size, tags=None if tags is None else [tags] * len(tiles)
            )
            for left, result in zip(lefts, results, strict=True):
                probs = interpolated_probs(result.best_log_probs, (tall, wide))
                total[:, left : left + wide] += window[..., None] * probs
                weight[:, left : left + wide] += window
        done = following - top  # rows that no further tile reaches
        best = total[:done].argmax(axis=-1)
        labels[top:following] = best
        confidence[top:following] = np.take_along_axis(total[:done], best[..., None], -1)[..., 0] / weight[:done]
        total[: tall - done], weight[: tall - done] = total[done:].copy(), weight[done:].copy()
        total[tall - done :], weight[tall - done :] = 0, 0
    return labels, confidence


def tile_starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin along one side, evenly spaced from the first pixel to the last.

    Args:
      length: of the side in pixels.
      tile: side of the tiles in pixels.
      overlap: least share of a tile that the next one covers too.

    Returns:
      Increasing list of int.
    """
    if length <= tile:
        return [0]
    count = 1 + math.ceil((length - tile) / (tile * (1 - overlap)))
    return [round(at * (length - tile) / (count - 1)) for at in range(count)]


def _window(length, overlap):
    """Weights along a tile: they rise over the overlap at one end and fall at the other, and are nowhere 0."""
    distance = np.minimum(np.arange(length), np.arange(length)[::-1]) + 0.5
    return np.minimum(distance / max(overlap * length, 1), 1).astype(np.float32)
