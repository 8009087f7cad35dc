"""What benchmarks share: timings, peak memory, jobs in processes of their own, tables, the machine's description."""

import ctypes
import gc
import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import textwrap
import time
from importlib import metadata
from typing import NamedTuple

import jax

from lcrf_jax.machine import processes
from lcrf_jax.machine.progress import say

# Where Python finds this package; where it is installed, that is anywhere.
ROOT = pathlib.Path(__file__).resolve().parent.parent if __package__ == "experiments" else None
MEGABYTE = 1e6
_LEAST_REPETITIONS = 3
_STATUS = pathlib.Path("/proc/self/status")


class Timing(NamedTuple):
    """Milliseconds of a call, over its repetitions: median and least wall time, median CPU time of all threads."""

    median: float
    least: float
    cpu: float

    def __str__(self):
        return f"{_short(self.median)} ({_short(self.least)}) {_short(self.cpu)}"


def timings(functions, repetitions, budget=1.5):
    """A `Timing` of each function, called in turns: A B A B. Each was called before, and returns when it is done.

    Repetitions end early, but not before the third, where they take longer than a budget of seconds a function.
    """
    wall, cpu = [[] for _ in functions], [[] for _ in functions]
    started = time.perf_counter()
    for number in range(repetitions):
        if number >= _LEAST_REPETITIONS and time.perf_counter() - started > budget * len(functions):
            break
        for function, walls, cpus in zip(functions, wall, cpu, strict=True):
            before, used = time.perf_counter(), time.process_time()
            function()
            walls.append(1e3 * (time.perf_counter() - before))
            cpus.append(1e3 * (time.process_time() - used))
    return [Timing(statistics.median(w), min(w), statistics.median(c)) for w, c in zip(wall, cpu, strict=True)]


def compiled(function, *arguments):
    """(the function compiled for these arguments, seconds of tracing and compiling)."""
    started = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - started


def with_peak(function):
    """(result of a call, megabytes by which the process grew at most meanwhile, or the device's peak so far)."""
    gc.collect()
    _return_free_memory()
    before = _memory("VmRSS")
    result = function()
    device = jax.local_devices()[0].memory_stats() or {}
    peak = device.get("peak_bytes_in_use", _memory("VmHWM") - before)
    return result, max(peak, 0) / MEGABYTE


def _return_free_memory():
    """Give freed memory back and forget the peak so far; where the system cannot, peaks are upper bounds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        pass


def _memory(entry):
    """Bytes of resident memory now (VmRSS) or at its peak (VmHWM)."""
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        return 1024 * int(lines[entry].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return 0 if entry == "VmRSS" else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class CompilationCount:
    """Counts the programs that JAX compiles from its making on."""

    def __init__(self):
        self.number = 0
        jax.monitoring.register_event_duration_secs_listener(self._event)

    def _event(self, event, _, **__):
        self.number += event == "/jax/core/compile/backend_compile_duration"


def in_fresh_process(module, job, arguments):
    """The result of a job of a module beside this one, run by a process of its own: memory and compilations are those of the job.

    The module is run as a program that hands its table of jobs to `serve`.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}"]
    text = json.dumps([job, arguments])
    ended = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = "\n".join(ended.stderr.rstrip().splitlines()[-12:])
        raise ChildProcessError(f"measuring {job} with {arguments} failed (exit code {ended.returncode}):\n{last}")
    return json.loads(ended.stdout.splitlines()[-1])


def serve(jobs):
    """Run the job that standard input names and print its result, as `in_fresh_process` expects it."""
    job, arguments = json.load(sys.stdin)
    print(json.dumps(jobs[job](**arguments)))


class Table:
    """A table that is printed row by row while it grows, and can be had as Markdown in the end."""

    def __init__(self, columns):
        self._columns, self._rows = columns, []
        self._widths = [max(len(name), width) for name, width in columns.items()]
        say(self._line(columns))

    def row(self, *cells):
        """Print and keep a row; None is shown as a dash."""
        cells = ["-" if cell is None else str(cell) for cell in cells]
        self._rows.append(cells)
        say(self._line(cells))

    def _line(self, cells):
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True)).rstrip()

    def __str__(self):
        lines = [list(self._columns), ["---:"] * len(self._columns), *self._rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


class Report:
    """What a benchmark prints, kept for a file."""

    def __init__(self):
        self._parts = []

    def say(self, text):
        """Print and keep a paragraph; lines that are not indented are wrapped on the screen."""
        lines = [line if line.startswith("    ") else textwrap.fill(line, 118) for line in text.split("\n")]
        say("\n".join(lines if not self._parts else ["", *lines]))
        self._parts.append(text)

    def table(self, title, columns):
        """A new `Table` under a title; columns is a dict from a column's name to its least width."""
        self.say(title)
        say("")
        self._parts.append(Table(columns))
        return self._parts[-1]

    def write(self, path):
        """Write everything so far as Markdown."""
        path.write_text("\n\n".join(str(part) for part in self._parts) + "\n", encoding="utf-8")


def number(value, digits=3):
    """A number in three digits, or the dash of a table."""
    return None if value is None else _short(value, digits)


def per_cent(share):
    """A share in per cent, in three digits."""
    return None if share is None else _short(100 * share)


def _short(value, digits=3):
    """A number in so many digits, without an exponent."""
    magnitude = abs(value)
    places = max(digits - 1, 0)
    while places and magnitude >= 10 ** (digits - places):
        places -= 1
    return f"{value:.{places}f}"


def machine():
    """One line: processor, cores, Python, JAX, NumPy, the device and the date."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "numpy"))
    device = jax.devices()[0]
    on = "" if device.platform == "cpu" else f", on {device.device_kind}"
    python = platform.python_version()
    return f"{_processor()}, {processes.usable_cores()} cores, Python {python}, {versions}{on}, {time.strftime('%Y-%m-%d')}"


def _processor():
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
