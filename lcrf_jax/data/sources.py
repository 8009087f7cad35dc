"""What a data source is, and how one is opened by name.

A source gives random access to examples: a name, an image, its tags and, only where it was asked for, a mask.
Everything after this point (views, batches, networks, evaluation) knows sources by this interface alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

BACKGROUND = "background"
VOID = 255


class Example(NamedTuple):
    """One image with its weak and, where it was asked for, its strong annotation.

    Attributes:
      name: identifier of the image within its split.
      image: [H, W, 3] uint8, RGB.
      tags: [K] bool, whether a class is in the image; index 0 is background and always True.
      mask: [H, W] uint8 class indices with 255 = void (not judged), or None.
    """

    name: str
    image: np.ndarray
    tags: np.ndarray
    mask: np.ndarray | None


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split. Reading is safe from several threads.

    Attributes:
      class_names: names of the K classes; index 0 is ``background``.
      split: name of the split.
      names: identifiers of the examples, in order.
      tags: [N, K] bool, the tags of all examples.
      masks: whether examples carry masks.
      fingerprint: anything whose repr changes when an image or a mask does; caches are keyed by it.
    """

    class_names: tuple[str, ...]
    split: str
    names: tuple[str, ...]
    tags: np.ndarray
    masks: bool
    fingerprint: tuple

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``, 0 <= index < len."""
        ...


class PartOfSource:
    """Some of the examples of a source.

    Args:
      source: the source.
      rows: indices of the examples to keep, in order.
    References:
      None.
    """

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, np.asarray(rows, np.int64)
        self.class_names, self.split, self.masks = source.class_names, source.split, source.masks
        self.names = tuple(source.names[row] for row in self._rows)
        self.left_out = getattr(source, "left_out", 0) + len(source) - len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} examples of {self.split}")
        return self._source[int(self._rows[index])]

    @property
    def tags(self) -> np.ndarray:
        """[N, K] bool, the tags of all examples in order."""
        return self._source.tags[self._rows]

    @property
    def fingerprint(self) -> tuple:
        """That of the source, and which examples are kept."""
        return ("part", self._source.fingerprint, tuple(self._rows.tolist()))


def open_textures(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options
) -> Source:
    """The procedural set of `lcrf_jax.data.textures.TexturesSource`; it has no folder.

    Args:
      split: ``train`` or ``val``.
      root: must be None or empty.
      masks: whether examples carry masks.
      **options: keyword arguments of `TexturesSource` (``seed``, ``size``, ``num_train``, ``num_val``).
    Returns:
      The source.
    Raises:
      ValueError: if a folder is given, or an option is out of its range.
    References:
      None; the images are made up.
    """
    from lcrf_jax.data.textures import TexturesSource

    if root:
        raise ValueError(
            f"textures are made on the fly and have no folder, got root={str(root)!r}: "
            "leave root out, or use the source 'folder'"
        )
    return TexturesSource(split, masks=masks, **options)


def open_voc(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options
) -> Source:
    """A folder in the layout of PASCAL VOC, see `lcrf_jax.data.voc.VocSource`.

    Args:
      split: name of a file in ``ImageSets/Segmentation`` without ``.txt``.
      root: the folder.
      masks: whether examples carry masks.
      **options: further keyword arguments of `VocSource`.
    Returns:
      The source.
    Raises:
      ValueError: if no folder is given, or what it holds does not fit together.
      FileNotFoundError: if the folder or one of its files is missing.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge 2012, development kit.
    """
    from lcrf_jax.data.voc import VocSource

    if not root:
        raise ValueError(
            "the source 'voc' needs root=FOLDER, the folder that holds JPEGImages/ and ImageSets/"
        )
    return VocSource(root, split, masks=masks, **options)


def open_folder(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options
) -> Source:
    """A folder of photographs with a tag file or folders of classes, see `lcrf_jax.data.folder.FolderSource`.

    A folder in the layout of PASCAL VOC is opened as one, unless options name other files.

    Args:
      split: ``train``, ``val``, or the name of a list in the folder without ``.txt``.
      root: the folder.
      masks: whether examples carry masks.
      **options: further keyword arguments of `FolderSource`.
    Returns:
      The source.
    Raises:
      ValueError: if no folder is given, or what it holds does not fit together.
      FileNotFoundError: if the folder or one of its files is missing.
    References:
      None.
    """
    from lcrf_jax.data.folder import FolderSource

    if not root:
        raise ValueError(
            "the source 'folder' needs root=FOLDER, the folder that holds the photographs and tags.csv; "
            "with a configuration: --config.data.root=FOLDER"
        )
    if (Path(root).expanduser() / "ImageSets" / "Segmentation").is_dir() and not any(
        options.get(name) for name in ("tags", "classes", "colours")
    ):
        return open_voc(split, root=root, masks=masks)
    return FolderSource(root, split, masks=masks, **options)


def open_tfds(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options
) -> Source:
    """A data set of TensorFlow Datasets, see `lcrf_jax.data.tfds_source.TfdsSource`.

    Args:
      split: name of a split or part of one, as ``train[:80%]``.
      root: folder of the prepared data sets, by default that of TensorFlow Datasets.
      masks: whether examples carry masks.
      **options: further keyword arguments of `TfdsSource`; ``name`` is needed.
    Returns:
      The source.
    Raises:
      ValueError: if tensorflow-datasets is not installed, or a feature is missing or of another kind.
      FileNotFoundError: if the data set is not prepared in this folder, or has no such split.
    References:
      None.
    """
    try:
        from lcrf_jax.data.tfds_source import TfdsSource

        return TfdsSource(split, root=root, masks=masks, **{"name": "", **options})
    except ImportError as error:
        raise ValueError(
            f"the source 'tfds' needs tensorflow-datasets ({error}): pip install '.[tfds]' in your clone"
        ) from error


SOURCES = {"folder": open_folder, "textures": open_textures, "tfds": open_tfds, "voc": open_voc}


def open_source(
    kind: str, split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options
) -> Source:
    """The source of that kind, by name.

    Args:
      kind: a key of `SOURCES`.
      split: name of the split, ``train`` or ``val`` for textures, any list in a folder.
      root: the folder, for kinds that read one.
      masks: whether examples carry masks. Without it no mask is read or made.
      **options: passed on to the kind's constructor.
    Returns:
      The source.
    Raises:
      ValueError: if the kind is not known, or the arguments do not fit it.
      FileNotFoundError: if a folder or one of its files is missing.
    References:
      None.
    """
    if kind not in SOURCES:
        raise ValueError(f"unknown source {kind!r}: expected one of {', '.join(sorted(SOURCES))}")
    try:
        return SOURCES[kind](split, root=root, masks=masks, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"data.options: the source {kind!r} does not know one of {sorted(options)} ({error})") from error


def tag_vector(names: tuple[str, ...] | list[str] | set[str], class_names: tuple[str, ...]) -> np.ndarray:
    """[K] bool vector of the named classes, background always True.

    Args:
      names: class names that are present; ``background`` may be among them.
      class_names: names of all K classes, index 0 is background.
    Returns:
      [K] bool.
    Raises:
      ValueError: if a name is not a class.
    References:
      None.
    """
    tags = np.zeros(len(class_names), bool)
    tags[0] = True
    for name in names:
        if name not in class_names:
            raise ValueError(f"unknown class {name!r}: expected one of {', '.join(class_names)}")
        tags[class_names.index(name)] = True
    return tags
