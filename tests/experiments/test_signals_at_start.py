"""A program that is asked to end while it still imports says so in one line."""

import signal
import subprocess
import sys
import textwrap

import pytest
from programs import ROOT

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
IMPORTING = """
    import gc, os, signal, sys
    signal.signal(signal.SIGINT, getattr(signal, sys.argv[3]))
    sys.argv[:1], sys.orig_argv = ["-m"], [sys.executable, sys.argv[2], "experiments.train"]
    sys.path.insert(0, sys.argv[1])
    import experiments
    def called_back(*_):
        os.kill(os.getpid(), int(sys.argv[4]))
    gc.callbacks.append(called_back)  # what is raised here is lost
    gc.collect()
    gc.callbacks.clear()
    print("goes on", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


def importing(signum, flag="-m", before="default_int_handler"):
    command = [sys.executable, "-c", textwrap.dedent(IMPORTING), str(ROOT), flag, before, str(int(signum))]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize("flag", ["-m", "-um"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_program_imports_ends_it_with_a_word(signum, flag):
    ended = importing(signum, flag)
    assert ended.returncode == 128 + signum and ended.stdout == ""
    assert ended.stderr == f"{WORDS[signum]} before anything was begun; nothing was changed\n"


def test_ctrl_c_that_is_ignored_stays_so_and_others_who_import_the_programs_keep_their_handlers():
    assert importing(signal.SIGINT, before="SIG_IGN").stdout == "goes on False\n"
    assert importing(signal.SIGINT, flag="-c", before="SIG_IGN").stdout == "goes on True\n"


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "evaluate", "predict", "cache", "demo"])
@pytest.mark.parametrize("imported", ["numpy", "jax"])
def test_programs_that_import_answer(program, imported):
    code = f"""
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.execv(sys.executable, [sys.executable, "-X", "importtime", "-m", "experiments.{program}", "--no_such_flag"])
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:  # a line for each module, when it has been imported
            if line.split("|")[-1].strip() == imported:
                break
        process.send_signal(signal.SIGINT)
        said = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.returncode == 130 and said == ["interrupted before anything was begun; nothing was changed\n"]
