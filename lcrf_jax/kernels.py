r"""Gaussian kernels over pixels: guide features, the dense kernel matrix, and the exact filter.

The pairwise kernel of the dense CRF is

.. math::

    k_{ij} = w_1 \exp(-|p_i-p_j|^2 / 2 s_a^2 - |I_i-I_j|^2 / 2 s_b^2) + w_2 \exp(-|p_i-p_j|^2 / 2 s_g^2)

with p the pixel's position and I its colour. Conventions, the same everywhere in this library:

* positions are in pixels of the grid the kernel lives on, (row, column), pixels in row-major order;
* colours are in 0..255, whatever the dtype, and so is s_b; `colour_max=1` says that an image is in 0..1;
* each of the two Gaussians is normalised on its own, *with* the self-pair in its row sums, then weighted and
  added; after that the diagonal is removed: k_ii = 0.
"""

import functools
import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.numerics import check_number, check_shape, promote_float, squared_distances, varying_like

__all__ = [
    "NORMALISATIONS",
    "KernelParams",
    "colours",
    "dense_kernel",
    "filter_exact",
    "gaussian_kernel",
    "gaussian_taps",
    "guide_features",
    "position_features",
    "scaled",
    "separable_filter",
]

_ONE_IMAGE = "pass one image as [height, width, channels]; for a batch use jax.vmap"
# The Gaussian at four widths is 3e-4 of its peak; what lies beyond is left out.
_TRUNCATION = 4.0
_TAP_GROUP = 13
# 2^x on 0..1 to 2e-7, highest power first: the polynomial of degree 6 through the Chebyshev nodes.
_EXP2_COEFFICIENTS = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 6, domain=[0, 1]).convert(
    kind=np.polynomial.Polynomial
).coef[::-1]
_WIDTH_REMEDY = "use a width in pixels (positions) or in 0..255 units (colours)"


class KernelParams(NamedTuple):
    """Weights and widths of the bilateral and the spatial Gaussian.

    The defaults are the usual ones for photographs at full resolution; `scaled` takes them to a coarser grid.
    The weights mean something only together with a normalisation: these are for `symmetric`, where the rows
    of each Gaussian sum to about 1.

    Attributes:
      bilateral_weight: w1, weight of the Gaussian over position and colour.
      bilateral_position_width: s_a, standard deviation in pixels of the grid.
      bilateral_colour_width: s_b, standard deviation in colour units of 0..255.
      gaussian_weight: w2, weight of the Gaussian over position alone.
      gaussian_position_width: s_g, standard deviation in pixels of the grid.
    """

    bilateral_weight: float = 10.0
    bilateral_position_width: float = 80.0
    bilateral_colour_width: float = 13.0
    gaussian_weight: float = 3.0
    gaussian_position_width: float = 3.0


def scaled(params, stride):
    """The same kernel on a grid that is `stride` times coarser.

    Args:
      params: a `KernelParams` for the fine grid.
      stride: pixels of the fine grid per cell of the coarse one, > 0.
    Returns:
      A `KernelParams` with both position widths divided by `stride`; weights and colour width stay.
    Raises:
      ValueError: if `stride` is not a positive number.
    References:
      None.
    """
    check_number("stride", stride, minimum=0, strict=True, remedy="4 takes 320x240 pixels to 80x60 cells")
    return params._replace(
        bilateral_position_width=params.bilateral_position_width / stride,
        gaussian_position_width=params.gaussian_position_width / stride,
    )


def colours(image, *, colour_max=255.0):
    """An image as floats in 0..255, after checking that its values can be what the caller says they are.

    An image in 0..1 that is taken for one in 0..255 gives a kernel that sees no colour, silently. Values are
    checked where they are known, that is, outside jit and vmap; dtypes always.

    Args:
      image: [H, W, C] real values in 0..colour_max, any dtype, any number of channels.
      colour_max: the value of full colour: 255, or 1, or another number > 0, such as 65535. None takes
        channels that are no colours as they are, unchecked; their widths are then in their own units.
    Returns:
      [H, W, C] float32 in 0..255, or float64 for a float64 image.
    Raises:
      ValueError: if `image` is not [H, W, C], `colour_max` is not positive, an integer image comes with a
        colour_max of 1, or, where values are known, one is not in 0..colour_max (a tenth more for floats, as
        resampling overshoots) or all that differ are within the lowest 255th of it in an image of floats.
    References:
      None.
    """
    check_shape("image", image, ("H", "W", "C"), _ONE_IMAGE)
    if colour_max is None:
        return promote_float(image)
    check_number("colour_max", colour_max, minimum=0, strict=True, remedy="255 and 1 are usual")
    integers = jnp.issubdtype(jnp.result_type(image), jnp.integer)
    if integers and colour_max <= 1:
        raise ValueError(f"image: expected floats in 0..{colour_max}, got integers; pass colour_max=255")
    if not isinstance(image, jax.core.Tracer):
        lowest, highest = float(np.min(np.asarray(image))), float(np.max(np.asarray(image)))
        # Resampled floats overshoot by a few per cent. Written so that NaN is refused as well.
        slack = 0 if integers else 0.1
        if not (lowest >= -slack * highest and highest <= (1 + slack) * colour_max):
            raise ValueError(
                f"image: expected values in 0..{colour_max}, got {lowest:.4g}..{highest:.4g}; pass "
                "colour_max=255 for 0..255, 1 for 0..1, or None for channels that are no colours"
            )
        if not integers and lowest < highest <= colour_max / 255:
            raise ValueError(
                f"image: expected values in 0..{colour_max}, got {lowest:.4g}..{highest:.4g}, which no width of "
                "colour would tell apart; pass colour_max=1 for an image in 0..1"
            )
    image = promote_float(image)
    return image if colour_max == 255 else image * (255 / colour_max)


def position_features(height, width, *, position_width, dtype=jnp.float32):
    """Positions of all pixels in units of a width; the first pixel is the origin.

    Args:
      height: number of rows.
      width: number of columns.
      position_width: standard deviation in pixels, > 0.
      dtype: dtype of the result.
    Returns:
      [height * width, 2] rows and columns, divided by `position_width`.
    Raises:
      ValueError: if a size is smaller than 1 or the width is not positive.
    References:
      None.
    """
    check_number("height", height, minimum=1, remedy="an image needs a pixel")
    check_number("width", width, minimum=1, remedy="an image needs a pixel")
    check_number("position_width", position_width, minimum=0, strict=True, remedy=_WIDTH_REMEDY)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1).astype(dtype)
    return grid.reshape(height * width, 2) / position_width


def guide_features(image, *, position_width, colour_width):
    """Position and colour of every pixel, each in units of its width.

    A Gaussian of unit width on these features is the bilateral kernel.

    Args:
      image: [H, W, C] colours in 0..255 (`colours` takes other ranges there), or any other channels; any real
        dtype.
      position_width: standard deviation in pixels of this grid, > 0.
      colour_width: standard deviation in the units of the channels, > 0; one for all, or C of them.
    Returns:
      [H * W, 2 + C] features (row, column, channels), row-major over pixels; float32, or float64 for a
      float64 image.
    Raises:
      ValueError: if `image` is not [H, W, C] or a width is not positive.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    """
    height, width, channels = check_shape("image", image, ("H", "W", "C"), _ONE_IMAGE)
    if np.ndim(colour_width):
        check_shape("colour_width", jnp.asarray(colour_width), (channels,), "give one width for all channels, or one for each")
    for channel_width in colour_width if isinstance(colour_width, (tuple, list, np.ndarray)) else [colour_width]:
        check_number("colour_width", channel_width, minimum=0, strict=True, remedy=_WIDTH_REMEDY)
    image = promote_float(image)
    positions = position_features(height, width, position_width=position_width, dtype=image.dtype)
    colour_width = jnp.asarray(colour_width, image.dtype)
    return jnp.concatenate([positions, image.reshape(height * width, channels) / colour_width], axis=1)


def gaussian_kernel(features_a, features_b=None):
    r"""The Gaussian of unit width between two sets of features, exactly.

    .. math:: K_{ij} = \exp(-|a_i - b_j|^2 / 2)

    The squared distance is summed from the differences themselves, feature by feature, so that float32 keeps
    its digits however far the features lie from the origin.

    Args:
      features_a: [m, d] features in units of their widths.
      features_b: [n, d], or None for `features_a`.
    Returns:
      [m, n] values in 0..1, with 1 on the diagonal if `features_b` is None.
    Raises:
      ValueError: if the features are not two matrices with the same number of columns.
    References:
      Krahenbuhl and Koltun 2011, eq. 2.
    """
    _, dimensions = check_shape("features_a", features_a, ("m", "d"), "flatten the pixels to one axis")
    features_b = features_a if features_b is None else features_b
    check_shape("features_b", features_b, ("n", dimensions), "both sets need the same features")
    a, b = promote_float(features_a), promote_float(features_b)
    return jnp.exp(-squared_distances(a, b) / 2)


def _normalised_symmetric(kernel):
    scale = jax.lax.rsqrt(kernel.sum(axis=1))
    return scale[:, None] * kernel * scale[None, :]


def _normalised_by_row(kernel):
    return kernel / kernel.sum(axis=1, keepdims=True)


NORMALISATIONS = {
    "none": lambda kernel: kernel,
    "row": _normalised_by_row,
    "symmetric": _normalised_symmetric,
}


def dense_kernel(image, params, *, normalisation="symmetric", colour_max=255.0):
    r"""The pairwise kernel of the dense CRF as a matrix.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    N is applied to each Gaussian alone, with the self-pair (1) in its row sums D = diag(K 1): `none` K, `row`
    D^-1 K, `symmetric` D^-1/2 K D^-1/2, the convention of Krahenbuhl's code. The diagonal is removed last, so
    rows of the result sum to a little less than w1 + w2 (`row`: never more; `symmetric`: about).

    Args:
      image: [H, W, C] colours, see `colours`.
      params: `KernelParams` for this grid; its weights may be traced, for learning them.
      normalisation: a key of `NORMALISATIONS`: 'none', 'row' or 'symmetric'.
      colour_max: the value of full colour in `image`: 255, or 1.
    Returns:
      [m, m] kernel, m = H * W, zero on the diagonal, symmetric except for 'row'. It takes 4 m^2 bytes: 39 MB
      at 56x56, so this form is for coarse grids.
    Raises:
      ValueError: if `image` is not [H, W, C], a width is not positive, or the normalisation is unknown.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Krahenbuhl and Koltun 2013 for the normalisation.
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation: expected one of {sorted(NORMALISATIONS)}, got {normalisation!r}")
    image = colours(image, colour_max=colour_max)
    height, width, _ = image.shape
    normalised = NORMALISATIONS[normalisation]
    guide = guide_features(
        image,
        position_width=params.bilateral_position_width,
        colour_width=params.bilateral_colour_width,
    )
    positions = position_features(height, width, position_width=params.gaussian_position_width, dtype=guide.dtype)
    kernel = params.bilateral_weight * normalised(gaussian_kernel(guide))
    kernel = kernel + params.gaussian_weight * normalised(gaussian_kernel(positions))
    return jnp.where(jnp.eye(height * width, dtype=bool), 0, kernel)


def filter_exact(features, values, *, block_size=None):
    r"""The Gaussian-weighted sum over all pixels, exactly, in bounded memory.

    .. math:: v'_i = \sum_j \exp(-|f_i - f_j|^2 / 2)\, v_j

    The self-pair j = i is part of the sum; subtract `values` to leave it out. Not normalised: filter ones to
    get the row sums.

    Args:
      features: [m, d] features in units of their widths.
      values: [m, K] values to filter.
      block_size: static number of rows of the kernel held at once; None takes as many as fit
        into 4 MB up to 64 x 64 pixels, into 16 MB beyond.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if the shapes do not fit or `block_size` is smaller than 1.
    References:
      Krahenbuhl and Koltun 2011, section 3.
    """
    num_pixels, _ = check_shape("features", features, ("m", "d"), "flatten the pixels to one axis")
    check_shape("values", values, (num_pixels, "K"), "flatten the pixels to one axis, channels last")
    features, values = promote_float(features), promote_float(values)
    if block_size is None:
        # Small kernels in parts that stay in the cache of a core, large ones in parts that are worth a parallel product.
        # A single part is slower than two: XLA on CPU does not make it a matrix first.
        block_size = (2**20 if num_pixels <= 64**2 else 2**22) // num_pixels
        block_size = max(1, min(block_size, math.ceil(num_pixels / 2)))
    check_number("block_size", block_size, minimum=1, remedy="None chooses one")
    return _filtered(block_size, features, values)


def _filtered_in_blocks(block_size, exp, features, values):
    num_pixels, dimensions = features.shape
    num_blocks = math.ceil(num_pixels / block_size)
    rows = math.ceil(num_pixels / num_blocks)
    padded = jnp.pad(features, ((0, num_blocks * rows - num_pixels), (0, 0)))

    @jax.checkpoint  # or its derivative would hold the whole kernel
    def filtered(block):
        kernel = exp(-squared_distances(block, features) / 2)
        return jnp.matmul(kernel, values, precision=jax.lax.Precision.HIGHEST)

    blocks = jax.lax.map(filtered, padded.reshape(num_blocks, rows, dimensions))
    return blocks.reshape(num_blocks * rows, -1)[:num_pixels]


# The kernel is symmetric, so the sum is its own transpose in the values, and its derivative needs nothing stored.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _filtered(block_size, features, values):
    exp = _exp_of_negative if values.dtype == features.dtype == jnp.float32 else jnp.exp
    # A batch is done image by image: blocks of all images at once would not stay in the cache.
    return jax.custom_batching.sequential_vmap(functools.partial(_filtered_in_blocks, block_size, exp))(features, values)


def _filtered_forward(block_size, features, values):
    return _filtered(block_size, features, values), (features, values)


def _filtered_backward(block_size, residuals, cotangent):
    features, values = residuals
    # Where nobody asks for the derivative in the features, jit drops the work.
    _, pull = jax.vjp(lambda moved: _filtered_in_blocks(block_size, jnp.exp, moved, values), features)
    return *pull(cotangent), _filtered(block_size, features, cotangent)


_filtered.defvjp(_filtered_forward, _filtered_backward)


def _exp_of_negative(x):
    """exp(x) for x <= 0 in float32; on CPU by a polynomial, in two thirds of the time, to 1e-6 (4e-6 below 1e-20)."""
    return jax.lax.platform_dependent(x, cpu=_exp_by_polynomial, default=jnp.exp)


def _exp_by_polynomial(x):
    power = jnp.maximum(x * np.float32(1 / math.log(2)), np.float32(-126))
    whole = jnp.floor(power)
    rest = power - whole
    # 2^rest on 0..1, Chebyshev; the whole part goes straight into the exponent of the number.
    value = np.float32(_EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        value = value * rest + np.float32(coefficient)
    bits = jax.lax.bitcast_convert_type(value, jnp.int32) + (whole.astype(jnp.int32) << 23)
    value = jnp.where(power > -126, jax.lax.bitcast_convert_type(bits, jnp.float32), 0)
    return jnp.where(jnp.isnan(x), x, value)


def gaussian_taps(width):
    """The Gaussian at whole pixels in one dimension, cut off at four widths.

    Args:
      width: standard deviation in pixels, a Python number > 0; it sets the number of taps, so it has to be
        static.
    Returns:
      [2 r + 1] NumPy array, r = ceil(4 width), with 1 in the middle.
    Raises:
      TypeError: if the width is not a Python number, but traced, say.
      ValueError: if it is not positive.
    References:
      None.
    """
    if not isinstance(width, numbers.Real):
        raise TypeError(
            f"width: expected a Python number, got {type(width).__name__}; it sets the size of the filter, so close "
            "over the kernel parameters or pass them through static_argnums"
        )
    check_number("width", width, minimum=0, strict=True, remedy=_WIDTH_REMEDY)
    radius = math.ceil(_TRUNCATION * width)
    return np.exp(-0.5 * (np.arange(-radius, radius + 1) / width) ** 2)


def separable_filter(values, taps):
    r"""The weighted sum over a grid, in one direction after the other.

    .. math:: v'_{rc} = \sum_{s,t} h_s h_t\, v_{r+s,\,c+t}

    With `gaussian_taps` this is the Gaussian over positions, for a time linear in pixels and taps. Nothing
    lies beyond the border: pixels there have smaller row sums. Not normalised; the self-pair is part of the
    sum.

    Args:
      values: [H, W, K] values on the grid.
      taps: [2 r + 1] weights h, the middle one for the pixel itself.
    Returns:
      [H, W, K] filtered values.
    Raises:
      ValueError: if `values` is not [H, W, K] or the number of taps is even.
    References:
      None.
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
    # Without the barrier XLA on CPU asks for every tap of every pixel whether it lies in the padding.
    padded = jax.lax.optimization_barrier(jnp.pad(values, padding))

    def add_group(group, total):
        of_group = jax.lax.dynamic_index_in_dim(taps, group, keepdims=False, allow_negative_indices=False)
        for t in range(_TAP_GROUP):
            start = (group * _TAP_GROUP + t) * step
            total = total + of_group[t] * jax.lax.dynamic_slice_in_dim(padded, start, size, axis, allow_negative_indices=False)
        return total

    return jax.lax.fori_loop(0, num_groups, add_group, varying_like(jnp.zeros_like(values), values))
