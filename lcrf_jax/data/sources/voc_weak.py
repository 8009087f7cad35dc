"""A TensorFlow Datasets builder of VOC 2012 with SBD, for segmentation from image tags; TensorFlow is not needed.

`experiments.build_voc` makes the data set, and kind ``tfds`` with name ``voc_weak/boxes`` or ``voc_weak/masks`` reads it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import tensorflow_datasets as tfds
from PIL import Image

from lcrf_jax.data.sources.devkit import CLASSES, LISTS, TAGS_FROM, Devkit, list_problem
from lcrf_jax.machine.files import at_home, real_path

_DESCRIPTION = (
    "PASCAL VOC 2012 segmentation with the masks of SBD (train_aug), and image tags. Masks are for scoring, or for full "
    "supervision; those of test are void throughout, and it has no tags."
)

_CITATION = (
    "Everingham et al., The PASCAL Visual Object Classes Challenge 2012; "
    "Hariharan et al., Semantic contours from inverse detectors, ICCV 2011"
)


class Kit(NamedTuple):
    """What a data set is made of.

    Attributes:
      root: folder of the development kit.
      tags_from: ``boxes`` or ``masks``.
      any_lists: whether lists other than those that the field uses are accepted.
      sbd: folder ``benchmark_RELEASE`` of SBD, or None.
    """

    root: str
    tags_from: str
    any_lists: bool
    sbd: str | None = None

    def opened(self) -> Devkit:
        """The kit itself."""
        return Devkit(self.root, self.sbd)


class _Config(tfds.core.BuilderConfig):
    """A configuration by where the tags come from."""

    def __init__(self, kit: Kit, **kwargs):
        super().__init__(name=kit.tags_from, description=f"image tags from {kit.tags_from}", **kwargs)
        self.kit = kit


class VocWeak(tfds.core.GeneratorBasedBuilder):
    """The builder; make it by `prepared`."""

    name = "voc_weak"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features, kit = tfds.features, self.builder_config.kit
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            citation=_CITATION,
            homepage="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
            metadata=tfds.core.MetadataDict(tags_from=kit.tags_from, lists="as given" if kit.any_lists else "verified"),
            features=features.FeaturesDict(
                {
                    "image": features.Image(encoding_format="jpeg"),
                    "labels": features.Sequence(features.ClassLabel(names=CLASSES[1:])),
                    "segmentation_mask": features.Image(shape=(None, None, 1), encoding_format="png"),
                    "file_name": features.Text(),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        kit = self.builder_config.kit
        lists = checked_lists(kit.opened(), any_lists=kit.any_lists)
        return {split: self._generate_examples(split, ids) for split, ids in lists.items()}

    def _generate_examples(self, split, ids):
        kit = self.builder_config.kit
        devkit = kit.opened()
        for name in ids:
            found = devkit.labelled(name, split, kit.tags_from)
            yield name, {
                "image": found.photograph,
                "labels": list(found.tags),
                "segmentation_mask": Image.fromarray(found.mask),
                "file_name": name,
            }


def checked_lists(devkit: Devkit, *, any_lists: bool) -> dict[str, tuple[str, ...]]:
    """The lists of a kit that are there.

    Args:
      devkit: the kit.
      any_lists: whether other lists than those of the field will do.
    Returns:
      dict from split to ids.
    Raises:
      ValueError: if a list is another one, all of them named; or none is there.
    """
    found = {split: ids for split in LISTS if (ids := devkit.ids(split))}
    problems = [problem for split, ids in found.items() if (problem := list_problem(split, ids))]
    if problems and not any_lists:
        raise ValueError(
            f"{devkit.root}: {'; '.join(problems)}. Unpack the kit again, or use --any_lists for a part of it or lists of your own"
        )
    if not found:
        raise ValueError(f"{devkit.root}/ImageSets/Segmentation has none of the lists {', '.join(LISTS)}; unpack the kit again")
    return found


def prepared(
    root: str | os.PathLike,
    data_dir: str | os.PathLike,
    *,
    tags_from: str,
    any_lists: bool = False,
    sbd: str | os.PathLike | None = None,
) -> tfds.core.DatasetInfo:
    """The data set, made if it is not there yet.

    Args:
      root: folder of the development kit.
      data_dir: folder of the prepared data sets.
      tags_from: ``boxes`` or ``masks``.
      any_lists: whether other lists than those of the field will do.
      sbd: folder ``benchmark_RELEASE`` of SBD, for the masks of train_aug; None for ``SegmentationClassAug`` of the kit.
    Returns:
      tfds.core.DatasetInfo.
    Raises:
      FileNotFoundError, ValueError: if the kit is not as expected; the message names the file. Nothing is left then.
    """
    if tags_from not in TAGS_FROM:
        raise ValueError(f"tags: expected one of {', '.join(TAGS_FROM)}, got {tags_from!r}")
    kit = Kit(_absolute(root), tags_from, any_lists, None if sbd is None else _absolute(sbd))
    builder = VocWeak(data_dir=at_home(data_dir), config=_Config(kit), file_format="array_record")
    builder.download_and_prepare()
    return builder.info


def _absolute(path: str | os.PathLike) -> str:
    return str(real_path(path))
