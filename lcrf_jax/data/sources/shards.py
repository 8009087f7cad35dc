"""Photographs with tags in shards, as `experiments.shards` writes them; see `lcrf_jax.data.files.shard_files` for the files.

A start reads the index and the table of names and tags; shards are opened when one of their photographs is read, and only their
sizes are looked at before. Any photograph is read by itself, so that every order, share of a process and resume is that of a folder.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lcrf_jax.data.example import Example
from lcrf_jax.data.files.images import read_turned_image
from lcrf_jax.data.files.shard_files import ShardRecord, read_index, read_table, split_in, there, unpacked
from lcrf_jax.machine.files import at_home


class _Shard(NamedTuple):
    """A whole file, in the form that array_record takes without opening it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class ShardsSource:
    """One split of a folder of shards.

    Args:
      root: the folder.
      split: name of a split in its index.
      masks: whether examples carry masks.
      untagged_in_masks: ``tell`` or ``accept``, see `lcrf_jax.data.sources.folder.FolderSource`.
    Raises:
      FileNotFoundError: if the index, a shard, the split or (with ``masks``) its masks are missing.
      ValueError: if a file is not that of the index; the message names it.
    """

    def __init__(self, root: str | os.PathLike, split: str, *, masks: bool = False, untagged_in_masks: str = "tell") -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        if untagged_in_masks not in ("tell", "accept"):
            raise ValueError(f"untagged_in_masks: expected 'tell' or 'accept', got {untagged_in_masks!r}")
        self.root, index = at_home(root), read_index(root)
        about = split_in(index, split, self.root)
        if masks and not about["masks"]:
            raise FileNotFoundError(f"{self.root} has no masks of the split {split!r}: they were not there when the shards were written")
        self.split, self.masks, self.class_names = split, masks, tuple(index["classes"])
        self.names, self._tags = read_table(self.root / about["table"], about["table_sha256"])
        paths = [there(self.root / shard["file"], shard["bytes"]) for shard in about["shards"]]
        counts = [shard["records"] for shard in about["shards"]]
        if not sum(counts) == len(self.names) == len(self._tags) == about["photographs"]:
            raise ValueError(f"{self.root}: the shards of {split} hold {sum(counts)} records, and its table {len(self.names)}; copy it again")
        self._paths, self._firsts = paths, np.cumsum([0, *counts])
        self._records = ArrayRecordDataSource([_Shard(str(path), 0, count, count) for path, count in zip(paths, counts, strict=True)])
        self._digest, self.untagged_in_masks = about["sha256"], untagged_in_masks

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        record, where = self._record(index)
        image, _ = read_turned_image(where, record.image)
        if not self.masks:
            return Example(record.name, image, self._tags[index].copy(), None)
        mask = np.array(Image.open(io.BytesIO(record.mask)))
        if mask.shape != image.shape[:2]:
            raise ValueError(f"{where}: the mask is {list(mask.shape)} and the photograph {list(image.shape[:2])}; write the shards anew")
        return Example(record.name, image, self._tags[index].copy(), mask)

    def encoded(self, index: int) -> bytes:
        """The photograph's own file, as it was before the shards were written."""
        return self._record(index)[0].image

    @property
    def tags(self) -> np.ndarray:
        """[N, K] bool, the tags of all photographs in order, without opening a shard."""
        return self._tags.copy()

    @property
    def fingerprint(self) -> tuple:
        """What the shards hold by their index, wherever they lie."""
        return ("shards", self._digest, self.masks)

    def _record(self, index: int) -> tuple[ShardRecord, Path]:
        """A record, and the shard and photograph as one path for messages."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} photographs of {self.root}/{self.split}")
        shard = self._paths[int(np.searchsorted(self._firsts, index, side="right")) - 1]
        where = shard / self.names[index]
        try:
            record = unpacked(self._records[index])
        except (RuntimeError, ValueError) as error:  # a checksum that is not right, a shard that went
            raise ValueError(f"{where}: the shard is damaged or gone ({error}); copy it again, or write the shards anew") from error
        if record.name != self.names[index]:
            raise ValueError(f"{where}: the shard holds {record.name!r} in its place: it is that of other shards; copy the folder again")
        return record, where
