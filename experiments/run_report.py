"""The report of a run, and that of a comparison, as HTML files that open from disk."""

import datetime
import itertools
import math
import os
import pathlib
import shlex
import sys

import numpy as np

from lcrf_jax.machine.files import write_whole
from lcrf_jax.metrics import iou_per_class, mean_iou
from lcrf_jax.pictures import report
from lcrf_jax.predict.evaluation import labelled_samples, sample_positions
from lcrf_jax.runfolder.description import flat_settings
from lcrf_jax.runfolder.metrics import metrics_history
from lcrf_jax.train.methods import METHODS

NUM_EXTREMES = 4
NUM_SPREAD = 8
CURVES = {
    "val/miou": "mIoU on the validation split",
    "train/loss": "loss",
    "train/log_likelihood": "log p(y | z, x) of the bound",
    "train/entropy": "entropy of q",
    "train/pairwise_energy": "pairwise energy",
    "train/gradient_norm": "norm of the gradient",
    "train/skipped_steps": "steps without a finite loss",
}


def _per_cent(share):
    return "-" if np.isnan(share) else f"{100 * share:.1f} %"


def write_run_report(
    path, run_dir, description, segmenter, source, *, data, matrices, image_scores, used, tags_given, known_samples=None, parts=None
):
    """Write the report of a run.

    Args:
      path: HTML file.
      run_dir: folder of the run.
      description: of the run.
      segmenter: of the run.
      source: images for the gallery; with masks where there are scores.
      data: settings of the data that `source` is of, as those of a configuration.
      matrices: dict from a title to a confusion matrix, empty without masks.
      image_scores: [N] score of each image, or None.
      used: what supervision was used.
      tags_given: whether tags were used at test time.
      known_samples: dict from the positions of images to what `labelled_samples` says of them, where that is known.
      parts: dict from the parts of the split to their counts, see `experiments.reporting.part_counts`, or None.
    """
    names = segmenter.class_names
    scores = [(f"mIoU, {title}", f"{100 * mean_iou(matrix):.1f} %") for title, matrix in matrices.items()]
    own = description["training"]["data"]
    scores += [(f"mIoU of {split}, {title}", _per_cent(mean_iou(part[name]))) for split, part in (parts or {}).items()
               for name, title in (("plain", "network"), ("refined", "refined")) if name in part]  # fmt: skip
    figures = [*scores, ("images", f"{len(source)} of {source.split}"), ("method", description["training"]["method"])]
    note = f"Supervision: {used}. Data: {data_in_words(data)}."
    if data != own:
        note += f" Trained on other data: {data_in_words(own)}."
    history = metrics_history(run_dir)
    note += when_and_how(description, history)
    samples = _samples(segmenter, source, image_scores, tags_given, known_samples or {})
    ious = {title: np.asarray(iou_per_class(matrix), np.float64) for title, matrix in matrices.items()}
    sections = [
        ("Photographs", report.gallery(samples, names)),
        ("Intersection over union", report.bars(names, {"": ious})),
        ("Confusion", report.confusion(names, list(matrices.values())[-1]) if matrices else ""),
        ("Training", report.curves(_series(history), round_ends(description["training"], history))),
        ("Parts of the training", _segments(description.get("segments", ()))),
        ("Settings", report.settings({**flat_settings(description["training"]), **{
            f"version of {name}": version for name, version in description["versions"].items()}})),
    ]  # fmt: skip
    write_whole(path, report.page(f"Run {pathlib.Path(os.path.realpath(run_dir)).name}", sections, note=note, figures=figures))


def data_in_words(data):
    """Kind, folder and options of data in a line."""
    options = ", ".join(f"{name}={value}" for name, value in data["options"].items() if value not in ("", None))
    return " ".join(filter(None, (data["kind"], str(data["root"]), options and f"({options})")))


def when_and_how(description, history):
    """When, on what and how long was trained, and what command wrote this."""
    segments = description.get("segments", [])
    ends = [segment["first_step"] for segment in segments[1:]] + [math.inf]
    seconds = 0.0
    for segment, end in zip(segments, ends, strict=False):  # of an earlier version there may be none
        times = [line["time"] for line in history if segment["first_step"] <= line["step"] < end and "time" in line]
        if times and segment.get("date"):
            seconds += max(max(times) - datetime.datetime.fromisoformat(segment["date"]).timestamp(), 0)
    trained = ""
    if segments and segments[0].get("date"):
        trained = f" Trained from {segments[0]['date'][:16].replace('T', ' ')} UTC on {segments[-1].get('machine') or 'an unknown machine'}"
        trained += f", {datetime.timedelta(seconds=round(seconds))} hours:minutes:seconds of steps." if seconds else "."
    program = pathlib.Path(sys.argv[0])
    by = f" by: python -m experiments.{program.stem} {shlex.join(sys.argv[1:])}" if program.parent.name == "experiments" else "."
    return f"{trained} Written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC{by}"


def round_ends(training, history):
    """The steps at which the rounds of a training ended, but for the last; from the settings of a run and its metrics."""
    method = METHODS.get(training["method"])
    epochs = method.round_epochs(training) if method and method.own_rounds else []  # all of the same number of steps
    if len(epochs) < 2 or not sum(epochs) or not history:
        return []
    last = max(line["step"] for line in history)
    return [round(last * done / sum(epochs)) for done in itertools.accumulate(epochs[:-1])]


def _segments(segments):
    """What was trained with from which step on; empty for a run that was not interrupted."""
    rows = []
    for before, segment in zip([None, *segments], segments):
        changed = [f"{name} {values.get('was')} → {values.get('is')}" for name, values in segment["changed"].items()]
        versions = {} if before is None else before["versions"]
        changed += [f"{name} {versions[name]} → {version}" for name, version in segment["versions"].items()
                    if name in versions and versions[name] != version]  # fmt: skip
        rows.append([segment["first_step"], segment.get("date", ""), segment.get("machine", ""), ", ".join(changed) or "nothing"])
    return report.table(["from step", "begun", "machine", "what changed"], rows) if len(rows) > 1 else ""


def _samples(segmenter, source, image_scores, tags_given, known_samples):
    """The worst and the best images, and some between; without scores images from all over the split."""
    if image_scores is None or not np.isfinite(image_scores).any():
        groups = {"": sample_positions(len(source), NUM_SPREAD)}
    else:
        order = [int(at) for at in np.argsort(image_scores) if np.isfinite(image_scores[at])]
        worst, best = order[:NUM_EXTREMES], order[NUM_EXTREMES:][-NUM_EXTREMES:][::-1]
        spread = [at for at in sample_positions(len(source), NUM_SPREAD) if at not in {*worst, *best}]
        groups = {"Worst": worst, "Best": best, "From all over the split": spread}
    samples, tags = [], source.tags
    for group, positions in groups.items():
        for at in positions:
            sample = known_samples.get(at) or labelled_samples(segmenter, source, [at], use_tags=tags_given)[0]
            image, truth, labels, refined = sample
            layers = {"truth": truth, "prediction": labels, "refined": refined}
            scored = image_scores is not None and not np.isnan(image_scores[at])
            score = f"mIoU of its classes {100 * image_scores[at]:.0f}\N{NO-BREAK SPACE}%" if scored else ""
            present = ", ".join(name for name, tag in zip(source.class_names[1:], tags[at][1:], strict=True) if tag)
            caption = "; ".join(part for part in (f"tags: {present or 'none'}", score) if part)
            known = {title: layer for title, layer in layers.items() if layer is not None}
            samples.append(report.Sample(source.names[at], image, known, caption, group))
    return samples


def _series(history):
    """The curves of what a run has written, in the order of CURVES."""
    series = {title: [(line["step"], line[name]) for line in history if name in line] for name, title in CURVES.items()}
    series = {title: points for title, points in series.items() if len(points) > 1 or points and title.startswith("mIoU")}
    skipped = series.get(CURVES["train/skipped_steps"], [])
    if not any(value for _, value in skipped):  # that all is well needs no chart
        series.pop(CURVES["train/skipped_steps"], None)
    return series


def common_settings(runs):
    """Settings that runs were trained with: those of all under their names, others with the runs that they are of.

    Args:
      runs: dict from (method, seed) to the settings of the run, see config.json.
    """
    flat = {run: flat_settings(settings) for run, settings in runs.items()}
    found = {}
    for name in sorted({name for settings in flat.values() for name in settings} - {"method", "seed"}):
        values = {}
        for (method, seed), settings in flat.items():
            values.setdefault(repr(settings.get(name)), (settings.get(name), []))[1].append(f"{method}, seed {seed}")
        for value, which in values.values():
            found[name if len(values) == 1 else f"{name} ({'; '.join(which)})"] = value
    return found


def write_comparison_report(path, title, overview, samples, class_names, *, note, settings):
    """Write the report of a comparison.

    Args:
      path: HTML file.
      title: heading.
      overview: (header, rows, columns): the table, and a dict from a method to a dict from a title to [K] intersection
        over union.
      samples: list of lcrf_jax.pictures.report.Sample.
      class_names: names of the K classes.
      note: what was compared on what.
      settings: dict, see `common_settings`.
    """
    header, rows, columns = overview
    sections = [
        ("Methods", report.table(header, rows)),
        ("Photographs", report.gallery(samples, class_names)),
        ("Intersection over union", report.bars(class_names, columns)),
        ("Settings", report.settings(settings)),
    ]
    write_whole(path, report.page(title, sections, note=note))
