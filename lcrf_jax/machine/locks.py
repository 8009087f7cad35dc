"""Files that one process holds while it lives.

A lock is an advisory lock of the operating system on an open file (flock). The system drops it when the process ends,
in whatever way. So a killed run leaves nothing behind that has to be cleaned up by hand.

Own code and not the library filelock: that does not say who holds a flock, ends with a bare OSError on a network file
system without locks (ENOLCK), and clears no folders.
"""

import contextlib
import errno
import fcntl
import logging
import math
import os
import pathlib
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from typing import IO, TextIO

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_TAKEN = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES}  # the last one on shares of Windows
MOST_TRIES = 300
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_BETWEEN_WORDS = 60.0

_log = logging.getLogger(__name__)
_told_of: set[int] = set()


class Locked(OSError):
    """Somebody else holds the lock; the message says who."""


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a file.

    Args:
      path: the file; made, with its folder, if it is not there. While the lock is held it says who holds it.
      wait: whether to wait, with a warning each minute, for the one who holds it; otherwise that is an error.

    Returns:
      Context manager; its value is False where the file system knows no locks and nothing is held, which a warning
      says.

    Raises:
      Locked: if another process holds the lock and `wait` is false.
      OSError: if the file cannot be made, or others remove it again and again; the message names it.
    """
    path = pathlib.Path(path)
    file, held = _acquired(path, wait)
    with file:
        if held:
            _sign(file)
        try:
            yield held
        finally:
            if held:
                with contextlib.suppress(OSError):  # a full disk
                    file.truncate(0)


def shared(path: str | os.PathLike) -> IO | None:
    """A file that is open and locked together with other readers: who wants it alone, to remove it, waits or leaves it.

    Args:
      path: the file.

    Returns:
      The open file, to be closed by the caller, which drops the lock; None if it is not there (any more). Where the
      file system knows no locks it is open all the same.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # no locks
        fcntl.flock(file, fcntl.LOCK_SH)
    if not _is_at(file, path):
        file.close()
        return None
    return file


@contextlib.contextmanager
def unused(path: str | os.PathLike) -> Iterator[bool | None]:
    """Whether nobody holds a file, by `locked` or `shared`; until the end of the block nobody else can.

    Args:
      path: the file; it is not made.

    Returns:
      Context manager. Its value is False if somebody holds the file, or if it is not there or may not be written, and
      None where the file system knows no locks, so that nobody can tell.
    """
    try:
        file = open(path, "r+b")  # noqa: SIM115 - closed below
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free: bool | None = _is_at(file, path)
        except OSError as error:
            free = None if error.errno in _UNSUPPORTED else False
        yield free


@contextlib.contextmanager
def own_folder(parent: str | os.PathLike, prefix: str) -> Iterator[pathlib.Path]:
    """A folder for unfinished files that no other process uses; it is removed at the end.

    Folders of processes that were killed are removed too. The lock of a folder lies beside it and is taken before the
    folder is made, so that at no moment it looks like one that was left.

    Args:
      parent: folder in which it is made; made if it is not there.
      prefix: beginning of its name; a dot in front hides it.

    Returns:
      Context manager whose value is the pathlib.Path.

    Raises:
      OSError: if the folder cannot be made.
    """
    parent = pathlib.Path(parent)
    parent.mkdir(parents=True, exist_ok=True)
    for lock in {*parent.glob(f"{lock_name(prefix)}*"), *map(_lock_of, parent.glob(f"{prefix}*"))}:
        _remove_if_left(lock)
    with contextlib.ExitStack() as stack:
        folder = _locked_name(parent, prefix, stack)
        stack.callback(_lock_of(folder).unlink, missing_ok=True)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        yield folder


def _locked_name(parent, prefix, stack):
    """A name that no other process has, locked; another process may just be looking whether it was left."""
    for _ in range(MOST_TRIES):
        folder = parent / f"{prefix}{secrets.token_hex(6)}"
        with contextlib.suppress(Locked):
            stack.enter_context(locked(_lock_of(folder)))
            return folder
    raise OSError(f"{parent}: {MOST_TRIES} names for a folder of unfinished files are all in use; choose another folder")


def _acquired(path, wait):
    """(open file, whether its lock is held); the file is the one that the path names, also after waiting."""
    problem = None
    for _ in range(MOST_TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - the caller closes it
        except (FileNotFoundError, FileExistsError) as error:  # another process may be removing the folder
            problem = error
            time.sleep(0.002)
            continue
        with contextlib.ExitStack() as stack:
            stack.enter_context(file)
            held = _acquire(file, path, wait)
            if not held or _is_at(file, path):  # else its holder has removed it, and nobody else can see this lock
                stack.pop_all()
                return file, held
    raise problem or OSError(
        f"{path}: other processes removed this file {MOST_TRIES} times while it was to be locked; look who clears that "
        "folder, or choose another one"
    )


def _acquire(file, path, wait):
    """Whether the lock is held now; False where there are no locks."""
    spoken = -math.inf
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                _tell_without_locks(file, path.parent)
                return False
            if error.errno not in _TAKEN:
                raise
            holder = _holder(file)
            if not wait:
                raise Locked(
                    f"{path.parent} is in use by {holder}: wait for its end or stop it, or choose another folder"
                ) from error
        if time.monotonic() - spoken > _SECONDS_BETWEEN_WORDS:
            _log.warning("waiting for %s, which is at work in %s", holder, path.parent)
            spoken = time.monotonic()
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _holder(file):
    try:
        file.seek(0)
        return file.read().strip() or "another process"
    except (OSError, ValueError):  # a share of Windows lets nobody read what is locked
        return "another process"


def _tell_without_locks(file, folder):
    """Say once of each file system that it has no locks."""
    device = os.fstat(file.fileno()).st_dev
    if device not in _told_of:
        _told_of.add(device)
        _log.warning("the file system of %s knows no locks: nothing keeps a second run out of a folder there", folder)


def _is_at(file: IO, path: str | os.PathLike) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


def _sign(file: TextIO) -> None:
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())  # a buffer would be tried again when it is closed


def lock_name(name: str) -> str:
    """The name of the lock that lies beside a folder of `own_folder`.

    Args:
      name: of the folder.

    Returns:
      str.
    """
    return f".lock-{name}"


def _lock_of(folder):
    return folder.with_name(lock_name(folder.name))


def _remove_if_left(lock):
    """Remove the folder of a process that is gone, and its lock."""
    folder, there = lock.with_name(lock.name.removeprefix(lock_name(""))), lock.exists()
    with contextlib.suppress(OSError), locked(lock) as held:  # Locked among them
        if held:
            shutil.rmtree(folder, ignore_errors=True)
        if held or not there:
            lock.unlink(missing_ok=True)
