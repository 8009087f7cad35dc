"""Arrays kept on disk between runs, found again by what they were made from."""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lcrf_jax.machine.checksums import checksums, note_unchanged, refuse_changed
from lcrf_jax.machine.entries import IDENTITY_FILE, LOCK_FILE, discard, keep_within_bound
from lcrf_jax.machine.files import naming, parsed_json, write_whole
from lcrf_jax.machine.locks import locked, own_folder, shared

VARIABLE = "LCRF_JAX_CACHE"
REMEDY = (
    f"name another folder for the cache with the environment variable {VARIABLE} or config.cache.directory, make room with "
    "python -m experiments.cache clean, or train without a cache (config.cache.features=False)"
)
_PROGRESS_FILE = "progress.json"
_SECONDS_BETWEEN_NOTES = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_log = logging.getLogger(__name__)


class _Unfit(ValueError):
    """Rows that cannot be those of the arrays: nothing of them is kept."""


def default_directory() -> pathlib.Path:
    """The folder of the caches: $LCRF_JAX_CACHE, or lcrf_jax in the user's cache folder.

    Returns:
      pathlib.Path; it may not exist yet.

    Raises:
      OSError: if the user has no home and the variable is not set.
    """
    chosen = os.environ.get(VARIABLE)
    try:
        if chosen:
            return pathlib.Path(chosen).expanduser()
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "lcrf_jax"
    except RuntimeError as error:  # an account without a home, as in some containers
        raise OSError(
            f"the folder of the cache cannot be found ({error}): name one with the environment variable {VARIABLE}"
        ) from error


class CachedArrays:
    """Arrays of one identity while they are made, and when they are there; see `cached_arrays`.

    Attributes:
      num_records: length of the first axis of every array.
      first: rows that are there; those from here on are missing.
    """

    def __init__(
        self, folder: pathlib.Path, unfinished: pathlib.Path | None, num_records: int, arrays: dict[str, np.ndarray],
        make_room: Callable[[int], Any],
    ) -> None:  # fmt: skip
        self.num_records = num_records
        self._folder, self._unfinished, self._arrays, self._make_room = folder, unfinished, arrays, make_room
        self._open, self.first = ({}, num_records) if unfinished is None else _begun(unfinished, num_records)
        self._noted = time.monotonic()

    def write(self, **rows: np.ndarray) -> None:
        """The next rows of all arrays, by name.

        Raises:
          OSError: if the disk has no room; the message names the folder and the space needed.
          ValueError: if these are more rows than there are to be, or not the same arrays as before.
        """
        if not self._open:
            self._make_room(_num_bytes(self.num_records, rows))
            with naming(self._folder.parent, REMEDY):
                self._open = _new_arrays(self._unfinished, self._folder, self.num_records, rows)
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
        text = json.dumps({"rows": self.first, "arrays": sorted(self._open)})
        with naming(self._folder.parent, REMEDY):
            write_whole(self._unfinished / _PROGRESS_FILE, text)

    def flush(self) -> None:
        """Bring what was written to the disk."""
        for array in self._open.values():
            array.flush()

    def publish(self, identity: Mapping, about: str) -> None:
        """Make the arrays those of their identity, for this run and for all later ones.

        Args:
          identity: see `cached_arrays`.
          about: see `cached_arrays`.

        Raises:
          OSError: if the disk is full; the rows are kept.
        """
        assert self._unfinished is not None
        self.note()
        with naming(self._folder.parent, REMEDY):
            arrays = {
                name: {"shape": array.shape, "dtype": str(array.dtype), "crc32": checksums(_path(self._unfinished, name))}
                for name, array in self._open.items()
            }
        content = {"identity": identity, "about": about, "arrays": arrays}
        with naming(self._folder.parent, REMEDY):
            write_whole(self._unfinished / IDENTITY_FILE, json.dumps(content, sort_keys=True, indent=1))
            with shared(self._unfinished / IDENTITY_FILE) or contextlib.nullcontext():  # nobody may remove it from now on
                if _publish(self._unfinished, self._folder):
                    for name in self._open:
                        note_unchanged(_path(self._folder, name))
                self._arrays = _whole(self._folder, self.num_records) or {}
        for name in (_PROGRESS_FILE, LOCK_FILE):
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Name -> read-only memory-mapped array [num_records, ...], once all rows are there.

        While one of them is in use, `experiments.cache` and the bound on the cache leave them.
        """
        return dict(self._arrays)


@contextlib.contextmanager
def cached_arrays(
    directory: str | os.PathLike, identity: Mapping, num_records: int, *, about: str = "", bounded: bool = True
) -> Iterator[CachedArrays]:
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
      about: what the arrays are of, for the people who read the list of the cache; they do not depend on it.
      bounded: whether what was not used for longest makes room for them, see `lcrf_jax.machine.entries`; not in the folder
        of a run, which is no cache, and where arrays that are damaged are put aside and not removed.

    Returns:
      Context manager of a CachedArrays.

    Raises:
      OSError: if the disk is full or cannot be written; the message names the folder and the space needed.
      ValueError: if rows are missing at the end.
    """
    text = json.dumps(identity, sort_keys=True, indent=1)
    folder = pathlib.Path(directory) / hashlib.sha256(f"{num_records}\n{text}".encode()).hexdigest()[:24]
    with contextlib.ExitStack() as stack:
        with naming(directory, REMEDY):
            unfinished, arrays = _own_unfinished(folder, num_records, stack, discard if bounded else _put_aside)
        make_room = functools.partial(keep_within_bound, folder.parent) if bounded else _no_bound
        cache = CachedArrays(folder, unfinished, num_records, arrays, make_room)
        if unfinished is None:
            yield cache
            return
        try:
            yield cache
            if cache.first != num_records:
                raise _Unfit(f"expected {num_records} rows for the cache {folder}, got {cache.first}")
        except BaseException as error:
            _keep_beginning(cache, unfinished, isinstance(error, _Unfit))
            raise
        cache.publish(identity, about)


def _keep_beginning(cache, unfinished, unfit):
    """Note the rows that are there for the next run; where there are none that it could use, remove the folder."""
    with contextlib.suppress(OSError):  # the error that ended the block is told, not what came of it
        if unfit:
            (unfinished / _PROGRESS_FILE).unlink(missing_ok=True)
        else:
            cache.note()
    if not (unfinished / _PROGRESS_FILE).exists():
        shutil.rmtree(unfinished, ignore_errors=True)


def _own_unfinished(folder, num_records, stack, put_away):
    """(folder to write to, locked until the stack is closed; no arrays), or (None, arrays) where these are there."""
    arrays, _ = _whole_or_damage(folder, num_records)
    if arrays is not None:
        return None, arrays
    unfinished = folder.with_name(f".{folder.name}")
    with contextlib.ExitStack() as own:
        held = own.enter_context(locked(unfinished / LOCK_FILE, wait=True))
        arrays, damage = _whole_or_damage(folder, num_records)  # another run may have made them meanwhile
        if arrays is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
            return None, arrays
        if folder.exists():
            _log.warning("%s is damaged (%s); it is made anew", folder, damage or "a part of it was deleted")
            put_away(folder)
        if not held:
            unfinished = own.enter_context(own_folder(folder.parent, f".{folder.name}-"))
        stack.push(own.pop_all())
        return unfinished, {}


def _put_aside(folder):
    """Keep what is damaged in the folder of a run, which is no cache: it may be that it cannot be made anew."""
    os.rename(folder, folder.with_name(f"damaged-{folder.name}-{time.time_ns():x}"))


def _whole_or_damage(folder, num_records):
    """(the arrays of a finished folder or None, what is wrong with it or None)."""
    try:
        return _whole(folder, num_records), None
    except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, error


def _whole(folder, num_records):
    """Name -> read-only array of a finished folder, each with the lock that keeps it there; None where there is none."""
    identity_file = folder / IDENTITY_FILE
    file = shared(identity_file)
    if file is None:
        return None
    with file:
        content = parsed_json(file.read())
        names = content["arrays"] if "identity" in content else [path.stem for path in folder.glob("*.npy")]
        arrays = {name: _held(_path(folder, name), identity_file) for name in sorted(names)}
    if "identity" in content:
        for name, described in content["arrays"].items():
            if "crc32" in described:  # a version before this one wrote none
                refuse_changed(_path(folder, name), described["crc32"])
    if not arrays or {len(array) for array in arrays.values()} != {num_records}:
        raise ValueError(f"expected arrays of {num_records} rows, got { {name: len(a) for name, a in arrays.items()} }")
    with contextlib.suppress(OSError):  # of somebody else; what is removed first is what was not used for longest
        os.utime(identity_file)
    return arrays


def _held(path: pathlib.Path, identity_file: pathlib.Path) -> Any:
    """A read-only memory-mapped array; the lock goes when nobody uses it any more."""
    array, file = np.load(path, mmap_mode="r"), shared(identity_file)
    if file is not None:
        weakref.finalize(array, file.close)
    return array


def _begun(unfinished, num_records):
    """(arrays, number of rows) that an earlier run has written, as far as it noted them."""
    try:
        progress = parsed_json((unfinished / _PROGRESS_FILE).read_text(encoding="utf-8"))
        arrays = {name: np.load(_path(unfinished, name), mmap_mode="r+") for name in progress["arrays"]}
        if arrays and {len(array) for array in arrays.values()} == {num_records}:
            return arrays, int(progress["rows"])
    except (OSError, EOFError, ValueError, KeyError, TypeError):  # none, or a damaged one: from the start
        pass
    return {}, 0


def _new_arrays(unfinished, folder, num_records, batch):
    """Memory-mapped arrays of the names and types of a batch, their space reserved."""
    needed, free = _num_bytes(num_records, batch), shutil.disk_usage(unfinished).free
    if needed > 0.95 * free:
        raise _no_room(folder, needed, free)
    arrays = {}
    try:
        for name, rows in batch.items():
            path, shape = _path(unfinished, name), (num_records, *rows.shape[1:])
            arrays[name] = np.lib.format.open_memmap(path, "w+", rows.dtype, shape)
            _reserve(path)
    except OSError as error:
        if error.errno in _FULL:
            raise _no_room(folder, needed, free) from error
        raise
    return arrays


def _reserve(path):
    """Take the space of a file that is all zeros: a disk that fills up under a memory map would kill the process."""
    with open(path, "r+b") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:  # there is no such function, or not for this file system
            if getattr(error, "errno", None) in _FULL:
                raise
            start = min(size, 4096)  # the head stands there
            file.seek(start)
            file.writelines(bytes(min(1 << 20, size - at)) for at in range(start, size, 1 << 20))


def _path(folder, name):
    return folder / f"{name}.npy"


def _num_bytes(num_records, batch):
    return sum(num_records * math.prod(rows.shape[1:]) * rows.dtype.itemsize for rows in batch.values())


def _no_bound(needed):
    del needed


def _no_room(folder, needed, free):
    return OSError(
        f"the cache {folder.parent} needs {_size(needed)}, its disk has {_size(free)} left: {REMEDY}"
    )


def _size(num_bytes):
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.3g} MB"


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
    """Rename, unless another run was faster; its arrays are the same. Whether this one did."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / IDENTITY_FILE).is_file():
            raise
        return False
    return True
