"""Masks of class indices: grey or palette files that hold the indices, or colours with a file that names them.

Every failure is a FileNotFoundError or ValueError that names the file and the remedy.
"""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from lcrf_jax.data.example import VOID
from lcrf_jax.data.files.depth import Stated, index_values, stated
from lcrf_jax.data.files.images import opened
from lcrf_jax.data.files.mask_names import is_exact
from lcrf_jax.data.files.tags import read_text

_MOST_OPENED, _ENOUGH = 64, 12  # masks that are looked at to tell what kind they are


def read_mask(
    path: str | os.PathLike, num_classes: int, *, colours: dict[tuple[int, int, int], int] | None = None
) -> np.ndarray:
    """A mask of class indices.

    A grey or palette file holds indices. With `colours` the colours of a palette file count, like those of an RGB file, and
    those of a grey file if all its greys are named. What is wholly transparent in a file of colours is background.

    Args:
      path: the file.
      num_classes: K, background included.
      colours: label of each colour, see `read_colours`.
    Returns:
      [H, W] uint8 with values below K, or 255 for void.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, holds a colour that is not known, is transparent in part, may be indices as
        well as colours, or an index is out of range.
    """
    with opened(path) as image:
        said = stated(image)
        image.load()
        if colours and image.mode not in ("L", "1", "I;16", "I;16B", "I"):
            return _by_colour_and_alpha(image, colours, path)
        if colours and image.mode in ("L", "1") and _greys(image) <= set(colours):
            return _by_grey(image, said, num_classes, colours, path)
        if image.mode not in ("L", "P", "1", "I;16", "I;16B", "I"):
            raise ValueError(
                f"{path}: expected class indices (a grey or palette PNG), got mode {image.mode!r}; "
                "colours cannot be told from classes: save the indices, or name the colours in a colours.csv"
            )
        mask = _indices(image, said, num_classes, path)
        _refuse_transparent(image, mask, path)
    wrong = (mask >= num_classes) & (mask != VOID) | (mask < 0)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{path}: label {mask[row, column]} at row {row}, column {column}; expected 0 to "
            f"{num_classes - 1} (there are {num_classes} classes with background) or {VOID} for void"
        )
    return mask.astype(np.uint8)


def _indices(image: Image.Image, said: Stated, num_classes: int, path: str | os.PathLike) -> np.ndarray:
    """The numbers of a grey or palette file, where it is sure that no program has numbered its palette anew."""
    try:
        mask = index_values(image, said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if image.mode != "P":
        return mask
    used, palette = np.unique(mask), np.zeros((256, 3), np.int64)
    given = np.array(image.getpalette("RGB") or (), np.int64).reshape(-1, 3)
    palette[: len(given)] = given
    greys = palette[used, 0]
    is_grey = (palette[used] == greys[:, None]).all()
    if is_grey and np.array_equal(greys, used):
        return mask
    # Programs that make files small number a palette anew: grey labels are then the greys, and no longer the numbers.
    fits = is_grey and ((greys < num_classes) | (greys == VOID)).all() and ((greys > 0) & (greys < num_classes)).any()
    if image.format == "GIF":
        if not fits:
            raise ValueError(f"{path}: GIF files may number their colours anew; save the mask as PNG, or name the colours in colours.csv")
        return palette[mask, 0]
    if fits and len(set(greys.tolist())) == len(greys):
        raise ValueError(
            f"{path}: its numbers {used.tolist()} have the greys {greys.tolist()}, and either may be the indices; save it as a grey PNG"
        )
    return mask


def _refuse_transparent(image: Image.Image, mask: np.ndarray, path: str | os.PathLike) -> None:
    """A class that is transparent in a file of indices may have been erased."""
    clear = image.info.get("transparency")
    if clear is None:
        return
    numbers = np.array(image) if image.mode == "P" else mask
    alpha = np.full(max(256, int(numbers.max(initial=0)) + 1), 255)
    if isinstance(clear, bytes):
        alpha[: len(clear)] = np.frombuffer(clear, np.uint8)
    elif isinstance(clear, int) and clear < len(alpha):
        alpha[clear] = 0
    wrong = (alpha[numbers] < 255) & (mask != 0) & (mask != VOID)
    if wrong.any():
        raise ValueError(
            f"{path}: its number {numbers[wrong][0]} is transparent, which may mean erased; save the mask without transparency"
        )


def _by_colour_and_alpha(image: Image.Image, colours: dict, path: str | os.PathLike) -> np.ndarray:
    """The labels of an image with or without transparency: programs keep colours under what was erased."""
    if not image.has_transparency_data:
        return _by_colour(np.asarray(image.convert("RGB")), colours, path)
    pixels = np.array(image.convert("RGBA"))
    alpha = pixels[..., 3]
    partly = (alpha > 0) & (alpha < 255)
    if partly.any():
        row, column = (int(i) for i in np.argwhere(partly)[0])
        raise ValueError(
            f"{path}: the pixel at row {row}, column {column} is transparent in part ({partly.mean():.2%} of the pixels are); "
            "save the mask without transparency and without smoothing"
        )
    pixels[alpha == 0, :3] = next(iter(colours))  # any colour that is known
    return np.where(alpha == 0, 0, _by_colour(pixels[..., :3], colours, path)).astype(np.uint8)


def _greys(image: Image.Image) -> set[tuple[int, int, int]]:
    """The colours of a grey image."""
    return {(grey, grey, grey) for grey in np.unique(np.asarray(image.convert("L"))).tolist()}


def _by_grey(image: Image.Image, said: Stated, num_classes: int, colours: dict, path: str | os.PathLike) -> np.ndarray:
    """The labels of a grey image whose greys are all named colours."""
    labels = _by_colour_and_alpha(image, colours, path)
    numbers = index_values(image, said) if image.mode == "L" and not said.white_is_zero else np.full(labels.shape, VOID)
    may_be = ((numbers < num_classes) | (numbers == VOID)).all() and ((numbers > 0) & (numbers < num_classes)).any()
    if may_be and not np.array_equal(numbers, labels):
        raise ValueError(
            f"{path}: its greys {np.unique(numbers).tolist()} may be indices, and are colours of other classes in colours.csv; "
            "save the mask as RGB if they are colours, or give classes other colours"
        )
    return labels


def read_colours(path: str | os.PathLike, class_names: tuple[str, ...]) -> dict[tuple[int, int, int], int]:
    """The colours of the classes in masks.

    ::

        class,colour
        background,#000000
        horse,#c00080
        void,#e0e0c0

    Args:
      path: the file, in the form above; a class may have several colours, ``void`` is not judged.
      class_names: names of all K classes, background first.
    Returns:
      dict from (red, green, blue) to class index, 255 for void.
    Raises:
      ValueError: if a row is wrong, a class not known, or a colour stands twice; the message names the line.
    """
    labels = {name: index for index, name in enumerate(class_names)} | {"void": VOID}
    rows = csv.reader(io.StringIO(read_text(path)))
    colours: dict[tuple[int, int, int], int] = {}
    if [cell.strip().lower() for cell in next(rows, [])] not in (["class", "colour"], ["class", "color"]):
        raise ValueError(f"{path}, line 1: expected the header 'class,colour'; write it")
    for row in rows:
        row, where = [cell.strip() for cell in row], f"{path}, line {rows.line_num}"
        if not any(row):
            continue
        if len(row) != 2 or not re.fullmatch(r"#[0-9a-fA-F]{6}", row[1]):
            raise ValueError(f"{where}: expected 'horse,#c00080', got {','.join(row)!r}; correct it")
        if row[0] not in labels:
            raise ValueError(f"{where}: unknown class {row[0]!r}: expected one of {', '.join(labels)}")
        red, green, blue = bytes.fromhex(row[1][1:])
        if colours.setdefault((red, green, blue), labels[row[0]]) != labels[row[0]]:
            raise ValueError(f"{where}: the colour {row[1]} belongs to another class already; keep one row")
    if not colours:
        raise ValueError(f"{path} names no colour; write one class a line")
    return colours


def _by_colour(pixels: np.ndarray, colours: dict, path: str | os.PathLike) -> np.ndarray:
    """The labels of RGB pixels."""

    def packed(rgb):
        return (rgb[..., 0].astype(np.int64) << 16) + (rgb[..., 1].astype(np.int64) << 8) + rgb[..., 2]

    known = packed(np.array(list(colours), np.int64))
    order, keys = np.argsort(known), packed(pixels)
    at = np.minimum(np.searchsorted(known[order], keys), len(known) - 1)
    wrong = known[order][at] != keys
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        colour = "#" + bytes(pixels[row, column].tolist()).hex()
        raise ValueError(
            f"{path}: the colour {colour} at row {row}, column {column} ({wrong.mean():.2%} of the pixels) belongs to no "
            "class; name it in colours.csv, or save the mask without smoothing and not as JPEG"
        )
    return np.array(list(colours.values()), np.uint8)[order][at]


def refuse_black_and_white(mask: np.ndarray, tags: np.ndarray, path: Path) -> None:
    """A mask of 0 and 255 alone under a foreground tag is a black and white picture, not indices.

    One whose object is small is no object with a border that is void if most masks beside it are black and white too.
    """
    is_void = mask == VOID
    if not (tags[1:].any() and is_void.any()) or mask[~is_void].any():
        return
    if is_void.mean() > 0.1 or _black_and_white_beside(path):
        raise ValueError(
            f"{path}: holds only 0 and {VOID} although the image has tags; {VOID} means void, write an "
            "object as its class index, counted from 0 for the background"
        )


def _black_and_white_beside(path: Path) -> bool:
    """Whether of the masks in the folder of one, or some of these, most hold 0 and 255 alone."""
    names = sorted(name for name in os.listdir(path.parent) if is_exact(name) and name != path.name)
    shown = []
    for name in names[:: max(1, len(names) // _MOST_OPENED)]:
        try:
            with opened(path.parent / name) as image:
                said = stated(image)
                image.load()
                if image.mode not in ("L", "P"):
                    continue
                values = set(np.unique(index_values(image, said)).tolist())
        except (ValueError, FileNotFoundError):  # told when it is read itself
            continue
        if values != {0}:
            shown.append(values <= {0, VOID})
        if len(shown) == _ENOUGH:
            break
    return 2 * sum(shown) > len(shown)


def fit_mask(mask: np.ndarray, shape: tuple[int, int], turn: int, path: Path, image_path: Path) -> np.ndarray:
    """The mask at the size of its photograph as shown: turned with it if the photograph was labelled as stored."""
    if 5 <= turn <= 8 and mask.shape != shape and mask.shape == shape[::-1]:
        # The photograph was labelled as stored: it turns with it.
        mask = np.ascontiguousarray(
            {5: mask.T, 6: np.rot90(mask, -1), 7: np.rot90(mask, 2).T, 8: np.rot90(mask)}[turn]
        )
    if mask.shape != shape:
        raise ValueError(
            f"{path} is {mask.shape[1]}x{mask.shape[0]} pixels and its photograph {image_path} "
            f"{shape[1]}x{shape[0]} (width x height); save the mask at the size of the photograph"
        )
    if turn in (2, 3, 4) or turn > 4 and shape[0] == shape[1]:
        raise ValueError(
            f"{image_path} carries the EXIF orientation {turn}, and the size of {path} does not tell "
            "whether the mask is turned with it; save the photograph upright, without the tag"
        )
    return mask
