"""The numbers of a run: JSON lines and, where tensorboardX is installed, TensorBoard scalars in its folder."""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, Self, TextIO

from jax.typing import ArrayLike

from lcrf_jax.machine.files import parsed_json, write_whole
from lcrf_jax.machine.processes import is_first
from lcrf_jax.machine.progress import as_scalar, say

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends scalars to RUN/metrics.jsonl and to TensorBoard files in RUN/tensorboard/.

    The TensorBoard files need tensorboardX. Without it one line says so, and metrics.jsonl is written all the same.

    One line of JSON for each call of `write`: {"step": 7, "time": 1700000000.0, "train/loss": 0.5}; a value
    that is not finite is written as null, since JSON has no NaN. A line cut short by a crash is ended when
    the run is taken up again, and lines of steps that the resumed run will repeat are removed, so that each
    step stands once. Of several processes the first writes.

    Args:
      run_dir: folder of the run; made if it is not there.
      resume_step: first step the run will write again; lines at or after it are dropped. None keeps all of
        them.
    """

    def __init__(self, run_dir: str | os.PathLike, *, resume_step: int | None = None) -> None:
        self.path = pathlib.Path(run_dir) / METRICS_FILE
        self._lines: TextIO | None = None
        if not is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines(self.path, resume_step)
        self._lines = self.path.open("a", encoding="utf-8")
        purge = None if resume_step is None else int(resume_step)
        self._board = _board(self.path.parent / "tensorboard", purge)

    def write(self, step: int, metrics: Mapping[str, ArrayLike]) -> None:
        """Write one line of scalars; it is on disk when this returns.

        Args:
          step: number of the training step, >= 0.
          metrics: dict from name to a scalar: Python number, or array of one element on host or device. A
            slash in a name groups it: "train/loss", "val/miou".
        Raises:
          ValueError: if a value is not a scalar, or a name is "step" or "time".
          OSError: if the disk is full; the message names the file.
        """
        step, scalars = int(step), {name: as_scalar(name, value) for name, value in metrics.items()}
        record: dict[str, float | None] = {"step": step, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        if self._lines is None:
            return
        try:
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; make room and run the same command again", str(self.path)
                          ) from error
        if self._board is not None and not _is_alive(self._board):
            say(f"no TensorBoard files are written any more, their disk took no more: {self.path.parent / 'tensorboard'}")
            self._board = None
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files; a second call does nothing."""
        if self._lines is not None:
            with contextlib.suppress(OSError):  # a full disk, which `write` has told of
                self._lines.close()
            if self._board is not None:
                with contextlib.suppress(OSError):
                    self._board.close()
                self._board = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def metrics_history(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """The metrics a run has written so far.

    Args:
      run_dir: folder of the run.
    Returns:
      List of dicts, one for each line in order, with "step", "time" and the metrics; null comes back as NaN.
      A last line that was cut short is left out. Empty if nothing was written yet.
    Raises:
      ValueError: if a line before the last one is not JSON with a step.
    """
    path = pathlib.Path(run_dir) / METRICS_FILE
    return [record for _, record in _records(path)] if path.exists() else []


def score(record: Mapping[str, Any]) -> float | None:
    """The mIoU that parameters were saved with.

    Args:
      record: what was saved beside them; without validation "miou" is None, or, by earlier versions, the number of the step.
    Returns:
      A number in 0..1, or None.
    """
    miou = record.get("miou")
    return miou if miou is None or 0 <= float(miou) <= 1 else None


def rank(record: Mapping[str, Any]) -> float:
    """Which parameters are kept as the best: those of the highest mIoU, and where nothing has one, the newest.

    Args:
      record: what was saved beside them, with "step" where there is no mIoU.
    Returns:
      A number, larger for better ones.
    """
    known = score(record)
    return -1 / (1 + record.get("step", record.get("miou"))) if known is None else known


def _board(folder: pathlib.Path, purge: int | None) -> Any:
    """The writer of the TensorBoard files; None, after saying so, where tensorboardX is not installed."""
    try:
        import tensorboardX
    except ModuleNotFoundError as error:
        say(f"no TensorBoard files are written ({error}): pip install '.[tensorboard]' in your clone")
        return None
    return tensorboardX.SummaryWriter(str(folder), purge_step=purge)


def _is_alive(board):
    """Whether the thread of a writer is there; it ends at a full disk, and then its queue would fill up and wait for ever."""
    try:
        return board.file_writer.event_writer._worker.is_alive()
    except AttributeError:  # another version
        return True


def _records(path):
    """(text, record) of each complete line; NaN for null."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8")
            record = parsed_json(text)
            if int(record["step"]) != record["step"]:
                raise ValueError("no whole number")
        except (ValueError, TypeError, LookupError) as error:  # of UTF-8 and JSON too
            if number == len(lines):
                return
            shown = line[:60].decode("utf-8", "replace")
            raise ValueError(f"{path}, line {number}: expected JSON with a step, got {shown!r}; remove the line") from error
        yield text, {name: math.nan if value is None else value for name, value in record.items()}


def _drop_lines(path, resume_step):
    """Leave complete lines before resume_step, replacing the file in one move."""
    if not path.exists():
        return
    kept = [text for text, record in _records(path) if resume_step is None or record["step"] < resume_step]
    content = "".join(text + "\n" for text in kept)
    if content.encode() != path.read_bytes():
        write_whole(path, content)
