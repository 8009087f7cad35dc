"""Pictures of masks: two palettes, overlays, palette PNGs and a grid to look at.

Index PNGs have the colours of PASCAL VOC, as other programs expect it. Those are dark, and half of them look alike to many
readers, so that what is laid over photographs has `bright_palette`.
"""

import colorsys
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lcrf_jax.numerics import known_number

VOID = 255
_STRIP_PIXELS = 1 << 20
# Bright colours that stay apart for readers who do not tell red from green, or blue from yellow: the first seven by hand, then
# each the one of a grid in RGB that is farthest from all before it, least of four views (as it is, and without each kind of cone).
_BRIGHT = (
    "56b4e9 e69f00 00b27d f0e442 e178be 3c6ee6 eb5a28 a5ff96 87ffd2 b44b3c b43ca5 69c369 694bff 4b96f0 c32d78 78ffff 87e15a 4bd2b4 "
    "87f0a5 c33c1e 00874b 78a53c 00e1f0 ff96a5"
)
_GOLDEN = 0.61803398875
INK, PAPER, FAINT = (30, 34, 40), (255, 255, 255), (236, 238, 241)


def palette(num_classes: int) -> np.ndarray:
    """Colours of the classes, as in the PASCAL VOC development kit.

    Bit 0, 3 and 6 of a class index are the highest bits of red, bit 1, 4 and 7 those of green, bit 2 and 5 of
    blue.

    Args:
      num_classes: number of colours, 1..256.
    Returns:
      [num_classes, 3] uint8 RGB; class 0 is black, and 255 (void) a pale ivory.
    Raises:
      ValueError: if num_classes is not in 1..256.
    """
    if not 1 <= num_classes <= 256:
        raise ValueError(f"expected num_classes in 1..256, got {num_classes}; a mask has one byte a pixel")
    index, colours = np.arange(num_classes), np.zeros((num_classes, 3), np.int64)
    for bit in range(8):
        colours[:, bit % 3] |= (index >> bit & 1) << 7 - bit // 3
    return colours.astype(np.uint8)


def bright_palette(num_classes: int) -> np.ndarray:
    """Colours of the classes that can be read on photographs, the first 24 also by readers who are blind to some colours.

    Args:
      num_classes: number of colours, 1..256.
    Returns:
      [num_classes, 3] uint8 RGB; class 0 is black, and 255 (void) a pale ivory, as in `palette`.
    Raises:
      ValueError: if num_classes is not in 1..256.
    """
    colours = palette(num_classes)  # black, ivory and the check
    chosen = [bytes.fromhex(text) for text in _BRIGHT.split()]
    for label in range(1, min(num_classes, VOID)):
        if label <= len(chosen):
            colours[label] = list(chosen[label - 1])
        else:
            shares = colorsys.hls_to_rgb(label * _GOLDEN % 1, (0.45, 0.6, 0.75)[label % 3], 0.85)
            colours[label] = np.round(255 * np.array(shares))
    return colours


def overlay(
    image: np.ndarray, labels: np.ndarray, alpha: float = 0.5, *, outline: int | None = None, colours: np.ndarray | None = None
) -> np.ndarray:
    """An image with its mask laid over it in colour, and an outline round every region.

    Background keeps the image as it is; void is mixed with ivory.

    Args:
      image: [H, W, 3] uint8 RGB.
      labels: [H, W] class indices in 0..255, 255 is void.
      alpha: share of the class colour inside a region, 0..1; the outline has all of it.
      outline: its width in pixels, inside the region; 0 draws none, None a two hundredth of the longer side, at least 1.
      colours: [256, 3] uint8 RGB of the classes; None is `bright_palette`.
    Returns:
      [H, W, 3] uint8 RGB, a new array.
    Raises:
      ValueError: if shapes, dtype or ranges are others, or alpha or outline is no number.
      TypeError: if an array is a masked one of NumPy.
    """
    image, labels = _checked_image(image), _checked_labels(labels)
    if labels.shape != image.shape[:2]:
        raise ValueError(f"expected labels of the image's size {image.shape[:2]}, got {labels.shape}; resize "
                         "the mask with nearest neighbours")
    share_inside = known_number(alpha)
    if share_inside is None or not 0 <= share_inside <= 1:
        raise ValueError(f"expected alpha in 0..1, got {alpha!r}; 0 shows the image alone, 1 the colour")
    pixels = max(round(max(labels.shape) / 200), 1) if outline is None else known_number(outline)
    if pixels is None or not 0 <= pixels < math.inf:
        raise ValueError(f"expected an outline of 0 pixels or more, got {outline!r}; 0 draws none")
    width = int(pixels)
    if width != pixels:
        raise ValueError(f"expected an outline of whole pixels, got {outline!r}; round it")
    edges, result = _thick(_edges(labels), labels, width), np.empty_like(image)
    wanted = (bright_palette(256) if colours is None else np.asarray(colours)).astype(np.float32)
    if wanted.shape[1:] != (3,) or len(wanted) <= labels.max():
        raise ValueError(f"expected colours [256, 3], one for each label, got {list(wanted.shape)}")
    shares = np.where(np.arange(256) == 0, 0, np.float32(share_inside))
    step = max(1, _STRIP_PIXELS // labels.shape[1])
    for start in range(0, len(labels), step):  # in little memory for large images
        rows = slice(start, start + step)
        share = np.where(edges[rows] & (labels[rows] != 0), np.float32(1), shares[labels[rows]])[..., None]
        result[rows] = np.round(image[rows] * (1 - share) + wanted[labels[rows]] * share)
    return result


def save_index_png(path: str | os.PathLike, labels: np.ndarray) -> None:
    """Save a mask as a PNG of class indices that viewers show in the VOC colours.

    ``np.asarray(Image.open(path))`` gives the indices back; OpenCV reads the colours instead.

    Args:
      path: file to write, its folder must be there.
      labels: [H, W] class indices in 0..255, 255 is void.
    Raises:
      ValueError: if labels has another shape, dtype or range.
      TypeError: if it is a masked array of NumPy.
    """
    index_picture(labels).save(path, format="PNG")


def index_picture(labels: np.ndarray, colours: np.ndarray | None = None) -> Image.Image:
    """A mask as a Pillow image of class indices.

    Args:
      labels: [H, W] class indices in 0..255, 255 is void.
      colours: [256, 3] uint8 RGB to show them in; None is the palette of VOC.
    Returns:
      PIL.Image.Image of mode P.
    Raises:
      ValueError: if labels has another shape, dtype or range.
      TypeError: if it is a masked array of NumPy.
    """
    picture = Image.fromarray(_checked_labels(labels))
    picture.putpalette((palette(256) if colours is None else colours).tobytes())
    return picture


def picture_grid(
    rows: Sequence[tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]],
    path: str | os.PathLike,
    *,
    class_names: Sequence[str],
    cell: int = 220,
) -> pathlib.Path:
    """Draw images beside their masks, one row for each image, with a legend of the classes that occur.

    A column for truth or refined is there if any row has one.

    Args:
      rows: list of (image, truth, prediction, refined): [H, W, 3] uint8 and [H, W] class indices of the same
        size, truth and refined may be None.
      path: PNG file to write; its folder is made if it is not there.
      class_names: name of each class, index 0 the background.
      cell: longest side of one picture, px.
    Returns:
      The path, as pathlib.Path.
    Raises:
      ValueError: if there are no rows, or shapes, dtypes or labels are others.
    """
    titles = ["image", "truth", "prediction", "refined"]
    shown = [at for at in range(len(titles)) if any(row[at] is not None for row in rows)]
    chosen = [tuple(row[at] for at in shown) for row in rows]
    return picture_table(chosen, path, titles=[titles[at] for at in shown], class_names=class_names, cell=cell)


def picture_table(
    rows: Sequence[Sequence[np.ndarray | None]],
    path: str | os.PathLike,
    *,
    titles: Sequence[str],
    class_names: Sequence[str],
    cell: int = 220,
) -> pathlib.Path:
    """Draw images beside any number of masks, one row for each image, with a legend of the classes that occur.

    Args:
      rows: list of (image, mask, mask, ...): [H, W, 3] uint8 and [H, W] class indices of the same size, or None.
      path: PNG file to write; its folder is made if it is not there.
      titles: heading of each column, as many as a row has entries.
      class_names: name of each class, index 0 the background.
      cell: longest side of one picture, px.
    Returns:
      The path, as pathlib.Path.
    Raises:
      ValueError: if there are no rows, or shapes, dtypes or labels are others.
    """
    if not rows:
        raise ValueError("expected at least one row to draw, got none")
    drawn = [[_cell_picture(row, at, cell) for at in range(len(titles))] for row in rows]
    heights = [max(picture.height for picture in line) for line in drawn]
    gap, top = 8, 34
    width = gap + len(titles) * (cell + gap)
    shown = [label for label in _present(rows, len(class_names)) if label != 0]  # background is not coloured
    legend = _legend(shown, class_names, width - 2 * gap)
    canvas = Image.new("RGB", (width, top + sum(heights) + gap * len(heights) + legend.height + gap), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=15)
    for column, title in enumerate(titles):
        draw.text((gap + column * (cell + gap) + cell / 2, top / 2), title, fill=INK, font=font, anchor="mm")
    y = top
    for line, height in zip(drawn, heights, strict=True):
        for column, picture in enumerate(line):
            left = gap + column * (cell + gap) + (cell - picture.width) // 2
            canvas.paste(picture, (left, y + (height - picture.height) // 2))
        y += height + gap
    canvas.paste(legend, (gap, y))
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, format="PNG")
    return path


def refuse_masked(name: str, array: object, remedy: str) -> None:
    """Refuse a masked array of NumPy, whose mask np.asarray drops without a word.

    Args:
      name: of the array, for the message.
      array: anything.
      remedy: what to do, for the message.

    Raises:
      TypeError: if it is one.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"expected {name} without a mask, got a masked array of NumPy; {remedy}")


def _checked_image(image):
    refuse_masked("an image", image, "fill it first, .filled(0)")
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected an image [H, W, 3] of uint8, got {image.shape} of {image.dtype}; convert "
                         "it to RGB in 0..255 first")
    return image


def _checked_labels(labels):
    refuse_masked("labels", labels, "fill it first, .filled(255) for void")
    labels = np.asarray(labels)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer) or labels.size == 0:
        raise ValueError(f"expected labels [H, W] of integers, got {labels.shape} of {labels.dtype}; take "
                         "the argmax over the classes first")
    if labels.min() < 0 or labels.max() > 255:
        raise ValueError(f"expected labels in 0..255, got {labels.min()}..{labels.max()}")
    return labels.astype(np.uint8)


def _edges(labels):
    """True where a neighbour above, below, left or right has another label."""
    edges = np.zeros(labels.shape, bool)
    down, right = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edges[1:] |= down
    edges[:-1] |= down
    edges[:, 1:] |= right
    edges[:, :-1] |= right
    return edges


def _thick(edges, labels, width):
    """Edges that reach `width` pixels into the objects, whose own edge is the first of them."""
    if not width:
        return np.zeros_like(edges)
    edges &= labels != 0
    for _ in range(width - 1):
        wider = edges.copy()
        wider[1:] |= edges[:-1]
        wider[:-1] |= edges[1:]
        wider[:, 1:] |= edges[:, :-1]
        wider[:, :-1] |= edges[:, 1:]
        wider &= labels != 0
        if np.array_equal(wider, edges):  # the objects are full
            break
        edges = wider
    return edges


def _cell_picture(row, at, cell):
    """One picture of the grid, its longest side `cell`."""
    image = _checked_image(row[0])
    scale = cell / max(image.shape[:2])
    size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
    if row[at] is None:
        empty = Image.new("RGB", size, FAINT)
        ImageDraw.Draw(empty).text((size[0] / 2, size[1] / 2), "none", fill=INK, anchor="mm",
                                   font=ImageFont.load_default(size=13))
        return empty
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    if at == 0:
        return picture
    labels = _checked_labels(row[at])
    if labels.shape != image.shape[:2]:
        raise ValueError(f"expected masks of the image's size {image.shape[:2]}, got {labels.shape}; resize "
                         "the mask with nearest neighbours")
    labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    return Image.fromarray(overlay(np.asarray(picture), labels))


def _present(rows, num_classes):
    """Class indices that occur in any mask, void last; refuses those without a name."""
    masks = [mask for row in rows for mask in row[1:] if mask is not None]
    found = sorted({int(label) for mask in masks for label in np.unique(mask)})
    unnamed = [label for label in found if label >= num_classes and label != VOID]
    if unnamed:
        raise ValueError(f"expected labels in 0..{num_classes - 1} or 255, got {unnamed}; give the class "
                         "names of the checkpoint")
    return found


def _legend(present, class_names, width):
    """Swatches and names, as many lines as they need."""
    font, swatch, line_height = ImageFont.load_default(size=14), 16, 24
    places, x, y = [], 0, 0
    for label in present:
        name = "void" if label == VOID else class_names[label]
        needed = swatch + 6 + int(font.getlength(name)) + 18
        if x and x + needed > width:
            x, y = 0, y + line_height
        places.append((label, name, x, y))
        x += needed
    legend = Image.new("RGB", (width, y + line_height), PAPER)
    draw = ImageDraw.Draw(legend)
    for label, name, left, upper in places:
        colour = tuple(int(part) for part in bright_palette(256)[label])
        draw.rectangle((left, upper + 4, left + swatch, upper + 4 + swatch), fill=colour, outline=INK)
        draw.text((left + swatch + 6, upper + 4 + swatch / 2), name, fill=INK, font=font, anchor="lm")
    return legend
