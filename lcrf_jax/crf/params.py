r"""The parameters of a dense CRF, and the features of an image that its Gaussians compare.

The pairwise kernel of the dense CRF is

.. math::

    k_{ij} = w_1 \exp(-|p_i-p_j|^2 / 2 s_a^2 - |I_i-I_j|^2 / 2 s_b^2) + w_2 \exp(-|p_i-p_j|^2 / 2 s_g^2)

with p the pixel's position and I its colour. Conventions, the same everywhere in this library:

* positions are in pixels of the grid the kernel lives on, (row, column), pixels in row-major order;
* colours are in 0..255, whatever the dtype, and so is s_b; `colour_max=1` says that an image is in 0..1;
* each of the two Gaussians is normalised on its own, *with* the self-pair in its row sums, then weighted and
  added; after that the diagonal is removed: k_ii = 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lcrf_jax.numerics import check_number, check_shape, promote_float

_ONE_IMAGE = "pass one image as [height, width, channels]; for a batch use jax.vmap"
_WIDTH_REMEDY = "use a width in pixels (positions) or in 0..255 units (colours)"


class KernelParams(NamedTuple):
    """Weights and widths of the bilateral and the spatial Gaussian.

    The defaults are the usual ones for photographs at full resolution; `at_stride` takes them to a coarser grid.
    The weights depend on the normalisation: these are for `symmetric`, where the rows of each Gaussian sum to
    about 1.

    Attributes:
      bilateral_weight: w1, weight of the Gaussian over position and colour.
      bilateral_position_width: s_a, standard deviation in pixels of the grid.
      bilateral_colour_width: s_b, standard deviation in colour units of 0..255.
      gaussian_weight: w2, weight of the Gaussian over position alone.
      gaussian_position_width: s_g, standard deviation in pixels of the grid.

    Example:
      >>> from lcrf_jax import KernelParams
      >>> KernelParams(bilateral_weight=5.0).gaussian_weight
      3.0
    """

    bilateral_weight: float = 10.0
    bilateral_position_width: float = 80.0
    bilateral_colour_width: float = 13.0
    gaussian_weight: float = 3.0
    gaussian_position_width: float = 3.0

    def at_stride(self, stride: float) -> "KernelParams":
        """The same kernel on a grid that is `stride` times coarser.

        Args:
          stride: pixels of this grid per cell of the coarse one, > 0.
        Returns:
          A `KernelParams` with both position widths divided by `stride`; weights and colour width stay.
        Raises:
          ValueError: if `stride` is not a positive number.
        Example:
          >>> from lcrf_jax import KernelParams
          >>> KernelParams().at_stride(8).bilateral_position_width
          10.0
        """
        check_number("stride", stride, minimum=0, strict=True, remedy="4 takes 320x240 pixels to 80x60 cells")
        return self._replace(
            bilateral_position_width=self.bilateral_position_width / stride,
            gaussian_position_width=self.gaussian_position_width / stride,
        )


def scaled(params: KernelParams, stride: float) -> KernelParams:
    """`KernelParams.at_stride`, under its old name.

    Args:
      params: a `KernelParams` for the fine grid.
      stride: pixels of the fine grid per cell of the coarse one, > 0.
    Returns:
      A `KernelParams`.
    """
    return params.at_stride(stride)


def colours(image: ArrayLike, *, colour_max: float | None = 255.0) -> jax.Array:
    """An image as floats in 0..255, after checking its values against `colour_max`.

    Without this check an image in 0..1 that is taken for one in 0..255 would silently give a kernel that ignores
    colour. Values are checked where they are known, that is, outside jit and vmap; dtypes always.

    Args:
      image: [H, W, C] real values in 0..colour_max, any dtype, any number of channels.
      colour_max: the value of full colour: 255, or 1, or another number > 0, such as 65535. None is
        for channels that are not colours: they are not checked or scaled, and their widths are in their own units.
    Returns:
      [H, W, C] float32 in 0..255, or float64 for a float64 image.
    Raises:
      ValueError: if `image` is not [H, W, C], `colour_max` is not positive, an integer image comes with a
        colour_max of 1, or, where values are known, one is not in 0..colour_max (a tenth more for floats, as
        resampling overshoots) or all that differ are within the lowest 255th of it in an image of floats.
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


def position_features(
    height: int, width: int, *, position_width: ArrayLike, dtype: DTypeLike = jnp.float32
) -> jax.Array:
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
    """
    check_number("height", height, minimum=1, remedy="an image needs a pixel")
    check_number("width", width, minimum=1, remedy="an image needs a pixel")
    check_number("position_width", position_width, minimum=0, strict=True, remedy=_WIDTH_REMEDY)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1).astype(dtype)
    return grid.reshape(height * width, 2) / position_width


def guide_features(
    image: ArrayLike, *, position_width: ArrayLike, colour_width: ArrayLike | Sequence[float]
) -> jax.Array:
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
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import guide_features
      >>> features = guide_features(np.full((2, 3, 3), 26.0), position_width=2.0, colour_width=13.0)
      >>> features.shape, features[-1].tolist()
      ((6, 5), [0.5, 1.0, 2.0, 2.0, 2.0])
    """
    height, width, channels = check_shape("image", image, ("H", "W", "C"), _ONE_IMAGE)
    if np.ndim(colour_width):
        remedy = "give one width for all channels, or one for each"
        check_shape("colour_width", jnp.asarray(colour_width), (channels,), remedy)
    for channel_width in colour_width if isinstance(colour_width, (tuple, list, np.ndarray)) else [colour_width]:
        check_number("colour_width", channel_width, minimum=0, strict=True, remedy=_WIDTH_REMEDY)
    image = promote_float(image)
    positions = position_features(height, width, position_width=position_width, dtype=image.dtype)
    colour_width = jnp.asarray(colour_width, image.dtype)
    return jnp.concatenate([positions, image.reshape(height * width, channels) / colour_width], axis=1)
