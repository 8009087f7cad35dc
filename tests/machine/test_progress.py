"""What is shown ends no run: terminals of few letters, pipes that nobody reads, full disks. The rest is in test_runlog.py."""

import errno
import io
import os
import subprocess
import sys
import textwrap

import pytest
from programs import ROOT

from lcrf_jax.machine.progress import Progress, say, show

TEXT = "Größe 5 µm \udce4 → fertig"


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize(("encoding", "shown"), [
    ("ascii", r"Gr\xf6\xdfe 5 \xb5m \udce4 \u2192 fertig"), ("latin-1", "Größe 5 µm \\udce4 \\u2192 fertig"),
    ("utf-8", "Größe 5 µm \\udce4 → fertig"), ("cp1252", "Größe 5 µm \\udce4 \\u2192 fertig"),
])  # fmt: skip
def test_letters_that_the_terminal_does_not_know_are_shown_as_codes(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    say(TEXT)
    assert stream.buffer.getvalue().decode(encoding) == shown + "\n"


@pytest.mark.parametrize("kind", [io.TextIOWrapper, Terminal], ids=["a log", "a terminal"])
def test_a_bar_and_its_messages_too(kind):
    stream = kind(io.BytesIO(), encoding="ascii")
    with Progress(2, title="Größe", stream=stream) as bar:
        bar.update(num_images=1, metrics={"loss": 0.5})
        bar.message(TEXT)
    assert rb"\u2192 fertig" in stream.buffer.getvalue() and rb"Gr\xf6\xdfe" in stream.buffer.getvalue()


def failing(number):
    class Failing(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

        def flush(self):
            raise OSError(number, os.strerror(number))

    return Failing()


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [
    failing(errno.EPIPE), failing(errno.EIO), failing(errno.ENOSPC), closed(), None,
], ids=["pipe", "terminal that is gone", "full disk", "closed", "none"])  # fmt: skip
def test_what_nobody_can_read_is_not_shown(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    say(TEXT)
    show(TEXT, stream)
    with Progress(2, stream=stream) as bar:
        bar.update(num_images=1)
        bar.message(TEXT)


PROGRAM = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from lcrf_jax.machine.progress import Progress, image_progress, say
    with image_progress("features", 3) as done:
        for count in range(3):
            say("x" * 100_000)
            done(1)
    from jax._src import xla_bridge
    with open(sys.argv[2], "w") as file:
        file.write(f"done {xla_bridge.backends_are_initialized()}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["closed pipe", "/dev/full"])
def test_a_program_whose_output_nobody_takes_ends_well_and_starts_no_device(tmp_path, where):
    reading, writing = os.pipe()
    os.close(reading)
    target = open(where, "w") if where.startswith("/") else os.fdopen(writing, "w")  # noqa: SIM115
    with target:
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(ROOT), str(tmp_path / "done")]
        ended = subprocess.run(command, stdout=target, stderr=target, check=False, timeout=120)
    assert ended.returncode == 0 and (tmp_path / "done").read_text() == "done False"
