"""Ctrl-C and SIGTERM while a program still imports: a word and the exit code, in place of a traceback.

JAX takes seconds to import. This file imports the standard library alone, and `experiments/__init__.py` calls it first. Nothing
is under way that could be lost, so the process ends at once: an exception could be swallowed by what is being imported.
`lcrf_jax.machine.signals` takes over when the program begins.
"""

import itertools
import os
import signal
import sys

PACKAGES = ("experiments.", "lcrf_jax.experiments.")
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def answer_signals():
    """End with a word on a signal, where this process is a program of `experiments` and nobody else has a handler."""
    if not _is_program():
        return
    for signum, before in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(signum) == before:  # in the background of a shell Ctrl-C is ignored, and stays so
            signal.signal(signum, _end)


def _is_program():
    """Whether Python was called as `lcrf NAME` or `python -m experiments.NAME`, and is at its beginning."""
    if os.path.basename(sys.argv[0] if sys.argv else "") == "lcrf":
        return True
    called = getattr(sys, "orig_argv", [])
    return sys.argv[:1] == ["-m"] and any(
        flag.startswith("-") and flag.endswith("m") and name.startswith(PACKAGES) for flag, name in itertools.pairwise(called)
    )


def _end(signum, frame):
    del frame
    try:
        os.write(2, f"{WORDS[signum]} before anything was begun; nothing was changed\n".encode())
    except OSError:  # nobody reads it
        pass
    os._exit(128 + signum)


_end.until_the_program_begins = True  # `lcrf_jax.machine.signals` may replace it
