"""What lies in the folder of the caches: each entry with its size and what it is of, and a bound on the whole.

An entry is removed in one rename, so that nothing looks whole that is not, and never while a process uses it: readers
hold a lock on its `identity.json`, the one that writes it a lock beside its arrays.
"""

import contextlib
import logging
import math
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from typing import NamedTuple

from lcrf_jax.machine.files import parsed_json
from lcrf_jax.machine.locks import lock_name, unused

IDENTITY_FILE = "identity.json"
LOCK_FILE = "lock"
PROGRAMS = "programs"
BOUND = "LCRF_JAX_CACHE_GB"
_PROCESSOR = re.compile(r"[0-9a-f]{16}")  # a digest of it
_NAME = re.compile(r"[0-9a-f]{24}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{24}(-\w+)?")
_REMOVED = ".removed-"
_ABANDONED_AFTER = 24 * 3600.0  # a folder whose lock nobody can see is somebody's for a day

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One thing that the cache holds.

    Attributes:
      path: its folder.
      kind: what it is: the kind of arrays, "unfinished" or "programs".
      about: what it is of, for people; "" where that is not known.
      size: bytes that it takes on the disk.
      used: when it was last used, seconds since the epoch.
    """

    path: pathlib.Path
    kind: str
    about: str
    size: int
    used: float


def entries(directory: str | os.PathLike) -> list[Entry]:
    """All that lies in the folder of the caches and was put there by this package.

    Args:
      directory: folder of all caches.

    Returns:
      List of Entry, the one that was used last first; empty where there is no folder.

    Raises:
      OSError: if the folder cannot be read.
    """
    try:
        paths = list(pathlib.Path(directory).iterdir())
    except FileNotFoundError:
        return []
    found = [entry for path in paths for entry in _entries_at(path)]
    return sorted(found, key=lambda entry: -entry.used)


def remove(entry: Entry) -> bool:
    """Remove an entry unless it is in use.

    Args:
      entry: of `entries`.

    Returns:
      Whether it is gone. Where the file system has no locks nobody can tell that it is in use, and only what was not
      used for a day is removed.

    Raises:
      OSError: if the folder cannot be written.
    """
    lock = _lock_of(entry)
    if lock is None:
        discard(entry.path)
        return True
    with unused(lock) as free:
        if not (free or free is None and time.time() - entry.used > _ABANDONED_AFTER):
            return not entry.path.exists()
        other = _renamed(entry.path)
    shutil.rmtree(other, ignore_errors=True)  # after the lock was closed: some file systems keep what is open
    return True


def discard(path: pathlib.Path) -> None:
    """Remove a folder of the cache: first under another name, so that nobody finds a part of it.

    Args:
      path: the folder.

    Raises:
      OSError: if it cannot be renamed.
    """
    shutil.rmtree(_renamed(path), ignore_errors=True)


def bound_in_bytes() -> float:
    """The most bytes that the cache may take, from $LCRF_JAX_CACHE_GB.

    Returns:
      Number of bytes; infinity where the variable is not set.

    Raises:
      ValueError: if it is no positive number.
    """
    text = os.environ.get(BOUND, "").strip()
    if not text:
        return math.inf
    try:
        bound = float(text)
    except ValueError:
        bound = -1.0
    if not bound > 0:
        raise ValueError(f"{BOUND}: expected the most gigabytes that the cache may take, such as 20, got {text!r}")
    return bound * 1e9


def keep_within_bound(directory: str | os.PathLike, needed: int = 0) -> list[Entry]:
    """Remove what was not used for the longest time until the cache and what is needed next stay within the bound.

    What is in use is left, with a warning if the cache is then too large.

    Args:
      directory: folder of all caches.
      needed: bytes that are about to be written.

    Returns:
      List of what was removed.

    Raises:
      ValueError: if $LCRF_JAX_CACHE_GB is no positive number.
    """
    bound = bound_in_bytes()
    if bound == math.inf:
        return []
    found, removed = entries(directory), []
    excess = sum(entry.size for entry in found) + needed - bound
    for entry in reversed(found):
        if excess <= 0:
            break
        if entry.kind == PROGRAMS:  # they have a bound of their own
            continue
        with contextlib.suppress(OSError):
            if remove(entry):
                removed.append(entry)
                excess -= entry.size
    if removed:
        _log.warning("removed %d entries (%s) of %s that were not used for longest: %s is %g", len(removed),
                     size_text(sum(entry.size for entry in removed)), directory, BOUND, bound / 1e9)
    if excess > 0:
        _log.warning("%s takes %s more than the %g GB of %s: the rest of it is in use", directory, size_text(excess),
                     bound / 1e9, BOUND)
    return removed


def total_line(directory: str | os.PathLike) -> str:
    """The size of the cache in one line, for the end of a run.

    Args:
      directory: folder of all caches.

    Returns:
      str.
    """
    try:
        found = entries(directory)
    except OSError as error:
        return f"cache       {directory} cannot be read ({error})"
    total = sum(entry.size for entry in found)
    return f"cache       {directory}: {size_text(total)}; python -m experiments.cache list tells what it holds"


def size_text(size: float) -> str:
    """A number of bytes for people.

    Args:
      size: bytes.

    Returns:
      str, such as "2.1 GB".
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"


def described(identity_file: pathlib.Path) -> tuple[str, str]:
    """What an entry says of itself.

    Args:
      identity_file: its `identity.json`.

    Returns:
      (kind, what it is of).
    """
    try:
        content = parsed_json(identity_file.read_text(encoding="utf-8"))
        identity = content.get("identity", content)
        return str(identity.get("kind", "arrays")), str(content.get("about", ""))
    except (OSError, ValueError, AttributeError):
        return "arrays", ""


def _entries_at(path):
    """The entries that a name in the folder of the caches stands for."""
    if path.name == PROGRAMS and path.is_dir():
        for folder in filter(_holds_programs, path.iterdir()):
            size, used = _size_and_time(folder.rglob("*"))
            yield Entry(folder, PROGRAMS, "compiled programs of one kind of processor", size, used)
    elif _NAME.fullmatch(path.name) and path.is_dir():
        size, _ = _size_and_time(path.iterdir())
        identity = path / IDENTITY_FILE
        kind, about = described(identity)
        yield Entry(path, kind, about, size, _time_of(identity))
    elif (_UNFINISHED.fullmatch(path.name) or path.name.startswith(_REMOVED)) and path.is_dir():
        yield Entry(path, "unfinished", "", *_size_and_time(path.iterdir()))


def _holds_programs(folder):
    """Whether a folder is of `lcrf_jax.machine.compilation`, and not a user's own that bears the name of its parent."""
    if folder.is_symlink() or not folder.is_dir() or not _PROCESSOR.fullmatch(folder.name):
        return False
    return all(path.is_file() for path in folder.iterdir())


def _size_and_time(paths: Iterable[pathlib.Path]) -> tuple[int, float]:
    """(bytes on the disk, newest time) of files, some of which may go meanwhile."""
    size, used = 0, 0.0
    with contextlib.suppress(OSError):
        for path in paths:
            with contextlib.suppress(OSError):
                facts = path.stat()
                size, used = size + facts.st_blocks * 512, max(used, facts.st_mtime)
    return size, used


def _time_of(path):
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _lock_of(entry):
    """The file that tells whether an entry is in use, or None: JAX reads whole files, what is missing it compiles."""
    if entry.kind == PROGRAMS or entry.path.name.startswith(_REMOVED):
        return None
    if _NAME.fullmatch(entry.path.name):
        return entry.path / IDENTITY_FILE
    within, beside = entry.path / LOCK_FILE, entry.path.with_name(lock_name(entry.path.name))
    return next((lock for lock in (within, beside) if lock.exists()), None)


def _renamed(path):
    """The path of a folder under a name that nobody looks for."""
    if path.name.startswith(_REMOVED):
        return path
    other = path.with_name(f"{_REMOVED}{secrets.token_hex(6)}")
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        os.rename(path, other)
    return other
