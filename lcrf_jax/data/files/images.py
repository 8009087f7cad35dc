"""Photographs of any kind of file as RGB arrays.

Every failure is a FileNotFoundError or ValueError that names the file and the remedy.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 160_000_000
_ORIENTATION = 0x0112


def is_photograph(name: str) -> bool:
    """Whether the extension of a file name is one of `EXTENSIONS`, in capitals or not."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


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
      ValueError: if the file is not an image, is cut short, or has more than 160 million pixels.
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
      ValueError: if the file is not an image, is cut short, or has more than 160 million pixels.
    """
    with opened(path) as image:
        return opened_as_rgb(image, path)


def opened_as_rgb(image: Image.Image, name: str | os.PathLike) -> tuple[np.ndarray, int]:
    """A Pillow image as the array that `read_image` gives, and how it was turned.

    Args:
      image: the image.
      name: what it is called in messages.
    Returns:
      [H, W, 3] uint8, RGB, and the EXIF orientation (1 to 8) that was undone.
    Raises:
      ValueError: if the range of its values is not known.
    """
    image.load()
    turn = _orientation(image)
    if turn != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, 2), turn
    if image.mode in ("I", "F"):
        raise ValueError(f"{name}: the range of mode {image.mode!r} is not known; save it with 8 bits a channel")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), turn


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """Height and width of a photograph as it is shown. Only the head of the file is read; what follows may be damaged.

    Args:
      path: the file.
    Returns:
      (height, width) in pixels.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, or has more than 160 million pixels.
    """
    with opened(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """An image file for a `with` block, its pixels not decoded yet. Errors within the block name the file.

    Args:
      path: the file.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, is damaged, or has more than 160 million pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} has zero bytes; copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
            image = Image.open(path)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise _Refused(
                    f"{path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} "
                    "million; scale it down or cut it into pieces"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; scale it down or cut it into pieces") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that Pillow can read") from error
    except _Refused:
        raise
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(_damaged(path, error)) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of every kind
        raise ValueError(_damaged(path, error)) from error


class _Refused(ValueError):
    pass


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} is damaged or cut short ({error or type(error).__name__}); copy it again"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation from 1 to 8; 1 where there is none or it cannot be read, as viewers have it."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF data raise errors of every kind, and say nothing of the picture
        return 1
    return turn if turn in range(1, 9) else 1
