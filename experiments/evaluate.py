r"""Score a run, or a trained model, on a split with masks.

    python -m experiments.evaluate --checkpoint=RUN --data=FOLDER --split=val [--crf]
    python -m experiments.evaluate --checkpoint=animals --data=FOLDER --out=RESULTS [--crf]

The checkpoint alone says what the network is. Without --data the data that the run was trained on is used; what is written of
other data has its name: results_SPLIT_NAME-xxxxxx.json. It is written to the folder of the run, or to --out. The last line is the mIoU, with --crf that after refinement. --tags_given excludes classes that are not among an image's tags,
and the output says so. Settings that were chosen on one half of a split are reported on the other: --split='val[1::2]', or
--parts=2 for both halves and the whole in one pass. Several processes (--distributed, docs/scaling.md) share the images.
"""

import time

from absl import flags

from lcrf_jax.machine import processes
from lcrf_jax.machine.files import at_home, naming
from lcrf_jax.predict.model import described

from . import class_map_scores, reporting

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, a file of a model, or the name of one that is shipped.")
_OUT = flags.DEFINE_string("out", None, "Folder for results, pictures and report; by default that of the run.")
_DATA = flags.DEFINE_string("data", None, "Folder of other data, of prepared data sets for tfds; by default that of the run.")
_SPLIT = flags.DEFINE_string("split", "val", "Name of the split, or a part of it such as 'val[1::2]'.")
_PARTS = flags.DEFINE_integer("parts", 1, "Score the parts SPLIT[0::N], SPLIT[1::N], ... by themselves as well.", lower_bound=1)
_CRF = flags.DEFINE_bool("crf", False, "Refine by mean field of the dense CRF on each image at its own size.")
_TAGS_GIVEN = flags.DEFINE_bool("tags_given", False, "Use the image tags at test time.")
_CAM = flags.DEFINE_bool("cam", False, "Score the class maps of the frozen tag classifier instead; needs --tags_given.")
reporting.define_process_flags()


def main(argv):
    """Evaluate and print the table."""
    reporting.no_more_arguments(argv)
    if _CAM.value and _CRF.value:
        raise ValueError("--cam and --crf do not go together: class maps are scored as they are")
    if _CAM.value and _OUT.value:
        raise ValueError("--cam prints its scores and writes nothing: leave out --out")
    if not _SPLIT.value.strip():
        raise ValueError("--split: expected the name of a split, such as val, got an empty one")
    started = time.monotonic()
    out = _folder_of_results()
    description = described(_CHECKPOINT.value, origin=True)
    source, data = reporting.open_for_scoring(description, _DATA.value, _SPLIT.value)
    if _CAM.value:
        class_map_scores.evaluate_cam(_CHECKPOINT.value, source, tags_given=_TAGS_GIVEN.value, num_parts=_PARTS.value)
    else:
        reporting.evaluate_run(
            _CHECKPOINT.value, source, crf=_CRF.value, tags_given=_TAGS_GIVEN.value, started=started, data=data,
            num_parts=_PARTS.value, out=out,
        )


def _folder_of_results():
    """Where results are written, None for the folder of the run; a model has none, and does not know where photographs are."""
    if not at_home(_CHECKPOINT.value).is_dir():
        data = described(_CHECKPOINT.value, origin=True)["training"]["data"]  # it is a model, or there is an error
        given = {"data": _DATA.value or data["kind"] == "textures", "out": _OUT.value or _CAM.value}
        missing = [name for name, value in given.items() if not value]
        if missing:
            raise ValueError(f"--checkpoint={_CHECKPOINT.value} is a model, which has no folder of photographs or results: give "
                             + " and ".join(f"--{name}=FOLDER" for name in missing))  # fmt: skip
    if _OUT.value is None:
        return None
    out = reporting.run_folder(_OUT.value, "out")

    def make():
        reporting.folder_to_write(_OUT.value)
        with naming(out):
            out.mkdir(parents=True, exist_ok=True)

    processes.first_decides(make)
    return out


if __name__ == "__main__":
    flags.mark_flag_as_required("checkpoint")
    reporting.run(main)
