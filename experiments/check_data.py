r"""Read all photographs, tags and masks once and tell what there is, and everything that is wrong.

    python -m experiments.check_data --data=FOLDER
    python -m experiments.check_data --config=experiments/configs/voc_animals.py --config.data.root=FOLDER

Prints the photographs of each split, classes, tags, which classes come together, sizes, notes and problems, each with the
name of the file and what to do. The exit code is 1 if training would fail. Nothing is changed or written.
"""

import re
import sys

import numpy as np
from absl import flags

from lcrf_jax.data.check import equal_pictures, listed, mask_doubts, notes, read_all
from lcrf_jax.data.parts import whole_of
from lcrf_jax.machine.errors import SettingError
from lcrf_jax.machine.progress import image_progress, say
from lcrf_jax.train import plan
from lcrf_jax.train.splits import DEFAULT_VAL_SPLIT, open_split, refuse_shared

from . import configuring, reporting

_DATA = flags.DEFINE_string("data", None, "Folder of the photographs; sets config.data.root.")
_CONFIG = configuring.define("config", "folder")

MOST_TOGETHER = 12
FEW = 10


def opened_splits(config):
    """(sources that can be opened, problems): the training split and that of the masks."""
    sources, problems = [], []
    for split, masks in ((config["data"]["train_split"], False), (config["data"]["val_split"], True)):
        if not split:
            continue
        try:
            source = open_split(config, split, masks=masks)
            if masks and whole_of(split) != whole_of(config["data"]["train_split"]):
                source = getattr(source, "whole", source)  # the masks of the other part are scored some day
            sources.append(source)
        except FileNotFoundError as error:
            if str(error) in problems:
                continue
            if masks and whole_of(split) == DEFAULT_VAL_SPLIT:
                say(f"no masks to score on: {error}")
            else:
                problems.append(str(error))
        except ValueError as error:
            problems += [line.strip() for line in str(error).splitlines() if not re.search(r": \d+ problems:$", line)]
    if len(sources) == 2:
        try:
            refuse_shared(*sources)
        except SettingError as error:
            problems.append(str(error))
    return sources, list(dict.fromkeys(problems))


def read_splits(sources):
    """Pairs of source and readings."""
    splits = []
    for source in sources:
        with image_progress(f"reading {source.split}", len(source)) as done:
            splits.append((source, read_all(source, progress=done)))
    return splits


def table(header, rows):
    """Columns as wide as they need, the first one to the left."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[at]) for row in cells) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) if at == 0 else cell.rjust(width) for at, (cell, width) in enumerate(zip(row, widths)))
        for row in cells
    )


def describe(splits):
    """Print counts, classes, tags, pairs and sizes."""
    say("\n" + table(
        ["split", "photographs", "with a mask", "unreadable"],
        [[s.split, len(s), len(s) if s.masks else 0, sum(r.problem is not None for r in found)] for s, found in splits],
    ))  # fmt: skip
    names = splits[0][0].class_names
    columns = [column for source, _ in splits for column in (source.split, "alone")]
    counts = [(s.tags[:, 1:].sum(0), s.tags[s.tags[:, 1:].sum(1) == 1, 1:].sum(0)) for s, _ in splits]
    rows = [[name, *(pair[at][k] for pair in counts for at in (0, 1))] for k, name in enumerate(names[1:])]
    say("\n" + table(["class", *columns], rows))
    for source, found in splits:
        each = np.bincount(source.tags[:, 1:].sum(axis=1))
        say(f"\ntags of a photograph, {source.split}: " + ", ".join(f"{k}: {n}" for k, n in enumerate(each) if n))
        say(f"size, {source.split}: {_sizes(found)}")
    tags = np.concatenate([source.tags for source, _ in splits])[:, 1:].astype(int)
    together, few = tags.T @ tags, list(range(len(names) - 1))[:MOST_TOGETHER]
    if len(few) > 1:
        cut = f"; the first {MOST_TOGETHER} classes" if len(names) - 1 > MOST_TOGETHER else ""
        say(f"\nphotographs with both tags{cut}")
        say(table(["", *(names[k + 1] for k in few)], [[names[k + 1], *(together[k, j] for j in few)] for k in few]))


def _sizes(found):
    sizes = np.array([reading.size for reading in found if reading.size])
    if not len(sizes):
        return "none can be read"
    heights, widths = sizes.T
    return (f"width {widths.min()} to {widths.max()}, median {np.median(widths):.0f}; "
            f"height {heights.min()} to {heights.max()}, median {np.median(heights):.0f} pixels")  # fmt: skip


def left_out(source):
    """Notes on what a plain folder holds beside the photographs with tags."""
    untagged, not_taken = getattr(source, "untagged", ()), getattr(source, "not_taken", "")
    lines = [not_taken] if not_taken else []
    if untagged:
        lines.append(f"{len(untagged)} photographs have no row in {source.tag_source} and are left out:\n{listed(untagged)}")
    return lines


def main(argv):
    """Read, describe, and end with the verdict."""
    reporting.no_more_arguments(argv)
    config = reporting.plain_settings(_CONFIG.value, root=_DATA.value)
    sources, problems = opened_splits(config)
    splits = read_splits(sources)
    if splits:
        describe(splits)
    for source, found in splits:
        problems += [reading.problem for reading in found if reading.problem]
    if splits and splits[0][0].split == config["data"]["train_split"]:
        try:
            plan.planned_rounds(config, sum(reading.problem is None for reading in splits[0][1]))
        except ValueError as error:
            problems.append(str(error))
    remarks, doubts = left_out(sources[0]) if sources else [], []
    for source, found in splits:
        told = mask_doubts(source, found)
        if hasattr(source, "untagged_in_masks"):
            doubts += told
        else:  # no setting of the source can confirm them
            remarks += told
        trained_on = source.split == config["data"]["train_split"]
        remarks += notes(source, found, few=FEW if trained_on else 0)
    remarks += equal_pictures(splits)
    if remarks:
        say("\nnotes\n" + "\n".join(f"  {line}" for remark in remarks for line in remark.splitlines()))
    if problems or doubts:
        say("\nproblems\n" + "\n".join(f"  {line}" for told in problems + doubts for line in told.splitlines()))
        count = len(problems) + len(doubts)
        unread = any(reading.problem for _, found in splits for reading in found)
        verdict = "training would go on, with a warning, to scores that may be worth nothing"
        if problems:
            verdict = "training would stop there" + ("; --on_bad_image=skip leaves out files that cannot be read" if unread else "")
        sys.exit(f"error: {count} problem{'s' if count > 1 else ''}: {verdict}")
    say("\nno problems: training can begin")


if __name__ == "__main__":
    reporting.run(main, keep_compiled=False)
