r"""Write masks of photographs.

    python -m experiments.predict --checkpoint=RUN --images=photos/ --out=masks/ [--crf]

--images takes files, folders with all photographs in them, and patterns in quotes ('photos/**/*.jpg'), and may be given
several times; of a folder, masks that it holds beside its tag file and what this program has written are left out. It takes
shards that experiments.shards has written as well, and tables in Parquet with a column of paths or bytes of photographs.
--list=FILE chooses among them, one a line. Any size and colour mode will do; photographs are turned as their EXIF data say. In
--out are then

    NAME.png                   the mask: a palette PNG of class indices, of the size and the name of its photograph
    overlays/NAME.jpg          the photograph with the mask laid over it (--nooverlays leaves it out)
    probabilities/NAME.npz     with --probabilities: of every class, at the size that the photograph was worked on
    predictions.jsonl          a line for each photograph: classes with their share of the area, and the confidence

Files that cannot be read are listed at the end; the others are done, and the exit code is then 1.

The network sees the whole photograph, and one with a side above --max_side (640 pixels unless the run says otherwise) is
refined at that size and its mask enlarged. --tile=SIDE is for pictures with objects that are small in them: larger ones are
cut into overlapping tiles, each of them segmented as a photograph of its own. --tags=FILE restricts each photograph to the
classes that a tag file names, and what is written then says that tags were used.

A mask that is there, is newer than its photograph and was written with the same checkpoint and settings, is not made again:
the same command goes on where it was interrupted. Several processes share the photographs; they need not know of each
other, only how many they are: --num_processes=4 --process_id=0 and so on, or --distributed on a cluster that JAX knows.
On a host with GPUs those that SLURM or mpirun has started take one each; by hand, start each with its CUDA_VISIBLE_DEVICES.
"""

import contextlib
import functools
import itertools
import os
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags

from lcrf_jax.data.files.tags import read_text
from lcrf_jax.data.pipeline import one_ahead
from lcrf_jax.machine import processes
from lcrf_jax.machine.gpus import take_own_gpus
from lcrf_jax.machine.locks import own_folder
from lcrf_jax.machine.progress import VARIABLE, Progress, say
from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.pretrained import file_digest
from lcrf_jax.predict.model import described, trained
from lcrf_jax.predict.resizing import nearest_side
from lcrf_jax.predict.segmenter import image_workers
from lcrf_jax.runfolder.digests import params_digest

from . import prediction_photographs, prediction_plan, prediction_urls, predictions, ray_predictions, reporting

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, a file of a model, or the name of one that is shipped.")
_IMAGES = flags.DEFINE_multi_string("images", None, "File, folder, or pattern in quotes; may be given several times.")
_LIST = flags.DEFINE_string("list", None, "Text file: only these of --images, one a line.")
_OUT = flags.DEFINE_string("out", None, "Folder for the masks; made if it is not there.")
_CRF = flags.DEFINE_bool("crf", False, "Refine by mean field of the dense CRF on each image.")
_OVERLAYS = flags.DEFINE_bool("overlays", True, "Write the photographs with their masks in colour.")
_PROBABILITIES = flags.DEFINE_bool("probabilities", False, "Write the probabilities of all classes.")
_TAGS = flags.DEFINE_string("tags", None, "Tag file: only these classes may occur in each photograph.")
_FLIPS = flags.DEFINE_bool("flips", None, "Average over the photograph and its mirror image; by default as in training.")
_SCALES = flags.DEFINE_list("scales", None, "Average over input sizes: factors of the run's own, such as 0.75,1,1.25.")
_MAX_SIDE = flags.DEFINE_integer("max_side", None, "Larger photographs are refined at this longer side.", lower_bound=32)
_TILE = flags.DEFINE_integer("tile", None, "Segment larger pictures in tiles of this side.", lower_bound=64)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Make all masks anew, whatever is in --out.")
_ENGINE = flags.DEFINE_enum("engine", "local", ["local", "ray"], "What does the work: this process, or Ray on a machine or a cluster.")
_WORKERS = flags.DEFINE_integer("workers", None, "With --engine=ray: how many; by default one a GPU, or one for --cores.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", 1, "With --engine=ray and no GPU: cores of each worker.", lower_bound=1)
reporting.define_process_flags()

BATCH_SIZE = 8
_URLS = "--images and --out: URLs are read and written with --engine=ray; else give folders of this machine"


def own_process():
    """(number, count) of this process among those that share the photographs."""
    number, count = flags.FLAGS.process_id, flags.FLAGS.num_processes
    return (jax.process_index(), jax.process_count()) if number is None and count is None else (number, count)


def join():
    """Processes that were given numbers do without each other: one may die and be started again."""
    number, count = flags.FLAGS.process_id, flags.FLAGS.num_processes
    if _ENGINE.value == "ray":
        if flags.FLAGS.distributed or (number, count) != (None, None):
            raise ValueError("--engine=ray shares the photographs by itself: leave out --distributed, --num_processes and --process_id")
        ray_predictions.check_installed()
        jax.config.update("jax_platforms", "cpu")  # the GPUs are for the workers
    elif number is None and count is None:
        reporting.join_processes()
    elif number is None or count is None or number >= count:
        raise ValueError(f"--process_id: expected 0 to --num_processes - 1, got {number} of {count}")
    else:
        take_own_gpus(number, count)


def own_share(items):
    """The items that this process does."""
    number, count = flags.FLAGS.process_id, flags.FLAGS.num_processes
    if number is None and count is None:
        return [items[i] for i in processes.share(len(items))]
    return items[number::count]


def changed_inference(inference):
    """The inference settings of a run, changed by the flags."""
    changed = dict(inference)
    if _FLIPS.value is not None:
        changed["mirror"] = _FLIPS.value
    if _MAX_SIDE.value is not None:
        changed["max_side"] = _MAX_SIDE.value
    if _SCALES.value is not None:
        try:
            factors = [float(factor) for factor in _SCALES.value]
        except ValueError:
            factors = []
        if not factors or not all(0.1 <= factor <= 10 for factor in factors):
            raise ValueError(f"--scales: expected factors from 0.1 to 10, got {','.join(_SCALES.value)!r}")
        step = build_network(described(_CHECKPOINT.value)["network"]).size_step
        sizes = [nearest_side(factor * size, step) for factor in factors for size in inference["input_sizes"]]
        changed["input_sizes"] = list(dict.fromkeys(sizes))
    return changed


def main(argv):
    """Segment every photograph of this process' share."""
    reporting.no_more_arguments(argv)
    if _TILE.value is not None and _PROBABILITIES.value:
        raise ValueError("--probabilities and --tile do not go together: those of tiles are not kept")
    if _ENGINE.value != "ray" and any(map(prediction_urls.is_url, [*_IMAGES.value, _OUT.value])):
        raise ValueError(_URLS)
    started, out = time.monotonic(), _checked_flags()
    planned = _planned(out)
    if _LIST.value is not None:
        planned = prediction_plan.chosen(planned, _LIST.value)
    share = own_share(planned)
    if _ENGINE.value == "ray":  # whose workers have the network
        description, params = trained(_CHECKPOINT.value)
    else:
        segmenter, description, params = reporting.load_segmenter(_CHECKPOINT.value, change_inference=changed_inference)
    names = description["class_names"]
    settings = {"params_sha256": params_digest(params), "class_names": names, "crf": _CRF.value,
                "inference": changed_inference(description["inference"]), "tile": _TILE.value,
                "tags_sha256": _digest(_TAGS.value)}  # fmt: skip
    tags = None if _TAGS.value is None else predictions.known_tags(_TAGS.value, [photo for photo, _ in planned], names)
    todo = predictions.remaining(share, out, settings, _OVERWRITE.value)
    say(f"{len(planned)} images; classes: " + ", ".join(f"{i} {n}" for i, n in enumerate(names)))
    if tags is not None:
        say(f"the tags of {_TAGS.value} are used: no other class can occur in a photograph")
    if len(share) < len(planned):
        say(f"{len(share)} of them are the share of this process")
    if len(todo) < len(share):
        say(f"{len(share) - len(todo)} of these were done before")
    if _ENGINE.value == "ray":
        failures = _predict_by_ray(todo, out, description, params, tags)
    else:
        failures = _predict(todo, out, segmenter, names, tags)
    seconds = time.monotonic() - started
    say(f"{len(share) - len(failures)} masks in {out}")
    if len(todo) > len(failures):
        done = len(todo) - len(failures)
        say(f"{done} of them made in {seconds:.1f} s, start and compilation included: {done / seconds:.2f} images/s")
    if failures:
        listed = [f"{path}: {error}" for path, error in failures.items()]
        sys.exit("\n".join([f"error: {len(failures)} of {len(share)} images could not be done:", *listed]))


def _checked_flags():
    """Where the masks go; refuses what is wrong with flags, before photographs are looked for."""
    for name in ("workers", "cores"):
        if flags.FLAGS[name].present and _ENGINE.value != "ray":
            raise ValueError(f"--{name}: it is of --engine=ray alone; several processes share the photographs by --num_processes and --process_id")
    for name, path in (("list", _LIST.value), ("tags", _TAGS.value)):
        if path is not None and not path.strip():
            raise ValueError(f"--{name}: expected a file, got an empty name; is a variable not set?")
        if path is not None:
            read_text(path)  # it says what is wrong
    if "://" in _OUT.value:
        return prediction_urls.place(_OUT.value)
    return reporting.folder_to_write(_OUT.value)


def _planned(out):
    """Pairs of photograph and Outputs, on disks or at URLs."""
    wanted = {"overlays": _OVERLAYS.value, "probabilities": _PROBABILITIES.value}
    images = prediction_photographs.expanded(_IMAGES.value)
    listed = {pattern: prediction_photographs.urls_in(pattern) for pattern in images}
    urls = [prediction_urls.is_url(pattern) or bool(listed[pattern]) for pattern in images]
    if any(urls) and not all(urls):
        raise ValueError("--images: expected folders of this machine or URLs, got both; predict them one after the other")
    if any(urls) and _ENGINE.value != "ray":
        raise ValueError(_URLS)
    training = described(_CHECKPOINT.value)["training"]
    if any(urls):
        named = functools.partial(prediction_plan.outputs_for, **wanted)
        patterns = [pattern for pattern in images if not listed[pattern]]
        return prediction_urls.planned_at_urls(patterns, out, named, itertools.chain(*listed.values()))
    with tempfile.TemporaryDirectory() if prediction_urls.is_url(out) else contextlib.nullcontext(out) as folder:
        patterns = [str(prediction_urls.place(name)) if name.startswith("file://") else name for name in images]
        planned = prediction_plan.planned_outputs(patterns, pathlib.Path(folder), data=training.get("data", {}), **wanted)
    if not prediction_urls.is_url(out):
        return planned
    return [(photo, prediction_plan.outputs_for(out, outputs.mask.relative_to(folder), **wanted)) for photo, outputs in planned]


def _digest(path):
    return None if path is None else file_digest(path)


def _predict(todo, out, segmenter, names, tags):
    """Make the outputs of all photographs that can be read; {path: error} of the others."""
    batch_size, facts = BATCH_SIZE * jax.local_device_count(), _facts(tags)
    todo, failures = _with_tags(todo, tags)
    background = 0
    with (Progress(len(todo), title="predict") as bar, own_folder(out, ".unfinished-") as unfinished,
          predictions.Records(out, own_process(), todo) as records, image_workers() as workers):  # fmt: skip

        def begin(batch):
            given = None if tags is None else [tags[photo] for photo in batch.images]
            return predictions.begin_labelling(
                segmenter, list(batch.images.values()), given, workers, crf=_CRF.value, tile=_TILE.value, batch_size=batch_size
            )

        if todo:
            bar.waiting("compiling")
        for batch, results in one_ahead(predictions.batches(todo, batch_size, predictions.settings_since(out)), begin):
            failures |= batch.failures
            for (photo, image), (labels, confidence, log_probs) in zip(batch.images.items(), results):
                outputs = batch.outputs[photo]
                records.write(predictions.record_of(photo, outputs.mask.relative_to(out), labels, confidence, names, **facts))
                problem = predictions.write_outputs(outputs, unfinished, image, labels, log_probs, np.array(names), batch.read[photo])
                failures |= {photo: problem} if problem else {}
                background += not labels.any()
            bar.update(num_images=len(batch.outputs), num_steps=len(batch.outputs))
    if background:
        say(f"masks of background alone: {background} of {len(todo)}"
            + ("; docs/faq.md has what to do where that is wrong" if 2 * background > len(todo) else ""))  # fmt: skip
    return failures


def _predict_by_ray(todo, out, description, params, tags):
    """The same by Ray."""
    todo, failures = _with_tags(todo, tags)
    if not todo:
        return failures
    inference = changed_inference(description["inference"])
    job = ray_predictions.Job(
        str(out if prediction_urls.is_url(out) else out.absolute()), tuple(description["class_names"]), _CRF.value, _TILE.value,
        _OVERLAYS.value, _PROBABILITIES.value, _facts(tags), BATCH_SIZE,
    )  # fmt: skip
    return failures | ray_predictions.label_by_ray(
        ray_predictions.rows_of(todo, out, tags), ({**description, "inference": inference}, jax.tree.map(np.asarray, params)), job,
        again=sorted(predictions.without_masks(todo, out)),  # masks that are there keep their rows until they are made anew
        workers=_WORKERS.value, cores=_CORES.value, quiet=os.environ.get(VARIABLE) == "quiet",
    )  # fmt: skip


def _facts(tags):
    return {"refined": _CRF.value, "tags_used": tags is not None}


def _with_tags(todo, tags):
    """(those of the photographs that have tags, {path: error} of the others) where tags are used."""
    if tags is None:
        return todo, {}
    known = [(photo, outputs) for photo, outputs in todo if photo in tags]
    return known, {photo: f"has no row in {_TAGS.value}; add one" for photo, _ in todo if photo not in tags}


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "images", "out"])
    reporting.run(main, join=join)
