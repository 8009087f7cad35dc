"""The coarse grid of an image, on which the first iterations of mean field can be made: one cell for 2 x 2 pixels.

An iteration there costs less than one at the pixels. What goes back to the pixels is the *message*, the sum over
neighbours that is added to the unary, and not q itself: edges that the unary has between pixels stay where they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.image_kernels import image_kernel, prepared_image
from lcrf_jax.crf.kernel import ImageKernel
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.numerics import check_count


class CoarseGrid(NamedTuple):
    """The kernel of an image at half its resolution, and what is needed to go there and back.

    Attributes:
      kernel: the kernel of the image averaged over 2 x 2 pixels, h x w cells, with half the widths.
      counted: [H, W] 1 for a pixel of the image that counts, 0 for another.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import KernelParams, coarse_grid
      >>> coarse = coarse_grid(np.zeros((5, 8, 3), np.uint8), KernelParams())
      >>> coarse.kernel.grid, coarse.counted.shape
      ((3, 4), (5, 8))
    """

    kernel: ImageKernel
    counted: jax.Array


def coarse_grid(
    image: ArrayLike,
    params: KernelParams,
    *,
    form: str | None = None,
    normalisation: str = "symmetric",
    valid: ArrayLike | None = None,
    colour_max: float | None = 255.0,
    capacity: int | None = None,
) -> CoarseGrid:
    """The coarse grid of an image, for `coarse=` of `lcrf_jax.crf.inference.mean_field`.

    A cell at the edge of an image of odd size is the mean of the pixels that it has.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      params: `KernelParams` in pixels of this image, not of the coarse one.
      form: of the coarse kernel, see `lcrf_jax.crf.image_kernels.image_kernel`; None chooses by its size.
      normalisation: of the coarse kernel, see `image_kernel`; that of the kernel at the pixels.
      valid: [H, W] booleans, the pixels that count, see `image_kernel`; None is all.
      colour_max: the value of full colour in `image`: 255, or 1.
      capacity: of the coarse lattice, see `image_kernel`.
    Returns:
      A `CoarseGrid`.
    Raises:
      ValueError: as `image_kernel`.
      TypeError: as `image_kernel`.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import KernelParams, coarse_grid, image_kernel, mean_field
      >>> image, params = np.zeros((5, 8, 3), np.uint8), KernelParams()
      >>> kernel, coarse = image_kernel(image, params), coarse_grid(image, params)
      >>> mean_field(np.zeros((5, 8, 2)), kernel, coarse=coarse, coarse_iterations=7).shape
      (5, 8, 2)
    """
    image, pixels = prepared_image(image, params, normalisation, valid, colour_max)
    counted = jnp.ones(image.shape[:2], image.dtype) if pixels is None else pixels.reshape(image.shape[:2]).astype(image.dtype)
    sums = _sums_of_cells(counted[:, :, None])
    if capacity is not None:  # one for the pixels may be more than the cells can ever need
        capacity = min(capacity, sums.size * (image.shape[-1] + 3))
    kernel = image_kernel(
        averaged(image, counted), params.at_stride(2), form=form, normalisation=normalisation,
        valid=None if valid is None else sums[:, :, 0] > 0,
        colour_max=None if colour_max is None else 255.0, capacity=capacity,
    )  # fmt: skip
    return CoarseGrid(kernel, counted)


def averaged(values: jax.Array, counted: jax.Array) -> jax.Array:
    """The mean of the pixels of each cell that count.

    Args:
      values: [H, W, K].
      counted: [H, W] 1 for a pixel that counts, 0 for another.
    Returns:
      [h, w, K], h = H / 2 and w = W / 2 rounded up; 0 for a cell without such pixels.
    """
    weights = counted[:, :, None].astype(values.dtype)
    # Where a pixel does not count its values may be anything.
    sums = _sums_of_cells(jnp.where(weights > 0, values, 0))
    # Without the barrier XLA on CPU averages again for every use.
    return jax.lax.optimization_barrier(sums / jnp.maximum(_sums_of_cells(weights), 1))


def _sums_of_cells(values):
    height, width, channels = values.shape
    values = jnp.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    values = values.reshape((height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return values[:, 0, :, 0] + values[:, 0, :, 1] + values[:, 1, :, 0] + values[:, 1, :, 1]


def enlarged(cells: jax.Array, counted: jax.Array) -> jax.Array:
    """Values of cells at the pixels, linearly between the middles of the cells.

    Weights are not negative and sum to 1: what is larger at every cell is larger at every pixel. Cells without a pixel
    that counts give nothing.

    Args:
      cells: [h, w, K].
      counted: [H, W] 1 for a pixel that counts, 0 for another.
    Returns:
      [H, W, K].
    """
    height, width = counted.shape
    given = _sums_of_cells(counted[:, :, None])[:, :, 0] > 0
    total, weights = jnp.zeros((), cells.dtype), jnp.zeros((), cells.dtype)
    for row, row_share in _neighbours(height):
        for column, column_share in _neighbours(width):
            place = row[:, None] * cells.shape[1] + column
            share = row_share[:, None] * column_share
            share = jnp.where(given.reshape(-1)[place], share, 0).astype(cells.dtype)
            total = total + share[:, :, None] * cells.reshape(-1, cells.shape[2])[place]
            weights = weights + share
    return total / jnp.where(weights > 0, weights, 1)[:, :, None]


def _neighbours(size):
    """For each pixel along an axis its own cell and the nearer one beside it, with their shares: NumPy arrays."""
    pixels = np.arange(size)
    own, beside = pixels // 2, pixels // 2 + np.where(pixels % 2, 1, -1)
    inside = (beside >= 0) & (beside < (size + 1) // 2)
    return (own, np.full(size, 0.75)), (np.where(inside, beside, own), np.where(inside, 0.25, 0.0))


def checked_coarse_iterations(coarse_iterations: int, num_iterations: int) -> int:
    """The number of iterations on the coarse grid, after checking it.

    Args:
      coarse_iterations: as the caller gave it.
      num_iterations: all iterations.
    Returns:
      The number.
    Raises:
      ValueError: if it is negative, or there are not so many iterations.
      TypeError: if it is no whole number, or traced.
    """
    coarse_iterations = check_count("coarse_iterations", coarse_iterations, minimum=0, remedy="0 makes all at the pixels")
    if coarse_iterations > num_iterations:
        raise ValueError(
            f"coarse_iterations: expected at most num_iterations = {num_iterations}, got {coarse_iterations}; it counts those "
            "of them that come first, on the coarse grid"
        )
    return coarse_iterations


def check_coarse(coarse: CoarseGrid | None, coarse_iterations: int, num_pixels: int) -> None:
    """Check that a coarse grid fits the unary, and is there where it is needed.

    Args:
      coarse: as the caller gave it.
      coarse_iterations: iterations on it.
      num_pixels: m, of the unary.
    Raises:
      ValueError: if it is missing, or the grid of another image.
      TypeError: if it is something else.
    """
    if coarse is None:
        if coarse_iterations:
            raise ValueError(
                f"coarse_iterations: expected 0 without coarse, got {coarse_iterations}; pass coarse=coarse_grid(image, params)"
            )
        return
    if not isinstance(coarse, CoarseGrid):
        raise TypeError(f"coarse: expected a CoarseGrid, got {type(coarse).__name__}; coarse_grid(image, params) makes one")
    if coarse.counted.size != num_pixels:
        raise ValueError(
            f"coarse: expected the coarse grid of {num_pixels} pixels, as in the unary, got one of {coarse.counted.size}; "
            "make it of the same image"
        )
