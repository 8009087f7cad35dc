"""Programs of `experiments` run within this process, which has JAX loaded already, and a run that they have finished."""

import contextlib
import copy
import fcntl
import io
import json
import os
import pathlib
import re
import runpy
import signal
import sys
from typing import NamedTuple

import grain  # noqa: F401 - it defines flags, which must outlive the program that needs them first
import jax
import pytest
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def last_line(self):
        return self.out.rstrip("\n").rsplit("\n", 1)[-1]


def run(program, *arguments):
    """`python -m experiments.PROGRAM ARGUMENTS` within this process."""
    app.define_help_flags()
    before, out, err, code = set(flags.FLAGS), io.StringIO(), io.StringIO(), 0
    terminating = signal.getsignal(signal.SIGTERM)
    command = [f"experiments/{program}.py", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        patch.chdir(ROOT)
        try:
            runpy.run_module(f"experiments.{program}", run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            err.write("" if end.code is None or isinstance(end.code, int) else f"{end.code}\n")
        finally:
            for name in set(flags.FLAGS) - before:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()
            signal.signal(signal.SIGTERM, terminating)
    return Ended(code, out.getvalue(), err.getvalue())


def run_on_one_device(program, *arguments):
    """`run` where one device predicts: what refines an image is compiled for each device that takes part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        return run(program, *arguments)


def with_entry(tree, entry, value):
    """A copy of nested dicts with another value of the entry of a dotted name."""
    tree = copy.deepcopy(tree)
    *groups, name = entry.split(".")
    at = tree
    for group in groups:
        at = at[group]
    at[name] = value
    return tree


def assert_refused(ended, message):
    assert ended.code == 1, ended
    assert re.search(message, ended.err), ended.err
    assert "Traceback" not in ended.err


CLASSES = ("background", "ring", "cross", "star", "stripes", "chequer", "dots")
TINY = "--config=experiments/configs/tiny.py"
SHORT = ("--config.network.taps=('head', 's16')", "--config.network.widths=(16, 12)", "--config.class_maps.grid=6",
         "--config.epochs=(2,)", "--config.rounds=1")  # as in small_runs.py, so that the same compiled functions serve both
SMALL = ("--config.data.options.num_train=24", "--config.data.options.num_val=4", *SHORT)

# A folder of photographs, with a small network.
SMALL_FOLDER = ("--config=experiments/configs/folder.py", "--config.network.backbone=small", "--config.input_size=96",
            "--config.network.taps=('head', 's16')", "--config.network.widths=(16, 12)", "--config.class_maps.grid=6",
            "--config.class_maps.extra_sizes=()", "--config.epochs=(2,)", "--config.rounds=1", "--config.batch_size=8", "--config.least_steps=0",
            "--config.inference.input_sizes=(96,)", "--config.log_every_steps=2")  # fmt: skip


def finished_run(shared):
    """(folder, how the program ended) of a run of six steps.

    It is trained once for all processes that share a folder: who comes first trains, the others wait.
    """
    folder, told = shared / "tiny run", shared / "tiny run.json"
    with (shared / "tiny run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LCRF_JAX_CACHE", str(shared / "tiny run cache"))
                ended = run("train", TINY, *SMALL, f"--workdir={folder}")
            told.write_text(json.dumps(ended))
    return folder, Ended(*json.loads(told.read_text()))


def flags_for(num_devices):
    """The flags of XLA that the tests have, but for the number of devices."""
    devices = f"--xla_force_host_platform_device_count={num_devices}"
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(devices.split("=")[0])]
    return " ".join([*others, devices])
