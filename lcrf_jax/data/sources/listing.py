"""Reads tag file, class names and lists of a folder, and finds its photographs and masks, without opening a photograph.

All that is wrong with names, tags and lists is collected and told together; see `lcrf_jax.data.sources.folder` for the layout.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcrf_jax.data.example import BACKGROUND, VOID, tag_vector
from lcrf_jax.data.files.finding import (
    ODD_LETTERS,
    Found,
    PhotographFinder,
    files_below,
    known_formats,
    meant,
    meant_path,
    not_taken,
    there,
)  # fmt: skip
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.masks import read_colours
from lcrf_jax.data.files.names import name_doubt, name_doubts
from lcrf_jax.data.files.tags import (
    TAG_FILES,
    TagRow,
    columns_not_read,
    joined,
    looks_like_tags,
    read_classes,
    read_tag_file,
    some,
)
from lcrf_jax.data.sources.lists import (
    MOST_HINTS,
    SPLITS,
    TEST,
    Line,
    below,
    chosen_splits,
    listed_splits,
    read_lists,
    refuse_photographs_as_masks,
    set_aside,
    split_of,
    there_file,
    with_rest,
)
from lcrf_jax.data.sources.mask_files import find_masks, masks_elsewhere
from lcrf_jax.machine.files import at_home

SPREADSHEETS = (".xlsx", ".xls", ".ods", ".xlsm", ".numbers")


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
      not_taken: one line on files that are there and not used, or an empty string.
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
    not_taken: str
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
        the names in the tags in alphabetical order. A file confirms the names: without it, names that look like slips are
        problems, and so are masks of indices where there are two classes or more.
      mask_folder: folder of the masks, absolute or within the folder.
      colours: file of the colours of the masks, absolute or within the folder; by default colours.csv where it is there.
        Files with these names, and the folder of the masks, may be written in capitals.
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
    tag_files = [path for name in TAG_FILES if (path := there_file(root, name))]
    tag_file = _named(root, tags, "tags") or next(iter(tag_files), None)
    class_file = _named(root, classes, "classes") or there_file(root, "classes.txt")
    colour_file = _named(root, colours, "colours") or there_file(root, "colours.csv") or there_file(root, "colors.csv")
    mask_root = _mask_root(root, mask_folder)
    lines = read_lists(root, lists)
    tested = [] if TEST in lists else read_lists(root, (TEST,)).get(TEST, [])
    named = read_tag_file(tag_file) if tag_file else {}
    refuse_photographs_as_masks(root, lines, named)
    found = files_below(root, leave=_of_masks(root, mask_root, lines).__contains__)
    photographs, problems = _photographs(root, found, lines)
    if not photographs:
        raise FileNotFoundError(f"{root} holds no photographs ({known_formats()}), at any depth{_instead(found)}")
    if len(tag_files) > 1 and not tags:
        problems.append(f"{root} holds {', '.join(path.name for path in tag_files)}; keep one, or name one")
    finder = PhotographFinder(photographs)
    missing: list[str] = []
    rows = _tagged(root, named, finder, found, missing, problems) if tag_file else {}
    rows = rows or ({} if tag_file else _tags_by_folder(root, photographs, found, problems, confirmed=class_file is not None))
    class_names, rows = _classes(class_file, rows, problems, of_folders=tag_file is None)
    images = tuple(sorted(rows))
    known = [[name for name in rows[image].tags if name in class_names] for image in images]
    vectors = [tag_vector(names, class_names) for names in known] if class_names else []
    masks = find_masks(mask_root, images, photographs)
    problems += masks.problems + masks_elsewhere(root, photographs, rows, mask_root)
    splits, mask_of = listed_splits(lines, images, finder, missing, problems)
    if tested:
        splits[TEST] = set_aside(tested, images, finder)
    mask_of = masks.of | mask_of
    splits, unused = with_rest(
        splits, images, lambda rest: chosen_splits(rest, mask_of, val_share, split_seed, of_folders=tag_file is None)
    )
    if mask_of and class_file is None and colour_file is None and len(class_names) > 2:
        problems.append(
            f"{root}: masks hold indices, and no classes.txt says which class is which; write FOLDER/classes.txt, a class a "
            f"line in the order of the indices (by their names it would be: {_several(class_names)})"
        )
    own = {path.name for path in (*tag_files, tag_file, class_file, colour_file) if path} | {f"{name}.txt" for name in lists} | {
        os.path.relpath(line.where.rsplit(", line ", 1)[0], root) for part in (*lines.values(), tested) for line in part[:1]}
    return Listing(
        root,
        class_names,
        images,
        np.array(vectors, bool).reshape(len(vectors), len(class_names)),
        splits,
        mask_of,
        read_colours(colour_file, class_names) if colour_file and class_names else None,
        str(tag_file) if tag_file else "folders of classes",
        tuple(name for name in photographs if name not in rows) if tag_file else (),
        "; ".join(line for line in (not_taken(found, own=own), columns_not_read(tag_file) if tag_file else "", unused, *masks.notes) if line),
        tuple(missing),
        tuple(problems),
    )


def _existing_folder(root: str | os.PathLike) -> Path:
    root = at_home(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        near = meant_path(root)
        raise FileNotFoundError(
            f"the data folder {root} {what}: give the folder that holds the photographs and tags.csv{near}"
        )
    return root


def _named(root: Path, name: str, option: str) -> Path | None:
    """A file that was named, absolute or within the folder."""
    if not name:
        return None
    path = root / at_home(name)
    if not os.path.isfile(path):  # False too for a name that is too long
        raise FileNotFoundError(
            f"{option}: {path} does not exist; give a path, absolute or within {root}{meant_path(path)}"
        )
    return path


def _mask_root(root: Path, mask_folder: str) -> Path:
    """The folder of the masks; one that was named has to exist."""
    path = root / at_home(mask_folder)
    if os.path.isdir(path):
        return path
    if os.path.islink(path) and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist; mend or remove the link")
    if mask_folder == "masks":
        found = there(root, mask_folder)
        return found if found is not None and found.is_dir() else path
    raise FileNotFoundError(f"mask_folder: {path} is no folder; give a path, absolute or within {root}{meant_path(path)}")


def _of_masks(root: Path, mask_root: Path, lists: dict[str, list[Line]]) -> set[str]:
    """Real paths of the folders that hold masks and no photographs."""
    lines = [line for part in lists.values() for line in part]
    folders = {os.path.realpath(line.mask.parent) for line in lines if line.mask is not None}
    photographs = {os.path.realpath((root / line.name).parent) for line in lines}
    return {os.path.realpath(mask_root)} | (folders - photographs - {os.path.realpath(root)})


def _photographs(root: Path, found: Found, lists: dict[str, list[Line]]) -> tuple[list[str], list[str]]:
    """Paths of all photographs within the root, in order, and problems with names; masks of lists are left out."""
    masks = {str(line.mask) for part in lists.values() for line in part if line.mask is not None}
    paths = [path for path in found.photographs if not masks or str(root / path) not in masks]
    problems = [
        f"{root}: the file name {path!a} is not plain UTF-8 text; rename the file" for path in paths if ODD_LETTERS.search(path)
    ]
    return [path for path in paths if not ODD_LETTERS.search(path)], problems


def _instead(found: Found) -> str:
    line = not_taken(found)
    return f" ({line})" if line else ""


def _tagged(
    root: Path, rows: dict[str, TagRow], finder: PhotographFinder, found: Found, missing: list, problems: list
) -> dict[str, TagRow]:
    """The rows of a tag file by photograph."""
    tagged: dict[str, TagRow] = {}
    others = [path for path in found.files if not is_photograph(path)]
    for name, row in rows.items():
        candidates = finder.candidates(below(root, name))
        if not candidates:
            hint = finder.meant(name, others) if len(missing) < MOST_HINTS else ""
            missing.append(f"{row.where}: there is no photograph {name!r}{hint}; add it or remove the row")
        elif len(candidates) > 1:
            problems.append(f"{row.where}: {name!r} may be {some(candidates)}; write the whole path")
        elif candidates[0] in tagged and set(tagged[candidates[0]].tags) != set(row.tags):
            problems.append(f"{row.where}: {candidates[0]!r} has other tags in another row; join them in one row: "
                            f"{joined(tagged[candidates[0]], row)}")  # fmt: skip
        else:
            tagged[candidates[0]] = row
    return tagged


def _tags_by_folder(
    root: Path, photographs: list[str], there_is: Found, problems: list, *, confirmed: bool
) -> dict[str, TagRow]:
    """The first folder of each photograph as its tag, below a folder for each split where these are there."""
    top = {path.split("/", 1)[0] for path in photographs if "/" in path}
    rows, loose = {}, []
    for path in photographs:
        parts = path.split("/")
        if all(split_of(name) for name in top):
            parts = parts[1:]
        if len(parts) < 2:
            loose.append(path)
            continue
        rows[path] = TagRow(() if parts[0].casefold() == BACKGROUND else (parts[0],), path)
    sheets = [path for path in there_is.files if os.path.splitext(path)[1].lower() in SPREADSHEETS and "/" not in path]
    if sheets and (loose or any(os.path.splitext(path)[0].casefold() == "tags" for path in sheets)):
        problems.append(
            f"{root} holds no tag file but the spreadsheet {some(sheets)}; export its sheet as CSV (UTF-8) to {root / 'tags.csv'}, "
            "with the columns image and tags, tags separated by semicolons"
        )
        return {}
    if loose:
        near = meant("tags.csv", [path for path in there_is.files if not is_photograph(path)])
        problems.append(
            f"{some(loose)}: there is no tag file{near}, and {'these' if len(loose) > 1 else 'this'} "
            f"{len(loose)} of {len(photographs)} photographs lie in no folder of a class; write a tags.csv"
        )
    alike = [path for path in there_is.files if "/" not in path and looks_like_tags(root / path)]
    if alike and not loose and not confirmed:
        problems.append(
            f"{root} holds no tag file, but {some(alike)}: if it holds the tags, name it tags.csv, with the columns image and tags; "
            f"if the folders are the classes ({_several(sorted(top))}), say so with a classes.txt, or put the file elsewhere"
        )
    return rows


def _classes(
    class_file: Path | None, rows: dict[str, TagRow], problems: list[str], *, of_folders: bool
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
                why = name_doubt(name, class_names[1:])
                problems.append(
                    f"{where}: unknown class {name!r}: expected one of {_several(class_names[1:])}"
                    f"{f' ({why})' if why else meant(name, class_names)}; "
                    f"correct the tag, or add the class to {class_file.name}; tags are separated by ;"
                )
        return class_names, rows
    counts = collections.Counter(name for row in rows.values() for name in row.tags)
    problems += name_doubts(used, counts, of_folders=of_folders) if len(used) < VOID else []
    if not used and problems:
        return (), rows  # told already
    if not used:
        problems.append("no photograph has a tag: nothing can be learnt; write tags, or check the names in the tag file")
    elif len(used) >= VOID:
        problems.append(f"expected at most {VOID - 1} classes, got {len(used)}; are tags and names of images exchanged?")
    else:
        return (BACKGROUND, *sorted(used)), rows
    return (), rows


def _several(names: Collection[str]) -> str:
    return ", ".join(" ".join(name.split()) for name in list(names)[:12]) + (", ..." if len(names) > 12 else "")
