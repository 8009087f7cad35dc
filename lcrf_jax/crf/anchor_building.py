"""How the anchors and blocks of `lcrf_jax.crf.anchors` are chosen for an image."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.anchors import Anchors, in_blocks, in_strips
from lcrf_jax.crf.params import WIDTH_REMEDY, check_image_shape
from lcrf_jax.numerics import (
    check_count,
    check_number,
    check_shape,
    known_number,
    promote_float,
    squared_distances,
    varying_like,
)

_HIGHEST = jax.lax.Precision.HIGHEST
_NUM_ANCHORS, _NUM_ANCHORS_LARGE = 128, 96
_BLOCK_PER_WIDTH, _LARGEST_BLOCK = 2 / 3, 64
_SAMPLE, _ROUND, _NUM_LLOYD, _DRAW_POWER = 2048, 16, 4, 1.5
# Added to the diagonal of M: anchors may coincide, as in an image of one colour.
_JITTER = 1e-4


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


def build_anchors(
    image: ArrayLike,
    *,
    position_width: float | jax.Array,
    colour_width: float | jax.Array,
    num_anchors: int | None = None,
    block_size: int | None = None,
    valid: ArrayLike | None = None,
) -> Anchors:
    r"""The bilateral Gaussian of an image, as a form of the kernel, see `lcrf_jax.crf.kernel`.

    .. math:: K_{ij} = \exp(-|p_i-p_j|^2 / 2 s_a^2 - |I_i-I_j|^2 / 2 s_b^2) \approx (S^T B S)_{ij}

    with S the splat, B the blur and S^T the slice. The self-pair is part of it, `Anchors.diagonal` has its share.

    With the defaults, on 24 photographs of 81x81 and 161x161 pixels at position widths of 10 to 100 pixels and
    colour widths of 13 and 15, filtered probabilities of 21 classes are 1 to 2.4 % off (relative L2 error,
    self-pairs left out; 4.7 % for the worst photograph), energies .1 to .6 % (2.6 %). 96 anchors take 30 % less
    time and have up to 7.5 % (4.2 %). The mean of `Anchors.diagonal` tells how many colours are covered: .75 to
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
    height, width, channels = check_image_shape(image)
    check_number("position_width", position_width, minimum=0, strict=True, remedy=WIDTH_REMEDY)
    check_number("colour_width", colour_width, minimum=0, strict=True, remedy=WIDTH_REMEDY)
    if num_anchors is None:
        num_anchors = _NUM_ANCHORS if height * width <= 200**2 else _NUM_ANCHORS_LARGE
    num_anchors = check_count("num_anchors", num_anchors, minimum=1, remedy="None chooses one")
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
    blocks = (len(row_basis), len(column_basis), row_basis.shape[1], column_basis.shape[1])
    return Anchors(
        colours=jax.vmap(in_blocks, in_axes=(0, None))(in_strips(colours, blocks), blocks),
        weights=weights,
        centres=centres,
        root=_inverse_root(centres),
        row_basis=row_basis,
        column_basis=column_basis,
        row_kernel=_line_kernel(row_basis, position_width),
        column_kernel=_line_kernel(column_basis, position_width),
    )


def _checked_block_size(block_size, position_width):
    if block_size is None and known_number(position_width) is None:
        raise TypeError(
            f"position_width: expected a Python number, got {type(position_width).__name__}; it sets the size of the "
            "blocks: close over it, or give block_size"
        )
    if block_size is None:
        block_size = min(max(1, round(_BLOCK_PER_WIDTH * known_number(position_width))), _LARGEST_BLOCK)
    return check_count("block_size", block_size, minimum=1, remedy="None is two thirds of the position width")
