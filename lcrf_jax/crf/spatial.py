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


def gaussian_taps(width: float) -> np.ndarray:
    """The Gaussian at whole pixels in one dimension, cut off at four widths.

    Args:
      width: standard deviation in pixels, a Python number > 0; it sets the number of taps, so it has to be
        static.
    Returns:
      [2 r + 1] NumPy array, r = ceil(4 width), with 1 in the middle.
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
