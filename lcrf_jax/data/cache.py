"""Arrays kept on disk between runs, found again by what they were made from."""

import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping

import numpy as np

_IDENTITY_FILE = "identity.json"


def default_directory():
    """The folder of the caches: $LCRF_JAX_CACHE, or lcrf_jax in the user's cache folder.

    Returns:
      pathlib.Path; it may not exist yet.
    """
    chosen = os.environ.get("LCRF_JAX_CACHE")
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return pathlib.Path(chosen).expanduser() if chosen else home / "lcrf_jax"


def cached_arrays(
    directory: str | os.PathLike,
    identity: Mapping,
    num_records: int,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
) -> dict[str, np.ndarray]:
    """The arrays of that identity, read from disk or made and written there.

    They are written to a folder of another name that is renamed once all is there, so that an interrupted run
    leaves nothing that looks finished, and two runs may fill the same cache.

    Args:
      directory: folder of all caches; made if it is not there.
      identity: dict that JSON can hold: everything the arrays depend on (hash of the weights, images, size,
        ...).
      num_records: length of the first axis of every array.
      batches: called without arguments if the arrays are not there; yields dicts of arrays, `num_records`
        rows in all.

    Returns:
      dict from name to a read-only memory-mapped array [num_records, ...].

    Raises:
      OSError: if the disk is full or cannot be written; the message names the folder and the space needed.
      ValueError: if `batches` does not yield `num_records` rows, or not the same arrays every time.
    """
    text = json.dumps(identity, sort_keys=True, indent=1)
    folder = pathlib.Path(directory) / hashlib.sha256(f"{num_records}\n{text}".encode()).hexdigest()[:24]
    if not (folder / _IDENTITY_FILE).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(unfinished, num_records, batches())
            (unfinished / _IDENTITY_FILE).write_text(text, encoding="utf-8")
            _publish(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


def _write(folder, num_records, batches):
    """One .npy file per array, filled batch by batch."""
    arrays, row = {}, 0
    for batch in batches:
        if not arrays:
            _check_space(folder, num_records, batch)
            for name, rows in batch.items():
                shape = (num_records, *rows.shape[1:])
                arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", rows.dtype, shape)
        count = _num_rows(batch, arrays)
        if row + count > num_records:
            raise ValueError(f"expected {num_records} rows for the cache {folder}, got more")
        for name, rows in batch.items():
            arrays[name][row : row + count] = rows
        row += count
    if row != num_records:
        raise ValueError(f"expected {num_records} rows for the cache {folder}, got {row}")
    for array in arrays.values():
        array.flush()


def _num_rows(batch, arrays):
    """Rows of a batch that has the names, types and shapes of the first one."""
    counts = {len(rows) for rows in batch.values()}
    described = [
        {name: (rows.dtype, rows.shape[1:]) for name, rows in group.items()} for group in (arrays, batch)
    ]
    if len(counts) != 1 or described[0] != described[1]:
        shapes = {name: (str(rows.dtype), rows.shape) for name, rows in batch.items()}
        raise ValueError(f"expected arrays of one length, like the first batch {described[0]}, got {shapes}")
    return counts.pop()


def _check_space(folder, num_records, batch):
    """Refuse before writing what the disk cannot hold: a full disk under a memory map kills the process."""
    needed = sum(num_records * math.prod(rows.shape[1:]) * rows.dtype.itemsize for rows in batch.values())
    free = shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise OSError(
            f"the cache {folder.parent} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left: "
            "name another folder with the environment variable LCRF_JAX_CACHE, or train without a cache "
            "(config.features.cache=False)"
        )


def _publish(unfinished, folder):
    """Rename, unless another run was faster; its arrays are the same."""
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not (folder / _IDENTITY_FILE).is_file():
            raise
