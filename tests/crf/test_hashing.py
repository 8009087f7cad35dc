import jax
import numpy as np
import pytest

from lcrf_jax.crf.hashing import distinct_keys, fingerprint_multipliers, fingerprints, key_numbers, num_blocks

number = jax.jit(distinct_keys, static_argnums=(3, 4))


def random_keys(seed, rows=3, columns=40, spread=3):
    """[2, rows, columns] keys of two coordinates, many of them equal, and which of them count."""
    rng = np.random.default_rng(seed)
    return rng.integers(-spread, spread, (2, rows, columns)), rng.uniform(size=(rows, columns)) < 0.7


def hashes_of(keys):
    return fingerprints(jax.numpy.asarray(keys), fingerprint_multipliers(len(keys)))


@pytest.mark.parametrize("block", [40, 8])
@pytest.mark.parametrize("num_columns", [40, 17])
def test_equal_keys_have_equal_numbers_and_first_entries(block, num_columns):
    keys, active = random_keys(0)
    table = number(hashes_of(keys), active, num_columns, block, 64)
    counted = active & (np.arange(40) < num_columns)
    ids, entries = np.asarray(table.ids), np.asarray(table.entries)
    np.testing.assert_array_equal(ids[~counted], 64)
    members = {}
    for row, column in zip(*np.nonzero(counted), strict=True):
        members.setdefault(tuple(keys[:, row, column].tolist()), []).append((row, column))
    assert int(table.count) == len(members)
    assert len({int(ids[places[0]]) for places in members.values()}) == len(members)
    for places in members.values():
        numbers = {int(ids[place]) for place in places}
        assert len(numbers) == 1 and numbers.pop() < len(members)
        first = min((column // block, row * 40 + column) for row, column in places)[1]
        assert entries[ids[places[0]]] == first


def test_numbers_of_keys_that_are_sought():
    keys, active = random_keys(1)
    table = number(hashes_of(keys), active, 40, 8, 64)
    sought = np.stack(np.meshgrid(np.arange(-5, 5), np.arange(-5, 5)))
    found = np.asarray(jax.jit(key_numbers)(table, hashes_of(sought)))
    numbers = {tuple(keys[:, r, c].tolist()): int(table.ids[r, c]) for r, c in zip(*np.nonzero(active), strict=True)}
    for place in np.ndindex(10, 10):
        assert found[place] == numbers.get(tuple(sought[(slice(None), *place)].tolist()), 64)


def test_more_keys_than_the_capacity_are_counted():
    keys = np.stack(np.meshgrid(np.arange(50), np.arange(3)))
    for capacity in (149, 7):
        table = number(hashes_of(keys), np.ones((3, 50), bool), 50, 10, capacity)
        assert int(table.count) > capacity
        assert table.ids.max() == capacity
    table = number(hashes_of(keys), np.ones((3, 50), bool), 50, 10, 150)
    assert int(table.count) == 150 and table.ids.max() == 149


def test_hashes_are_linear():
    one, other = np.random.default_rng(2).integers(-1000, 1000, (2, 5, 7))
    for total, *parts in zip(hashes_of(one + other), hashes_of(one), hashes_of(other), strict=True):
        np.testing.assert_array_equal(total, parts[0] + parts[1])
    assert np.all(fingerprint_multipliers(5) % 2 == 1)


def test_num_blocks_rounds_up():
    assert [num_blocks(count, 4) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]
