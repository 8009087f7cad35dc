r"""What the cache on this machine holds, and removing what is not needed any more.

    python -m experiments.cache list
    python -m experiments.cache clean --older_than_days=30
    python -m experiments.cache clean --all --dry_run

The cache keeps what a second run would compute again: features, class maps, tag classifiers, compiled programs. It lies in
LCRF_JAX_CACHE, or lcrf_jax in the user's cache folder; `--directory` names another one. What a process uses is never removed.
LCRF_JAX_CACHE_GB=20 bounds the cache: what was not used for longest makes room before something new is written.
Weights that were fetched lie in the cache of the Hugging Face hub, which other programs share: they are listed, not removed.
"""

import os
import pathlib
import time

from absl import flags

from lcrf_jax.machine.cache import default_directory
from lcrf_jax.machine.entries import PROGRAMS, bound_in_bytes, entries, remove, size_text
from lcrf_jax.machine.files import at_home
from lcrf_jax.machine.progress import say

from . import reporting

_DIRECTORY = flags.DEFINE_string("directory", None, "Folder of the cache, where it is not the usual one.")
_OLDER = flags.DEFINE_float("older_than_days", None, "clean: what was last used before that.", lower_bound=0.0)
_ALL = flags.DEFINE_bool("all", False, "clean: everything that is not in use.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "clean: only tell what would be removed.")

DAY = 24 * 3600.0
COMMANDS = ("list", "clean")


def line(entry, now):
    """An entry in one line."""
    days = max(now - entry.used, 0.0) / DAY
    return f"{size_text(entry.size):>9}  {days:5.1f} days  {entry.kind:24}  {entry.about or '-'}  ({entry.path.name})"


def fetched_weights():
    """Pairs of folder and bytes of the weights in the cache of the Hugging Face hub."""
    home = pathlib.Path(os.environ.get("HF_HOME") or pathlib.Path.home() / ".cache" / "huggingface")
    hub = pathlib.Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    folders = sorted(hub.glob("models--*")) if hub.is_dir() else []
    return [(path, sum(file.stat().st_size for file in path.glob("blobs/*") if file.is_file())) for path in folders]


def show_all(directory):
    """Print every entry, the largest first, and the sum."""
    found, now = entries(directory), time.time()
    if found:
        say(f"{'size':>9}  {'last used':>10}  {'kind':24}  of")
    for entry in sorted(found, key=lambda entry: -entry.size):
        say(line(entry, now))
    bound = bound_in_bytes()
    limit = "no bound is set (LCRF_JAX_CACHE_GB)" if bound == float("inf") else f"LCRF_JAX_CACHE_GB is {bound / 1e9:g}"
    say(f"{directory}: {len(found)} entries, {size_text(sum(entry.size for entry in found))}; {limit}")
    for path, size in fetched_weights():
        say(f"weights that were fetched, kept by the hub and not removed here: {path}, {size_text(size)}")


def clean(directory):
    """Remove what the flags say, and tell what stays because it is in use."""
    now = time.time()
    if _ALL.value == (_OLDER.value is not None):
        raise ValueError("clean: give either --older_than_days=30, or another number, or --all")
    before = now if _ALL.value else now - _OLDER.value * DAY
    chosen = [entry for entry in entries(directory) if entry.used <= before or _ALL.value]
    gone, kept = [], []
    for entry in chosen:
        (gone if _DRY_RUN.value or remove(entry) else kept).append(entry)
    for entry in gone:
        say(("would remove  " if _DRY_RUN.value else "removed  ") + line(entry, now))
    for entry in kept:
        say("in use, stays  " + line(entry, now))
    if any(entry.kind == PROGRAMS for entry in gone):
        say("the next start compiles its programs again")
    verb = "would be freed" if _DRY_RUN.value else "freed"
    say(f"{directory}: {size_text(sum(entry.size for entry in gone))} {verb}, {len(kept)} entries in use stay")


def main(argv):
    """List or clean."""
    if len(argv) != 2 or argv[1] not in COMMANDS:
        raise ValueError(f"expected one of {' and '.join(COMMANDS)}, got {' '.join(argv[1:]) or 'nothing'}; see --help")
    of_clean = [f"--{flag.name}" for flag in (_OLDER, _ALL, _DRY_RUN) if flag.present]
    if argv[1] == "list" and of_clean:
        raise ValueError(f"list: {', '.join(of_clean)} would change nothing, list shows all; leave it out, or write clean --dry_run")
    directory = at_home(_DIRECTORY.value) if _DIRECTORY.value else default_directory()
    if not directory.is_dir():
        say(f"{directory}: there is no cache")
        return
    {"list": show_all, "clean": clean}[argv[1]](directory)


if __name__ == "__main__":
    reporting.run(main, keep_compiled=False)
