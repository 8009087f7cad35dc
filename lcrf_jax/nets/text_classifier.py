"""The tag classifier that the texts of class names make, for a backbone that was trained beside texts (CLIP)."""

import os
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lcrf_jax.machine.errors import nearest
from lcrf_jax.machine.files import at_home
from lcrf_jax.nets.tag_classifier import TagClassifier

SCALE = 100.0  # of the cosines, as CLIP was trained
_EXPECTED = "a .npz with one vector for each class name, all of one length"


class Texts(NamedTuple):
    """Vectors of texts.

    Attributes:
      classes: [K - 1, D] float32 of length 1, of the foreground classes in their order.
      others: [M, D] float32 of length 1, of further names in the file.
      other_names: those names.
    """

    classes: np.ndarray
    others: np.ndarray
    other_names: tuple[str, ...]


def read_texts(path: str | os.PathLike, class_names: Sequence[str]) -> Texts:
    """Vectors of class names from a file.

    Args:
      path: .npz with an array [D] for each name. It is read without pickle.
      class_names: of the K classes, background first, which needs none.

    Returns:
      Texts.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such file, or a class has no vector in it.
    """
    path = at_home(path)
    if not path.is_file():
        raise FileNotFoundError(f"classifier.text_embeddings: there is no file {path}; give {_EXPECTED}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            vectors = {name: np.asarray(stored[name], np.float32) for name in stored.files}
    except (ValueError, TypeError, OSError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected {_EXPECTED}, cannot read it as one ({error})") from error
    foreground, names = list(class_names[1:]), sorted(vectors)
    missing = [f"{name!r}{nearest(name, names)}" for name in foreground if name not in vectors]
    further = [name for name in names if name not in foreground]
    if missing:
        raise ValueError(
            f"{path}: no vector for {len(missing)} of {len(foreground)} classes: {', '.join(missing)}; beside them it has "
            f"{', '.join(further) or 'no name that is no class'}"
        )
    shape = vectors[foreground[0]].shape
    wrong = [f"{name!r} {list(vectors[name].shape)}" for name in names if vectors[name].shape != shape or len(shape) != 1]
    if wrong:
        raise ValueError(f"{path}: expected {_EXPECTED}, got {', '.join(wrong)}")
    empty = [name for name in names if not np.isfinite(vectors[name]).all() or not vectors[name].any()]
    if empty:
        raise ValueError(f"{path}: expected finite numbers that are not all 0, got others for {', '.join(map(repr, empty))}")
    if len(names) < 2:
        raise ValueError(f"{path}: one text tells nothing apart; add others, such as of backgrounds ('ground', 'wall', 'sky')")
    unit = {name: vector / np.linalg.norm(vector) for name, vector in vectors.items()}
    others = np.stack([unit[name] for name in further]) if further else np.zeros((0, len(unit[names[0]])), np.float32)
    return Texts(np.stack([unit[name] for name in foreground]), others, tuple(further))


def text_classifier(projection: np.ndarray, texts: Texts, pooled: np.ndarray) -> TagClassifier:
    """The linear classifier whose logits are scaled cosines between an image and texts, without any fit.

    The logit of class k is `SCALE` times the product of the projected features with t_k less the mean of all texts, divided by the mean
    length of the projected features. The mean of the texts is what all of them have in common, and says nothing of where a class is; at a
    logit above 0 the image is nearer to the class than to the mean. Cosines divide by each image's own length, which is
    not linear.

    Args:
      projection: [C, D] of the backbone's features, see `lcrf_jax.nets.weights.image_projection`.
      texts: Texts.
      pooled: [N, C] spatially averaged features of the training images.

    Returns:
      TagClassifier with weights [C, K - 1] and bias 0.

    Raises:
      ValueError: if the vectors of the texts have another length than the projection makes.
    """
    if texts.classes.shape[1] != projection.shape[1]:
        raise ValueError(
            f"classifier.text_embeddings: expected vectors of {projection.shape[1]} numbers, got {texts.classes.shape[1]}; make them "
            "with the text tower of the same CLIP"
        )
    wide = np.asarray(projection, np.float64)
    length = np.linalg.norm(np.asarray(pooled, np.float64) @ wide, axis=1).mean()
    centre = np.concatenate([texts.classes, texts.others]).astype(np.float64).mean(axis=0)
    weights = SCALE / max(length, 1e-12) * wide @ (texts.classes - centre).T
    return TagClassifier(weights.astype(np.float32), np.zeros(len(texts.classes), np.float32))  # type: ignore[arg-type]
