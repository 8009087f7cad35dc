"""The tables of `experiments.compare`: classes down, methods across, the mean last, and below it the means of parts of the split.

As Markdown, CSV and LaTeX.

Results are a dict from the name of a method to a list of one dict for each seed, see `experiments.compare.score`.
"""

import csv
import statistics
from typing import NamedTuple

import numpy as np

from lcrf_jax.metrics import iou_per_class, mean_iou
from lcrf_jax.train.methods import METHODS

GROUPS = ("no", "yes", "masks")  # of "saliency or cues", from left to right
CAPTIONS = {False: "Without refinement", True: "With refinement by the dense CRF"}


class Column(NamedTuple):
    """One column: IoU in per cent, [seeds, K], its means [seeds], those of each part, NaN where unknown, and where it stands."""

    method: str
    title: str
    localisation: str
    ious: np.ndarray
    means: np.ndarray
    parts: dict[str, np.ndarray]


def parts_of(results):
    """dict from the parts of the split that results tell of to their numbers of images; earlier results know of none."""
    return {split: part["images"] for seeds in results.values() for result in seeds
            for split, part in (result.get("parts") or {}).items()}  # fmt: skip


def _part_means(seeds, split, kind):
    """[seeds] mean IoU in per cent on a part, NaN where it was not scored."""
    parts = [(result.get("parts") or {}).get(split) for result in seeds]
    return np.array([np.nan if part is None else 100 * mean_iou(np.asarray(part[kind])) for part in parts])


def columns(results, *, refined):
    """The columns of a table, those of methods that are told nothing of places first and those with masks last."""
    found, splits = [], parts_of(results)
    for name, seeds in results.items():
        method = METHODS[name]
        kinds = {"refined": method.title} if refined else {"plain": method.title, "smoothed": method.smoothed_title}
        for kind, title in kinds.items():
            seeds_with = [result for result in seeds if result[kind] is not None]
            matrices = [np.asarray(result[kind]) for result in seeds_with]
            if matrices and title:
                ious = 100 * np.stack([iou_per_class(matrix) for matrix in matrices])
                means = 100 * np.array([mean_iou(matrix) for matrix in matrices])
                parts = {split: _part_means(seeds_with, split, kind) for split in splits}
                found.append(Column(name, title, seeds[0]["localisation"], ious, means, parts))
    return sorted(found, key=lambda column: GROUPS.index(_group(column)))


def spread(values):
    """'57.2 ± 0.4', '57.2' where there is one value, '-' where a class occurs nowhere."""
    values = [float(value) for value in values if not np.isnan(value)]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def _class_rows(table, class_names):
    """Rows of names and cells: the classes, the mean, then that of each part."""
    rows = [[name, *(spread(column.ious[:, k]) for column in table)] for k, name in enumerate(class_names)]
    rows.append(["mean", *(spread(column.means) for column in table)])
    return rows + [[f"mean of {split}", *(spread(column.parts[split]) for column in table)] for split in (table[0].parts if table else ())]


def _costs(results, table):
    """Rows of training time and of the memory of the compiled step; a second column of one run costs nothing more."""

    def of_method(value):
        return [value(results[column.method]) for column in table]

    def minutes(kind):
        return lambda seeds: f"{statistics.mean(result['seconds'][kind] for result in seeds) / 60:.1f}"

    def memory(seeds):
        return "-" if seeds[0]["step_bytes"] is None else f"{seeds[0]['step_bytes'] / 1e6:.0f}"

    return [
        ["training, min", *of_method(minutes("wall"))],
        ["training, CPU min", *of_method(minutes("cpu"))],
        ["step, MB", *of_method(memory)],
    ]


def markdown(results, notes):
    """Both tables as Markdown.

    Args:
      results: see the module.
      notes: a line of where the numbers come from.

    Returns:
      str.
    """
    parts = []
    for refined, caption in CAPTIONS.items():
        table = columns(results, refined=refined)
        head = ["mIoU, %", *(column.title for column in table)]
        localisation = ["saliency or cues", *(column.localisation or "no" for column in table)]
        rows = _class_rows(table, next(iter(results.values()))[0]["class_names"])
        mean = rows[-1 - len(parts_of(results))]
        mean[:] = [f"**{cell}**" for cell in mean]
        body = [localisation, *rows, *([] if refined else _costs(results, table))]
        lines = [head, ["---", *["---:"] * len(table)], *body]
        parts.append("\n".join([f"{caption}:", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join([*parts, notes]) + "\n"


def overview(results):
    """What a page shows of both tables.

    Args:
      results: see the module.

    Returns:
      (headings, rows of cells, dict from the title of a method to a dict from "network" or "refined" to [K] mean IoU).
    """
    plain, refined = (columns(results, refined=kind) for kind in (False, True))
    splits = parts_of(results)
    of_method, rows, values = {column.title: column for column in refined}, [], {}
    for column in plain:
        other = of_method.get(column.title)
        cells = [spread(column.means), "-" if other is None else spread(other.means)]
        for split in splits:
            cells += [spread(column.parts[split]), "-" if other is None else spread(other.parts[split])]
        rows.append([column.title, column.localisation or "no", *cells])
        values[column.title] = {"network": column.ious.mean(axis=0) / 100}
        if other is not None:
            values[column.title]["refined"] = other.ious.mean(axis=0) / 100
    titles = [title for split in splits for title in (f"mIoU of {split}", f"{split}, refined")]
    return ["method", "saliency or cues", "mIoU, %", "refined", *titles], rows, values


def latex(results):
    """Both tables as LaTeX tabulars, with a group of columns for methods without and with saliency or cues.

    Args:
      results: see the module.

    Returns:
      str; needs no package.
    """
    parts = []
    for refined, caption in CAPTIONS.items():
        table = columns(results, refined=refined)
        groups = [(_group(column), sum(_group(other) == _group(column) for other in table)) for column in table]
        groups = list(dict.fromkeys(groups))
        lines = [
            f"% {caption}",
            rf"\begin{{tabular}}{{l|{'|'.join('r' * count for _, count in groups)}}}",
            "saliency or cues & "
            + " & ".join(rf"\multicolumn{{{count}}}{{c}}{{{group}}}" for group, count in groups) + r" \\",
            " & ".join(["", *(column.title for column in table)]) + r" \\ \hline",
        ]  # fmt: skip
        rows = _class_rows(table, next(iter(results.values()))[0]["class_names"])
        num_means = 1 + len(parts_of(results))
        ends = [*[r" \\"] * (len(rows) - num_means - 1), r" \\ \hline", *[r" \\"] * num_means]
        lines += [" & ".join(map(_escaped, row)) + end for row, end in zip(rows, ends, strict=True)]
        parts.append("\n".join([*lines, r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _group(column):
    return "masks" if column.localisation == "masks" else "yes" if column.localisation else "no"


def _escaped(cell):
    return cell.replace("_", r"\_").replace("%", r"\%").replace(" ± ", r" $\pm$ ")


def write_csv(results, path):
    """One row for each method, refinement and class, for their mean and that of each part, with the value of every seed, in per cent.

    Args:
      results: see the module.
      path: file to write.
    """
    class_names = next(iter(results.values()))[0]["class_names"]
    num_seeds = max(len(seeds) for seeds in results.values())
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        head = ["method", "column", "saliency or cues", "refined", "class", *(f"seed {i}" for i in range(num_seeds))]
        writer.writerow(head)
        for refined in CAPTIONS:
            for column in columns(results, refined=refined):
                values = np.column_stack([column.ious, column.means, *column.parts.values()]).T
                for name, row in zip([*class_names, "mean", *(f"mean of {split}" for split in column.parts)], values, strict=True):
                    cells = ["" if np.isnan(value) else f"{value:.3f}" for value in row]
                    writer.writerow([column.method, column.title, column.localisation or "no", int(refined), name, *cells])
