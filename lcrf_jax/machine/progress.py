"""What a program shows while it works: lines and a progress bar. Of several processes only the first shows them.

tqdm draws the bar. The rest is own code, for tqdm has no plain lines for a log and knows of no other process.

What is shown never ends a run: letters that the terminal does not know are written as their codes, and where nobody reads
any more (a closed pipe, a terminal that is gone, a log on a full disk) nothing is shown.

LCRF_JAX_PROGRESS chooses another way than a bar on a terminal and lines elsewhere: "lines" everywhere, "json", which is a JSON
object a line, or "quiet", which shows no progress; results and errors are shown all the same.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TextIO

import numpy as np
import tqdm
from jax.typing import ArrayLike

from lcrf_jax.machine.processes import is_first

WAYS = ("auto", "lines", "json", "quiet")
VARIABLE = "LCRF_JAX_PROGRESS"


def say(text: str) -> None:
    """Print a line to the terminal at once; of several processes the first does.

    Args:
      text: the line, without a newline at its end.
    """
    if is_first():
        show(text, sys.stdout)


def show(text: str, stream: TextIO | None) -> None:
    """Print a line to a stream that may not take it.

    Args:
      text: the line, without a newline at its end.
      stream: where to; None, as of a program without a terminal, takes nothing.
    """
    if stream is not None:
        _Forgiving(stream).write(f"{text}\n")


class _Forgiving:
    """A stream that may be closed, broken or of few letters, and never raises."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except UnicodeEncodeError as error:
            encoding = error.encoding or "ascii"
            self._quietly(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError):
            self._quietly("")
        return len(text)

    def flush(self) -> None:
        self._quietly("")

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except (OSError, ValueError, AttributeError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def _quietly(self, text):
        try:
            self._stream.write(text)
            self._stream.flush()
        except (UnicodeEncodeError, BlockingIOError):  # the latter is a reader who is slow, and comes back
            pass
        except (OSError, ValueError):
            _send_to_nowhere(self._stream)


def _send_to_nowhere(stream):
    """What waits in the buffer of a broken stream would end the interpreter with an error: let it be written to nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        if number > 2:  # of somebody else, who may want to know
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, number)
        finally:
            os.close(nowhere)


class Progress:
    """A progress bar with the loss, images per second and the time that is left on a terminal, and plain lines elsewhere.

    In a file or a CI log a bar that redraws itself is unreadable. There one line is printed at most every
    `seconds_between_lines`, and one at the end. Of several processes only the first writes. The first update compiles, so
    that speed and time are those of the others.

    Args:
      num_steps: number of steps of the whole run.
      first_step: step the run starts at, > 0 when it was resumed.
      title: word in front of every line.
      counted: word for what is counted, such as "step"; "" where it is images.
      stream: where to write; None is standard error.
      seconds_between_lines: least time between two lines where the stream is no terminal.
      clock: function that returns seconds; for tests.
      started: when the work began, by that clock, where nothing is compiled before the first update.

    Raises:
      ValueError: if LCRF_JAX_PROGRESS is none of `WAYS`.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        first_step: int = 0,
        title: str = "train",
        counted: str = "",
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        self._way = _chosen_way()
        if not is_first() or self._way == "quiet":
            stream = io.StringIO()
        chosen = sys.stderr if stream is None else stream
        self._stream: Any = _Forgiving(io.StringIO() if chosen is None else chosen)
        self._num_steps, self._step, self._title = num_steps, first_step, title
        self._counted_as = f"{counted} " if counted else ""
        self._clock, self._every = clock, seconds_between_lines
        self._last_line = self._began = clock() if started is None else started
        self._warm = started is not None  # whether the speed is known from what is counted so far
        self._num_images, self._counted = 0, 0
        self._first_end = self._began
        self._metrics: dict[str, float] = {}
        self._printed_step: int | None = None
        self._bar: Any = None
        if self._way == "auto" and self._stream.isatty():
            self._bar = tqdm.tqdm(total=num_steps, initial=first_step, desc=title, file=self._stream, dynamic_ncols=True,
                                  miniters=1, bar_format=f"{{desc}} {{percentage:3.0f}}%|{{bar}}| {self._counted_as}{{n_fmt}}/{{total_fmt}}{{postfix}}")

    def update(
        self, *, num_images: int, metrics: Mapping[str, ArrayLike] | None = None, num_steps: int = 1
    ) -> None:
        """Count steps that are finished.

        Args:
          num_images: images of these steps, over all devices.
          num_steps: how many steps are done.
          metrics: dict of scalars to show, already on the host; None shows the last ones again, so that a
            step need not wait for its values.
        """
        if not self._warm and self._counted:  # what was counted before is the update that compiled
            self._warm, self._num_images, self._counted, self._began = True, 0, 0, self._first_end
        self._step += num_steps
        self._counted += num_steps
        self._num_images += num_images
        self._first_end = self._clock()
        if metrics is not None:
            # What is told first is the loss.
            ordered = sorted(metrics.items(), key=lambda item: item[0] != "loss")
            self._metrics = {name: as_scalar(name, value) for name, value in ordered}
        if self._bar is not None:
            self._bar.set_postfix_str(self._beside_the_bar(), refresh=False)
            self._bar.update(num_steps)
        elif self._clock() - self._last_line >= self._every:
            self._print_line()

    def waiting(self, text: str) -> None:
        """Say what is done in the place of steps, such as "compiling"; on a terminal beside the bar until the next update.

        Args:
          text: a word or two.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif self._way != "json":
            self._stream.write(f"{self._title}: {text}\n")

    def message(self, text: str) -> None:
        """Print a line of its own without breaking the bar.

        Args:
          text: the line, without a newline at its end.
        """
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._way == "json":
            self._stream.write(json.dumps({"title": self._title, "message": text}) + "\n")
        else:
            self._stream.write(f"{text}\n")

    def close(self) -> None:
        """End the bar, or print the last line; a second call does nothing, nor the first where there was nothing to do."""
        if self._bar is not None:
            self._bar.close()
        elif self._printed_step != self._step and self._num_steps:
            self._print_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _speed(self):
        """Images a second, and the seconds that are left, None where no step is done."""
        seconds = max(self._clock() - self._began, 1e-9)
        left = seconds / self._counted * (self._num_steps - self._step) if self._counted else None
        return self._num_images / seconds, left

    def _beside_the_bar(self):
        speed, left = self._speed()
        loss = f"loss {self._metrics['loss']:.4g}" if "loss" in self._metrics else ""
        return ", ".join(filter(None, (loss, f"{speed:.1f} images/s", f"{_clock_time(left)} left" if left else "")))

    def _print_line(self):
        self._last_line, self._printed_step = self._clock(), self._step
        speed, left = self._speed()
        if self._way == "json":
            facts = {"title": self._title, "step": self._step, "steps": self._num_steps, "images_per_second": round(speed, 3),
                     "seconds_left": left and round(left, 1)}  # fmt: skip
            metrics = {name: value if math.isfinite(value) else None for name, value in self._metrics.items()}
            self._stream.write(json.dumps(facts | metrics) + "\n")
            return
        terms = [f"{name} {value:.4g}" for name, value in self._metrics.items()]
        title = f"{self._title}, {self._counted_as}" if self._counted_as else f"{self._title} "
        self._stream.write(f"{title}{self._step}/{self._num_steps}  {', '.join([f'{speed:.1f} images/s', *terms])}\n")


def _chosen_way():
    way = os.environ.get(VARIABLE) or "auto"
    if way not in WAYS:
        raise ValueError(f"{VARIABLE}: expected one of {', '.join(WAYS)}, got {way!r}")
    return way


def _clock_time(seconds):
    """2:05 or 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def image_progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A function that counts images, shown as a progress bar.

    The bar appears at the first call: where a cache has everything there is none.

    Args:
      title: word in front of the bar.
      total: number of images.

    Returns:
      Context manager; its value is a function (number of images done, earlier=False). Images of an earlier run
      (`earlier=True`) are counted, but not for the speed.
    """
    with contextlib.ExitStack() as stack:
        bars: list[Progress] = []
        started = time.monotonic()

        def done(count, *, earlier=False):
            if not bars:
                bars.append(stack.enter_context(Progress(total, title=title, started=started)))
            bars[0].update(num_images=0 if earlier else count, num_steps=count)

        yield done


def as_scalar(name: str, value: ArrayLike) -> float:
    """The value of a metric as a Python float.

    Args:
      name: of the metric.
      value: a number, or an array of one element.

    Returns:
      float.

    Raises:
      ValueError: if the array has more elements, or the name is one that every line has ("step", "time").
    """
    if name in ("step", "time"):
        raise ValueError(f"expected another name than {name!r}, which every line has; rename the metric")
    array = np.asarray(value)
    if array.size != 1:
        raise ValueError(f"expected a scalar for {name!r}, got shape {array.shape}; write its mean, or each "
                         "of its values under a name of its own")
    return float(array.reshape(()).astype(np.float64))
