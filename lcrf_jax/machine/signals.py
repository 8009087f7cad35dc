"""Ending on request: SIGTERM and Ctrl-C between two steps instead of in the middle of one.

This file notes the request. `lcrf_jax.train.fit` saves the state and ends the run, `experiments.reporting` sets the exit code.

Python runs a handler only once the main thread is back from what it called: compiling or waiting for a device may take a
minute. So a thread of its own answers at once.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_ANSWER = 0.5
SECONDS_TO_END = 10.0
SECONDS_TO_ASK_AGAIN = 0.05


class Interrupted(KeyboardInterrupt):
    """The program was asked to end.

    Args:
      message: what was saved, and how to go on.
      signum: number of the signal that asked.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = int(signum)


class _Watch:
    """A thread that answers a signal while the main thread is busy elsewhere, and ends the process on the second one.

    It looks only at signals whose handlers are `_ours`: these note when they ran.
    """

    def __init__(self) -> None:
        self.answered_at = -math.inf
        self._started = False

    def start(self) -> None:
        """Begin, once for the process, unless somebody else listens for its signals already."""
        if self._started:
            return
        self._started = True
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        if before != -1:  # the loop of a notebook
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
            os.close(reading)
            os.close(writing)
            return
        os.register_at_fork(after_in_child=_forget_in_child)
        threading.Thread(target=self._answer, args=(reading,), daemon=True, name="signals").start()

    def _answer(self, reading):
        asked = 0
        while signums := os.read(reading, 64):
            since = time.monotonic() - SECONDS_TO_ANSWER  # the handler may have run before this thread was awake
            for signum in signums:
                if not getattr(signal.getsignal(signum), "answers", False):
                    continue
                if self._was_answered(since, SECONDS_TO_ANSWER):
                    asked = 0
                    continue
                asked += 1
                if asked == 1:
                    tell("asked to stop: waiting for what is being computed or compiled; once more to stop at once")
                elif not self._was_answered(since, SECONDS_TO_END):
                    tell("stopped at once; what was saved before is kept")
                    os._exit(128 + signum)

    def _was_answered(self, since, seconds):
        until = time.monotonic() + seconds
        while self.answered_at < since and time.monotonic() < until:
            time.sleep(0.02)
        return self.answered_at >= since


_watch = _Watch()


def _forget_in_child():
    """The pipe is that of the parent, which would take signals to this process for its own."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


def _ours(handler):
    """A handler that notes when it runs."""

    @functools.wraps(handler)
    def noting(*arguments):
        _watch.answered_at = time.monotonic()
        return handler(*arguments)

    noting.answers = True  # type: ignore[attr-defined]
    return noting


def tell(text: str) -> None:
    """Write a line to standard error: from a signal handler too, where `print` may be in the midst of another line.

    Args:
      text: the line, without a newline at its end.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, or there is none
        number = sys.__stderr__.fileno()  # type: ignore[union-attr]
        os.write(number, f"{os.linesep if os.isatty(number) else ''}{text}\n".encode())  # after a bar


class StopRequest:
    """Within the block the first SIGINT or SIGTERM is noted, and the second one raises Interrupted at once.

    In another thread than the main one nothing is changed and nothing noted.

    Attributes:
      signum: number of the signal that was noted, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in STOPPING}
            _watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    @_ours
    def _note(self, signum, frame):
        del frame
        if self.signum:
            raise Interrupted("stopped at once; what was saved before is kept", signum)
        self.signum = signum
        tell("stopping after this step; once more to stop at once")


def raise_on_termination() -> None:
    """Let SIGTERM raise Interrupted, as Ctrl-C raises KeyboardInterrupt, and have both answered within a second.

    In the main thread only. Where Ctrl-C is ignored, as by a program that a shell runs in the background, it stays so. Where
    Python can raise nothing, as in what is called back by its garbage collector, the signal is sent once more.
    """

    @_ours
    def interrupt(signum, frame):
        del frame
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted("terminated; what was saved before is kept", signum)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler or getattr(before, "until_the_program_begins", False):
            signal.signal(signal.SIGINT, interrupt)
        _ask_again_what_is_lost()
        _watch.start()


def _ask_again_what_is_lost():
    """Send a signal once more whose exception was raised where Python drops all of them: in a finaliser, or a callback of gc."""
    before = sys.unraisablehook
    if getattr(before, "asks_again", False):
        return

    def hook(lost):
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            before(lost)
            return
        signum = getattr(lost.exc_value, "signum", signal.SIGINT)
        again = threading.Timer(SECONDS_TO_ASK_AGAIN, os.kill, (os.getpid(), signum))  # not now: it would be lost again
        again.daemon = True
        again.start()

    hook.asks_again = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def leave(code: int) -> NoReturn:
    """End an interrupted program.

    A compilation that was interrupted goes on in a thread of XLA. The interpreter would wait for it, and then crash on its
    way out. So a program that runs by itself ends here; within another one this is `sys.exit`.

    Args:
      code: exit code.

    Raises:
      SystemExit: where the program runs within another one.
    """
    if _runs_by_itself():
        _flush()
        os._exit(code)
    sys.exit(code)


def all_is_done() -> None:
    """From now on a signal ends a program that runs by itself at once: the interpreter, on its way out, would show a traceback."""

    def end(signum, frame):
        del frame
        tell("all was done")
        os._exit(128 + signum)

    if _runs_by_itself() and threading.current_thread() is threading.main_thread():
        _flush()
        for signum in STOPPING:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, end)


def _runs_by_itself():
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec is not None and spec.name.startswith(("experiments.", "lcrf_jax.experiments."))


def _flush():
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
