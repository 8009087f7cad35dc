"""Checks of a source before training: can its photographs and masks be read, and is anything odd about them."""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lcrf_jax.data.example import VOID, PartOfSource, Source
from lcrf_jax.data.files.images import image_size

MODES = ("error", "skip")
_SHOWN = 20


class Reading(NamedTuple):
    """What was found when an example was read.

    Attributes:
      size: (height, width) in pixels, or None if it cannot be read.
      digest: of the pixels; equal for equal pictures.
      labels: class indices in the mask without void, empty without a mask.
      problem: why it cannot be read, or None.
    """

    size: tuple[int, int] | None
    digest: bytes
    labels: tuple[int, ...]
    problem: str | None


class Usable(NamedTuple):
    """The part of a source that can be read.

    Attributes:
      source: the source, or a part of it.
      left_out: one line for each example that was left out.
      doubts: of `mask_doubts`, where masks were read.
    """

    source: Source
    left_out: list[str]
    doubts: list[str]


def read_all(
    source: Source, *, num_threads: int = 4, progress: Callable[[int], None] | None = None
) -> list[Reading]:
    """Read every example of a source once, in parallel.

    Args:
      source: the source.
      num_threads: threads that read.
      progress: called with 1 after each example.
    Returns:
      A Reading of each example, in order.
    Raises:
      OSError: if the disk fails; what is wrong with a single file is in its Reading.
    """

    def one(index):
        try:
            example = source[index]
        except (ValueError, FileNotFoundError, PermissionError) as error:
            return Reading(None, b"", (), str(error))
        labels = () if example.mask is None else tuple(int(k) for k in np.unique(example.mask) if k != VOID)
        digest = hashlib.blake2b(np.ascontiguousarray(example.image), digest_size=16).digest()
        return Reading(example.image.shape[:2], digest, labels, None)

    return _in_parallel(one, len(source), num_threads, progress)


def head_problems(source: Source, *, num_threads: int = 4) -> list[str]:
    """What is wrong with the heads of the photographs' files, without decoding them.

    Args:
      source: the source; one that has no ``paths`` has no problems.
      num_threads: threads that read.
    Returns:
      One line for each file that is missing, empty, no image or too large.
    """
    paths = getattr(source, "paths", ())

    def one(index):
        try:
            image_size(paths[index])
        except (ValueError, FileNotFoundError, PermissionError) as error:
            return str(error)
        return None

    return [problem for problem in _in_parallel(one, len(paths), num_threads, None) if problem]


def usable(
    source: Source, on_bad_image: str, *, decode: bool, progress: Callable[[int], None] | None = None
) -> Usable:
    """The source, or the part of it that can be read, so that training does not fail on a bad file hours later.

    Args:
      source: the source; one without ``paths`` is taken as it is.
      on_bad_image: ``error`` refuses the source if a file is bad. ``skip`` decodes every file and leaves bad ones out.
      decode: whether ``error`` decodes every file as well; otherwise only the heads of files are looked at.
      progress: called with 1 after each example that is decoded.
    Returns:
      Usable.
    Raises:
      ValueError: if on_bad_image is not one of these, or files are bad and it is ``error``, or none is good.
    """
    if on_bad_image not in MODES:
        raise ValueError(f"on_bad_image: expected one of {', '.join(MODES)}, got {on_bad_image!r}")
    if not hasattr(source, "paths"):
        return Usable(source, [], [])
    doubts: list[str] = []
    if on_bad_image == "error" and not decode:
        problems = head_problems(source)
        rows = np.arange(len(source))
    else:
        readings = read_all(source, progress=progress)
        problems = [reading.problem for reading in readings if reading.problem]
        doubts = mask_doubts(source, readings)
        rows = np.flatnonzero([reading.problem is None for reading in readings])
    if problems and on_bad_image == "error":
        raise ValueError(
            f"{len(problems)} of {len(source)} examples of {source.split} cannot be used:\n{listed(problems)}\n"
            "mend or remove them, or leave them out with on_bad_image=skip"
        )
    if not len(rows):
        raise ValueError(f"none of the {len(source)} examples of {source.split} can be used:\n{listed(problems)}")
    return Usable(PartOfSource(source, rows) if problems else source, problems, doubts)


def listed(lines: list[str]) -> str:
    """The first lines, indented, and how many more there are."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join(f"  {line}" for line in [*lines[:_SHOWN], *more])


def notes(source: Source, readings: list[Reading], *, few: int) -> list[str]:
    """What looks wrong in the examples of a split, though training would not fail.

    Args:
      source: the source.
      readings: of all its examples, see `read_all`.
      few: a class with fewer photographs than this is worth a line; 0 for a split that is not trained on.
    Returns:
      One line for each.
    """
    lines, tags, names = [], source.tags[:, 1:], source.class_names[1:]
    counts = tags.sum(axis=0)
    for name, count in zip(names, counts, strict=True):
        if count == 0:
            lines.append(f"{source.split}: no photograph has the tag {name!r}: the class cannot be {'learnt' if few else 'scored'}")
        elif count < min(few, len(tags)):
            lines.append(f"{source.split}: {count} photographs have the tag {name!r}: that is few")
    lines += everywhere(source) if few else []
    for one, name in enumerate(names) if few else ():
        for other in range(one + 1, len(names)):
            if counts[one] > 1 and np.array_equal(tags[:, one], tags[:, other]):
                lines.append(
                    f"{source.split}: the tags {name!r} and {names[other]!r} always come together: nothing tells them apart"
                )
    missing = [
        f"{name} ({_labels(source, present - set(reading.labels))})"
        for name, reading, present in zip(source.names, readings, _present(source), strict=True)
        if source.masks and reading.problem is None and present - set(reading.labels)
    ]
    if missing:
        lines.append(f"{source.split}: {len(missing)} photographs have tags that their masks do not show:\n{listed(missing)}")
    return lines


def everywhere(source: Source) -> list[str]:
    """Classes that every photograph is tagged with: they cannot be learnt from tags.

    Args:
      source: the training source.
    Returns:
      A line for each of them, with the remedy.
    """
    always = np.asarray(source.tags[:, 1:].all(axis=0) & (len(source) > 0))
    return [
        f"{source.split}: every photograph has the tag {name!r}: nothing tells it apart from the background, and its masks will be worth "
        "little; add some tens of photographs without it, with other tags or none"
        for name, tagged in zip(source.class_names[1:], always, strict=True) if tagged
    ]  # fmt: skip


def mask_doubts(source: Source, readings: list[Reading]) -> list[str]:
    """What looks wrong about the indices of masks: scores are worth nothing if an index means another class.

    A source may say with ``untagged_in_masks`` of ``accept`` that its tags are not complete.

    Args:
      source: the source.
      readings: of all its examples, see `read_all`.
    Returns:
      One line for each doubt, with the remedy; that of masks with untagged classes goes on with the photographs.
    """
    if not source.masks:
        return []
    good = [(name, set(reading.labels), present)
            for name, reading, present in zip(source.names, readings, _present(source), strict=True)
            if reading.problem is None]  # fmt: skip
    shown = [labels for _, labels, _ in good if labels]
    lines = []
    if len(shown) > 1 and not any(0 in labels for labels in shown):
        everywhere = set.intersection(*shown)
        lines.append(
            f"{source.split}: no mask shows the background, which is index 0"
            + (f", and every one shows index {min(everywhere)} ({_labels(source, everywhere)})" if everywhere else "")
            + "; save the background as 0"
        )
    tagged = [labels for _, labels, present in good if present]
    if len(tagged) > 1 and not any(labels - {0} for labels in tagged):
        lines.append(f"{source.split}: no mask shows a class, though {len(tagged)} of their photographs have tags; write objects "
                     "as the indices of their classes")  # fmt: skip
    others = [f"{name} ({_labels(source, labels - {0} - present)})" for name, labels, present in good if labels - {0} - present]
    if others and getattr(source, "untagged_in_masks", "tell") == "tell":
        lines.append(
            f"{source.split}: the masks of {len(others)} of {len(good)} photographs show classes that these are not tagged with; "
            "mend the tags, or the indices (index 1 is the first class after background); if tags are known to be missing, say "
            f"so with --config.data.options.untagged_in_masks=accept\n{listed(others)}"
        )
    return lines


def equal_pictures(splits: list[tuple[Source, list[Reading]]]) -> list[str]:
    """Photographs that show the same picture, pixel by pixel.

    Args:
      splits: pairs of source and readings.
    Returns:
      One line for each group of them.
    """
    groups: dict[bytes, list[tuple[str, bytes]]] = {}
    for source, readings in splits:
        for name, tags, reading in zip(source.names, source.tags, readings, strict=True):
            if reading.digest:
                groups.setdefault(reading.digest, []).append((f"{name} ({source.split})", tags.tobytes()))
    lines = []
    for group in groups.values():
        if len(group) > 1:
            differ = len({tags for _, tags in group}) > 1
            remedy = "; they have different tags: keep one, with all its tags" if differ else ""
            lines.append(f"the same picture: {', '.join(name for name, _ in group)}{remedy}")
    return lines


def _present(source):
    return [set(np.flatnonzero(row[1:]) + 1) for row in source.tags]


def _labels(source, labels):
    return ", ".join(source.class_names[label] for label in sorted(labels)) or "nothing"


def _in_parallel(function, count, num_threads, progress):
    results = []
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for result in pool.map(function, range(count)):
            results.append(result)
            if progress is not None:
                progress(1)
    return results
