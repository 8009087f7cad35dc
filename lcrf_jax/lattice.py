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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.hashing import distinct_keys, fingerprint_multipliers, fingerprints, key_numbers, num_blocks
from lcrf_jax.numerics import check_number, check_shape, promote_float, varying_like

__all__ = [
    "Lattice",
    "apply_lattice",
    "blur_lattice",
    "build_lattice",
    "default_capacity",
    "lattice_diagonal",
    "lattice_overflowed",
    "reversed_lattice",
    "scaled_lattice",
    "slice_lattice",
    "splat_lattice",
]

_FLATTEN = "flatten the pixels to one axis, channels last"
_CELL_BLOCK = 8192
_VERTEX_BLOCK = 4096
# The lattice's kernel has heavier tails than the Gaussian of its variance. Made narrower by this factor it is closest
# to the Gaussian, on photographs and after normalisation: by a tenth of the error.
_NARROWING = 1.04
# Numbers of vertices, cells and blocks are never negative, and a program that need not ask is half as long.
_AS_THEY_ARE = {"allow_negative_indices": False}


class Lattice(NamedTuple):
    """A permutohedral lattice built for m pixels with d features and a capacity of c vertices.

    The pixels lie in cells, n of them at most: m, rounded up to whole blocks. The kernel it stands for,
    S^T B S with S the splat and B the blur, includes the self-pairs.

    Attributes:
      cells: [m] int32, the cell of each pixel, n for a pixel that does not count.
      vertices: [d + 1, n] int32, the vertex of each corner of each cell's simplex; c for a dropped one.
      weights: [d + 1, n] barycentric weights of the corners, summing to 1 over them until `scaled_lattice`.
      neighbours: [d + 1, 2, c] int32, the vertices before and after each vertex in every direction; c for
        none.
      order: [d + 1] int32, the directions in the order of the blur.
      num_cells: int32, cells in use.
      num_vertices: int32, vertices the features need; the lattice overflowed if it is larger than c.
    """

    cells: jax.Array
    vertices: jax.Array
    weights: jax.Array
    neighbours: jax.Array
    order: jax.Array
    num_cells: jax.Array
    num_vertices: jax.Array


def default_capacity(num_pixels, num_features, *, share=1.0):
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
    References:
      None.
    """
    check_number("num_pixels", num_pixels, minimum=1, remedy="give the number of rows of the features")
    check_number("num_features", num_features, minimum=1, remedy="give the number of columns of the features")
    check_number("share", share, minimum=0, strict=True, remedy="1 is enough for most photographs")
    return min(num_pixels * (num_features + 1), max(math.ceil(share * num_pixels), min(2 * num_pixels, 2**16), 2**14))


def lattice_overflowed(lattice):
    """Whether the features needed more vertices than the lattice has; call it outside jit.

    Args:
      lattice: a `Lattice`, with or without leading batch axes.
    Returns:
      A Python bool: True if mass was dropped, so that results cannot be trusted. Build again with
      `capacity=int(lattice.num_vertices)` or more.
    Raises:
      jax.errors.ConcretizationTypeError: under jit.
    References:
      None.
    """
    return bool(jnp.any(lattice.num_vertices > lattice.neighbours.shape[-1]))


def _enclosing_simplex(features):
    """Remainder-0 vertex [d + 1, m] int32, ranks [d + 1, m] and barycentric weights [d + 1, m] of each feature."""
    num_features = features.shape[1]
    corners = num_features + 1
    # Columns of the elevation, one above the other; a unit of feature space becomes sqrt(2/3) (d + 1) lattice units,
    # the variance of the blur together with splat and slice, or a little more.
    unit = _NARROWING * math.sqrt(2 / 3) * corners
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
    weights = descending - jnp.concatenate([descending[-1:] - 1, descending[:-1]])
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
    """Weights [d + 1, n] and two fingerprints [d + 1, n] of the corners of each cell's simplex."""
    size, num_features = features.shape
    corners = num_features + 1
    number = np.arange(corners, dtype=np.int32)[:, None, None]
    multipliers = fingerprint_multipliers(corners)

    def add_block(i, state):
        part = jax.lax.dynamic_slice_in_dim(features, i * block, block)
        origin, rank, weights = _enclosing_simplex(part)
        # Corner k lies at origin + k, less d + 1 in the coordinates of the k highest ranks.
        keys = origin[None] + number - corners * (rank[None] > num_features - number).astype(jnp.int32)
        parts = weights, *fingerprints(jnp.moveaxis(keys, 1, 0), multipliers)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(array, new, i * block, axis=1)
            for array, new in zip(state, parts, strict=True)
        )

    state = (
        jnp.zeros((corners, size), features.dtype),
        jnp.zeros((corners, size), jnp.uint32),
        jnp.zeros((corners, size), jnp.uint32),
    )
    state = tuple(varying_like(part, features) for part in state)
    weights, *hashes = jax.lax.fori_loop(0, num_blocks(num_cells, block), add_block, state)
    return weights, tuple(hashes)


def _neighbours_of(vertices, capacity):
    """[d + 1, 2, capacity] the vertices before and after each."""
    corners = len(vertices.ids)
    block = min(_VERTEX_BLOCK, capacity)
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


def build_lattice(features, capacity=None, *, cell_sizes=None, valid=None):
    """The permutohedral lattice of a set of features.

    Args:
      features: [m, d] features in units of their widths, finite.
      capacity: static number of vertices to provide for; None is `default_capacity(m, d)`.
      cell_sizes: d sizes > 0 of a cell along each feature, in units of the widths, for a downsampled lattice;
        None makes every pixel a cell of its own.
      valid: [m] booleans; pixels that are false get and give nothing. None means that all count.
    Returns:
      A `Lattice`. Check `lattice_overflowed` on it, outside jit.
    Raises:
      ValueError: if `features` is not [m, d], `valid` or `cell_sizes` does not fit, or `capacity` is smaller
        than 1.
    References:
      Adams, Baek and Davis 2010, sections 3 and 4.
    """
    num_pixels, num_features = check_shape("features", features, ("m", "d"), _FLATTEN)
    capacity = default_capacity(num_pixels, num_features) if capacity is None else capacity
    check_number("capacity", capacity, minimum=1, remedy="None chooses one")
    features = promote_float(features)
    valid = jnp.ones(num_pixels, bool) if valid is None else jnp.asarray(valid, bool)
    check_shape("valid", valid, (num_pixels,), "give one boolean per pixel")
    if cell_sizes is not None:
        check_shape("cell_sizes", np.asarray(cell_sizes), (num_features,), "give one size per feature")
        cell_sizes = tuple(map(float, cell_sizes))
        for size in cell_sizes:
            check_number("cell_sizes", size, minimum=0, strict=True, remedy="a few tenths of a width are usual")

    # A batch is built image by image: the numbers of blocks differ from image to image.
    @jax.custom_batching.sequential_vmap
    def build(features, valid):
        return _built(features, valid, cell_sizes, capacity)

    return build(features, valid)


@functools.partial(jax.jit, static_argnames=("cell_sizes", "capacity"))
def _built(features, valid, cell_sizes, capacity):
    num_pixels = features.shape[0]
    block = min(_CELL_BLOCK, num_pixels)
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
    weights, hashes = jax.lax.optimization_barrier(_corners_of(means, num_cells, block))
    active = jnp.broadcast_to(active, weights.shape)
    vertices = jax.lax.optimization_barrier(distinct_keys(hashes, active, num_cells, block, capacity))
    neighbours = _neighbours_of(vertices, capacity)
    order = varying_like(jnp.arange(len(weights), dtype=jnp.int32), features)
    return Lattice(cells, vertices.ids, weights, neighbours, order, num_cells, vertices.count)


def _mass_correction(num_features):
    """Integral of the Gaussian over that of the lattice's kernel with every vertex in place."""
    lattice_mass = 2.0 ** (num_features + 1) * (1.5 / _NARROWING**2) ** (num_features / 2) / math.sqrt(num_features + 1)
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
    capacity, block = lattice.neighbours.shape[-1], min(_CELL_BLOCK, size)

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
    block = min(_VERTEX_BLOCK, capacity)
    last = num_blocks(jnp.minimum(lattice.num_vertices, capacity), block)
    source, target = table, varying_like(jnp.zeros_like(table), table)
    for direction in lattice.order:
        source, target = _blurred_along(direction, lattice.neighbours, source, target, last), source
    return source


@jax.jit
def _blurred_along(direction, neighbours, source, target, num_blocks_in_use):
    """The blur of the source in one direction, written over the target."""
    capacity = neighbours.shape[-1]
    block = min(_VERTEX_BLOCK, capacity)

    def blurred(i, target):
        start = jnp.minimum(i * block, capacity - block)
        before, after = jax.lax.dynamic_slice(neighbours, (direction, np.int32(0), start), (1, 2, block), **_AS_THEY_ARE)[0]
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
    return _filtered(reversed_lattice(lattice), values)


def _sliced_over(cells, lattice, table):
    """The slice by way of the cells, in an array that holds anything before."""
    corners, size = lattice.weights.shape
    block = min(_CELL_BLOCK, size)

    def read(i, values):
        vertices = jax.lax.dynamic_slice_in_dim(lattice.vertices, i * block, block, axis=1, **_AS_THEY_ARE)
        weights = jax.lax.dynamic_slice_in_dim(lattice.weights, i * block, block, axis=1, **_AS_THEY_ARE)
        rows = sum(weights[k][:, None] * _rows_of(table, vertices[k]) for k in range(corners))
        return jax.lax.dynamic_update_slice_in_dim(values, rows, i * block, 0, **_AS_THEY_ARE)

    cells = jax.lax.fori_loop(0, num_blocks(lattice.num_cells, block), read, cells)
    return _rows_of(cells, lattice.cells)


def _blurred_backwards(lattice, table):
    return _blurred(reversed_lattice(lattice), table)


def _blurred_both_ways(lattice, table):
    return (_blurred(lattice, table) + _blurred_backwards(lattice, table)) / 2


def _linear_in_values(function, transpose):
    """A map linear in its values, whose derivative in them is another map; it has none in the lattice."""
    # A batch is filtered image by image: the number of blocks differs from image to image.
    function = jax.custom_batching.sequential_vmap(function)
    transpose = jax.custom_batching.sequential_vmap(transpose)
    linear = jax.custom_vjp(function)
    linear.defvjp(
        lambda lattice, values: (function(lattice, values), lattice),
        lambda lattice, cotangent: (None, transpose(lattice, cotangent)),
    )
    return linear


_splat = _linear_in_values(_splatted, _sliced)
_slice = _linear_in_values(_sliced, _splatted)
_blur_forwards = _linear_in_values(_blurred, _blurred_backwards)
_filter = _linear_in_values(_filtered, _filtered_backwards)
_blur_both_ways = _linear_in_values(_blurred_both_ways, _blurred_both_ways)


def splat_lattice(lattice, values):
    r"""The splat S: what every vertex of the lattice gets of the pixels' values.

    Args:
      lattice: a `Lattice` for m pixels with c vertices.
      values: [m, K] values to filter.
    Returns:
      [c, K] values of the vertices, 0 for those not in use.
    Raises:
      ValueError: if `values` is not [m, K].
    References:
      Adams, Baek and Davis 2010, section 3.1.
    """
    check_shape("values", values, (*lattice.cells.shape, "K"), _FLATTEN)
    return _splat(lattice, promote_float(values))


def blur_lattice(lattice, table, *, symmetric=True):
    r"""The blur B: the Gaussian between vertices of the lattice, along its directions in turn.

    The constant that the blur lacks is set by the integral of the Gaussian, which is right where features fill
    their space and too small where they are sparse; after normalisation it cancels.

    Args:
      lattice: a `Lattice` with c vertices.
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
    check_shape("table", table, (lattice.neighbours.shape[-1], "K"), "give what splat_lattice returns")
    blur = _blur_both_ways if symmetric else _blur_forwards
    return _mass_correction(len(lattice.weights) - 1) * blur(lattice, promote_float(table))


def slice_lattice(lattice, table):
    r"""The slice S^T: the lattice read at every pixel, with the weights of the splat.

    Args:
      lattice: a `Lattice` for m pixels with c vertices.
      table: [c, K] values of the vertices.
    Returns:
      [m, K] values, 0 for pixels that do not count.
    Raises:
      ValueError: if `table` is not [c, K].
    References:
      Adams, Baek and Davis 2010, section 3.3.
    """
    check_shape("table", table, (lattice.neighbours.shape[-1], "K"), "give what blur_lattice returns")
    return _slice(lattice, promote_float(table))


def apply_lattice(lattice, values, *, symmetric=False):
    r"""The Gaussian-weighted sum over all pixels, approximately.

    .. math:: v'_i \approx \sum_j \exp(-|f_i - f_j|^2 / 2)\, v_j

    The self-pair j = i is part of the sum (`lattice_diagonal` says with which weight). Not normalised: filter
    ones to get row sums.

    Args:
      lattice: a `Lattice` for m pixels.
      values: [m, K] values to filter.
      symmetric: see `blur_lattice`.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if `values` is not [m, K].
    References:
      Adams, Baek and Davis 2010, section 3.
    """
    if symmetric:
        return slice_lattice(lattice, blur_lattice(lattice, splat_lattice(lattice, values)))
    check_shape("values", values, (*lattice.cells.shape, "K"), _FLATTEN)
    return _mass_correction(len(lattice.weights) - 1) * _filter(lattice, promote_float(values))


def reversed_lattice(lattice, backwards=True):
    """The lattice that is blurred in the reverse order of directions: without `symmetric`, the transposed kernel.

    One order alone is a few per cent off the other one. Who filters repeatedly, as mean field does, takes the
    two in turn, and most of that cancels without a second blur.

    Args:
      lattice: a `Lattice`.
      backwards: whether to reverse it at all; may be traced.
    Returns:
      A `Lattice`.
    Raises:
      None.
    References:
      None.
    """
    return lattice._replace(order=jnp.where(backwards, lattice.order[::-1], lattice.order))


def scaled_lattice(lattice, scale):
    r"""The lattice of the kernel with rows and columns scaled, diag(s) K diag(s).

    The scale is folded into the weights of the cells: filtering costs nothing more.

    Args:
      lattice: a `Lattice` for m pixels.
      scale: [m] factors s, the same for all pixels of a cell, as everything that the lattice returns is.
    Returns:
      A `Lattice`.
    Raises:
      ValueError: if `scale` is not [m].
    References:
      None.
    """
    check_shape("scale", scale, lattice.cells.shape, "give one factor per pixel")
    scale = promote_float(scale)
    of_cells = varying_like(jnp.zeros(lattice.weights.shape[1], scale.dtype), scale)
    return lattice._replace(weights=lattice.weights * of_cells.at[lattice.cells].set(scale, mode="drop"))


def lattice_diagonal(lattice):
    r"""The weight of each pixel's own value in `apply_lattice`.

    Corners k and l of a simplex are |k - l| steps apart in different directions, and d + 1 steps in all
    directions lead back: the blur connects them with 2^-|k-l| + 2^-(d+1-|k-l|). Paths over missing vertices
    are counted as well, so this is an upper bound, in practice within a few per cent.

    Args:
      lattice: a `Lattice` for m pixels.
    Returns:
      [m] weights, positive; 0 for pixels that do not count.
    Raises:
      None.
    References:
      Adams, Baek and Davis 2010, section 3.
    """
    corners = len(lattice.weights)
    steps = np.abs(np.subtract.outer(np.arange(corners), np.arange(corners)))
    connection = 2.0**-steps + np.where(steps == 0, 2.0**-corners, 0) + 2.0 ** (steps - corners)
    weights = jnp.where(lattice.vertices < lattice.neighbours.shape[-1], lattice.weights, 0)
    of_cells = jnp.einsum("kn,kl,ln->n", weights, connection.astype(weights.dtype), weights)
    return _mass_correction(corners - 1) * of_cells.at[lattice.cells].get(mode="fill", fill_value=0)
