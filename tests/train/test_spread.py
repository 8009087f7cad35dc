"""Rows over devices, and records read ahead in threads; nothing of a network."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcrf_jax.bound.record import Record
from lcrf_jax.train import spread


@functools.partial(jax.jit, static_argnames="power")
def scaled(weights, rows, others, *, power):
    return {"sum": rows["x"] @ weights + others[:, None], "shape": jnp.full(len(others), rows["x"].shape[0] * power)}


@pytest.mark.parametrize("num_rows, devices", [(1, 1), (3, 1), (4, 2), (8, 3), (12, 4), (99, 4)])
def test_each_device_has_batches_of_the_size_of_one(num_rows, devices):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(5, 2)).astype(np.float32)
    function, size = spread.over_devices(scaled, (weights,), num_rows, 3, power=2)
    assert size == 3 * devices
    rows, others = {"x": rng.normal(size=(size, 5)).astype(np.float32)}, np.arange(size, dtype=np.float32)
    found = function(rows, others)
    np.testing.assert_allclose(found["sum"], rows["x"] @ weights + others[:, None], rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(found["shape"]) == 6) and len(found["shape"].sharding.device_set) == devices


def test_a_second_source_compiles_nothing():
    first, _ = spread.over_devices(scaled, (np.ones((5, 2), np.float32),), 99, 3, power=3)
    rows = {"x": np.ones((12, 5), np.float32)}, np.ones(12, np.float32)
    first(*rows)
    before = spread._spread.cache_info().misses
    second, _ = spread.over_devices(scaled, (np.zeros((5, 2), np.float32),), 50, 3, power=3)
    assert np.all(np.asarray(second(*rows)["sum"]) == 1) and spread._spread.cache_info().misses == before


def test_rows_are_filled_up_with_the_last():
    filled = spread.padded_rows(({"a": np.arange(3)}, np.eye(3)), 5)
    np.testing.assert_array_equal(filled[0]["a"], [0, 1, 2, 2, 2])
    np.testing.assert_array_equal(filled[1][2:], np.eye(3)[[2, 2, 2]])
    np.testing.assert_array_equal(spread.padded_rows(np.arange(2), 2), [0, 1])


class Rows:
    """Records that note who has read them; one of them may be broken."""

    def __init__(self, length, broken=None):
        self.length, self.broken, self.read, self.threads = length, broken, [], set()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError(f"photograph {index} is gone")
        self.read.append(index)
        self.threads.add(threading.current_thread().name)
        return Record(tags=np.zeros(1, bool), index=np.int32(index))


@pytest.mark.parametrize("first", [0, 3, 7, 8])
def test_records_come_in_order_and_are_counted(first):
    rows, told = Rows(8), []
    batches = list(spread.batched(rows, 3, lambda count, **earlier: told.append((count, earlier)), first))
    found = [batch.index[:count].tolist() for count, batch in batches]
    assert [index for part in found for index in part] == list(range(first, 8)) == sorted(rows.read)
    assert all(len(batch.index) == 3 for _, batch in batches)
    if batches:
        assert batches[-1][1].index.tolist()[batches[-1][0] :] == [7] * (3 - batches[-1][0])
    earlier = [(first, {"earlier": True})] if 0 < first < 8 else []
    assert told == earlier + [(len(part), {}) for part in found]


def test_the_next_batch_is_read_by_other_threads_while_one_is_worked_on():
    rows = Rows(6)
    batches = spread.batched(rows, 3)
    next(batches)
    for _ in range(500):
        if len(rows.read) == 6:
            break
        threading.Event().wait(0.01)
    assert sorted(rows.read) == list(range(6))
    assert all(name.startswith("lcrf-read") for name in rows.threads)
    batches.close()


def test_a_photograph_that_cannot_be_read_comes_up_with_its_batch():
    told = []
    batches = spread.batched(Rows(9, broken=4), 3, told.append)
    assert next(batches)[0] == 3
    with pytest.raises(OSError, match="photograph 4 is gone"):
        next(batches)
    assert told == [3]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lcrf-read")]
