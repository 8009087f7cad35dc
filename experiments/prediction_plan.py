"""Which photographs `experiments.predict` labels, and where their outputs go: files, folders, patterns and lists."""

import fnmatch
import functools
import glob
import os
import pathlib
import re
import types
from typing import NamedTuple

from lcrf_jax.data.files.finding import (
    PhotographFinder,
    files_below,
    is_system_folder,
    known_formats,
    meant_path,
    not_taken,
)
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.mask_names import folders_of_training, left_out, masks_among, of_training, told
from lcrf_jax.data.files.tags import read_text
from lcrf_jax.machine.locks import own_folder
from lcrf_jax.machine.progress import say

from .prediction_photographs import containers_below, is_container, photographs_in
from .predictions import SETTINGS_FILE


class Outputs(NamedTuple):
    """The files that are written for one photograph; None for what is not wanted.

    Attributes:
      mask: PNG of class indices.
      overlay: JPEG of the photograph with its mask in colour.
      probabilities: NPZ of the probabilities of all classes.
    """

    mask: pathlib.Path
    overlay: pathlib.Path | None
    probabilities: pathlib.Path | None


def outputs_for(out, name, *, overlays, probabilities):
    """The Outputs of a photograph, or of a mask, of this name within `out`."""
    return Outputs(
        out / name.with_suffix(".png"),
        out / "overlays" / name.with_suffix(".jpg") if overlays else None,
        out / "probabilities" / name.with_suffix(".npz") if probabilities else None,
    )


def planned_outputs(patterns, out, *, overlays, probabilities, data=types.MappingProxyType({})):
    """Pairs of photograph and Outputs, refusing two photographs with one mask, and masks in place of photographs.

    Args:
      patterns: files, folders (with all photographs at any depth), patterns of file names, shards and tables, see `prediction_photographs`.
      out: folder of the masks.
      overlays, probabilities: whether these are wanted.
      data: what the run was trained on: its folder of masks is known by that, whatever its name is.

    Returns:
      List in the order of the photographs' paths. The path of a mask within `out` is that of its photograph within the
      folder that was given, the fixed part of the pattern, or what these have in common.
    """
    roots, found, within, out, real = [], {}, set(), pathlib.Path(out), functools.cache(os.path.realpath)
    for pattern in patterns:
        if is_container(os.path.expanduser(pattern)):
            root, paths = photographs_in(os.path.expanduser(pattern))
            if not paths:
                raise FileNotFoundError(f"--images: {pattern} holds no photographs")
            roots.append(root)
            found |= {(real(path.parent), path.name): path for path in paths}
            within |= {path for path in paths if not is_photograph(path.name)}
            continue
        root, paths, untaken = _photographs(os.path.expanduser(pattern), out, data)
        if not paths:
            fault = f"no file fits the pattern {pattern!r}"
            if os.path.isdir(os.path.expanduser(pattern)):
                fault = f"{pattern} holds no photographs ({known_formats()}), at any depth"
                untaken = containers_below(pattern) or untaken
            raise FileNotFoundError(f"--images: {fault}{_instead(pattern, untaken)}")
        if untaken:
            say(f"{pattern}: {untaken}")
        roots.append(root)
        for path in _without_masks(pattern, root, _not_of_training(pattern, root, paths, data)):  # a pattern may go through a link and come to the same file twice
            found.setdefault((real(path.parent), path.name), path)
    found = set(found.values())
    root, photographs = pathlib.Path(os.path.commonpath(roots)), set(map(os.path.realpath, found))
    outputs, taken = [], {}
    for path in sorted(found):
        name = path.absolute().relative_to(root)
        if path in within:  # sources call photographs by names without an extension, which may have a dot
            name = name.with_name(f"{name.name}.png")
        mask = (out / name).with_suffix(".png")
        if os.path.realpath(mask) in photographs:
            raise ValueError(f"the mask of {path} would be written over the photograph {mask}: give another --out")
        if mask in taken:
            raise ValueError(
                f"{taken[mask]} and {path} would both be written to {mask}: predict them one pattern at a time"
            )
        taken[mask] = path
        outputs.append((path, outputs_for(out, name, overlays=overlays, probabilities=probabilities)))
    _refuse_doubles(taken, out)
    return outputs


def _not_of_training(pattern, root, paths, data):
    """The paths without those in the folder of masks that the run was trained with, unless these alone are asked for."""
    masks = folders_of_training(root, data)
    if not masks or any(os.path.realpath(root) == place or _is_below(os.path.realpath(root), place) for place in masks):
        return paths
    real = functools.cache(os.path.realpath)
    kept = [path for path in paths if not any(place == real(path.parent) or _is_below(real(path.parent), place) for place in masks)]
    if not kept or len(kept) == len(paths):
        return paths
    say(f"{pattern}: {len(paths) - len(kept)} files in {', '.join(sorted(masks))}, which holds the masks of training, are left out")
    return kept


def _is_below(path, folder):
    return path.startswith(os.path.join(folder, ""))


def _without_masks(pattern, root, paths):
    """The paths without those that are masks by their names, see `lcrf_jax.data.files.mask_names`; that is told."""
    names = {path.absolute().relative_to(root).as_posix(): path for path in paths} if len(paths) > 1 else {}
    masks = masks_among(list(names))
    if not masks:
        return paths
    say(f"{pattern}: {told(masks)}")
    out = left_out(names, masks)
    return [path for name, path in names.items() if name not in out]


def _refuse_doubles(taken, out):
    """Refuse masks that differ by the case of letters alone on a disk that does not tell it: one would replace the other."""
    folded = {}
    for mask, path in taken.items():
        other, at = folded.setdefault(str(mask).casefold(), (path, mask))
        if at == mask:
            continue
        with own_folder(out, ".unfinished-") as folder:
            (folder / "case").touch()
            if not (folder / "CASE").exists():
                return
        raise ValueError(f"{other} and {path} would both be written to {mask}, whose disk does not tell upper from lower case: "
                         "rename one, or give an --out on another disk")


def chosen(planned, path):
    """Those of the planned photographs that a list names.

    Args:
      planned: pairs of photograph and Outputs.
      path: text file, one photograph a line: its path, or the end of it, with or without the extension.

    Returns:
      List of pairs, in the order of `planned`.
    """
    names = {photo.as_posix(): photo for photo, _ in planned}
    finder, wanted = PhotographFinder(names), set()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        name = line.strip().replace("\\", "/").lstrip("/")
        if not name:
            continue
        columns = (name[: gap.start()] for gap in re.finditer(r"[\s,;]+", name))  # "/JPEGImages/ID.jpg /MASKS/ID.png"
        candidates = finder.candidates(name) or next(filter(None, map(finder.candidates, columns)), [])
        if len(candidates) != 1:
            found = f"may be {', '.join(candidates[:3])}" if candidates else f"is not among --images{finder.meant(name)}"
            raise ValueError(f"{path}, line {number}: {name!r} {found}; correct the list")
        wanted.add(names[candidates[0]])
    if not wanted:
        raise ValueError(f"{path} names no photograph; write one a line")
    return [(photo, outputs) for photo, outputs in planned if photo in wanted]


def _photographs(pattern, out, data):
    """(the folder that paths are told from, photographs, a line on what is not taken) of a file, a folder or a pattern."""
    if os.path.isfile(pattern):  # a file may be named photo[1].jpg
        path = pathlib.Path(pattern)
        return path.absolute().parent, [path], ""
    if os.path.isdir(pattern):
        return _below(pattern, out, data)
    parts = pathlib.Path(pattern).absolute().parts
    fixed = next((at for at, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    folder = pathlib.Path(*parts[:fixed])
    if "**" in parts:  # glob goes round in circles of links
        names = [path for path in files_below(folder).files if _fits(path.split("/"), parts[fixed:])]
        return folder, [_as_given(folder / name, pattern) for name in names], ""
    found = [name for name in glob.glob(pattern) if not _of_system(pathlib.Path(name), folder)]
    paths = [pathlib.Path(name) for name in found if os.path.isfile(name)]
    others = sum(not os.path.isfile(name) and not os.path.isdir(name) for name in found)
    return folder, paths, f"{others} matches are no files and not taken" if others else ""


def _fits(names, parts):
    """Whether a path, name by name, fits a pattern; ** stands for any number of folders."""
    if not parts:
        return not names
    if parts[0] == "**":
        return any(_fits(names[skipped:], parts[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _as_given(path, pattern):
    """A path in the form of its pattern: absolute or not."""
    return path if os.path.isabs(pattern) else pathlib.Path(os.path.relpath(path))


def _below(pattern, out, data):
    """The same of a folder: none that are masks of a training folder, or what was written by this program."""
    folder = pathlib.Path(pattern).absolute()
    masks = folders_of_training(folder, data) - {os.path.realpath(folder)}
    left = masks | {os.path.realpath(out)}

    def written_here(place):
        return os.path.exists(os.path.join(place, SETTINGS_FILE)) and place != os.path.realpath(folder)

    found = files_below(folder, leave=lambda place: place in left or written_here(place))
    lines = [not_taken(found, own={path.name for path in of_training(folder).values()} | {SETTINGS_FILE})]
    lines += [f"{name}/ holds the masks of the training folder and is left out"
              for name in found.left if os.path.realpath(folder / name) in masks]  # fmt: skip
    return folder, [pathlib.Path(pattern) / path for path in found.photographs], "; ".join(line for line in lines if line)


def _of_system(path, folder):
    """Whether a file that fits a pattern is one of the system, by a folder that the pattern does not name."""
    parts = path.absolute().relative_to(folder).parts
    return any(is_system_folder(part) for part in parts[:-1]) or parts[-1].startswith("._")


def _instead(pattern, untaken):
    """What is there where nothing fits."""
    return f" ({untaken})" if untaken else "" if glob.has_magic(pattern) else meant_path(os.path.expanduser(pattern))
