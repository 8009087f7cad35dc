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
import os
import pathlib
import shutil
import socket
import tempfile
from collections.abc import Iterator

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_HOLDER_FILE = "lock"

_log = logging.getLogger(__name__)


class Locked(OSError):
    """Somebody else holds the lock; the message says who."""


@contextlib.contextmanager
def locked(path: str | os.PathLike, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a file.

    Args:
      path: the file; made, with its folder, if it is not there. While the lock is held it says who holds it.
      wait: whether to wait, with a warning, for the one who holds it; otherwise that is an error.

    Returns:
      Context manager; its value is False where the file system knows no locks and nothing is held.

    Raises:
      Locked: if another process holds the lock and `wait` is false.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        held = _acquire(file, path, wait)
        if held:
            _sign(file)
        try:
            yield held
        finally:
            if held:
                with contextlib.suppress(OSError):  # a full disk
                    file.truncate(0)


@contextlib.contextmanager
def own_folder(parent: str | os.PathLike, prefix: str) -> Iterator[pathlib.Path]:
    """A folder for unfinished files that no other process uses; it is removed at the end.

    Folders of processes that were killed are removed too.

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
    for left in parent.glob(f"{prefix}*"):
        _remove_if_left(left)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with locked(folder / _HOLDER_FILE):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _acquire(file, path, wait):
    """Whether the lock is held now; False where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        if not wait:
            raise Locked(
                f"{path.parent} is in use by {holder}: wait for its end or stop it, or choose another folder"
            ) from error
        _log.warning("waiting for %s, which is at work in %s", holder, path.parent)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _sign(file):
    with contextlib.suppress(OSError):  # a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def _remove_if_left(folder):
    """Remove the folder of a process that is gone."""
    with contextlib.suppress(OSError):  # Locked among them, and a folder that is just being removed
        if not (folder / _HOLDER_FILE).is_file():
            return  # just being made
        with locked(folder / _HOLDER_FILE) as held:
            if held:
                shutil.rmtree(folder, ignore_errors=True)
