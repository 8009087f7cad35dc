"""Image files of any kind as arrays: photographs as RGB, masks as class indices.

Every failure is a FileNotFoundError or ValueError that names the file and the remedy.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lcrf_jax.data.sources import VOID

MAX_PIXELS = 64_000_000
_ORIENTATION = 0x0112


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A photograph as the viewer shows it: EXIF rotation applied, any colour mode made RGB.

    Transparent pixels are laid on white; 16-bit grey is scaled to 8 bits; of an animation the first frame
    is taken.

    Args:
      path: the file.
    Returns:
      [H, W, 3] uint8, RGB.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, is cut short, or has more than 64 million pixels.
    References:
      None.
    """
    return read_turned_image(path)[0]


def read_turned_image(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The photograph of `read_image`, and how it was turned.

    Args:
      path: the file.
    Returns:
      [H, W, 3] uint8, RGB, and the EXIF orientation (1 to 8) that was undone.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, is cut short, or has more than 64 million pixels.
    References:
      None.
    """
    with _open(path) as image:
        turn = image.getexif().get(_ORIENTATION, 1)
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, 2), turn
        if image.mode in ("I", "F"):
            raise ValueError(
                f"{path}: the range of mode {image.mode!r} is not known; save it with 8 bits a channel"
            )
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.array(image.convert("RGB")), turn


def read_mask(path: str | os.PathLike, num_classes: int) -> np.ndarray:
    """A mask of class indices, from a grey or palette file; colours are never looked up.

    Args:
      path: the file.
      num_classes: K, background included.
    Returns:
      [H, W] uint8 with values below K, or 255 for void.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, holds colours instead of indices, or an index is out of range.
    References:
      None.
    """
    with _open(path) as image:
        if image.mode not in ("L", "P", "1", "I;16", "I"):
            raise ValueError(
                f"{path}: expected class indices (a grey or palette PNG), got mode {image.mode!r}; "
                "colours cannot be told from classes, save the indices"
            )
        mask = np.array(image).astype(np.int64)
    wrong = (mask >= num_classes) & (mask != VOID) | (mask < 0)
    if wrong.any():
        row, column = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{path}: label {mask[row, column]} at row {row}, column {column}; expected 0 to "
            f"{num_classes - 1} (classes.txt has {num_classes} classes) or {VOID} for void"
        )
    return mask.astype(np.uint8)


def _open(path: str | os.PathLike) -> Image.Image:
    """An opened, fully decoded image; every failure names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} has zero bytes; copy it again")
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} "
                "million; scale it down or cut it into tiles"
            )
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; scale it down or cut it into tiles") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); copy it again") from error
    return image
