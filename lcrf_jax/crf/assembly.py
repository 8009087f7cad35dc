"""What the kernels of all kinds have in common: a normalised bilateral Gaussian, and a lattice that has room."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lcrf_jax.crf.forms import BilateralForm
from lcrf_jax.crf.kernel import ImageKernel
from lcrf_jax.crf.lattice import Lattice, lattice_overflowed
from lcrf_jax.crf.lattice_building import build_lattice


def assembled(
    grid: tuple[int, ...],
    dtype: DTypeLike,
    bilateral: BilateralForm | None,
    weight: ArrayLike,
    normalisation: str,
    counted: jax.Array | None = None,
) -> ImageKernel:
    """A kernel of a bilateral Gaussian alone.

    Args:
      grid: (H, W) of the pixels.
      dtype: of the kernel.
      bilateral: the Gaussian, not normalised yet; None leaves it out.
      weight: w1.
      normalisation: 'none', 'row' or 'symmetric'.
      counted: [m] booleans, which pixels count; None is all.
    Returns:
      An `ImageKernel` without a spatial Gaussian.
    """
    mask = jnp.ones(math.prod(grid), dtype) if counted is None else counted.astype(dtype)
    scale, diagonal = mask, jnp.zeros_like(mask)
    if bilateral is not None:
        diagonal = bilateral.diagonal()
        if normalisation != "none":
            scale = inverse_root(bilateral.row_sums(mask), mask)
        bilateral = bilateral.scaled(scale)
        diagonal = diagonal * jnp.square(scale)
        if normalisation != "none":
            # Normalised rows, with the self-pair, sum to about 1.
            diagonal = jnp.minimum(diagonal, 1)
    return ImageKernel(
        bilateral=bilateral,
        bilateral_weight=jnp.asarray(weight, dtype),
        bilateral_diagonal=diagonal.reshape(grid),
        gaussian=None,
        gaussian_weight=jnp.zeros((), dtype),
        row_scales=(scale, mask) if normalisation == "row" else None,
    )


def inverse_root(sums: jax.Array, mask: jax.Array) -> jax.Array:
    """sums^-1/2 where the mask is not 0, and 0 elsewhere; only where a lattice overflowed is a sum 0.

    Args:
      sums: [m] sums of rows.
      mask: [m] 1 for a pixel that counts, 0 for another.
    Returns:
      [m].
    """
    return jnp.where(mask > 0, jax.lax.rsqrt(jnp.where((mask > 0) & (sums > 0), sums, 1)), 0)


def with_room(
    features: jax.Array,
    cell_sizes: tuple[float, ...] | None,
    counted: jax.Array | None,
    capacity: int | None,
    usual: int,
) -> Lattice:
    """A lattice that did not overflow; inside jit, where nobody knows, one of the given or the usual capacity.

    Args:
      features: [m, d], see `build_lattice`.
      cell_sizes: see `build_lattice`.
      counted: [m] booleans, see `build_lattice`.
      capacity: what the caller asked for, or None.
      usual: the capacity to try first where nobody asked.
    Returns:
      A `Lattice`.
    Raises:
      ValueError: if `capacity` is too small, outside jit, or none would do.
    """
    tried = usual if capacity is None else capacity
    while True:
        lattice = build_lattice(features, tried, cell_sizes=cell_sizes, valid=counted)
        if isinstance(lattice.num_vertices, jax.core.Tracer) or not lattice_overflowed(lattice):
            return lattice
        tried = grown_capacity(int(lattice.num_vertices), capacity, len(features), features.shape[1])


def grown_capacity(needed: int, given: int | None, num_pixels: int, num_features: int) -> int:
    """The capacity to build a lattice with after one has overflowed.

    Args:
      needed: vertices that it needed, `Lattice.num_vertices`.
      given: the capacity that the caller asked for; None if it was chosen here.
      num_pixels: H * W.
      num_features: d, C + 2.
    Returns:
      A number that is larger than before.
    Raises:
      ValueError: if the caller asked for too little, or no capacity would do.
    """
    most = num_pixels * (num_features + 1)
    if needed > most:
        raise ValueError(
            "image: expected channels that a lattice can hold, got values that are not finite or too many widths apart; "
            "use larger widths, or form='exact'"
        )
    if given is not None:
        raise ValueError(
            f"capacity: expected at least {needed} vertices for this image, got {given}; None chooses, and "
            f"H * W * (C + 3) = {most} is always enough"
        )
    return min(most, 2 ** math.ceil(math.log2(needed)))
