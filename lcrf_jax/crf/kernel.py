r"""The pairwise kernel of one image as fast filters, in three forms behind one small interface.

A dense CRF meets its kernel only in products with values of the pixels. What `lcrf_jax.crf.inference` needs of a kernel
is

* `splat(values [m, K])`: whatever the form sums up first, a pytree of arrays with K columns;
* `blur(splatted)`: the kernel between those sums, symmetric, of the same structure;
* `slice(blurred)`: the result at the pixels [m, K]. `slice(blur(splat(values)))` is the symmetric part of the
  kernel times the values, self-pairs left out, and `slice` is the transpose of `splat`;
* `apply(values, backwards=False)`: the kernel itself times the values, self-pairs left out; faster than the
  symmetric part where the form is not symmetric of itself. Such a form has two orders to work in, each the
  transpose of the other, and `backwards`, which may be traced, takes the second.

A class with these is a `Kernel`: `DenseKernel` for a matrix, `ImageKernel` for the two Gaussians of an image. Its
bilateral one takes one of three forms, `ExactGaussian`, `Anchors` and `Lattice` of `lcrf_jax.crf.exact`, `anchors` and
`lattice`. Each is a `BilateralForm`: it has these four methods *with* self-pairs, and three more:

* `diagonal()`: the self-pairs [m];
* `scaled(scale [m])`: the form of diag(s) K diag(s);
* `row_sums(counted [m])`: the sums of its rows over the pixels that count, which normalise it.

`lcrf_jax.crf.image_kernels` builds them.
"""

from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.crf.spatial import separable_filter
from lcrf_jax.numerics import check_shape, promote_float

# Those of the bilateral and of the spatial Gaussian, one or two each, and the values themselves.
_Sums = tuple[tuple[Any, ...], tuple[jax.Array, ...], jax.Array]

_ONE_SET = "flatten the pixels to one axis, classes last; for a batch use jax.vmap"


@runtime_checkable
class Kernel(Protocol):
    """A pairwise kernel between m pixels, as energy and mean field ask for it; see the module."""

    def splat(self, values: ArrayLike) -> Any:
        """The sums of values [m, K] that `blur` needs, a pytree of arrays with K columns."""
        ...

    def blur(self, splatted: Any) -> Any:
        """The symmetric part of the kernel between those sums; of the same structure."""
        ...

    def slice(self, blurred: Any) -> jax.Array:
        """What `blur` returns, at the pixels [m, K]; the transpose of `splat`."""
        ...

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        """The kernel times values [m, K], in the second of its two orders if `backwards`."""
        ...


class BilateralForm(Kernel, Protocol):
    """A form of the bilateral Gaussian: its four products have the self-pairs in them."""

    def diagonal(self) -> jax.Array:
        """The self-pairs [m]."""
        ...

    def scaled(self, scale: ArrayLike) -> Self:
        """The form of diag(s) K diag(s), for factors s [m]."""
        ...

    def row_sums(self, counted: jax.Array) -> jax.Array:
        """The sums [m] of its rows over the pixels that count: [m], 1 for these and 0 for others."""
        ...


class SpatialGaussian(NamedTuple):
    """The Gaussian over the positions of a grid, cut off at four widths, self-pairs left out.

    Attributes:
      taps: [2 r + 1] the Gaussian in one dimension.
      scale: [H, W] factors s of diag(s) K diag(s).
    """

    taps: jax.Array
    scale: jax.Array


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

    bilateral: BilateralForm | None
    bilateral_weight: jax.Array
    bilateral_diagonal: jax.Array
    gaussian: SpatialGaussian | None
    gaussian_weight: jax.Array
    row_scales: tuple[jax.Array, jax.Array] | None

    def splat(self, values: ArrayLike) -> _Sums:
        """The sums of values [m, K] that `blur` needs: of the bilateral and the spatial Gaussian, and themselves."""
        values = promote_float(values)
        check_shape("values", values, (*self.bilateral_diagonal.shape, "K"), _ONE_SET)
        bilateral_scale, gaussian_scale = self.row_scales or (None, None)
        bilateral: tuple[Any, ...] = ()
        gaussian: tuple[jax.Array, ...] = ()
        if self.bilateral is not None:
            bilateral = tuple(self.bilateral.splat(side) for side in _sides(values, bilateral_scale))
        if self.gaussian is not None:
            gaussian = _sides(values, gaussian_scale)
        return bilateral, gaussian, values

    def blur(self, splatted: _Sums) -> _Sums:
        """The symmetric part of the kernel between the sums that `splat` returns; of the same structure."""
        bilateral, gaussian, values = splatted
        if self.bilateral is not None:
            blurred = _crossed(self.bilateral.blur, bilateral)
            bilateral = tuple(self.bilateral_weight * part for part in blurred)
        if self.gaussian is not None:
            blurred = _crossed(lambda table: _spatial_sum(self.gaussian, table), gaussian)
            gaussian = tuple(self.gaussian_weight * part for part in blurred)
        return bilateral, gaussian, -self.bilateral_weight * self.bilateral_diagonal[:, None] * values

    def slice(self, blurred: _Sums) -> jax.Array:
        """What `blur` returns, at the pixels [m, K]."""
        bilateral, gaussian, values = blurred
        bilateral_scale, gaussian_scale = self.row_scales or (None, None)
        if self.bilateral is not None:
            values = values + _joined([self.bilateral.slice(part) for part in bilateral], bilateral_scale)
        if self.gaussian is not None:
            values = values + _joined(gaussian, gaussian_scale)
        return values

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        """The kernel times values [m, K], self-pairs left out; a lattice is blurred in one order only."""
        values = promote_float(values)
        check_shape("values", values, (*self.bilateral_diagonal.shape, "K"), _ONE_SET)
        bilateral_scale, gaussian_scale = self.row_scales or (None, None)
        total = -self.bilateral_weight * self.bilateral_diagonal[:, None] * values
        if self.bilateral is not None:
            product = self.bilateral.apply(_sides(values, bilateral_scale)[-1], backwards=backwards)
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
    """A pairwise kernel as a matrix, with the methods that `lcrf_jax.crf.inference` asks for; see the module.

    Attributes:
      matrix: [m, m] kernel; what is on its diagonal is ignored.
    """

    matrix: jax.Array

    def splat(self, values: ArrayLike) -> jax.Array:
        """The values [m, K] themselves, promoted and checked."""
        num_pixels, _ = check_shape("values", values, ("m", "K"), _ONE_SET)
        remedy = "the kernel needs one row and column per pixel"
        check_shape("kernel", self.matrix, (num_pixels, num_pixels), remedy)
        return promote_float(values)

    def blur(self, values: jax.Array) -> jax.Array:
        """The symmetric part of the kernel times values [m, K], self-pairs left out."""
        matrix = promote_float(self.matrix)
        return (_dense_product(matrix, values) + _dense_product(matrix.T, values)) / 2

    def slice(self, values: jax.Array) -> jax.Array:
        """The values themselves."""
        return values

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        """The kernel times values [m, K], self-pairs left out."""
        del backwards
        return _dense_product(promote_float(self.matrix), self.splat(values))


def _dense_product(matrix, values):
    product = jnp.matmul(matrix, values, precision=jax.lax.Precision.HIGHEST)
    return product - jnp.diagonal(matrix)[:, None] * values


def as_kernel(kernel: ArrayLike | Kernel) -> Kernel:
    """A kernel object for what callers may give as a kernel.

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or an object with the four methods of the module.
    Returns:
      The object itself, or a `DenseKernel`.
    """
    return kernel if isinstance(kernel, Kernel) else DenseKernel(jnp.asarray(kernel))


def filter_with(kernel: ArrayLike | Kernel, values: ArrayLike) -> jax.Array:
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


def filter_symmetric(kernel: ArrayLike | Kernel, values: ArrayLike) -> jax.Array:
    r"""The symmetric part of the kernel applied to values, self-pairs left out.

    .. math:: v'_i = \sum_{j \ne i} \tfrac12 (k_{ij} + k_{ji}) v_j

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or a kernel object; see the module.
      values: [m, K] values to filter.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if the kernel does not fit the values.
    """
    kernel = as_kernel(kernel)
    return kernel.slice(kernel.blur(kernel.splat(values)))
