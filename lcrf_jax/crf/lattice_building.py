"""How the permutohedral lattice of `lcrf_jax.crf.lattice` is built for a set of features."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.hashing import distinct_keys, fingerprint_multipliers, fingerprints, key_numbers, num_blocks
from lcrf_jax.crf.lattice import CELL_BLOCK, NARROWING, NO_DERIVATIVE, VERTEX_BLOCK, Lattice
from lcrf_jax.crf.linear import without_derivative
from lcrf_jax.numerics import (
    check_count,
    check_number,
    check_shape,
    check_values,
    first_place,
    promote_float,
    varying_like,
)

_FLATTEN = "flatten the pixels to one axis, channels last"
# Steps of the longest paths that count for a self-pair: all of them in small lattices of up to five features.
_LONGEST_PATH, _LONGEST_PATH_OF_SMALL, _SMALL = 3, 6, 64**2
# Features are moved towards the origin by multiples of this, and refused or marked if they spread more than that.
_MOVE = 1024
_SPREAD = 1e5


def _fault_of_features(values):
    if not np.all(np.isfinite(values)):
        place = first_place(~np.isfinite(values))
        return f"expected finite numbers, got {values[tuple(place)]} at {place}; look at the image and the widths"
    spread = np.ptp(values, axis=0)
    widest, limit = int(spread.argmax()), _SPREAD / (values.shape[1] + 1)
    if spread[widest] > limit:
        return (f"expected features at most {limit:.4g} widths apart, got {spread[widest]:.4g} in column {widest}; use a "
                "larger width")
    return None


def default_capacity(num_pixels: int, num_features: int, *, share: float = 1.0) -> int:
    """Vertices to provide for: one per pixel in large images, two up to 32,768 pixels, and 65,536 in between.

    d + 1 vertices a pixel is the hard upper bound, reached only if no two pixels share a corner; up to 16,384
    vertices it is provided for: small images need more than two a pixel. Photographs of 500x375 pixels need .06
    vertices a pixel at widths of 80 pixels and 13 colour units (.10 at most in a sample of 16), .14 (.26) at 80
    and 8, .34 (.65) at 80 and 5; smaller photographs need more.

    Args:
      num_pixels: m.
      num_features: d.
      share: vertices per pixel, > 0, in place of one.
    Returns:
      Number of vertices, a static int.
    Raises:
      ValueError: if a number is smaller than 1, or the share is not positive.
    """
    check_number("num_pixels", num_pixels, minimum=1, remedy="give the number of rows of the features")
    check_number("num_features", num_features, minimum=1, remedy="give the number of columns of the features")
    check_number("share", share, minimum=0, strict=True, remedy="1 is enough for most photographs")
    return min(num_pixels * (num_features + 1), max(math.ceil(share * num_pixels), min(2 * num_pixels, 2**16), 2**14))


def _enclosing_simplex(features):
    """Remainder-0 vertex [d + 1, m] int32, ranks [d + 1, m] and barycentric weights [d + 1, m] of each feature."""
    num_features = features.shape[1]
    corners = num_features + 1
    # Columns of the elevation, one above the other; a unit of feature space becomes sqrt(2/3) (d + 1) lattice units,
    # the variance of the blur together with splat and slice, or a little more.
    unit = NARROWING * math.sqrt(2 / 3) * corners
    scale = np.array([unit / math.sqrt((i + 1) * (i + 2)) for i in range(num_features)])
    scaled = features.T * scale[:, None].astype(features.dtype)
    below = jnp.flip(jnp.cumsum(jnp.flip(scaled, 0), 0), 0)
    steps = jnp.arange(1, corners, dtype=features.dtype)[:, None]
    elevated = jnp.concatenate([below, jnp.zeros_like(below[:1])]).at[1:].add(-steps * scaled)

    origin = jnp.round(elevated / corners).astype(jnp.int32)
    excess = origin.sum(axis=0, dtype=jnp.int32)
    remainder = elevated - corners * origin.astype(features.dtype)
    # The largest remainder has rank 0; of equal ones the first.
    earlier = np.tri(corners, k=-1, dtype=bool)[:, :, None]
    precedes = (remainder[None] > remainder[:, None]) | ((remainder[None] == remainder[:, None]) & earlier)
    rank = excess + precedes.sum(axis=1, dtype=jnp.int32)
    wrap = (rank < 0).astype(jnp.int32) - (rank >= corners).astype(jnp.int32)
    rank, origin = rank + corners * wrap, origin + wrap

    fraction = (elevated - corners * origin.astype(features.dtype)) / corners
    in_order = jnp.stack([jnp.sum(jnp.where(rank == r, fraction, 0), axis=0) for r in range(corners)])
    descending = jnp.flip(in_order, 0)
    # Never below 0 but for rounding: then the kernel would have negative entries.
    weights = jnp.maximum(descending - jnp.concatenate([descending[-1:] - 1, descending[:-1]]), 0)
    return corners * origin, rank, weights


def _whole_blocks(size, block):
    """The size rounded up to whole blocks, if it is more than one."""
    return size if size <= block else math.ceil(size / block) * block


def _cells_of(features, valid, cell_sizes, num_cells):
    """Cell of each pixel, mean features [num_cells, d] of the cells, and how many there are."""
    num_pixels, num_features = features.shape
    boxes = jnp.floor(features / jnp.asarray(cell_sizes, features.dtype)).astype(jnp.int32)
    hashes = fingerprints(boxes.T[:, None], fingerprint_multipliers(num_features))
    found = distinct_keys(jax.lax.optimization_barrier(hashes), valid[None], num_pixels, num_pixels, num_cells)
    cells = found.ids[0]
    # Summed relative to a pixel of the cell, so that float32 keeps its digits.
    origin = features[found.entries]
    inside = cells < num_cells
    centred = jnp.where(inside[:, None], features - origin[jnp.where(inside, cells, 0)], 0)
    counted = jnp.concatenate([centred, jnp.ones_like(centred[:, :1])], axis=1)
    sums = varying_like(jnp.zeros((num_cells, num_features + 1), features.dtype), features)
    sums = sums.at[cells].add(counted, mode="drop")
    return cells, origin + sums[:, :-1] / jnp.maximum(sums[:, -1:], 1), found.count


def _corners_of(features, num_cells, block):
    """Of the corners of each cell's simplex: weights, two fingerprints, and the way to the next; all [d + 1, n].

    A step along direction `ways[k]` leads from corner k to corner k + 1, and from the last one back to the first.
    """
    size, num_features = features.shape
    corners = num_features + 1
    number = np.arange(corners, dtype=np.int32)[:, None, None]
    multipliers = fingerprint_multipliers(corners)

    def add_block(i, state):
        part = jax.lax.dynamic_slice_in_dim(features, i * block, block)
        origin, rank, weights = _enclosing_simplex(part)
        # Corner k lies at origin + k, less d + 1 in the coordinates of the k highest ranks.
        keys = origin[None] + number - corners * (rank[None] > num_features - number).astype(jnp.int32)
        with_rank = [jnp.where(rank == num_features - k, number[:, 0], 0) for k in range(corners)]
        ways = jnp.stack([coordinates.sum(axis=0, dtype=jnp.int32) for coordinates in with_rank])
        parts = weights, ways, *fingerprints(jnp.moveaxis(keys, 1, 0), multipliers)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(array, new, i * block, axis=1)
            for array, new in zip(state, parts, strict=True)
        )

    state = (
        jnp.zeros((corners, size), features.dtype),
        jnp.zeros((corners, size), jnp.int32),
        jnp.zeros((corners, size), jnp.uint32),
        jnp.zeros((corners, size), jnp.uint32),
    )
    state = tuple(varying_like(part, features) for part in state)
    weights, ways, *hashes = jax.lax.fori_loop(0, num_blocks(num_cells, block), add_block, state)
    return weights, ways, tuple(hashes)


def _with_one_more(ordered, new):
    """Arrays that ascend from one to the next, with another one sorted in."""
    result = []
    for array in ordered:
        result.append(jnp.minimum(array, new))
        new = jnp.maximum(array, new)
    return [*result, new]


def _self_weights(weights, vertices, ways, neighbours, num_cells, block, longest):
    """[n] the weight of each cell's value in its own result, before the constant.

    The corners of a simplex lie on a circle: a step along `ways[k]` leads from corner k to the next. The blur goes
    through its directions in their order and takes each step, forwards or back, with 1/2. So it connects corners
    that are n steps apart on the circle by 2^-n, if the vertices on the way are there: one path forwards and one
    back. Paths of more than `longest` steps are left out: all are positive, so the result is never too large.
    """
    corners, size = weights.shape
    capacity = neighbours.shape[-1]
    flat = neighbours.reshape(-1)

    def exists(vertices, ordered, side):
        """[d + 1, n] whether the path from each corner along the ordered directions exists."""
        at, there = vertices, True
        # The last step ends at a corner, which is there.
        for way in ordered[:-1]:
            at = flat.at[(2 * way + side) * capacity + at].get(mode="promise_in_bounds")
            there &= at < capacity
            at = jnp.minimum(at, capacity - 1)
        return there

    def add_block(i, result):
        weights_of, vertices_of, ways_of = (
            jax.lax.dynamic_slice_in_dim(array, i * block, block, axis=1) for array in (weights, vertices, ways)
        )
        weights_of = jnp.where(vertices_of < capacity, weights_of, 0)
        vertices_of = jnp.minimum(vertices_of, capacity - 1)
        total = weights_of * weights_of
        for side in (0, 1):
            ordered = []
            for length in range(1, min(corners, longest) + 1):
                shift = -length if side else length
                ordered = _with_one_more(ordered, jnp.roll(ways_of, shift + 1 if side else shift, axis=0))
                ends = 2.0**-length * weights_of * jnp.roll(weights_of, shift, axis=0)
                total = total + jnp.where(exists(vertices_of, ordered, side), ends, 0)
        return jax.lax.dynamic_update_slice_in_dim(result, total.sum(axis=0), i * block, 0)

    start = varying_like(jnp.zeros(size, weights.dtype), weights)
    return jax.lax.fori_loop(0, num_blocks(num_cells, block), add_block, start)


def _neighbours_of(vertices, capacity):
    """[d + 1, 2, capacity] the vertices before and after each."""
    corners = len(vertices.ids)
    block = min(VERTEX_BLOCK, capacity)
    # The hashes are linear, so a neighbour's are the vertex's own plus a constant.
    steps = np.ones((corners, corners), np.int64) - corners * np.eye(corners, dtype=np.int64)
    offsets = (steps @ fingerprint_multipliers(corners).astype(np.int64).T).astype(np.uint32)
    direction = np.arange(corners)[:, None]
    num_vertices = jnp.minimum(vertices.count, capacity)

    def link_block(i, state):
        before, after = state
        start = jnp.minimum(i * block, capacity - block)
        entries = jax.lax.dynamic_slice_in_dim(vertices.entries, start, block)
        own = tuple(h.ravel()[entries] for h in vertices.hashes)
        keys = tuple(h[None] + o[:, None] for h, o in zip(own, offsets.T, strict=True))
        numbers = start + jnp.arange(block, dtype=jnp.int32)
        found = key_numbers(vertices, jax.lax.optimization_barrier(keys))
        found = jnp.where(numbers < num_vertices, found, capacity)
        before = before.at[direction, found].set(jnp.broadcast_to(numbers, found.shape), mode="drop")
        return before, jax.lax.dynamic_update_slice_in_dim(after, found, start, axis=1)

    none = varying_like(jnp.full((corners, capacity), capacity, jnp.int32), vertices.ids)
    return jnp.stack(jax.lax.fori_loop(0, num_blocks(num_vertices, block), link_block, (none, none)), axis=1)


def build_lattice(
    features: ArrayLike,
    capacity: int | None = None,
    *,
    cell_sizes: Sequence[float] | None = None,
    valid: ArrayLike | None = None,
) -> Lattice:
    """The permutohedral lattice of a set of features.

    Args:
      features: [m, d] features in units of their widths, finite; the largest and the smallest of a feature at most
        1e5 / (d + 1) apart, or float32 would lose the place within a simplex.
      capacity: static number of vertices to provide for; None is `default_capacity(m, d)`.
      cell_sizes: d sizes > 0 of a cell along each feature, in units of the widths, for a downsampled lattice;
        None makes every pixel a cell of its own.
      valid: [m] booleans; pixels that are false get and give nothing. None means that all count.
    Returns:
      A `Lattice`. Check `lattice_overflowed` on it, outside jit. Under jit features that are not finite, or too
      far apart, count as an overflow.
    Raises:
      ValueError: if `features` is not [m, d] or has a value that is known to be out of range, `valid` or `cell_sizes`
        does not fit, or `capacity` is smaller than 1.
      TypeError: while JAX differentiates with respect to the features.
    References:
      Adams, Baek and Davis 2010, sections 3 and 4.
    """
    num_pixels, num_features = check_shape("features", features, ("m", "d"), _FLATTEN)
    capacity = default_capacity(num_pixels, num_features) if capacity is None else capacity
    capacity = check_count("capacity", capacity, minimum=1, remedy="None chooses one")
    features = promote_float(features)
    if valid is None:
        valid = jnp.ones(num_pixels, bool)
    else:
        valid = jnp.asarray(valid, bool)
        check_shape("valid", valid, (num_pixels,), "give one boolean per pixel")
        features = jnp.where(valid[:, None], features, 0)
    check_values("features", features, _fault_of_features)
    features = without_derivative(features, NO_DERIVATIVE)
    if cell_sizes is not None:
        check_shape("cell_sizes", np.asarray(cell_sizes), (num_features,), "give one size per feature")
        cell_sizes = tuple(map(float, cell_sizes))
        for size in cell_sizes:
            check_number("cell_sizes", size, minimum=0, strict=True, remedy="a few tenths of a width are usual")

    # Features far from the origin keep their digits; moves of whole units leave all others as they are.
    far = _MOVE * jnp.round(features.mean(axis=0) / _MOVE)
    features = features - jax.lax.stop_gradient(far)

    # A batch is built image by image: the numbers of blocks differ from image to image.
    @jax.custom_batching.sequential_vmap
    def build(features, valid):
        return _built(features, valid, cell_sizes, capacity)

    return build(features, valid)


@functools.partial(jax.jit, static_argnames=("cell_sizes", "capacity"))
def _built(features, valid, cell_sizes, capacity):
    num_pixels = features.shape[0]
    block = min(CELL_BLOCK, num_pixels)
    size = _whole_blocks(num_pixels, block)
    if cell_sizes is None:
        cells = jnp.where(valid, jnp.arange(num_pixels, dtype=jnp.int32), size)
        num_cells = varying_like(jnp.int32(num_pixels), features)
        means = jnp.pad(features, ((0, size - num_pixels), (0, 0)))
        active = jnp.pad(valid, (0, size - num_pixels))
    else:
        cells, means, num_cells = _cells_of(features, valid, cell_sizes, size)
        active = varying_like(jnp.ones(size, bool), features)
    # The barriers keep XLA on CPU from computing a stage again wherever the next one reads it.
    cells, means, num_cells = jax.lax.optimization_barrier((cells, means, num_cells))
    weights, ways, hashes = jax.lax.optimization_barrier(_corners_of(means, num_cells, block))
    active = jnp.broadcast_to(active, weights.shape)
    vertices = jax.lax.optimization_barrier(distinct_keys(hashes, active, num_cells, block, capacity))
    neighbours = jax.lax.optimization_barrier(_neighbours_of(vertices, capacity))
    longest = _LONGEST_PATH_OF_SMALL if num_pixels <= _SMALL else _LONGEST_PATH
    self_weights = _self_weights(weights, vertices.ids, ways, neighbours, num_cells, block, longest)
    order = varying_like(jnp.arange(len(weights), dtype=jnp.int32), features)
    # What float32 cannot place in a simplex is no lattice either. Written so that NaN is marked as well.
    within = jnp.max(jnp.abs(features)) * (features.shape[1] + 1) <= _SPREAD
    num_vertices = jnp.where(within, vertices.count, jnp.int32(2**30))
    return Lattice(cells, vertices.ids, weights, self_weights, neighbours, order, num_cells, num_vertices)
