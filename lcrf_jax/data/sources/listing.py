"""Reads tag file, class names and lists of a folder, and finds its photographs and masks, without opening a photograph.

All that is wrong with names, tags and lists is collected and told together; see `lcrf_jax.data.sources.folder` for the layout.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcrf_jax.data.example import BACKGROUND, VOID, tag_vector
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.masks import read_colours
from lcrf_jax.data.files.tags import TAG_FILES, TagRow, read_classes, read_tag_file, read_text, some

SPLITS = ("train", "val")
_ODD_LETTERS = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # surrogates stand for bytes that are no UTF-8


class Listing(NamedTuple):
    """What a folder holds.

    Attributes:
      root: the folder.
      class_names: names of the K classes, background first; empty if they are not known for a problem.
      images: paths of the photographs that have tags, within the root, in order.
      tags: [N, K] bool.
      splits: dict from the name of a split to the increasing positions of its photographs.
      masks: dict from a photograph's path to its mask's path, of those that have one.
      colours: label of each colour in masks, or None where masks hold indices.
      tag_source: the tag file, or a word for folders of classes.
      untagged: photographs without a row in the tag file, which are left out.
      missing: rows of tag file or lists without a photograph, one line each.
      problems: everything else that is wrong, one line each.
    """

    root: Path
    class_names: tuple[str, ...]
    images: tuple[str, ...]
    tags: np.ndarray
    splits: dict[str, np.ndarray]
    masks: dict[str, Path]
    colours: dict[tuple[int, int, int], int] | None
    tag_source: str
    untagged: tuple[str, ...]
    missing: tuple[str, ...]
    problems: tuple[str, ...]


def scan_folder(
    root: str | os.PathLike,
    *,
    tags: str = "",
    classes: str = "",
    mask_folder: str = "masks",
    colours: str = "",
    lists: tuple[str, ...] = SPLITS,
    val_share: float = 0.2,
    split_seed: int = 0,
) -> Listing:
    """Look through a folder of photographs without opening one.

    Args:
      root: the folder.
      tags: tag file, absolute or within the folder; by default tags.csv, tags.json or tags.jsonl, and where there is
        none, the first folder of each photograph is its tag.
      classes: file of the class names, absolute or within the folder; by default classes.txt, and where there is none,
        the names in the tags in alphabetical order.
      mask_folder: folder of the masks, absolute or within the folder.
      colours: file of the colours of the masks, absolute or within the folder; by default colours.csv where it is there.
      lists: names of the splits that may have a list.
      val_share: where there are no lists, the share of all photographs that is the split val, if so many have masks.
      split_seed: seed of the choice of these photographs.
    Returns:
      Listing.
    Raises:
      FileNotFoundError: if the folder or a file that was named does not exist.
      ValueError: if val_share is not in [0, 1), or a file cannot be read as what it should be.
    """
    root = _existing_folder(root)
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share: expected a share in [0, 1), got {val_share}")
    tag_file = _named(root, tags, "tags") or next((root / n for n in TAG_FILES if (root / n).is_file()), None)
    class_file = _named(root, classes, "classes") or _if_there(root / "classes.txt")
    colour_file = _named(root, colours, "colours") or _if_there(root / "colours.csv")
    mask_root = root / Path(mask_folder).expanduser()
    photographs, problems = _photographs(root, mask_root)
    if not photographs:
        raise FileNotFoundError(f"{root} holds no photographs (.jpg, .png, .webp, .bmp, .tif, .gif), at any depth")
    several = [path for path in (root / name for name in TAG_FILES) if path.is_file()]
    if len(several) > 1 and not tags:
        problems.append(f"{root} holds {', '.join(path.name for path in several)}; keep one, or name one")
    finder = PhotographFinder(photographs)
    missing: list[str] = []
    rows = _tagged(read_tag_file(tag_file), finder, missing, problems) if tag_file else {}
    rows = rows or ({} if tag_file else _tags_by_folder(photographs, problems))
    class_names, rows = _classes(class_file, rows, problems)
    images = tuple(sorted(rows))
    known = [[name for name in rows[image].tags if name in class_names] for image in images]
    vectors = [tag_vector(names, class_names) for names in known] if class_names else []
    listed = {name: path for name in dict.fromkeys(lists) if (path := root / f"{name}.txt").is_file()}
    mask_of = _masks(mask_root, images, problems)
    return Listing(
        root,
        class_names,
        images,
        np.array(vectors, bool).reshape(len(vectors), len(class_names)),
        _listed_splits(listed, images, finder, missing, problems) if listed
        else _chosen_splits(images, mask_of, val_share, split_seed),
        mask_of,
        read_colours(colour_file, class_names) if colour_file and class_names else None,
        str(tag_file) if tag_file else "folders of classes",
        tuple(name for name in photographs if name not in rows) if tag_file else (),
        tuple(missing),
        tuple(problems),
    )  # fmt: skip


def _existing_folder(root: str | os.PathLike) -> Path:
    root = Path(root).expanduser()
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(f"the data folder {root} {what}: give the folder that holds the photographs and tags.csv")
    return root


def _named(root: Path, name: str, option: str) -> Path | None:
    """A file that was named, absolute or within the folder."""
    if not name:
        return None
    path = root / Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{option}: {path} does not exist; give a path, absolute or within {root}")
    return path


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _photographs(root: Path, mask_folder: Path) -> tuple[list[str], list[str]]:
    """Paths of all photographs within the root, in order, and problems with names; hidden files are left out."""
    found, problems, seen = [], [], set()
    for folder, below, files in os.walk(root, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen or place == os.path.realpath(mask_folder):
            below.clear()
            continue
        seen.add(place)
        below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
        for name in files:
            if is_photograph(name) and not name.startswith("."):
                path = (Path(folder) / name).relative_to(root).as_posix()
                if not _ODD_LETTERS.search(path):
                    found.append(path)
                else:
                    problems.append(f"{root}: the file name {path!a} is not plain UTF-8 text; rename the file")
    return sorted(found), problems


class PhotographFinder:
    """Finds photographs by the names that tag files and lists give them: paths, or the ends of paths.

    Args:
      photographs: paths with ``/`` between folders.
    """

    def __init__(self, photographs: Sequence[str]) -> None:
        self._exact = {unicodedata.normalize("NFC", path): path for path in photographs}
        self._shorter: dict[str, list[str]] = {}
        for path in photographs:
            parts = os.path.splitext(path)[0].split("/"), path.split("/")
            for name in {"/".join(part[start:]) for part in parts for start in range(len(part))} - {path}:
                self._shorter.setdefault(unicodedata.normalize("NFC", name), []).append(path)

    def candidates(self, name: str) -> list[str]:
        """The photographs that a name may mean.

        Args:
          name: a path, or the end of a path, with or without its extension.
        Returns:
          Their paths: one if it is clear, none if there is none.
        """
        name = unicodedata.normalize("NFC", name)
        return [self._exact[name]] if name in self._exact else self._shorter.get(name, [])


def _tagged(rows: dict[str, TagRow], finder: PhotographFinder, missing: list, problems: list) -> dict[str, TagRow]:
    """The rows of a tag file by photograph."""
    found: dict[str, TagRow] = {}
    for name, row in rows.items():
        candidates = finder.candidates(name)
        if not candidates:
            missing.append(f"{row.where}: there is no photograph {name!r}; add it or remove the row")
        elif len(candidates) > 1:
            problems.append(f"{row.where}: {name!r} may be {some(candidates)}; write the whole path")
        elif candidates[0] in found and set(found[candidates[0]].tags) != set(row.tags):
            problems.append(f"{row.where}: {candidates[0]!r} has other tags in another row; keep one")
        else:
            found[candidates[0]] = row
    return found


def _tags_by_folder(photographs: list[str], problems: list) -> dict[str, TagRow]:
    """The first folder of each photograph as its tag, below a folder for each split where these are there."""
    top = {path.split("/", 1)[0] for path in photographs if "/" in path}
    found = {}
    for path in photographs:
        parts = path.split("/")
        if top <= set(SPLITS):
            parts = parts[1:]
        if len(parts) < 2:
            problems.append(f"{path}: there is no tag file, and the photograph lies in no folder of a class; write a tags.csv")
            continue
        found[path] = TagRow(() if parts[0].casefold() == BACKGROUND else (parts[0],), path)
    if len(problems) > 20:
        problems[20:] = [f"and {len(problems) - 20} more"]
    return found


def _classes(
    class_file: Path | None, rows: dict[str, TagRow], problems: list[str]
) -> tuple[tuple[str, ...], dict[str, TagRow]]:
    """(class names, rows): of the file, or those that occur."""
    used: dict[str, str] = {}
    for row in rows.values():
        for name in row.tags:
            used.setdefault(name, row.where)
    if class_file is not None:
        class_names = read_classes(class_file)
        for name, where in used.items():
            if name not in class_names:
                problems.append(
                    f"{where}: unknown class {name!r}: expected one of {', '.join(class_names[1:])}; correct the tag, or add "
                    f"the class to {class_file.name}; tags are separated by ;"
                )
        return class_names, rows
    spelt: dict[str, str] = {}
    for name in sorted(used):
        plain = " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
        if plain in spelt:
            problems.append(f"{used[name]}: the tags {spelt[plain]!r} and {name!r} differ in spelling alone; choose one")
        spelt.setdefault(plain, name)
    if not used:
        problems.append("no photograph has a tag: nothing can be learnt; write tags, or check the names in the tag file")
    elif len(used) >= VOID:
        problems.append(f"expected at most {VOID - 1} classes, got {len(used)}; are tags and names of images exchanged?")
    else:
        return (BACKGROUND, *sorted(used)), rows
    return (), rows


def _listed_splits(lists, images, finder, missing, problems):
    """The positions of the listed photographs; what is not listed belongs to train or val where that has no list."""
    position, splits, of_split = {name: at for at, name in enumerate(images)}, {}, {}
    for split, path in lists.items():
        rows = set()
        for line, name in enumerate(read_text(path).splitlines(), 1):
            name, where = name.strip().replace("\\", "/").removeprefix("./"), f"{path}, line {line}"
            candidates = finder.candidates(name) if name else []
            if name and not candidates:
                missing.append(f"{where}: there is no photograph {name!r}; add it or remove the line")
            elif len(candidates) > 1:
                problems.append(f"{where}: {name!r} may be {some(candidates)}; write the whole path")
            elif candidates and candidates[0] not in position:
                problems.append(f"{where}: {candidates[0]!r} has no row in the tag file; add one, without tags if it shows none")
            elif candidates:
                rows.add(position[candidates[0]])
                other = of_split.setdefault(candidates[0], split)
                if split in SPLITS and other in SPLITS and other != split:
                    problems.append(f"{where}: {candidates[0]!r} stands in {lists[other].name} too; keep it in one")
        splits[split] = np.array(sorted(rows), np.int64)
    taken = {row for name in SPLITS for row in splits.get(name, ())}
    rest = np.array([row for row in range(len(images)) if row not in taken], np.int64)
    for split in SPLITS:
        if split not in splits and len(rest):
            splits[split] = rest
            break
    return splits


def _chosen_splits(images, mask_of, share, seed):
    """Splits by folder where there are folders train and val, else by chance among those with masks."""
    top = [name.split("/", 1)[0] if "/" in name else "" for name in images]
    if set(top) == set(SPLITS):
        return {split: np.flatnonzero(np.array(top) == split) for split in SPLITS}
    order = sorted(images, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    chosen = set([name for name in order if name in mask_of][: round(share * len(images))])
    is_val = np.array([name in chosen for name in images], bool)
    return {"train": np.flatnonzero(~is_val), "val": np.flatnonzero(is_val)}


def _masks(folder: Path, images: tuple[str, ...], problems: list) -> dict[str, Path]:
    """The mask of each photograph that has one: of its path, or of its path below its first folder."""
    found: dict[str, Path] = {}
    owner: dict[Path, str] = {}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} if folder.is_dir() else set()
    for name in images if there else ():
        stem = os.path.splitext(name)[0]
        for candidate in (f"{stem}.png", f"{stem.split('/', 1)[-1]}.png"):
            if candidate in there:
                found[name] = folder / candidate
                other = owner.setdefault(found[name], name)
                if other != name:
                    problems.append(f"{found[name]} is the mask of {other} and of {name}; put masks in folders like the photographs")
                break
    if there and not found:
        problems.append(
            f"{folder}: no mask has the name of a photograph with tags ({some(sorted(there))}); name them NAME.png, like the photographs"
        )
    return found
