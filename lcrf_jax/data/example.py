"""What a data source is, and how one is opened by name.

A source gives random access to examples: a name, an image, its tags and, only where it was asked for, a mask.
Everything after this point (views, batches, networks, evaluation) knows sources by this interface alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

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

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def split(self) -> str: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def tags(self) -> np.ndarray: ...

    @property
    def masks(self) -> bool: ...

    @property
    def fingerprint(self) -> tuple: ...

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The example at ``index``, 0 <= index < len."""
        ...


def about(source: Source) -> str:
    """A source in a few words, for people: where its images lie, its split and their number.

    Args:
      source: the source.
    Returns:
      str.
    """
    paths = getattr(source, "paths", ())
    place = os.path.commonpath([str(path.parent) for path in paths]) if paths else getattr(source, "root", type(source).__name__)
    return f"{place}, {getattr(source, 'split', 'all')}, {len(source)} images"


def data_identity(source: Source) -> dict[str, Any]:
    """What a source has, wherever it lies: two of one identity have the same names, tags and classes.

    Args:
      source: images; none is opened.

    Returns:
      dict that JSON can hold: number of "images", and "sha256" of classes, names and tags in order.
    """
    digest = hashlib.sha256(json.dumps([list(source.class_names), list(source.names)]).encode())
    digest.update(np.packbits(np.asarray(source.tags, bool)).tobytes())
    return {"images": len(source), "sha256": digest.hexdigest()}


class PartOfSource:
    """Some of the examples of a source; the rest was left out. Its `listed_names` has the names of all.

    Args:
      source: the source.
      rows: indices of the examples to keep, in order.
    """

    def __init__(self, source: Source, rows: Sequence[int] | np.ndarray) -> None:
        self._source, self._rows = source, np.asarray(rows, np.int64)
        self.class_names, self.split, self.masks = source.class_names, source.split, source.masks
        self.names = tuple(source.names[row] for row in self._rows)
        if (paths := getattr(source, "paths", None)) is not None:
            self.paths = tuple(paths[row] for row in self._rows)
        if hasattr(source, "encoded"):
            self.encoded = lambda index: source.encoded(int(self._rows[index]))
        self.left_out = getattr(source, "left_out", 0) + len(source) - len(self._rows)
        self.listed_names = getattr(source, "listed_names", source.names)

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


def tag_vector(names: Iterable[str], class_names: tuple[str, ...]) -> np.ndarray:
    """[K] bool vector of the named classes, background always True.

    Args:
      names: class names that are present; ``background`` may be among them.
      class_names: names of all K classes, index 0 is background.
    Returns:
      [K] bool.
    Raises:
      ValueError: if a name is not a class, or the names are one text.
    """
    if isinstance(names, str):
        raise ValueError(f"expected a list of class names, got the text {names!r}; give a list: [{names!r}]")  # noqa: TRY004
    tags = np.zeros(len(class_names), bool)
    tags[0] = True
    for name in names:
        if name not in class_names:
            raise ValueError(f"unknown class {name!r}: expected one of {', '.join(class_names)}")
        tags[class_names.index(name)] = True
    return tags
