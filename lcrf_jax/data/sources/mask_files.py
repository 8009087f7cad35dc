"""Finds the masks of photographs by their names, in any letter case and any format that keeps labels exact."""

from __future__ import annotations

import collections
import os
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from lcrf_jax.data.files.finding import files_below, plain_name
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.mask_names import is_exact, masks_among
from lcrf_jax.data.files.tags import some


class Masks(NamedTuple):
    """The masks of a folder.

    Attributes:
      of: dict from a photograph to the path of its mask.
      notes: lines on files that are not used.
      problems: lines on what is wrong.
    """

    of: dict[str, Path]
    notes: list[str]
    problems: list[str]


def find_masks(folder: Path, images: Sequence[str], photographs: Sequence[str] = ()) -> Masks:
    """The mask of each photograph that has one: of its path, of its path below its first folder, or of its name alone.

    The name alone counts where one photograph and one mask have it.

    Args:
      folder: of the masks; it need not exist.
      images: the photographs, in order.
      photographs: all photographs, those without tags too.
    Returns:
      Masks.
    """
    below = files_below(folder) if folder.is_dir() else None
    found, folders = (below.files, below.like_files) if below else ((), ())
    candidates = _Candidates([path for path in found if is_photograph(path)], {*images, *photographs})
    masks, used, problems, inexact = {}, collections.defaultdict(list), [], []
    for image in images:
        there = candidates.of(image)
        good = [path for path in there if is_exact(path)]
        for path in there:
            used[path].append(image)
        if len(good) == 1:
            masks[image] = folder / good[0]
        elif good:
            problems.append(f"{folder}: {some(good)} are masks of {image}; keep one")
        else:
            inexact += there
    problems += [f"{folder / path} is the mask of {owners[0]} and of {owners[1]}; put masks in folders like the photographs"
                 for path, owners in used.items() if len(owners) > 1]  # fmt: skip
    if inexact:
        problems.append(
            f"{folder}: {len(inexact)} masks are in formats that do not keep labels exact ({some(inexact)}); save masks as PNG"
        )
    notes = _notes(folder, found, used, images)
    if folders:
        notes.append(f"{folder}: {len(folders)} folders have names of masks and are none ({some(list(folders))}); put the file in its place")
    return Masks(masks, notes, problems + _none_fits(folder, found, used, images))


class _Candidates:
    """Finds the files that may be the mask of a photograph."""

    def __init__(self, paths: Sequence[str], photographs: Collection[str]) -> None:
        self._exact, self._plain, self._base = (collections.defaultdict[str, list[str]](list) for _ in range(3))
        for path in paths:
            stem = unicodedata.normalize("NFC", os.path.splitext(path)[0])
            self._exact[stem].append(path)
            self._plain[plain_name(stem)].append(path)
            self._base[_base(path)].append(path)
        self._owners = collections.Counter(_base(path) for path in photographs)

    def of(self, image: str) -> list[str]:
        """The files for a photograph, several if it has masks of several formats."""
        if not self._exact:
            return []
        name = unicodedata.normalize("NFC", image)
        stem = os.path.splitext(name)[0]
        for form in dict.fromkeys((stem, stem.split("/", 1)[-1], name, name.split("/", 1)[-1])):
            if paths := self._exact.get(form) or self._plain.get(plain_name(form)):
                return paths
        paths = self._base.get(_base(image), [])
        in_one_place = len({os.path.dirname(path) for path in paths}) == 1
        return paths if in_one_place and self._owners[_base(image)] == 1 else []


def _base(path: str) -> str:
    return plain_name(os.path.splitext(os.path.basename(path))[0])


def _notes(folder, found, used, images):
    """What lies there unused."""
    pictures = [path for path in found if is_photograph(path) and path not in used]
    others = collections.Counter(os.path.splitext(path)[1].lower() or "without an extension" for path in found if not is_photograph(path))
    lines = [f"{folder}: {len(pictures)} masks have the name of no photograph with tags ({some(pictures)}){_where(folder, pictures, images)}"] if pictures and used else []
    return lines + ([f"{folder}: not taken: {', '.join(f'{n} {end}' for end, n in others.most_common(6))}"] if others else [])


def _none_fits(folder, found, used, images):
    """Masks of which none has the name of a photograph."""
    if not found or used:
        return []
    pictures = [path for path in found if is_photograph(path)]
    if not pictures:
        return [f"{folder} holds {len(found)} files and no picture ({some(list(found))}); save masks as PNG"]
    where = _where(folder, pictures, images) or "; name them NAME.png, like the photographs"
    return [f"{folder}: no mask has the name of a photograph with tags ({some(pictures)}){where}"]


def _where(folder, pictures, images):
    """Where a mask belongs whose name several photographs have."""
    owners = collections.defaultdict(list)
    for image in images:
        owners[_base(image)].append(image)
    for path in pictures:
        if owners[_base(path)]:
            image = owners[_base(path)][0]
            place = folder / (os.path.splitext(image)[0] + os.path.splitext(path)[1])
            return f"; {path} may be the mask of {some(owners[_base(path)])}: for {image} put it at {place}"
    return ""


def masks_elsewhere(root: Path, photographs: Sequence[str], images: Collection[str], mask_root: Path) -> list[str]:
    """Pictures that would be trained on and are masks by their names, and folders of masks that are not used.

    Args:
      root: the folder.
      photographs: all pictures in it.
      images: those that have tags.
      mask_root: folder of the masks; it need not exist.
    Returns:
      One line for each folder, and one for masks beside their photographs.
    """
    lines = []
    for folder, pairs in masks_among(photographs).items():
        trained = any(path in images for path in pairs)
        if not trained and (mask_root.is_dir() or not folder):
            continue
        path, photograph = next(iter(pairs.items()))
        place = mask_root / (os.path.splitext(photograph)[0] + os.path.splitext(path)[1])
        if folder and "/" not in folder and not mask_root.is_dir():
            lines.append(
                f"{root}: the folder {folder!r} holds pictures with the names of photographs; if these are masks, name it "
                f"'masks' or give mask_folder={folder}, else rename it"
            )
        elif folder:
            lines.append(
                f"{root}: the folder {folder!r} holds {len(pairs)} pictures with the names of photographs; if these are masks, "
                f"move them, {path} to {place}, else rename the folder"
            )
        else:
            lines.append(
                f"{root}: {len(pairs)} pictures have the names of photographs beside them and a word for masks "
                f"({some(list(pairs))}); if these are masks, move them, {path} to {place}, else rename them"
            )
    return lines
