"""The pairwise kernel of one image: three functions that build it, one for each form, and one that chooses.

* `exact_image_kernel`: every pair, block by block; time quadratic in the pixels;
* `anchor_image_kernel`: dense matrix products through blocks of space and anchors in colour; right to a few per
  cent without any normalisation;
* `lattice_image_kernel`: the permutohedral lattice; the fastest for large images, right to a few per cent
  after normalisation;
* `image_kernel` chooses by the numbers of pixels and channels and the normalisation.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.anchor_building import build_anchors
from lcrf_jax.crf.assembly import assembled, inverse_root, with_room
from lcrf_jax.crf.exact import NORMALISATIONS, ExactGaussian
from lcrf_jax.crf.forms import BilateralForm
from lcrf_jax.crf.kernel import ImageKernel, SpatialGaussian
from lcrf_jax.crf.lattice import Lattice
from lcrf_jax.crf.lattice_building import default_capacity
from lcrf_jax.crf.params import KernelParams, check_image_shape, checked_params, colours, guide_features, static_width
from lcrf_jax.crf.spatial import LEAST_WIDTH_OF_PAIRS, gaussian_taps, taps_of_pairs
from lcrf_jax.numerics import check_shape, known_number

# Sizes of the lattice's cells in widths, rows and columns and then every channel: finer ones are slower and no closer
# to the exact sum than the lattice is anyway.
_POSITION_CELL, _COLOUR_CELL = 0.2, 0.5
# Pixels up to which the exact form is the default; the measurements are in docs/engine.md.
_EXACT_PIXELS = 48**2
# Pixels from which on the spatial Gaussian beside a lattice is filtered by pairs of rows: one per cent off, which is
# far less than the lattice is.
_PAIRS_PIXELS = 96**2
# Radius up to which taps beyond the grid are kept: fewer of them may be rounded in another order.
_LEAST_CUT = 512
# Channels up to which a lattice is close to the exact sum.
_LATTICE_CHANNELS = 5


def _counted(image: ArrayLike, valid: ArrayLike | None) -> jax.Array | None:
    """Which pixels count [m], or None for all."""
    if valid is None:
        return None
    check_shape("valid", valid, np.shape(image)[:2], "give one boolean per pixel of the image")
    return jnp.reshape(valid, (-1,)).astype(bool)


def _is_zero(weight):
    """Whether a weight is known to be 0 while a function is traced."""
    return known_number(weight) == 0


def _assembled(
    image: jax.Array,
    params: KernelParams,
    bilateral: BilateralForm | None,
    normalisation: str,
    counted: jax.Array | None,
) -> ImageKernel:
    """The kernel of an image of both Gaussians; `bilateral` is not normalised yet."""
    grid, dtype = image.shape[:2], image.dtype
    kernel = assembled(grid, dtype, bilateral, params.bilateral_weight, normalisation, counted)
    gaussian = None
    mask = jnp.ones(math.prod(grid), dtype) if counted is None else counted.astype(dtype)
    scale = mask
    if not _is_zero(params.gaussian_weight):
        width = static_width(params, "gaussian_position_width")
        by_pairs = isinstance(bilateral, Lattice) and len(mask) >= _PAIRS_PIXELS and width >= LEAST_WIDTH_OF_PAIRS
        # What would reach beyond the grid is left out: of a wide Gaussian it would fill the memory.
        most = max(_LEAST_CUT, *grid)
        row_taps = jnp.asarray(taps_of_pairs(width, most=most), dtype) if by_pairs else None
        taps = jnp.asarray(gaussian_taps(width, most=most), dtype)
        gaussian = SpatialGaussian(taps, mask.reshape(grid), row_taps)
        if normalisation != "none":
            scale = inverse_root(gaussian.filtered(mask.reshape(*grid, 1)).reshape(-1), mask)
            gaussian = gaussian._replace(scale=scale.reshape(grid))
    row_scales = None if kernel.row_scales is None else (kernel.row_scales[0], scale)
    weight = jnp.asarray(params.gaussian_weight, dtype)
    return kernel._replace(gaussian=gaussian, gaussian_weight=weight, row_scales=row_scales)


def exact_image_kernel(
    image: ArrayLike,
    params: KernelParams,
    *,
    normalisation: str = "symmetric",
    valid: ArrayLike | None = None,
    colour_max: float | None = 255.0,
) -> ImageKernel:
    r"""The pairwise kernel of the dense CRF without its matrix, every pair exactly.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    The same numbers as `lcrf_jax.crf.exact.dense_kernel`, but for the spatial Gaussian being cut off at four
    widths. The bilateral one is computed anew, block by block, at every use: bounded memory, and time
    quadratic in the pixels.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      params: `KernelParams` for this grid; `gaussian_position_width` a Python number. A weight that is the
        Python number 0 leaves its Gaussian out.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.crf.exact.dense_kernel`.
      valid: [H, W] booleans, at least one of them true; pixels that are false, such as padding, have no pairs
        at all, and the others none with them. None means that all pixels count.
      colour_max: the value of full colour in `image`: 255, or 1.
    Returns:
      An `ImageKernel`.
    Raises:
      ValueError: if `image` is not [H, W, C], its values do not fit `colour_max`, `valid` does not fit it, a
        width is not positive, or the normalisation is unknown.
      TypeError: if `gaussian_position_width` is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import KernelParams, exact_image_kernel
      >>> kernel = exact_image_kernel(np.zeros((6, 8, 3), np.uint8), KernelParams().at_stride(8))
      >>> kernel.apply(np.ones((48, 2))).shape
      (48, 2)
    """
    image, counted = prepared_image(image, params, normalisation, valid, colour_max)
    bilateral = None
    if not _is_zero(params.bilateral_weight):
        guide = _guide(image, params)
        bilateral = ExactGaussian(guide, jnp.ones_like(guide[:, 0]))
    return _assembled(image, params, bilateral, normalisation, counted)


def anchor_image_kernel(
    image: ArrayLike,
    params: KernelParams,
    *,
    normalisation: str = "symmetric",
    valid: ArrayLike | None = None,
    colour_max: float | None = 255.0,
    num_anchors: int | None = None,
) -> ImageKernel:
    r"""The pairwise kernel of the dense CRF by dense matrix products, through blocks of space and colour anchors.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    The bilateral Gaussian is `lcrf_jax.crf.anchors`, symmetric and close to the exact one with any normalisation;
    the spatial one is separable and cut off at four widths.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      params: `KernelParams` for this grid; both position widths Python numbers, as they set sizes. A weight
        that is the Python number 0 leaves its Gaussian out.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.crf.exact.dense_kernel`.
      valid: [H, W] booleans, at least one of them true; pixels that are false, such as padding, have no pairs
        at all, and the others none with them. None means that all pixels count.
      colour_max: the value of full colour in `image`: 255, or 1.
      num_anchors: static number of anchors in colour; None is the default of `build_anchors`.
    Returns:
      An `ImageKernel`.
    Raises:
      ValueError: as `exact_image_kernel`.
      TypeError: if a position width is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Williams and Seeger 2001, the Nystrom method.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import KernelParams, anchor_image_kernel
      >>> kernel = anchor_image_kernel(np.zeros((6, 8, 3), np.uint8), KernelParams().at_stride(8))
      >>> kernel.apply(np.ones((48, 2))).shape
      (48, 2)
    """
    image, counted = prepared_image(image, params, normalisation, valid, colour_max)
    bilateral = None
    if not _is_zero(params.bilateral_weight):
        bilateral = build_anchors(
            _guide(image, params)[:, 2:].reshape(image.shape),
            position_width=static_width(params, "bilateral_position_width"),
            colour_width=1.0,
            num_anchors=num_anchors,
            valid=valid,
        )
    return _assembled(image, params, bilateral, normalisation, counted)


def lattice_image_kernel(
    image: ArrayLike,
    params: KernelParams,
    *,
    normalisation: str = "symmetric",
    valid: ArrayLike | None = None,
    colour_max: float | None = 255.0,
    capacity: int | None = None,
) -> ImageKernel:
    r"""The pairwise kernel of the dense CRF on a downsampled permutohedral lattice, for images of any size.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    Row sums are the lattice's own, so that its constant cancels in the normalisations 'symmetric' and 'row';
    with 'none' values are some tens of per cent too small. The spatial Gaussian is separable and cut off at
    four widths; from 96 x 96 pixels and a width of 3 on it is filtered by pairs of rows, to one per cent. A
    lattice that overflowed would be silently wrong, so everything this kernel touches is NaN then.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      params: `KernelParams` for this grid; `gaussian_position_width` a Python number. A weight that is the
        Python number 0 leaves its Gaussian out.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.crf.exact.dense_kernel`.
      valid: [H, W] booleans, at least one of them true; pixels that are false, such as padding, have no pairs
        at all, and the others none with them. None means that all pixels count.
      colour_max: the value of full colour in `image`: 255, or 1.
      capacity: static number of lattice vertices; None chooses by the widths, if these are Python numbers, and
        the pixels, within the bounds of `lcrf_jax.crf.lattice_building.default_capacity`.
    Returns:
      An `ImageKernel`; `lattice_overflowed(kernel.bilateral)` tells whether the capacity sufficed.
    Raises:
      ValueError: as `exact_image_kernel`.
      TypeError: if `gaussian_position_width` is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Adams, Baek and Davis 2010.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import KernelParams, lattice_image_kernel
      >>> kernel = lattice_image_kernel(np.zeros((6, 8, 3), np.uint8), KernelParams().at_stride(8))
      >>> kernel.apply(np.ones((48, 2))).shape
      (48, 2)
    """
    image, counted = prepared_image(image, params, normalisation, valid, colour_max)
    bilateral = None
    if not _is_zero(params.bilateral_weight):
        guide = _guide(image, params)
        cell_sizes = (_POSITION_CELL,) * 2 + (_COLOUR_CELL,) * image.shape[-1]
        bilateral = with_room(guide, cell_sizes, counted, capacity, _lattice_capacity(image, params))
    return _assembled(image, params, bilateral, normalisation, counted)


FORMS: dict[str, Callable[..., ImageKernel]] = {
    "anchors": anchor_image_kernel,
    "exact": exact_image_kernel,
    "lattice": lattice_image_kernel,
}


def default_form(num_pixels: int, normalisation: str = "symmetric", *, num_channels: int = 3) -> str:
    """The form that `image_kernel` takes: the fastest one whose energy and gradient are right to a few per cent.

    Args:
      num_pixels: H * W, static.
      normalisation: of the kernel.
      num_channels: C, static.
    Returns:
      A key of `FORMS`: 'exact' up to 48 x 48 pixels, and for images of more than 5 channels of any size, whose colours
      neither a lattice nor anchors represent; otherwise 'lattice' for a normalised kernel and 'anchors' for the
      normalisation 'none', where a lattice is off by its constant.
    """
    if num_pixels <= _EXACT_PIXELS or num_channels > _LATTICE_CHANNELS:
        return "exact"
    return "anchors" if normalisation == "none" else "lattice"


def image_kernel(
    image: ArrayLike,
    params: KernelParams,
    *,
    form: str | None = None,
    normalisation: str = "symmetric",
    valid: ArrayLike | None = None,
    colour_max: float | None = 255.0,
    capacity: int | None = None,
    num_anchors: int | None = None,
) -> ImageKernel:
    r"""The pairwise kernel of the dense CRF of one image, in the form that suits its size.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      params: `KernelParams` for this grid; its position widths Python numbers.
      form: a key of `FORMS`; None is `default_form(H * W, normalisation, num_channels=C)`.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.crf.exact.dense_kernel`.
      valid: [H, W] booleans, the pixels that count, see `exact_image_kernel`; None is all.
      colour_max: the value of full colour in `image`: 255, or 1.
      capacity: of the form 'lattice', where that is taken, see `lattice_image_kernel`.
      num_anchors: of the form 'anchors', where that is taken, see `anchor_image_kernel`.
    Returns:
      An `ImageKernel`.
    Raises:
      ValueError: if the form is unknown, and as `exact_image_kernel`.
      TypeError: if a position width is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import KernelParams, image_kernel
      >>> kernel = image_kernel(np.zeros((6, 8, 3), np.uint8), KernelParams().at_stride(8))
      >>> kernel.apply(np.ones((48, 2))).shape
      (48, 2)
    """
    height, width, channels = check_image_shape(image)
    form = default_form(height * width, normalisation, num_channels=channels) if form is None else form
    if form not in FORMS:
        raise ValueError(f"form: expected one of {sorted(FORMS)} or None, got {form!r}")
    options = {"anchors": {"num_anchors": num_anchors}, "lattice": {"capacity": capacity}}.get(form, {})
    return FORMS[form](image, params, normalisation=normalisation, valid=valid, colour_max=colour_max, **options)


def prepared_image(
    image: ArrayLike, params: KernelParams, normalisation: str, valid: ArrayLike | None, colour_max: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """What a kernel is made of, once everything is checked.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      params: `KernelParams`.
      normalisation: one of `lcrf_jax.crf.exact.NORMALISATIONS`.
      valid: [H, W] booleans, or None for all.
      colour_max: the value of full colour in `image`, or None.
    Returns:
      The image in 0..255 as floats, and which of its pixels count [m], or None.
    Raises:
      ValueError: if one of them does not fit.
      TypeError: if one of them is of another kind.
    """
    checked_params(params)
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation: expected one of {sorted(NORMALISATIONS)}, got {normalisation!r}")
    return colours(image, colour_max=colour_max), _counted(image, valid)


def _lattice_capacity(image, params):
    """Two to three times the vertices that photographs need at these widths; see `default_capacity` for its bounds."""
    height, width, channels = image.shape
    if channels > 3:
        # Noise fills the space of many channels: then hardly two pixels share a vertex.
        return height * width * (channels + 3)
    widths = params.bilateral_position_width, params.bilateral_colour_width
    known = [known_number(width) for width in widths]
    share = 1.0 if None in known else min(1.0, 320 / math.prod(known))
    return default_capacity(height * width, 2 + channels, share=share)


def _guide(image, params):
    return guide_features(
        image,
        position_width=params.bilateral_position_width,
        colour_width=params.bilateral_colour_width,
    )
