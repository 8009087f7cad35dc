"""The lists of splits of a folder, and the splits that are chosen where there is none.

A line names a photograph, or a photograph and its mask: ``/JPEGImages/x.jpg /SegmentationClassAug/x.png``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lcrf_jax.data.files.finding import PhotographFinder, meant_path, there
from lcrf_jax.data.files.mask_names import is_exact
from lcrf_jax.data.files.tags import read_text, some

SPLITS = ("train", "val")
MOST_HINTS = 20
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


def read_lists(root: Path, names: Sequence[str]) -> dict[str, list[Line]]:
    """The lists that a folder has.

    Args:
      root: the folder.
      names: of the splits that may have one.
    Returns:
      dict from split to the lines of its list that are not empty.
    Raises:
      ValueError: if a list is no UTF-8 text.
    """
    lists = {}
    for name in dict.fromkeys(names):
        path = there(root, f"{name}.txt")
        if path is not None and path.is_file():
            lines = enumerate(read_text(path).split("\n"), 1)
            lists[name] = [_line(text.strip(), root, f"{path}, line {number}") for number, text in lines if text.strip()]
    return lists


def _line(text: str, root: Path, where: str) -> Line:
    """One column or two: a second one is a file that is there, or both are names of files."""
    text = text.replace("\\", "/").removeprefix("./")
    name = text.lstrip("/")
    if re.search(r"[\s,;]", name) and not (root / name).is_file():
        for gap in re.finditer(r"[\s,;]+", name):
            mask = _mask(root, name[gap.end() :])
            if gap.start() and mask.is_file():
                return Line(name[: gap.start()], mask, where)
        both = _TWO_COLUMNS.fullmatch(name)
        if both:
            return Line(both.group(1), _mask(root, both.group(2)), where)
    return Line(name, None, where)


def _mask(root: Path, text: str) -> Path:
    within = root / text.removeprefix("./").lstrip("/")
    return within if within.is_file() or not Path(text).is_file() else Path(text)


def listed_splits(
    lists: Mapping[str, list[Line]], images: Sequence[str], finder: PhotographFinder, missing: list[str], problems: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, Path]]:
    """The positions of the listed photographs; what is not listed belongs to train or val where that has no list.

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
                missing.append(f"{line.where}: there is no mask {line.mask}{meant_path(line.mask)}; add it or remove the line")
        splits[split] = np.array(sorted(rows), np.int64)
    taken = {row for name in SPLITS for row in splits.get(name, ())}
    rest = np.array([row for row in range(len(images)) if row not in taken], np.int64)
    for split in SPLITS:
        if split not in splits and len(rest):
            splits[split] = rest
            break
    return splits, masks


def _listed(line: Line, finder: PhotographFinder, position: Mapping, missing: list, problems: list) -> str | None:
    """The photograph of a line that has tags."""
    candidates = finder.candidates(line.name)
    if not candidates:
        hint = finder.meant(line.name) if len(missing) < MOST_HINTS else ""
        missing.append(f"{line.where}: there is no photograph {line.name!r}{hint}; add it or remove the line")
    elif len(candidates) > 1:
        problems.append(f"{line.where}: {line.name!r} may be {some(candidates)}; write the whole path")
    elif candidates[0] not in position:
        problems.append(f"{line.where}: {candidates[0]!r} has no row in the tag file; add one, without tags if it shows none")
    else:
        return candidates[0]
    return None


def chosen_splits(images: Sequence[str], with_mask: Mapping[str, Path], share: float, seed: int) -> dict[str, np.ndarray]:
    """Splits by folder where there are folders train and val, else by chance among the photographs that have masks.

    Args:
      images: the photographs.
      with_mask: the masks of those that have one.
      share: of all photographs, that is the split val if so many have masks.
      seed: of the choice.
    Returns:
      dict from split to increasing positions.
    """
    top = [name.split("/", 1)[0] if "/" in name else "" for name in images]
    if set(top) == set(SPLITS):
        return {split: np.flatnonzero(np.array(top) == split) for split in SPLITS}
    order = sorted(images, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    chosen = set([name for name in order if name in with_mask][: round(share * len(images))])
    is_val = np.array([name in chosen for name in images], bool)
    return {"train": np.flatnonzero(~is_val), "val": np.flatnonzero(is_val)}
