"""Checksums of large files, piece by piece: what a disk or a memory has changed unasked is seen before it is used.

CRC-32 finds every change of a few bytes. It is no guard against somebody who means harm.
"""

import concurrent.futures
import functools
import os
import pathlib
import zlib

PIECE = 1 << 24
_NUM_THREADS = 4


def checksums(path: pathlib.Path) -> list[int]:
    """The CRC-32 of each piece of a file.

    Args:
      path: the file.

    Returns:
      List of a number for every `PIECE` bytes.

    Raises:
      OSError: if the file cannot be read.
    """
    starts = range(0, os.stat(path).st_size, PIECE)
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(functools.partial(_checksum, path), starts))


def refuse_changed(path: pathlib.Path, expected: list[int]) -> None:
    """Refuse a file that is not as it was written; it is read once in a process, and again where its times have changed.

    Args:
      path: the file.
      expected: see `checksums`.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if a piece has another checksum, or there are more or fewer; the message names the file.
    """
    facts = _facts(path)
    if facts in _seen():
        return
    found = checksums(path)
    if found != expected:
        raise ValueError(f"{path.name} does not match its checksums")
    _seen().add(facts)


def note_unchanged(path: pathlib.Path) -> None:
    """Note that a file is as this process has written it.

    Args:
      path: the file.

    Raises:
      OSError: if it is not there.
    """
    _seen().add(_facts(path))


@functools.cache
def _seen():
    """Files that this process has compared."""
    return set()


def _facts(path):
    found = os.stat(path)
    return os.path.realpath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _checksum(path, start):
    with open(path, "rb") as file:
        file.seek(start)
        return zlib.crc32(file.read(PIECE))
