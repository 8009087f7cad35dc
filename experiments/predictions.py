"""What `experiments.predict` reads and writes: photographs and their outputs, what is done, and the records of it."""

import concurrent.futures
import contextlib
import errno
import fnmatch
import functools
import glob
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.data.example import tag_vector
from lcrf_jax.data.files.finding import PhotographFinder, files_below, is_system_folder, meant_path, not_taken, there
from lcrf_jax.data.files.images import MAX_PIXELS, image_size, read_image
from lcrf_jax.data.files.tags import TAG_FILES, read_tag_file, read_text
from lcrf_jax.machine.files import naming, write_once, write_whole
from lcrf_jax.machine.locks import own_folder
from lcrf_jax.machine.progress import say
from lcrf_jax.pictures.palette import overlay, save_index_png
from lcrf_jax.predict.resizing import class_statistics

SETTINGS_FILE = "predictions.json"
RECORDS = "predictions"
BATCH_PIXELS = 32_000_000
_JPEG_SIDE = 65_000  # the format has no larger pictures
# A name that the disk does not take, too long or with letters that it does not have, or a folder in its place.
OF_THE_NAME = (errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


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


def planned_outputs(patterns, out, *, overlays, probabilities):
    """Pairs of photograph and Outputs, refusing two photographs with one mask, and masks in place of photographs.

    Args:
      patterns: files, folders (with all photographs at any depth) and patterns of file names.
      out: folder of the masks.
      overlays, probabilities: whether these are wanted.

    Returns:
      List in the order of the photographs' paths. The path of a mask within `out` is that of its photograph within the
      folder that was given, the fixed part of the pattern, or what these have in common.
    """
    roots, found, out, real = [], {}, pathlib.Path(out), functools.cache(os.path.realpath)
    for pattern in patterns:
        root, paths, untaken = _photographs(os.path.expanduser(pattern), out)
        if not paths:
            raise FileNotFoundError(f"--images: no file fits the pattern {pattern!r}{_instead(pattern, untaken)}")
        if untaken:
            say(f"{pattern}: {untaken}")
        roots.append(root)
        for path in paths:  # a pattern may go through a link and come to the same file twice
            found.setdefault((real(path.parent), path.name), path)
    found = set(found.values())
    root, photographs = pathlib.Path(os.path.commonpath(roots)), {path.resolve() for path in found}
    outputs, taken = [], {}
    for path in sorted(found):
        name = path.absolute().relative_to(root)
        mask = out / name.with_suffix(".png")
        if mask.resolve() in photographs:
            raise ValueError(f"the mask of {path} would be written over the photograph {mask}: give another --out")
        if mask in taken:
            raise ValueError(
                f"{taken[mask]} and {path} would both be written to {mask}: predict them one pattern at a time"
            )
        taken[mask] = path
        outputs.append((path, Outputs(
            mask,
            out / "overlays" / name.with_suffix(".jpg") if overlays else None,
            out / "probabilities" / name.with_suffix(".npz") if probabilities else None,
        )))  # fmt: skip
    _refuse_doubles(taken, out)
    return outputs


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
        name = line.strip().split(" /")[0].lstrip("/")  # "/JPEGImages/ID.jpg /MASKS/ID.png", as some projects have it
        if not name:
            continue
        candidates = finder.candidates(name)
        if len(candidates) != 1:
            found = f"may be {', '.join(candidates[:3])}" if candidates else f"is not among --images{finder.meant(name)}"
            raise ValueError(f"{path}, line {number}: {name!r} {found}; correct the list")
        wanted.add(names[candidates[0]])
    if not wanted:
        raise ValueError(f"{path} names no photograph; write one a line")
    return [(photo, outputs) for photo, outputs in planned if photo in wanted]


def _photographs(pattern, out):
    """(the folder that paths are told from, photographs, a line on what is not taken) of a file, a folder or a pattern."""
    if os.path.isfile(pattern):  # a file may be named photo[1].jpg
        path = pathlib.Path(pattern)
        return path.absolute().parent, [path], ""
    if os.path.isdir(pattern):
        return _below(pattern, out)
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


def _below(pattern, out):
    """The same of a folder: none that are masks of a training folder, or what was written by this program."""
    folder, own = pathlib.Path(pattern).absolute(), (*TAG_FILES, "classes.txt", "colours.csv", "train.txt", "val.txt")
    masks = there(folder, "masks") if any(there(folder, name) for name in own) else None
    left = {os.path.realpath(path) for path in (masks, out) if path is not None}

    def written_here(place):
        return os.path.exists(os.path.join(place, SETTINGS_FILE)) and place != os.path.realpath(folder)

    found = files_below(folder, leave=lambda place: place in left or written_here(place))
    names = {path.name for name in own if (path := there(folder, name))} | {SETTINGS_FILE}
    line = not_taken(found, own=names)
    if masks is not None and masks.name in found.left:
        line = "; ".join(part for part in (line, f"{masks.name}/ holds the masks of the training folder and is left out") if part)
    return folder, [pathlib.Path(pattern) / path for path in found.photographs], line


def _of_system(path, folder):
    """Whether a file that fits a pattern is one of the system, by a folder that the pattern does not name."""
    parts = path.absolute().relative_to(folder).parts
    return any(is_system_folder(part) for part in parts[:-1]) or parts[-1].startswith("._")


def _instead(pattern, untaken):
    """What is there where nothing fits."""
    return f" ({untaken})" if untaken else "" if glob.has_magic(pattern) else meant_path(os.path.expanduser(pattern))


def remaining(share, out, settings, overwrite):
    """The photographs whose outputs are not all there; refuses to mix masks of different settings."""
    path = out / SETTINGS_FILE
    if not overwrite and not path.exists() and any(outputs.mask.exists() for _, outputs in share):
        raise ValueError(f"{out} holds masks of unknown origin; give another --out, or --overwrite to replace them")
    if not path.exists() or overwrite and _stored(path) != settings:
        _store(path, settings, overwrite)
    before = _stored(path)
    if before != settings:
        changed = ", ".join(f"{name} {before.get(name)!r} and not {settings[name]!r}"
                            for name in settings if before.get(name) != settings[name])  # fmt: skip
        raise ValueError(f"{out} holds masks made with {changed}; give another --out, or --overwrite to replace them")
    if overwrite:
        return share
    since = path.stat().st_mtime  # older masks are of the settings before
    return [(photo, outputs) for photo, outputs in share if not _is_done(photo, outputs, since)]


def _is_done(photo, outputs, since):
    mask = outputs.mask
    if not mask.exists() or mask.stat().st_mtime < max(since, photo.stat().st_mtime):
        return False
    return all(path is None or path.exists() for path in outputs)


def _stored(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and use --overwrite") from error


def _store(path, settings, overwrite):
    """Write the settings, unless another process was faster; with overwrite in any case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (write_whole if overwrite else write_once)(path, json.dumps(settings, indent=1) + "\n")


class Records:
    """A JSON line for each photograph that is done, in predictions.jsonl, or in a file for each of several processes.

    The line is written before the mask, so that a mask that is there has its line. Lines of masks that are about to be
    made again are removed.

    Args:
      out: folder of the masks.
      process: (number, count) of the process.
      todo: pairs of photograph and Outputs that are about to be made.
    """

    def __init__(self, out, process, todo):
        number, count = process
        self.path = out / (f"{RECORDS}.jsonl" if count == 1 else f"{RECORDS}.{number}-of-{count}.jsonl")
        self._out, again = out, {str(outputs.mask.relative_to(out)) for _, outputs in todo}
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").split("\n") if _mask_of(line) not in again | {None}]
            write_whole(self.path, "".join(f"{line}\n" for line in kept))
        with naming(self.path):
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, photo, outputs, labels, confidence, class_names, **facts):
        """Add the line of a photograph: size, and area and confidence of each class that is there."""
        counts, sums = class_statistics(labels, confidence, len(class_names))
        classes = {
            name: {"area": round(int(count) / labels.size, 6), "confidence": round(float(total) / int(count), 4)}
            for name, count, total in zip(class_names, counts, sums) if count
        }  # fmt: skip
        record = {
            "image": str(photo), "mask": str(outputs.mask.relative_to(self._out)), "width": labels.shape[1],
            "height": labels.shape[0], "classes": classes, "confidence": round(float(sums.sum()) / labels.size, 4), **facts,
        }  # fmt: skip
        line = json.dumps(record, ensure_ascii=False)
        if any("\ud800" <= letter <= "\udfff" for letter in line):  # a file name that is no UTF-8
            line = json.dumps(record)
        with naming(self.path):
            self._file.write(line + "\n")
            self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):  # a full disk, which `write` has told of
            self._file.close()


def _mask_of(line):
    """The mask that a line is about, None if the line was cut short."""
    try:
        return json.loads(line)["mask"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def write_outputs(outputs, unfinished, image, labels, log_probs, class_names):
    """Write the files of one photograph elsewhere and rename them, the mask last: a killed run leaves none half-written.

    Returns why they could not be written, if that is only so for this photograph, such as a name that the disk does not
    take; else None.
    """

    def moved(path, write):
        temporary = unfinished / f"half{path.suffix}"
        with naming(path):
            write(temporary)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)

    try:
        _write(outputs, moved, image, labels, log_probs, class_names)
    except OSError as error:
        # Some disks say of such a name that there is no such file.
        there = outputs.mask.parent.is_dir() and unfinished.is_dir()
        if error.errno not in OF_THE_NAME and not (error.errno == errno.ENOENT and there):
            raise
        return f"its mask cannot be written ({os.strerror(error.errno)}: {error.filename}); rename it or give another --out"
    return None


def _write(outputs, moved, image, labels, log_probs, class_names):

    if outputs.overlay is not None:
        picture = Image.fromarray(overlay(image, labels))
        picture.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
        moved(outputs.overlay, lambda path: picture.save(path, format="JPEG", quality=90))
    if outputs.probabilities is not None:
        probs = np.exp(log_probs).astype(np.float16)
        moved(outputs.probabilities, lambda path: np.savez_compressed(path, probabilities=probs, class_names=class_names))
    moved(outputs.mask, lambda path: save_index_png(path, labels))


def batches(todo, size):
    """(pairs of photograph and Outputs, images, failures) of each batch; the next one is read meanwhile.

    A batch has at most `size` photographs, and fewer where these are large.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool, concurrent.futures.ThreadPoolExecutor(1) as ahead:
        parts = _parts(todo, size)
        part = next(parts, None)
        reading = part and ahead.submit(_read, pool, part)
        while part:
            images, failures = reading.result()
            following = next(parts, None)
            reading = following and ahead.submit(_read, pool, following)
            yield dict(part), images, failures
            part = following


def _parts(todo, size):
    part, pixels = [], 0
    for photo, outputs in todo:
        try:
            height, width = image_size(photo)
        except (ValueError, OSError):
            height, width = 0, 0  # `_read` tells what is wrong
        if part and (len(part) == size or pixels + height * width > BATCH_PIXELS):
            yield part
            part, pixels = [], 0
        part.append((photo, outputs))
        pixels += min(height * width, MAX_PIXELS)
    if part:
        yield part


def _read(pool, part):
    """(images that can be read, {path: error} of the others)."""

    def one(photo):
        try:
            return read_image(photo)
        except (ValueError, OSError) as error:
            return str(error)
        except MemoryError:
            return "there is not enough memory for it; scale it down or cut it into pieces"

    results = {photo: result for (photo, _), result in zip(part, pool.map(one, [photo for photo, _ in part]))}
    failures = {photo: result for photo, result in results.items() if isinstance(result, str)}
    return {photo: result for photo, result in results.items() if photo not in failures}, failures


def known_tags(path, photographs, class_names):
    """The tags of photographs, as a tag file has them.

    Args:
      path: tag file, see `lcrf_jax.data.files.tags`; photographs are named by their paths, or by the ends of these where there
        is no doubt.
      photographs: their paths.
      class_names: names of the K classes.

    Returns:
      dict from path to [K] bool; photographs without a row are not in it.
    """
    names = {path.as_posix(): path for path in photographs}
    finder, found = PhotographFinder(names), {}
    for image, row in read_tag_file(path).items():
        try:
            vector = tag_vector(row.tags, class_names)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}; correct the tag") from None
        candidates = finder.candidates(image)
        if len(candidates) > 1:
            raise ValueError(f"{row.where}: {image!r} may be {', '.join(candidates[:3])}; write the whole path")
        if candidates:
            found[names[candidates[0]]] = vector
    return found
