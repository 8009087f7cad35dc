"""What a run says about itself: a progress bar, JSON lines and TensorBoard scalars."""

import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time

import numpy as np
import tensorboardX
import tqdm

from lcrf_jax.processes import is_first

METRICS_FILE = "metrics.jsonl"


def say(text):
    """Print a line to the terminal at once; of several processes the first does.

    Args:
      text: the line, without a newline at its end.
    """
    if is_first():
        print(text, flush=True)


def write_whole(path, text):
    """Write a text file in one move: a file that is there is whole.

    Args:
      path: pathlib.Path of the file.
      text: its content.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


class MetricsWriter:
    """Appends scalars to RUN/metrics.jsonl and to TensorBoard files in RUN/tensorboard/.

    One line of JSON for each call of `write`: {"step": 7, "time": 1700000000.0, "train/loss": 0.5}; a value
    that is not finite is written as null, since JSON has no NaN. A line cut short by a crash is ended when
    the run is taken up again, and lines of steps that the resumed run will repeat are removed, so that each
    step stands once. Of several processes the first writes.

    Args:
      run_dir: folder of the run; made if it is not there.
      resume_step: first step the run will write again; lines at or after it are dropped. None keeps all of
        them.
    """

    def __init__(self, run_dir, *, resume_step=None):
        self.path, self._lines = pathlib.Path(run_dir) / METRICS_FILE, None
        if not is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines(self.path, resume_step)
        self._lines = self.path.open("a", encoding="utf-8")
        purge = None if resume_step is None else int(resume_step)
        self._board = tensorboardX.SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=purge)

    def write(self, step, metrics):
        """Write one line of scalars; it is on disk when this returns.

        Args:
          step: number of the training step, >= 0.
          metrics: dict from name to a scalar: Python number, or array of one element on host or device. A
            slash in a name groups it: "train/loss", "val/miou".
        Raises:
          ValueError: if a value is not a scalar, or a name is "step" or "time".
          OSError: if the disk is full; the message names the file.
        """
        step, scalars = int(step), {name: _scalar(name, value) for name, value in metrics.items()}
        record = {"step": step, "time": round(time.time(), 3)}
        record |= {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        if self._lines is None:
            return
        try:
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; make room and run the same command again", str(self.path)
                          ) from error
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self):
        """Flush and close both files; a second call does nothing."""
        if self._lines is not None:
            with contextlib.suppress(OSError):  # a full disk, which `write` has told of
                self._lines.close()
            self._board.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def metrics_history(run_dir):
    """The metrics a run has written so far.

    Args:
      run_dir: folder of the run.
    Returns:
      List of dicts, one for each line in order, with "step", "time" and the metrics; null comes back as NaN.
      A last line that was cut short is left out. Empty if nothing was written yet.
    Raises:
      ValueError: if a line before the last one is not JSON.
    """
    path = pathlib.Path(run_dir) / METRICS_FILE
    return [record for _, record in _records(path)] if path.exists() else []


class Progress:
    """A progress bar with loss terms and images per second on a terminal, plain lines elsewhere; of the first process.

    In a file or a CI log a bar that redraws itself is unreadable: there one line is printed at most every
    `seconds_between_lines`, and one at the end.

    Args:
      num_steps: number of steps of the whole run.
      first_step: step the run starts at, > 0 when it was resumed.
      title: word in front of every line.
      stream: where to write; None is standard error.
      seconds_between_lines: least time between two lines where the stream is no terminal.
      clock: function that returns seconds; for tests.
      started: when the work began, by that clock; None is now.
    """

    def __init__(self, num_steps, *, first_step=0, title="train", stream=None, seconds_between_lines=10.0,
                 clock=time.monotonic, started=None):
        if not is_first():
            stream = io.StringIO()
        self._stream = sys.stderr if stream is None else stream
        self._num_steps, self._step, self._title = num_steps, first_step, title
        self._clock, self._every = clock, seconds_between_lines
        self._last_line = clock()
        self._started = self._last_line if started is None else started
        self._num_images, self._terms, self._printed_step = 0, "", None
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(total=num_steps, initial=first_step, desc=title, file=self._stream,
                                  unit="step", dynamic_ncols=True,
                                  bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                                             "[{elapsed}<{remaining}]{postfix}")

    def update(self, *, num_images, metrics=None, num_steps=1):
        """Count steps.

        Args:
          num_images: images of these steps, over all devices.
          num_steps: how many steps are done.
          metrics: dict of scalars to show, already on the host; None shows the last ones again, so that a
            step need not wait for its values.
        """
        self._step += num_steps
        self._num_images += num_images
        if metrics is not None:
            self._terms = ", ".join(f"{name} {_scalar(name, value):.4g}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._tail(), refresh=False)
            self._bar.update(num_steps)
        elif self._clock() - self._last_line >= self._every:
            self._print_line()

    def message(self, text):
        """Print a line of its own without breaking the bar.

        Args:
          text: the line, without a newline at its end.
        """
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self):
        """End the bar, or print the last line; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._printed_step != self._step:
            self._print_line()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _tail(self):
        seconds = max(self._clock() - self._started, 1e-9)
        return ", ".join(part for part in (self._terms, f"{self._num_images / seconds:.1f} images/s") if part)

    def _print_line(self):
        self._last_line, self._printed_step = self._clock(), self._step
        print(f"{self._title} {self._step}/{self._num_steps}  {self._tail()}", file=self._stream, flush=True)


@contextlib.contextmanager
def image_progress(title, total):
    """A callback for images done, shown as a progress bar from its first call on: none where a cache had it all.

    Images that an earlier run has done (`earlier=True`) count, but not for the speed.
    """
    with contextlib.ExitStack() as stack:
        bars, started = [], time.monotonic()

        def done(count, *, earlier=False):
            if not bars:
                bars.append(stack.enter_context(Progress(total, title=title, started=started)))
            bars[0].update(num_images=0 if earlier else count, num_steps=count)

        yield done


def _scalar(name, value):
    """A Python float of a number or of an array of one element."""
    if name in ("step", "time"):
        raise ValueError(f"expected another name than {name!r}, which every line has; rename the metric")
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"expected a scalar for {name!r}, got shape {array.shape}; write its mean, or each "
                         "of its values under a name of its own")
    return float(array.reshape(()).astype(np.float64))


def _records(path):
    """(text, record) of each complete line; NaN for null."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(lines):
                return
            raise ValueError(f"{path}, line {number}: expected JSON, got {text[:60]!r}; remove the line"
                             ) from error
        yield text, {name: math.nan if value is None else value for name, value in record.items()}


def _drop_lines(path, resume_step):
    """Leave complete lines before resume_step, replacing the file in one move."""
    if not path.exists():
        return
    kept = [text for text, record in _records(path) if resume_step is None or record["step"] < resume_step]
    content = "".join(text + "\n" for text in kept)
    if content != path.read_text(encoding="utf-8"):
        new = path.with_suffix(".tmp")
        new.write_text(content, encoding="utf-8")
        os.replace(new, path)
