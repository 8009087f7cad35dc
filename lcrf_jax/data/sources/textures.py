"""The embedded data: procedural images whose classes are told by a small emblem on a larger body.

An image holds one to three objects and up to two distractors on a textured background. An object is a
body of arbitrary shape and colour that carries the emblem of its class; its mask is the whole body. A
distractor is a body without an emblem, and background. So neither marking only the emblem nor marking
everything that looks like an object is right, as on photographs.

A crowd has five to nine small objects of one to three classes and two to four distractors instead, and the border of the image
cuts some of them. What is cut through its emblem, or before it, is background: its class cannot be told.

An image depends on (seed, split, index) and the kind of scene alone. Nothing is stored or downloaded.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from lcrf_jax.data.example import BACKGROUND, Example, tag_vector
from lcrf_jax.data.sources.emblems import EMBLEMS, SUPERSAMPLING, drawn_emblem
from lcrf_jax.machine.errors import nearest

SPLITS = {"train": 0, "val": 1}
MIN_VISIBLE = 0.6
SCENES = {"few": (96, 128), "crowd": (160, 256)}  # smallest and largest side of an image, so that emblems stay visible
_OBJECT_SEED = 0x7E47
_MARGIN = 20  # of a crowd, cut off on every side
_CROWD_UNIT = 112  # the bodies of a crowd have the pixels of the smaller ones among few on an image of this side


class Body(NamedTuple):
    """A body before it is painted, in pixels of the image."""

    top: int
    left: int
    cover: np.ndarray  # [h, w] float32 share of each pixel that is body
    rim: np.ndarray  # [h, w] float32, 1 at the border, 0 inside
    emblem: tuple[int, int, np.ndarray] | None  # top, left and [e, e] cover of the emblem within the body


# An image has to be made before its tags are known. So the tags are kept for all sources of a process: for each (seed,
# split, size, scene) the tags of its images by their index.
_KNOWN_TAGS: dict[tuple, dict[int, np.ndarray]] = {}


class TexturesSource:
    """Procedural images, made on the fly. See the module for what they show.

    Args:
      split: ``train`` or ``val``; the two never share an image.
      seed: 0 <= seed < 2**32; with another seed all images are others.
      size: side of the square images in pixels, 96 to 128, of crowds 160 to 256.
      num_train: number of training images, at least 1.
      num_val: number of held-out images, at least 1.
      masks: whether examples carry masks. The images are the same either way.
      scene: ``few`` or ``crowd``, see the module.
    Raises:
      ValueError: if an argument is out of its range.
    """

    class_names: tuple[str, ...] = (BACKGROUND, *EMBLEMS)

    def __init__(
        self,
        split: str,
        *,
        seed: int = 0,
        size: int = 112,
        num_train: int = 2000,
        num_val: int = 500,
        masks: bool = False,
        scene: str = "few",
    ) -> None:
        if scene not in SCENES:
            raise ValueError(f"scene must be one of {', '.join(SCENES)}, got {scene!r}{nearest(scene, SCENES)}")
        smallest, largest = SCENES[scene]
        if split not in SPLITS:
            raise ValueError(f"textures have the splits {', '.join(SPLITS)}, got {split!r}{nearest(split, SPLITS)}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in 0 .. 2**32 - 1, got {seed}")
        if not smallest <= size <= largest:
            raise ValueError(f"size must be {smallest} to {largest} pixels, so that emblems stay visible, got {size}")
        if num_train < 1 or num_val < 1:
            raise ValueError(f"num_train and num_val must be at least 1, got {num_train} and {num_val}")
        self.split = split
        self.masks = masks
        self._seed, self._size = int(seed), int(size)
        self._length = int({"train": num_train, "val": num_val}[split])
        self._scene = scene
        self._known_tags = _KNOWN_TAGS.setdefault((self._seed, split, self._size, scene), {})

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} is outside the {self._length} images of textures/{self.split}")
        words = [_OBJECT_SEED, self._seed, SPLITS[self.split], int(index)]
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
        crowd = self._scene == "crowd"
        image, labels, bodies = (_crowd if crowd else _scene)(rng, self._size)
        tags = tag_vector([self.class_names[label] for label in labels if label], self.class_names)
        mask = _mask(bodies, labels, self._size, _MARGIN if crowd else 0) if self.masks else None
        self._known_tags[index] = tags
        return Example(self._name(index), image, tags.copy(), mask)

    def _name(self, index: int) -> str:
        return f"{self.split}_{index:05d}"

    @property
    def names(self) -> tuple[str, ...]:
        """Identifiers of all images in order."""
        return tuple(self._name(index) for index in range(self._length))

    @property
    def tags(self) -> np.ndarray:
        """[N, K] bool, the tags of all images in order; images not seen yet are made for it."""
        return np.stack([self._tags_of(index) for index in range(self._length)])

    def _tags_of(self, index: int) -> np.ndarray:
        if index not in self._known_tags:
            self[index]
        return self._known_tags[index]

    @property
    def fingerprint(self) -> tuple:
        """Tells one set of images from another: the settings, and a hash of the first image for the generator."""
        first = hashlib.sha256(self[0].image.tobytes()).hexdigest()
        kind = () if self._scene == "few" else (self._scene,)
        return ("textures", *kind, self._seed, self.split, self._size, self._length, self.masks, first)


# --- the scene ------------------------------------------------------------------------------------


def _scene(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[int], list[Body]]:
    """A uint8 image, and its bodies from back to front with their labels (0 for a distractor)."""
    num_objects = 1 + int(rng.choice(3, p=(0.35, 0.4, 0.25)))
    num_distractors = int(rng.choice(3, p=(0.3, 0.4, 0.3)))
    wanted = [int(label) for label in 1 + rng.choice(len(EMBLEMS), num_objects)] + [0] * num_distractors
    first = wanted.pop(0)
    rng.shuffle(wanted)
    largest = 0.6 - 0.05 * len(wanted)
    labels, bodies = _placed(rng, [first, *wanted], size, size, largest)
    return _painted(rng, bodies, size), labels, bodies


def _crowd(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[int], list[Body]]:
    """As `_scene`, of many small bodies; those are in pixels of the image with its margin, which is cut off."""
    room = size + 2 * _MARGIN
    kinds = 1 + rng.permutation(len(EMBLEMS))[: 1 + int(rng.choice(3, p=(0.35, 0.4, 0.25)))]
    wanted = [int(label) for label in rng.choice(kinds, rng.integers(5, 10))] + [0] * int(rng.integers(2, 5))
    first = wanted.pop(0)
    rng.shuffle(wanted)
    labels, bodies = _placed(rng, [first, *wanted], room, _CROWD_UNIT, 0.5)
    labels = [label if _emblem_within(body, _MARGIN, size) else 0 for label, body in zip(labels, bodies)]
    return _painted(rng, bodies, room)[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN], labels, bodies


def _emblem_within(body: Body, margin: int, size: int) -> bool:
    """Whether the body has an emblem that is wholly in the image once the margin is cut off."""
    if body.emblem is None:
        return False
    top, left, drawing = body.emblem
    starts, stops = np.array((body.top + top, body.left + left)), np.array(drawing.shape)
    return bool((starts >= margin).all() and (starts + stops <= margin + size).all())


def _placed(
    rng: np.random.Generator, wanted: list[int], room: int, unit: int, largest: float
) -> tuple[list[int], list[Body]]:
    """Labels and bodies that found a place on [room, room] pixels, from back to front."""
    labels: list[int] = []
    bodies: list[Body] = []
    owner = np.full((room, room), -1, np.int8)
    for label in wanted:
        body = _place(rng, unit, largest, label, bodies, owner)
        if body is not None:
            owner[_window(body)][body.cover > 0.5] = len(bodies)
            labels.append(label)
            bodies.append(body)
    return labels, bodies


def _painted(rng: np.random.Generator, bodies: list[Body], size: int) -> np.ndarray:
    """[size, size, 3] uint8 image of the bodies on a background."""
    canvas, palette = _background(rng, size)
    for body in bodies:
        _paint(rng, canvas, body, palette)
    canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(rng.uniform(1.5, 4.0))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _mask(bodies: list[Body], labels: list[int], size: int, margin: int = 0) -> np.ndarray:
    """[size, size] uint8 class indices: the whole bodies, the nearer over the farther, without the margin."""
    mask = np.zeros((size + 2 * margin,) * 2, np.uint8)
    for body, label in zip(bodies, labels):
        mask[_window(body)][body.cover > 0.5] = label
    return mask[margin : margin + size, margin : margin + size].copy()


def _window(body: Body) -> tuple[slice, slice]:
    """The rectangle of the image that the body's patch covers."""
    height, width = body.cover.shape
    return slice(body.top, body.top + height), slice(body.left, body.left + width)


def _place(
    rng: np.random.Generator, unit: int, largest: float, label: int, bodies: list[Body], owner: np.ndarray
) -> Body | None:
    """A new body of .33 to `largest` of the unit that leaves every earlier one visible, or None where none was found."""
    size = len(owner)
    areas = [int((body.cover > 0.5).sum()) for body in bodies]
    for _ in range(12):
        diameter = unit * rng.uniform(0.33, largest)
        cover, rim = _shape(rng, diameter)
        height, width = cover.shape
        if height > size or width > size:
            continue
        emblem = drawn_emblem(rng, label, cover, unit) if label else None
        if label and emblem is None:
            continue
        for _ in range(4):
            top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
            body = Body(top, left, cover, rim, emblem)
            if _leaves_visible(body, bodies, areas, owner):
                return body
    return None


def _leaves_visible(new: Body, bodies: list[Body], areas: list[int], owner: np.ndarray) -> bool:
    """Whether each earlier body keeps 60 % of its area and its whole emblem behind the new one."""
    inside = new.cover > 0.5
    hidden = owner[_window(new)][inside]
    for i, body in enumerate(bodies):
        left_over = int((owner == i).sum()) - int((hidden == i).sum())
        if left_over < MIN_VISIBLE * areas[i]:
            return False
        if body.emblem is not None:
            top, left, cover = body.emblem
            top, left = body.top + top - new.top, body.left + left - new.left
            if inside[
                max(top - 1, 0) : max(top + cover.shape[0] + 1, 0),
                max(left - 1, 0) : max(left + cover.shape[1] + 1, 0),
            ].any():
                return False
    return True


# --- bodies and emblems ---------------------------------------------------------------------------


def _shape(rng: np.random.Generator, diameter: float) -> tuple[np.ndarray, np.ndarray]:
    """Cover and rim of a random body with the area of a disc of that diameter."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    kind = int(rng.integers(3))
    if kind == 0:  # ellipse
        radius = np.ones_like(angles)
    elif kind == 1:  # polygon with rounded corners
        sides = int(rng.integers(3, 7))
        corner = np.mod(angles, 2 * np.pi / sides) - np.pi / sides
        edge = 1 / np.cos(corner)
        radius = np.minimum(edge, 1 + 0.45 * (edge.max() - 1))
    else:  # blob
        radius = np.ones_like(angles)
        for order, scale in ((2, 0.16), (3, 0.12), (4, 0.07), (5, 0.05)):
            radius = radius + scale * rng.uniform(0.3, 1) * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
    stretch, turn = math.sqrt(rng.uniform(1, 2.2)), rng.uniform(0, 2 * np.pi)
    points = radius * np.exp(1j * angles)
    points = (points.real * stretch + 1j * points.imag / stretch) * np.exp(1j * turn)
    area = 0.5 * abs(np.sum(points.real * np.roll(points.imag, -1) - points.imag * np.roll(points.real, -1)))
    points = points * (math.sqrt(np.pi / area) * diameter / 2)
    points = points - (points.real.min() + 1j * points.imag.min()) + (1 + 1j)
    width, height = (math.ceil(side) + 1 for side in (points.real.max(), points.imag.max()))
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    scaled = points * SUPERSAMPLING
    ImageDraw.Draw(canvas).polygon(list(zip(scaled.real.tolist(), scaled.imag.tolist())), fill=255)
    small = canvas.reduce(SUPERSAMPLING)
    inner = small.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.BoxBlur(1))
    cover = np.asarray(small, np.float32) / 255
    return cover, 1 - np.asarray(inner, np.float32) / 255


def _paint(rng: np.random.Generator, canvas: np.ndarray, body: Body, palette: np.ndarray) -> None:
    """Paints the body, lightly shaded and with a visible border, into the image."""
    height, width = body.cover.shape
    colour = _body_colour(rng, palette)
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.03, 0.09)
    ys, xs = np.linspace(-1, 1, height, dtype=np.float32), np.linspace(-1, 1, width, dtype=np.float32)
    light = (
        1 + np.float32(strength * math.sin(angle)) * ys[:, None] + np.float32(strength * math.cos(angle)) * xs
    )
    light += 0.05 * (_smooth_noise(rng, 5, height, width) - 0.5)
    light *= 1 - np.float32(rng.uniform(0.15, 0.3)) * body.rim**2
    patch = light[..., None] * colour
    if body.emblem is not None:
        top, left, drawing = body.emblem
        dark = colour @ np.array((0.299, 0.587, 0.114), np.float32) > 135
        ink = np.float32(rng.uniform(5, 40, 3) if dark else rng.uniform(220, 255, 3))
        part = patch[top : top + drawing.shape[0], left : left + drawing.shape[1]]
        part += drawing[..., None] * (ink - part)
    part = canvas[_window(body)]
    part += body.cover[..., None] * (patch - part)


# --- colours and backgrounds ----------------------------------------------------------------------


def _colour(rng: np.random.Generator) -> np.ndarray:
    """A colour, even over hues and away from black and white: [3] float32 in 0..255."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.15, 0.9), rng.uniform(0.3, 0.92)
    wheel = np.clip(np.abs(np.mod(hue + np.array((0.0, 4.0, 2.0)), 6) - 3) - 1, 0, 1)
    return (255 * value * (1 - saturation + saturation * wheel)).astype(np.float32)


def _body_colour(rng: np.random.Generator, palette: np.ndarray) -> np.ndarray:
    """A colour that is, most of the time, far from all colours of the background."""
    wanted = 75 if rng.random() < 0.9 else 30
    best, best_distance = palette[0], -1.0
    for _ in range(8):
        colour = _colour(rng)
        distance = float(np.sqrt(((palette - colour) ** 2).sum(1)).min())
        if distance > best_distance:
            best, best_distance = colour, distance
        if distance > wanted:
            break
    return best


def _smooth_noise(rng: np.random.Generator, cells: int, height: int, width: int) -> np.ndarray:
    """[height, width] float32 noise in 0..1, smooth at the scale of the image over ``cells``."""
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    return np.clip(np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)), 0, 1)


def _waves(rng: np.random.Generator, size: int, directions: int) -> np.ndarray:
    """Soft stripes (one direction) or checks (two) in 0..1."""
    line = np.arange(size, dtype=np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.1, 0.45) * size
    pattern = np.ones((size, size), np.float32)
    for turn in range(directions):
        across = (
            np.float32(math.cos(angle + turn * np.pi / 2)) * line[:, None]
            + np.float32(math.sin(angle + turn * np.pi / 2)) * line
        )
        pattern = pattern * np.sin(
            across * np.float32(2 * np.pi / period) + np.float32(rng.uniform(0, 2 * np.pi))
        )
    return np.clip(0.5 + np.float32(rng.uniform(0.6, 3.0)) * pattern, 0, 1)


def _cells(rng: np.random.Generator, size: int) -> np.ndarray:
    """Patches of random level in 0..1."""
    cells = int(rng.integers(4, 10))
    grid = Image.fromarray(rng.random((cells, cells), np.float32))
    grid = grid.resize((2 * size, 2 * size), Image.Resampling.NEAREST).rotate(rng.uniform(0, 90))
    return np.asarray(grid.crop((size // 2, size // 2, size // 2 + size, size // 2 + size)))


def _background(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A textured [size, size, 3] float32 image and the [3, 3] colours it is mixed from."""
    colours = [_colour(rng)]
    for reach in (rng.uniform(25, 75), rng.uniform(15, 50)):
        step = rng.uniform(-1, 1, 3)
        colours.append(np.clip(colours[0] + reach * step / np.linalg.norm(step), 10, 245).astype(np.float32))
    kind = int(rng.integers(5))
    if kind == 0:
        pattern = _smooth_noise(rng, int(rng.integers(3, 8)), size, size)
    elif kind == 1:
        pattern = _smooth_noise(rng, int(rng.integers(12, 32)), size, size)
    elif kind == 2:
        pattern = _waves(rng, size, 1)
    elif kind == 3:
        pattern = _waves(rng, size, 2)
    else:
        pattern = _cells(rng, size)
    slow = _smooth_noise(rng, 3, size, size)
    canvas = (
        colours[0]
        + pattern[..., None] * (colours[1] - colours[0])
        + slow[..., None] * (colours[2] - colours[0])
    )
    return canvas, np.stack(colours)
