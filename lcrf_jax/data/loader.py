"""From records to batches on the devices: order, threads, prefetch, exact resume.

The order of the records is a function of (seed, epoch, position), so an iterator's state is a position:
what comes after `set_state` is what would have come without the interruption.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from lcrf_jax.bound.record import Record

_FOR_EVER = 1 << 60


def make_loader(
    items: Sequence[Record],
    *,
    batch_size: int,
    seed: int = 0,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    num_threads: int = 2,
    num_views: int = 1,
) -> Loader:
    """Batches of records in a seeded order that is another one every epoch, with exact resume.

    ``items`` are ``num_views`` runs of n records; epoch e takes every record of run ``e % num_views``
    once. Epochs follow each other without a gap, so a batch may straddle two of them; every record
    carries its epoch. With several processes each makes its share of every batch: one after
    the other the shares are the batch of one process.

    Args:
      items: random access to records, such as a `ViewDataset`;
        read from several threads.
      batch_size: records in a batch, of all processes together; a multiple of their number.
      seed: of the order, 0 <= seed < 2**32.
      num_epochs: how often every record comes; None for ever.
      shuffle: whether the order is random; if not, records come in order.
      drop_remainder: whether an incomplete batch at the very end is left out.
      num_threads: threads that read records ahead; 0 reads in the caller's thread.
      num_views: number of runs in ``items``, a divisor of its length.
    Returns:
      An iterator over records with a leading batch axis, names as an array of str. It has
      `get_state` and `set_state`; a state is a small dict that JSON can hold, and is good for any number of
      processes.
    Raises:
      ValueError: if a number is out of its range, the items are fewer than a batch, or the runs do not
        divide.
    """
    import grain  # a third of a second, which programs that only score or predict do not need

    num_processes, process = jax.process_count(), jax.process_index()
    num_records = len(items) // max(num_views, 1)
    _check_loader(len(items), batch_size, num_epochs, drop_remainder, num_threads, num_views)

    def read(position: int, index: int) -> Record:
        epoch = position // num_records
        record = items[(epoch % num_views) * num_records + index]
        return record._replace(epoch=np.int32(epoch))

    order = grain.MapDataset.range(num_records).seed(seed)
    order = order.shuffle() if shuffle else order
    # The position counts on over epochs, so that map_with_index can tell the epoch.
    order = order.repeat(num_epochs).map_with_index(read)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * max(num_threads, 1))

    size, num_positions = batch_size // num_processes, _FOR_EVER
    if num_epochs is not None:
        num_batches, rest = divmod(num_records * num_epochs, batch_size)
        num_positions = num_batches * size + min(max(rest - process * size, 0), size)

    def own(position: int) -> Record:
        batch, row = divmod(position, size)
        return order[batch * batch_size + process * size + row]

    def batches_from(first: int) -> Iterator[Record]:
        positions = grain.MapDataset.range(min(first * size, num_positions), num_positions)
        records = positions.map(own).to_iter_dataset(options)
        return iter(records.batch(size, drop_remainder=drop_remainder, batch_fn=stack_records))

    return Loader(batches_from)


def _check_loader(
    num_items: int, batch_size: int, num_epochs: int | None, drop_remainder: bool, num_threads: int, num_views: int
) -> None:
    num_processes = jax.process_count()
    num_records, rest = divmod(num_items, max(num_views, 1))
    if num_views < 1 or rest or not num_records:
        raise ValueError(
            f"{num_items} items cannot be {num_views} runs of equal length (at least one item each)"
        )
    if batch_size < 1 or batch_size % num_processes:
        raise ValueError(
            f"batch_size must be a positive multiple of the {num_processes} process(es), got {batch_size}"
        )
    if num_threads < 0:
        raise ValueError(f"num_threads must be 0 or more, got {num_threads}")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None for ever, got {num_epochs}")
    if drop_remainder and num_epochs is not None and num_records * num_epochs < batch_size:
        raise ValueError(
            f"{num_records} records in {num_epochs} epoch(s) do not fill one batch of {batch_size}: "
            "lower batch_size, or use drop_remainder=False"
        )


class Loader:
    """Batches whose state is the number of batches before the next one, of all processes together.

    Args:
      batches_from: function from that number to an iterator over the batches from there on.
    """

    def __init__(self, batches_from: Callable[[int], Iterator[Record]]) -> None:
        self._batches_from, self._done = batches_from, 0
        self._batches: Iterator[Record] | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Record:
        if self._batches is None:
            self._batches = self._batches_from(self._done)
        batch = next(self._batches)
        self._done += 1
        return batch

    def get_state(self) -> Any:
        """How many batches were handed out."""
        return {"batches": self._done}

    def set_state(self, state: Any) -> None:
        """Goes on from a state of `get_state`."""
        if not isinstance(state, Mapping) or set(state) != {"batches"}:
            raise ValueError(f"expected the state of a loader, {{'batches': NUMBER}}, got {state!r}")
        self._batches, self._done = None, int(state["batches"])


def stack_records(records: Sequence[Record]) -> Record:
    """One record with a leading batch axis on every array.

    Args:
      records: records with the same fields, and arrays of the same shape in each.
    Returns:
      A Record; names become an array of str.
    Raises:
      ValueError: if fields or shapes differ; the message names the field and the records.
    """
    if len({jax.tree.structure(record) for record in records}) > 1:
        missing = [name for name, *values in zip(Record._fields, *records) if len({jax.tree.structure(v) for v in values}) > 1]
        raise ValueError(f"the records of a batch must have the same fields; {missing} are missing in some")

    def stacked(path: Any, *values: Any) -> np.ndarray:
        arrays = [np.asarray(value) for value in values]
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            names = [str(record.name) for record in records[:4]]
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='.')!r} has the shapes {shapes} within one batch "
                f"(records {', '.join(names)}, ...); bring them to one size first"
            )
        return np.stack(arrays)

    return jax.tree_util.tree_map_with_path(stacked, *records)


class Batches(Protocol):
    """An iterator over batches that knows how far it is, such as a `Loader`."""

    def __next__(self) -> Record: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


class DevicePrefetch:
    """An iterator whose batches are on the devices ahead of time; names stay on the host.

    Args:
      iterator: gives records of host arrays, each process its share of the batch.
      sharding: how the batch axis is spread over the devices.
      depth: batches that are under way, at least 1.
    Raises:
      ValueError: if depth is below 1; on iteration, if a batch does not divide by the number of devices.
    """

    def __init__(self, iterator: Batches, sharding: jax.sharding.Sharding, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self._iterator, self._sharding, self._depth = iterator, sharding, depth
        self._ahead: collections.deque = collections.deque()
        self._state = iterator.get_state() if hasattr(iterator, "get_state") else None

    def __iter__(self) -> DevicePrefetch:
        return self

    def __next__(self) -> Record:
        while len(self._ahead) < self._depth:
            try:
                batch = to_devices(next(self._iterator), self._sharding)
            except StopIteration:
                break
            state = self._iterator.get_state() if self._state is not None else None
            self._ahead.append((batch, state))
        if not self._ahead:
            raise StopIteration
        batch, self._state = self._ahead.popleft()
        return batch

    def get_state(self) -> Any:
        """The state after the last batch that was handed out; batches under way do not count."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Goes on from a state of `get_state`; batches under way are dropped."""
        self._ahead.clear()
        self._iterator.set_state(state)
        self._state = state


def device_prefetch(
    iterator: Batches, sharding: jax.sharding.Sharding, depth: int = 2
) -> DevicePrefetch:
    """Puts batches on the devices while the step before is still running.

    Args:
      iterator: gives records of host arrays, each process its share of the batch, such as `make_loader`.
      sharding: how the batch axis is spread over the devices, such as ``NamedSharding(mesh, P("data"))``.
      depth: batches that are under way, at least 1.
    Returns:
      An iterator with `get_state` and `set_state`; its state is that of the batches handed out.
    Raises:
      ValueError: if depth is below 1; on iteration, if a batch does not divide by the number of devices.
    """
    return DevicePrefetch(iterator, sharding, depth)


def to_devices(batch: Record, sharding: jax.sharding.Sharding) -> Record:
    """The batch with its arrays on the devices and its names on the host.

    Args:
      batch: Record with a leading batch axis, this process' share.
      sharding: how the batch axis is spread over the devices of all processes.
    Returns:
      A Record of global `jax.Array`.
    Raises:
      ValueError: if the batch does not divide by the number of devices.
    """

    def placed(path: Any, value: np.ndarray) -> jax.Array:
        size = value.shape[0] * jax.process_count()
        try:
            sharding.shard_shape((size, *value.shape[1:]))
        except ValueError as error:
            num_devices = len(sharding.device_set)
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"a batch of {size} ({name!r}) cannot be spread over {num_devices} devices: choose a batch "
                f"size that is a multiple of {num_devices}, and drop the remainder ({error})"
            ) from error
        return jax.make_array_from_process_local_data(sharding, value)

    return jax.tree_util.tree_map_with_path(placed, batch._replace(name=None))._replace(name=batch.name)
