"""Arrays kept on disk between runs, found again by what they were made from."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping

import numpy as np

from lcrf_jax.machine.locks import locked, own_folder

_IDENTITY_FILE = "identity.json"
_PROGRESS_FILE = "progress.json"
_LOCK_FILE = "lock"
_SECONDS_BETWEEN_NOTES = 10.0


class _Unfit(ValueError):
    """Rows that cannot be those of the arrays: nothing of them is kept."""


def default_directory() -> pathlib.Path:
    """The folder of the caches: $LCRF_JAX_CACHE, or lcrf_jax in the user's cache folder.

    Returns:
      pathlib.Path; it may not exist yet.
    """
    chosen = os.environ.get("LCRF_JAX_CACHE")
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(chosen).expanduser() if chosen else home / "lcrf_jax"


class CachedArrays:
    """Arrays of one identity while they are made, and when they are there; see `cached_arrays`.

    Attributes:
      num_records: length of the first axis of every array.
      first: rows that are there; those from here on are missing.
    """

    def __init__(self, folder: pathlib.Path, unfinished: pathlib.Path | None, num_records: int) -> None:
        self.num_records = num_records
        self._folder, self._unfinished = folder, unfinished
        self._open, self.first = ({}, num_records) if unfinished is None else _begun(unfinished, num_records)
        self._noted = time.monotonic()

    def write(self, **rows: np.ndarray) -> None:
        """The next rows of all arrays, by name.

        Raises:
          OSError: if the disk has no room; the message names the folder and the space needed.
          ValueError: if these are more rows than there are to be, or not the same arrays as before.
        """
        self._open = self._open or _new_arrays(self._unfinished, self._folder, self.num_records, rows)
        count = _num_rows(rows, self._open)
        if self.first + count > self.num_records:
            raise _Unfit(f"expected {self.num_records} rows for the cache {self._folder}, got more")
        for name, values in rows.items():
            self._open[name][self.first : self.first + count] = values
        self.first += count
        if time.monotonic() - self._noted > _SECONDS_BETWEEN_NOTES:
            self.note()
            self._noted = time.monotonic()

    def note(self) -> None:
        """Note how many rows are there, once they are on the disk, for a run that goes on from here."""
        if self._unfinished is None or not self._open:
            return
        self.flush()
        new = self._unfinished / f"{_PROGRESS_FILE}.tmp"
        new.write_text(json.dumps({"rows": self.first, "arrays": sorted(self._open)}), encoding="utf-8")
        os.replace(new, self._unfinished / _PROGRESS_FILE)

    def flush(self) -> None:
        """Bring what was written to the disk."""
        for array in self._open.values():
            array.flush()

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> read-only memory-mapped array [num_records, ...], once all rows are there."""
        return {path.stem: np.load(path, mmap_mode="r") for path in sorted(self._folder.glob("*.npy"))}


@contextlib.contextmanager
def cached_arrays(directory: str | os.PathLike, identity: Mapping, num_records: int) -> Iterator[CachedArrays]:
    """The arrays of that identity, to be completed by the caller and read from then on::

        with cached_arrays(directory, identity, len(images)) as cache:
            for batch in batches_from(cache.first):
                cache.write(features=batch)
        cache.arrays["features"]

    They are written to a hidden folder that is renamed once all is there, so that nothing looks finished that is
    not. A run that was interrupted, or killed, goes on with the rows that are missing; of several runs that want the
    same arrays one makes them and the others wait for it at the beginning.

    Args:
      directory: folder of all caches; made if it is not there.
      identity: dict that JSON can hold: everything the arrays depend on (hash of the weights, images, size,
        ...).
      num_records: length of the first axis of every array.

    Returns:
      Context manager of a CachedArrays.

    Raises:
      OSError: if the disk is full or cannot be written; the message names the folder and the space needed.
      ValueError: if rows are missing at the end.
    """
    text = json.dumps(identity, sort_keys=True, indent=1)
    folder = pathlib.Path(directory) / hashlib.sha256(f"{num_records}\n{text}".encode()).hexdigest()[:24]
    with contextlib.ExitStack() as stack:
        unfinished = _own_unfinished(folder, stack)
        cache = CachedArrays(folder, unfinished, num_records)
        if unfinished is None:
            yield cache
            return
        try:
            yield cache
            if cache.first != num_records:
                raise _Unfit(f"expected {num_records} rows for the cache {folder}, got {cache.first}")
        except BaseException as error:
            if isinstance(error, _Unfit):
                (unfinished / _PROGRESS_FILE).unlink(missing_ok=True)
            else:
                cache.note()
            if not (unfinished / _PROGRESS_FILE).exists():  # nothing can be continued
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        cache.flush()
        (unfinished / _PROGRESS_FILE).unlink(missing_ok=True)
        (unfinished / _IDENTITY_FILE).write_text(text, encoding="utf-8")
        _publish(unfinished, folder)
        (folder / _LOCK_FILE).unlink(missing_ok=True)


def _own_unfinished(folder: pathlib.Path, stack: contextlib.ExitStack) -> pathlib.Path | None:
    """The folder to write to, locked until the stack is closed; None where the arrays are there."""
    while not _is_finished(folder):
        unfinished = folder.with_name(f".{folder.name}")
        try:
            held = stack.enter_context(locked(unfinished / _LOCK_FILE, wait=True))
        except FileNotFoundError:  # another run has renamed the folder just before its lock was opened
            continue
        if _is_finished(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            return unfinished if held else stack.enter_context(own_folder(folder.parent, f".{folder.name}-"))
    return None


def _is_finished(folder):
    return (folder / _IDENTITY_FILE).is_file()


def _begun(unfinished, num_records):
    """(arrays, number of rows) that an earlier run has written, as far as it noted them."""
    try:
        progress = json.loads((unfinished / _PROGRESS_FILE).read_text(encoding="utf-8"))
        arrays = {name: np.load(unfinished / f"{name}.npy", mmap_mode="r+") for name in progress["arrays"]}
        if arrays and {len(array) for array in arrays.values()} == {num_records}:
            return arrays, int(progress["rows"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # none, or a damaged one: from the start
        pass
    return {}, 0


def _new_arrays(unfinished, folder, num_records, batch):
    """Memory-mapped arrays of the names and types of a batch, their space reserved."""
    sizes = [num_records * math.prod(rows.shape[1:]) * rows.dtype.itemsize for rows in batch.values()]
    free = shutil.disk_usage(unfinished).free
    if sum(sizes) > 0.95 * free:
        raise _no_room(folder, sizes, free)
    arrays = {}
    for size, (name, rows) in zip(sizes, batch.items(), strict=True):
        path, shape = unfinished / f"{name}.npy", (num_records, *rows.shape[1:])
        arrays[name] = np.lib.format.open_memmap(path, "w+", rows.dtype, shape)
        try:
            # A disk that fills up under a memory map would kill the process.
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise _no_room(folder, sizes, free) from error
    return arrays


def _no_room(folder, sizes, free):
    return OSError(
        f"the cache {folder.parent} needs {sum(sizes) / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left: name another "
        "folder with the environment variable LCRF_JAX_CACHE, or train without a cache (config.cache.features=False)"
    )


def _num_rows(batch, arrays):
    """Rows of a batch that has the names, types and shapes of the first one."""
    counts = {len(rows) for rows in batch.values()}
    described = [
        {name: (rows.dtype, rows.shape[1:]) for name, rows in group.items()} for group in (arrays, batch)
    ]
    if len(counts) != 1 or described[0] != described[1]:
        shapes = {name: (str(rows.dtype), rows.shape) for name, rows in batch.items()}
        raise _Unfit(f"expected arrays of one length, like the first batch {described[0]}, got {shapes}")
    return counts.pop()


def _publish(unfinished, folder):
    """Rename, unless another run was faster; its arrays are the same."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / _IDENTITY_FILE).is_file():
            raise
