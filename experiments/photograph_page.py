"""A page where one drops a photograph and sees its mask: its HTML, the network behind it, and what it shows."""

import contextlib
import io
import pathlib
import threading
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.data.example import tag_vector
from lcrf_jax.data.files.finding import files_below
from lcrf_jax.data.files.images import opened_as_rgb
from lcrf_jax.machine.files import at_home
from lcrf_jax.pictures.palette import bright_palette, index_picture, overlay
from lcrf_jax.pictures.report import data_url, templates
from lcrf_jax.predict.refinement import adjustable_refinement
from lcrf_jax.predict.resizing import class_statistics, labels_and_confidence, working_size
from lcrf_jax.predict.segmenter import make_segmenter, segment

SLIDER = ("name", "title", "least", "greatest", "step", "meaning")
# Of the refinement, each with what SLIDER names.
SLIDERS = (
    ("bilateral_weight", "weight of position and colour", 0.0, 20.0, 0.5,
     "how strongly near pixels of like colour pull each other to one class"),
    ("bilateral_position_width", "width of position, pixels", 5.0, 160.0, 5.0, "how far apart they may be"),
    ("bilateral_colour_width", "width of colour", 2.0, 60.0, 1.0, "how unlike their colours, from 0 to 255, may be"),
    ("gaussian_weight", "weight of position alone", 0.0, 20.0, 0.5, "how strongly neighbours of any colour do: more smooths"),
    ("unary_weight", "weight of the network", 0.1, 5.0, 0.1, "how much the network's own opinion counts"),
    ("num_iterations", "iterations of mean field", 5, 20, 5, "how often all pixels are updated"),
)  # fmt: skip


# The only decoders that an uploaded file meets; Pillow has forty more, some of which start other programs.
FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "TIFF": "image/tiff",
           "GIF": "image/gif"}  # fmt: skip
MOST_SIDE = 16_000  # pixels; what the page shows are JPEG files, which have at most 65,500
MOST_EXAMPLES, THUMBNAIL_SIDE = 6, 160
MOST_WAITING = 8  # photographs at once, each with its file in memory


class Refused(ValueError):
    """A request that cannot be done; the message is for the person at the page.

    Args:
      message: what was expected, what came, and the remedy.
      code: of HTTP.
    """

    def __init__(self, message, code=400):
        super().__init__(message)
        self.code = code


def slider_defaults(inference):
    """The value of each slider in the settings of a run."""
    return {name: inference.get(name, inference["kernel"].get(name)) for name, *_ in SLIDERS}


def slider_values(given):
    """The values of sliders that were moved.

    Args:
      given: dict from a slider's name to text.

    Returns:
      dict from name to number.

    Raises:
      Refused: if there is no such slider, or a value is no number or out of range.
    """
    known = [name for name, *_ in SLIDERS]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise Refused(f"unknown setting {unknown[0][:40]!r}; there are crf, tag, {', '.join(known)}")
    values = {}
    for name, title, least, greatest, *_ in SLIDERS:
        if name in given:
            try:
                value = float(given[name])
            except ValueError:
                value = float("nan")
            if not least <= value <= greatest:
                raise Refused(f"{title}: expected {least:g} to {greatest:g}, got {given[name][:20]!r}")
            values[name] = round(value) if name == "num_iterations" else value
    return values


def decoded(content, max_pixels):
    """The photograph of an uploaded file. Its head is looked at before any pixel is decoded.

    Args:
      content: bytes of the file.
      max_pixels: larger photographs are refused.

    Returns:
      ([H, W, 3] uint8, a note on what is not shown of the file, or "").

    Raises:
      Refused: if it is no photograph, is damaged, or too large.
    """
    if not content:
        raise Refused("the file is empty; choose another one, or copy it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(io.BytesIO(content), formats=list(FORMATS))
        with image:
            _check_size(image.width, image.height, max_pixels)
            # Cameras keep a preview beside the photograph, as MPO; that is no animation.
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            note = "the first picture of several in the file" if animated else ""
            return opened_as_rgb(image, "the photograph")[0], note
    except (Refused, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Refused(_too_large("many more", max_pixels), 413) from error
    except Image.UnidentifiedImageError as error:
        raise Refused(
            "this is no photograph that can be read here, or is damaged: save it as a JPEG, PNG, WebP, BMP, TIFF or GIF file",
            415,
        ) from error
    except Exception as error:  # decoders raise errors of every kind
        if str(error).startswith("the photograph"):  # of a range of values that is not known
            raise Refused(str(error)) from error
        raise Refused("the file is damaged or cut short: copy it again, or save it anew as a JPEG file") from error


def _check_size(width, height, max_pixels):
    if width * height > max_pixels:
        raise Refused(_too_large(f"{width} x {height}", max_pixels), 413)
    if max(width, height) > MOST_SIDE:
        raise Refused(
            f"the photograph has {width} x {height} pixels; a side may have {MOST_SIDE:,} here: scale it down, cut it "
            "into pieces, or use experiments.predict", 413
        )  # fmt: skip


def _too_large(size, max_pixels):
    return (
        f"the photograph has {size} pixels; at most {max_pixels / 1e6:g} million are taken here: scale it down, or use "
        "experiments.predict"
    )


class Labeller:
    """A trained network behind a lock: one photograph at a time is decoded, labelled and drawn.

    Args:
      description: of the run.
      params: its parameters.
      max_pixels: larger photographs are refused.
    """

    def __init__(self, description, params, max_pixels):
        self.description, self._max_pixels = description, max_pixels
        self.class_names = tuple(description["class_names"])
        self._segmenter, self._lock = make_segmenter(description, params), threading.Lock()
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        blank = np.zeros((64, 64, 3), np.uint8)
        segment(self._segmenter, blank, crf=False)  # compiles what is the same for all sizes

    @contextlib.contextmanager
    def place(self):
        """A place among those whose photographs wait; to be taken before the file is read into memory.

        Raises:
          Refused: if there is none.
        """
        if not self._places.acquire(blocking=False):
            raise Refused(f"{MOST_WAITING} photographs are being worked on already; try again in a moment", 503)
        try:
            yield
        finally:
            self._places.release()

    def answer(self, content, given, *, crf, tags):
        """What the page shows of an uploaded file.

        Args:
          content: bytes of the file.
          given: dict from the name of a slider that was moved to text.
          crf: whether to refine.
          tags: names of the classes that may occur, or None.

        Returns:
          dict that JSON can hold, see `shown`, with a "note".

        Raises:
          Refused: if anything of these is not right.
        """
        values = slider_values(given)
        try:
            present = None if tags is None else tag_vector(tags, self.class_names)
        except ValueError as error:
            raise Refused(str(error)) from error
        with self._lock:
            image, note = decoded(content, self._max_pixels)
            labels, confidence = self._labels(image, values, crf, present)
            return {**shown(self.class_names, image, labels, confidence), "note": note}

    def _labels(self, image, values, crf, present):
        """([H, W] uint8 labels, [H, W] float16 confidence) of a photograph."""
        segmenter = self._segmenter
        if values:
            shape = working_size(image.shape[:2], segmenter.max_side)
            segmenter = segmenter._replace(refine=adjustable_refinement(self.description["inference"], values, shape))
        result = segment(segmenter, image, crf=crf, tags=present)
        return labels_and_confidence(result.best_log_probs, result.size)


def shown(names, image, labels, confidence):
    """What the page shows: pictures as data URLs, and the classes with area and confidence."""
    colours = bright_palette(len(names))
    counts, sums = class_statistics(labels, confidence, len(names))
    grey = Image.fromarray(np.uint8(np.round(255 * confidence.astype(np.float32))))
    return {
        "classes": [
            {"name": names[k], "colour": "#" + bytes(colours[k].tolist()).hex(), "area": float(counts[k] / labels.size),
             "confidence": float(sums[k] / counts[k])}
            for k in np.argsort(-counts) if counts[k]
        ],
        "photograph": data_url(Image.fromarray(image), "JPEG"),
        "overlay": data_url(Image.fromarray(overlay(image, labels)), "JPEG"),
        "mask": data_url(index_picture(labels, bright_palette(256)), "PNG"),
        "confidence": data_url(grey, "JPEG"),
    }  # fmt: skip


class Example(NamedTuple):
    """A photograph that the page offers: its name, the bytes of its file, and a small picture of it as a data URL."""

    name: str
    content: bytes
    thumbnail: str


def examples_of(folder, *, max_bytes, max_pixels):
    """The first photographs of a folder that the page takes, at most MOST_EXAMPLES.

    Args:
      folder: where they are, at any depth; "" for none.
      max_bytes, max_pixels: larger ones are passed over.

    Returns:
      list of Example.

    Raises:
      ValueError: if there is none; the message tells of the last that could not be taken.
    """
    if not folder:
        return []
    root, found, why = at_home(folder), [], "there is no photograph"
    for name in sorted(files_below(root).photographs) if root.is_dir() else []:
        try:
            content = (root / name).read_bytes()
            if len(content) > max_bytes:
                raise Refused(f"it has more than {max_bytes / 1e6:g} MB")
            image = Image.fromarray(decoded(content, max_pixels)[0])
        except (Refused, OSError) as error:
            why = f"{name}: {error}"
            continue
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        found.append(Example(pathlib.Path(name).name, content, data_url(image, "JPEG", quality=85)))
        if len(found) == MOST_EXAMPLES:
            break
    if not found:
        raise ValueError(f"--examples: expected a folder of photographs, got {folder} ({why})")
    return found


def page(labeller, max_bytes, examples=()):
    """The HTML of the page.

    Args:
      labeller: Labeller.
      max_bytes: largest upload.
      examples: what `examples_of` gives.

    Returns:
      str.
    """
    facts = {
        "sliders": [dict(zip(SLIDER, slider, strict=True)) for slider in SLIDERS],
        "values": slider_defaults(labeller.description["inference"]),
        "classes": list(labeller.class_names[1:]),
        "formats": list(FORMATS.values()),
        "max_bytes": max_bytes,
        "examples": [{"name": example.name, "thumbnail": example.thumbnail} for example in examples],
    }
    return templates(__package__).get_template("photograph_page.html.jinja").render(facts=facts)
