"""Files known by what they hold, wherever they lie and whenever they were touched.

Reading all photographs costs little beside a network that looks at them, but it is not done again where nothing has changed:
of much that was read a memo is kept with the caches.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Sequence

from lcrf_jax.machine.cache import default_directory
from lcrf_jax.machine.files import parsed_json, write_whole

MEMO = "contents.json"
WAS_THERE = "It was there when the data was looked at: bring it back, and run the same command again"
UNREADABLE = "unreadable"
WORTH_A_MEMO = 64_000_000  # bytes; less is read in a moment
MOST_FILES = 1_000_000
_SECONDS_OF_A_CLOCK = 3.0  # a file that was just written may change again without another time
_PIECE = 1 << 20


def content_digests(paths: Sequence[str | os.PathLike]) -> tuple[str, ...]:
    """The sha256 of each of many files.

    A file is not read again while its path, size, times and inode are those of the last time.

    Args:
      paths: the files.

    Returns:
      Tuple of 64 hexadecimal digits for each of them, in order; "unreadable" for a file that is there and cannot be read,
      which training may have been told to leave out.

    Raises:
      FileNotFoundError: if a file is not there.
    """
    facts = [_facts(path) for path in paths]
    known, large = _known(), sum(fact[1] for fact in facts) >= WORTH_A_MEMO
    if large:
        known |= {fact: digest for fact, digest in _memo().items() if fact not in known}
    missing = {fact: None for fact in facts if fact not in known}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        digests = dict(zip(missing, pool.map(_digest, missing)))
    settled = (time.time() - _SECONDS_OF_A_CLOCK) * 1e9
    known |= {
        fact: digest for fact, digest in digests.items()
        if digest != UNREADABLE and max(fact[2:4]) < settled and _facts(fact[0]) == fact
    }  # fmt: skip
    if large and digests:
        _keep_memo(known)
    return tuple(known.get(fact) or digests[fact] for fact in facts)


@functools.cache
def _known():
    """What this process knows: (path, size, times, inode) -> digest."""
    return {}


def _facts(path):
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist. {WAS_THERE}") from error
    return os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _digest(fact):
    digest = hashlib.sha256()
    try:
        with open(fact[0], "rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except OSError:
        return UNREADABLE
    return digest.hexdigest()


def _memo():
    """What earlier runs have noted; nothing where that cannot be read."""
    try:
        lines = parsed_json((default_directory() / MEMO).read_text(encoding="utf-8"))
        return {(str(path), *map(int, numbers)): str(digest) for path, *numbers, digest in lines}
    except (OSError, ValueError, TypeError):
        return {}


def _keep_memo(known):
    with contextlib.suppress(OSError):  # the files are read again, that is all
        folder = pathlib.Path(default_directory())
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / MEMO, json.dumps([[*fact, digest] for fact, digest in list(known.items())[-MOST_FILES:]]))
