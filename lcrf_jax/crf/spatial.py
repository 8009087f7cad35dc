"""The Gaussian over positions alone, as a separable filter."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.params import WIDTH_REMEDY
from lcrf_jax.numerics import check_number, check_shape, known_number, promote_float, varying_like

# At four widths the Gaussian is 3e-4 of its peak; it is cut off there.
_TRUNCATION = 4.0
_TAP_GROUP = 13
LEAST_WIDTH_OF_PAIRS = 3.0
"""Width in pixels from which on a Gaussian may be filtered by pairs of rows."""


def gaussian_taps(width: float, *, most: int | None = None) -> np.ndarray:
    """The Gaussian at whole pixels in one dimension, cut off at four widths.

    Args:
      width: standard deviation in pixels, a Python number > 0; it sets the number of taps, so it has to be
        static.
      most: static largest r, >= 0. The longer side of a grid loses nothing there: taps beyond meet its padding
        alone. None is no limit.
    Returns:
      [2 r + 1] NumPy array, r = ceil(4 width) or `most`, with 1 in the middle.
    Raises:
      TypeError: if the width is not a Python number, but traced, say.
      ValueError: if it is not positive.
    """
    known = known_number(width)
    if known is None:
        raise TypeError(
            f"width: expected a Python number, got {type(width).__name__}; it sets the size of the filter, so close "
            "over the kernel parameters or pass them through static_argnums"
        )
    check_number("width", width, minimum=0, strict=True, remedy=WIDTH_REMEDY)
    radius = math.ceil(_TRUNCATION * known)
    if most is not None:
        radius = min(radius, most)
    return np.exp(-0.5 * (np.arange(-radius, radius + 1) / known) ** 2)


def separable_filter(values: ArrayLike, taps: ArrayLike) -> jax.Array:
    r"""A separable filter: weighted sums along the columns, then along the rows.

    .. math:: v'_{rc} = \sum_{s,t} h_s h_t\, v_{r+s,\,c+t}

    With `gaussian_taps` this is the Gaussian over positions, in a time linear in pixels and taps. The grid is
    padded with zeros: pixels near the border have smaller row sums. Not normalised; the self-pair is part of the
    sum.

    Args:
      values: [H, W, K] values on the grid.
      taps: [2 r + 1] weights h, the middle one for the pixel itself.
    Returns:
      [H, W, K] filtered values.
    Raises:
      ValueError: if `values` is not [H, W, K] or the number of taps is even.
    """
    height, width, channels = check_shape("values", values, ("H", "W", "K"), "give a grid with channels last")
    (num_taps,) = check_shape("taps", taps, ("2r+1",), "give the weights as one row")
    if num_taps % 2 == 0:
        raise ValueError(f"taps: expected an odd number of weights, got {num_taps}; the middle one is the pixel's own")
    values = promote_float(values)
    taps = jnp.asarray(taps, values.dtype)
    rows = _shifted_sum(values.reshape(height, width * channels), taps, axis=0, step=1)
    return _shifted_sum(rows, taps, axis=1, step=channels).reshape(height, width, channels)


def taps_of_pairs(width: float, *, most: int | None = None) -> np.ndarray:
    """The weights between pairs of rows with which `filter_by_pairs` is the Gaussian of a width, to one per cent.

    Summing into pairs and going back between them adds a variance of 3/4 each. These taps have the rest, and the sum that
    the Gaussian has.

    Args:
      width: standard deviation in pixels, a Python number of at least `LEAST_WIDTH_OF_PAIRS`.
      most: static largest r in pairs, >= 1, see `gaussian_taps`; for H rows H / 2 + 1, rounded up, loses nothing.
    Returns:
      [2 r + 1] NumPy array.
    Raises:
      TypeError: if the width is traced.
      ValueError: if it is smaller.
    """
    gaussian_taps(width, most=0)  # refuses what is no width
    remedy = "filter the rows themselves, with separable_filter"
    check_number("width", width, minimum=LEAST_WIDTH_OF_PAIRS, remedy=remedy)
    of_pairs = math.sqrt(float(width) ** 2 - 1.5) / 2
    return width / (2 * of_pairs) * gaussian_taps(of_pairs, most=most)


def filter_by_pairs(values: ArrayLike, row_taps: ArrayLike, taps: ArrayLike) -> jax.Array:
    r"""`separable_filter` on half as many rows: summed into pairs, filtered, and brought back to the rows.

    Each row gives three quarters to its own pair and one to the nearer one beside it, and takes back with the same weights.
    So the kernel is symmetric and nowhere negative, and it takes half the time. Columns are filtered as they are: their pairs
    do not lie side by side in memory.

    Args:
      values: [H, W, K] values on the grid.
      row_taps: [2 r + 1] weights between pairs of rows, see `taps_of_pairs`.
      taps: [2 s + 1] weights along the rows, see `gaussian_taps`.
    Returns:
      [H, W, K] filtered values; the self-pair is `own_weight_by_pairs`.
    Raises:
      ValueError: if `values` is not [H, W, K].
    """
    height, width, channels = check_shape("values", values, ("H", "W", "K"), "give a grid with channels last")
    values = promote_float(values)
    row_taps, taps = jnp.asarray(row_taps, values.dtype), jnp.asarray(taps, values.dtype)
    # A pair of the grid, one beyond it that the first row gives to, and one to read from.
    rows = jnp.pad(values.reshape(height, width * channels), ((4, 4 + height % 2), (0, 0)))
    rows = jax.lax.optimization_barrier(rows).reshape(-1, 2, width * channels)
    pairs = 0.75 * (rows[1:-1, 0] + rows[1:-1, 1]) + 0.25 * (rows[:-2, 1] + rows[2:, 0])
    pairs = _shifted_sum(jax.lax.optimization_barrier(pairs), row_taps, axis=0, step=1)
    pairs = _shifted_sum(pairs, taps, axis=1, step=channels)
    # One sum for even and odd rows: arrays that are put together row by row are slow on CPU.
    pairs = jax.lax.optimization_barrier(pairs)[:, None]
    before, after = (np.array(shares)[:, None].astype(values.dtype) for shares in ((0.25, 0), (0, 0.25)))
    rows = 0.75 * pairs[1:-1] + before * pairs[:-2] + after * pairs[2:]
    return rows.reshape(-1, width, channels)[:height]


def own_weight_by_pairs(row_taps: jax.Array) -> jax.Array:
    """The weight of each pixel's own value in `filter_by_pairs`, if the middle one of its other taps is 1.

    Args:
      row_taps: as there.
    Returns:
      Scalar.
    """
    middle = len(row_taps) // 2
    return 0.625 * row_taps[middle] + 0.375 * row_taps[middle + 1]


@functools.partial(jax.jit, static_argnames=("axis", "step"))
def _shifted_sum(values, taps, axis, step):
    """sum_t taps[t] values[i + (t - radius) step] along an axis of a matrix, zero outside."""
    size = values.shape[axis]
    radius = len(taps) // 2
    # Groups of taps are one pass over memory each; the last is filled up with taps of 0.
    num_groups = math.ceil(len(taps) / _TAP_GROUP)
    missing = num_groups * _TAP_GROUP - len(taps)
    taps = jnp.pad(taps, (0, missing)).reshape(num_groups, _TAP_GROUP)
    padding = [(0, 0), (0, 0)]
    padding[axis] = (radius * step, (radius + missing) * step)
    # Without the barrier XLA on CPU tests for every tap of every pixel whether it lies in the padding.
    padded = jax.lax.optimization_barrier(jnp.pad(values, padding))

    def add_group(group, total):
        of_group = jax.lax.dynamic_index_in_dim(taps, group, keepdims=False, allow_negative_indices=False)
        for t in range(_TAP_GROUP):
            start = (group * _TAP_GROUP + t) * step
            shifted = jax.lax.dynamic_slice_in_dim(padded, start, size, axis, allow_negative_indices=False)
            total = total + of_group[t] * shifted
        return total

    return jax.lax.fori_loop(0, num_groups, add_group, varying_like(jnp.zeros_like(values), values))
