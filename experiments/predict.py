r"""Write masks of photographs.

    python -m experiments.predict --checkpoint=RUN --images='photos/*.jpg' --out=masks/ [--crf]

Every mask is a palette PNG of class indices, of the size and the name of its photograph. Files that cannot be read are
listed at the end; the others are done, and the exit code is then 1.
"""

import glob
import os
import pathlib
import sys

from absl import flags

from experiments import reporting
from lcrf_jax.data.images import read_image
from lcrf_jax.inference import segment
from lcrf_jax.report import save_index_png
from lcrf_jax.runlog import Progress, say

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run.")
_IMAGES = flags.DEFINE_string("images", None, "Pattern of file names, in quotes: 'photos/*.jpg'; ** goes into folders.")
_OUT = flags.DEFINE_string("out", None, "Folder for the masks; made if it is not there.")
_CRF = flags.DEFINE_bool("crf", False, "Refine by mean field of the dense CRF on each image at its own size.")


def planned_outputs(pattern, out):
    """Pairs of photograph and mask, refusing two photographs with one mask, and masks in place of photographs."""
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = sorted(pathlib.Path(name) for name in found if os.path.isfile(name))
    if not paths:
        raise FileNotFoundError(f"--images: no file fits the pattern {pattern!r}")
    root = pathlib.Path(os.path.commonpath([path.resolve().parent for path in paths]))
    outputs, photographs = {}, {path.resolve() for path in paths}
    for path in paths:
        mask = pathlib.Path(out) / path.resolve().relative_to(root).with_suffix(".png")
        if mask.resolve() in photographs:
            raise ValueError(f"the mask of {path} would be written over the photograph {mask}: give another --out")
        if mask in outputs:
            raise ValueError(
                f"{outputs[mask]} and {path} would both be written to {mask}: predict them one pattern at a time"
            )
        outputs[mask] = path
    return [(path, mask) for mask, path in outputs.items()]


def write_mask(path, labels):
    """Write the PNG beside its place and rename it, so that a killed run leaves no half-written mask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_index_png(unfinished, labels)
    os.replace(unfinished, path)


def main(argv):
    """Segment every photograph."""
    reporting.no_more_arguments(argv)
    todo = planned_outputs(_IMAGES.value, _OUT.value)
    segmenter, description, _ = reporting.load_segmenter(_CHECKPOINT.value)
    say(f"{len(todo)} images; classes: " + ", ".join(f"{i} {n}" for i, n in enumerate(description["class_names"])))
    failures = []
    with Progress(len(todo), title="predict") as bar:
        for path, mask in todo:
            try:
                labels = segment(segmenter, read_image(path), crf=_CRF.value).labels
            except (ValueError, OSError) as error:
                failures.append(f"{path}: {error}")
            else:
                write_mask(mask, labels)
            bar.update(num_images=1)
    say(f"{len(todo) - len(failures)} masks in {_OUT.value}")
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} of {len(todo)} images could not be done:", *failures]))


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "images", "out"])
    reporting.run(main)
