"""Files that are written whole or not at all; what is read as JSON, and where a path leads."""

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator
from typing import Any

from lcrf_jax.machine.errors import UserError
from lcrf_jax.machine.locks import locked

NO_LINKS = {
    errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK, errno.EXDEV,
}  # fmt: skip
ROOM = "make room and run the same command again"
_REMEDIES = {
    errno.ENOSPC: ROOM, errno.EDQUOT: ROOM, errno.EFBIG: ROOM, errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written", errno.EPERM: "choose a folder that can be written",
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder is to be; give another path"),
    errno.ENAMETOOLONG: "give a shorter name", errno.EISDIR: "a folder stands where a file is to be; give another path",
}  # fmt: skip


def at_home(path: str | os.PathLike) -> pathlib.Path:
    """A path with the home folder in place of ~ or ~name.

    Args:
      path: as it was typed.

    Returns:
      pathlib.Path.

    Raises:
      FileNotFoundError: if there is no such user, or an account without a home.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        first = pathlib.Path(path).parts[0]
        raise FileNotFoundError(f"{path}: there is no home folder {first}; give the path without ~") from None


@contextlib.contextmanager
def naming(path: str | os.PathLike, remedy: str = "") -> Iterator[None]:
    """Errors of the disk within the block name the file and say what to do.

    Args:
      path: the file that is written or read.
      remedy: what to do; by default what helps against a full disk or a folder that cannot be written.

    Returns:
      Context manager.

    Raises:
      OSError: of the same number as the one in the block.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it has a text of its own
            raise
        told = remedy or _REMEDIES.get(error.errno, "look at that disk, and run the same command again")
        raise OSError(error.errno, f"{os.strerror(error.errno)}; {told}", str(path)) from error


def parsed_json(text: str | bytes, **options: Any) -> Any:
    """The content of a text in JSON; whatever is wrong with it is a ValueError that says so in a few words.

    Python has other errors for lists within lists without end, and advice for its own settings for very long numbers.

    Args:
      text: the text, or its bytes.
      **options: of `json.loads`.

    Returns:
      dict, list, str, number, bool or None.

    Raises:
      ValueError: if it is no JSON, or too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(text, **options)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError as error:
        raise ValueError("it has too many lists or objects within each other") from error
    except ValueError as error:
        raise ValueError("it has a number of thousands of digits") from error


def real_path(path: str | os.PathLike) -> pathlib.Path:
    """Where a path leads, without links and ~.

    Args:
      path: of a file or folder, which need not be there.

    Returns:
      pathlib.Path, absolute.

    Raises:
      UserError: if it is a link that leads back to itself; the message names it.
      FileNotFoundError: as `at_home`.
    """
    given = at_home(path)
    try:
        os.stat(given)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{given}: a link that leads back to itself; remove the link, or give another path") from error
    return pathlib.Path(os.path.realpath(given))


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a text file in one move: a file that is there is whole, also after the machine has lost its power.

    Args:
      path: pathlib.Path of the file.
      text: its content.

    Raises:
      OSError: if that fails; what was there before stays as it was, and the message names the file.
    """
    # Not the same name twice: two programs may write the file at once.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(path):
        try:
            with open(unfinished, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                _to_disk(file)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def move_whole(source: pathlib.Path, target: pathlib.Path) -> None:
    """Rename a file in one move, also to another disk.

    Args:
      source: the file, which is not there afterwards.
      target: its new path; a file that is there is replaced.

    Raises:
      OSError: if that fails.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = target.with_name(f".{secrets.token_hex(4)}.tmp")
        try:
            shutil.copyfile(source, beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
        source.unlink()


def write_once(path: pathlib.Path, text: str) -> bool:
    """Write a text file in one move unless it is there; of several processes one does.

    A hard link does it where there are such links, and a lock elsewhere (exFAT, shares of Windows).

    Args:
      path: pathlib.Path of the file.
      text: its content.

    Returns:
      Whether this call has written it.

    Raises:
      OSError: if that fails; the message names the file.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    with naming(path):
        try:
            write_whole(new, text)
            try:
                os.link(new, path)
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
            return _moved_once(new, path)
        finally:
            new.unlink(missing_ok=True)


def _moved_once(new, path):
    """Rename a file under a lock unless there is one of the other name."""
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, wait=True):
        try:
            if path.exists():
                return False
            os.replace(new, path)
            return True
        finally:
            lock.unlink(missing_ok=True)


def _to_disk(file):
    """Bring a file to the disk, where the file system can do that for a single file."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
