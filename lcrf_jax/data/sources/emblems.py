"""The emblems that tell the classes of the embedded data apart, drawn as masks."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

EMBLEMS = ("ring", "cross", "star", "stripes", "chequer", "dots")
SUPERSAMPLING = 4


def drawn_emblem(
    rng: np.random.Generator, label: int, cover: np.ndarray, size: int
) -> tuple[int, int, np.ndarray] | None:
    """An emblem of about 15 to 20 % of the body's area, wholly inside it; None where none fits."""
    area = float((cover > 0.5).sum())
    side = max(math.sqrt(rng.uniform(0.15, 0.21) * area), size / 8)
    drawing = _draw_emblem(label, side, rng.uniform(-0.4, 0.4))
    extent = drawing.shape[0]
    ys, xs = np.nonzero(cover > 0.5)
    centre = ys.mean() - extent / 2, xs.mean() - extent / 2
    core = cover > 0.99
    for reach in (0.45, 0.45, 0.4, 0.4, 0.35, 0.3, 0.2, 0.1, 0):
        offset = rng.uniform(-reach, reach, 2) * cover.shape
        top, left = (round(c + o) for c, o in zip(centre, offset))
        if top < 0 or left < 0 or top + extent > cover.shape[0] or left + extent > cover.shape[1]:
            continue
        if core[top : top + extent, left : left + extent][drawing > 0.05].all():
            return top, left, drawing
    return None


def _draw_emblem(label: int, side: float, turn: float) -> np.ndarray:
    """[e, e] float32 cover of the emblem of that label, turned by ``turn`` radians."""
    extent = math.ceil(side * (abs(math.cos(turn)) + abs(math.sin(turn)))) + 2
    canvas = Image.new("L", (extent * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    scale, middle = side * SUPERSAMPLING / 2, extent * SUPERSAMPLING / 2
    cos, sin = math.cos(turn) * scale, math.sin(turn) * scale

    def place(points):
        return [(middle + cos * x - sin * y, middle + sin * x + cos * y) for x, y in points]

    def square(x, y, half_width, half_height):
        left, right, top, bottom = x - half_width, x + half_width, y - half_height, y + half_height
        draw.polygon(place([(left, top), (right, top), (right, bottom), (left, bottom)]), fill=255)

    def disc(x, y, radius, fill=255):
        ((x, y),) = place([(x, y)])
        draw.ellipse(
            (x - radius * scale, y - radius * scale, x + radius * scale, y + radius * scale), fill=fill
        )

    name = EMBLEMS[label - 1]
    if name == "ring":
        disc(0, 0, 1.0)
        disc(0, 0, 0.55, fill=0)
    elif name == "cross":
        square(0, 0, 1.1, 0.2)
        square(0, 0, 0.2, 1.1)
    elif name == "star":
        corners = [(math.sin(i * math.pi / 5), -math.cos(i * math.pi / 5)) for i in range(10)]
        draw.polygon(
            place([(x * (1.1, 0.48)[i % 2], y * (1.1, 0.48)[i % 2]) for i, (x, y) in enumerate(corners)]),
            fill=255,
        )
    elif name == "stripes":
        for y in (-0.78, 0, 0.78):
            square(0, y, 1.0, 0.2)
    elif name == "chequer":
        for x, y in ((-1.0, -1.0), (1.0, -1.0), (0.0, 0.0), (-1.0, 1.0), (1.0, 1.0)):
            square(x * 2 / 3, y * 2 / 3, 1 / 3, 1 / 3)
    else:  # dots
        for x, y in ((0, -0.58), (-0.6, 0.5), (0.6, 0.5)):
            disc(x, y, 0.4)
    return np.asarray(canvas.reduce(SUPERSAMPLING), np.float32) / 255
