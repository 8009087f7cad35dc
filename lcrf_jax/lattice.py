"""The permutohedral lattice: a fast approximate Gaussian filter for images too large for the exact one.

What depends on the image alone is built once, as a NamedTuple of arrays, and can be applied any number of
times.

The permutohedral lattice (Adams, Baek and Davis 2010) spreads every pixel over the d + 1 corners of the
simplex of a lattice in feature space that holds it (splat), convolves the lattice along d + 1 directions with
(1/2, 1, 1/2) (blur), and reads the result back with the same weights (slice). It approximates the Gaussian:
after row or symmetric normalisation to about 3 %, raw to some tens of per cent.

XLA needs static shapes, so the number of lattice vertices has a static capacity. Vertices beyond it are
dropped, with all the mass on them; `lattice_overflowed` tells, outside jit, whether that happened.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.numerics import check_number, check_shape, promote_float, varying_like

__all__ = [
    "Lattice",
    "apply_lattice",
    "build_lattice",
    "default_capacity",
    "lattice_diagonal",
    "lattice_overflowed",
]

_FLATTEN = "flatten the pixels to one axis, channels last"
_NUM_PROBES = 64
_BLUR_BLOCK = 4096
_EMPTY = np.int32(2**31 - 1)


class Lattice(NamedTuple):
    """A permutohedral lattice built for m pixels with d features and a capacity of c vertices.

    Attributes:
      vertices: [d + 1, m] int32, the vertex of each corner of each pixel's simplex; c for a dropped one.
      weights: [d + 1, m] barycentric weights of the corners, summing to 1 over them.
      neighbours: [d + 1, 2, c] int32, the vertices before and after each vertex in every direction; c for
        none.
      num_vertices: int32, vertices the features need; the lattice overflowed if it is larger than c.
    """

    vertices: jax.Array
    weights: jax.Array
    neighbours: jax.Array
    num_vertices: jax.Array


def default_capacity(num_pixels, num_features):
    """Vertices to provide for: one per pixel, but at least 65,536, and never more than can be needed.

    d + 1 vertices a pixel is the hard upper bound, reached only if no two pixels share a corner; below about
    11,000 pixels with five features it is provided for. Photographs of 320x240 pixels need .08 vertices a
    pixel at widths of 80 pixels and 13 colour units (.21 at most in a sample of 20), .47 at 80 and 5 (1.2 at
    most).

    Args:
      num_pixels: m.
      num_features: d.
    Returns:
      Number of vertices, a static int.
    Raises:
      ValueError: if a number is smaller than 1.
    References:
      None.
    """
    check_number("num_pixels", num_pixels, minimum=1, remedy="give the number of rows of the features")
    check_number("num_features", num_features, minimum=1, remedy="give the number of columns of the features")
    return min(num_pixels * (num_features + 1), max(num_pixels, 2**16))


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
    # the variance of the blur together with splat and slice.
    scale = np.array([math.sqrt(2 / 3) * corners / math.sqrt((i + 1) * (i + 2)) for i in range(num_features)])
    scaled = features.T * scale[:, None].astype(features.dtype)
    below = jnp.flip(jnp.cumsum(jnp.flip(scaled, 0), 0), 0)
    steps = jnp.arange(1, corners, dtype=features.dtype)[:, None]
    elevated = jnp.concatenate([below, jnp.zeros_like(below[:1])]).at[1:].add(-steps * scaled)

    origin = jnp.round(elevated / corners).astype(jnp.int32)
    excess = origin.sum(axis=0)
    remainder = elevated - corners * origin.astype(features.dtype)
    # The largest remainder has rank 0; of equal ones the first.
    earlier = np.tri(corners, k=-1, dtype=bool)[:, :, None]
    precedes = (remainder[None] > remainder[:, None]) | ((remainder[None] == remainder[:, None]) & earlier)
    rank = excess + precedes.sum(axis=1, dtype=jnp.int32)
    wrap = (rank < 0).astype(jnp.int32) - (rank >= corners)
    rank, origin = rank + corners * wrap, origin + wrap

    fraction = (elevated - corners * origin.astype(features.dtype)) / corners
    in_order = jnp.stack([jnp.sum(jnp.where(rank == r, fraction, 0), axis=0) for r in range(corners)])
    descending = jnp.flip(in_order, 0)
    weights = descending - jnp.concatenate([descending[-1:] - 1, descending[:-1]])
    return corners * origin, rank, weights


def _fingerprint_multipliers(num_coordinates):
    """Two rows of odd uint32 multipliers; a key's two linear hashes identify it."""
    draws = np.random.default_rng(20100531).integers(0, 2**31, size=(2, num_coordinates), dtype=np.int64)
    return (2 * draws + 1).astype(np.uint32)


def _fingerprints(keys, multipliers):
    """Two uint32 linear hashes of integer keys [d + 1, ...]."""
    keys = keys.astype(jnp.uint32)
    return tuple(sum(keys[i] * row[i] for i in range(len(row))) for row in multipliers)


class _Table(NamedTuple):
    """An open-addressing hash table: per slot the two fingerprints and the id of its vertex."""

    first: jax.Array
    second: jax.Array
    vertex: jax.Array


def _slot(fingerprints, probe, table_bits):
    """Slot of the given probe: the high bits of a mix of both fingerprints, then steps of an odd width."""
    first, second = fingerprints
    start = (first ^ (second >> 15)) * np.uint32(2654435761) >> (32 - table_bits)
    step = second | np.uint32(1)
    return ((start + step * jnp.uint32(probe)) & np.uint32(2**table_bits - 1)).astype(jnp.int32)


def _inserted(fingerprints, capacity):
    """Table of the distinct fingerprints, vertex id of each entry, the fingerprints by vertex, and their number."""
    first, second = fingerprints
    table_bits = max(4, math.ceil(math.log2(2 * capacity)))
    num_slots = 2**table_bits
    entries = jnp.arange(first.size, dtype=jnp.int32)

    def probe(state):
        owners, slots, unresolved, number = state
        candidates = _slot(fingerprints, number, table_bits)
        claimed = jnp.where(unresolved, candidates, num_slots)
        claims = jnp.full_like(owners, _EMPTY).at[claimed].min(entries, mode="drop")
        owners = jnp.where(owners == _EMPTY, claims, owners)
        owner = jnp.where(unresolved, owners[candidates], 0)
        found = unresolved & (first[owner] == first) & (second[owner] == second)
        return owners, jnp.where(found, candidates, slots), unresolved & ~found, number + 1

    def unfinished(state):
        return jnp.any(state[2]) & (state[3] < _NUM_PROBES)

    start = (jnp.full(num_slots, _EMPTY), jnp.full_like(entries, num_slots), jnp.ones_like(entries, bool))
    start = (*(varying_like(part, first) for part in start), 0)
    owners, slots, unresolved, _ = jax.lax.while_loop(unfinished, probe, start)

    used = owners != _EMPTY
    vertex_of_slot = jnp.where(used, jnp.cumsum(used, dtype=jnp.int32) - 1, capacity)
    # An entry that found no slot means a table more than full: count it, so that the overflow shows.
    num_vertices = used.sum(dtype=jnp.int32) + jnp.where(jnp.any(unresolved), np.int32(capacity + 1), 0)
    owner = jnp.where(used, owners, 0)
    table = _Table(first[owner], second[owner], jnp.minimum(vertex_of_slot, capacity))
    vertices = jnp.where(unresolved, capacity, table.vertex[jnp.minimum(slots, num_slots - 1)])
    owner_of_vertex = jnp.zeros(capacity, jnp.int32).at[table.vertex].set(owner, mode="drop")
    return table, vertices, (first[owner_of_vertex], second[owner_of_vertex]), num_vertices


def _looked_up(table, fingerprints, capacity):
    """Vertex ids of fingerprints, `capacity` where they are not in the table."""
    table_bits = int(math.log2(table.vertex.size))

    def probe(state):
        vertices, searching, number = state
        slots = _slot(fingerprints, number, table_bits)
        entry = table.vertex[slots]
        # An empty slot ends the search; so does a vertex dropped for lack of room, which has the same id.
        taken = entry < capacity
        match = taken & (table.first[slots] == fingerprints[0]) & (table.second[slots] == fingerprints[1])
        return jnp.where(searching & match, entry, vertices), searching & ~match & taken, number + 1

    def unfinished(state):
        return jnp.any(state[1]) & (state[2] < _NUM_PROBES)

    shape = fingerprints[0].shape
    start = (jnp.full(shape, capacity, jnp.int32), jnp.ones(shape, bool))
    start = (*(varying_like(part, fingerprints[0]) for part in start), 0)
    return jax.lax.while_loop(unfinished, probe, start)[0]


def build_lattice(features, capacity=None):
    """The permutohedral lattice of a set of features.

    Args:
      features: [m, d] features in units of their widths, finite.
      capacity: static number of vertices to provide for; None is `default_capacity(m, d)`. Cost and memory of
        the blur grow with it, not with the vertices used.
    Returns:
      A `Lattice`. Check `lattice_overflowed` on it, outside jit.
    Raises:
      ValueError: if `features` is not [m, d] or `capacity` is smaller than 1.
    References:
      Adams, Baek and Davis 2010, sections 3 and 4.
    """
    num_pixels, num_features = check_shape("features", features, ("m", "d"), _FLATTEN)
    capacity = default_capacity(num_pixels, num_features) if capacity is None else capacity
    check_number("capacity", capacity, minimum=1, remedy="None chooses one")
    features = promote_float(features)
    corners = num_features + 1
    # The barriers keep XLA on CPU from computing all this again in every probe of the table.
    origin, rank, weights = jax.lax.optimization_barrier(_enclosing_simplex(features))

    # Corner k lies at origin + k, less d + 1 in the coordinates of the k highest ranks.
    number = np.arange(corners)[:, None, None]
    keys = origin[None] + number - corners * (rank[None] > num_features - number)
    multipliers = _fingerprint_multipliers(corners)
    fingerprints = _fingerprints(jnp.moveaxis(keys, 1, 0).reshape(corners, -1), multipliers)
    fingerprints = jax.lax.optimization_barrier(fingerprints)
    table, vertices, of_vertex, num_vertices = jax.lax.optimization_barrier(_inserted(fingerprints, capacity))

    # The hashes are linear, so a neighbour's are the vertex's own plus a constant.
    steps = np.ones((corners, corners), np.int64) - corners * np.eye(corners, dtype=np.int64)
    offsets = (steps @ multipliers.astype(np.int64).T).astype(np.uint32)
    exists = jnp.arange(capacity) < num_vertices
    sought = jax.lax.optimization_barrier(tuple(h[None] + o[:, None] for h, o in zip(of_vertex, offsets.T)))
    after = _looked_up(table, sought, capacity)
    after = jnp.where(exists, after, capacity)
    direction = np.arange(corners)[:, None]
    before = jnp.full_like(after, capacity).at[direction, after].set(jnp.arange(capacity, dtype=jnp.int32), mode="drop")
    neighbours = jnp.stack([before, after], axis=1)
    return Lattice(vertices.reshape(corners, num_pixels), weights, neighbours, num_vertices)


def _mass_correction(num_features):
    """Integral of the Gaussian over that of the lattice's kernel with every vertex in place."""
    lattice_mass = 2.0 ** (num_features + 1) * 1.5 ** (num_features / 2) / math.sqrt(num_features + 1)
    return (2 * math.pi) ** (num_features / 2) / lattice_mass


def _splat(lattice, values):
    capacity = lattice.neighbours.shape[-1]

    def corner(k, table):
        return table.at[lattice.vertices[k]].add(lattice.weights[k][:, None] * values, mode="drop")

    table = varying_like(jnp.zeros((capacity, values.shape[1]), values.dtype), values)
    return jax.lax.fori_loop(0, len(lattice.vertices), corner, table)


def _blur(lattice, table, reverse=False):
    """The blur in all directions in turn, in blocks of vertices, as many as are in use."""
    capacity = lattice.neighbours.shape[-1]
    block = min(_BLUR_BLOCK, capacity)
    num_blocks = (jnp.minimum(lattice.num_vertices, capacity) + block - 1) // block
    source, target = table, varying_like(jnp.zeros_like(table), table)
    for neighbours in lattice.neighbours[::-1] if reverse else lattice.neighbours:

        def blurred(i, target, source=source, neighbours=neighbours):
            start = jnp.minimum(i * block, capacity - block)
            before, after = jax.lax.dynamic_slice(neighbours, (0, start), (2, block))
            sides = source.at[before].get(mode="fill", fill_value=0) + source.at[after].get(mode="fill", fill_value=0)
            rows = jax.lax.dynamic_slice_in_dim(source, start, block) + sides / 2
            return jax.lax.dynamic_update_slice_in_dim(target, rows, start, 0)

        source, target = jax.lax.fori_loop(0, num_blocks, blurred, target), source
    return source


def _slice(lattice, table):
    def corner(k, values):
        return values + lattice.weights[k][:, None] * table.at[lattice.vertices[k]].get(mode="fill", fill_value=0)

    values = jnp.zeros((lattice.vertices.shape[1], table.shape[1]), table.dtype)
    return jax.lax.fori_loop(0, len(lattice.vertices), corner, varying_like(values, table))


# A batch is filtered image by image: the number of blocks differs from image to image.
@jax.custom_batching.sequential_vmap
def _filtered_forwards(lattice, values):
    return _slice(lattice, _blur(lattice, _splat(lattice, values)))


@jax.custom_batching.sequential_vmap
def _filtered_backwards(lattice, values):
    return _slice(lattice, _blur(lattice, _splat(lattice, values), reverse=True))


@jax.custom_batching.sequential_vmap
def _filtered_both_ways(lattice, values):
    table = _splat(lattice, values)
    return _slice(lattice, (_blur(lattice, table) + _blur(lattice, table, reverse=True)) / 2)


def _linear_with_transpose(function, transpose):
    """A filter linear in its values, whose derivative in them is another filter; none in the lattice."""
    linear = jax.custom_vjp(function)
    linear.defvjp(
        lambda lattice, values: (function(lattice, values), lattice),
        lambda lattice, cotangent: (None, transpose(lattice, cotangent)),
    )
    return linear


_apply_forwards = _linear_with_transpose(_filtered_forwards, _filtered_backwards)
_apply_both_ways = _linear_with_transpose(_filtered_both_ways, _filtered_both_ways)


def apply_lattice(lattice, values, *, symmetric=False):
    r"""The Gaussian-weighted sum over all pixels, approximately.

    .. math:: v'_i \approx \sum_j \exp(-|f_i - f_j|^2 / 2)\, v_j

    The self-pair j = i is part of the sum (`lattice_diagonal` says with which weight). Not normalised: filter
    ones to get row sums. The constant that the blur lacks is set by the integral of the Gaussian, which is
    right where features fill their space and too small where they are sparse; after normalisation it cancels.

    Args:
      lattice: a `Lattice` for m pixels.
      values: [m, K] values to filter.
      symmetric: whether to average the blur over the directions forwards and backwards. One order alone gives
        a kernel that differs from its transpose by a few per cent; the average is symmetric, for a second
        blur's time.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if `values` is not [m, K].
    References:
      Adams, Baek and Davis 2010, section 3.
    """
    corners, num_pixels = lattice.vertices.shape
    check_shape("values", values, (num_pixels, "K"), _FLATTEN)
    filtered = _apply_both_ways if symmetric else _apply_forwards
    return _mass_correction(corners - 1) * filtered(lattice, promote_float(values))


def lattice_diagonal(lattice):
    r"""The weight of each pixel's own value in `apply_lattice`.

    Corners k and l of a simplex are |k - l| steps apart in different directions, and d + 1 steps in all
    directions lead back: the blur connects them with 2^-|k-l| + 2^-(d+1-|k-l|). Paths over missing vertices
    are counted as well, so this is an upper bound, in practice within a few per cent.

    Args:
      lattice: a `Lattice` for m pixels.
    Returns:
      [m] weights, all positive.
    Raises:
      None.
    References:
      Adams, Baek and Davis 2010, section 3.
    """
    corners = len(lattice.weights)
    steps = np.abs(np.subtract.outer(np.arange(corners), np.arange(corners)))
    connection = 2.0**-steps + np.where(steps == 0, 2.0**-corners, 0) + 2.0 ** (steps - corners)
    weights = jnp.where(lattice.vertices < lattice.neighbours.shape[-1], lattice.weights, 0)
    return _mass_correction(corners - 1) * jnp.einsum("km,kl,lm->m", weights, connection.astype(weights.dtype), weights)
