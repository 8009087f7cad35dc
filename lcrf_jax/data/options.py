"""Options of data: each kind has its own, and one that it does not have is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.listing import scan_folder
from lcrf_jax.data.sources.shards import ShardsSource
from lcrf_jax.data.sources.textures import TexturesSource
from lcrf_jax.data.sources.tfds import TfdsSource
from lcrf_jax.data.sources.voc import VocSource
from lcrf_jax.machine.errors import SettingError, nearest

# Where the options of a kind are taken, and what of that is no option.
_TAKEN_BY = {
    "folder": (FolderSource, scan_folder), "shards": (ShardsSource,), "textures": (TexturesSource,), "tfds": (TfdsSource,),
    "voc": (VocSource,),
}  # fmt: skip
_NO_OPTIONS = {"root", "split", "masks", "lists", "options"}


def known_options(kind: str) -> dict[str, Any]:
    """The options of a kind of data.

    Args:
      kind: a key of `lcrf_jax.data.opening.SOURCES`.
    Returns:
      dict from the name of each to its default; one that is needed has `inspect.Parameter.empty`.
    """
    parameters = [each for taker in _TAKEN_BY[kind] for each in inspect.signature(taker).parameters.values()]
    return {each.name: each.default for each in parameters if each.name not in _NO_OPTIONS}


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse options that a kind of data does not have.

    Args:
      kind: a key of `lcrf_jax.data.opening.SOURCES`.
      options: dict from names to values.
    Raises:
      SettingError: the message names the option, those that there are, and the nearest or the kind that has it.
    """
    known = known_options(kind)
    unknown = sorted(options.keys() - known.keys())
    if not unknown:
        return
    hints = []
    for name in unknown:
        others = [repr(other) for other in _TAKEN_BY if name in known_options(other)]
        if others:
            hints.append(f"; {name} is an option of {' and '.join(others)}")
        elif question := nearest(name, known):
            hints.append(question)
    has = f"it has {', '.join(known)}" if known else "it has none"
    raise SettingError(f"data.options: the source {kind!r} does not know one of {unknown}: {has}{''.join(hints)}")
