"""Finds files: photographs and masks below a folder, a photograph by a name for it, and the nearest thing to what is missing.

Training, masks, prediction and check look through folders by `files_below`. Linked folders are followed, and each folder is
entered once, by its own path if it lies below the root. What systems put beside photographs is left out: names that begin
with a dot, and folders whose names begin with @ # or $, such as @eaDir, #recycle and $RECYCLE.BIN. What is no regular file
is not opened. `not_taken` tells of all that was found and not taken.
"""

from __future__ import annotations

import collections
import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lcrf_jax.data.files.images import ADVICE, extensions, is_photograph

_SYSTEM_FOLDERS = ("system volume information", "lost+found", "recycler", "recycled")
_SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_MOST_COMPARED = 2000
_SHOWN = 6


class Found(NamedTuple):
    """What lies below a folder.

    Attributes:
      files: paths of files within the root, with ``/`` between folders, in order; links that lead nowhere are among them.
      system_folders: folders of the system, which were not entered.
      left: folders that the caller asked to leave out.
      hidden: hidden files that look like photographs.
      special: pipes, sockets and devices.
      closed: folders that may not be read.
      like_files: folders with the names of photographs, such as x.png; they are entered like others.
    """

    files: tuple[str, ...]
    system_folders: tuple[str, ...]
    left: tuple[str, ...]
    hidden: tuple[str, ...]
    special: tuple[str, ...]
    closed: tuple[str, ...]
    like_files: tuple[str, ...]

    @property
    def photographs(self) -> list[str]:
        """The files that `is_photograph` takes by their extensions."""
        return [path for path in self.files if is_photograph(path)]


def files_below(root: str | os.PathLike, *, leave: Callable[[str], bool] = lambda folder: False) -> Found:
    """The files below a folder at any depth, hidden ones and those of the system left out.

    Args:
      root: the folder; it is entered whatever its name is.
      leave: whether to leave out a folder, given its real path.
    Returns:
      Found.
    """
    kept: dict[str, list[str]] = {name: [] for name in Found._fields}
    waiting, links, seen = [os.fspath(root)], collections.deque[str](), set()
    while waiting or links:  # links come last: a folder below the root goes by its own path
        folder = waiting.pop() if waiting else links.popleft()
        place = os.path.realpath(folder)
        if place in seen:
            continue
        seen.add(place)
        if leave(place):
            kept["left"].append(_within(root, folder))
            continue
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            kept["closed"].append(_within(root, folder))
            continue
        for entry in inside:
            kind = _kind(entry)
            if kind == "folder":
                (links if entry.is_symlink() else waiting).append(entry.path)
                if is_photograph(entry.name):
                    kept["like_files"].append(_within(root, entry.path))
            elif kind is not None:
                kept[kind].append(_within(root, entry.path))
    return Found(*(tuple(sorted(paths)) for paths in kept.values()))


def _within(root: str | os.PathLike, path: str) -> str:
    return path.removeprefix(os.path.join(os.fspath(root), "")).replace(os.sep, "/") if path != os.fspath(root) else "."


def _kind(entry: os.DirEntry) -> str | None:
    """Where an entry of a folder belongs, None for what nobody asks for."""
    name = entry.name.casefold()
    try:
        if entry.is_dir():
            return "system_folders" if is_system_folder(name) else "folder"
        regular = entry.is_file()
    except OSError:  # a link to itself
        regular = False
    if name.startswith((".", "~$")) or name in _SYSTEM_FILES:
        if name.endswith(".icloud"):  # a photograph that lies elsewhere
            return "files"
        return "hidden" if is_photograph(name) and not name.startswith("._") else None
    return "files" if regular or _leads_nowhere(entry) else "special"


def _leads_nowhere(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name holds things of a system and never photographs.

    Args:
      name: of the folder itself.
    Returns:
      True or False.
    """
    return name.casefold().startswith((".", "@", "#", "$", "__macosx")) or name.casefold() in _SYSTEM_FOLDERS


def not_taken(found: Found, *, own: Collection[str] = ()) -> str:
    """One line on the files that were found and not taken for photographs.

    Args:
      found: what was found.
      own: paths of files that serve another purpose, such as tag files.
    Returns:
      The line, as ``7 files not taken: 5 .heic (install the package pillow-heif), 2 .svg``, or an empty string.
    """
    others = [path for path in found.files if path not in own and not is_photograph(path)]
    ends = collections.Counter(os.path.splitext(path)[1].lower() or "without an extension" for path in others)
    parts = [f"{count} {end}" + (f" ({ADVICE[end]})" if end in ADVICE else "") for end, count in ends.most_common(_SHOWN)]
    if len(ends) > _SHOWN:
        parts.append(f"{sum(ends.values()) - sum(count for _, count in ends.most_common(_SHOWN))} others")
    if found.hidden:
        parts.append(f"{len(found.hidden)} hidden photographs")
    if found.special:
        parts.append(f"{len(found.special)} pipes, sockets or devices")
    count = len(others) + len(found.hidden) + len(found.special)
    lines = [f"{count} file{'s' if count > 1 else ''} not taken: {', '.join(parts)}"] if count else []
    for paths, what in ((found.system_folders, "folders of the system not entered"), (found.closed, "folders that may not be read"),
                        (found.like_files, "folders with names of photographs, which are none")):  # fmt: skip
        names = sorted({path.rsplit("/", 1)[-1] for path in paths})
        if names:
            lines.append(f"{what}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""))
    return "; ".join(lines)


def plain_name(name: str) -> str:
    """A name without the differences that file systems make: letters in one form and one case.

    Args:
      name: the name.
    Returns:
      The plain name.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def there(folder: Path, name: str) -> Path | None:
    """The file or folder of a name, in whatever letter case it is written.

    Args:
      folder: where it lies.
      name: its name.
    Returns:
      Its path, None if there is none, or none of that case and several of others.
    """
    if (folder / name).exists():
        return folder / name
    try:
        alike = [entry for entry in os.listdir(folder) if plain_name(entry) == plain_name(name)]
    except OSError:
        return None
    return folder / alike[0] if len(alike) == 1 else None


class Nearest:
    """Tells what was probably meant by a name: the same in another letter case, with another extension, or in another folder.

    Args:
      names: what is there, with ``/`` between folders.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = {plain_name(name): name for name in names}
        self._forms: dict[str, str] = {}
        for plain, name in self._names.items():
            for form in _forms(plain):
                self._forms.setdefault(form, name)

    def to(self, name: str) -> str | None:
        """The nearest name.

        Args:
          name: what was asked for.
        Returns:
          One of the names, or None if none is near. Numbers are never exchanged: a12 is not near to a11.
        """
        wanted = plain_name(name.strip().replace("\\", "/"))
        if wanted in self._names:
            return self._names[wanted]
        for form in _forms(wanted):
            if form in self._forms:
                return self._forms[form]
        if len(self._names) <= _MOST_COMPARED:
            for close in difflib.get_close_matches(wanted, self._names, n=3, cutoff=0.8):
                if re.sub(r"\D", "", close) == re.sub(r"\D", "", wanted):
                    return self._names[close]
        return None


def _forms(name: str) -> tuple[str, ...]:
    """What a name is known by: without its extension, without its folder, without both."""
    base = name.rsplit("/", 1)[-1]
    return f"stem:{os.path.splitext(name)[0]}", f"base:{base}", f"base stem:{os.path.splitext(base)[0]}"


def nearest(name: str, names: Iterable[str]) -> str | None:
    """What was probably meant by a name.

    Args:
      name: what was asked for.
      names: what is there.
    Returns:
      See `Nearest`.
    """
    return Nearest(names).to(name)


def meant(name: str, names: Iterable[str]) -> str:
    """The words for `nearest`.

    Args:
      name: what was asked for.
      names: what is there.
    Returns:
      ``; did you mean 'masks/A01.PNG'?``, or an empty string.
    """
    near = nearest(name, names)
    return f"; did you mean {near!r}?" if near is not None else ""


def meant_path(path: str | os.PathLike) -> str:
    """The words for what is nearest to a path that is not there: beside it, or one folder up.

    Args:
      path: the path.
    Returns:
      ``; did you mean FOLDER/tags.CSV?``, or an empty string, as for a path that is there.
    """
    path = Path(os.path.abspath(path))
    if os.path.exists(path):
        return ""
    while not path.parent.is_dir() and path.parent != path.parent.parent:
        path = path.parent  # the first folder on the way that is missing
    for folder in (path.parent, path.parent.parent):
        try:
            near = nearest(path.name, os.listdir(folder))
        except OSError:
            continue
        if near is not None:
            return f"; did you mean {folder / near}?"
    return ""


class PhotographFinder:
    """Finds photographs by the names that tag files and lists give them: paths, or the ends of paths.

    The letter case counts where names differ by it alone.

    Args:
      photographs: paths with ``/`` between folders.
    """

    def __init__(self, photographs: Sequence[str]) -> None:
        self._exact = {unicodedata.normalize("NFC", path): path for path in photographs}
        self._shorter: dict[str, list[str]] = {}
        self._photographs = photographs
        for path in photographs:
            parts = os.path.splitext(path)[0].split("/"), path.split("/")
            names = {"/".join(part[start:]) for part in parts for start in range(len(part))}
            for name in (names | {name.strip() for name in names}) - {path}:  # tag files are read without spaces around names
                self._shorter.setdefault(unicodedata.normalize("NFC", name), []).append(path)
        self._plain: dict[str, set[str]] | None = None
        self._nearest: Nearest | None = None

    def candidates(self, name: str) -> list[str]:
        """The photographs that a name may mean.

        Args:
          name: a path, or the end of a path, with or without its extension.
        Returns:
          Their paths: one if it is clear, none if there is none.
        """
        name = unicodedata.normalize("NFC", name)
        if name in self._exact:
            return [self._exact[name]]
        return self._shorter.get(name) or self._in_any_case(plain_name(name))

    def _in_any_case(self, name: str) -> list[str]:
        if self._plain is None:
            self._plain = {}
            for form, paths in [*((form, [path]) for form, path in self._exact.items()), *self._shorter.items()]:
                self._plain.setdefault(plain_name(form), set()).update(paths)
        return sorted(self._plain.get(name, ()))

    def meant(self, name: str, others: Iterable[str] = ()) -> str:
        """Words for a name that finds nothing: what is nearest to it.

        Args:
          name: the name.
          others: files that are no photographs.
        Returns:
          See `meant`; of a file that was not taken it says so.
        """
        stem = plain_name(os.path.splitext(name)[0])
        if self._nearest is None:
            self._nearest = Nearest(self._photographs)
        near = self._nearest.to(name)
        if near is None or plain_name(os.path.splitext(near)[0].rsplit("/", 1)[-1]) != stem.rsplit("/", 1)[-1]:
            for path in others:
                if plain_name(os.path.splitext(path)[0]).endswith(stem):
                    end = os.path.splitext(path)[1].lower()
                    return f"; {path} is there, but {end or 'a file without an extension'} is not read" + (
                        f": {ADVICE[end]}" if end in ADVICE else "")  # fmt: skip
        return f"; did you mean {near!r}?" if near is not None else ""


def known_formats() -> str:
    """The common extensions of photographs that can be read here, for messages.

    Returns:
      As ``.jpg, .png, .webp, .avif``.
    """
    common = (".jpg", ".png", ".webp", ".avif", ".heic", ".jp2", ".tif", ".bmp", ".gif")
    return ", ".join(end for end in common if end in extensions())


ODD_LETTERS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # surrogates stand for bytes that are no UTF-8
