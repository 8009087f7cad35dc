"""The permutohedral lattice: a fast approximate Gaussian filter for images too large for the exact one.

What depends on the image alone is built once, as a NamedTuple of arrays, and can be applied any number of
times.

The permutohedral lattice (Adams, Baek and Davis 2010) spreads every pixel over the d + 1 corners of the
simplex of a lattice in feature space that holds it (splat), convolves the lattice along d + 1 directions with
(1/2, 1, 1/2) (blur), and reads the result back with the same weights (slice). It approximates the Gaussian:
after row or symmetric normalisation to about 3 %, raw to some tens of per cent.

The lattice can be downsampled: pixels that fall into the same small box of feature space, a cell, are first
summed, and only the cells, a quarter of the pixels in a photograph, are splatted, each at the mean of its
pixels' features. That halves the time of a filtering and divides that of building by four.

XLA needs static shapes, so the number of lattice vertices has a static capacity. Vertices beyond it are
dropped, with all the mass on them; `lattice_overflowed` tells, outside jit, whether that happened. Loops run
over the cells and vertices in use, so a generous capacity costs memory and little time.
"""

import functools
import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.hashing import num_blocks
from lcrf_jax.crf.linear import linear_map
from lcrf_jax.numerics import check_shape, promote_float, varying_like

NO_DERIVATIVE = (
    "a lattice has no derivative in the image, the widths of the kernel or the arrays that it holds; use form='exact' or "
    "'anchors', or put jax.lax.stop_gradient round the image"
)
_FLATTEN = "flatten the pixels to one axis, channels last"
CELL_BLOCK = 8192
VERTEX_BLOCK = 4096
# The lattice's kernel has heavier tails than the Gaussian of its variance. Made narrower by this factor it is closest
# to the Gaussian, on photographs and after normalisation: by a tenth of the error.
NARROWING = 1.04
# Numbers of vertices, cells and blocks are never negative, and a program that need not ask is half as long.
_AS_THEY_ARE = {"allow_negative_indices": False}


class Lattice(NamedTuple):
    """A permutohedral lattice built for m pixels with d features and a capacity of c vertices.

    The pixels lie in cells, n of them at most: m, rounded up to whole blocks. The kernel it stands for,
    S^T B S with S the splat and B the blur, includes the self-pairs.

    Attributes:
      cells: [m] int32, the cell of each pixel, n for a pixel that does not count.
      vertices: [d + 1, n] int32, the vertex of each corner of each cell's simplex; c for a dropped one.
      weights: [d + 1, n] barycentric weights of the corners, summing to 1 over them until they are `scaled`.
      self_weights: [n] the weight of each cell's value in its own result, before the constant of the blur; never
        more than it is, and less by a few per cent.
      neighbours: [d + 1, 2, c] int32, the vertices before and after each vertex in every direction; c for
        none.
      order: [d + 1] int32, the directions in the order of the blur.
      num_cells: int32, cells in use.
      num_vertices: int32, vertices the features need; the lattice overflowed if it is larger than c.
    """

    cells: jax.Array
    vertices: jax.Array
    weights: jax.Array
    self_weights: jax.Array
    neighbours: jax.Array
    order: jax.Array
    num_cells: jax.Array
    num_vertices: jax.Array

    def splat(self, values: ArrayLike) -> jax.Array:
        r"""The splat S: what every vertex of the lattice gets of the pixels' values.

        Args:
          values: [m, K] values to filter.
        Returns:
          [c, K] values of the vertices, 0 for those not in use.
        Raises:
          ValueError: if `values` is not [m, K].
        References:
          Adams, Baek and Davis 2010, section 3.1.
        """
        check_shape("values", values, (*self.cells.shape, "K"), _FLATTEN)
        return _splat(self, promote_float(values))

    def blur(self, table: ArrayLike, *, symmetric: bool = True) -> jax.Array:
        r"""The blur B: the Gaussian between vertices of the self, along its directions in turn.

        The constant that the blur lacks is set by the integral of the Gaussian, which is right where features fill
        their space and too small where they are sparse; after normalisation it cancels.

        Args:
          table: [c, K] values of the vertices.
          symmetric: whether to average the blur over the directions forwards and backwards. One order alone gives
            a kernel that differs from its transpose by a few per cent; the average is symmetric, for a second
            blur's time.
        Returns:
          [c, K] values of the vertices.
        Raises:
          ValueError: if `table` is not [c, K].
        References:
          Adams, Baek and Davis 2010, section 3.2.
        """
        check_shape("table", table, (self.neighbours.shape[-1], "K"), "give what splat returns")
        blur = _blur_both_ways if symmetric else _blur_forwards
        return _mass_correction(len(self.weights) - 1) * blur(self, promote_float(table))

    def slice(self, table: ArrayLike) -> jax.Array:
        r"""The slice S^T: the lattice read at every pixel, with the weights of the splat.

        Args:
          table: [c, K] values of the vertices.
        Returns:
          [m, K] values, 0 for pixels that do not count.
        Raises:
          ValueError: if `table` is not [c, K].
        References:
          Adams, Baek and Davis 2010, section 3.3.
        """
        check_shape("table", table, (self.neighbours.shape[-1], "K"), "give what blur returns")
        return _slice(self, promote_float(table))

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        r"""The Gaussian-weighted sum over all pixels, approximately.

        .. math:: v'_i \approx \sum_j \exp(-|f_i - f_j|^2 / 2)\, v_j

        The self-pair j = i is part of the sum (`diagonal` says with which weight). Not normalised: see `row_sums`.

        Args:
          values: [m, K] values to filter.
          backwards: whether to blur in the reverse order of directions, see `reversed`; may be traced.
        Returns:
          [m, K] filtered values.
        Raises:
          ValueError: if `values` is not [m, K].
        References:
          Adams, Baek and Davis 2010, section 3.
        """
        check_shape("values", values, (*self.cells.shape, "K"), _FLATTEN)
        lattice = self if backwards is False else self.reversed(backwards)
        return _mass_correction(len(self.weights) - 1) * _filter(lattice, promote_float(values))

    def row_sums(self, counted: jax.Array) -> jax.Array:
        """Sums of the symmetric kernel's rows over the pixels that count.

        Args:
          counted: [m] 1 for a pixel that counts, 0 for another.
        Returns:
          [m] sums, self-pairs included.
        """
        return self.slice(self.blur(self.splat(counted[:, None])))[:, 0]

    def reversed(self, backwards: bool | jax.Array = True) -> Self:
        """The lattice that is blurred in the reverse order of directions: without `symmetric`, the transposed kernel.

        One order alone is a few per cent off the other one. Who filters repeatedly, as mean field does, takes the
        two in turn, and most of that cancels without a second blur.

        Args:
          backwards: whether to reverse it at all; may be traced.
        Returns:
          A `Lattice`.
        """
        return self._replace(order=jnp.where(backwards, self.order[::-1], self.order))

    def scaled(self, scale: ArrayLike) -> Self:
        r"""The lattice of the kernel with rows and columns scaled, diag(s) K diag(s).

        The scale is folded into the weights of the cells: filtering costs nothing more.

        Args:
          scale: [m] factors s, the same for all pixels of a cell, as everything that the lattice returns is.
        Returns:
          A `Lattice`.
        Raises:
          ValueError: if `scale` is not [m].
        """
        check_shape("scale", scale, self.cells.shape, "give one factor per pixel")
        scale = promote_float(scale)
        of_cells = varying_like(jnp.zeros(self.weights.shape[1], scale.dtype), scale)
        of_cells = of_cells.at[self.cells].set(scale, mode="drop")
        return self._replace(
            weights=self.weights * of_cells, self_weights=self.self_weights * jnp.square(of_cells)
        )

    def diagonal(self) -> jax.Array:
        """The weight of each pixel's own value in `apply`, or a little less.

        It is summed along the paths of the blur that lead from a corner of the pixel's simplex to another, where all
        vertices on the way exist; very long paths are left out. So what remains of the self-pair after it is
        subtracted is never negative: pixels that all have the same distribution never change their label.

        Returns:
          [m] weights, positive; 0 for pixels that do not count.
        References:
          Adams, Baek and Davis 2010, section 3.
        """
        weights = self.self_weights.at[self.cells].get(mode="fill", fill_value=0)
        return _mass_correction(len(self.weights) - 1) * weights

    @property
    def nonnegative(self) -> bool:
        """Whether no entry can be below 0: yes."""
        return True

    @property
    def has_two_orders(self) -> bool:
        """Whether `backwards` makes a difference: yes, of the directions of its blur."""
        return True

    def overflowed(self) -> jax.Array:
        """Whether the features needed more vertices than the lattice has; bool, may be traced."""
        return jnp.asarray(self.num_vertices > self.neighbours.shape[-1])

    def kept(self) -> Self:
        """The same: all that products need is in memory."""
        return self

    def cleared(self, overflowed: jax.Array) -> Self:
        """A lattice without cells where this one overflowed: its products are finite, and it says nothing any more."""
        return self._replace(
            num_vertices=jnp.where(overflowed, 0, self.num_vertices),
            num_cells=jnp.where(overflowed, 0, self.num_cells),
        )


def lattice_overflowed(lattice: Lattice) -> bool:
    """Whether the features needed more vertices than the lattice has; call it outside jit.

    Args:
      lattice: a `Lattice`, with or without leading batch axes.
    Returns:
      A Python bool: True if mass was dropped, so that results cannot be trusted. Build again with
      `capacity=int(lattice.num_vertices)` or more.
    Raises:
      jax.errors.ConcretizationTypeError: under jit.
    """
    return bool(jnp.any(lattice.overflowed()))


def _mass_correction(num_features):
    """Integral of the Gaussian over that of the lattice's kernel with every vertex in place."""
    lattice_mass = 2.0 ** (num_features + 1) * (1.5 / NARROWING**2) ** (num_features / 2) / math.sqrt(num_features + 1)
    return (2 * math.pi) ** (num_features / 2) / lattice_mass


def _rows_of(array, numbers):
    """Rows of an array by their numbers, zeros for the number after the last."""
    return array.at[numbers].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _cell_sums(lattice, values):
    sums = jnp.zeros((lattice.weights.shape[1], values.shape[1]), values.dtype)
    return varying_like(sums, values).at[lattice.cells].add(values, mode="drop", wrap_negative_indices=False)


@jax.jit
def _splatted(lattice, values):
    return _vertex_sums(lattice, _cell_sums(lattice, values))


def _vertex_sums(lattice, values):
    corners, size = lattice.weights.shape
    capacity, block = lattice.neighbours.shape[-1], min(CELL_BLOCK, size)

    def corner(step, table):
        k, start = jax.lax.rem(step, np.int32(corners)), jax.lax.div(step, np.int32(corners)) * block
        vertices = jax.lax.dynamic_slice(lattice.vertices, (k, start), (1, block), **_AS_THEY_ARE)[0]
        weights = jax.lax.dynamic_slice(lattice.weights, (k, start), (1, block), **_AS_THEY_ARE)[0]
        rows = jax.lax.dynamic_slice_in_dim(values, start, block, **_AS_THEY_ARE)
        return table.at[vertices].add(weights[:, None] * rows, mode="drop", wrap_negative_indices=False)

    table = varying_like(jnp.zeros((capacity, values.shape[1]), values.dtype), values)
    return jax.lax.fori_loop(0, num_blocks(lattice.num_cells, block) * corners, corner, table)


@jax.jit
def _blurred(lattice, table):
    """The blur in all directions in turn, in blocks of vertices, as many as are in use."""
    capacity = lattice.neighbours.shape[-1]
    block = min(VERTEX_BLOCK, capacity)
    last = num_blocks(jnp.minimum(lattice.num_vertices, capacity), block)
    source, target = table, varying_like(jnp.zeros_like(table), table)
    for direction in lattice.order:
        source, target = _blurred_along(direction, lattice.neighbours, source, target, last), source
    return source


@jax.jit
def _blurred_along(direction, neighbours, source, target, num_blocks_in_use):
    """The blur of the source in one direction, written over the target."""
    capacity = neighbours.shape[-1]
    block = min(VERTEX_BLOCK, capacity)

    def blurred(i, target):
        start = jnp.minimum(i * block, capacity - block)
        at = (direction, np.int32(0), start)
        before, after = jax.lax.dynamic_slice(neighbours, at, (1, 2, block), **_AS_THEY_ARE)[0]
        rows = jax.lax.dynamic_slice_in_dim(source, start, block, **_AS_THEY_ARE)
        rows = rows + (_rows_of(source, before) + _rows_of(source, after)) / 2
        return jax.lax.dynamic_update_slice_in_dim(target, rows, start, 0, **_AS_THEY_ARE)

    return jax.lax.fori_loop(0, num_blocks_in_use, blurred, target)


@jax.jit
def _sliced(lattice, table):
    cells = jnp.zeros((lattice.weights.shape[1], table.shape[1]), table.dtype)
    return _sliced_over(varying_like(cells, table), lattice, table)


@jax.jit
def _filtered(lattice, values):
    sums = _cell_sums(lattice, values)
    # The results of the cells take the place of their sums: a large array less to clear and to hold.
    return _sliced_over(sums, lattice, _blurred(lattice, _vertex_sums(lattice, sums)))


def _filtered_backwards(lattice, values):
    return _filtered(lattice.reversed(), values)


def _sliced_over(cells, lattice, table):
    """The slice by way of the cells, in an array that holds anything before."""
    corners, size = lattice.weights.shape
    block = min(CELL_BLOCK, size)

    def read(i, values):
        vertices = jax.lax.dynamic_slice_in_dim(lattice.vertices, i * block, block, axis=1, **_AS_THEY_ARE)
        weights = jax.lax.dynamic_slice_in_dim(lattice.weights, i * block, block, axis=1, **_AS_THEY_ARE)
        rows = sum(weights[k][:, None] * _rows_of(table, vertices[k]) for k in range(corners))
        return jax.lax.dynamic_update_slice_in_dim(values, rows, i * block, 0, **_AS_THEY_ARE)

    cells = jax.lax.fori_loop(0, num_blocks(lattice.num_cells, block), read, cells)
    return _rows_of(cells, lattice.cells)


def _blurred_backwards(lattice, table):
    return _blurred(lattice.reversed(), table)


def _blurred_both_ways(lattice, table):
    return (_blurred(lattice, table) + _blurred_backwards(lattice, table)) / 2


_linear_in_values = functools.partial(linear_map, message=NO_DERIVATIVE)

_splat = _linear_in_values(_splatted, _sliced)
_slice = _linear_in_values(_sliced, _splatted)
_blur_forwards = _linear_in_values(_blurred, _blurred_backwards)
_filter = _linear_in_values(_filtered, _filtered_backwards)
_blur_both_ways = _linear_in_values(_blurred_both_ways, _blurred_both_ways)
