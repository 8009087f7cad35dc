"""What `experiments.predict` reads and writes: photographs and their outputs, what is done, and the records of it."""

import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import re
import stat
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.data.example import tag_vector
from lcrf_jax.data.files.finding import PhotographFinder
from lcrf_jax.data.files.images import MAX_PIXELS
from lcrf_jax.data.files.tags import read_tag_file
from lcrf_jax.machine.files import move_whole, naming, parsed_json, write_once, write_whole
from lcrf_jax.machine.locks import Locked, locked
from lcrf_jax.pictures.palette import overlay, save_index_png
from lcrf_jax.predict.resizing import class_statistics, labels_and_confidence
from lcrf_jax.predict.segmenter import begin_batch
from lcrf_jax.predict.tiling import segment_in_tiles

from .prediction_photographs import changed, moment, read_photograph, size_of
from .prediction_urls import SETTINGS_FILE, is_url, written_below

RECORDS = "predictions"
BATCH_PIXELS = 32_000_000
_JPEG_SIDE = 65_000  # the format has no larger pictures
# A name that the disk does not take, too long or with letters that it does not have, or a folder in its place.
OF_THE_NAME = (errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)


def remaining(share, out, settings, overwrite):
    """The photographs whose outputs are not all there; refuses to mix masks of different settings."""
    path, when = out / SETTINGS_FILE, written_in(out)
    if not overwrite and not path.exists() and any(when(outputs.mask) is not None for _, outputs in share):
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
    done = functools.partial(_is_done, when=when, since=settings_since(out))
    with concurrent.futures.ThreadPoolExecutor(32) if is_url(out) else contextlib.nullcontext() as pool:
        return [pair for pair, ready in zip(share, (pool.map if pool else map)(done, share), strict=True) if not ready]


def settings_since(out):
    """When the settings of a folder of masks were written, in nanoseconds: older masks are of others; 0 where there are none."""
    return written_in(out, alone=SETTINGS_FILE)(out / SETTINGS_FILE) or 0


def written_in(out, alone=""):
    """A function that tells when a file of `out` was written, in nanoseconds; None where there is none, or an empty one.

    Of a URL all files are listed at once, or one `alone`: to ask for each of a million would take hours.
    """
    if is_url(out):
        return written_below(out / alone if alone else out)

    def when(path):
        with contextlib.suppress(OSError):
            about = path.stat()
            if stat.S_ISREG(about.st_mode) and about.st_size:
                return about.st_mtime_ns
        return None

    return when


def without_masks(todo, out):
    """The masks of these photographs, by their paths within `out`, that are not there or are of other settings."""
    when, since = written_in(out), settings_since(out)
    return {str(outputs.mask.relative_to(out)) for _, outputs in todo if (when(outputs.mask) or -1) < since}


def _is_done(pair, when, since):
    photo, outputs = pair
    made = when(outputs.mask)
    if made is None or made < since:
        return False
    try:
        return changed(photo) <= made and all(path is None or when(path) is not None for path in outputs)
    except OSError:  # it is gone, which whoever reads it tells
        return False


def _stored(path):
    try:
        settings = parsed_json(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise TypeError("it holds no settings")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and use --overwrite") from error
    return settings


def _store(path, settings, overwrite):
    """Write the settings, unless another process was faster; with overwrite in any case."""
    with contextlib.nullcontext() if is_url(path) else naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    if is_url(path):
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    (write_whole if overwrite else write_once)(path, json.dumps(settings, indent=1) + "\n")


class Records:
    """A JSON line for each photograph that is done, in predictions.jsonl, or in a file for each of several processes.

    The line is written before the mask, so that a mask that is there has its line. Of a mask that is made again the line before
    goes when the new one is there: at the end, or, of a process that was killed, at the next beginning. While it is open nobody else
    writes that file.

    Args:
      out: folder of the masks.
      process: (number, count) of the process.
      todo: pairs of photograph and Outputs that are about to be made.

    Raises:
      Locked: if another process writes the file.
    """

    def __init__(self, out, process, todo):
        number, count = process
        self.path = out / (f"{RECORDS}.jsonl" if count == 1 else f"{RECORDS}.{number}-of-{count}.jsonl")
        masks = {str(outputs.mask.relative_to(out)) for _, outputs in todo}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_alone(self.path))
            _keep_lines(self.path, without_masks(todo, out))
            for other in out.glob(f"{RECORDS}*.jsonl"):
                others = re.fullmatch(rf"{RECORDS}(?:\.\d+-of-(\d+))?", other.stem)
                # What so many processes, more or fewer, have written before; this one writes its lines anew.
                if others and int(others[1] or 1) != count and not masks.isdisjoint(_lines(_content(other))):
                    with _alone(other, seconds=10):
                        _keep_lines(other, masks)
            with naming(self.path):
                self._file = stack.enter_context(self.path.open("a", encoding="utf-8"))
            self._open = stack.pop_all()

    def write(self, record):
        """Add the line of a photograph, see `record_of`."""
        line = json.dumps(record, ensure_ascii=False)
        if any("\ud800" <= letter <= "\udfff" for letter in line):  # a file name that is no UTF-8
            line = json.dumps(record)
        with naming(self.path):
            self._file.write(line + "\n")
            self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._open, contextlib.suppress(OSError):  # a full disk, which `write` has told of
            self._file.close()
            _keep_lines(self.path, ())


@contextlib.contextmanager
def _alone(path, seconds=0):
    """Nobody else writes a file of records; who does is waited for so long."""
    lock, until = path.with_name(f".{path.name}.lock"), time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(lock))
                break
            except Locked:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        stack.callback(functools.partial(lock.unlink, missing_ok=True))
        yield


def _keep_lines(path, gone):
    """Leave of a file of records what can be read, one line for each mask, and none for those that are gone."""
    content = _content(path)
    text = "".join(f"{line}\n" for mask, line in _lines(content).items() if mask not in gone)
    if text.encode() != content:
        write_whole(path, text)


def _content(path):
    """The bytes of a file of records, none where it is not there."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and records are to be written there; move it away")
    with naming(path):
        return path.read_bytes() if path.exists() else b""


def _lines(content):
    """dict from each mask to its line, the last one if there are several; lines that were cut short or damaged are left out."""
    read = ((_mask_of(line), line) for line in content.split(b"\n"))
    return {mask: line.decode() for mask, line in read if mask is not None}


def record_of(photo, mask, labels, confidence, class_names, **facts):
    """What is told of a photograph: its size, and the area and the confidence of each class that is there.

    Args:
      photo: its path.
      mask: path of its mask within the folder of masks.
      labels: [H, W] uint8.
      confidence: [H, W] float16.
      class_names: names of the K classes.
      facts: more of it.

    Returns:
      dict.
    """
    counts, sums = class_statistics(labels, confidence, len(class_names))
    classes = {
        name: {"area": round(int(count) / labels.size, 6), "confidence": round(float(total) / int(count), 4)}
        for name, count, total in zip(class_names, counts, sums) if count
    }  # fmt: skip
    return {
        "image": str(photo), "mask": str(mask), "width": labels.shape[1], "height": labels.shape[0],
        "classes": classes, "confidence": round(float(sums.sum()) / labels.size, 4), **facts,
    }  # fmt: skip


def begin_labelling(segmenter, images, tags, workers, *, crf, tile, batch_size):
    """The labels of each image of a batch, in tiles where it is larger than these; what is no tile goes on in the background.

    Args:
      segmenter: lcrf_jax.predict.segmenter.Segmenter.
      images: list of [H, W, 3] uint8 RGB.
      tags: list of [K] bool, the classes that may occur in each, or None.
      workers: of `lcrf_jax.predict.segmenter.image_workers`.
      crf: whether to refine.
      tile: side of the tiles in pixels, or None.
      batch_size: images that the network sees at once.

    Returns:
      Iterator of ([H, W] labels, [H, W] confidence, log-probabilities or None), each waited for when it is asked for.
    """
    in_tiles = [tile is not None and max(image.shape[:2]) > tile for image in images]
    whole = [at for at, tiled in enumerate(in_tiles) if not tiled]
    found = iter(())
    if whole:
        given = None if tags is None else [tags[at] for at in whole]
        found = begin_batch(segmenter, [images[at] for at in whole], workers, crf=crf, batch_size=batch_size, tags=given)

    def result(at):
        if in_tiles[at]:
            given = None if tags is None else tags[at]
            return *segment_in_tiles(segmenter, images[at], tile=tile, crf=crf, tags=given, batch_size=batch_size), None
        log_probs = next(found)
        return *labels_and_confidence(log_probs.best_log_probs, log_probs.size), log_probs.best_log_probs

    return map(result, range(len(images)))


def _mask_of(line):
    """The mask that a line is about, None if the line was cut short or is damaged."""
    try:
        mask = parsed_json(line.decode())["mask"]
    except (ValueError, KeyError, TypeError):
        return None
    return mask if isinstance(mask, str) else None


def write_outputs(outputs, unfinished, image, labels, log_probs, class_names, read=None):
    """Write the files of one photograph elsewhere and rename them, the mask last: a killed run leaves none half-written.

    They are dated to when the photograph was `read`, in nanoseconds: one that was replaced meanwhile is newer than its mask.

    Returns why they could not be written, if that is only so for this photograph, such as a name that the disk does not
    take; else None.
    """

    def moved(path, write):
        temporary = unfinished / f"half{path.suffix}"
        with naming(path):
            write(temporary)
            if read is not None:
                os.utime(temporary, ns=(read, read))
            path.parent.mkdir(parents=True, exist_ok=True)
            move_whole(temporary, path)

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


class Batch(NamedTuple):
    """Photographs that are read.

    Attributes:
      outputs: dict from each photograph to its Outputs.
      images: dict from those that could be read to [H, W, 3] uint8.
      failures: dict from the others to what is wrong with them.
      read: dict from those of `images` to when they were read, see `prediction_photographs.moment`.
    """

    outputs: dict
    images: dict
    failures: dict
    read: dict


def batches(todo, size, since=0):
    """A `Batch` after the other; the next one is read meanwhile.

    A batch has at most `size` photographs, and fewer where these are large. `since` is that of `settings_since`.
    """
    with concurrent.futures.ThreadPoolExecutor(2) as pool, concurrent.futures.ThreadPoolExecutor(1) as ahead:
        parts = _parts(todo, size)
        part = next(parts, None)
        reading = part and ahead.submit(_read, pool, part, since)
        while part:
            batch = reading.result()
            part = next(parts, None)
            reading = part and ahead.submit(_read, pool, part, since)
            yield batch


def _parts(todo, size):
    part, pixels = [], 0
    for photo, outputs in todo:
        try:
            height, width = size_of(photo)
        except (ValueError, OSError):
            height, width = 0, 0  # `_read` tells what is wrong
        if part and (len(part) == size or pixels + height * width > BATCH_PIXELS):
            yield part
            part, pixels = [], 0
        part.append((photo, outputs))
        pixels += min(height * width, MAX_PIXELS)
    if part:
        yield part


def _read(pool, part, since):
    outputs = dict(part)
    read = {photo: moment(photo, since) for photo in outputs}
    results = dict(zip(outputs, pool.map(read_photograph, outputs), strict=True))
    failures = {photo: result for photo, result in results.items() if isinstance(result, str)}
    images = {photo: result for photo, result in results.items() if photo not in failures}
    return Batch(outputs, images, failures, {photo: read[photo] for photo in images})


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
