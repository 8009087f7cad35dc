"""What `experiments.bench device` shares: the time that is left, rows, and the two files that it writes."""

import json
import math
import os
import pathlib
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple, Self

import jax

from . import measuring

VERSIONS = ("jax", "jaxlib", "numpy", "flax", "optax", "lcrf_jax")
# Environment variables that change what a device computes or how fast.
SETTINGS = ("XLA_FLAGS", "JAX_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TPU_", "NVIDIA_TF32_OVERRIDE")
EQUAL, DIFFER = "bits equal", "bits differ"


class Budget:
    """Seconds that a program may take, of which work of a known cost asks whether it still fits.

    Costs are guesses of seconds on two CPU cores. What finished work took beside its guess corrects the guesses to come.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter, already: float = 0.0):
        self._clock, self._started = clock, clock() - already
        self._last = seconds - min(5.0, seconds / 10)  # the files have to be written, and a guess is a guess
        self._guessed = self._taken = 0.0

    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._started

    def factor(self) -> float:
        """By how much the work took longer than guessed so far; 1 at the beginning."""
        return min(max(self._taken / self._guessed, 0.2), 10.0) if self._guessed else 1.0

    def fits(self, cost: float, factor: float | None = None) -> bool:
        """Whether work of this cost can still be done, its guess corrected by the factor of all work or a given one."""
        return self.spent() + cost * (self.factor() if factor is None else factor) <= self._last

    def done(self, cost: float, seconds: float) -> None:
        """Tell what work of a cost took."""
        self._guessed += cost
        self._taken += seconds


def process_age() -> float:
    """Seconds since this process was started: loading the libraries takes some of them; 0 where Linux does not tell."""
    try:
        started = pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]
        uptime = pathlib.Path("/proc/uptime").read_text().split()[0]
        return max(float(uptime) - float(started) / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, IndexError):
        return 0.0


class Part(NamedTuple):
    """One number that a check compares.

    Attributes:
      name: what it is, after the name of the check.
      error: largest difference from the reference as a share of the largest value of it; infinite where one is not finite;
        None where the device is its own reference.
      tolerance: of the error.
      same: whether a second run of the compiled program gave the same bits.
      reference: what it was compared with.
    """

    name: str
    error: float | None
    tolerance: float
    same: bool
    reference: str


class Check(NamedTuple):
    """Its name, its cost in seconds on two CPU cores, and a function that gives its parts or raises."""

    name: str
    cost: float
    parts: Callable[[], list[Part]]


class Row(NamedTuple):
    """What a check came to: a part of it, or an error."""

    name: str
    error: float | None
    tolerance: float | None
    again: str | None
    reference: str | None
    passed: bool
    seconds: float
    message: str


def rows_of(check: Check, platform_name: str, clock: Callable[[], float] = time.perf_counter) -> list[Row]:
    """The rows of a check; one that raises is a failed row with the first line of its error.

    Different bits of a second run are a fault on a CPU alone: elsewhere nobody promises the same.
    """
    started = clock()
    try:
        parts = check.parts()
    except Exception as error:  # noqa: BLE001 - of any kind: the other checks go on
        return [Row(check.name, None, None, None, None, False, clock() - started, first_line(error))]
    seconds = (clock() - started) / max(len(parts), 1)
    return [_row(check.name, part, platform_name, seconds) for part in parts]


def _row(name, part, platform_name, seconds):
    near = part.error is None or part.error <= part.tolerance
    repeated = part.same or platform_name != "cpu"
    message = "" if near and repeated else "too far from the reference" if not near else "a second run gave other bits"
    again = EQUAL if part.same else DIFFER
    title = f"{name}: {part.name}" if part.name else name
    return Row(title, part.error, part.tolerance, again, part.reference, near and repeated, seconds, message)


def first_line(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


CHECK_COLUMNS = {"check": 44, "error": 8, "tolerance": 9, "result": 6, "again": 11, "s": 5, "reference": 22}


class Found:
    """What was found so far, and what was not done: it grows while the program works, and can be written at any time."""

    def __init__(self):
        self.rows: list[Row] = []
        self.peaks: dict[str, float] = {}
        self.measurements: list[dict[str, Any]] = []
        self.checks_left: list[str] = []
        self.measurements_left: list[str] = []

    def summary(self) -> str:
        """The last line."""
        failed = [row.name for row in self.rows if not row.passed]
        again = [row.again for row in self.rows if row.again]
        text = f"checks: {len(self.rows) - len(failed)} of {len(self.rows)} passed"
        text += f"; {again.count(EQUAL)} of {len(again)} repeated to the same bits"
        if self.checks_left:
            text += f"; {len(self.checks_left)} skipped: no time left"
        return text + (f"; FAILED: {', '.join(failed)}" if failed else "")

    def for_json(self) -> dict[str, Any]:
        """All of it."""
        skipped = [*self.checks_left, *self.measurements_left]
        return {"checks": self.rows, "peaks": self.peaks, "measurements": self.measurements, "skipped": skipped}


class Deadline:
    """Ends the program when its time is over, in the midst of a compilation too, with the code that `finish` returns.

    Use it around the work; `finish` writes what was found so far.
    """

    def __init__(self, seconds: float, finish: Callable[[], int], leave: Callable[[int], Any] = os._exit):
        self._finish, self._leave, self._lock, self._over = finish, leave, threading.Lock(), False
        self._streams = sys.stdout, sys.stderr
        self._timer = threading.Timer(max(seconds, 0.0), self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:  # who is ending the program already goes on with it
            self._over = True

    def _end(self):
        with self._lock:
            if self._over:
                return
            code = 1
            sys.stdout, sys.stderr = self._streams  # the work may have turned them to somewhere else
            try:
                code = self._finish()
                sys.stdout.flush()
            except Exception:  # noqa: BLE001 - of any kind: nobody else ends the program
                traceback.print_exc()
            self._leave(code)


def checks_table(
    report: measuring.Report, checks: list[Check], budget: Budget, platform_name: str, found: Found
) -> None:
    """Do the checks that fit the time, row by row."""
    table = report.table(
        "Checks. Error: the largest difference from the reference as a share of the reference's largest value. Again: "
        "whether a second run of the compiled program gave the same bits.",
        CHECK_COLUMNS,
    )
    found.checks_left[:] = [check.name for check in checks]
    for check in checks:
        if not budget.fits(check.cost):
            continue
        started = budget.spent()
        rows = rows_of(check, platform_name)
        budget.done(check.cost, budget.spent() - started)
        found.checks_left.remove(check.name)
        found.rows += rows
        for row in rows:
            table.row(*cells(row))
    for row in found.rows:
        if row.message:
            report.say(f"{row.name} failed: {row.message}")


def cells(row: Row) -> list[str | None]:
    """A row of the table of checks."""
    known = row.error is not None
    return [
        row.name,
        f"{row.error:.1e}" if known else None,
        f"{row.tolerance:.0e}" if known else None,
        "passed" if row.passed else "FAILED",
        row.again,
        f"{row.seconds:.1f}",
        row.reference,
    ]


def description(argv: list[str], seconds: float) -> dict[str, Any]:
    """Versions, device, host, date, command and settings, as JSON can hold them."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "backend": getattr(device.client, "platform_version", "").replace("\n", " "),
        "host": f"{measuring.machine()}; {platform.platform()}",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in VERSIONS},
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": " ".join([f"python -m {__package__}.bench", *argv]),
        "seconds": seconds,
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)},
    }


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from its folder
        return None


def say_description(report: measuring.Report, about: dict[str, Any]) -> None:
    """The same in words."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    flags = " ".join(f"{name}={value}" for name, value in about["flags"].items()) or "none"
    report.say(f"Device: {about['devices']} x {about['device']} ({about['platform']}, {about['backend']}).")
    report.say(f"Host: {about['host']}. {versions}. {about['date']}.")
    report.say(f"Settings of the environment: {flags}.\n\n    {about['command']}")


def safe_name(kind: str) -> str:
    """The name of a device as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", kind).strip("-.") or "unknown"


def write(folder, report: measuring.Report, results: dict[str, Any]) -> list[Any]:
    """Write device-NAME.md and device-NAME.json; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"device-{safe_name(results['device'])}.{ending}" for ending in ("md", "json")]
    report.write(paths[0])
    text = json.dumps(_for_json(results), indent=1, allow_nan=False)
    paths[1].write_text(text + "\n", encoding="utf-8")
    return paths


def _for_json(value):
    """NamedTuples as dicts, and numbers that are not finite as words."""
    if hasattr(value, "_asdict"):
        return _for_json(value._asdict())
    if isinstance(value, dict):
        return {name: _for_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

