"""Damage on the disk, which is proven, and faults that pass: a network file system that does not answer, memory that is gone.

What is damaged may be moved away. What could not be read just now must stay where it is.
"""

import errno
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from lcrf_jax.runfolder.description import CheckpointError

_Answer = TypeVar("_Answer")

# What is missing, or has another type than it should have: no disk says so by mistake.
_PROVEN = {None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_PIECE = 1 << 22


class Damaged(CheckpointError):
    """What was saved is not there any more, or not as it was saved."""


def read_or_judged(read: Callable[[], _Answer], folder: pathlib.Path, advice: str) -> _Answer:
    """What a function reads from a folder; if that fails twice, whether the folder is damaged.

    Args:
      read: takes no arguments; may raise anything.
      folder: what it reads.
      advice: what to do about damage.

    Returns:
      What the function returned.

    Raises:
      Damaged: if the files can be read, byte by byte, and yet are not what the function expects.
      CheckpointError: if a passing fault is behind it, such as an error of the disk or too little memory.
    """
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - whatever orbax meets in damaged files, of any type
        _raise_if_passing(error, folder)
    try:
        return read()
    except Exception as error:
        _raise_if_passing(error, folder)
        raise Damaged(
            f"{folder} is damaged and cannot be read ({type(error).__name__}: {str(error)[:200]}); {advice}"
        ) from error


def _raise_if_passing(error, folder):
    """Raise a CheckpointError if an error says nothing of what is on the disk."""
    fault = next((cause for cause in _causes(error) if _is_passing(cause)), None) or _fault_of_reading(folder)
    if fault is not None:
        raise CheckpointError(
            f"{folder} could not be read just now ({type(fault).__name__}: {str(fault)[:200]}); it stays where it is and "
            "nothing was changed: look at the disk or the memory, and run the same command again"
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and the errors of a group."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                yield from _causes(part)
        error = error.__cause__ or error.__context__


def _is_passing(error):
    if isinstance(error, OSError):
        return error.errno not in _PROVEN
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "start new thread" in str(error)


def _fault_of_reading(folder):
    """What the disk answers when every file is read; None if that can be done, or a part is not there."""

    def told(error):
        raise error

    try:
        for place, _, files in os.walk(folder, onerror=told):
            for name in files:
                with open(os.path.join(place, name), "rb") as file:
                    while file.read(_PIECE):
                        pass
    except (OSError, MemoryError) as error:
        return error if _is_passing(error) else None
    return None
