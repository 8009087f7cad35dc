"""Any data set of TensorFlow Datasets with images and labels, read without TensorFlow.

The data set has to be prepared once, in the format array_record, which needs TensorFlow for many of them::

    pip install tensorflow && tfds build oxford_iiit_pet --file_format=array_record --data_dir=FOLDER

After that nothing here needs it. Labels may be one class (``label``), several (``labels``) or those of objects
(``objects/label``).
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from lcrf_jax.data.example import BACKGROUND, VOID, Example
from lcrf_jax.data.files.images import opened_as_rgb
from lcrf_jax.machine.contents import content_digests
from lcrf_jax.machine.errors import nearest
from lcrf_jax.machine.files import at_home

MASK_MEANINGS = ("index", "trimap")


class TfdsSource:
    """One split of a data set of TensorFlow Datasets.

    Args:
      split: name of a split or part of one, as ``train`` or ``train[:80%]``.
      name: of the data set, with its configuration if it has several: ``oxford_iiit_pet``, ``voc/2007``.
      root: folder of the prepared data sets (``--data_dir``); by default that of TensorFlow Datasets.
      masks: whether examples carry masks.
      image: feature of the images.
      labels: feature of the labels, with ``/`` between the levels.
      mask: feature of the masks.
      mask_meaning: ``index``, values are class indices and 255 is void; ``trimap``, as in the Oxford-IIIT Pet data set 1
        is the object of the only label, 2 is background and 3 void.
    Raises:
      FileNotFoundError: if the data set is not prepared in this folder, or has no such split.
      ValueError: if a feature is missing or of another kind, or the files are no array_record.
    References:
      TensorFlow Datasets, "tfds and array_record"; Parkhi et al. 2012, Cats and Dogs (trimaps).
    """

    def __init__(
        self,
        split: str,
        *,
        name: str,
        root: str | os.PathLike | None = None,
        masks: bool = False,
        image: str = "image",
        labels: str = "label",
        mask: str = "segmentation_mask",
        mask_meaning: str = "index",
    ) -> None:
        import tensorflow_datasets as tfds

        if mask_meaning not in MASK_MEANINGS:
            raise ValueError(f"mask_meaning: expected one of {', '.join(MASK_MEANINGS)}, got {mask_meaning!r}")
        folder = _prepared(name, root)
        builder = tfds.builder_from_directory(folder)
        self._where = f"{name} in {folder}"
        label = _feature(builder.info.features, labels, self._where)
        if not hasattr(label, "names") or label.names is None:
            raise ValueError(f"{self._where}: the feature {labels!r} is no class label ({label}); choose another with labels=")
        used = [image, *([mask] if masks else [])]
        kinds = {feature: _feature(builder.info.features, feature, self._where) for feature in used}
        wrong = [feature for feature, kind in kinds.items() if not isinstance(kind, tfds.features.Image)]
        if wrong:
            raise ValueError(f"{self._where}: the feature {wrong[0]!r} is no image; choose another")
        decoders = {feature: tfds.decode.SkipDecoding() for feature in used}
        try:
            self._records = builder.as_data_source(split, decoders=decoders)
        except NotImplementedError as error:
            raise ValueError(f"{self._where} has another format than array_record; prepare it with "
                             "--file_format=array_record") from error  # fmt: skip
        except ValueError as error:  # of its many splits, and parts of them, it knows best
            known = ", ".join(builder.info.splits)
            raise FileNotFoundError(f"{self._where} has no split {split!r} ({error}): there are {known}{nearest(split, builder.info.splits)}") from error
        self.class_names = (BACKGROUND, *(each for each in label.names if each != BACKGROUND))
        self._label_names = label.names
        self.split, self.masks = split, masks
        self._image, self._labels, self._mask, self._meaning = image, labels, mask, mask_meaning
        shards = sorted(path for path in Path(folder).rglob("*array_record*") if path.is_file())
        self._identity = (str(builder.version), builder.info.splits[split].num_examples, shards)
        self._known: tuple | None = None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} examples of {self._where}/{self.split}")
        record = self._records[index]
        name, tags = self._name(record, index), self._tags(record)
        image = _decoded(record[self._image], f"{self._where}, {name}")
        if not self.masks:
            return Example(name, image, tags, None)
        mask = np.asarray(Image.open(io.BytesIO(record[self._mask]))).astype(np.int64)
        return Example(name, image, tags, self._indices(mask, tags, image.shape[:2], name))

    def encoded(self, index: int) -> bytes:
        """The image file of an example as it is stored."""
        return bytes(self._records[index][self._image])

    @property
    def names(self) -> tuple[str, ...]:
        """Identifiers of the examples, in order; reads all records the first time."""
        return self._all()[0]

    @property
    def tags(self) -> np.ndarray:
        """[N, K] bool, the tags of all examples; reads all records the first time, but decodes no image."""
        return self._all()[1].copy()

    @property
    def fingerprint(self) -> tuple:
        """Version and content of the data set, wherever it lies."""
        *identity, shards = self._identity
        return ("tfds", *identity, content_digests(shards), self.split, self._image, self._labels, self.masks and (self._mask, self._meaning))

    def _all(self):
        if self._known is None:
            names, tags = [], []
            for index in range(len(self)):
                record = self._records[index]
                names.append(self._name(record, index))
                tags.append(self._tags(record))
            self._known = tuple(names), np.array(tags, bool).reshape(len(tags), len(self.class_names))
        return self._known

    def _name(self, record, index):
        name = record.get("file_name", record.get("image/filename"))
        return name.decode("utf-8", errors="replace") if isinstance(name, bytes) else f"{self.split}/{index:06}"

    def _tags(self, record):
        found = record
        for part in self._labels.split("/"):
            found = found[part]
        tags = np.zeros(len(self.class_names), bool)
        tags[0] = True
        for label in np.asarray(found, np.int64).reshape(-1):
            tags[self.class_names.index(self._label_names[label])] = True
        return tags

    def _indices(self, mask, tags, shape, name):
        """[H, W] uint8 class indices of a mask as it is stored."""
        mask = mask.reshape(mask.shape[:2]) if mask.ndim == 2 or mask.shape[-1] == 1 else mask
        where = f"{self._where}, {name}"
        if mask.shape != shape:
            raise ValueError(f"{where}: the mask is {list(mask.shape)} and the image {list(shape)}; choose another feature mask=")
        if self._meaning == "trimap":
            present = np.flatnonzero(tags[1:]) + 1
            if len(present) != 1 or not np.isin(mask, (1, 2, 3)).all():
                raise ValueError(f"{where}: expected a mask of 1, 2, 3 and one label; use mask_meaning=index")
            return np.array([0, present[0], 0, VOID], np.uint8)[mask]
        if ((mask >= len(self.class_names)) & (mask != VOID) | (mask < 0)).any():
            raise ValueError(
                f"{where}: labels up to {mask.max()} in the mask; expected below {len(self.class_names)}, or {VOID}; "
                "is it mask_meaning=trimap?"
            )
        return mask.astype(np.uint8)


def _prepared(name: str, root: str | os.PathLike | None) -> Path:
    """The newest version of a data set that is prepared in a folder."""
    if not name:
        raise ValueError("the source 'tfds' needs options.name, the name of a data set such as oxford_iiit_pet")
    root = at_home(root or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    found = [path.parent for path in (root / name).rglob("dataset_info.json") if "incomplete" not in str(path)]
    if not found:
        raise FileNotFoundError(
            f"{root / name} holds no prepared data set; prepare it once: tfds build {name} --file_format=array_record "
            f"--data_dir={root}"
        )
    configurations = {path.parent for path in found}
    if len(configurations) > 1:
        names = ", ".join(sorted(str(path.relative_to(root)) for path in configurations))
        raise ValueError(f"{root / name} holds several configurations; name one: {names}")
    return max(found, key=_version)


def _version(folder: Path) -> tuple:
    return tuple(int(part) if part.isdigit() else -1 for part in folder.name.split("."))


def _feature(features, name: str, where: str):
    """The feature of that name; those of a sequence are those of its elements."""
    for part in name.split("/"):
        features = getattr(features, "feature", features)
        if not hasattr(features, "keys") or part not in features:
            there = ", ".join(sorted(features.keys())) if hasattr(features, "keys") else features
            raise ValueError(f"{where} has no feature {name!r}: there are {there}; choose with image=, labels= and mask=")
        features = features[part]
    return getattr(features, "feature", features)


def _decoded(content: bytes, where: str) -> np.ndarray:
    """[H, W, 3] uint8 of an image file in memory."""
    try:
        return opened_as_rgb(Image.open(io.BytesIO(content)), where)[0]
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where}: the image is damaged ({error}); prepare the data set again") from error
