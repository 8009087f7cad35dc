"""The lists of splits of a folder, and the splits that are chosen where there is none.

A line names a photograph, or a photograph and its mask: ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcrf_jax.data.files.finding import PhotographFinder, meant_path, there
from lcrf_jax.data.files.mask_names import is_exact
from lcrf_jax.data.files.tags import read_text, some

SPLITS = ("train", "val")
MOST_HINTS = 20
TEST = "test"  # photographs that are never trained on, nor chosen by
_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), TEST: (TEST, "testing")}
_LONGEST = 255  # bytes of a file name
_SEVERAL = re.compile(r"\S.*?\.\w{2,4}\s*[,;].*\.\w{2,4}\s*[,;].*\.\w{2,4}")
_LABELLED = re.compile(r"(?:(\S.*\.\w{2,4})[\s,;:]+(?:[-+]?\d+(?:[.,]\d+)?|[^\W\d][^/\\.]*)|(\S+)\s+(?:[-+]1|[01]))")  # x.jpg 3, x.jpg dog, x -1
_TWO_COLUMNS = re.compile(r"(\S.*\.\w{2,4})[\s,;]+(/?\S.*\.\w{2,4})")


class Line(NamedTuple):
    """A line of a list.

    Attributes:
      name: the photograph as it is written, without a leading ``/``.
      mask: its mask, which need not exist, or None.
      where: file and line, for messages.
    """

    name: str
    mask: Path | None
    where: str


def split_of(folder: str) -> str | None:
    """The split that a folder has its name from.

    Args:
      folder: its name, such as ``Train``, ``validation``, ``testing`` or ``val2017``.
    Returns:
      train, val or test; None if it is none of these.
    """
    plain = re.sub(r"[-_ ]?\d{4}$", "", folder.casefold())
    return next((split for split, names in _NAMES.items() if plain in names), None)


def read_lists(root: Path, names: Sequence[str]) -> dict[str, list[Line]]:
    """The lists that a folder has.

    Args:
      root: the folder.
      names: of the splits that may have one; train, val and test may be written out, as ``validation.txt``.
    Returns:
      dict from split to the lines of its list that are not empty.
    Raises:
      FileNotFoundError: if a list is a link that leads nowhere.
      ValueError: if a list is no UTF-8 text, a split has two lists, or a line is no name of a file.
    """
    lists = {}
    for name in dict.fromkeys(names):
        paths = {there_file(root, f"{form}.txt") for form in (name, *_NAMES.get(name, ()))} - {None}
        if len(paths) > 1:
            raise ValueError(f"{root} holds {', '.join(sorted(path.name for path in paths if path))}, lists of one split; keep one")
        for path in paths:
            lines = enumerate(read_text(str(path)).split("\n"), 1)
            lists[name] = [_line(text.strip(), root, f"{path}, line {number}") for number, text in lines if text.strip()]
    return lists


def refuse_photographs_as_masks(root: Path, lists: Mapping[str, list[Line]], tagged: Collection[str]) -> None:
    """Refuse lines that name two photographs: the second one is no mask.

    Args:
      root: the folder.
      lists: see `read_lists`.
      tagged: the photographs as the tag file names them.
    Raises:
      ValueError: if the second column of a line has a row in the tag file; the message names the line.
    """
    known = {os.path.splitext(name)[0] if os.path.splitext(name)[1] else name for name in tagged}
    for line in (line for part in lists.values() for line in part if line.mask is not None):
        own, mask = os.path.splitext(line.name)[0], os.path.splitext(os.path.relpath(str(line.mask), root))[0].replace(os.sep, "/")
        beside = os.path.dirname(own) == os.path.dirname(mask)
        if own != mask and (mask in known or (beside and os.path.basename(mask) in known)):
            raise ValueError(f"{line.where}: {line.mask} is a photograph with tags and no mask; write one photograph a line")


def below(root: Path, name: str) -> str:
    """The name of a file as seen from the folder that holds it, where it is a whole path.

    Args:
      root: the folder.
      name: as it is written.
    Returns:
      The path within the folder, or the name as it is where it does not begin with the path of the folder.
    """
    if not os.path.isabs(name):
        return name
    for folder in (os.path.abspath(root), os.path.realpath(root)):
        name = name.removeprefix(folder.replace(os.sep, "/") + "/")
    return name


def there_file(root: Path, name: str) -> Path | None:
    """The file of a name, in whatever letter case it is written.

    Args:
      root: the folder where it lies.
      name: its name.
    Returns:
      Its path, or None if there is none.
    Raises:
      FileNotFoundError: if it is a link that leads nowhere.
    """
    path = there(root, name)
    path = root / name if path is None and os.path.islink(root / name) else path
    if path is not None and os.path.islink(path) and not path.exists():
        raise FileNotFoundError(f"{path} is a link to {os.readlink(path)}, which does not exist; mend or remove the link")
    return path if path is not None and path.is_file() else None


def _line(text: str, root: Path, where: str) -> Line:
    """One column or two: a second one is a file that is there, or both are names of files."""
    text = below(root, text.replace("\\", "/").removeprefix("./"))
    name = text.lstrip("/")
    too_long = max(len(os.fsencode(part)) for part in name.split("/")) > _LONGEST
    if re.search(r"[\s,;]", name) and (too_long or not (root / name).is_file()):
        if _SEVERAL.fullmatch(name):
            raise ValueError(f"{where}: several photographs on a line ({name[:60]!r}); write one a line")
        for gap in re.finditer(r"[\s,;]+", "" if too_long else name):
            mask = _mask(root, name[gap.end() :])
            if gap.start() and mask.is_file():
                return Line(name[: gap.start()], mask, where)
        both = _TWO_COLUMNS.fullmatch(name)
        if both and not too_long:
            return Line(both.group(1), _mask(root, both.group(2)), where)
    if too_long:
        raise ValueError(f"{where}: {name[:60]!r} and what follows is longer than the name of a file; write one photograph a line")
    return Line(name, None, where)


def _mask(root: Path, text: str) -> Path:
    within = root / text.removeprefix("./").lstrip("/")
    return within if within.is_file() or not Path(text).is_file() else Path(text)


def listed_splits(
    lists: Mapping[str, list[Line]], images: Sequence[str], finder: PhotographFinder, missing: list[str], problems: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, Path]]:
    """The positions of the listed photographs.

    Args:
      lists: see `read_lists`.
      images: the photographs that have tags.
      finder: of all photographs.
      missing: gets a line for each photograph or mask that is not there.
      problems: gets a line for all else that is wrong.
    Returns:
      (dict from split to increasing positions, dict from photograph to the mask that a list names).
    """
    position, masks = {name: at for at, name in enumerate(images)}, {}
    splits: dict[str, np.ndarray] = {}
    of_split: dict[str, tuple[str, str]] = {}
    for split, lines in lists.items():
        rows = set()
        for line in lines:
            found = _listed(line, finder, position, missing, problems)
            if found is None:
                continue
            rows.add(position[found])
            other, where = of_split.setdefault(found, (split, line.where))
            if split in SPLITS and other in SPLITS and other != split:
                problems.append(f"{line.where}: {found!r} stands in {where} too; keep it in one")
            if line.mask is not None and line.mask.is_file() and not is_exact(line.mask.name):
                problems.append(f"{line.where}: the mask {line.mask} is in a format that does not keep labels exact; save masks as PNG")
            elif line.mask is not None and line.mask.is_file():
                masks[found] = line.mask
            elif line.mask is not None:
                hint = meant_path(line.mask) if len(missing) < MOST_HINTS else ""
                missing.append(f"{line.where}: there is no mask {line.mask}{hint}; add it or remove the line")
        splits[split] = np.array(sorted(rows), np.int64)
    return splits, masks


def set_aside(lines: Sequence[Line], images: Sequence[str], finder: PhotographFinder) -> np.ndarray:
    """The photographs of the list of the test split where another split is asked for: names that fit nothing are no matter.

    Args:
      lines: of its list.
      images: the photographs that have tags.
      finder: of all photographs.
    Returns:
      Their increasing positions.
    """
    position = {name: at for at, name in enumerate(images)}
    found = {position[name] for line in lines for name in finder.candidates(line.name) or _of_label(line, finder) if name in position}
    return np.array(sorted(found), np.int64)


def with_rest(
    splits: dict[str, np.ndarray], images: Sequence[str], chosen: Callable[[Sequence[str]], tuple[dict[str, np.ndarray], str]]
) -> tuple[dict[str, np.ndarray], str]:
    """What stands in no list belongs to train or val where that has no list; where neither has one it is divided.

    Args:
      splits: positions by the lists.
      images: the photographs.
      chosen: divides some of them, see `chosen_splits`.
    Returns:
      (dict from split to increasing positions, one line on photographs that are not used, or an empty string).
    """
    taken = {int(row) for name in (*SPLITS, TEST) for row in splits.get(name, ())}
    rest = np.array([row for row in range(len(images)) if row not in taken], np.int64)
    without = [name for name in SPLITS if name not in splits]
    lines = []
    if len(without) == len(SPLITS):
        parts, line = chosen([images[row] for row in rest])
        splits = splits | {name: np.union1d(rest[rows], splits.get(name, rest[:0])) for name, rows in parts.items()}
        lines.append(line)
    elif without and len(rest):
        test = rest[chosen([images[row] for row in rest])[0].get(TEST, rest[:0])]  # of folders of a test
        splits = splits | {without[0]: np.setdiff1d(rest, test), TEST: np.union1d(test, splits.get(TEST, test))}
    elif len(rest):
        lines.append(f"{len(rest)} photograph{'s stand' if len(rest) > 1 else ' stands'} in no list and {'are' if len(rest) > 1 else 'is'} "
                     f"not used: {some([images[row] for row in rest])}")  # fmt: skip
    if len(splits.get(TEST, ())):
        lines.append(f"{len(splits[TEST])} photographs are kept for the split {TEST!r}, out of training and validation")
    return splits, "; ".join(line for line in lines if line)


def _listed(line: Line, finder: PhotographFinder, position: Mapping, missing: list, problems: list) -> str | None:
    """The photograph of a line that has tags."""
    candidates = finder.candidates(line.name)
    if not candidates and (owner := _of_label(line, finder)):
        problems.append(f"{line.where}: a label stands behind the photograph in {line.name!r}; a list names photographs alone: write "
                        f"{owner[0]}, and its tags into tags.csv")  # fmt: skip
    elif not candidates:
        hint = finder.meant(line.name) if len(missing) < MOST_HINTS else ""
        missing.append(f"{line.where}: there is no photograph {line.name!r}{hint}; add it or remove the line")
    elif len(candidates) > 1:
        problems.append(f"{line.where}: {line.name!r} may be {some(candidates)}; write the whole path")
    elif candidates[0] not in position:
        problems.append(f"{line.where}: {candidates[0]!r} has no row in the tag file; add one, without tags if it shows none")
    else:
        return candidates[0]
    return None


def _of_label(line: Line, finder: PhotographFinder) -> list[str]:
    """The photograph of a line that has a label behind it: 'x.jpg 3', 'x.jpg dog'."""
    labelled = _LABELLED.fullmatch(line.name)
    return finder.candidates(labelled[1] or labelled[2]) if labelled else []


def chosen_splits(
    images: Sequence[str], with_mask: Mapping[str, Path], share: float, seed: int, *, of_folders: bool = False
) -> tuple[dict[str, np.ndarray], str]:
    """Splits by folder where there are folders train, val or test, else by chance among the photographs that have masks.

    Args:
      images: the photographs.
      with_mask: the masks of those that have one.
      share: of all photographs, that is the split val if so many have masks.
      seed: of the choice.
      of_folders: whether the folders are classes too: then a folder test beside others may be one.
    Returns:
      (dict from split to increasing positions, one line on photographs of other folders, or an empty string).
    """
    tops = _tops(images)
    splits = [split_of(top) for top in tops]
    named = {split for split in splits if split}
    if (of_folders and None in splits) or len(named) < 2 and (named != {TEST} or None not in splits):
        return _by_chance(range(len(images)), images, with_mask, share, seed), ""
    rows = {split: [at for at, name in enumerate(splits) if (name or "train") == split] for split in (*SPLITS, TEST)}
    beside = sorted({top or "none" for top, split in zip(tops, splits, strict=True) if split is None})
    line = f"photographs of other folders ({some(beside)}) belong to the split 'train'" if "train" in named and beside else ""
    parts = {split: np.array(found, np.int64) for split, found in rows.items() if found}
    if "val" not in named:
        parts |= _by_chance(rows["train"], images, with_mask, share, seed)
    return parts, line


def _tops(images: Sequence[str]) -> list[str]:
    """The first folder of each photograph, below the folders that all have in common and that name no split."""
    folders = [name.split("/")[:-1] for name in images]
    depth = 0
    while folders and len({tuple(parts[: depth + 1]) for parts in folders}) == 1 and len(folders[0]) > depth and not split_of(folders[0][depth]):
        depth += 1
    return [parts[depth] if len(parts) > depth else "" for parts in folders]


def _by_chance(rows: Sequence[int], images: Sequence[str], with_mask: Mapping[str, Path], share: float, seed: int) -> dict[str, np.ndarray]:
    order = sorted((images[row] for row in rows), key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    chosen = set([name for name in order if name in with_mask][: round(share * len(order))])
    return {split: np.array([row for row in rows if (images[row] in chosen) == (split == "val")], np.int64) for split in SPLITS}
