"""A report of a run as one HTML file that opens from disk: no network, no other files, every name escaped."""

import base64
import html
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.pictures.palette import overlay, palette

PICTURE_SIDE = 480
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 320, 150, 46, 20


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
    layers: dict
    caption: str = ""
    group: str = ""


def page(title, sections, *, summary=""):
    """The whole file.

    Args:
      title: heading, plain text.
      sections: pairs of heading (plain text) and content (HTML, see the other functions here).
      summary: HTML under the title.

    Returns:
      str, HTML.
    """
    parts = "".join(f"<section><h2>{escaped(name)}</h2>{content}</section>" for name, content in sections if content)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}</title><style>{_STYLE}</style></head>'
        f"<body><header><h1>{escaped(title)}</h1>{summary}</header><main>{parts}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def escaped(value):
    """Plain text as HTML."""
    return html.escape(str(value), quote=True)


def data_url(picture, kind, **options):
    """A Pillow image as an address that holds it.

    Args:
      picture: the image.
      kind: format, "JPEG" or "PNG".
      **options: of Pillow for this format.

    Returns:
      str.
    """
    content = io.BytesIO()
    picture.save(content, format=kind, **options)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(content.getvalue()).decode("ascii")


def figures(values):
    """Numbers to be seen first.

    Args:
      values: pairs of name and text.

    Returns:
      str, HTML.
    """
    items = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in values)
    return f'<dl class="figures">{items}</dl>'


def paragraph(text):
    """A paragraph of plain text."""
    return f"<p>{escaped(text)}</p>"


def curves(series):
    """A small chart of each series.

    Args:
      series: dict from a name to a list of (step, value); values that are not finite are left out.

    Returns:
      str, HTML; empty if there is nothing to draw.
    """
    drawn = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    charts = "".join(_chart(name, points) for name, points in drawn.items() if points)
    return f'<div class="charts">{charts}</div>' if charts else ""


def bars(class_names, columns):
    """Intersection over union of each class as horizontal bars.

    Args:
      class_names: names of the K classes.
      columns: dict from a title to [K] values in 0..1, NaN or None where there is none; with their mean beneath.

    Returns:
      str, HTML.
    """
    rows, colours = [], palette(len(class_names))
    for k, name in enumerate([*class_names, "mean"]):
        lines = []
        for at, (title, values) in enumerate(columns.items()):
            known = [math.nan if value is None else float(value) for value in values]
            value = known[k] if k < len(known) else float(np.nanmean(known)) if np.isfinite(known).any() else math.nan
            shown = "–" if math.isnan(value) else f"{100 * value:.1f}"
            width = 0 if math.isnan(value) else 100 * min(max(value, 0), 1)
            label = escaped(f"{name}, {title}: {shown}")
            lines.append(
                f'<div class="bar" title="{label}"><i class="tone{at % 3}" style="width:{width:.2f}%"></i></div><b>{shown}</b>'
            )
        swatch = f'<i class="swatch" style="background:rgb{tuple(map(int, colours[k]))}"></i>' if k < len(class_names) else ""
        kind = ' class="mean"' if k == len(class_names) else ""
        rows.append(f'<tr{kind}><th scope="row">{swatch}{escaped(name)}</th><td><div class="pair">{"".join(lines)}</div></td></tr>')
    legend = "".join(f'<span><i class="swatch tone{at % 3}"></i>{escaped(title)}</span>' for at, title in enumerate(columns))
    return f'<p class="legend">{legend}</p><table class="bars">{"".join(rows)}</table>'


def confusion(class_names, matrix):
    """A confusion matrix with the share of each true class in colour.

    Args:
      class_names: names of the K classes.
      matrix: [K, K] counts, rows are the truth.

    Returns:
      str, HTML.
    """
    matrix = np.asarray(matrix, np.float64)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    head = "".join(f'<th scope="col"><span>{escaped(name)}</span></th>' for name in class_names)
    rows = []
    for k, name in enumerate(class_names):
        cells = "".join(
            f'<td style="--share:{share[k, j]:.3f}" class="{"strong" if share[k, j] > 0.55 else ""}" '
            f'title="{escaped(f"{name} called {other}: {int(matrix[k, j]):,} pixels")}">{100 * share[k, j]:.0f}</td>'
            for j, other in enumerate(class_names)
        )
        rows.append(f'<tr><th scope="row">{escaped(name)}</th>{cells}</tr>')
    note = "Per cent of the pixels of each true class (rows) that were given each class (columns)."
    return f'<p class="note">{note}</p><div class="scroll"><table class="confusion"><tr><td></td>{head}</tr>{"".join(rows)}</table></div>'


def gallery(samples, class_names):
    """Photographs with a slider between each of them and its masks.

    Args:
      samples: list of Sample.
      class_names: names of the K classes.

    Returns:
      str, HTML; empty without samples.
    """
    if not samples:
        return ""
    titles = list(dict.fromkeys(title for sample in samples for title in sample.layers))
    default = list(samples[0].layers)[-1]
    choices = "".join(
        f'<label><input type="radio" name="layer" value="{escaped(title)}"{" checked" if title == default else ""}>'
        f"<span>{escaped(title)}</span></label>"
        for title in titles
    )
    present = sorted({int(label) for sample in samples for layer in sample.layers.values() for label in np.unique(layer)})
    colours = palette(256)
    legend = "".join(
        f'<span><i class="swatch" style="background:rgb{tuple(map(int, colours[label]))}"></i>'
        f"{escaped('void' if label == 255 else class_names[label])}</span>"
        for label in present if label
    )  # fmt: skip
    groups = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(_card(sample, default))
    cards = "".join(
        (f"<h3>{escaped(group)}</h3>" if group else "") + f'<div class="cards">{"".join(shown)}</div>'
        for group, shown in groups.items()
    )
    return (
        f'<fieldset class="layers"><legend>Right of the slider</legend>{choices}</fieldset><p class="legend">{legend}</p>{cards}'
    )


def settings(values):
    """A table of settings, folded.

    Args:
      values: dict from a name to a value.

    Returns:
      str, HTML.
    """
    rows = "".join(f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>' for name, value in values.items())
    return f'<details><summary>{len(values)} settings</summary><table class="settings">{rows}</table></details>'


def table(header, rows):
    """A table of plain text; numbers to the right.

    Args:
      header: headings of the columns.
      rows: lists of cells.

    Returns:
      str, HTML.
    """
    head = "".join(f'<th scope="col">{escaped(cell)}</th>' for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escaped(cell)}</td>" if at else f'<th scope="row">{escaped(cell)}</th>' for at, cell in enumerate(row))
        + "</tr>" for row in rows
    )  # fmt: skip
    return f'<div class="scroll"><table class="plain"><tr>{head}</tr>{body}</table></div>'


def _card(sample, default):
    size = sample.image.shape[:2]
    scale = min(1, PICTURE_SIDE / max(size))
    small = (max(round(size[1] * scale), 1), max(round(size[0] * scale), 1))
    photo = Image.fromarray(sample.image).resize(small, Image.Resampling.LANCZOS)
    layers = []
    for title, labels in sample.layers.items():
        labels = np.asarray(Image.fromarray(np.asarray(labels, np.uint8)).resize(small, Image.Resampling.NEAREST))
        shown = "" if title == default else " hidden"
        picture = data_url(Image.fromarray(overlay(np.asarray(photo), labels, alpha=0.6)), "JPEG", quality=85)
        layers.append(f'<img class="layer" data-layer="{escaped(title)}" src="{picture}" alt="{escaped(title)} of {escaped(sample.name)}"{shown}>')
    return (
        f'<figure class="card"><div class="compare" style="aspect-ratio:{small[0]}/{small[1]}">'
        f'<img class="photo" src="{data_url(photo, "JPEG", quality=85)}" alt="{escaped(sample.name)}">{"".join(layers)}'
        f'<i class="edge"></i><input type="range" min="0" max="100" value="50" step="0.5" '
        f'aria-label="how much of {escaped(sample.name)} is shown without mask"></div>'
        f"<figcaption><b>{escaped(sample.name)}</b> {escaped(sample.caption)}</figcaption></figure>"
    )


def _chart(name, points):
    """An SVG line chart with the least and the greatest value, and the last one in its title."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    span = max(max(xs) - min(xs), 1)

    def place(x, y):
        return (f"{_LEFT + (x - min(xs)) / span * (_WIDTH - _LEFT - 8):.1f},"
                f"{6 + (high - y) / (high - low) * (_HEIGHT - _BOTTOM - 12):.1f}")  # fmt: skip

    line = " ".join(place(x, y) for x, y in points)
    dots = "".join(
        f'<circle cx="{place(x, y).split(",")[0]}" cy="{place(x, y).split(",")[1]}" r="{2 if len(points) < 40 else 1}">'
        f"<title>step {x}: {y:.5g}</title></circle>" for x, y in points
    )  # fmt: skip
    base = _HEIGHT - _BOTTOM - 6
    return (
        f'<figure class="chart"><figcaption>{escaped(name)} <b>{ys[-1]:.4g}</b></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(name)}, last {ys[-1]:.4g}">'
        f'<path class="axis" d="M{_LEFT} 6V{base}H{_WIDTH - 8}"/>'
        f'<text x="{_LEFT - 5}" y="14" text-anchor="end">{high:.3g}</text>'
        f'<text x="{_LEFT - 5}" y="{base}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{_LEFT}" y="{_HEIGHT - 8}">{min(xs)}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 8}" text-anchor="end">step {max(xs)}</text>'
        f'<polyline points="{line}"/>{dots}</svg></figure>'
    )


_STYLE = """
:root{--ink:#1e2228;--soft:#5b6470;--paper:#fff;--tint:#f3f5f7;--line:#d8dde3;--one:#8fa3b5;--two:#1f6f8b;--three:#c06a2b;
color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e7eaee;--soft:#9aa4b0;--paper:#15181c;--tint:#1e2329;--line:#343b44;--one:#5f7285;
--two:#4fb0cf;--three:#e29a5c}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main{max-width:1180px;margin:0 auto;padding:0 20px}
header{padding-top:32px}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 12px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:44px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:22px 0 8px;color:var(--soft)}
p{max-width:70ch;margin:8px 0}
.note,figcaption{color:var(--soft);font-size:.88rem}
.figures{display:flex;flex-wrap:wrap;gap:12px 36px;margin:12px 0}
.figures dt{color:var(--soft);font-size:.85rem}
.figures dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:14px 24px}
.chart{margin:0}.chart b{color:var(--ink);font-variant-numeric:tabular-nums}
.chart svg{width:100%;height:auto;display:block}
.chart text{font-size:11px;fill:var(--soft)}
.chart polyline{fill:none;stroke:var(--two);stroke-width:1.6;stroke-linejoin:round}
.chart circle{fill:var(--two)}
.axis{fill:none;stroke:var(--line)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th{text-align:left;font-weight:500}
.bars{width:100%;max-width:760px}
.bars th{padding:7px 14px 7px 0;width:1%;white-space:nowrap}
.bars td{padding:7px 0}
.bars .mean th,.bars .mean td{border-top:1px solid var(--line);font-weight:700;padding-top:8px}
.pair{display:grid;grid-template-columns:1fr 3.2em;align-items:center;row-gap:2px;column-gap:8px}
.pair b{font-weight:500;font-size:.85rem;text-align:right}
.bar{height:10px;background:var(--tint);border-radius:2px}
.bar i{display:block;height:100%;border-radius:2px}
.tone0{background:var(--one)}.tone1{background:var(--two)}.tone2{background:var(--three)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.88rem;max-width:none}
.swatch{display:inline-block;width:12px;height:12px;margin-right:7px;border-radius:2px;outline:1px solid var(--line);vertical-align:-1px}
.scroll{overflow-x:auto}
.confusion{font-size:.85rem}
.confusion td,.confusion th{padding:5px 8px;text-align:right;white-space:nowrap}
.confusion td[title]{background:color-mix(in srgb,var(--two) calc(var(--share)*100%),var(--paper));min-width:3em}
.confusion .strong{color:var(--paper)}
.plain td,.plain th{padding:5px 16px 5px 0;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
.plain th[scope=row],.plain th:first-child{text-align:left}
.layers{border:0;padding:0;margin:0 0 10px;display:flex;flex-wrap:wrap;gap:6px;align-items:center}
.layers legend{float:left;padding:0;margin-right:10px;color:var(--soft);font-size:.88rem}
.layers input{position:absolute;opacity:0}
.layers span{display:block;padding:5px 13px;border:1px solid var(--line);border-radius:4px;cursor:pointer;font-size:.9rem}
.layers input:checked+span{background:var(--two);border-color:var(--two);color:var(--paper)}
.layers input:focus-visible+span{outline:2px solid var(--ink);outline-offset:2px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(210px,100%),1fr));gap:20px;align-items:start}
.card{margin:0}
.card figcaption{margin-top:6px;overflow-wrap:anywhere}
.card figcaption b{color:var(--ink);font-weight:500}
.compare{--at:50%;position:relative;overflow:hidden;border-radius:4px;background:var(--tint)}
.compare img{position:absolute;inset:0;width:100%;height:100%}
.compare .layer{clip-path:inset(0 0 0 var(--at))}
.compare .edge{position:absolute;top:0;bottom:0;left:var(--at);width:2px;margin-left:-1px;background:#fff;box-shadow:0 0 3px #000}
.compare input{position:absolute;inset:0;width:100%;height:100%;margin:0;opacity:0;cursor:ew-resize}
.compare:focus-within{outline:2px solid var(--two);outline-offset:2px}
[hidden]{display:none}
summary{cursor:pointer}
.settings{font-size:.85rem;margin-top:8px}
.settings th,.settings td{padding:3px 18px 3px 0;vertical-align:top;overflow-wrap:anywhere;text-align:left}
main{padding-bottom:60px}
"""

_SCRIPT = """
document.addEventListener('input', event => {
  const slider = event.target.closest('.compare input');
  if (slider) slider.parentElement.style.setProperty('--at', slider.value + '%');
});
document.addEventListener('change', event => {
  if (event.target.name !== 'layer') return;
  for (const layer of document.querySelectorAll('.layer')) layer.hidden = layer.dataset.layer !== event.target.value;
});
"""
