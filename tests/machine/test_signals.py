"""A request to stop is answered at once, whatever the main thread does, and never in the midst of a print."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest
from programs import ROOT

from lcrf_jax.machine import signals
from lcrf_jax.machine.signals import Interrupted, StopRequest


@pytest.fixture(autouse=True)
def handlers():
    before = {signum: signal.getsignal(signum) for signum in signals.STOPPING}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_request_is_answered_with_a_word_and_noted(capfd):
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        assert stop.signum == signal.SIGTERM
    assert capfd.readouterr().err == "stopping after this step; once more to stop at once\n"


def test_the_word_does_not_go_through_a_stream_that_may_be_in_use(monkeypatch, capfd):
    class InUse:
        def write(self, text):
            raise RuntimeError("reentrant call")

        flush = write

    monkeypatch.setattr(sys, "stderr", InUse())
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        assert stop.signum == signal.SIGINT
    assert "stopping after this step" in capfd.readouterr().err


@pytest.mark.parametrize("stderr", [None, object()], ids=["none", "strange"])
def test_without_standard_error_there_is_no_word_and_no_error(monkeypatch, stderr):
    monkeypatch.setattr(sys, "__stderr__", stderr)
    signals.tell("nobody reads this")


def test_standard_error_that_is_closed_is_no_error(monkeypatch):
    with open(os.devnull, "w") as stream:
        monkeypatch.setattr(sys, "__stderr__", stream)
    signals.tell("nobody reads this")


def test_ctrl_c_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.raise_on_termination()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.raise_on_termination()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    with pytest.raises(Interrupted, match="terminated"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_an_interrupted_program_does_not_wait_for_what_xla_still_compiles(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(SystemExit) as raised:
        signals.leave(130)
    assert raised.value.code == 130 and ended == []  # within another program
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=types.SimpleNamespace(name="experiments.train")))
    with pytest.raises(SystemExit):
        signals.leave(143)
    assert ended == [143]


@pytest.mark.parametrize("signum", signals.STOPPING)
def test_a_signal_when_all_is_done_shows_no_traceback(monkeypatch, capfd, signum):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    signals.all_is_done()
    before = signal.getsignal(signum)  # within another program nothing is changed
    monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(__spec__=types.SimpleNamespace(name="experiments.train")))
    signal.signal(signum, signal.SIG_DFL)
    signals.all_is_done()
    assert signal.getsignal(signum) not in (before, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    time.sleep(0.02)
    assert ended == [128 + signum] and capfd.readouterr().err == "all was done\n"
    signal.signal(signum, signal.SIG_IGN)
    signals.all_is_done()
    assert signal.getsignal(signum) is signal.SIG_IGN


BUSY = """
    import hashlib, os, runpy, signal, sys, time
    signals = runpy.run_path(sys.argv[1])  # without JAX, which takes seconds to import
    signals["_Watch"]._answer.__globals__["SECONDS_TO_END"] = 1.0
    signals["raise_on_termination"]()
    with signals["StopRequest"]() as stop:
        print("busy", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))  # as XLA, it does not come back before it is done
        while not stop.signum:
            time.sleep(0.01)
        print("saved", flush=True)
"""


def busy(rounds):
    command = [sys.executable, "-c", textwrap.dedent(BUSY), str(ROOT / "lcrf_jax" / "machine" / "signals.py"), str(rounds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "busy\n"
    time.sleep(0.3)  # until it computes
    return process


@pytest.mark.slow
def test_a_request_is_answered_within_a_second_while_the_main_thread_computes():
    with busy(6_000_000) as process:
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("asked to stop: waiting for what is being computed")
        assert time.monotonic() - asked < 1.5  # half a second on a machine without other work
        assert process.stdout.readline() == "saved\n"
        assert "stopping after this step" in process.stderr.read()
    assert process.returncode == 0


@pytest.mark.slow
def test_the_second_request_ends_what_does_not_come_back():
    with busy(400_000_000) as process:
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "stopped at once; what was saved before is kept\n"
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - asked < 30


SWALLOWED = """
    import gc, os, runpy, signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in the background
    signals = runpy.run_path(sys.argv[1])
    signals["raise_on_termination"]()
    def called_back(*_):
        gc.callbacks.clear()
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(0.2)
    gc.callbacks.append(called_back)
    try:
        gc.collect()
        time.sleep(5)
    except KeyboardInterrupt as error:
        print("asked again", type(error).__name__)
"""


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Interrupted")])
def test_a_signal_within_a_callback_of_the_garbage_collector_is_not_lost(signum, name):
    command = [sys.executable, "-c", textwrap.dedent(SWALLOWED), str(ROOT / "lcrf_jax" / "machine" / "signals.py"), str(int(signum))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert (ended.stdout, ended.stderr) == (f"asked again {name}\n", "")
