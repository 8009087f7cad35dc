"""A trained run as one object: a checkpoint in, labels of photographs out."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.data.example import tag_vector
from lcrf_jax.data.files.images import opened_as_rgb, read_image
from lcrf_jax.machine.cache import default_directory
from lcrf_jax.machine.compilation import keep_programs
from lcrf_jax.machine.errors import nearest
from lcrf_jax.machine.files import at_home
from lcrf_jax.pictures.palette import bright_palette, overlay, refuse_masked, save_index_png
from lcrf_jax.predict.checks import check_description, check_origin, check_parameters
from lcrf_jax.predict.resizing import interpolated_probs, labels_and_confidence
from lcrf_jax.predict.segmenter import make_segmenter, segment
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.compact import SHIPPED, compact_description, load_compact, shipped_models
from lcrf_jax.runfolder.description import DESCRIPTION_FILE, FOR_INFERENCE, folder_of_run, load_description

_NO_PIXELS = "it has no pixels: look at how it was cut"


class Labelling(NamedTuple):
    """What a model says of one photograph of H x W pixels.

    Attributes:
      labels: [H, W] uint8, the most probable class of every pixel.
      confidence: [H, W] float16, the probability of that class.
      probabilities: [h, w, K] float32, of all classes. h x w is H x W, but smaller for a photograph with a side above
        `Model.max_side`; `lcrf_jax.predict.resizing.resized_map` enlarges it.
      class_names: names of the K classes, background first.
      palette: [K, 3] uint8 RGB, the colour of each class in the overlay.
      image: [H, W, 3] uint8 RGB, the photograph.

    Example:
      >>> found = lcrf_jax.load("animals").segment("photo.jpg")  # doctest: +SKIP
      >>> found.overlay().save("overlay.jpg")  # doctest: +SKIP
      >>> found.save("mask.png")  # doctest: +SKIP
    """

    labels: np.ndarray
    confidence: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]
    palette: np.ndarray
    image: np.ndarray

    def overlay(self, *, alpha: float = 0.5, outline: int | None = None) -> Image.Image:
        """The photograph with the classes laid over it in colour, and an outline round each.

        Args:
          alpha: share of the colour, 0..1.
          outline: width of the outline in pixels; 0 draws none, None goes by the size of the photograph.

        Returns:
          PIL.Image.Image; a notebook shows it, and ``.save("overlay.jpg")`` writes it.

        Raises:
          ValueError: if alpha or outline is no number, or out of range.
        """
        return Image.fromarray(overlay(self.image, self.labels, alpha, outline=outline))

    def save(self, path: str | os.PathLike) -> None:
        """Write the labels as a PNG of class indices, which viewers show in the colours of PASCAL VOC.

        Args:
          path: file NAME.png; its folder must be there.

        Raises:
          ValueError: if the name ends otherwise: a JPEG would change the indices.
          OSError: if it cannot be written.
        """
        path = at_home(path)
        if path.suffix.lower() != ".png":
            raise ValueError(f"{path}: expected a name that ends with .png, which keeps class indices as they are; "
                             "overlay().save(...) writes pictures of other kinds")  # fmt: skip
        save_index_png(path, self.labels)

    def __repr__(self) -> str:
        height, width = self.labels.shape
        found, counts = np.unique(self.labels, return_counts=True)
        names = {k: name for k, name in enumerate(self.class_names)}
        shares = ", ".join(
            f"{names.get(found[i], f'{found[i]} (no class)')} {100 * counts[i] / counts.sum():.3g} %" for i in np.argsort(-counts, kind="stable")
        )
        return f"<Labelling, {height} x {width}: {shares}; mean confidence {self.confidence.astype(np.float32).mean():.2f}>"


class Model:
    """A trained network with its refinement; `load` makes one.

    Args:
      description: of the run, see `lcrf_jax.runfolder.description`.
      params: its parameters for inference.
    """

    def __init__(self, description: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        self.description = description
        self.segmenter = make_segmenter(description, params)
        self.class_names = self.segmenter.class_names
        self.palette = bright_palette(len(self.class_names))
        self.max_side = self.segmenter.max_side

    def __repr__(self) -> str:
        return f"<Model of {len(self.class_names)} classes: {', '.join(self.class_names)}>"

    def segment(
        self,
        image: str | os.PathLike | Image.Image | np.ndarray,
        *,
        crf: bool = True,
        tags: Sequence[str] | None = None,
    ) -> Labelling:
        """Segment one photograph.

        Args:
          image: a path, a Pillow image, or an array [H, W, 3] or [H, W] of uint8 in 0..255.
          crf: whether to refine by mean field of the dense CRF.
          tags: names of the classes that may be in the photograph, or None for all.

        Returns:
          Labelling.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if the image cannot be read, has no pixels or another shape or type, or a tag is no class.
          TypeError: if it is a masked array of NumPy.
        """
        given = None if tags is None else tag_vector(tags, self.class_names)
        photograph = as_rgb(image)
        result = segment(self.segmenter, photograph, crf=crf, tags=given)
        labels, confidence = labels_and_confidence(result.best_log_probs, result.size)
        probabilities = interpolated_probs(result.best_log_probs, result.best_log_probs.shape[:2])
        return Labelling(labels, confidence, probabilities, self.class_names, self.palette, photograph)


def load(checkpoint: str | os.PathLike, *, which: str = "best") -> Model:
    """A trained model from the folder of a run, from a file of `experiments.export --compact`, or one that is shipped.

    Compiled programs are kept in the user's cache folder, so that the first photograph of the next process is quicker.
    `lcrf_jax.machine.compilation.keep_programs` says how to switch that off.

    Args:
      checkpoint: the --workdir of a training run, a file NAME.npz, or the name of a model that comes with the package, see
        `lcrf_jax.runfolder.compact.shipped_models`: "animals" knows cat, cow, dog, horse, person and sheep. A folder or
        file of that name goes first.
      which: ``best`` by the validation score, or ``last``, the newest state of the training. A file has one state.

    Returns:
      Model.

    Raises:
      FileNotFoundError: if there is no such folder, file or model.
      lcrf_jax.runfolder.description.CheckpointError: if the folder holds no run, its files are damaged, or its
        description has an entry that cannot be.
      ValueError: if `which` is another word.
    """
    with contextlib.suppress(OSError):  # an account without a home
        keep_programs(default_directory())
    return Model(*trained(checkpoint, which=which))


def trained(checkpoint: str | os.PathLike, *, which: str = "best") -> tuple[dict[str, Any], dict[str, Any]]:
    """What was trained, from all that `load` takes.

    Args:
      checkpoint: as for `load`.
      which: as for `load`.

    Returns:
      (description of the run, parameters for inference).

    Raises:
      FileNotFoundError: as `load`.
      lcrf_jax.runfolder.description.CheckpointError: as `load`.
      ValueError: as `load`.
    """
    given = _place(checkpoint)
    description = described(given)
    if _is_file(given):
        params = load_compact(given)[1]
    else:
        params = restore_params(given)
        if which != "best":  # the newest state has what is trained alone
            params = {**params, "decoder": restore_params(given, which)}
    check_parameters(description, params, _file_of(given))
    return description, params


def described(checkpoint: str | os.PathLike, *, origin: bool = False) -> dict[str, Any]:
    """The description of what was trained alone, from all that `load` takes.

    Args:
      checkpoint: as for `load`.
      origin: whether it has to say what it was trained on and how, for those who score it.

    Returns:
      dict, see `lcrf_jax.runfolder.description`.

    Raises:
      FileNotFoundError: as `load`.
      lcrf_jax.runfolder.description.CheckpointError: as `load`.
    """
    given = _place(checkpoint)
    description = compact_description(given) if _is_file(given) else load_description(given, needed=FOR_INFERENCE)
    check_description(description, _file_of(given))
    if origin:
        check_origin(description, _file_of(given))
    return description


def _is_file(given):
    return given.is_file() or given.suffix == ".npz"


def _file_of(given):
    return given if _is_file(given) else given / DESCRIPTION_FILE


def _place(checkpoint):
    """The folder or file that is meant."""
    if not str(checkpoint).strip():
        raise FileNotFoundError("expected the folder of a run, a file of a model or its name, got an empty one; is a variable not set?")
    given = at_home(checkpoint)
    if given.name == DESCRIPTION_FILE and given.is_file():
        raise FileNotFoundError(f"{given} describes a run: give its folder, {given.parent}")
    if given.is_symlink():
        folder_of_run(given)  # it refuses one in a circle
    if not given.exists() and str(checkpoint) in shipped_models():
        given = SHIPPED / f"{checkpoint}.npz"
    if not given.exists() and given.suffix != ".npz" and len(given.parts) == 1:
        shipped = ", ".join(shipped_models()) or "none"
        raise FileNotFoundError(
            f"{checkpoint}: there is no such folder or file, and no model of this name comes with the package (those that do: {shipped})"
            f"{nearest(str(checkpoint), shipped_models())}"
        )
    return given


def as_rgb(image: str | os.PathLike | Image.Image | np.ndarray) -> np.ndarray:
    """A photograph of any form as an RGB array.

    Args:
      image: a path, a Pillow image, or an array [H, W, 3] or [H, W] of uint8.

    Returns:
      [H, W, 3] uint8.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it cannot be read, has no pixels, or has another shape or type.
      TypeError: if it is a masked array of NumPy.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(at_home(image))
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"expected an image with pixels, got one of {image.width} x {image.height}; {_NO_PIXELS}")
        return opened_as_rgb(image, "the image")[0]
    refuse_masked("an image", image, "fill it first, .filled(0)")
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(
            f"expected an image of uint8 in 0..255, got {array.dtype} in {_range(array)}; scale it and use .astype('uint8')"
        )
    if array.ndim == 2 and array.size:
        return np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        hint = _NO_PIXELS if 0 in array.shape else "it looks like [3, H, W]: use .transpose(1, 2, 0)" if array.ndim == 3 and array.shape[0] == 3 else (
            "take one image of a batch" if array.ndim == 4 else "convert it to RGB")  # fmt: skip
        raise ValueError(f"expected an image [H, W, 3] or [H, W], got {list(array.shape)}; {hint}")
    return array


def _range(array):
    return f"{array.min():.4g}..{array.max():.4g}" if array.size and np.issubdtype(array.dtype, np.number) else "no range"
