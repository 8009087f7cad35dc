r"""The pairwise kernel of one image as fast filters, in three forms behind one small interface.

`lcrf_jax.crf.forms` says what a kernel has to be able to do. `DenseKernel` is that for a matrix, `ImageKernel` for the
two Gaussians of an image, of which the bilateral one has one of three forms. `lcrf_jax.crf.image_kernels` builds them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.crf.forms import BilateralForm, Kernel
from lcrf_jax.crf.spatial import filter_by_pairs, own_weight_by_pairs, separable_filter
from lcrf_jax.numerics import ONE_SET, check_finite, check_shape, native, promote_float, shape_of

# Those of the bilateral and of the spatial Gaussian, one or two each, and the values themselves.
_Sums = tuple[tuple[Any, ...], tuple[jax.Array, ...], jax.Array]


class SpatialGaussian(NamedTuple):
    """The Gaussian over the positions of a grid, cut off at four widths, self-pairs left out.

    Attributes:
      taps: [2 r + 1] the Gaussian in one dimension.
      scale: [H, W] factors s of diag(s) K diag(s).
      row_taps: weights between pairs of rows, with which it is filtered in half the time, see
        `lcrf_jax.crf.spatial.filter_by_pairs`; None filters the rows themselves.
    """

    taps: jax.Array
    scale: jax.Array
    row_taps: jax.Array | None = None

    def filtered(self, grid: jax.Array) -> jax.Array:
        """The Gaussian without its factors times values [H, W, K], self-pairs included."""
        if self.row_taps is None:
            return separable_filter(grid, self.taps)
        return filter_by_pairs(grid, self.row_taps, self.taps)

    def own_weight(self) -> float | jax.Array:
        """The weight of each pixel's own value in `filtered`."""
        return 1.0 if self.row_taps is None else own_weight_by_pairs(self.row_taps)


class ImageKernel(NamedTuple):
    r"""The pairwise kernel of one image as two filters.

    .. math:: K = w_1 R_1 K_{bilateral} R_1^{-1} + w_2 R_2 K_{spatial} R_2^{-1}, \qquad k_{ii} = 0

    with both Gaussians normalised symmetrically, or not at all, and R the identity; for row normalisation
    R is D^-1/2. The two weights may be replaced, also by traced values, without building anything again.

    Attributes:
      bilateral: the bilateral Gaussian, an `ExactGaussian`, `Anchors` or a `Lattice`; None if its weight is 0.
      bilateral_weight: w1.
      bilateral_diagonal: [H, W] its self-pairs, normalised.
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
        values = self._checked(values)
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
        return bilateral, gaussian, self._self_pairs(values)

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
        values = self._checked(values)
        bilateral_scale, gaussian_scale = self.row_scales or (None, None)
        total = self._self_pairs(values)
        if self.bilateral is not None:
            product = self.bilateral.apply(_sides(values, bilateral_scale)[-1], backwards=backwards)
            total = total + self.bilateral_weight * _joined([product], bilateral_scale)
        if self.gaussian is not None:
            product = _spatial_sum(self.gaussian, _sides(values, gaussian_scale)[-1])
            total = total + self.gaussian_weight * _joined([product], gaussian_scale)
        return total

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the image."""
        height, width = self.bilateral_diagonal.shape
        return height, width

    def overflowed(self) -> jax.Array:
        """Whether the bilateral Gaussian had too little room for this image; its results are NaN or mean nothing then."""
        return jnp.zeros((), bool) if self.bilateral is None else self.bilateral.overflowed()

    def without_overflow(self) -> "ImageKernel":
        """This kernel, its products finite even where it overflowed; they mean nothing then."""
        if self.bilateral is None:
            return self
        overflowed = self.overflowed()
        weight = jnp.where(overflowed, 0, self.bilateral_weight)
        return self._replace(bilateral=self.bilateral.cleared(overflowed), bilateral_weight=weight)

    def kept(self) -> "ImageKernel":
        """This kernel for many products: an exact Gaussian of a small image keeps its matrix."""
        return self if self.bilateral is None else self._replace(bilateral=self.bilateral.kept())

    @property
    def signed(self) -> bool:
        """Whether the kernel has entries below 0 only because of its form, which stands for one that has none.

        Mean field then keeps its messages within what a kernel without such entries could give.
        """
        return self.bilateral is not None and not self.bilateral.nonnegative

    def largest_row_sums(self) -> tuple[jax.Array, jax.Array]:
        """Bounds of the sums over a row of the entries above 0, and of the magnitudes of those below 0.

        The second is infinite if a weight is below 0, and counts no entries that `signed` speaks of.
        """
        ones = jnp.ones((self.bilateral_diagonal.size, 1), self.bilateral_diagonal.dtype)
        sums = self.apply(ones).max()
        if self.bilateral is not None and self.bilateral.has_two_orders:  # with other rows in each
            sums = jnp.maximum(sums, self.apply(ones, backwards=True).max())
        negative = (self.bilateral_weight < 0) | (self.gaussian_weight < 0)
        return sums, jnp.where(negative, jnp.inf, 0).astype(sums.dtype)

    def _checked(self, values: ArrayLike) -> jax.Array:
        values = promote_float(values)
        check_shape("values", values, (self.grid[0] * self.grid[1], "K"), ONE_SET)
        return values.astype(self.bilateral_diagonal.dtype)

    def _self_pairs(self, values: jax.Array) -> jax.Array:
        """What takes the self-pairs of the bilateral Gaussian away; NaN where it overflowed."""
        diagonal = jnp.where(self.overflowed(), jnp.nan, self.bilateral_diagonal).reshape(-1, 1)
        return -self.bilateral_weight * diagonal * values


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
    own = grid if gaussian.row_taps is None else gaussian.own_weight() * grid
    filtered = gaussian.scale[:, :, None] * (gaussian.filtered(grid) - own)
    return filtered.reshape(values.shape)


class DenseKernel(NamedTuple):
    """A pairwise kernel as a matrix, with the methods that `lcrf_jax.crf.inference` asks for; see the module.

    Attributes:
      matrix: [m, m] kernel; what is on its diagonal is ignored.
    """

    matrix: jax.Array

    @property
    def grid(self) -> tuple[int, int]:
        """(m, 1): how the pixels lie is not known."""
        return len(self.matrix), 1

    def splat(self, values: ArrayLike) -> jax.Array:
        """The values [m, K] themselves, promoted and checked."""
        num_pixels, _ = check_shape("values", values, ("m", "K"), ONE_SET)
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

    def largest_row_sums(self) -> tuple[jax.Array, jax.Array]:
        """The largest sums over a row of the entries above 0, and of the magnitudes of those below 0."""
        matrix = promote_float(self.matrix)
        matrix = jnp.where(jnp.eye(len(matrix), dtype=bool), 0, matrix)
        return jnp.maximum(matrix, 0).sum(axis=1).max(), jnp.maximum(-matrix, 0).sum(axis=1).max()


def _dense_product(matrix, values):
    product = jnp.matmul(matrix, values, precision=jax.lax.Precision.HIGHEST)
    return product - jnp.diagonal(matrix)[:, None] * values


def as_kernel(kernel: ArrayLike | Kernel) -> Kernel:
    """A kernel object for what callers may give as a kernel.

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or an object with the four methods of the module.
    Returns:
      The object itself, or a `DenseKernel`.
    Raises:
      ValueError: if the matrix is not square, or has a value that is known not to be finite.
      TypeError: if it is neither.
    """
    if isinstance(kernel, Kernel):
        return kernel
    remedy = "give a matrix [m, m], or what image_kernel returns"
    if not (hasattr(kernel, "__array__") or isinstance(kernel, (jax.Array, list, tuple))):
        raise TypeError(f"kernel: expected a matrix or an object with splat, blur, slice and apply, got {kernel!r}; {remedy}")
    check_shape("kernel", kernel, ("m", "m"), remedy)
    check_finite("kernel", kernel, "look at what it was computed from")
    return DenseKernel(jnp.asarray(native(kernel)))


def pixels_within(kernel: ArrayLike | Kernel | None) -> int | str:
    """The number of pixels that values of a kernel need, as `check_shape` takes it.

    Args:
      kernel: a matrix, a kernel object, or None.
    Returns:
      H * W, or 'm' where it is not known, and for a matrix, which says itself what does not fit it.
    """
    grid = getattr(kernel, "grid", None)
    return "m" if grid is None or isinstance(kernel, DenseKernel) else grid[0] * grid[1]


def pixels_of(
    name: str, values: ArrayLike, kernel: Kernel, check: Callable[[str, ArrayLike], None]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Values of the pixels as [m, K] in the dtype of their computation with a kernel, and the shape in which they came.

    Args:
      name: name of the argument, for the message.
      values: [m, K], or [H, W, K] on the grid of the kernel.
      kernel: a kernel object.
      check: refuses values that are known, such as `check_logits`, before they are converted.
    Returns:
      The values [m, K], float32, or float64 if they or the kernel are; and their own shape.
    Raises:
      ValueError: if they have another shape, are complex, or are refused.
      TypeError: if they are no array of numbers.
    """
    shape = shape_of(name, values, ONE_SET)
    grid = getattr(kernel, "grid", None)
    if len(shape) == 3 and grid is not None:
        fits = shape[:2] == grid or (grid[1] == 1 and shape[0] * shape[1] == grid[0])
        if not fits:
            known = f"{grid[0]} pixels" if grid[1] == 1 else f"grid, {grid[0]} x {grid[1]}"
            raise ValueError(
                f"{name}: expected shape [m, K], got {list(shape)}; or [H, W, K] on the kernel's {known}; {ONE_SET}"
            )
    else:
        shape = check_shape(name, values, (pixels_within(kernel), "K"), ONE_SET)
    check(name, values)
    return promote_float(values, name=name).reshape(-1, shape[-1]), shape


def in_one_precision(kernel: Any, values: jax.Array) -> tuple[Any, jax.Array]:
    """A kernel and values in float64 if one of them is, and in float32 otherwise.

    Args:
      kernel: a kernel object; its arrays are looked at if it is a pytree of arrays.
      values: any array of floats.
    Returns:
      Both, converted.
    """
    def is_float(leaf):
        return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)

    leaves = [leaf for leaf in jax.tree.leaves(kernel) if is_float(leaf)]
    wide = any(leaf.dtype == jnp.float64 for leaf in [*leaves, values])
    dtype = jnp.float64 if wide else jnp.float32
    if all(leaf.dtype == dtype for leaf in [*leaves, values]):
        return kernel, values
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) if is_float(leaf) else leaf, kernel), values.astype(dtype)



def filter_with(kernel: ArrayLike | Kernel, values: ArrayLike) -> jax.Array:
    r"""The kernel applied to values, self-pairs left out.

    .. math:: v'_i = \sum_{j \ne i} k_{ij} v_j

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or a kernel object; see the module.
      values: [m, K] values to filter.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if the kernel does not fit the values, or a number is known not to be finite.
    References:
      Krahenbuhl and Koltun 2011, section 3.
    """
    check_finite("values", values, "look at what they were computed from")
    given, values = in_one_precision(as_kernel(kernel), promote_float(values))
    return given.apply(values)


def filter_symmetric(kernel: ArrayLike | Kernel, values: ArrayLike) -> jax.Array:
    r"""The symmetric part of the kernel applied to values, self-pairs left out.

    .. math:: v'_i = \sum_{j \ne i} \tfrac12 (k_{ij} + k_{ji}) v_j

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or a kernel object; see the module.
      values: [m, K] values to filter.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if the kernel does not fit the values, or a number is known not to be finite.
    """
    check_finite("values", values, "look at what they were computed from")
    given, values = in_one_precision(as_kernel(kernel), promote_float(values))
    return given.slice(given.blur(given.splat(values)))
