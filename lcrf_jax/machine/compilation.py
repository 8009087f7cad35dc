"""Compiled programs kept between runs, in JAX's own compilation cache: the second start compiles nothing again.

JAX writes an entry in place and trusts every entry that it finds. A run that is killed while it writes, or a damaged
disk, can leave a broken one. Every later start would warn of it, or run it. So all entries are checked before JAX uses
the folder.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import platform
import warnings
import zlib

import jax

from lcrf_jax.machine.files import parsed_json, write_whole

SWITCH = "LCRF_JAX_COMPILE_CACHE"
MOST_BYTES = 1 << 30
LEAST_SECONDS = 0.05
_CHECKED_FILE = "checked.json"
_ENTRIES = "*-cache"

_log = logging.getLogger(__name__)


def keep_programs(directory: str | os.PathLike) -> pathlib.Path | None:
    """Keep the programs that JAX compiles from now on in this process, and use those that earlier runs have kept.

    This does nothing if the user has chosen a folder by JAX's own setting (JAX_COMPILATION_CACHE_DIR, or in Python), if
    LCRF_JAX_COMPILE_CACHE is 0, or if the folder cannot be written. The results are the same to the bit either way.

    Args:
      directory: folder of all caches, see `lcrf_jax.machine.cache.default_directory`. Each kind of processor
        has a folder of its own in it, since programs use the instructions of one kind.

    Returns:
      pathlib.Path of the folder in use, or None.

    Raises:
      ValueError: if LCRF_JAX_COMPILE_CACHE is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1"):
        raise ValueError(f"{SWITCH}: expected 0 (compiled programs are not kept) or 1, got {switch!r}")
    folder = pathlib.Path(directory) / "programs" / _processor()
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX makes its settings at run time
    if switch == "0" or chosen not in (None, "", str(folder)):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # an entry is code that will be run
        _drop_unfit(folder)
    except OSError as error:  # a cache is no reason to fail
        _log.warning("compiled programs are not kept (%s): name another folder with the environment variable LCRF_JAX_CACHE, "
                     "or set %s=0", error, SWITCH)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    # Of an entry that another run is just writing, or that the disk has no room for: it is compiled, and all is well.
    for verb in ("reading", "writing"):
        warnings.filterwarnings("ignore", f"Error {verb} persistent compilation cache entry")
    return folder


def _processor():
    """A name for the kind of this processor: XLA uses instructions that another kind may not have."""
    facts = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        facts += sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _drop_unfit(folder):
    """Delete entries that are cut off or have changed since they were first seen, then the oldest ones of too many."""
    before = _checked_before(folder)
    checked, sizes = {}, []
    for path in folder.glob(_ENTRIES):
        with contextlib.suppress(OSError):  # another run may have deleted it
            content, changed = path.read_bytes(), path.stat().st_mtime
            digest = hashlib.sha256(content).hexdigest()
            if before.get(path.name, digest) != digest or path.name not in before and not _is_whole(content):
                path.unlink()
                continue
            checked[path.name] = digest
            sizes.append((changed, len(content), path))
    excess = sum(size for _, size, _ in sizes) - MOST_BYTES
    for _, size, path in sorted(sizes):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        del checked[path.name]
        excess -= size
    if checked != before:
        with contextlib.suppress(OSError):  # runs that start together write it one over the other
            write_whole(folder / _CHECKED_FILE, json.dumps(checked))


def _checked_before(folder):
    """Name -> sha256 of the entries that were whole at an earlier start."""
    try:
        checked = parsed_json((folder / _CHECKED_FILE).read_text(encoding="utf-8"))
        return checked if isinstance(checked, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_whole(content):
    """Whether JAX could unpack an entry."""
    if content[:4] == b"\x28\xb5\x2f\xfd":  # by zstandard, where that is installed; JAX compiles what it cannot unpack
        return True
    try:
        return bool(zlib.decompress(content))
    except zlib.error:
        return False
