"""Tells by names which pictures among photographs are their masks, for training and prediction alike.

A mask has the name of a photograph and a word such as ``_mask`` more, beside it, or it lies in a folder such as ``masks``,
and photographs elsewhere below the folder around that one have its name.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lcrf_jax.data.files.finding import plain_name, there
from lcrf_jax.data.files.names import MASK_WORDS
from lcrf_jax.data.files.tags import TAG_FILES, some
from lcrf_jax.machine.files import at_home

EXACT = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".pnm")  # formats that keep labels as they are
TRAINING_FILES = (*TAG_FILES, "classes.txt", "colours.csv", "train.txt", "val.txt")
_OF_NO_WEIGHT = ("v", "new", "old", "final", "png", "all", "")
_OTHER_SENSE = {"with", "without", "no", "non", "not", "wearing"}  # classes of pictures of faces
_AFFIX = "masks?|labels?|seg|segmentation|gt|ground[ _-]?truth|annotation"
_ANY = re.compile(_AFFIX)
_BEHIND = re.compile(rf"(.+?)[ _.\-]+({_AFFIX})([ _.\-]*\d+)?")
_BEFORE = re.compile(rf"({_AFFIX})[ _.\-]+(.+)")


def is_exact(name: str) -> bool:
    """Whether the extension of a file is of a format that keeps labels as they are.

    Args:
      name: of the file.
    Returns:
      True or False.
    """
    return os.path.splitext(name)[1].lower() in EXACT


def masks_among(pictures: Sequence[str]) -> dict[str, dict[str, str]]:
    """The pictures that are masks of others by their names and folders.

    Args:
      pictures: their paths, with ``/`` between folders.
    Returns:
      dict from a folder of masks, or from an empty string for masks that lie beside their photographs, to a dict from
      each mask to the photograph.
    """
    inside = {path: path.rpartition("/")[0] for path in pictures}
    of_masks = {folder: _folder_of_masks(folder) for folder in set(inside.values())}
    folder_of = {path: of_masks[folder] for path, folder in inside.items()}
    photographs = [path for path in pictures if not folder_of[path]]
    beside: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for path, photograph in _beside(photographs).items():
        beside[""][path] = photograph
    groups = collections.defaultdict(list)
    for path, folder in folder_of.items():
        if folder:
            groups[folder].append(path)
    left = beside.get("", {})
    owners = _owners([path for path in photographs if path not in left], {folder.rpartition("/")[0] for folder in groups})
    for folder, paths in groups.items():
        pairs = {path: owner for path in paths if (owner := _owner(path, folder, owners))}
        sure = _is_word(folder.rpartition("/")[2]) or all(is_exact(path) for path in paths)
        if sure and 2 * len(pairs) >= len(paths):
            beside[folder] = pairs
    return dict(beside)


def of_training(folder: Path) -> dict[str, Path]:
    """The files that make a folder one for training: tag file, classes, colours and lists.

    Args:
      folder: any folder.
    Returns:
      dict from the names that they should have to those that are there.
    """
    return {name: path for name in TRAINING_FILES if (path := there(folder, name))}


def folders_of_training(folder: Path, data: Mapping[str, Any]) -> set[str]:
    """The folders that hold masks for training, whatever their names are.

    Args:
      folder: where photographs are looked for; if it is one for training, its folder ``masks`` and the one that was named are
        such.
      data: what a run was trained on, as in its configuration; the folder that it names is one too, wherever `folder` is. It
        may be empty.
    Returns:
      Their real paths.
    """
    named, root = (data.get("options") or {}).get("mask_folder") or "masks", data.get("root")
    found = [there(folder, name) for name in ("masks", named)] if of_training(folder) else []
    if root:
        found.append(there(at_home(root), str(at_home(named))))
    return {os.path.realpath(path) for path in found if path is not None and path.is_dir()}


def told(masks: dict[str, dict[str, str]]) -> str:
    """One line on masks that are left out.

    Args:
      masks: of `masks_among`.
    Returns:
      The line, or an empty string.
    """
    parts = [
        f"{folder}/ holds masks ({len(pairs)} with the names of photographs) and is left out" if folder else
        f"{len(pairs)} masks beside their photographs are left out ({some(list(pairs))})"
        for folder, pairs in masks.items()
    ]  # fmt: skip
    return "; ".join(parts)


def left_out(pictures: Collection[str], masks: dict[str, dict[str, str]]) -> set[str]:
    """The pictures that are no photographs: all in folders of masks, and those beside their photographs.

    Args:
      pictures: their paths.
      masks: of `masks_among`.
    Returns:
      Their paths.
    """
    folders = tuple(f"{folder}/" for folder in masks if folder)
    return {path for path in pictures if path in masks.get("", ()) or path.startswith(folders)} if masks else set()


def _is_word(name: str) -> bool:
    return "".join(part for part in _parts(name) if part not in _OF_NO_WEIGHT) in MASK_WORDS


def _parts(name: str) -> list[str]:
    return re.split(r"[\W_\d]+", plain_name(name))


def _folder_of_masks(folder: str) -> str:
    """The outermost folder of a folder that is named like one of masks, empty if there is none."""
    folders = folder.split("/")
    for at, name in enumerate(folders):
        parts = _parts(name)
        like = any(part in MASK_WORDS or part.endswith(("masks", "annot", "labels")) for part in parts)
        if _is_word(name) or like and not _OTHER_SENSE.intersection(parts):
            return "/".join(folders[: at + 1])
    return ""


def _base(path: str) -> str:
    return plain_name(os.path.splitext(path.rpartition("/")[2])[0])


def _without_word(base: str) -> str | None:
    """The name of a photograph in that of a mask such as x_mask or mask_x."""
    if not _ANY.search(base):
        return None
    found = _BEHIND.fullmatch(base)
    if found:
        return found.group(1)
    found = _BEFORE.fullmatch(base)
    return found.group(2) if found else None


def _beside(paths: Sequence[str]) -> dict[str, str]:
    """Masks that lie in the folder of their photographs."""
    there = {(path.rpartition("/")[0], _base(path)): path for path in paths}
    pairs = {}
    for path in paths:
        base = _without_word(_base(path))
        owner = there.get((path.rpartition("/")[0], base)) if base else None
        if owner is not None:
            pairs[path] = owner
    return pairs


def _owners(photographs: Sequence[str], arounds: Collection[str]) -> dict[tuple[str, str, str], str]:
    """The first photograph below a folder of a name, and of a name and a folder on its way, empty for any."""
    first: dict[tuple[str, str, str], str] = {}
    for path in photographs if arounds else ():
        parts, base = path.split("/")[:-1], _base(path)
        for at in range(len(parts) + 1):
            around = "/".join(parts[:at])
            if around in arounds:
                for part in ("", *parts[at:]):
                    first.setdefault((around, base, part), path)
    return first


def _owner(path: str, folder: str, owners: dict[tuple[str, str, str], str]) -> str | None:
    """The photograph of a mask: of its name, and if there is one in a folder of the same name, that."""
    around, base = folder.rpartition("/")[0], _base(path)
    inner = path.removeprefix(f"{folder}/").split("/")[:-1]
    for name in filter(None, (base, _without_word(base))):
        for part in (*reversed(inner), ""):
            if owner := owners.get((around, name, part)):
                return owner
    return None
