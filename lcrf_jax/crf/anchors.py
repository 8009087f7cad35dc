r"""The bilateral Gaussian by dense matrix products alone: blocks of space, anchors in colour.

The kernel is a product of two Gaussians, over positions and over colours, and each gets a low rank:

* colour by the Nystrom method on P anchors c chosen from the image: with a_i = exp(-|I_i - c|^2 / 2) the kernel
  is a_i^T M^-1 a_j, M being the kernel between the anchors. L^-1 of M = L L^T belongs to splat and slice;
* space by the Galerkin method: the Gaussian is projected, rows and columns apart, on functions that are linear
  inside blocks of the image, {1, row, column} in every block.

The result is symmetric and positive semi-definite by construction, `slice` is the transpose of `splat`, and
values are right without any normalisation. What depends on the image alone is built once, as a NamedTuple of
arrays, and can be applied any number of times. The [m, P] matrix of the a_i is never stored: computing a part
of it again costs less than reading it from memory.
"""

import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.numerics import check_shape, promote_float

_FLATTEN = "flatten the pixels to one axis, row by row, channels last"
_HIGHEST = jax.lax.Precision.HIGHEST
# What the functions of a block are in rows and in columns, 0 constant and 1 linear: 1, column and row.
_FUNCTIONS = ((0, 0), (0, 1), (1, 0))
# Functions of all blocks up to which the Gaussian between them is one matrix: more products, but no rearrangement.
_DENSE_BLUR = 1024
# Entries of the pixel-to-anchor matrix held at once; 1 MB in float32.
_CACHED = 2**18


class Anchors(NamedTuple):
    """The bilateral Gaussian of an H x W image in r x c blocks of h x w pixels, on P anchors.

    Attributes:
      colours: [r, c, C, h * w] colours in units of their width, block by block.
      weights: [H, W] factors s of diag(s) K diag(s); 0 for a pixel that does not count.
      centres: [P, C] the anchors, in units of the colour width.
      root: [P, P] inverse of the Cholesky factor of the Gaussian between the anchors.
      row_basis: [r, h, 2] orthonormal constant and linear function in every block, zero beyond the image.
      column_basis: [c, w, 2] the same for columns.
      row_kernel: [2 r, 2 r] the Gaussian over rows between those functions.
      column_kernel: [2 c, 2 c] the same for columns.
    """

    colours: jax.Array
    weights: jax.Array
    centres: jax.Array
    root: jax.Array
    row_basis: jax.Array
    column_basis: jax.Array
    row_kernel: jax.Array
    column_kernel: jax.Array

    def scaled(self, scale: ArrayLike) -> Self:
        r"""The anchors of the kernel with rows and columns scaled, diag(s) K diag(s).

        Args:
          scale: [m] factors s.
        Returns:
          An `Anchors`.
        Raises:
          ValueError: if `scale` does not have one factor per pixel.
        """
        check_shape("scale", scale, (self.weights.size,), "give one factor per pixel")
        scale = promote_float(scale).astype(self.weights.dtype)
        return self._replace(weights=self.weights * scale.reshape(self.weights.shape))

    def splat(self, values: ArrayLike) -> jax.Array:
        """Values summed over the pixels of each block, for each anchor and each of the three functions of the block.

        Args:
          values: [m, K] values.
        Returns:
          [r, c, 3, P, K] sums.
        Raises:
          ValueError: if `values` is not [m, K].
        """
        height, width = self.weights.shape
        _, channels = check_shape("values", values, (height * width, "K"), _FLATTEN)
        blocks = _blocks(self)
        values = promote_float(values).astype(self.weights.dtype).reshape(height, width, channels)

        # The affinities are computed again for a gradient, too, rather than kept.
        @jax.checkpoint
        def block_sums(colours, basis, values):
            columns = (basis[:, None] * values).reshape(3 * channels, -1)
            sums = jnp.matmul(columns, _affinity(colours, self.centres), precision=_HIGHEST)
            sums = jnp.matmul(sums, self.root.T, precision=_HIGHEST)
            return sums.reshape(3, channels, -1).swapaxes(1, 2)

        def strip_sums(strip):
            colours, basis, values = strip
            return _map_blocks(block_sums, self, colours, basis, in_blocks(values, blocks))

        return jax.lax.map(strip_sums, (self.colours, _basis(self), in_strips(values, blocks)))

    def blur(self, coarse: ArrayLike) -> jax.Array:
        """The Gaussian over rows and columns between the sums; symmetric and positive semi-definite.

        Args:
          coarse: [r, c, 3, P, K] sums of `splat`.
        Returns:
          [r, c, 3, P, K] weights for `slice`.
        Raises:
          ValueError: if `coarse` does not fit the anchors.
        """
        coarse = _checked_coarse(self, coarse, "splat")
        table = coarse.reshape(*coarse.shape[:3], -1)
        blurred = _dense_blur if math.prod(table.shape[:3]) <= _DENSE_BLUR else _separable_blur
        return blurred(self, table).reshape(coarse.shape)

    def slice(self, coarse: ArrayLike) -> jax.Array:
        """The values at the pixels; the transpose of `splat`.

        Args:
          coarse: [r, c, 3, P, K] weights of `blur`.
        Returns:
          [m, K] values.
        Raises:
          ValueError: if `coarse` does not fit the anchors.
        """
        coarse = _checked_coarse(self, coarse, "blur")
        *_, num_anchors, channels = coarse.shape
        down, across, rows, columns = _blocks(self)
        height, width = self.weights.shape
        # Matrix products on CPU are up to a third faster where rows are whole vectors.
        missing = -3 * channels % 16

        @jax.checkpoint
        def block_values(colours, basis, coarse):
            coarse = jnp.pad(coarse.swapaxes(1, 2).reshape(3 * channels, num_anchors), ((0, missing), (0, 0)))
            coarse = jnp.matmul(coarse, self.root, precision=_HIGHEST)
            terms = jnp.matmul(_affinity(colours, self.centres), coarse.T, precision=_HIGHEST)
            terms = jnp.split(terms[:, : 3 * channels], 3, axis=1)
            return sum(function[:, None] * term for function, term in zip(basis, terms, strict=True))

        def strip_values(strip):
            values = _map_blocks(block_values, self, *strip)
            return values.reshape(across, rows, columns, channels).swapaxes(0, 1)

        values = jax.lax.map(strip_values, (self.colours, _basis(self), coarse))
        values = values.reshape(down * rows, across * columns, channels)[:height, :width]
        return values.reshape(height * width, channels)

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        """The kernel times values [m, K], self-pairs included; symmetric, so that there is one order only."""
        del backwards
        return self.slice(self.blur(self.splat(values)))

    def row_sums(self, counted: jax.Array) -> jax.Array:
        """Sums of the kernel's rows over the pixels that count.

        A pixel far from all anchors lacks most of its self-pair, which is known to be the square of its factor.

        Args:
          counted: [m] 1 for a pixel that counts, 0 for another.
        Returns:
          [m] sums, self-pairs included.
        """
        sums = self.apply(counted[:, None])[:, 0]
        return jnp.maximum(sums - self.diagonal(), 0) + jnp.square(self.weights).reshape(-1)

    @property
    def nonnegative(self) -> bool:
        """Whether no entry can be below 0: a low rank leaves entries of either sign."""
        return False

    @property
    def has_two_orders(self) -> bool:
        """Whether `backwards` makes a difference: no."""
        return False

    def overflowed(self) -> jax.Array:
        """False: there is nothing that could be too small."""
        return jnp.zeros((), bool)

    def kept(self) -> Self:
        """The same: all that products need is in memory."""
        return self

    def cleared(self, overflowed: jax.Array) -> Self:
        """The same."""
        del overflowed
        return self

    def diagonal(self) -> jax.Array:
        """The diagonal of the kernel: what each pixel adds to its own result, near 1 where colours are not rare.

        Returns:
          [m] the diagonal of slice(blur(splat(.))).
        """
        down, across, rows, columns = _blocks(self)
        height, width = self.weights.shape
        row = self.row_kernel.reshape(down, 2, down, 2)[np.arange(down), :, np.arange(down)]
        column = self.column_kernel.reshape(across, 2, across, 2)[np.arange(across), :, np.arange(across)]
        within = _between_functions(row[:, None], column[None, :])

        def block_diagonal(colours, basis, within):
            features = jnp.matmul(_affinity(colours, self.centres), self.root.T, precision=_HIGHEST)
            space = jnp.sum(basis * jnp.matmul(within, basis, precision=_HIGHEST), axis=0)
            return jnp.square(features).sum(axis=1) * space

        def strip_diagonal(strip):
            diagonal = _map_blocks(block_diagonal, self, *strip)
            return diagonal.reshape(across, rows, columns).swapaxes(0, 1)

        diagonal = jax.lax.map(strip_diagonal, (self.colours, _basis(self), within))
        return diagonal.reshape(down * rows, across * columns)[:height, :width].reshape(height * width)


def _blocks(anchors):
    """Numbers of blocks, down and across, and their sizes, in rows and columns."""
    (down, rows, _), (across, columns, _) = anchors.row_basis.shape, anchors.column_basis.shape
    return down, across, rows, columns


def in_strips(grid: jax.Array, blocks: tuple[int, int, int, int]) -> jax.Array:
    """A grid in strips of whole blocks, with zeros up to the last one.

    Args:
      grid: [H, W, K] values.
      blocks: (down, across, rows, columns): numbers of blocks, and their sizes.
    Returns:
      [down, rows, across * columns, K].
    """
    down, across, rows, columns = blocks
    height, width, channels = grid.shape
    padded = jnp.pad(grid, ((0, down * rows - height), (0, across * columns - width), (0, 0)))
    return padded.reshape(down, rows, across * columns, channels)


def in_blocks(strip: jax.Array, blocks: tuple[int, int, int, int]) -> jax.Array:
    """A strip block by block.

    Args:
      strip: [rows, across * columns, K] values.
      blocks: as for `in_strips`.
    Returns:
      [across, K, rows * columns].
    """
    _, across, rows, columns = blocks
    strip = strip.reshape(rows, across, columns, -1).transpose(1, 3, 0, 2)
    return strip.reshape(across, -1, rows * columns)


def _basis(anchors):
    """[down, across, 3, rows * columns] the functions of the blocks, times the weights of the pixels."""
    blocks = _blocks(anchors)
    down, across = anchors.row_basis[:, None, :, None], anchors.column_basis[None, :, None]
    basis = jnp.stack([down[..., i] * across[..., j] for i, j in _FUNCTIONS], axis=2)
    weights = jax.vmap(in_blocks, in_axes=(0, None))(in_strips(anchors.weights[:, :, None], blocks), blocks)
    return weights * basis.reshape(*blocks[:2], len(_FUNCTIONS), -1)


def _affinity(colours, centres):
    """[n, P] Gaussian between the colours [C, n] of a block and the anchors [P, C]."""
    differences = (colours[i][:, None] - centres[:, i] for i in range(len(colours)))
    return jnp.exp(-sum(map(jnp.square, differences)) / 2)


def _map_blocks(function, anchors, *arrays):
    """A function of one block over the blocks of a strip, as many at a time as fit into the cache."""
    _, across, rows, columns = _blocks(anchors)
    at_once = max(1, _CACHED // (rows * columns * len(anchors.centres)))
    if at_once >= across:
        return jax.vmap(function)(*arrays)
    return jax.lax.map(lambda block: function(*block), arrays, batch_size=at_once)


def _checked_coarse(anchors: Anchors, coarse: ArrayLike, source: str) -> jax.Array:
    down, across, _, _ = _blocks(anchors)
    expected = (down, across, len(_FUNCTIONS), len(anchors.centres), "K")
    check_shape("coarse", coarse, expected, f"give what {source} returns for the same anchors")
    return promote_float(coarse).astype(anchors.weights.dtype)


def _between_functions(row, column):
    """[..., 3, 3] between the three functions, from [..., 2, 2] between those of rows and of columns."""
    full = row[..., :, None, :, None] * column[..., None, :, None, :]
    return full.reshape(*full.shape[:-4], 4, 4)[..., :3, :3]


def _dense_blur(anchors, table):
    """The spatial Gaussian between all functions at once; the table is [r, c, 3, X]."""
    down, across, _, _ = _blocks(anchors)
    row = anchors.row_kernel.reshape(down, 2, down, 2).swapaxes(1, 2)
    column = anchors.column_kernel.reshape(across, 2, across, 2).swapaxes(1, 2)
    gaussian = _between_functions(row[:, None, :, None], column[None, :, None, :]).transpose(0, 1, 4, 2, 3, 5)
    size = down * across * 3
    return jnp.matmul(gaussian.reshape(size, size), table.reshape(size, -1), precision=_HIGHEST)


def _separable_blur(anchors, table):
    """The same, columns first and then rows."""
    down, across, _, _ = _blocks(anchors)
    # Linear in both directions is not among the functions: zero before, and left out after.
    table = jnp.pad(table, ((0, 0), (0, 0), (0, 1), (0, 0))).reshape(down, across, 2, 2, -1).swapaxes(1, 2)
    table = jnp.matmul(anchors.column_kernel, table.reshape(2 * down, 2 * across, -1), precision=_HIGHEST)
    table = jnp.matmul(anchors.row_kernel, table.reshape(2 * down, -1), precision=_HIGHEST)
    return table.reshape(down, 2, across, 2, -1).swapaxes(1, 2).reshape(down, across, 4, -1)[:, :, :3]
