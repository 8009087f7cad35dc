"""Parts of a split: ``val[0::2]`` and ``val[1::2]`` are halves of val that share no photograph.

Settings are chosen on one half and scores are reported on the other. A part is written as Python writes a slice, and it is
one of the names in sorted order, so that it does not depend on the order of a list. Its examples keep the order of their source.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from lcrf_jax.data.example import PartOfSource, Source
from lcrf_jax.machine.errors import SettingError

_PART = re.compile(r"(.+)\[([^\[\]]*)\]")
_NUMBER = r"\s*(-?[0-9]{1,18})?\s*"
_SLICE = re.compile(f"{_NUMBER}:{_NUMBER}(?::{_NUMBER})?")
_TOLD = ("not_taken", "untagged", "tag_source", "untagged_in_masks")


class Part(NamedTuple):
    """A part of a split as it is written.

    Attributes:
      whole: name of the split that it is of; it may be a part itself.
      rows: which of its names in sorted order.
    """

    whole: str
    rows: slice


class InParts(NamedTuple):
    """A source and the parts of its split that are scored by themselves.

    Attributes:
      source: the source.
      numbers: [N] int, the part of each example.
      splits: the name of each part.
    """

    source: Source
    numbers: np.ndarray
    splits: tuple[str, ...]


def written_part(split: str, *, of_tfds: bool = False) -> Part | None:
    """The part of a split that a name means.

    Args:
      split: such as ``val[0::2]``.
      of_tfds: whether TensorFlow Datasets has parts of its own, such as ``train[:80%]``: only those with a step are ours.
    Returns:
      Part, or None for a name without brackets.
    Raises:
      SettingError: if there are brackets that hold no slice, or one whose step is not 1 or more.
    """
    found = _PART.fullmatch(split.strip())
    if of_tfds and (found is None or found.group(2).count(":") < 2 or "+" in split):
        return None
    rows = found and _SLICE.fullmatch(found.group(2))
    if found is None and not {*"[]"} & {*split}:
        return None
    if found is None or rows is None:
        raise SettingError(
            f"the split {split!r}: expected NAME[START::STEP] with whole numbers, such as {_name_before(split)}[0::2], and there is no "
            f"list {split}.txt; shares such as [:80%] are known to the source 'tfds' alone"
        )
    start, stop, step = (None if number is None else int(number) for number in rows.groups())
    if step is not None and step < 1:
        raise SettingError(f"the split {split!r}: expected a step of 1 or more, got {step}; {found.group(1)}[0::2] is every other name")
    return Part(found.group(1).strip(), slice(start, stop, step))


def whole_of(split: str) -> str:
    """The split that a name means a part of.

    Args:
      split: such as ``val[0::2]``.
    Returns:
      ``val``; a name that is no part as it is.
    """
    found = _PART.fullmatch(split.strip())
    return whole_of(found.group(1).strip()) if found and _SLICE.fullmatch(found.group(2)) else split


class SliceOfSource(PartOfSource):
    """A part of a split, see the head of this file: all that its source tells, of the examples of the part. Its `whole` is the split.

    Args:
      source: the source.
      split: the name of the part.
      rows: which of the names of the source in sorted order.
    Raises:
      SettingError: if there are none.
    """

    def __init__(self, source: Source, split: str, rows: slice) -> None:
        kept = sorted(_in_order_of_names(source.names)[rows])
        if not kept:
            raise SettingError(
                f"the split {split!r} is empty: {source.split} has {len(source)} examples, from 0 to {len(source) - 1}; "
                f"{whole_of(source.split)}[0::2] is every other one"
            )
        super().__init__(source, kept)
        self.split, self.listed_names, self.whole = split, self.names, getattr(source, "whole", source)
        self.left_out = getattr(source, "left_out", 0)  # the rest of the split was not left out for a fault
        for name in _TOLD:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))


def in_parts(source: Source, num_parts: int) -> InParts:
    """The parts ``SPLIT[k::num_parts]`` of a split.

    Args:
      source: the source. What was left out of its split because it cannot be read counts, so that no part changes by it.
      num_parts: how many, 1 or more.
    Returns:
      InParts.
    Raises:
      SettingError: if there are fewer examples than parts.
    """
    listed = getattr(source, "listed_names", source.names)
    if not 1 <= num_parts <= len(listed):
        raise SettingError(f"parts: expected 1 to {len(listed)}, the number of examples of {source.split}, got {num_parts}")
    numbers = np.empty(len(listed), np.int64)
    numbers[_in_order_of_names(listed)] = np.arange(len(listed)) % num_parts
    if len(listed) != len(source):
        number = dict(zip(listed, numbers.tolist(), strict=True))
        numbers = np.array([number[name] for name in source.names], np.int64)
    return InParts(source, numbers, tuple(f"{source.split}[{k}::{num_parts}]" for k in range(num_parts)))


def _in_order_of_names(names):
    return sorted(range(len(names)), key=names.__getitem__)


def _name_before(split):
    """What may be the name of the split in a part that is wrongly written."""
    name = split.partition("[")[0].strip()
    return "val" if not name or {*":]"} & {*name} else name
