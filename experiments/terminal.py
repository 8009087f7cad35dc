"""Standard output and error that never end a program: in any encoding, on a full disk, and when nobody reads any more."""

import contextlib
import os
import sys


class Lasting:
    """A text stream in front of another one: what cannot be written is dropped, and told once on standard error.

    Everything else is that of the other stream.
    """

    def __init__(self, stream, name):
        self._stream, self._name, self._told = stream, name, False

    def __getattr__(self, attribute):
        return getattr(self._stream, attribute)

    def __iter__(self):
        return iter(self._stream)

    def write(self, text):
        """Write text; its length, whatever came of it."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it is closed, or a character has no code
            self._lost(error)
        return len(text)

    def writelines(self, lines):
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self):
        """Write what is kept back."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def _lost(self, error):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # What is still kept back goes nowhere, or the interpreter would fail on it at its end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if not self._told and self._name == "standard output":
            self._told = True
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(f"{self._name} takes no more text ({error}); the work goes on", file=sys.stderr, flush=True)


def lasting_streams():
    """Make sys.stdout and sys.stderr such streams; a character that the terminal cannot show is written as its number."""
    for attribute, name in (("stdout", "standard output"), ("stderr", "standard error")):
        stream = getattr(sys, attribute)
        if isinstance(stream, Lasting):
            continue
        if stream is None:  # closed by who started the program
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lives as long as the program
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, attribute, Lasting(stream, name))
