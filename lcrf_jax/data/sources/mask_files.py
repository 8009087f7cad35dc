"""Finds the masks of photographs by their names, in any letter case and any format that keeps labels exact."""

from __future__ import annotations

import collections
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lcrf_jax.data.files.finding import files_below, plain_name
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.names import MASK_PLACES
from lcrf_jax.data.files.tags import some

EXACT = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".pnm")  # formats that keep labels as they are


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


def is_exact(name: str) -> bool:
    """Whether the extension of a file is of a format that keeps labels as they are.

    Args:
      name: of the file.
    Returns:
      True or False.
    """
    return os.path.splitext(name)[1].lower() in EXACT


def find_masks(folder: Path, images: Sequence[str]) -> Masks:
    """The mask of each photograph that has one: of its path, or of its path below its first folder.

    Args:
      folder: of the masks; it need not exist.
      images: the photographs, in order.
    Returns:
      Masks.
    """
    found = files_below(folder).files if folder.is_dir() else ()
    exact, plain = collections.defaultdict(list), collections.defaultdict(list)
    for path in found:
        if is_photograph(path):
            stem = unicodedata.normalize("NFC", os.path.splitext(path)[0])
            exact[stem].append(path)
            plain[plain_name(stem)].append(path)
    masks, used, problems, inexact = {}, collections.defaultdict(list), [], []
    for image in images if exact else ():
        stem = unicodedata.normalize("NFC", os.path.splitext(image)[0])
        for form in dict.fromkeys((stem, stem.split("/", 1)[-1])):
            candidates = exact.get(form) or plain.get(plain_name(form))
            if candidates:
                break
        else:
            continue
        good = [path for path in candidates if is_exact(path)]
        for path in candidates:
            used[path].append(image)
        if len(good) == 1:
            masks[image] = folder / good[0]
        elif good:
            problems.append(f"{folder}: {some(good)} are masks of {image}; keep one")
        else:
            inexact += candidates
    problems += [f"{folder / path} is the mask of {owners[0]} and of {owners[1]}; put masks in folders like the photographs"
                 for path, owners in used.items() if len(owners) > 1]  # fmt: skip
    if inexact:
        problems.append(
            f"{folder}: {len(inexact)} masks are in formats that do not keep labels exact ({some(inexact)}); save masks as PNG"
        )
    return Masks(masks, _notes(folder, found, used), problems + _none_fits(folder, found, used))


def _notes(folder, found, used):
    """What lies there unused."""
    pictures = [path for path in found if is_photograph(path) and path not in used]
    others = collections.Counter(os.path.splitext(path)[1].lower() or "without an extension" for path in found if not is_photograph(path))
    lines = [f"{folder}: {len(pictures)} masks have the name of no photograph with tags ({some(pictures)})"] if pictures and used else []
    return lines + ([f"{folder}: not taken: {', '.join(f'{n} {end}' for end, n in others.most_common(6))}"] if others else [])


def _none_fits(folder, found, used):
    """Masks of which none has the name of a photograph."""
    if not found or used:
        return []
    pictures = [path for path in found if is_photograph(path)]
    if not pictures:
        return [f"{folder} holds {len(found)} files and no picture ({some(list(found))}); save masks as PNG"]
    return [f"{folder}: no mask has the name of a photograph with tags ({some(pictures)}); name them NAME.png, like the photographs"]


def masks_elsewhere(root: Path, photographs: Sequence[str]) -> list[str]:
    """Folders such as labels/ that hold pictures with the names of photographs, where there is no folder of masks.

    Args:
      root: the folder.
      photographs: all pictures in it.
    Returns:
      One line for each.
    """
    stems = collections.defaultdict(set)
    for path in photographs:
        *folders, name = path.split("/")
        stems[folders[0] if folders else ""].add(os.path.splitext(name)[0])
    suspects = [top for top in stems if plain_name(top) in MASK_PLACES]
    outside = {name for top, names in stems.items() if top not in suspects for name in names}
    return [
        f"{root}: the folder {top!r} holds pictures with the names of photographs; if these are masks, name it 'masks' "
        f"or give mask_folder={top}, else rename it"
        for top in suspects
        if outside & stems[top]
    ]
