"""The files of a data set in shards: an index, a table of names and tags for each split, and records in array_record files.

::

    FOLDER/shards.json                   the index: classes, and for each split its counts, table and shards
    FOLDER/train.npz                     names and tags of the split train, so that a start reads no photograph
    FOLDER/train-00000.array_record      records in the order of the table, each by itself (group_size:1), with a checksum

A record is four bytes, the length of its head (little endian), the head, JSON such as
``{"name": "barn/7.jpg", "tags": ["horse"], "image": 48210, "mask": 912}``, then so many bytes of the photograph's own file and of
its mask, a grey PNG of class indices of the size of the photograph as it is shown; 0 for none.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.data.example import BACKGROUND
from lcrf_jax.machine.errors import nearest
from lcrf_jax.machine.files import at_home, parsed_json

INDEX, UNFINISHED, FORMAT, VERSION = "shards.json", "unfinished.json", "lcrf_jax shards", 1
_ANEW = "write the shards anew with python -m experiments.shards"


class ShardRecord(NamedTuple):
    """What a record holds.

    Attributes:
      name: of the photograph, within its split.
      tags: names of its classes, without background.
      image: the bytes of its file, in whatever format it came.
      mask: the bytes of a grey PNG of class indices, empty for none.
    """

    name: str
    tags: tuple[str, ...]
    image: bytes
    mask: bytes


def packed(record: ShardRecord) -> bytes:
    """The bytes of a record.

    Args:
      record: ShardRecord.
    Returns:
      bytes, in the form at the head of this file.
    """
    head = {"name": record.name, "tags": record.tags, "image": len(record.image), "mask": len(record.mask)}
    text = json.dumps(head, ensure_ascii=False).encode()
    return b"".join([len(text).to_bytes(4, "little"), text, record.image, record.mask])


def unpacked(content: bytes) -> ShardRecord:
    """A record of its bytes.

    Args:
      content: of `packed`.
    Returns:
      ShardRecord.
    Raises:
      ValueError: if they are no record.
    """
    try:
        start = 4 + int.from_bytes(content[:4], "little")
        head = parsed_json(content[4:start])
        middle, end = start + head["image"], start + head["image"] + head["mask"]
        if end != len(content):
            raise ValueError(f"{end} bytes are told, {len(content)} there")
        return ShardRecord(head["name"], tuple(head["tags"]), content[start:middle], content[middle:])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"no photograph with tags ({error})") from error


def mask_bytes(mask: np.ndarray) -> bytes:
    """[H, W] uint8 class indices as a grey PNG."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()


def table_bytes(names: tuple[str, ...], tags: np.ndarray) -> bytes:
    """The table of a split.

    Args:
      names: of the N photographs, in order.
      tags: [N, K] bool.
    Returns:
      bytes of a .npz file.
    """
    file = io.BytesIO()
    text = np.frombuffer("\0".join(names).encode(), np.uint8)
    np.savez(file, names=text, tags=np.packbits(np.asarray(tags, bool), axis=1), shape=np.array(tags.shape))
    return file.getvalue()


def read_table(path: Path, sha256: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The names and tags of a split.

    Args:
      path: the file.
      sha256: what the index says of it.
    Returns:
      (names, [N, K] bool).
    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it is not the file of the index.
    """
    content = there(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not the table that {INDEX} tells of; copy the folder again, or {_ANEW}")
    with np.load(io.BytesIO(content)) as arrays:
        count, num_classes = (int(number) for number in arrays["shape"])
        names = tuple(arrays["names"].tobytes().decode().split("\0"))
        return names, np.unpackbits(arrays["tags"], axis=1, count=num_classes).astype(bool).reshape(count, num_classes)


def there(path: Path, size: int | None = None) -> Path:
    """A file of the shards, if it is there and as long as the index says.

    Args:
      path: the file.
      size: its bytes, or None for any.
    Returns:
      The path.
    Raises:
      FileNotFoundError: if it is missing.
      ValueError: if it has another size.
    """
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing, and {INDEX} tells of it; copy the folder again, or {_ANEW}") from None
    if size not in (None, found):
        raise ValueError(f"{path} has {found} bytes, and {size} in {INDEX}: it is cut short or another; copy it again, or {_ANEW}")
    return path


def has_shards(root: str | os.PathLike | None) -> bool:
    """Whether a folder holds shards, finished or not.

    Args:
      root: the folder, which need not be there.
    Returns:
      True or False.
    """
    return bool(root) and any((at_home(root) / name).is_file() for name in (INDEX, UNFINISHED))  # type: ignore[arg-type]


def read_index(root: str | os.PathLike) -> dict[str, Any]:
    """The index of a folder of shards.

    Args:
      root: the folder.
    Returns:
      dict, see `lcrf_jax.data.sharding.write_shards`.
    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged, or of a later version.
    """
    path = at_home(root) / INDEX
    if not path.is_file():
        if (path.parent / UNFINISHED).is_file():
            raise FileNotFoundError(f"{path.parent} holds shards that are not finished; run the same python -m experiments.shards again")
        near = "" if path.parent.is_dir() else f"; {path.parent} does not exist"
        raise FileNotFoundError(f"{path.parent} holds no {INDEX}{near}: give the folder that python -m experiments.shards has written")
    try:
        index = parsed_json(path.read_text(encoding="utf-8-sig"))
        version = index["version"]
        if index["format"] != FORMAT or index["classes"][0] != BACKGROUND or not isinstance(index["splits"], dict):
            raise ValueError("it is of another kind")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no index of shards ({error}); copy it again, or {_ANEW}") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, and this lcrf_jax reads {VERSION}; use the one that wrote it, or {_ANEW}")
    return index


def split_in(index: dict[str, Any], split: str, root: str | os.PathLike) -> dict[str, Any]:
    """What an index says of a split.

    Args:
      index: of `read_index`.
      split: its name.
      root: the folder, for messages.
    Returns:
      dict.
    Raises:
      FileNotFoundError: if there is no such split.
    """
    if split not in index["splits"]:
        known = ", ".join(f"{name} ({each['photographs']})" for name, each in index["splits"].items())
        raise FileNotFoundError(f"{root} has no split {split!r}: there are {known}{nearest(split, index['splits'])}")
    return index["splits"][split]
