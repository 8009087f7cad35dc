r"""What a million photographs ask of one host: tag rows, file names, the tag classifier, confusion matrices, records in shards.

    python -m experiments.scale_measurements tags --count=1000000
    python -m experiments.scale_measurements folder --count=1000000
    python -m experiments.scale_measurements classifier --count=1000000
    python -m experiments.scale_measurements confusion --count=2000
    python -m experiments.scale_measurements shards --count=200000
    python -m experiments.scale_measurements stages

Everything is made up in a folder that is removed at the end (--folder names where; 1,000,000 rows of features take 5.2 GB). Each line
tells seconds, CPU seconds of all threads and the most memory of the process. `shards` also trains an epoch on the records, with a
small network on images of 32x32, once in one go and once killed and resumed, and compares the parameters bit by bit.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from absl import flags
from PIL import Image

import lcrf_jax
from lcrf_jax.data.example import Example, tag_vector
from lcrf_jax.data.files.tags import read_tag_file
from lcrf_jax.data.sharding import write_shards
from lcrf_jax.data.sources.listing import scan_folder
from lcrf_jax.data.sources.shards import ShardsSource
from lcrf_jax.machine.progress import say
from lcrf_jax.metrics import confusion_matrix
from lcrf_jax.nets import tag_classifier
from lcrf_jax.nets.inputs import chosen_inputs, square_image
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.digests import params_digest
from lcrf_jax.train import fit, keeping, preparation
from lcrf_jax.train.plan import resolved_plan
from lcrf_jax.train.posteriors import posteriors_of_images, settings_of_maps

from . import measuring, reporting
from .configs import folder as folder_config

_COUNT = flags.DEFINE_integer("count", 1_000_000, "Rows, photographs or records.", lower_bound=1000)
_FOLDER = flags.DEFINE_string("folder", None, "Where the made-up files lie; by default the folder for temporary files.")
CLASSES = ("background", *(f"class {letter}" for letter in "abcdefghijklmnopqrst"))
CHANNELS = 1280  # of the head of EfficientNet-Lite0
IN_A_FOLDER = 1000
BATCH = 256


@contextlib.contextmanager
def measured(what):
    """Tell what the block takes."""
    started, used = time.perf_counter(), time.process_time()
    yield
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    say(f"{what}: {time.perf_counter() - started:.1f} s, {time.process_time() - used:.1f} s CPU, most memory {most:.2f} GB, "
        f"of it {memory()['RssAnon']:.2f} GB at the end not of files")  # fmt: skip


def memory(process="self"):
    """Gigabytes of a process by kind, as the kernel counts them."""
    text = pathlib.Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    pairs = [line.split(":") for line in text.splitlines() if line.startswith(("VmRSS", "RssAnon"))]
    return {name: int(value.split()[0]) * 1024 / 1e9 for name, value in pairs}


def write_tags(path, count):
    """A tag file of made-up rows."""
    draw = np.random.default_rng(0).integers(0, 20, (count, 2))
    with path.open("w", encoding="utf-8") as file:
        file.write("image,tags\n")
        for number, (one, other) in enumerate(draw.tolist()):
            file.write(f"{photograph(number)},{CLASSES[1 + one]};{CLASSES[1 + other]}\n")


def photograph(number):
    """Path of a made-up photograph."""
    return f"photographs/{number // IN_A_FOLDER:04}/{number:07}.jpg"


def tags(folder, count):
    """The tag reader alone."""
    write_tags(folder / "tags.csv", count)
    with measured(f"tag file of {count:,} rows, {(folder / 'tags.csv').stat().st_size / 1e6:.0f} MB"):
        assert len(read_tag_file(folder / "tags.csv")) == count


def folder(folder, count):
    """Tag file and names of empty files, as every start on a plain folder goes through them."""
    write_tags(folder / "tags.csv", count)
    for number in range(count):
        path = folder / photograph(number)
        if not number % IN_A_FOLDER:
            path.parent.mkdir(parents=True)
        path.touch()
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    with measured(f"folder of {count:,} photographs, names and tags"):
        found = scan_folder(folder)
    assert len(found.images) == count and not found.problems, found.problems[:3]


def classifier(folder, count):
    """The tag classifier of features on the disk."""
    draw, block = np.random.default_rng(0), 10_000
    truth, features = draw.normal(size=(CHANNELS, len(CLASSES) - 1)) / CHANNELS**0.5, folder / "pooled.npy"
    pooled = np.lib.format.open_memmap(features, "w+", np.float32, (count, CHANNELS))
    present = np.ones((count, len(CLASSES)), bool)
    with measured(f"making {count:,} rows of {CHANNELS} features"):
        for start in range(0, count, block):
            rows = draw.standard_normal((min(block, count - start), CHANNELS), np.float32)
            pooled[start : start + block] = np.maximum(rows, 0)
            present[start : start + block, 1:] = rows @ truth + draw.normal(size=(len(rows), len(CLASSES) - 1)) > 2
    del pooled
    tag_classifier.STREAMED_ABOVE = 0.0
    pooled = np.load(features, mmap_mode="r")
    few = min(count, 50_000)
    for rows, most in ((count, 3), (few, 200)):
        with measured(f"classifier of {rows:,} rows, at most {most} steps of L-BFGS"):
            _, steps, loss = tag_classifier.fit_tag_classifier(pooled[:rows], present[:rows], l2=0.01, max_iterations=most)
        say(f"  {steps} steps, loss {loss:.4f}")


def confusion(folder, count):
    """Confusion matrices of label maps of 500x375."""
    del folder
    draw = np.random.default_rng(0)
    truth, labels = draw.integers(0, len(CLASSES), (2, 375, 500), np.uint8)
    confusion_matrix(labels, truth, len(CLASSES))
    total = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    with measured(f"confusion matrices of {count:,} photographs of 500x375, {len(CLASSES)} classes"):
        for _ in range(count):
            total += confusion_matrix(labels, truth, len(CLASSES))
    assert total.sum() == count * truth.size


class MadeUp:
    """Small JPEG files under many names: a source that has no folder."""

    class_names, split, masks, fingerprint = CLASSES, "train", False, ("made up",)

    def __init__(self, count):
        draw, self.files = np.random.default_rng(0), []
        for _ in range(500):
            file = io.BytesIO()
            pixels = draw.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).resize((32, 32)).save(file, "JPEG", quality=80)
            self.files.append(file.getvalue())
        self.names = tuple(photograph(number) for number in range(count))
        each = [tag_vector(CLASSES[1 + k : 3 + k], CLASSES) for k in range(20)]
        self.tags = np.array(each)[np.arange(count) % 20]

    def __len__(self):
        return len(self.names)

    def encoded(self, index):
        """The file of a record."""
        return self.files[index % len(self.files)]

    def __getitem__(self, index):
        image = np.asarray(Image.open(io.BytesIO(self.encoded(index))).convert("RGB"))
        return Example(self.names[index], image, self.tags[index], None)


def shards(folder, count):
    """Write records, open them, and train an epoch on them in two ways."""
    with measured(f"writing {count:,} records"):
        write_shards({"train": MadeUp(count)}, folder / "shards", shard_bytes=64_000_000)
    with measured("opening them: index, tags, sizes of the shards"):
        source = ShardsSource(folder / "shards", "train")
    draw = np.random.default_rng(1).integers(0, count, 5000)
    with measured("reading 5,000 of them in random order, decoded"):
        for at in draw.tolist():
            source[at]
    last_step = count // BATCH
    whole = _run(folder, "whole", last_step)
    _run(folder, "killed", last_step, kill_at=last_step // 2)
    _run(folder, "killed", last_step)
    one, other = (params_digest(restore_params(folder / name, "last")) for name in ("whole", "killed"))
    say(f"{last_step} steps, killed after {last_step // 2} and resumed: {'the same bits' if one == other else 'OTHER BITS'} ({one[:12]})")
    lines = [f"{share:.0%} {gb['VmRSS']:.2f} ({gb['RssAnon']:.2f})" for share, gb in whole]
    say(f"memory over the epoch in GB, in brackets what is not of files: {', '.join(lines)}")


def _run(folder, name, last_step, kill_at=None):
    """Train as a program of its own; the memory at some shares of the steps."""
    settings = {
        "method": "mil_ilp", "data.kind": "shards", "data.root": str(folder / "shards"), "data.val_split": "",
        "cache.features_gb": 0.0, "cache.directory": str(folder / "cache"), "epochs": (1,), "rounds": 1, "batch_size": BATCH,
        "input_size": 32, "views.num_views": 2, "network.taps": ("head", "s16"), "network.widths": (16, 12), "network.backbone": "small",
        "log_every_steps": 5, "save_every_steps": 100, "inference.input_sizes": (32,), "class_maps.extra_sizes": (),
    }  # fmt: skip
    path = folder / "settings.py"
    path.write_text(
        "from lcrf_jax.experiments.configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
        f"    config.data.options = base.options()\n    config.update_from_flattened_dict({settings!r})\n    return config\n",
        encoding="utf-8",
    )
    command = [sys.executable, "-m", f"{__package__}.train", f"--config={path}", f"--workdir={folder / name}", "--progress=quiet"]
    started, found = time.time(), []
    with subprocess.Popen(command, cwd=measuring.ROOT) as process:
        first = None
        while process.poll() is None:
            line = _last_line(folder / name)
            if first is None and line.get("time", 0) > started:
                first = line
                used = sum(map(int, pathlib.Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
                say(f"{name}: start to step {line['step']} in {time.time() - started:.1f} s, {used / os.sysconf('SC_CLK_TCK'):.1f} s CPU")
            share = line.get("step", 0) / last_step
            if first is not None and share >= (0.02, 0.25, 0.5, 0.75, 0.98, 2.0)[min(len(found), 5)]:
                with contextlib.suppress(OSError, KeyError):
                    found.append((share, memory(process.pid)))
            if kill_at is not None and line.get("step", 0) >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
            threading.Event().wait(0.05)
    if kill_at is None and process.returncode:
        raise ValueError(f"the training ended with {process.returncode}")
    say(f"{name}: {time.time() - started:.1f} s")
    return found


def _last_line(workdir):
    """The newest line of metrics.jsonl; empty before the first."""
    try:
        with (workdir / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2000, 0))
            return json.loads(file.read().decode().strip().rsplit("\n", 1)[-1])
    except (OSError, ValueError):
        return {}


def stages(folder, count):
    """CPU seconds and operations of what is done for each photograph, with the settings of folder.py."""
    del count
    draw, file = np.random.default_rng(0), io.BytesIO()
    photo = np.asarray(Image.fromarray(draw.integers(0, 256, (38, 50, 3), np.uint8)).resize((500, 375)))
    Image.fromarray(photo).save(file, "JPEG", quality=90)
    _each("decode 500x375 and resize", lambda: square_image(np.asarray(Image.open(io.BytesIO(file.getvalue()))), 320), 20, 1)
    config = folder_config.get_config()
    config.data.kind, config.data.options, config.data.val_split = "textures", {"num_train": 32}, ""
    config.cache.directory = str(folder)
    config.method, config.inference.prior_weight = "mil_ilp", 0.0  # nothing is fitted
    prepared = preparation.prepare(config.to_dict())
    plan, variables = prepared.plan, prepared.variables
    for size in (320, 448):
        images, options = np.zeros((16, size, size, 3), np.uint8), {"network": plan.network, "guide_stride": None, "taps": plan.network.taps}
        lowered = chosen_inputs.lower(variables, images, **options)
        program = lowered.compile()
        _each(f"backbone at {size}", lambda: jax.block_until_ready(program(variables, images)), 3, 16)  # noqa: B023
        say(f"  {lowered.cost_analysis()['flops'] / 16e9:.2f} GFLOP, {sum(keeping.view_bytes(plan, variables).values()) / 1e6:.2f} MB of features at 320")
    step, state, *arguments = fit.first_step(prepared)
    lowered = step.lower(state, *arguments)
    program, box = lowered.compile(), [state]

    def stepped():
        box[0], metrics = program(box[0], *arguments)
        jax.block_until_ready(metrics)

    _each("train step of mil_ilp without its backbone, features kept", stepped, 3, config.batch_size)
    say(f"  {lowered.cost_analysis()['flops'] / config.batch_size / 1e9:.2f} GFLOP")
    given, wide = resolved_plan(folder_config.get_config().to_dict(), CLASSES, np.ones((32, 21), bool)), np.ones((32, 21), bool)
    grid = given.grid
    maps = {"class_maps": draw.random((32, grid, grid, 20), np.float32), "peaks": np.ones((32, 20), np.float32),
            "objectness": draw.random((32, grid, grid), np.float32)}  # fmt: skip
    squares = np.repeat(square_image(photo, 320)[None], 32, 0)
    weights = settings_of_maps(given.config)
    call = functools.partial(posteriors_of_images, given.config, weights, given.network.stride, squares, wide, maps)
    _each(f"posteriors of 21 classes on {grid}x{grid} cells", lambda: jax.block_until_ready(call()), 2, 32)
    model = lcrf_jax.load("animals")
    _each("labels of 500x375, 7 classes, without refinement", functools.partial(model.segment, photo, crf=False), 3, 1)


def _each(what, call, repetitions, of):
    """CPU milliseconds of a call, the least of some, after one that compiles."""
    call()
    taken = []
    for _ in range(repetitions):
        started, used = time.perf_counter(), time.process_time()
        call()
        taken.append((time.process_time() - used, time.perf_counter() - started))
    cpu, wall = min(taken)
    say(f"{what}: {1e3 * cpu / of:.1f} ms CPU a photograph ({1e3 * wall / of:.1f} ms)")


MEASUREMENTS = {function.__name__: function for function in (tags, folder, classifier, confusion, shards, stages)}


def main(argv):
    """Measure what is named."""
    if len(argv) != 2 or argv[1] not in MEASUREMENTS:
        raise ValueError(f"expected one of {', '.join(MEASUREMENTS)}, got {' '.join(argv[1:]) or 'nothing'}")
    say(f"Machine: {measuring.machine()}.")
    with tempfile.TemporaryDirectory(dir=_FOLDER.value) as made:
        MEASUREMENTS[argv[1]](pathlib.Path(made), _COUNT.value)


if __name__ == "__main__":
    reporting.run(main, keep_compiled=False)
