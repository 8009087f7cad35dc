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
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.numerics import check_number, check_shape, promote_float, squared_distances, varying_like

__all__ = [
    "Anchors",
    "anchors_diagonal",
    "blur_anchors",
    "build_anchors",
    "scaled_anchors",
    "slice_anchors",
    "splat_anchors",
]

_ONE_IMAGE = "pass one image as [height, width, channels]; for a batch use jax.vmap"
_FLATTEN = "flatten the pixels to one axis, row by row, channels last"
_WIDTH_REMEDY = "use a width in pixels (positions) or in 0..255 units (colours)"
_HIGHEST = jax.lax.Precision.HIGHEST
_NUM_ANCHORS, _NUM_ANCHORS_LARGE = 128, 96
_BLOCK_PER_WIDTH, _LARGEST_BLOCK = 2 / 3, 64
# What the functions of a block are in rows and in columns, 0 constant and 1 linear: 1, column and row.
_FUNCTIONS = ((0, 0), (0, 1), (1, 0))
# Functions of all blocks up to which the Gaussian between them is one matrix: more products, but no rearrangement.
_DENSE_BLUR = 1024
# Entries of the pixel-to-anchor matrix held at once; 1 MB in float32.
_CACHED = 2**18
_SAMPLE, _ROUND, _NUM_LLOYD, _DRAW_POWER = 2048, 16, 4, 1.5
# Added to the diagonal of M: anchors may coincide, as in an image of one colour.
_JITTER = 1e-4


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


def _block_basis(size, block_size):
    """[blocks, pixels, 2] constant and linear function of unit length in each block of a line of pixels, NumPy."""
    num_blocks = math.ceil(size / block_size)
    length = math.ceil(size / num_blocks)
    inside = np.arange(num_blocks * length).reshape(num_blocks, length) < size
    count = np.maximum(inside.sum(axis=1, keepdims=True), 1)
    position = np.where(inside, np.arange(length) - (count - 1) / 2, 0.0)
    basis = np.stack([inside.astype(np.float64), position], axis=-1)
    return basis / np.maximum(np.linalg.norm(basis, axis=1, keepdims=True), 1e-9)


def _line_kernel(basis, position_width):
    """[2 blocks, 2 blocks] the Gaussian between the functions of `_block_basis`."""
    num_blocks, length, _ = basis.shape
    lines = jnp.zeros((num_blocks, length, num_blocks, 2), basis.dtype)
    lines = lines.at[jnp.arange(num_blocks), :, jnp.arange(num_blocks)].set(basis)
    lines = lines.reshape(num_blocks * length, num_blocks * 2)
    positions = jnp.arange(num_blocks * length, dtype=basis.dtype) / position_width
    gaussian = jnp.exp(-jnp.square(positions[:, None] - positions) / 2)
    return jnp.matmul(lines.T, jnp.matmul(gaussian, lines, precision=_HIGHEST), precision=_HIGHEST)


def _sampled(colours, valid):
    """[n, C] colours of pixels evenly spread over those that count, from [m, C] and [m] booleans or None."""
    num_pixels = len(colours)
    num_samples = min(_SAMPLE, num_pixels)
    steps = (np.arange(num_samples) + 0.5) / num_samples
    if valid is None:
        return colours[(steps * num_pixels).astype(np.int32)]
    counted = jnp.cumsum(valid, dtype=jnp.int32)
    wanted = (jnp.asarray(steps, colours.dtype) * counted[-1].astype(colours.dtype)).astype(jnp.int32)
    return colours[jnp.searchsorted(counted, wanted, side="right")]


def _chosen_centres(sample, num_anchors):
    """[P, C] anchors for a sample [n, C]: drawn where earlier ones leave most uncovered, then a few Lloyd steps.

    A draw takes the quantiles of 1 - exp(-distance^2), the error of the kernel of a colour with itself on the
    nearest anchor alone, over the sample sorted by brightness: no randomness.
    """
    sample = sample[jnp.argsort(sample.sum(axis=1))]
    at_once = min(_ROUND, math.ceil(num_anchors / 4))
    num_rounds = math.ceil(num_anchors / at_once)
    quantiles = jnp.asarray((np.arange(at_once) + 0.5) / at_once, sample.dtype)

    def draw(nearest, _):
        uncovered = jnp.cumsum((1 - jnp.exp(-nearest)) ** _DRAW_POWER)
        drawn = jnp.searchsorted(uncovered, quantiles * uncovered[-1])
        drawn = sample[jnp.minimum(drawn, len(sample) - 1)]
        return jnp.minimum(nearest, squared_distances(drawn, sample).min(axis=0)), drawn

    far = varying_like(jnp.full_like(sample[:, 0], 1e9), sample)
    _, centres = jax.lax.scan(draw, far, length=num_rounds)
    centres = centres.reshape(num_rounds * at_once, -1)[:num_anchors]
    counted = jnp.concatenate([sample, jnp.ones_like(sample[:, :1])], axis=1)

    def lloyd(_, centres):
        distances = squared_distances(centres, sample)
        members = (distances <= distances.min(axis=0)).astype(sample.dtype)
        sums = jnp.matmul(members, counted, precision=_HIGHEST)
        return jnp.where(sums[:, -1:] > 0, sums[:, :-1] / jnp.maximum(sums[:, -1:], 1), centres)

    return jax.lax.fori_loop(0, _NUM_LLOYD, lloyd, centres)


def _inverse_root(centres):
    """[P, P] the inverse of the Cholesky factor of the Gaussian between the anchors."""
    gaussian = jnp.exp(-squared_distances(centres, centres) / 2)
    identity = jnp.eye(len(centres), dtype=centres.dtype)
    factor = jnp.linalg.cholesky(gaussian + _JITTER * identity)

    # Row by row: LAPACK's triangular solve takes up to a hundred times as long where other threads keep the cores busy.
    def substitute(i, inverse):
        row = factor[i]
        return inverse.at[i].set((identity[i] - jnp.matmul(row, inverse, precision=_HIGHEST)) / row[i])

    return jax.lax.fori_loop(0, len(centres), substitute, varying_like(jnp.zeros_like(factor), factor))


def build_anchors(image, *, position_width, colour_width, num_anchors=None, block_size=None, valid=None):
    r"""The bilateral Gaussian of an image, for `splat_anchors`, `blur_anchors` and `slice_anchors`.

    .. math:: K_{ij} = \exp(-|p_i-p_j|^2 / 2 s_a^2 - |I_i-I_j|^2 / 2 s_b^2) \approx (S^T B S)_{ij}

    with S the splat, B the blur and S^T the slice. The self-pair is part of it, `anchors_diagonal` has its share.

    With the defaults, on 24 photographs of 81x81 and 161x161 pixels at position widths of 10 to 100 pixels and
    colour widths of 13 and 15, filtered probabilities of 21 classes are 1 to 2.4 % off (relative L2 error,
    self-pairs left out; 4.7 % for the worst photograph), energies .1 to .6 % (2.6 %). 96 anchors take 30 % less
    time and have up to 7.5 % (4.2 %). The mean of `anchors_diagonal` tells how many colours are covered: .75 to
    .99 on these photographs, .1 on noise, whose colours fill the space and which is 77 % off; 1 is all.

    What lies between splat and slice grows with the number of blocks: about 3 P K (3 / 2 s_a)^2 numbers a pixel,
    130 for K = 21 at a width of 12 pixels, 1,100 at 4. Below 8 pixels this form costs more than it is worth:
    the exact filter of a small grid is faster.

    Args:
      image: [H, W, C] colours in 0..255, any real dtype, any number of channels.
      position_width: s_a, standard deviation in pixels of this grid, > 0; a Python number, unless `block_size`
        is given.
      colour_width: s_b, standard deviation in colour units, > 0.
      num_anchors: static number P of anchors in colour; more are more accurate. None is 128, or 96 for images of
        more than 200 x 200 pixels.
      block_size: static number of rows and columns of a block; smaller is more accurate, 1 exact in space. None
        is two thirds of `position_width`, at most 64.
      valid: [H, W] booleans, at least one of them true; pixels that are false, such as padding, take no part.
        None means that all pixels count.
    Returns:
      An `Anchors`; float32, or float64 for a float64 image.
    Raises:
      ValueError: if `image` is not [H, W, C], `valid` does not fit it, or a number is out of range.
      TypeError: if `block_size` is None and `position_width` is not a Python number.
    References:
      Williams and Seeger 2001, the Nystrom method; Arthur and Vassilvitskii 2007 for choosing the anchors.
    """
    height, width, channels = check_shape("image", image, ("H", "W", "C"), _ONE_IMAGE)
    check_number("position_width", position_width, minimum=0, strict=True, remedy=_WIDTH_REMEDY)
    check_number("colour_width", colour_width, minimum=0, strict=True, remedy=_WIDTH_REMEDY)
    if num_anchors is None:
        num_anchors = _NUM_ANCHORS if height * width <= 200**2 else _NUM_ANCHORS_LARGE
    check_number("num_anchors", num_anchors, minimum=1, remedy="None chooses one")
    block_size = _checked_block_size(block_size, position_width)
    colours = promote_float(image) / colour_width
    weights = jnp.ones_like(colours[:, :, 0])
    if valid is not None:
        check_shape("valid", valid, (height, width), "give one boolean per pixel of the image")
        weights = jnp.asarray(valid).astype(bool).astype(weights.dtype)
    sample = _sampled(colours.reshape(-1, channels), None if valid is None else weights.reshape(-1) > 0)
    centres = _chosen_centres(sample, num_anchors)
    row_basis = jnp.asarray(_block_basis(height, block_size), colours.dtype)
    column_basis = jnp.asarray(_block_basis(width, block_size), colours.dtype)
    blocks = (*(len(basis) for basis in (row_basis, column_basis)), row_basis.shape[1], column_basis.shape[1])
    return Anchors(
        colours=jax.vmap(_in_blocks, in_axes=(0, None))(_strips(colours, blocks), blocks),
        weights=weights,
        centres=centres,
        root=_inverse_root(centres),
        row_basis=row_basis,
        column_basis=column_basis,
        row_kernel=_line_kernel(row_basis, position_width),
        column_kernel=_line_kernel(column_basis, position_width),
    )


def _checked_block_size(block_size, position_width):
    if block_size is None and not isinstance(position_width, numbers.Real):
        raise TypeError(
            f"position_width: expected a Python number, got {type(position_width).__name__}; it sets the size of the "
            "blocks: close over it, or give block_size"
        )
    if block_size is None:
        block_size = min(max(1, round(_BLOCK_PER_WIDTH * position_width)), _LARGEST_BLOCK)
    return check_number("block_size", block_size, minimum=1, remedy="None is two thirds of the position width")


def scaled_anchors(anchors, scale):
    r"""The anchors of the kernel with rows and columns scaled, diag(s) K diag(s).

    Args:
      anchors: an `Anchors` for m pixels.
      scale: [m] factors s.
    Returns:
      An `Anchors`.
    Raises:
      ValueError: if `scale` does not have one factor per pixel.
    References:
      None.
    """
    check_shape("scale", scale, (anchors.weights.size,), "give one factor per pixel")
    scale = promote_float(scale).astype(anchors.weights.dtype)
    return anchors._replace(weights=anchors.weights * scale.reshape(anchors.weights.shape))


def _blocks(anchors):
    """Numbers of blocks, down and across, and their sizes, in rows and columns."""
    (down, rows, _), (across, columns, _) = anchors.row_basis.shape, anchors.column_basis.shape
    return down, across, rows, columns


def _strips(grid, blocks):
    """[H, W, K], with zeros up to whole blocks, as [down, rows, across * columns, K]."""
    down, across, rows, columns = blocks
    height, width, channels = grid.shape
    padded = jnp.pad(grid, ((0, down * rows - height), (0, across * columns - width), (0, 0)))
    return padded.reshape(down, rows, across * columns, channels)


def _in_blocks(strip, blocks):
    """[rows, across * columns, K] as [across, K, rows * columns]."""
    _, across, rows, columns = blocks
    strip = strip.reshape(rows, across, columns, -1).transpose(1, 3, 0, 2)
    return strip.reshape(across, -1, rows * columns)


def _basis(anchors):
    """[down, across, 3, rows * columns] the functions of the blocks, times the weights of the pixels."""
    blocks = _blocks(anchors)
    down, across = anchors.row_basis[:, None, :, None], anchors.column_basis[None, :, None]
    basis = jnp.stack([down[..., i] * across[..., j] for i, j in _FUNCTIONS], axis=2)
    weights = jax.vmap(_in_blocks, in_axes=(0, None))(_strips(anchors.weights[:, :, None], blocks), blocks)
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


def _checked_coarse(anchors, coarse, source):
    down, across, _, _ = _blocks(anchors)
    expected = (down, across, len(_FUNCTIONS), len(anchors.centres), "K")
    check_shape("coarse", coarse, expected, f"give what {source} returns for the same anchors")
    return promote_float(coarse).astype(anchors.weights.dtype)


def splat_anchors(anchors, values):
    """Values summed over the pixels of each block, for each anchor and each of the three functions of the block.

    Args:
      anchors: an `Anchors` for m pixels.
      values: [m, K] values.
    Returns:
      [r, c, 3, P, K] sums.
    Raises:
      ValueError: if `values` is not [m, K].
    References:
      None.
    """
    height, width = anchors.weights.shape
    _, channels = check_shape("values", values, (height * width, "K"), _FLATTEN)
    blocks = _blocks(anchors)
    values = promote_float(values).astype(anchors.weights.dtype).reshape(height, width, channels)

    # The affinities are computed again for a gradient, too, rather than kept.
    @jax.checkpoint
    def block_sums(colours, basis, values):
        columns = (basis[:, None] * values).reshape(3 * channels, -1)
        sums = jnp.matmul(columns, _affinity(colours, anchors.centres), precision=_HIGHEST)
        sums = jnp.matmul(sums, anchors.root.T, precision=_HIGHEST)
        return sums.reshape(3, channels, -1).swapaxes(1, 2)

    def strip_sums(strip):
        colours, basis, values = strip
        return _map_blocks(block_sums, anchors, colours, basis, _in_blocks(values, blocks))

    return jax.lax.map(strip_sums, (anchors.colours, _basis(anchors), _strips(values, blocks)))


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


def blur_anchors(anchors, coarse):
    """The Gaussian over rows and columns between the sums; symmetric and positive semi-definite.

    Args:
      anchors: an `Anchors`.
      coarse: [r, c, 3, P, K] sums of `splat_anchors`.
    Returns:
      [r, c, 3, P, K] weights for `slice_anchors`.
    Raises:
      ValueError: if `coarse` does not fit the anchors.
    References:
      None.
    """
    coarse = _checked_coarse(anchors, coarse, "splat_anchors")
    table = coarse.reshape(*coarse.shape[:3], -1)
    blurred = _dense_blur if math.prod(table.shape[:3]) <= _DENSE_BLUR else _separable_blur
    return blurred(anchors, table).reshape(coarse.shape)


def slice_anchors(anchors, coarse):
    """The values at the pixels; the transpose of `splat_anchors`.

    Args:
      anchors: an `Anchors` for m pixels.
      coarse: [r, c, 3, P, K] weights of `blur_anchors`.
    Returns:
      [m, K] values.
    Raises:
      ValueError: if `coarse` does not fit the anchors.
    References:
      None.
    """
    coarse = _checked_coarse(anchors, coarse, "blur_anchors")
    *_, num_anchors, channels = coarse.shape
    down, across, rows, columns = _blocks(anchors)
    height, width = anchors.weights.shape
    # Matrix products on CPU are up to a third faster where rows are whole vectors.
    missing = -3 * channels % 16

    @jax.checkpoint
    def block_values(colours, basis, coarse):
        coarse = jnp.pad(coarse.swapaxes(1, 2).reshape(3 * channels, num_anchors), ((0, missing), (0, 0)))
        coarse = jnp.matmul(coarse, anchors.root, precision=_HIGHEST)
        terms = jnp.matmul(_affinity(colours, anchors.centres), coarse.T, precision=_HIGHEST)
        terms = jnp.split(terms[:, : 3 * channels], 3, axis=1)
        return sum(function[:, None] * term for function, term in zip(basis, terms, strict=True))

    def strip_values(strip):
        values = _map_blocks(block_values, anchors, *strip)
        return values.reshape(across, rows, columns, channels).swapaxes(0, 1)

    values = jax.lax.map(strip_values, (anchors.colours, _basis(anchors), coarse))
    values = values.reshape(down * rows, across * columns, channels)[:height, :width]
    return values.reshape(height * width, channels)


def anchors_diagonal(anchors):
    """The diagonal of the kernel: what each pixel adds to its own result, near 1 where colours are not rare.

    Args:
      anchors: an `Anchors` for m pixels.
    Returns:
      [m] the diagonal of slice(blur(splat(.))).
    Raises:
      None.
    References:
      None.
    """
    down, across, rows, columns = _blocks(anchors)
    height, width = anchors.weights.shape
    row = anchors.row_kernel.reshape(down, 2, down, 2)[np.arange(down), :, np.arange(down)]
    column = anchors.column_kernel.reshape(across, 2, across, 2)[np.arange(across), :, np.arange(across)]
    within = _between_functions(row[:, None], column[None, :])

    def block_diagonal(colours, basis, within):
        features = jnp.matmul(_affinity(colours, anchors.centres), anchors.root.T, precision=_HIGHEST)
        space = jnp.sum(basis * jnp.matmul(within, basis, precision=_HIGHEST), axis=0)
        return jnp.square(features).sum(axis=1) * space

    def strip_diagonal(strip):
        diagonal = _map_blocks(block_diagonal, anchors, *strip)
        return diagonal.reshape(across, rows, columns).swapaxes(0, 1)

    diagonal = jax.lax.map(strip_diagonal, (anchors.colours, _basis(anchors), within))
    return diagonal.reshape(down * rows, across * columns)[:height, :width].reshape(height * width)
