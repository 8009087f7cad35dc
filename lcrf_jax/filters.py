r"""The pairwise kernel of one image as fast filters, in three forms behind one small interface.

A dense CRF meets its kernel only in products with values of the pixels. What `lcrf_jax.crf` needs of a kernel
is

* `splat(values [m, K])`: whatever the form sums up first, a pytree of arrays with K columns;
* `blur(splatted)`: the kernel between those sums, symmetric, of the same structure;
* `slice(blurred)`: the result at the pixels [m, K]. `slice(blur(splat(values)))` is the symmetric part of the
  kernel times the values, self-pairs left out, and `slice` is the transpose of `splat`;
* `apply(values, backwards=False)`: the kernel itself times the values, self-pairs left out; faster than the
  symmetric part where the form is not symmetric of itself. Such a form has two orders to work in, each the
  transpose of the other, and `backwards`, which may be traced, takes the second.

`DenseKernel` has them for a matrix. `ImageKernel` has them for the two Gaussians of an image; its bilateral
one takes one of three forms, and each function below builds one:

* `exact_image_kernel`: every pair, block by block; time quadratic in the pixels;
* `anchor_image_kernel`: dense matrix products through blocks of space and anchors in colour; right to a few per
  cent without any normalisation;
* `lattice_image_kernel`: the permutohedral lattice; the fastest for large images, right to a few per cent
  after normalisation.

`image_kernel` chooses by the number of pixels and the normalisation.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcrf_jax.anchors import (
    Anchors,
    anchors_diagonal,
    blur_anchors,
    build_anchors,
    scaled_anchors,
    slice_anchors,
    splat_anchors,
)
from lcrf_jax.kernels import NORMALISATIONS, colours, filter_exact, gaussian_taps, guide_features, separable_filter
from lcrf_jax.lattice import (
    Lattice,
    apply_lattice,
    blur_lattice,
    build_lattice,
    default_capacity,
    lattice_diagonal,
    reversed_lattice,
    scaled_lattice,
    slice_lattice,
    splat_lattice,
)
from lcrf_jax.numerics import check_shape, promote_float

__all__ = [
    "FORMS",
    "DenseKernel",
    "ExactGaussian",
    "ImageKernel",
    "SpatialGaussian",
    "anchor_image_kernel",
    "default_form",
    "exact_image_kernel",
    "filter_symmetric",
    "filter_with",
    "image_kernel",
    "lattice_image_kernel",
]

_ONE_SET = "flatten the pixels to one axis, classes last; for a batch use jax.vmap"
# Sizes of the lattice's cells in widths, rows and columns and then every channel: finer ones are slower and no closer
# to the exact sum than the lattice is anyway.
_POSITION_CELL, _COLOUR_CELL = 0.2, 0.5
# Pixels up to which the exact form is the default; the measurements are in docs/engine.md.
_EXACT_PIXELS = 48**2


class ExactGaussian(NamedTuple):
    """The Gaussian between features, summed over all pairs.

    Attributes:
      features: [m, d] features in units of their widths.
      scale: [m] factors s of diag(s) K diag(s).
    """

    features: jax.Array
    scale: jax.Array


class SpatialGaussian(NamedTuple):
    """The Gaussian over the positions of a grid, cut off at four widths, self-pairs left out.

    Attributes:
      taps: [2 r + 1] the Gaussian in one dimension.
      scale: [H, W] factors s of diag(s) K diag(s).
    """

    taps: jax.Array
    scale: jax.Array


class _Form(NamedTuple):
    """What `ImageKernel` needs of a form. `apply` is all three steps, with a blur that need not be symmetric."""

    splat: object
    blur: object
    slice: object
    apply: object
    diagonal: object
    scaled: object


def _same(_, values):
    return values


def _applied_anchors(anchors, values):
    return slice_anchors(anchors, blur_anchors(anchors, splat_anchors(anchors, values)))


def _applied_exact(exact, values):
    return exact.scale[:, None] * filter_exact(exact.features, exact.scale[:, None] * values)


_FORM_OF_TYPE = {
    Lattice: _Form(splat_lattice, blur_lattice, slice_lattice, apply_lattice, lattice_diagonal, scaled_lattice),
    Anchors: _Form(splat_anchors, blur_anchors, slice_anchors, _applied_anchors, anchors_diagonal, scaled_anchors),
    ExactGaussian: _Form(
        _same,
        _applied_exact,
        _same,
        _applied_exact,
        lambda exact: jnp.square(exact.scale),
        lambda exact, scale: exact._replace(scale=exact.scale * scale),
    ),
}


class ImageKernel(NamedTuple):
    r"""The pairwise kernel of one image as two filters.

    .. math:: K = w_1 R_1 K_{bilateral} R_1^{-1} + w_2 R_2 K_{spatial} R_2^{-1}, \qquad k_{ii} = 0

    with both Gaussians normalised symmetrically, or not at all, and R the identity; for row normalisation
    R is D^-1/2. The two weights may be replaced, also by traced values, without building anything again.

    Attributes:
      bilateral: the bilateral Gaussian, an `ExactGaussian`, `Anchors` or a `Lattice`; None if its weight is 0.
      bilateral_weight: w1.
      bilateral_diagonal: [m] its self-pairs.
      gaussian: the `SpatialGaussian`; None if its weight is 0.
      gaussian_weight: w2.
      row_scales: ([m], [m]) diagonals of R_1 and R_2, for row normalisation alone; None for the identity.
    """

    bilateral: Lattice | Anchors | ExactGaussian | None
    bilateral_weight: jax.Array
    bilateral_diagonal: jax.Array
    gaussian: SpatialGaussian | None
    gaussian_weight: jax.Array
    row_scales: tuple[jax.Array, jax.Array] | None

    def splat(self, values):
        """The sums of values [m, K] that `blur` needs: of the bilateral and the spatial Gaussian, and themselves."""
        values = promote_float(values)
        check_shape("values", values, (*self.bilateral_diagonal.shape, "K"), _ONE_SET)
        bilateral_scale, gaussian_scale = self.row_scales or (None, None)
        bilateral, gaussian = (), ()
        if self.bilateral is not None:
            form = _FORM_OF_TYPE[type(self.bilateral)]
            bilateral = tuple(form.splat(self.bilateral, side) for side in _sides(values, bilateral_scale))
        if self.gaussian is not None:
            gaussian = _sides(values, gaussian_scale)
        return bilateral, gaussian, values

    def blur(self, splatted):
        """The symmetric part of the kernel between the sums that `splat` returns; of the same structure."""
        bilateral, gaussian, values = splatted
        if self.bilateral is not None:
            form = _FORM_OF_TYPE[type(self.bilateral)]
            blurred = _crossed(lambda table: form.blur(self.bilateral, table), bilateral)
            bilateral = tuple(self.bilateral_weight * part for part in blurred)
        if self.gaussian is not None:
            blurred = _crossed(lambda table: _spatial_sum(self.gaussian, table), gaussian)
            gaussian = tuple(self.gaussian_weight * part for part in blurred)
        return bilateral, gaussian, -self.bilateral_weight * self.bilateral_diagonal[:, None] * values

    def slice(self, blurred):
        """What `blur` returns, at the pixels [m, K]."""
        bilateral, gaussian, values = blurred
        bilateral_scale, gaussian_scale = self.row_scales or (None, None)
        if self.bilateral is not None:
            form = _FORM_OF_TYPE[type(self.bilateral)]
            values = values + _joined([form.slice(self.bilateral, part) for part in bilateral], bilateral_scale)
        if self.gaussian is not None:
            values = values + _joined(gaussian, gaussian_scale)
        return values

    def apply(self, values, *, backwards=False):
        """The kernel times values [m, K], self-pairs left out; a lattice is blurred in one order only."""
        values = promote_float(values)
        check_shape("values", values, (*self.bilateral_diagonal.shape, "K"), _ONE_SET)
        bilateral_scale, gaussian_scale = self.row_scales or (None, None)
        total = -self.bilateral_weight * self.bilateral_diagonal[:, None] * values
        if self.bilateral is not None:
            form = _FORM_OF_TYPE[type(self.bilateral)]
            bilateral = self.bilateral
            if isinstance(bilateral, Lattice):
                bilateral = reversed_lattice(bilateral, backwards)
            product = form.apply(bilateral, _sides(values, bilateral_scale)[-1])
            total = total + self.bilateral_weight * _joined([product], bilateral_scale)
        if self.gaussian is not None:
            product = _spatial_sum(self.gaussian, _sides(values, gaussian_scale)[-1])
            total = total + self.gaussian_weight * _joined([product], gaussian_scale)
        return total


def _inverse(scale):
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)


def _sides(values, scale):
    """What the two sides of R K R^-1 are applied to; one and the same where R is the identity."""
    if scale is None:
        return (values,)
    return scale[:, None] * values, _inverse(scale)[:, None] * values


def _crossed(function, sides):
    """The symmetric part of R K R^-1 between two sides: half of each goes to the other."""
    if len(sides) == 1:
        return (function(sides[0]),)
    left, right = sides
    halves = function(jnp.concatenate([right, left], axis=-1) / 2)
    return tuple(jnp.split(halves, 2, axis=-1))


def _joined(parts, scale):
    """The transpose of `_sides`; of a single part, its left side."""
    if scale is None:
        return parts[0]
    total = scale[:, None] * parts[0]
    return total if len(parts) == 1 else total + _inverse(scale)[:, None] * parts[1]


def _spatial_sum(gaussian, values):
    height, width = gaussian.scale.shape
    grid = gaussian.scale[:, :, None] * values.reshape(height, width, -1)
    filtered = gaussian.scale[:, :, None] * (separable_filter(grid, gaussian.taps) - grid)
    return filtered.reshape(values.shape)


class DenseKernel(NamedTuple):
    """A pairwise kernel as a matrix, with the methods that `lcrf_jax.crf` asks for; see the module.

    Attributes:
      matrix: [m, m] kernel; what is on its diagonal is ignored.
    """

    matrix: jax.Array

    def splat(self, values):
        """The values [m, K] themselves, promoted and checked."""
        check_shape("values", values, ("m", "K"), _ONE_SET)
        remedy = "the kernel needs one row and column per pixel"
        check_shape("kernel", self.matrix, (len(values), len(values)), remedy)
        return promote_float(values)

    def blur(self, values):
        """The symmetric part of the kernel times values [m, K], self-pairs left out."""
        matrix = promote_float(self.matrix)
        return (_dense_product(matrix, values) + _dense_product(matrix.T, values)) / 2

    def slice(self, values):
        """The values themselves."""
        return values

    def apply(self, values, *, backwards=False):
        """The kernel times values [m, K], self-pairs left out."""
        del backwards
        return _dense_product(promote_float(self.matrix), self.splat(values))


def _dense_product(matrix, values):
    product = jnp.matmul(matrix, values, precision=jax.lax.Precision.HIGHEST)
    return product - jnp.diagonal(matrix)[:, None] * values


def as_kernel(kernel):
    """A kernel object for what callers may give as a kernel.

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or an object with the four methods of the module.
    Returns:
      The object itself, or a `DenseKernel`.
    Raises:
      None.
    References:
      None.
    """
    return kernel if hasattr(kernel, "splat") else DenseKernel(jnp.asarray(kernel))


def filter_with(kernel, values):
    r"""The kernel applied to values, self-pairs left out.

    .. math:: v'_i = \sum_{j \ne i} k_{ij} v_j

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or a kernel object; see the module.
      values: [m, K] values to filter.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if the kernel does not fit the values.
    References:
      Krahenbuhl and Koltun 2011, section 3.
    """
    return as_kernel(kernel).apply(values)


def filter_symmetric(kernel, values):
    r"""The symmetric part of the kernel applied to values, self-pairs left out.

    .. math:: v'_i = \sum_{j \ne i} \tfrac12 (k_{ij} + k_{ji}) v_j

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or a kernel object; see the module.
      values: [m, K] values to filter.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if the kernel does not fit the values.
    References:
      None.
    """
    kernel = as_kernel(kernel)
    return kernel.slice(kernel.blur(kernel.splat(values)))


def _counted(image, valid):
    """Which pixels count [m], or None for all."""
    if valid is None:
        return None
    check_shape("valid", valid, jnp.shape(image)[:2], "give one boolean per pixel of the image")
    return jnp.reshape(valid, (-1,)).astype(bool)


def _is_zero(weight):
    """Whether a weight is known to be 0 while a function is traced."""
    return isinstance(weight, (int, float)) and weight == 0


def _assembled(image, params, bilateral, normalisation, counted):
    """The kernel of an image of both Gaussians; `bilateral` is not normalised yet."""
    height, width, _ = image.shape
    dtype = image.dtype
    mask = jnp.ones(height * width, dtype) if counted is None else counted.astype(dtype)
    bilateral_scale = gaussian_scale = mask
    diagonal, gaussian = jnp.zeros_like(mask), None
    if bilateral is not None:
        form = _FORM_OF_TYPE[type(bilateral)]
        diagonal = form.diagonal(bilateral)
        if normalisation != "none":
            table = form.blur(bilateral, form.splat(bilateral, mask[:, None]))
            sums = form.slice(bilateral, table)[:, 0]
            if isinstance(bilateral, Anchors):
                # A pixel far from all anchors lacks most of its self-pair, which is known to be 1.
                sums = jnp.maximum(sums - diagonal, 0) + 1
            bilateral_scale = _inverse_root(sums, mask)
        bilateral = form.scaled(bilateral, bilateral_scale)
        diagonal = diagonal * jnp.square(bilateral_scale)
        if isinstance(bilateral, Lattice):
            overflowed = bilateral.num_vertices > bilateral.neighbours.shape[-1]
            if normalisation != "none":
                # An upper bound; but normalised rows, with the self-pair, sum to 1.
                diagonal = jnp.minimum(diagonal, 1)
            diagonal = jnp.where(overflowed, jnp.nan, diagonal)
    if not _is_zero(params.gaussian_weight):
        taps = jnp.asarray(gaussian_taps(params.gaussian_position_width), dtype)
        if normalisation != "none":
            sums = separable_filter(mask.reshape(height, width, 1), taps).reshape(-1)
            gaussian_scale = _inverse_root(sums, mask)
        gaussian = SpatialGaussian(taps, gaussian_scale.reshape(height, width))
    return ImageKernel(
        bilateral=bilateral,
        bilateral_weight=jnp.asarray(params.bilateral_weight, dtype),
        bilateral_diagonal=diagonal,
        gaussian=gaussian,
        gaussian_weight=jnp.asarray(params.gaussian_weight, dtype),
        row_scales=(bilateral_scale, gaussian_scale) if normalisation == "row" else None,
    )


def _inverse_root(sums, mask):
    """sums^-1/2 where the mask is not 0, and 0 elsewhere."""
    return jnp.where(mask > 0, jax.lax.rsqrt(jnp.where(mask > 0, sums, 1)), 0)


def exact_image_kernel(image, params, *, normalisation="symmetric", valid=None, colour_max=255.0):
    r"""The pairwise kernel of the dense CRF without its matrix, every pair exactly.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    The same numbers as `lcrf_jax.kernels.dense_kernel`, but for the spatial Gaussian being cut off at four
    widths. The bilateral one is computed anew, block by block, at every use: bounded memory, and time
    quadratic in the pixels.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.kernels.colours`.
      params: `KernelParams` for this grid; `gaussian_position_width` a Python number. A weight that is the
        Python number 0 leaves its Gaussian out.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.kernels.dense_kernel`.
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
    """
    image, counted = _prepared(image, normalisation, valid, colour_max)
    bilateral = None
    if not _is_zero(params.bilateral_weight):
        guide = _guide(image, params)
        bilateral = ExactGaussian(guide, jnp.ones_like(guide[:, 0]))
    return _assembled(image, params, bilateral, normalisation, counted)


def anchor_image_kernel(
    image, params, *, normalisation="symmetric", valid=None, colour_max=255.0, num_anchors=None
):
    r"""The pairwise kernel of the dense CRF by dense matrix products, through blocks of space and colour anchors.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    The bilateral Gaussian is `lcrf_jax.anchors`, symmetric and close to the exact one with any normalisation;
    the spatial one is separable and cut off at four widths.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.kernels.colours`.
      params: `KernelParams` for this grid; both position widths Python numbers, as they set sizes. A weight
        that is the Python number 0 leaves its Gaussian out.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.kernels.dense_kernel`.
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
    """
    image, counted = _prepared(image, normalisation, valid, colour_max)
    bilateral = None
    if not _is_zero(params.bilateral_weight):
        bilateral = build_anchors(
            _guide(image, params)[:, 2:].reshape(image.shape),
            position_width=params.bilateral_position_width,
            colour_width=1.0,
            num_anchors=num_anchors,
            valid=valid,
        )
    return _assembled(image, params, bilateral, normalisation, counted)


def lattice_image_kernel(
    image, params, *, normalisation="symmetric", valid=None, colour_max=255.0, capacity=None
):
    r"""The pairwise kernel of the dense CRF on a downsampled permutohedral lattice, for images of any size.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    Row sums are the lattice's own, so that its constant cancels in the normalisations 'symmetric' and 'row';
    with 'none' values are some tens of per cent too small. The spatial Gaussian is separable and cut off at
    four widths. A lattice that overflowed would be silently wrong, so everything this kernel touches is NaN
    then.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.kernels.colours`.
      params: `KernelParams` for this grid; `gaussian_position_width` a Python number. A weight that is the
        Python number 0 leaves its Gaussian out.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.kernels.dense_kernel`.
      valid: [H, W] booleans, at least one of them true; pixels that are false, such as padding, have no pairs
        at all, and the others none with them. None means that all pixels count.
      colour_max: the value of full colour in `image`: 255, or 1.
      capacity: static number of lattice vertices; None chooses by the widths, if these are Python numbers, and
        the pixels, within the bounds of `lcrf_jax.lattice.default_capacity`.
    Returns:
      An `ImageKernel`; `lattice_overflowed(kernel.bilateral)` tells whether the capacity sufficed.
    Raises:
      ValueError: as `exact_image_kernel`.
      TypeError: if `gaussian_position_width` is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Adams, Baek and Davis 2010.
    """
    image, counted = _prepared(image, normalisation, valid, colour_max)
    bilateral = None
    if not _is_zero(params.bilateral_weight):
        guide = _guide(image, params)
        cell_sizes = (_POSITION_CELL,) * 2 + (_COLOUR_CELL,) * image.shape[-1]
        capacity = _lattice_capacity(image, params) if capacity is None else capacity
        bilateral = build_lattice(guide, capacity, cell_sizes=cell_sizes, valid=counted)
    return _assembled(image, params, bilateral, normalisation, counted)


FORMS = {"anchors": anchor_image_kernel, "exact": exact_image_kernel, "lattice": lattice_image_kernel}


def default_form(num_pixels, normalisation="symmetric"):
    """The form that `image_kernel` takes: the fastest one whose energy and gradient are right to a few per cent.

    Args:
      num_pixels: H * W, static.
      normalisation: of the kernel.
    Returns:
      A key of `FORMS`: 'exact' up to 48 x 48 pixels; beyond, 'lattice' for a normalised kernel and 'anchors' for
      the normalisation 'none', where a lattice is off by its constant.
    Raises:
      None.
    References:
      None.
    """
    if num_pixels <= _EXACT_PIXELS:
        return "exact"
    return "anchors" if normalisation == "none" else "lattice"


def image_kernel(image, params, *, form=None, normalisation="symmetric", valid=None, colour_max=255.0):
    r"""The pairwise kernel of the dense CRF of one image, in the form that suits its size.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    Args:
      image: [H, W, C] colours, see `lcrf_jax.kernels.colours`.
      params: `KernelParams` for this grid; its position widths Python numbers.
      form: a key of `FORMS`; None is `default_form(H * W, normalisation)`.
      normalisation: 'none', 'row' or 'symmetric', see `lcrf_jax.kernels.dense_kernel`.
      valid: [H, W] booleans, the pixels that count, see `exact_image_kernel`; None is all.
      colour_max: the value of full colour in `image`: 255, or 1.
    Returns:
      An `ImageKernel`.
    Raises:
      ValueError: if the form is unknown, and as `exact_image_kernel`.
      TypeError: if a position width is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    """
    height, width, _ = check_shape("image", image, ("H", "W", "C"), "pass one image; for a batch use jax.vmap")
    form = default_form(height * width, normalisation) if form is None else form
    if form not in FORMS:
        raise ValueError(f"form: expected one of {sorted(FORMS)} or None, got {form!r}")
    return FORMS[form](image, params, normalisation=normalisation, valid=valid, colour_max=colour_max)


def _prepared(image, normalisation, valid, colour_max):
    """The image in 0..255 as floats, and which of its pixels count [m], or None."""
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation: expected one of {sorted(NORMALISATIONS)}, got {normalisation!r}")
    return colours(image, colour_max=colour_max), _counted(image, valid)


def _lattice_capacity(image, params):
    """Two to three times the vertices that photographs need at these widths; see `default_capacity` for its bounds."""
    height, width, channels = image.shape
    widths = params.bilateral_position_width, params.bilateral_colour_width
    share = min(1.0, 320 / math.prod(widths)) if all(isinstance(w, (int, float)) for w in widths) else 1.0
    return default_capacity(height * width, 2 + channels, share=share)


def _guide(image, params):
    return guide_features(
        image,
        position_width=params.bilateral_position_width,
        colour_width=params.bilateral_colour_width,
    )
