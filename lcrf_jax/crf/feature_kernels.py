"""Kernels over features of any kind: volumes, videos, points."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.assembly import assembled, with_room
from lcrf_jax.crf.exact import NORMALISATIONS, ExactGaussian
from lcrf_jax.crf.forms import BilateralForm
from lcrf_jax.crf.kernel import ImageKernel
from lcrf_jax.crf.lattice_building import default_capacity
from lcrf_jax.crf.params import WIDTH_REMEDY
from lcrf_jax.numerics import check_finite, check_number, check_shape, promote_float


class KernelSum(NamedTuple):
    """The sum of kernels between the same pixels.

    Attributes:
      kernels: of one and the same number of pixels.
    """

    kernels: tuple[ImageKernel, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """(m, 1): how the voxels lie is not known."""
        return self.kernels[0].grid

    def splat(self, values: ArrayLike) -> Any:
        """The sums of each kernel."""
        return tuple(kernel.splat(values) for kernel in self.kernels)

    def blur(self, splatted: Any) -> Any:
        """Each kernel between its sums."""
        return tuple(kernel.blur(sums) for kernel, sums in zip(self.kernels, splatted, strict=True))

    def slice(self, blurred: Any) -> jax.Array:
        """The results of all, added, at the pixels [m, K]."""
        return sum(kernel.slice(sums) for kernel, sums in zip(self.kernels, blurred, strict=True))  # type: ignore[return-value]

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        """The sum of the kernels times values [m, K], self-pairs left out."""
        return sum(kernel.apply(values, backwards=backwards) for kernel in self.kernels)  # type: ignore[return-value]

    def overflowed(self) -> jax.Array:
        """Whether one had too little room."""
        return jnp.any(jnp.stack([kernel.overflowed() for kernel in self.kernels]))

    def without_overflow(self) -> "KernelSum":
        """The sum, finite even where one overflowed."""
        return KernelSum(tuple(kernel.without_overflow() for kernel in self.kernels))

    def kept(self) -> "KernelSum":
        """The sum for many products."""
        return KernelSum(tuple(kernel.kept() for kernel in self.kernels))

    def largest_row_sums(self) -> tuple[jax.Array, jax.Array]:
        """Bounds of the sums over a row of the entries above 0, and of the magnitudes of those below 0."""
        sums = [kernel.largest_row_sums() for kernel in self.kernels]
        return sum(positive for positive, _ in sums), sum(negative for _, negative in sums)  # type: ignore[return-value]


def volume_features(
    volume: ArrayLike, *, position_widths: Sequence[float], channel_width: ArrayLike | None = None
) -> jax.Array:
    """Positions and values of every voxel, each in units of its width.

    Args:
      volume: [D, H, W, C] a volume or a video, channels last, in any units; any real dtype.
      position_widths: three standard deviations along depth (or time), rows and columns, in voxels, > 0; an
        anisotropic scan has smaller ones along its thick slices.
      channel_width: standard deviation in the units of the channels, > 0; one for all, or C of them. None leaves the
        channels out, for the smoothness kernel.
    Returns:
      [D * H * W, 3 + C] features, or [D * H * W, 3] without channels; voxels in C order.
    Raises:
      ValueError: if `volume` is not [D, H, W, C], a value that is known is not finite, or a width is not positive.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import volume_features
      >>> volume_features(np.zeros((4, 5, 6, 1)), position_widths=(1, 3, 3), channel_width=10).shape
      (120, 4)
    """
    remedy = "give a volume with its channels last, volume[..., None] if it has one"
    *sizes, channels = check_shape("volume", volume, ("D", "H", "W", "C"), remedy)
    if len(position_widths) != 3:
        raise ValueError(f"position_widths: expected 3 numbers, got {len(position_widths)}; one for each axis")
    for width in position_widths:
        check_number("position_widths", width, minimum=0, strict=True, remedy=WIDTH_REMEDY)
    check_finite("volume", volume, "look at how it was read")
    values = promote_float(volume)
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(size) for size in sizes), indexing="ij"), axis=-1)
    positions = grid.reshape(-1, 3).astype(values.dtype) / jnp.asarray(tuple(position_widths), values.dtype)
    if channel_width is None:
        return positions
    check_finite("channel_width", channel_width, WIDTH_REMEDY, minimum=1e-30)
    widths = jnp.asarray(channel_width, values.dtype)
    return jnp.concatenate([positions, values.reshape(-1, channels) / widths], axis=1)


def feature_kernel(
    *features: ArrayLike,
    weights: Sequence[ArrayLike] | ArrayLike,
    form: str | None = None,
    normalisation: str = "symmetric",
) -> KernelSum:
    r"""The pairwise kernel between things with features of any kind: the voxels of a volume, the pixels of a video.

    .. math:: K = \sum_n w_n N\bigl(\exp(-|f^n_i - f^n_j|^2 / 2)\bigr), \qquad k_{ii} = 0

    For an image `image_kernel` is faster: its spatial Gaussian is separable.

    Args:
      *features: [m, d_n] each, in units of their widths: `volume_features`, or your own.
      weights: w_n >= 0, one for each; a number is good for a single set.
      form: 'exact', whose time is quadratic in m, or 'lattice'; None is 'exact' up to 4,096 and for more than seven
        features, and 'lattice' otherwise. A lattice wants a normalisation.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.crf.exact.dense_kernel`.
    Returns:
      A `KernelSum`, for `mean_field`, `pairwise_energy` and `kl_to_prior` with values [m, K].
    Raises:
      ValueError: if the features are not matrices of one height, a value that is known is not finite, or a form, a
        normalisation or a weight is out of range.
    References:
      Krahenbuhl and Koltun 2011, eq. 2.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import feature_kernel, mean_field, volume_features
      >>> scan = np.zeros((4, 5, 6, 1))
      >>> appearance = volume_features(scan, position_widths=(2, 8, 8), channel_width=10)
      >>> smoothness = volume_features(scan, position_widths=(1, 2, 2))
      >>> kernel = feature_kernel(appearance, smoothness, weights=(10, 3))
      >>> mean_field(np.zeros((120, 2)), kernel).shape
      (120, 2)
    """
    of_sets: list[Any] = [weights] if np.ndim(weights) == 0 else list(weights)  # type: ignore[arg-type]
    if len(features) != len(of_sets) or not features:
        raise ValueError(f"weights: expected one for each set of features, got {len(of_sets)} for {len(features)}")
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation: expected one of {sorted(NORMALISATIONS)}, got {normalisation!r}")
    if form not in (None, "exact", "lattice"):
        raise ValueError(f"form: expected 'exact', 'lattice' or None, got {form!r}")
    num_pixels, _ = check_shape("features", features[0], ("m", "d"), "one row for each pixel or voxel")
    kernels = []
    for each, weight in zip(features, of_sets, strict=True):
        _, dimensions = check_shape("features", each, (num_pixels, "d"), "one row for each pixel or voxel")
        check_number("weights", weight, minimum=0, remedy="weights are >= 0: a pair with different labels costs them")
        check_finite("features", each, "look at what they were computed from")
        each = promote_float(each)
        exact = num_pixels <= 64**2 or dimensions > 7 if form is None else form == "exact"
        bilateral: BilateralForm
        if exact:
            bilateral = ExactGaussian(each, jnp.ones_like(each[:, 0]))
        else:
            bilateral = with_room(each, None, None, None, default_capacity(num_pixels, dimensions))
        kernels.append(assembled((num_pixels, 1), each.dtype, bilateral, weight, normalisation))
    return KernelSum(tuple(kernels))
