"""Ending on request: SIGTERM and Ctrl-C between two steps instead of in the middle of one.

This file notes the request. `lcrf_jax.train.fit` saves the state and ends the run, `experiments.reporting` sets the exit code.
"""

import signal
import sys
import threading
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The program was asked to end.

    Args:
      message: what was saved, and how to go on.
      signum: number of the signal that asked.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = int(signum)


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
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _note(self, signum, frame):
        del frame
        if self.signum:
            raise Interrupted("stopped at once; what was saved before is kept", signum)
        self.signum = signum
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


def raise_on_termination() -> None:
    """Let SIGTERM raise Interrupted, as Ctrl-C raises KeyboardInterrupt; in the main thread only."""

    def interrupt(signum, frame):
        del frame
        raise Interrupted("terminated; what was saved before is kept", signum)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
