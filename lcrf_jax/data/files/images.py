"""Photographs of any kind of file as RGB arrays.

Every failure is a FileNotFoundError or ValueError that names the file and the remedy.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin

from lcrf_jax.data.files.depth import colour_bytes, grey_bytes, needs_lower_bytes, stated

MAX_PIXELS = 160_000_000
# Formats of which Pillow knows the head alone, that need another program, or that are drawings and videos.
NOT_TAKEN = ("BUFR", "EPS", "FPX", "GRIB", "HDF5", "IPTC", "MCIDAS", "MIC", "MPEG", "PDF", "WMF")
_NO_PHOTOGRAPHS = (".fit", ".ico", ".icns", ".cur")  # what watches and systems put beside photographs
_HEIF = "install the package pillow-heif, or save them as JPEG"
_RAW = "raw files of a camera; save them as JPEG or TIFF"
ADVICE = {
    ".heic": _HEIF, ".heif": _HEIF, ".hif": _HEIF, ".jxl": "save them as JPEG or PNG", ".svg": "drawings; save them as PNG",
    ".pdf": "documents; save their pages as PNG", ".eps": "drawings; save them as PNG", ".npy": "save them as PNG or TIFF",
    ".fit": "records of sports; name pictures .fits", ".ico": "icons; save them as PNG", ".icns": "icons; save them as PNG",
    ".dcm": "save them as PNG or TIFF", ".zip": "unpack it", ".icloud": "not on this machine; download them", ".mp4": "a video; save its frames as PNG",
    **dict.fromkeys((".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"), _RAW),
}  # fmt: skip
_WIDTH, _HEIGHT, _ORIENTATION, _SUBFILE_TYPE = 256, 257, 0x0112, 254  # tags
_MOST_PAGES = 64
_TURNS = dict(enumerate((
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip


@functools.cache
def extensions() -> dict[str, str]:
    """The formats of photographs that can be read here.

    HEIC is among them where the package pillow-heif is installed.

    Returns:
      dict from extension, in small letters and with its dot, to Pillow's name of the format.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    known = Image.registered_extensions()  # this loads every format
    return {
        end: name for end, name in known.items() if name in Image.OPEN and name not in NOT_TAKEN and end not in _NO_PHOTOGRAPHS
    }


def is_photograph(name: str) -> bool:
    """Whether the extension of a file name is one of `extensions`, in capitals or not."""
    return os.path.splitext(name)[1].lower() in extensions()


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A photograph as the viewer shows it: EXIF rotation applied, any colour mode made RGB.

    Transparent pixels are laid on white; what has more than 8 bits is scaled, see `lcrf_jax.data.files.depth`; of an
    animation the first frame is taken, of a TIFF file the first page that is no thumbnail.

    Args:
      path: the file.
    Returns:
      [H, W, 3] uint8, RGB.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, is cut short, or has more than 160 million pixels.
    """
    return read_turned_image(path)[0]


def read_turned_image(path: str | os.PathLike, content: bytes | None = None) -> tuple[np.ndarray, int]:
    """The photograph of `read_image`, and how it was turned.

    Args:
      path: the file.
      content: its bytes, where they are in memory already; `path` is then what it is called in messages.
    Returns:
      [H, W, 3] uint8, RGB, and the EXIF orientation (1 to 8) that was undone.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, is cut short, or has more than 160 million pixels.
    """
    with opened(path, content) as image:
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
    said = stated(image)
    again = _source(image) if needs_lower_bytes(image, said) else None
    before = _orientation(image) if image.format == "TIFF" else 1  # Pillow turns these itself while it decodes them
    image.load()
    left = _orientation(image)
    turn = left if before == 1 else before
    if again is not None:
        image = colour_bytes(image, again, said, name)
    if left != 1:
        image = image.transpose(_TURNS[left])
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return np.repeat(grey_bytes(np.asarray(image), said, name)[..., None], 3, 2), turn
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB")), turn


def image_size(path: str | os.PathLike, content: bytes | None = None) -> tuple[int, int]:
    """Height and width of a photograph as it is shown. Only the head of the file is read; what follows may be damaged.

    Args:
      path: the file.
      content: its bytes, where they are in memory already; `path` is then what it is called in messages.
    Returns:
      (height, width) in pixels.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, or has more than 160 million pixels.
    """
    with opened(path, content) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow may tell the turned size of these
            width, height = (int(image.tag_v2.get(tag, side)) for tag, side in ((_WIDTH, width), (_HEIGHT, height)))
        return (width, height) if _orientation(image) >= 5 else (height, width)


@contextlib.contextmanager
def opened(path: str | os.PathLike, content: bytes | None = None) -> Iterator[Image.Image]:
    """An image file for a `with` block, its pixels not decoded yet. Errors within the block name the file.

    Args:
      path: the file.
      content: its bytes, where they are in memory already; `path` is then what it is called in messages.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is not an image, is damaged, or has more than 160 million pixels.
    """
    path = Path(path)
    if content is None:
        _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
            file = path if content is None else io.BytesIO(content)
            image = Image.open(file, formats=sorted(set(extensions().values())))
        with image:
            _turn_to_full_page(image)
            if image.width * image.height > MAX_PIXELS:
                raise _Refused(
                    f"{path} has {image.width}x{image.height} pixels, more than {MAX_PIXELS // 10**6} "
                    "million; scale it down or cut it into pieces"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; scale it down or cut it into pieces") from error
    except Image.UnidentifiedImageError as error:
        advice = ADVICE.get(path.suffix.lower())
        raise ValueError(f"{path} is not an image that Pillow can read" + (f" ({advice})" if advice else "")) from error
    except _Refused:
        raise
    except PermissionError as error:
        raise ValueError(f"{path} may not be read ({error.strerror}); change its permissions") from error
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(_damaged(path, error)) from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise errors of every kind
        raise ValueError(_damaged(path, error)) from error


class _Refused(ValueError):
    pass


def _check_file(path: Path) -> None:
    """There is a file with bytes in it: opening a pipe would wait for ever."""
    if not path.exists():
        where = f" is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else " does not exist"
        raise FileNotFoundError(f"{path}{where}")
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'a pipe, socket or device'}; give a file")
    if about.st_size == 0:
        raise ValueError(f"{path} has zero bytes; copy it again")


def _turn_to_full_page(image: Image.Image) -> None:
    """Of a TIFF file with several pages the first one of full size: the others may be thumbnails, before it or after."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile) or image.n_frames == 1:
        return
    areas = []
    for page in range(min(image.n_frames, _MOST_PAGES)):
        image.seek(page)
        reduced = image.tag_v2.get(_SUBFILE_TYPE, 0) & 1
        areas.append(0 if reduced else image.width * image.height)
    image.seek(areas.index(max(areas)))


def _source(image: Image.Image) -> str | io.BytesIO:
    """Where an image that is not decoded yet can be read a second time."""
    filename, fp = getattr(image, "filename", ""), getattr(image, "fp", None)
    if filename or fp is None:
        return str(filename)
    at = fp.tell()
    fp.seek(0)
    copy = io.BytesIO(fp.read())
    fp.seek(at)
    return copy


def _damaged(path: Path, error: Exception) -> str:
    said = " ".join(str(error).split())  # some decoders say it in several lines
    return f"{path} is damaged or cut short ({said or type(error).__name__}); copy it again"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation from 1 to 8; 1 where there is none or it cannot be read, as viewers have it."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF data raise errors of every kind, and say nothing of the picture
        return 1
    return turn if turn in range(1, 9) else 1
