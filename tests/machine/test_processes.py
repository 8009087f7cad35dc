"""Shares and sums over processes, as one process and as a pretended pair."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from lcrf_jax.machine import processes


@pytest.fixture
def pair(monkeypatch):
    """This process as the second of two, of which the other one has twice the counts."""
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda array: np.stack([other(array), array]))


def other(array):
    """What the other process has: twice the 64-bit counts, or one more of a number of 32 bits."""
    array = np.asarray(array)
    return (2 * array.view(np.int64)).view(np.uint32) if array.dtype == np.uint32 else array + 1


def test_one_process_does_everything_and_decides():
    assert processes.is_first() and list(processes.share(3)) == [0, 1, 2]
    counts = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(processes.total(counts), counts)
    assert processes.total(counts).dtype == np.int64 and processes.largest(7) == 7
    assert processes.first_decides(lambda: {"a": [1]}) == {"a": [1]}
    with pytest.raises(KeyError, match="own error"):
        processes.first_decides(lambda: {}["own error"])


def test_shares_of_a_pair(pair):
    assert list(processes.share(5)) == [1, 3] and not processes.is_first()


def test_counts_beyond_32_bits_are_added_exactly(pair):
    counts = np.array([[2**40 + 1, 3], [0, 2**33 - 1]])
    np.testing.assert_array_equal(processes.total(counts), 3 * counts)


def test_the_largest_of_a_pair(pair):
    assert processes.largest(0) == 1 and processes.largest(15) == 16


@pytest.mark.parametrize("asked", [
    lambda: processes.first_decides(lambda: 1), lambda: processes.largest(1), lambda: processes.total(np.ones(1)),
    lambda: processes.from_first(np.ones(1)),
], ids=["first_decides", "largest", "total", "from_first"])  # fmt: skip
@pytest.mark.parametrize("count", [1, 2])
def test_what_the_first_decides_alone_asks_nobody(asked, count, monkeypatch):
    """With several processes it would wait for ever; with one it is refused too, so that tests see it."""
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(processes, "_from_first", lambda answer: told.append(answer) or answer)
    with pytest.raises(processes.NestedDecision, match="was called within what the first process decides alone"):
        processes.first_decides(asked)
    assert [*map(sorted, told)] == ([] if count == 1 else [["error"]])  # the others are told
    assert processes.first_decides(lambda: 2) == 2
