r"""Make the data set voc_weak: PASCAL VOC 2012 with the masks of SBD and image tags, from the unpacked development kit.

    python -m experiments.build_voc --devkit=VOCdevkit --data_dir=TFDS [--sbd=benchmark_RELEASE] [--tags=boxes|masks]
    python -m experiments.train --config=experiments/configs/voc2012.py --config.data.root=TFDS --workdir=RUN

docs/original.md says where the files are; the masks of train_aug come from the kit's SegmentationClassAug, or from SBD itself. Splits
are train (1,464), train_aug (10,582), val (1,449) and test (1,456), those of which the kit has a list; each list is compared to the one
that the field uses. Tags come from the boxes of the annotations, or from the masks; the data set is voc_weak/boxes or
voc_weak/masks, and its metadata say so. Every photograph and mask is opened once. --archive compares a file that was fetched with
its published md5 first. Neither TensorFlow nor a network is needed.
"""

from absl import flags, logging

from lcrf_jax.data.sources.devkit import LISTS, TAGS_FROM, archive_problem
from lcrf_jax.machine.progress import say

from . import reporting

_DEVKIT = flags.DEFINE_string("devkit", None, "The folder VOCdevkit.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of data sets; this one is made in its voc_weak.")
_SBD = flags.DEFINE_string("sbd", None, "The folder benchmark_RELEASE of SBD; by default the kit's SegmentationClassAug.")
_TAGS = flags.DEFINE_enum("tags", TAGS_FROM[0], TAGS_FROM, "Where the image tags come from.")
_ARCHIVE = flags.DEFINE_multi_string("archive", [], "VOCtrainval_11-May-2012.tar or benchmark.tgz, whose md5 is compared; not unpacked.")
_ANY_LISTS = flags.DEFINE_bool("any_lists", False, "Take lists that are not those of the field; the metadata say so.")


def main(argv):
    """Check, make and describe the data set."""
    reporting.no_more_arguments(argv)
    logging.set_verbosity(logging.ERROR)  # TensorFlow Datasets warns of configurations that are made as they are needed
    for path in _ARCHIVE.value:
        problem = archive_problem(path)
        if problem:
            raise ValueError(problem)
        say(f"{path}: the md5 is the published one")
    try:
        from lcrf_jax.data.sources import voc_weak
    except ImportError as error:
        raise ValueError(f"build_voc needs tensorflow-datasets ({error}): pip install '.[tfds]' in your clone") from error
    info = voc_weak.prepared(_DEVKIT.value, _DATA_DIR.value, tags_from=_TAGS.value, any_lists=_ANY_LISTS.value,
                             sbd=_SBD.value)
    lists = info.metadata["lists"]
    for split in LISTS:
        if split in info.splits:
            say(f"{split:9} {info.splits[split].num_examples:6,} images")
        else:
            say(f"{split:9} is left out: the kit has no list of it")
    say(f"lists {lists}; tags from {info.metadata['tags_from']}")
    say(f"{info.full_name} in {info.data_dir}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["devkit", "data_dir"])
    reporting.run(main)
