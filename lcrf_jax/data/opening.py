"""The kinds of data, and how a source of each is opened by name. A new kind gets its line in `SOURCES`."""

from __future__ import annotations

import os
from typing import Any

from lcrf_jax.data.example import Source
from lcrf_jax.data.files.shard_files import has_shards, read_index
from lcrf_jax.data.options import check_options
from lcrf_jax.data.parts import SliceOfSource, written_part
from lcrf_jax.data.sources.lists import there_file
from lcrf_jax.machine.errors import nearest
from lcrf_jax.machine.files import at_home


def open_textures(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options: Any
) -> Source:
    """The procedural set of `lcrf_jax.data.sources.textures.TexturesSource`; it has no folder.

    Args:
      split: ``train`` or ``val``.
      root: must be None or empty.
      masks: whether examples carry masks.
      **options: keyword arguments of `TexturesSource` (``seed``, ``size``, ``num_train``, ``num_val``).
    Returns:
      The source.
    Raises:
      ValueError: if a folder is given, or an option is out of its range.
    """
    from lcrf_jax.data.sources.textures import TexturesSource

    if root:
        raise ValueError(
            f"textures are made on the fly and have no folder, got root={str(root)!r}: "
            "leave root out, or use the source 'folder'"
        )
    return TexturesSource(split, masks=masks, **options)


def open_voc(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options: Any
) -> Source:
    """A folder in the layout of PASCAL VOC, see `lcrf_jax.data.sources.voc.VocSource`.

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
    from lcrf_jax.data.sources.voc import VocSource

    if not root:
        raise ValueError(
            "the source 'voc' needs root=FOLDER, the folder that holds JPEGImages/ and ImageSets/"
        )
    return VocSource(root, split, masks=masks, **options)


VOC_KNOWS_NO = {"mask_folder": "masks", "val_share": 0.2, "split_seed": 0}  # options of a plain folder, and their defaults


def open_folder(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options: Any
) -> Source:
    """A folder of photographs with a tag file or folders of classes, see `lcrf_jax.data.sources.folder.FolderSource`.

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
    """
    from lcrf_jax.data.sources.folder import FolderSource

    if not root:
        raise ValueError(
            "the source 'folder' needs root=FOLDER, the folder that holds the photographs and tags.csv; "
            "with a configuration: --config.data.root=FOLDER"
        )
    if has_shards(root):
        raise ValueError(f"{root} holds shards, and no photographs of their own: use the configuration shards, or data.kind=shards")
    if (at_home(root) / "ImageSets" / "Segmentation").is_dir() and not any(
        options.get(name) for name in ("tags", "classes", "colours")
    ):
        unused = sorted(name for name in VOC_KNOWS_NO if options.get(name, VOC_KNOWS_NO[name]) != VOC_KNOWS_NO[name])
        if unused:
            raise ValueError(
                f"data.options: {', '.join(unused)} cannot be used: {root} has the layout of PASCAL VOC (ImageSets/Segmentation), "
                "which has lists and folders of its own; leave the options out, or name the tag file with tags=FILE"
            )
        return open_voc(split, root=root, masks=masks, untagged_in_masks=options.get("untagged_in_masks", "tell"))
    return FolderSource(root, split, masks=masks, **options)


def open_tfds(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options: Any
) -> Source:
    """A data set of TensorFlow Datasets, see `lcrf_jax.data.sources.tfds.TfdsSource`.

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
    """
    try:
        from lcrf_jax.data.sources.tfds import TfdsSource

        return TfdsSource(split, root=root, masks=masks, **{"name": "", **options})
    except ImportError as error:
        raise ValueError(
            f"the source 'tfds' needs tensorflow-datasets ({error}): pip install '.[tfds]' in your clone"
        ) from error


def open_shards(
    split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options: Any
) -> Source:
    """A folder of shards, see `lcrf_jax.data.sources.shards.ShardsSource`.

    Args:
      split: name of a split in the index.
      root: the folder.
      masks: whether examples carry masks.
      **options: further keyword arguments of `ShardsSource`.
    Returns:
      The source.
    Raises:
      ValueError: if no folder is given, array_record is not installed, or a file is not that of the index.
      FileNotFoundError: if the index, a shard or the split is missing.
    """
    from lcrf_jax.data.sources.shards import ShardsSource

    if not root:
        raise ValueError(
            "the source 'shards' needs root=FOLDER, the folder that python -m experiments.shards has written; "
            "with a configuration: --config.data.root=FOLDER"
        )
    try:
        return ShardsSource(root, split, masks=masks, **options)
    except ImportError as error:
        raise ValueError(f"the source 'shards' needs array_record ({error}): pip install '.[train]' in your clone") from error


SOURCES = {"folder": open_folder, "shards": open_shards, "textures": open_textures, "tfds": open_tfds, "voc": open_voc}


def open_source(
    kind: str, split: str, *, root: str | os.PathLike | None = None, masks: bool = False, **options: Any
) -> Source:
    """Open a source by the name of its kind.

    Args:
      kind: a key of `SOURCES`.
      split: name of the split, ``train`` or ``val`` for textures, any list in a folder; or a part of one, as ``val[0::2]``, see
        `lcrf_jax.data.parts`. A list whose own name has these brackets is that list.
      root: the folder, for kinds that read one.
      masks: whether examples carry masks. Without it no mask is read or made.
      **options: passed on to the kind's constructor.
    Returns:
      The source.
    Raises:
      ValueError: if the kind is not known, the arguments do not fit it, or a part of a split is empty or wrongly written.
      FileNotFoundError: if a folder or one of its files is missing.
    """
    if kind not in SOURCES:
        raise ValueError(f"unknown source {kind!r}: expected one of {', '.join(sorted(SOURCES))}{nearest(kind, SOURCES)}")
    check_options(kind, options)
    part = None if _is_named(kind, root, split) else written_part(split, of_tfds=kind == "tfds")
    if part is not None:
        return SliceOfSource(open_source(kind, part.whole, root=root, masks=masks, **options), split, part.rows)
    return SOURCES[kind](split, root=root, masks=masks, **options)


def _is_named(kind: str, root: str | os.PathLike | None, split: str) -> bool:
    """Whether a folder has a list, or its shards a split, of this very name, brackets and all."""
    if not root or "[" not in split or kind not in ("folder", "voc", "shards"):
        return False
    if kind == "shards":
        return split in read_index(root)["splits"]
    folder = at_home(root)
    lists = folder / "ImageSets" / "Segmentation"
    return os.path.isfile(lists / f"{split}.txt") or folder.is_dir() and there_file(folder, f"{split}.txt") is not None
