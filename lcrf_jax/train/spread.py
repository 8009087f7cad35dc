"""Rows of a whole source through a function of a batch, on all devices of this process, read ahead in threads.

Each device works on batches of the size that one device alone would have, by the same program. So the results do not depend
on the number of devices but for what the compiler makes of it.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lcrf_jax.bound.record import Record
from lcrf_jax.data.loader import stack_records

MOST_THREADS = 16


def no_progress(count: int, *, earlier: bool = False) -> None:
    """Says nothing of the images that are done.

    Args:
      count: images.
      earlier: whether an earlier run had done them.
    """
    del count, earlier


def over_devices(
    function: Callable[..., Any], fixed: tuple, num_rows: int, batch_size: int, **static: Any
) -> tuple[Callable[..., Any], int]:
    """A function of a batch, spread over the devices of this process.

    Args:
      function: jitted, of the fixed arguments, arrays of rows (or pytrees of them), and static keyword arguments; to
        arrays with the same rows.
      fixed: its first arguments, the same for all rows: weights.
      num_rows: rows there will be in all; no more devices are used than have a batch of their own.
      batch_size: rows that one device takes at once.
      **static: hashable arguments of the function.

    Returns:
      (function of the rows alone, rows that it takes at once).
    """
    count = min(jax.local_device_count(), -(-num_rows // batch_size))
    if count <= 1:
        return functools.partial(function, *jax.device_put(fixed), **static), batch_size
    mesh = Mesh(np.array(jax.local_devices()[:count]), ("rows",), axis_types=(AxisType.Auto,))
    placed, rows_of_each = jax.device_put(fixed, NamedSharding(mesh, P())), NamedSharding(mesh, P("rows"))
    compiled = _spread(function, mesh, tuple(sorted(static.items())))
    return lambda *rows: compiled(placed, jax.device_put(rows, rows_of_each)), count * batch_size


@functools.lru_cache(maxsize=64)
def _spread(function, mesh, static):
    """The compiled function of (fixed arguments, rows); kept, so that a second source compiles nothing."""

    def own_rows(fixed, rows):
        return function(*fixed, *rows, **dict(static))

    own_rows.__name__ = function.__name__  # in profiles
    specs = {"in_specs": (P(), P("rows")), "out_specs": P("rows")}
    return jax.jit(jax.shard_map(own_rows, mesh=mesh, check_vma=False, **specs))


def padded_rows(rows: Any, count: int) -> Any:
    """Rows with the last one repeated up to a number.

    Args:
      rows: pytree of arrays with the same number of rows, at least one and at most `count`.
      count: rows of the result.

    Returns:
      The pytree, of NumPy arrays.
    """

    def padded(array):
        array = np.asarray(array)
        return np.concatenate([array, np.repeat(array[-1:], count - len(array), axis=0)])

    return jax.tree.map(padded, rows)


def reading_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Threads that read photographs: one for each core of the machine, at most `MOST_THREADS`.

    Returns:
      The executor.
    """
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    return concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="lcrf-read")


class Records(Protocol):
    """Random access to records, from several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


def batched(
    records: Records, batch_size: int, progress: Callable[..., None] = no_progress, first: int = 0
) -> Iterator[tuple[int, Record]]:
    """Records in order, in batches of one size; while one is worked on, the next is read by several threads.

    Args:
      records: those of a source.
      batch_size: rows of a batch; the last one is padded with its last record.
      progress: called with the number of records after each batch was used.
      first: record to begin with; those before it are told to `progress` at once.

    Returns:
      Iterator over (number of true rows, Record of a batch). What reading a record raises, comes up with its batch.
    """
    if 0 < first < len(records):
        progress(first, earlier=True)
    pool = reading_threads()

    def reading(start):
        return [pool.submit(records.__getitem__, i) for i in range(start, min(start + batch_size, len(records)))]

    try:
        following = reading(first)
        for start in range(first, len(records), batch_size):
            rows = [row.result() for row in following]
            following = reading(start + batch_size)
            count = len(rows)
            yield count, stack_records(rows + rows[-1:] * (batch_size - count))
            progress(count)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
