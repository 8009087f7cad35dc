"""Programs of `experiments` that start in a moment: forks of a process that has imported what they need, and no device."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

from programs import ROOT, flags_for

_PARENT = """
    import json, os, runpy, sys
    sys.path.insert(0, os.getcwd())
    import flax, grain, jax, jinja2, ml_collections, optax, orbax.checkpoint, PIL.Image, safetensors
    from ml_collections import config_flags
    import lcrf_jax.predict.evaluation, lcrf_jax.train.fit, lcrf_jax.train.preparation
    import experiments.predictions, experiments.run_report, experiments.configs.base

    def child(program, arguments, environment, told):
        stream = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1), os.dup2(stream, 2)
        os.environ.update(environment)  # XLA reads its flags with the first device
        sys.argv = [f"experiments/{program}.py", *arguments]
        runpy.run_module(f"experiments.{program}", run_name="__main__", alter_sys=True)

    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, list):
            answer = os.fork()
            if not answer:
                os.close(0)
                child(*order)
                os._exit(0)
        else:
            found, status = os.waitpid(order["of"], 0 if order["wait"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
        print(json.dumps(answer), flush=True)
"""


class Forked(NamedTuple):
    """A program that runs, or has ended."""

    parent: "Parent"
    pid: int
    told: pathlib.Path

    def poll(self):
        """Its exit code, or None."""
        return self.parent.code_of(self.pid, wait=False)

    def finish(self, timeout=600):
        """Its exit code when it has ended by itself; what does not end is killed."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"{self.told.name} did not end within {timeout} s: {self.text}")
            time.sleep(0.01)
        return code

    def kill(self):
        """Its exit code after SIGKILL, which comes too late for one that has ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.parent.code_of(self.pid, wait=True)

    @property
    def text(self):
        """What it has told so far, on both streams."""
        return self.told.read_text()


class Parent:
    """The process whose forks are the programs; a context manager."""

    def __init__(self, folder):
        self._folder, self._codes = folder, {}
        self._process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(_PARENT)], cwd=ROOT, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip

    def start(self, program, *arguments, cache, num_devices=1, compiled_well=False):
        """`python -m experiments.PROGRAM ARGUMENTS` with a cache of its own; compiled as users have it, for long work."""
        told = self._folder / f"{program} {len(self._codes)}.txt"
        flags = f"--xla_force_host_platform_device_count={num_devices}" if compiled_well else flags_for(num_devices)
        environment = {"LCRF_JAX_CACHE": str(cache), "XLA_FLAGS": flags}
        pid = self._ask([program, [*map(str, arguments)], environment, str(told)])
        self._codes[pid] = None
        return Forked(self, pid, told)

    def code_of(self, pid, *, wait):
        if self._codes[pid] is None:
            self._codes[pid] = self._ask({"of": pid, "wait": wait})
        return self._codes[pid]

    def _ask(self, order):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [pid for pid, code in self._codes.items() if code is None]:
            Forked(self, pid, self._folder).kill()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
