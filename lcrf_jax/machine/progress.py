"""What a program shows while it works: lines and a progress bar. Of several processes only the first shows them.

tqdm draws the bar. The rest is own code, for tqdm has no plain lines for a log and knows of no other process.

What is shown never ends a run: letters that the terminal does not know are written as their codes, and where nobody reads
any more (a closed pipe, a terminal that is gone, a log on a full disk) nothing is shown.
"""

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TextIO

import numpy as np
import tqdm
from jax.typing import ArrayLike

from lcrf_jax.machine.processes import is_first


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
        except UnicodeEncodeError:
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
    """A progress bar with images per second and loss terms on a terminal, and plain lines elsewhere.

    In a file or a CI log a bar that redraws itself is unreadable. There one line is printed at most every
    `seconds_between_lines`, and one at the end. Of several processes only the first writes.

    Args:
      num_steps: number of steps of the whole run.
      first_step: step the run starts at, > 0 when it was resumed.
      title: word in front of every line.
      stream: where to write; None is standard error.
      seconds_between_lines: least time between two lines where the stream is no terminal.
      clock: function that returns seconds; for tests.
      started: when the work began, by that clock; None is now.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        first_step: int = 0,
        title: str = "train",
        stream: TextIO | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
    ) -> None:
        if not is_first():
            stream = io.StringIO()
        chosen = sys.stderr if stream is None else stream
        self._stream: Any = _Forgiving(io.StringIO() if chosen is None else chosen)
        self._num_steps, self._step, self._title = num_steps, first_step, title
        self._clock, self._every = clock, seconds_between_lines
        self._last_line = clock()
        self._started = self._last_line if started is None else started
        self._num_images, self._terms = 0, ""
        self._printed_step: int | None = None
        self._bar: Any = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(total=num_steps, initial=first_step, desc=title, file=self._stream,
                                  unit="step", dynamic_ncols=True,
                                  bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
                                             "[{elapsed}<{remaining}]{postfix}")

    def update(
        self, *, num_images: int, metrics: Mapping[str, ArrayLike] | None = None, num_steps: int = 1
    ) -> None:
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
            # What a narrow terminal cuts off stands last.
            ordered = sorted(metrics.items(), key=lambda item: item[0] != "loss")
            self._terms = ", ".join(f"{name} {as_scalar(name, value):.4g}" for name, value in ordered)
        if self._bar is not None:
            self._bar.set_postfix_str(self._tail(), refresh=False)
            self._bar.update(num_steps)
        elif self._clock() - self._last_line >= self._every:
            self._print_line()

    def message(self, text: str) -> None:
        """Print a line of its own without breaking the bar.

        Args:
          text: the line, without a newline at its end.
        """
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(f"{text}\n")

    def close(self) -> None:
        """End the bar, or print the last line; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        elif self._printed_step != self._step:
            self._print_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tail(self):
        seconds = max(self._clock() - self._started, 1e-9)
        return ", ".join(part for part in (f"{self._num_images / seconds:.1f} images/s", self._terms) if part)

    def _print_line(self):
        self._last_line, self._printed_step = self._clock(), self._step
        self._stream.write(f"{self._title} {self._step}/{self._num_steps}  {self._tail()}\n")


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
