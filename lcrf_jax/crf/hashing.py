"""Numbering distinct keys with a hash table, in static shapes and without sorting.

Keys are rows of integers. Two linear hashes of 32 bits each identify a key. As they are linear, the hashes of
neighbours in a lattice differ from those of the key itself by a constant. Entries claim slots of an open-addressing
table by a scatter-minimum, so that the same entries give the same table in any order.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.numerics import varying_like

_NUM_PROBES = 64
_EMPTY = np.int32(2**31 - 1)


def fingerprint_multipliers(num_coordinates: int) -> np.ndarray:
    """Multipliers of the two linear hashes; for nearly all pairs of keys one of the two differs.

    Args:
      num_coordinates: coordinates of a key, n.
    Returns:
      [2, n] odd uint32 NumPy array, always the same.
    """
    draws = np.random.default_rng(20100531).integers(0, 2**31, size=(2, num_coordinates), dtype=np.int64)
    return (2 * draws + 1).astype(np.uint32)


def fingerprints(keys: jax.Array, multipliers: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The two linear hashes of integer keys: the key a + b has the sum of the hashes of a and b.

    Args:
      keys: [n, ...] integers, coordinates first.
      multipliers: [2, n] of `fingerprint_multipliers`.
    Returns:
      Two arrays [...] uint32.
    """
    keys = keys.astype(jnp.uint32)
    first, second = (jnp.asarray(sum(keys[i] * row[i] for i in range(len(row)))) for row in multipliers)
    return first, second


def _slot(hashes, probe, table_bits):
    """Slot of the given probe: the high bits of a mix of both fingerprints, then steps of an odd width."""
    first, second = hashes
    start = (first ^ (second >> 15)) * np.uint32(2654435761) >> (32 - table_bits)
    step = second | np.uint32(1)
    return ((start + step * jnp.uint32(probe)) & np.uint32(2**table_bits - 1)).astype(jnp.int32)


class DistinctKeys(NamedTuple):
    """Distinct keys among [r, n] entries, numbered in the order of their first entries, as a hash table.

    Attributes:
      ids: [r, n] int32, the number of each entry's key; the capacity for entries that are inactive or do not fit.
      entries: [capacity] int32, the first entry of each key, row times n plus column.
      count: int32, number of distinct keys; more than the capacity if there was no room for all.
      hashes: two arrays [r, n] uint32, the fingerprints of the entries.
      owners: [slots] int32, the entry that holds each slot of the table.
      ids_of_slots: [slots] int32, the number of its key.
    """

    ids: jax.Array
    entries: jax.Array
    count: jax.Array  # type: ignore[assignment]  # it hides tuple.count, which has no use here
    hashes: tuple[jax.Array, jax.Array]
    owners: jax.Array
    ids_of_slots: jax.Array


def _claimed_slots(all_hashes, hashes, entries, wanted, owners):
    """Owners of the slots after the wanted entries, the slot of each one's key, and which of them have found none."""
    num_slots = len(owners)
    first, second = hashes

    def probe(state):
        owners, slots, unresolved, number = state
        candidates = _slot(hashes, number, num_slots.bit_length() - 1)
        claimed = jnp.where(unresolved & (owners[candidates] == _EMPTY), candidates, num_slots)
        owners = owners.at[claimed].min(entries, mode="drop")
        owner = jnp.where(unresolved, owners[candidates], 0)
        found = unresolved & (all_hashes[0][owner] == first) & (all_hashes[1][owner] == second)
        return owners, jnp.where(found, candidates, slots), unresolved & ~found, number + 1

    def unfinished(state):
        return jnp.any(state[2]) & (state[3] < _NUM_PROBES)

    slots, wanted = (varying_like(part, first) for part in (jnp.full_like(entries, num_slots), wanted))
    owners, slots, unresolved, _ = jax.lax.while_loop(unfinished, probe, (owners, slots, wanted, 0))
    return owners, slots, unresolved


def distinct_keys(
    hashes: tuple[jax.Array, jax.Array], active: jax.Array, num_columns: int | jax.Array, block: int, capacity: int
) -> DistinctKeys:
    """Number the distinct keys among the active entries of the first columns.

    Args:
      hashes: two arrays [r, n] uint32, the fingerprints of the entries.
      active: [r, n] booleans, which entries count.
      num_columns: how many columns count; may be traced, and the time is in proportion to it.
      block: static number of columns that are inserted at once; it has to divide n.
      capacity: static number of keys to provide for.
    Returns:
      DistinctKeys.
    """
    first, second = hashes
    rows, size = first.shape
    flat = first.ravel(), second.ravel()
    num_slots = 2 ** max(4, math.ceil(math.log2(2 * capacity)))
    entry_rows = np.arange(rows, dtype=np.int32)[:, None] * np.int32(size)

    def insert_block(i, state):
        ids, owners, ids_of_slots, entries, count = state

        def part(array):
            return jax.lax.dynamic_slice_in_dim(array, i * block, block, axis=1)

        columns = i * block + jnp.arange(block, dtype=jnp.int32)
        entry = entry_rows + columns
        keys = part(first), part(second)
        wanted = part(active) & (columns < num_columns)

        owners, slots, unresolved = _claimed_slots(flat, keys, entry, wanted, owners)
        owns_slot = wanted & (owners.at[slots].get(mode="fill", fill_value=_EMPTY) == entry)
        new = owns_slot | unresolved
        numbers = count + jnp.cumsum(new.ravel(), dtype=jnp.int32).reshape(new.shape) - 1
        numbers = jnp.minimum(numbers, capacity)
        ids_of_slots = ids_of_slots.at[jnp.where(owns_slot, slots, num_slots)].set(numbers, mode="drop")
        entries = entries.at[jnp.where(new, numbers, capacity)].set(entry, mode="drop")
        block_ids = ids_of_slots.at[slots].get(mode="fill", fill_value=capacity)
        # If the table is full, an entry without a slot gets its own number, so that `count` shows the overflow.
        block_ids = jnp.where(unresolved, numbers, block_ids)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, block_ids, i * block, axis=1)
        return ids, owners, ids_of_slots, entries, count + new.sum(dtype=jnp.int32)

    empty = (
        jnp.full((rows, size), capacity, jnp.int32),
        jnp.full(num_slots, _EMPTY),
        jnp.full(num_slots, capacity, jnp.int32),
        jnp.zeros(capacity, jnp.int32),
        jnp.int32(0),
    )
    state = tuple(varying_like(part, first) for part in empty)
    state = jax.lax.fori_loop(0, num_blocks(num_columns, block), insert_block, state)
    ids, owners, ids_of_slots, entries, count = state
    return DistinctKeys(ids, entries, count, hashes, owners, ids_of_slots)


def key_numbers(table: DistinctKeys, keys: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Numbers of keys in a table.

    Args:
      table: DistinctKeys.
      keys: two arrays [...] uint32, the fingerprints of the keys to look up.
    Returns:
      [...] int32 numbers; the capacity of the table for keys that are not in it.
    """
    capacity = len(table.entries)
    first, second = (part.ravel() for part in table.hashes)
    table_bits = int(math.log2(table.owners.size))

    def probe(state):
        ids, searching, number = state
        slots = _slot(keys, number, table_bits)
        owner = table.owners[slots]
        taken = owner != _EMPTY
        entry = jnp.where(taken, owner, 0)
        match = taken & (first[entry] == keys[0]) & (second[entry] == keys[1])
        found = jnp.where(searching & match, table.ids_of_slots[slots], ids)
        return found, searching & ~match & taken, number + 1

    def unfinished(state):
        return jnp.any(state[1]) & (state[2] < _NUM_PROBES)

    unknown = varying_like(jnp.full(keys[0].shape, capacity, jnp.int32), keys[0])
    start = (unknown, varying_like(jnp.ones(keys[0].shape, bool), keys[0]), 0)
    return jax.lax.while_loop(unfinished, probe, start)[0]


def num_blocks(count: int | jax.Array, block: int) -> int | jax.Array:
    """How many blocks of a size hold a number of things.

    Args:
      count: number of things, not negative; may be traced.
      block: size of a block.
    Returns:
      int, or a traced one.
    """
    above = count + block - 1
    return above // block if isinstance(above, int) else jax.lax.div(above, np.int32(block))
