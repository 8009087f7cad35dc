"""Photographs in the folder layout of PASCAL VOC, with a tag file.

::

    JPEGImages/<id>.jpg                      the photographs
    ImageSets/Segmentation/<split>.txt       one id a line
    classes.txt                              one class a line in the order of the indices, background first
    tags.csv                                 header ``image,tags``; tags separated by ;
    SegmentationClass/<id>.png               where masks exist: class indices (grey or palette), 255 = void

Everything that can be checked without opening a photograph is checked when the source is made, and every
message names the file, the line where there is one, and the remedy. Masks are touched only with
``masks=True``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lcrf_jax.data.example import Example, tag_vector
from lcrf_jax.data.files.finding import files_below, meant, meant_path, not_taken
from lcrf_jax.data.files.images import is_photograph, read_turned_image
from lcrf_jax.data.files.masks import fit_mask, read_mask, refuse_black_and_white
from lcrf_jax.data.files.tags import columns_not_read, read_classes, read_tag_file, read_text, some
from lcrf_jax.data.sources.mask_files import find_masks
from lcrf_jax.machine.contents import content_digests
from lcrf_jax.machine.errors import nearest
from lcrf_jax.machine.files import at_home


class VocSource:
    """One split of a folder in VOC layout.

    Args:
      root: the folder.
      split: name of the list in ``ImageSets/Segmentation`` without ``.txt``.
      masks: whether examples carry masks; only then is ``SegmentationClass`` looked at.
      untagged_in_masks: ``tell`` or ``accept``, see `lcrf_jax.data.check.mask_doubts`.
    Raises:
      FileNotFoundError: if the folder, a list, a photograph or (with ``masks``) a mask is missing.
      ValueError: if a file cannot be read or the files do not fit together.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge 2012, development kit.
    """

    def __init__(
        self, root: str | os.PathLike, split: str, *, masks: bool = False, untagged_in_masks: str = "tell"
    ) -> None:
        if untagged_in_masks not in ("tell", "accept"):
            raise ValueError(f"untagged_in_masks: expected 'tell' or 'accept', got {untagged_in_masks!r}")
        self._root = check_folder(root, split)
        self.split = split
        self.masks, self.untagged_in_masks = masks, untagged_in_masks
        self.class_names = read_classes(self._root / "classes.txt")
        self.names = read_split(self._root / "ImageSets" / "Segmentation" / f"{split}.txt")
        tags = read_tags(self._root / "tags.csv", self.class_names)
        _check_tagged(self.names, tags, self._root / "tags.csv", split)
        self._tags = np.stack([tags[name] for name in self.names])
        self._images = _find_images(self._root / "JPEGImages", self.names, split)
        lines = not_taken(files_below(self._root / "JPEGImages")), columns_not_read(self._root / "tags.csv")
        self.not_taken = "; ".join(line for line in lines if line)
        self._masks = _find_masks(self._root / "SegmentationClass", self.names, split) if masks else {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self.names):
            raise IndexError(
                f"index {index} is outside the {len(self.names)} images of {self._root}/{self.split}"
            )
        name = self.names[index]
        image, turn = read_turned_image(self._images[index])
        mask = None
        if self.masks:
            path = self._masks[name]
            mask = read_mask(path, len(self.class_names))
            refuse_black_and_white(mask, self._tags[index], path)
            mask = fit_mask(mask, image.shape[:2], turn, path, self._images[index])
        return Example(name, image, self._tags[index].copy(), mask)

    @property
    def tags(self) -> np.ndarray:
        """[N, K] bool, the tags of all images in order, without opening a photograph."""
        return self._tags.copy()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files of the photographs in order."""
        return self._images

    @property
    def fingerprint(self) -> tuple:
        """Tells whether photographs or masks changed: what they hold, wherever they lie."""
        masks = [self._masks[name] for name in self.names if self.masks]
        return ("photographs", content_digests(self._images), content_digests(masks))


def check_folder(root: str | os.PathLike, split: str) -> Path:
    """The folder as a path, after checking that it has what the layout needs.

    Args:
      root: the folder.
      split: name of the list in ``ImageSets/Segmentation`` without ``.txt``.
    Returns:
      The path of the folder.
    Raises:
      FileNotFoundError: if the folder or a part of it is missing; the message says which and what stands
        there.
    """
    folder = at_home(root)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(
            f"the data folder {folder} {what}: give the folder that holds JPEGImages/, "
            "ImageSets/Segmentation/, classes.txt and tags.csv"
        )
    for part in ("JPEGImages", "ImageSets/Segmentation", "classes.txt", "tags.csv"):
        if not (folder / part).exists():
            found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:12]) or "nothing"
            raise FileNotFoundError(
                f"{folder} has no {part}: the folder layout is JPEGImages/<id>.jpg, "
                "ImageSets/Segmentation/<split>.txt, classes.txt, tags.csv "
                f"(found there: {found})"
            )
    if not (folder / "ImageSets" / "Segmentation" / f"{split}.txt").is_file():
        splits = sorted(path.stem for path in (folder / "ImageSets" / "Segmentation").glob("*.txt"))
        raise FileNotFoundError(
            f"{folder}/ImageSets/Segmentation has no {split}.txt: "
            f"the splits there are {', '.join(splits) or 'none'}{nearest(split, splits)}"
        )
    return folder


def read_split(path: str | os.PathLike) -> tuple[str, ...]:
    """The image ids of a list in ``ImageSets/Segmentation``.

    Args:
      path: the file, one id a line.
    Returns:
      The ids in order.
    Raises:
      ValueError: if there is no id, or one occurs twice, or one is a path or has an extension.
    """
    first_line: dict[str, int] = {}
    for line, name in enumerate(read_text(path).splitlines(), 1):
        name = name.strip()
        if not name:
            continue
        if name in first_line:
            raise ValueError(
                f"{path}, line {line}: {name!r} stands on line {first_line[name]} already; remove one"
            )
        if "/" in name or "\\" in name or is_photograph(name):
            raise ValueError(
                f"{path}, line {line}: expected an id such as 2007_000032, got {name!r}; "
                "write the file name without folder and extension"
            )
        first_line[name] = line
    if not first_line:
        raise ValueError(f"{path} lists no image; write one id a line")
    return tuple(first_line)


def read_tags(path: str | os.PathLike, class_names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The tags of every image of a ``tags.csv``.

    ``background`` as a tag is accepted and changes nothing; no tags means background only. A row that
    repeats an earlier one is accepted, one that contradicts it is not.

    Args:
      path: the file; header ``image,tags``, tags separated by ``;``.
      class_names: names of all K classes, index 0 is background.
    Returns:
      [K] bool by image id; index 0 is always True.
    Raises:
      ValueError: if the header, a delimiter, a class name or a repeated row is wrong; the message names
        the line.
    """
    tags: dict[str, np.ndarray] = {}
    for image, row in read_tag_file(path).items():
        name = image.rsplit(".", 1)[0] if is_photograph(image) else image
        try:
            vector = tag_vector(row.tags, class_names)
        except ValueError as error:
            raise ValueError(
                f"{row.where}: {error}; correct the tag, or add the class to classes.txt; tags are separated by ;"
            ) from None
        if name in tags and not np.array_equal(tags[name], vector):
            raise ValueError(f"{row.where}: {name!r} has other tags on another line; join them in one row")
        tags[name] = vector
    return tags


def _check_tagged(names: tuple[str, ...], tags: dict[str, np.ndarray], path: Path, split: str) -> None:
    """Every image of the split has a row."""
    missing = [name for name in names if name not in tags]
    if missing:
        raise ValueError(
            f"{path} has no row for {some(missing)} of the split {split!r}; add 'ID,tag;tag' for each "
            "('ID,' where an image shows background only)"
        )


def _find_images(folder: Path, names: tuple[str, ...], split: str) -> tuple[Path, ...]:
    """The photograph of every id."""
    found: dict[str, list[str]] = {}
    for entry in os.listdir(folder):
        stem = os.path.splitext(entry)[0]
        if is_photograph(entry) and not entry.startswith("."):
            found.setdefault(stem, []).append(entry)
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder} has no photograph for {some(missing)} of the split {split!r}; add "
            f"<id>.jpg or take the id off ImageSets/Segmentation/{split}.txt{meant(missing[0], os.listdir(folder))}"
        )
    for name in names:
        if len(found[name]) > 1:
            raise ValueError(
                f"{folder} has more than one file for the id {name!r}: "
                f"{', '.join(sorted(found[name]))}; keep one"
            )
    return tuple(folder / found[name][0] for name in names)


def _find_masks(folder: Path, names: tuple[str, ...], split: str) -> dict[str, Path]:
    """The mask of every id."""
    found = find_masks(folder, names)
    missing = [name for name in names if name not in found.of]
    if missing:
        near = meant(f"{missing[0]}.png", os.listdir(folder)) if folder.is_dir() else meant_path(folder)
        more = "".join(f" ({line})" for line in found.problems)
        raise FileNotFoundError(
            f"{folder} has no mask for {some(missing)} of the split {split!r}; open the split "
            f"with masks=False, or add <id>.png with class indices{near}{more}"
        )
    if found.problems:
        raise ValueError("\n".join(found.problems))
    return found.of
