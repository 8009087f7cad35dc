"""A folder of photographs and a file of tags, or a folder for each class.

::

    FOLDER/**/*.jpg                    photographs: any names, any depth, any format that Pillow opens
    FOLDER/tags.csv                    or tags.json, tags.jsonl or tags.tsv, see `lcrf_jax.data.files.tags`; or none, and then
    FOLDER/horse/**/*.jpg              the first folder of a photograph is its only tag, "background" is none
    FOLDER/classes.txt                 background, then a class a line; without it the classes are those of the tags, and
                                       it has to be there where names look doubtful, or where masks hold indices
    FOLDER/train.txt, FOLDER/val.txt   optional: photographs of the splits, one a line, with their masks in a second column
    FOLDER/masks/**/*.png              optional: the mask of a photograph has its name and folder; .tif, .bmp and .gif too
    FOLDER/colours.csv                 optional: the colours of the masks, see `lcrf_jax.data.files.masks.read_colours`

In tag files and lists a photograph is named by its path within the folder. The extension and the first folders may be
left out if one photograph alone fits. Without lists a seed chooses some of the photographs that have masks: these are
the split val, and all others are the split train; folders train and val are these splits. Photographs of a folder test beside
them, or of a list test.txt, are neither trained on nor chosen by. Everything that is wrong with names, tags and lists is told in one
error, when the source is made.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from lcrf_jax.data.example import Example
from lcrf_jax.data.files.finding import meant, meant_path
from lcrf_jax.data.files.images import read_turned_image
from lcrf_jax.data.files.masks import fit_mask, read_mask, refuse_black_and_white
from lcrf_jax.data.files.tags import some
from lcrf_jax.data.sources.listing import Listing, scan_folder
from lcrf_jax.data.sources.lists import SPLITS
from lcrf_jax.machine.contents import content_digests
from lcrf_jax.machine.errors import nearest


class FolderSource:
    """One split of a folder of photographs with tags, see the head of this file.

    Args:
      root: the folder.
      split: ``train``, ``val``, or the name of another list in the folder without ``.txt``.
      masks: whether examples carry masks; only then is a mask opened.
      missing_images: ``error`` refuses rows without a photograph, ``skip`` leaves them out.
      untagged_in_masks: ``tell`` or ``accept``: what to make of masks that show classes that their photographs are not
        tagged with, see `lcrf_jax.data.check.mask_doubts`.
      **options: of `scan_folder`.
    Raises:
      FileNotFoundError: if the folder, a photograph or (with ``masks``) a mask is missing.
      ValueError: if tags, classes or lists are wrong; the message lists all problems.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        masks: bool = False,
        missing_images: str = "error",
        untagged_in_masks: str = "tell",
        **options: Any,
    ) -> None:
        if untagged_in_masks not in ("tell", "accept"):
            raise ValueError(f"untagged_in_masks: expected 'tell' or 'accept', got {untagged_in_masks!r}")
        found = scan_folder(root, lists=(*SPLITS, split), **options)
        _refuse(found, missing_images)
        if split not in found.splits or not len(found.splits[split]):
            raise FileNotFoundError(_no_split(found, split))
        self._found, self._rows = found, found.splits[split]
        self.split, self.masks, self.class_names = split, masks, found.class_names
        self.names = tuple(found.images[row] for row in self._rows)
        self.left_out, self.untagged, self.tag_source = len(found.missing), found.untagged, found.tag_source
        self.not_taken, self.untagged_in_masks = found.not_taken, untagged_in_masks
        without = [name for name in self.names if name not in found.masks] if masks else []
        if without:
            raise FileNotFoundError(
                f"{found.root} has no mask for {some(without)} of the split {split!r}; add FOLDER/masks/NAME.png, or take "
                f"them off the list of the split{_beside(found, without[0])}"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} images of {self._found.root}/{self.split}")
        name, tags = self.names[index], self._found.tags[self._rows[index]]
        path, mask = self._found.root / name, None
        image, turn = read_turned_image(path)
        if self.masks:
            mask = read_mask(self._found.masks[name], len(self.class_names), colours=self._found.colours)
            refuse_black_and_white(mask, tags, self._found.masks[name])
            mask = fit_mask(mask, image.shape[:2], turn, self._found.masks[name], path)
        return Example(name, image, tags.copy(), mask)

    @property
    def tags(self) -> np.ndarray:
        """[N, K] bool, the tags of all images in order, without opening a photograph."""
        return self._found.tags[self._rows]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the photographs in order."""
        return tuple(self._found.root / name for name in self.names)

    @property
    def fingerprint(self) -> tuple:
        """Tells whether photographs or masks changed: what they hold, wherever they lie."""
        masks = [self._found.masks[name] for name in self.names if self.masks]
        return ("photographs", content_digests(self.paths), content_digests(masks), repr(self.masks and self._found.colours))


def _refuse(found: Listing, missing_images: str) -> None:
    """Raise one error for all that is wrong."""
    if missing_images not in ("error", "skip"):
        raise ValueError(f"missing_images: expected 'error' or 'skip', got {missing_images!r}")
    wrong = [*found.problems, *(found.missing if missing_images == "error" else ())]
    if len(wrong) == 1:
        raise ValueError(wrong[0])
    if wrong:
        lines = [f"  {line}" for line in wrong[:20]] + ([f"  and {len(wrong) - 20} more"] if len(wrong) > 20 else [])
        raise ValueError("\n".join([f"{found.root}: {len(wrong)} problems:", *lines]))


def _no_split(found: Listing, split: str) -> str:
    """Why there is no such split."""
    there = [f"{name} ({len(rows)})" for name, rows in found.splits.items() if len(rows)]
    if split == "val" and not found.masks:
        near = meant_path(found.root / "masks")
        return (f"{found.root} has no masks and no list val.txt, so there is no split 'val', and nothing to score; masks belong into "
                f"{found.root / 'masks'}, and photographs without masks are for predict{near}")  # fmt: skip
    return (
        f"{found.root} has no photographs of the split {split!r}: the splits there are {', '.join(there) or 'none'}; "
        f"write {split}.txt with a photograph a line{meant_path(found.root / f'{split}.txt') or nearest(split, found.splits)}"
    )


def _beside(found: Listing, name: str) -> str:
    """The mask nearest to the one that is missing."""
    return meant(os.path.splitext(name)[0] + ".png", [os.path.relpath(path, found.root) for path in found.masks.values()])
