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

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lcrf_jax.numerics import (
    ONE_IMAGE,
    check_count,
    check_finite,
    check_number,
    check_shape,
    check_values,
    first_place,
    known_number,
    native,
    promote_float,
)

WIDTH_REMEDY = "use a width in pixels (positions) or in 0..255 units (colours)"
"""What to do about a width that is out of range."""


class KernelParams(NamedTuple):
    """Weights and widths of the bilateral and the spatial Gaussian.

    The defaults are the usual ones for photographs at full resolution; `at_stride` takes them to a coarser grid.
    The weights depend on the normalisation: these are for `symmetric`, where the rows of each Gaussian sum to
    about 1. Position widths set sizes of arrays: under jit they are static parts of the structure, and a function
    that was compiled for some is compiled again for others. Weights and the colour width are leaves.

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
    bilateral_colour_width: float | tuple[float, ...] = 13.0
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


    @classmethod
    def from_pydensecrf(
        cls,
        *,
        sxy: float | None = None,
        srgb: float | Sequence[float] | None = None,
        compat: float | None = None,
        gaussian_sxy: float | None = None,
        gaussian_compat: float | None = None,
    ) -> "KernelParams":
        """The kernel in the words of pydensecrf's `addPairwiseBilateral` and `addPairwiseGaussian`.

        Both libraries normalise symmetrically by default, and their numbers mean the same. pydensecrf keeps self-pairs,
        this library leaves them out. As there, a Gaussian of which nothing is given is not added: its weight is 0. Where
        nothing at all is given, both are, with the usual numbers.

        Args:
          sxy: of `addPairwiseBilateral`, in pixels, > 0; one number for both axes. None is 80.
          srgb: of `addPairwiseBilateral`, in 0..255, > 0; one for all channels or one for each. None is 13.
          compat: of `addPairwiseBilateral`, the Potts weight, >= 0. None is 10.
          gaussian_sxy: of `addPairwiseGaussian`, in pixels, > 0; one number for both axes. None is 3.
          gaussian_compat: of `addPairwiseGaussian`, >= 0. None is 3.
        Returns:
          A `KernelParams`.
        Raises:
          ValueError: if a number is out of range.
          TypeError: if one is no number; for a matrix of label costs use `compatibility` of `mean_field`.
        Example:
          >>> from lcrf_jax import KernelParams
          >>> KernelParams.from_pydensecrf(sxy=40, srgb=10, compat=5).bilateral_weight
          5
        """
        remedies = {"compat": "give costs of labels to mean_field, as compatibility", "sxy": "give one number for both axes"}
        given: dict[str, Any] = {"sxy": sxy, "compat": compat, "gaussian_sxy": gaussian_sxy, "gaussian_compat": gaussian_compat}
        for name, value in given.items():
            if np.ndim(value):
                raise TypeError(f"{name}: expected a number, got one of shape {list(np.shape(value))}; {remedies[name.split('_')[-1]]}")
        bilateral, gaussian = (sxy, srgb, compat) != (None,) * 3, (gaussian_sxy, gaussian_compat) != (None,) * 2
        usual = cls()
        words: dict[str, Any] = {
            "bilateral_weight": compat if bilateral or not gaussian else 0.0,
            "bilateral_position_width": sxy,
            "bilateral_colour_width": tuple(srgb) if np.ndim(srgb) else srgb,  # type: ignore[arg-type]  # one or many
            "gaussian_weight": gaussian_compat if gaussian or not bilateral else 0.0,
            "gaussian_position_width": gaussian_sxy,
        }
        return checked_params(usual._replace(**{name: word for name, word in words.items() if word is not None}))


STATIC_WIDTHS = ("bilateral_position_width", "gaussian_position_width")
"""The fields that set sizes of arrays, and are static parts of a `KernelParams` as a pytree."""
_LEAVES = tuple(name for name in KernelParams._fields if name not in STATIC_WIDTHS)


def _flattened(params):
    leaves = [(jax.tree_util.GetAttrKey(name), getattr(params, name)) for name in _LEAVES]
    return leaves, tuple(getattr(params, name) for name in STATIC_WIDTHS)


def _unflattened(static, leaves):
    return KernelParams(**dict(zip(STATIC_WIDTHS, static, strict=True)), **dict(zip(_LEAVES, leaves, strict=True)))


jax.tree_util.register_pytree_with_keys(KernelParams, _flattened, _unflattened)


def checked_params(params: KernelParams) -> KernelParams:
    """The parameters, after checking those that are known.

    Args:
      params: a `KernelParams`.
    Returns:
      The same.
    Raises:
      ValueError: if a weight is negative, a width is not positive, or one is not finite.
      TypeError: if one is no number, or `params` is something else.
    """
    if not isinstance(params, KernelParams):
        raise TypeError(f"params: expected a KernelParams, got {params!r}; KernelParams() has the usual numbers")
    for name, value in params._asdict().items():
        if value is None:
            raise TypeError(f"{name}: expected a number, got None; a weight of 0 leaves its part of the kernel out")
    for name in ("bilateral_weight", "gaussian_weight"):
        remedy = "weights are >= 0: a pair of pixels with different labels costs them"
        check_number(name, getattr(params, name), minimum=0, remedy=remedy)
    for name in STATIC_WIDTHS:
        check_number(name, getattr(params, name), minimum=0, strict=True, remedy=WIDTH_REMEDY)
    widths = params.bilateral_colour_width
    for width in widths if isinstance(widths, (tuple, list)) else (widths,):
        if np.ndim(width) == 0:
            check_number("bilateral_colour_width", width, minimum=0, strict=True, remedy=WIDTH_REMEDY)
    return params


def static_width(params: KernelParams, name: str) -> float:
    """A position width that sets sizes of arrays.

    Args:
      params: a `KernelParams`.
      name: of its field.
    Returns:
      The width.
    Raises:
      TypeError: if it is traced, as for a derivative in it.
    """
    width = getattr(params, name)
    known = known_number(width)
    if known is None:
        raise TypeError(
            f"{name}: expected a Python number, got {type(width).__name__}; it sets sizes of arrays, so it has no derivative "
            "in this form: close over the parameters or pass them through static_argnums, or take dense_kernel"
        )
    return known


def scaled(params: KernelParams, stride: float) -> KernelParams:
    """`KernelParams.at_stride`, under its old name.

    Args:
      params: a `KernelParams` for the fine grid.
      stride: pixels of the fine grid per cell of the coarse one, > 0.
    Returns:
      A `KernelParams`.
    """
    return params.at_stride(stride)


def check_image_shape(image: ArrayLike) -> tuple[int, ...]:
    """The shape of an image, after checking that it is one.

    Args:
      image: [H, W, C].
    Returns:
      (H, W, C).
    Raises:
      ValueError: if it has another number of axes, or its channels seem to be first.
    """
    remedy = ONE_IMAGE
    if np.ndim(image) == 4:
        remedy += "; a volume or a video is not supported as one: use jax.vmap for its slices one by one, or " \
            "lcrf_jax.feature_kernel with features of your own for pairs across slices"
    elif np.ndim(image) == 2:
        remedy += "; give a grey image an axis of one channel, image[:, :, None]"
    shape = check_shape("image", image, ("H", "W", "C"), remedy)
    if shape[0] in (1, 3) and shape[2] > 64 and shape[1] > 8:
        raise ValueError(
            f"image: expected shape [H, W, C], got {list(shape)}, whose channels seem to be first; move them to the end, "
            "image.transpose(1, 2, 0)"
        )
    return shape


_NORMALISED = "; if it was normalised for a network, undo that: (image * std + mean) * 255"


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
    check_image_shape(image)
    image = native(image) if hasattr(image, "dtype") else np.asarray(image)
    if colour_max is None:
        check_finite("image", image, "look at how it was read")
        return promote_float(image)
    check_number("colour_max", colour_max, minimum=0, strict=True, remedy="255 and 1 are usual")
    promoted = promote_float(image)  # what holds no numbers is refused here
    integers = jnp.issubdtype(jnp.result_type(image), jnp.integer)
    if integers and colour_max <= 1:
        raise ValueError(f"image: expected floats in 0..{colour_max}, got integers; pass colour_max=255")

    def fault_of(values):
        lowest, highest = float(values.min()), float(values.max())
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            place = first_place(~np.isfinite(values))
            return f"expected finite numbers, got {values[tuple(place)]} at {place}; look at how it was read"
        # Resampled floats overshoot by a few per cent.
        slack = 0 if integers else 0.1
        if not (lowest >= -slack * highest and highest <= (1 + slack) * colour_max):
            return (
                f"expected values in 0..{colour_max}, got {lowest:.4g}..{highest:.4g}; pass "
                "colour_max=255 for 0..255, 1 for 0..1, or None for channels that are no colours"
                f"{_NORMALISED if lowest < 0 and highest < 10 else ''}"
            )
        if not integers and lowest < highest <= colour_max / 255:
            return (
                f"expected values in 0..{colour_max}, got {lowest:.4g}..{highest:.4g}, which no width of "
                "colour would tell apart; pass colour_max=1 for an image in 0..1"
            )
        return None

    check_values("image", image, fault_of)
    return promoted if colour_max == 255 else promoted * (255 / colour_max)


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
    height = check_count("height", height, minimum=1, remedy="an image needs a pixel")
    width = check_count("width", width, minimum=1, remedy="an image needs a pixel")
    check_number("position_width", position_width, minimum=0, strict=True, remedy=WIDTH_REMEDY)
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), axis=-1).astype(dtype)
    return grid.reshape(height * width, 2) / jnp.asarray(position_width, grid.dtype)


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
      ValueError: if `image` is not [H, W, C] or is known not to be finite, or a width is not positive.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import guide_features
      >>> features = guide_features(np.full((2, 3, 3), 26.0), position_width=2.0, colour_width=13.0)
      >>> features.shape, features[-1].tolist()
      ((6, 5), [0.5, 1.0, 2.0, 2.0, 2.0])
    """
    height, width, channels = check_image_shape(image)
    per_channel = isinstance(colour_width, (tuple, list)) or np.ndim(colour_width) > 0  # numbers may be traced
    if per_channel:
        remedy = "give one width for all channels, or one for each"
        check_shape("colour_width", jnp.asarray(colour_width), (channels,), remedy)
    every: Any = colour_width if per_channel and not isinstance(colour_width, jax.Array) else [colour_width]
    for channel_width in every:
        if np.ndim(channel_width) == 0:
            check_number("colour_width", channel_width, minimum=0, strict=True, remedy=WIDTH_REMEDY)
    check_finite("image", image, "look at how it was read")
    image = promote_float(image)
    positions = position_features(height, width, position_width=position_width, dtype=image.dtype)
    colour_width = jnp.asarray(colour_width, image.dtype)
    return jnp.concatenate([positions, image.reshape(height * width, channels) / colour_width], axis=1)
