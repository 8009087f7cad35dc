r"""Write masks of photographs.

    python -m experiments.predict --checkpoint=RUN --images='photos/*.jpg' --out=masks/ [--crf]

Every mask is a palette PNG of class indices, of the size and the name of its photograph. Files that cannot be read are
listed at the end; the others are done, and the exit code is then 1.

A mask that is there, is newer than its photograph and was written with the same checkpoint and settings, is not made again:
the same command goes on where it was interrupted. Several processes share the photographs; they need not know of each
other, only how many they are: --num_processes=4 --process_id=0 and so on, or --distributed on a cluster that JAX knows.
"""

import concurrent.futures
import contextlib
import glob
import json
import os
import pathlib
import sys

import jax
from absl import flags

from experiments import reporting
from lcrf_jax import processes
from lcrf_jax.checkpoints import params_digest
from lcrf_jax.data.images import read_image
from lcrf_jax.inference import segment_batch
from lcrf_jax.locks import own_folder
from lcrf_jax.report import save_index_png
from lcrf_jax.runlog import Progress, say

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run.")
_IMAGES = flags.DEFINE_string("images", None, "Pattern of file names, in quotes: 'photos/*.jpg'; ** goes into folders.")
_OUT = flags.DEFINE_string("out", None, "Folder for the masks; made if it is not there.")
_CRF = flags.DEFINE_bool("crf", False, "Refine by mean field of the dense CRF on each image at its own size.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Make all masks anew, whatever is in --out.")
reporting.define_process_flags()

SETTINGS_FILE = "predictions.json"
BATCH_SIZE = 8


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


def own_share(items):
    """The items that this process does."""
    number, count = flags.FLAGS.process_id, flags.FLAGS.num_processes
    if number is None and count is None:
        return [items[i] for i in processes.share(len(items))]
    return items[number::count]


def join():
    """Processes that were given numbers do without each other: one may die and be started again."""
    number, count = flags.FLAGS.process_id, flags.FLAGS.num_processes
    if number is None and count is None:
        reporting.join_processes()
    elif number is None or count is None or number >= count:
        raise ValueError(f"--process_id: expected 0 to --num_processes - 1, got {number} of {count}")


def remaining(todo, out, settings):
    """The photographs that have no mask yet; refuses to mix masks of different settings."""
    path = out / SETTINGS_FILE
    if not _OVERWRITE.value and not path.exists() and any(mask.exists() for _, mask in todo):
        raise ValueError(f"{out} holds masks of unknown origin; give another --out, or --overwrite to replace them")
    if not path.exists() or _OVERWRITE.value and _stored(path) != settings:
        _store(path, settings)
    before = _stored(path)
    if before != settings:
        changed = ", ".join(f"{name} {before.get(name)!r} and not {settings[name]!r}"
                            for name in settings if before.get(name) != settings[name])  # fmt: skip
        raise ValueError(f"{out} holds masks made with {changed}; give another --out, or --overwrite to replace them")
    if _OVERWRITE.value:
        return todo
    since = path.stat().st_mtime  # older masks are of the settings before
    return [(photo, mask) for photo, mask in todo
            if not mask.exists() or mask.stat().st_mtime < max(since, photo.stat().st_mtime)]  # fmt: skip


def _stored(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _store(path, settings):
    """Write the settings, unless another process was faster; with --overwrite in any case."""
    with own_folder(path.parent, ".unfinished-") as unfinished:
        new = unfinished / path.name
        new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        if _OVERWRITE.value:
            os.replace(new, path)
            return
        with contextlib.suppress(FileExistsError):
            os.link(new, path)


def write_mask(path, labels, unfinished):
    """Write the PNG elsewhere and rename it, so that a killed run leaves no half-written mask."""
    save_index_png(unfinished / path.name, labels)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished / path.name, path)


def read_images(paths):
    """(images that can be read, {path: error} of the others)."""
    images, failures = {}, {}
    for path in paths:
        try:
            images[path] = read_image(path)
        except (ValueError, OSError) as error:
            failures[path] = str(error)
    return images, failures


def batches(todo, size):
    """(photographs with their masks, images, failures) of each batch; the next one is read meanwhile."""
    parts = [dict(todo[start : start + size]) for start in range(0, len(todo), size)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(read_images, parts[0]) if parts else None
        for number, part in enumerate(parts):
            images, failures = ahead.result()
            ahead = pool.submit(read_images, parts[number + 1]) if number + 1 < len(parts) else None
            yield part, images, failures


def main(argv):
    """Segment every photograph of this process' share."""
    reporting.no_more_arguments(argv)
    out = pathlib.Path(_OUT.value)
    planned = planned_outputs(_IMAGES.value, out)
    share = own_share(planned)
    segmenter, description, params = reporting.load_segmenter(_CHECKPOINT.value)
    settings = {"params_sha256": params_digest(params), "class_names": description["class_names"], "crf": _CRF.value}
    todo = remaining(share, out, settings)
    say(f"{len(planned)} images; classes: " + ", ".join(f"{i} {n}" for i, n in enumerate(description["class_names"])))
    if len(share) < len(planned):
        say(f"{len(share)} of them are the share of this process")
    if len(todo) < len(share):
        say(f"{len(share) - len(todo)} of these were done before")
    failures, batch_size = {}, BATCH_SIZE * jax.local_device_count()
    with Progress(len(todo), title="predict") as bar, own_folder(out, ".unfinished-") as unfinished:
        for masks, images, unreadable in batches(todo, batch_size):
            failures |= unreadable
            if images:
                results = segment_batch(segmenter, list(images.values()), crf=_CRF.value, batch_size=batch_size)
                for path, result in zip(images, results, strict=True):
                    write_mask(masks[path], result.labels, unfinished)
            bar.update(num_images=len(masks), num_steps=len(masks))
    say(f"{len(share) - len(failures)} masks in {out}")
    if failures:
        listed = [f"{path}: {error}" for path, error in failures.items()]
        sys.exit("\n".join([f"error: {len(failures)} of {len(share)} images could not be done:", *listed]))


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "images", "out"])
    reporting.run(main, join=join)
