"""The development kit of PASCAL VOC 2012 with the masks of SBD, as it is unpacked::

    VOCdevkit/VOC2012/JPEGImages/<id>.jpg
    VOCdevkit/VOC2012/Annotations/<id>.xml                       boxes of the objects
    VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val,test}.txt, and train_aug.txt or trainaug.txt
    VOCdevkit/VOC2012/SegmentationClass/<id>.png                 palette masks of train and val
    VOCdevkit/VOC2012/SegmentationClassAug/<id>.png              masks of train_aug, grey; in most copies those of val too
    benchmark_RELEASE/dataset/cls/<id>.mat                       or those masks as SBD itself has them

The lists that the field uses are known here by their length and their sha256.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from lcrf_jax.data.example import VOID
from lcrf_jax.data.files.images import read_turned_image
from lcrf_jax.data.files.masks import fit_mask, read_mask
from lcrf_jax.data.files.tags import read_text, some
from lcrf_jax.machine.files import at_home

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

TAGS_FROM = ("boxes", "masks")
# md5 of the published archives, as in libraries that download them.
ARCHIVES = {
    "VOCtrainval_11-May-2012.tar": "6cd6e144f989b92b3379bac3b3de84fd",
    "benchmark.tgz": "82b4d87ceb2ed10f6038a1cba92111cb",
}


class KnownList(NamedTuple):
    """A list of images as the field uses it.

    Attributes:
      length: number of images.
      sha256: of the sorted ids, joined by newlines.
      files: names that the list may have, without ``.txt``.
      masks: folder of its masks, or None.
    """

    length: int
    sha256: str
    files: tuple[str, ...]
    masks: str | None


LISTS = {
    "train": KnownList(
        1464, "129f1fe991729b1862115b77738c938c149c1f167baa02b4b3186aea9f0d6a84", ("train",), "SegmentationClass"
    ),
    "train_aug": KnownList(
        10582, "855dff350b7f447bf43cb98ea626a32e0d0b3b7c5786e03b2712a21355b635bf", ("train_aug", "trainaug"),
        "SegmentationClassAug",
    ),
    "val": KnownList(
        1449, "6f8edc37993764f6e212237d39546fb595246244147e8a050813c520aac0ade1", ("val",), "SegmentationClass"
    ),
    "test": KnownList(1456, "7d323bb3448fa174b9194953e01dfd168c9890adb30dd2491a66536edbeca0aa", ("test",), None),
}  # fmt: skip


class Labelled(NamedTuple):
    """One image of the kit.

    Attributes:
      name: its id.
      photograph: path of the JPEG file.
      mask: [H, W] uint8 class indices, 255 for void; void throughout where the kit has no mask.
      tags: names of the classes that it shows, in the order of CLASSES; none where nothing tells.
    """

    name: str
    photograph: Path
    mask: np.ndarray
    tags: tuple[str, ...]


class Devkit:
    """An unpacked kit.

    Args:
      root: the folder ``VOCdevkit``, its ``VOC2012``, or the folder that holds ``VOCdevkit``.
      sbd: the folder ``benchmark_RELEASE`` of SBD, for the masks of train_aug; None for ``SegmentationClassAug``.
    Raises:
      FileNotFoundError: if there is no such folder in it.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge 2012, development kit; Hariharan et al. 2011 (SBD).
    """

    def __init__(self, root: str | os.PathLike, sbd: str | os.PathLike | None = None) -> None:
        self._sbd = None if sbd is None else at_home(sbd) / "dataset" / "cls"
        if self._sbd is not None and not self._sbd.is_dir():
            raise FileNotFoundError(f"{sbd} has no dataset/cls: give the folder benchmark_RELEASE of SBD's benchmark.tgz")
        given = at_home(root)
        for folder in (given, given / "VOC2012", given / "VOCdevkit" / "VOC2012"):
            if (folder / "JPEGImages").is_dir() and (folder / "ImageSets" / "Segmentation").is_dir():
                self.root = folder
                return
        what = "does not exist" if not given.exists() else (
            f"holds {some(sorted(path.name for path in given.iterdir()), 8) or 'nothing'}" if given.is_dir() else "is a file")  # fmt: skip
        raise FileNotFoundError(
            f"{given} {what}: give the folder VOCdevkit, with VOC2012/JPEGImages and VOC2012/ImageSets/Segmentation in it"
        )

    def ids(self, split: str) -> tuple[str, ...] | None:
        """The images of a list, in its order.

        If there is no list of ``train_aug``, it is made from the masks: all images with a mask of SBD or in
        ``SegmentationClassAug``, with those of train and without those of val.

        Args:
          split: a key of LISTS.
        Returns:
          The ids; None if the kit does not have them.
        Raises:
          ValueError: if a line is wrong, or an image stands twice in a list.
        """
        for name in LISTS[split].files:
            path = self.root / "ImageSets" / "Segmentation" / f"{name}.txt"
            if path.is_file():
                return listed(path)
        masks = self._sbd or self.root / "SegmentationClassAug"
        if split == "train_aug" and masks.is_dir():
            suffix = ".png" if self._sbd is None else ".mat"
            found = {path.stem for path in masks.iterdir() if path.suffix == suffix}
            return tuple(sorted((found | set(self.ids("train") or ())) - set(self.ids("val") or ())))
        return None

    def _mask(self, name: str, split: str, folder: str) -> tuple[Path, np.ndarray]:
        """The file of a mask, and its labels. SBD is asked for the masks alone that VOC does not have."""
        own = self.root / "SegmentationClass" / f"{name}.png"
        if split != "train_aug" or self._sbd is None:
            path = self.root / folder / f"{name}.png"
        else:
            path = own if own.is_file() else self._sbd / f"{name}.mat"
        return path, sbd_mask(path) if path.suffix == ".mat" else read_mask(path, len(CLASSES))

    def labelled(self, name: str, split: str, tags_from: str) -> Labelled:
        """An image with what the kit knows of it.

        Args:
          name: its id.
          split: a key of LISTS, which says where its mask is.
          tags_from: ``boxes`` of its annotation, objects marked difficult among them; or ``masks``.
        Returns:
          Labelled.
        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if a file is damaged, or its mask has another size or labels above 20.
        """
        photograph = self.root / "JPEGImages" / f"{name}.jpg"
        image, turn = read_turned_image(photograph)
        folder = LISTS[split].masks
        if folder is None:
            return Labelled(name, photograph, np.full(image.shape[:2], VOID, np.uint8), ())
        path, mask = self._mask(name, split, folder)
        mask = fit_mask(mask, image.shape[:2], turn, path, photograph)
        if tags_from == "boxes":
            return Labelled(name, photograph, mask, box_tags(self.root / "Annotations" / f"{name}.xml"))
        present = set(np.unique(mask)) - {0, VOID}
        return Labelled(name, photograph, mask, tuple(CLASSES[label] for label in sorted(present)))


def listed(path: Path) -> tuple[str, ...]:
    """The ids of a list: one a line, or the paths of a photograph and its mask, as some projects have it.

    Args:
      path: the file.
    Returns:
      The ids in order.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if a line is no id, or an image stands twice.
    """
    if not path.is_file():
        raise FileNotFoundError(f"the list {path} does not exist")
    ids: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name = Path(line.split()[0]).stem
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{path}, line {number}: expected an id such as 2007_000032, got {line.strip()!r}; correct it")
        if name in ids:
            raise ValueError(f"{path}, line {number}: {name!r} stands on line {ids[name]} already; remove one")
        ids[name] = number
    return tuple(ids)


def list_problem(split: str, ids: tuple[str, ...]) -> str:
    """What is wrong with a list, compared to the one that the field uses.

    Args:
      split: a key of LISTS.
      ids: its images.
    Returns:
      A sentence, or "" if they are the same images.
    """
    known = LISTS[split]
    if len(ids) != known.length:
        return f"{split} has {len(ids):,} images, not {known.length:,}"
    digest = hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()
    if digest != known.sha256:
        return f"{split} has {len(ids):,} images, but not those that the field uses (sha256 {digest}, not {known.sha256})"
    return ""


def box_tags(path: str | os.PathLike) -> tuple[str, ...]:
    """The classes of the objects in an annotation, difficult ones among them.

    Args:
      path: the XML file.
    Returns:
      Names in the order of CLASSES.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no annotation, or an object has another class.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy Annotations from VOCtrainval_11-May-2012.tar, or use tags from masks")
    try:
        root = ElementTree.fromstring(read_text(path))
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is damaged ({error}); copy it again") from error
    # The parts of a person have names of their own, one level further down.
    found = {element.findtext("name", "").strip() for element in root.iterfind("object")}
    unknown = sorted(found - set(CLASSES[1:]))
    if root.tag != "annotation" or unknown:
        what = f"an object {unknown[0]!r}" if unknown else f"the element {root.tag!r}"
        raise ValueError(f"{path}: expected an annotation with objects of the 20 classes, got {what}; copy it again")
    return tuple(name for name in CLASSES if name in found)


def sbd_mask(path: str | os.PathLike) -> np.ndarray:
    """A mask as SBD has it, in a file of MATLAB.

    Args:
      path: ``dataset/cls/<id>.mat``, with the field Segmentation of GTcls.
    Returns:
      [H, W] uint8 class indices; SBD has no void.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if scipy is not installed, or the file is no such mask.
    References:
      Hariharan et al. 2011.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; unpack SBD's benchmark.tgz again")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"SBD's own files need scipy ({error}): pip install '.[sbd]' in your clone") from error
    try:
        mask = np.asarray(loadmat(path)["GTcls"]["Segmentation"][0, 0])
    except Exception as error:  # its reader raises errors of every kind
        raise ValueError(f"{path} is no mask of SBD or damaged ({type(error).__name__}: {error}); unpack it again") from error
    if mask.ndim != 2 or mask.dtype != np.uint8 or mask.max(initial=0) >= len(CLASSES):
        raise ValueError(f"{path}: expected [H, W] labels from 0 to 20, got {list(mask.shape)} {mask.dtype} up to {mask.max(initial=0)}")
    return mask


def archive_problem(path: str | os.PathLike) -> str:
    """What is wrong with a downloaded archive.

    Args:
      path: the file, of a name in ARCHIVES.
    Returns:
      A sentence, or "" if it is the published one.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if nothing is known of a file of that name.
    """
    path = at_home(path)
    if path.name not in ARCHIVES:
        raise ValueError(f"{path}: the md5 is known of {', '.join(ARCHIVES)} alone; leave it out")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    return "" if digest == ARCHIVES[path.name] else f"{path} has the md5 {digest}, not {ARCHIVES[path.name]}; fetch it again"
