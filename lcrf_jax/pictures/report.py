"""A report of a run as one HTML file that opens from disk: no network, no other files, every name escaped.

The functions here prepare what is shown; the markup, the style and the script are files of the folder `templates`.
"""

import base64
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.pictures.palette import bright_palette, overlay

if TYPE_CHECKING:
    import jinja2

PICTURE_SIDE = 480


class Sample(NamedTuple):
    """A photograph and masks of it.

    Attributes:
      name: of the photograph.
      image: [H, W, 3] uint8 RGB.
      layers: dict from a title such as "truth" to [H, W] class indices; the last one is shown first.
      caption: a line under the picture.
      group: heading of the samples that it belongs to.
    """

    name: str
    image: np.ndarray
    layers: dict[str, np.ndarray]
    caption: str = ""
    group: str = ""


@functools.cache
def templates(package: str) -> "jinja2.Environment":
    """The templates in the folder `templates` of a package: all that they are given is escaped, and must be given.

    Args:
      package: its dotted name.

    Returns:
      The environment, the same one at every call.
    """
    import jinja2  # for the page at the end alone

    return jinja2.Environment(
        loader=jinja2.PackageLoader(package), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip


def page(title: str, sections: Iterable[tuple[str, str]], *, note: str, figures: Sequence[tuple[str, str]] = ()) -> str:
    """The whole file.

    Args:
      title: heading.
      sections: pairs of heading and content, which is what another function here returns; left out where it is empty.
      note: a paragraph under the title.
      figures: pairs of name and text, numbers to be seen first.

    Returns:
      HTML.
    """
    template = templates(__package__).get_template("report.html.jinja")
    return template.render(title=title, sections=sections, note=note, figures=figures)


def data_url(picture: Image.Image, kind: str, **options: Any) -> str:
    """A Pillow image as an address that holds it.

    Args:
      picture: the image.
      kind: format, "JPEG" or "PNG".
      **options: of Pillow for this format.

    Returns:
      The address.
    """
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(content.getvalue()).decode("ascii")


def curves(series: Mapping[str, Sequence[tuple[int, float]]], marks: Sequence[int] = ()) -> str:
    """A small chart of each series.

    Args:
      series: dict from a name to a list of (step, value); values that are not finite are left out.
      marks: steps at which a round of the training ended; a line stands there.

    Returns:
      HTML; empty if there is nothing to draw.
    """
    drawn = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    charts = [_chart(name, points, marks) for name, points in drawn.items() if points]
    return _part("curves", charts=charts) if charts else ""


def bars(class_names: Sequence[str], groups: Mapping[str, Mapping[str, Sequence[float | None]]]) -> str:
    """Intersection over union of each class as horizontal bars, with the mean beneath.

    Args:
      class_names: names of the K classes.
      groups: dict from a heading, "" for none, to a dict from a title to [K] values in 0..1, NaN or None for no value.

    Returns:
      HTML; empty without values.
    """
    shown = {
        heading: {title: _bars(values) for title, values in columns.items()}
        for heading, columns in groups.items() if columns
    }  # fmt: skip
    return _part("bars", names=[*class_names, "mean"], colours=_colours(), groups=shown) if shown else ""


def confusion(class_names: Sequence[str], matrix: np.ndarray) -> str:
    """A confusion matrix with the share of each true class in colour.

    Args:
      class_names: names of the K classes.
      matrix: [K, K] counts, rows are the truth.

    Returns:
      HTML.
    """
    counts = np.asarray(matrix).astype(np.int64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return _part("confusion", class_names=class_names, counts=counts.tolist(), shares=shares.tolist())


def gallery(samples: Sequence[Sample], class_names: Sequence[str]) -> str:
    """Photographs with a slider between each of them and its masks.

    Args:
      samples: the photographs, in the order of their groups.
      class_names: names of the K classes.

    Returns:
      HTML; empty without samples.
    """
    if not samples:
        return ""
    titles = list(dict.fromkeys(title for sample in samples for title in sample.layers))
    present = {int(label) for sample in samples for layer in sample.layers.values() for label in np.unique(layer)}
    names, colours = {**dict(enumerate(class_names)), 255: "void"}, _colours()
    groups: dict[str, list] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(_card(sample))
    return _part(
        "gallery", titles=titles, default=list(samples[0].layers)[-1], groups=groups,
        legend=[(names[label], colours[label]) for label in sorted(present - {0})],
    )  # fmt: skip


def settings(values: Mapping[str, Any]) -> str:
    """A table of settings, folded.

    Args:
      values: dict from a name to a value.

    Returns:
      HTML.
    """
    return _part("settings", values=values)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain text; numbers to the right.

    Args:
      header: headings of the columns.
      rows: lists of cells.

    Returns:
      HTML.
    """
    return _part("table", header=header, rows=rows)


def _part(name, **values):
    return getattr(templates(__package__).get_template("parts.html.jinja").module, name)(**values)


def _colours():
    return [tuple(colour) for colour in bright_palette(256).tolist()]


def _bars(values):
    """Text and width of the bar of each class and of their mean; what is no number has no width."""
    values = np.array(values, np.float64)
    mean = np.nanmean(values) if np.isfinite(values).any() else math.nan
    widths = 100 * np.clip(np.nan_to_num([*values, mean]), 0, 1)
    texts = ["–" if math.isnan(value) else f"{100 * value:.1f}" for value in [*values, mean]]
    return [{"text": text, "width": width} for text, width in zip(texts, widths, strict=True)]


def _card(sample):
    """The pictures of a sample, scaled down."""
    height, width = sample.image.shape[:2]
    scale = min(1, PICTURE_SIDE / max(height, width))
    small = (max(round(width * scale), 1), max(round(height * scale), 1))
    photograph, layers = Image.fromarray(sample.image).resize(small, Image.Resampling.LANCZOS), {}
    for title, labels in sample.layers.items():
        labels = np.asarray(Image.fromarray(np.asarray(labels, np.uint8)).resize(small, Image.Resampling.NEAREST))
        layers[title] = Image.fromarray(overlay(np.asarray(photograph), labels))
    return {
        "name": sample.name, "caption": sample.caption, "width": small[0], "height": small[1],
        "photograph": data_url(photograph, "JPEG", quality=85),
        "layers": {title: data_url(picture, "JPEG", quality=85) for title, picture in layers.items()},
    }  # fmt: skip


def _chart(name, points, marks):
    """A line between the least and the greatest value: each point, and each mark, as shares of the way right and down."""
    steps, values = zip(*points, strict=True)
    low, high, first = min(values), max(values), min(steps)
    if high - low < 1e-12:
        high = low + 1  # a line along the bottom
    span = max(max(steps) - first, 1)
    places = [
        {"step": x, "value": y, "right": (x - first) / span, "down": (high - y) / (high - low)} for x, y in points
    ]
    return {
        "name": name, "points": places, "last": values[-1], "low": low, "high": high,
        "first_step": first, "last_step": max(steps),
        "marks": [{"step": step, "right": (step - first) / span} for step in marks if first < step < max(steps)],
    }  # fmt: skip
