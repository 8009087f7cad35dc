"""What was saved and cannot be read: damage is proven, everything else changes nothing. And saves that replace others."""

import errno
import gc
import io
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from programs import ROOT

from lcrf_jax.runfolder import checkpoints as module
from lcrf_jax.runfolder import damage
from lcrf_jax.runfolder.checkpoints import RunCheckpoints, best_miou, restore_params
from lcrf_jax.runfolder.damage import Damaged, read_or_judged
from lcrf_jax.runfolder.description import CheckpointError


def state(value):
    return {"params": {"w": np.full(8, value, np.float32)}, "count": np.int32(value)}


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("saved") / "run"
    with RunCheckpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save_last(step, state(step))
        checkpoints.save_best(2, state(2)["params"], 0.5)
    return run


@pytest.fixture
def run(saved_run, tmp_path):
    return shutil.copytree(saved_run, tmp_path / "run")


def chained(error):
    """An error as orbax hands it on."""
    try:
        try:
            raise error
        except BaseException as cause:
            raise ValueError("the arrays could not be restored") from cause
    except ValueError as wrapped:
        return wrapped


PASSING = {
    "disk": OSError(errno.EIO, "Input/output error"), "stale": OSError(errno.ESTALE, "Stale file handle"),
    "rights": PermissionError(errno.EACCES, "Permission denied"), "files": OSError(errno.EMFILE, "Too many open files"),
    "memory": MemoryError(), "wrapped": chained(OSError(errno.EIO, "Input/output error")),
    "tensorstore": ValueError("RESOURCE_EXHAUSTED: out of memory"), "group": ExceptionGroup("many", [MemoryError()]),
}  # fmt: skip


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_changes_nothing(run, monkeypatch, fault):
    before = names(run)

    class Failing:
        def restore(self, *_, **__):
            raise fault

    with RunCheckpoints(run) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(module, "_reader", lambda handler: Failing())
        for call in (lambda: checkpoints.restore_last(state(0)), lambda: restore_params(run), lambda: best_miou(run),
                     lambda: checkpoints.save_best(1, state(9)["params"], 0.1)):
            with pytest.raises(CheckpointError, match="could not be read just now .*nothing was changed") as raised:
                call()
            assert not isinstance(raised.value, Damaged)
    assert names(run) == before
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.restore_last(state(0)).step == 2
    assert best_miou(run) == 0.5


def test_files_that_the_disk_does_not_give_are_no_damage_whatever_orbax_says(run, monkeypatch):
    def unreadable(*_):
        raise OSError(errno.EIO, "Input/output error")

    def read():
        raise ValueError("DATA_LOSS: something")

    with pytest.raises(Damaged, match="DATA_LOSS.*; mend it"):
        read_or_judged(read, run, "mend it")
    monkeypatch.setattr(damage, "open", unreadable, raising=False)
    with pytest.raises(CheckpointError, match="just now.*Input/output") as raised:
        read_or_judged(read, run, "mend it")
    assert not isinstance(raised.value, Damaged)


def test_a_fault_that_is_over_the_second_time_is_none():
    answers = iter([ValueError("once"), "read"])

    def read():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert read_or_judged(read, ROOT / "docs", "") == "read"


@pytest.mark.parametrize("moment", ["_set_aside", "save", "_put_back"])
def test_killed_while_a_save_is_replaced_a_whole_one_is_there(run, moment, monkeypatch):
    """A process that is killed does nothing more: what it left is looked at in a copy."""

    class Killed(BaseException):
        pass

    checkpoints, left = RunCheckpoints(run), run.parent / "left"
    owner = checkpoints._best if moment == "save" else checkpoints

    def killed(*_, **__):
        shutil.copytree(run, left)
        raise Killed

    monkeypatch.setattr(owner, moment, killed)
    with pytest.raises(Killed):
        checkpoints.save_best(2, state(7)["params"], 0.9)
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
    value, miou = (7, 0.9) if moment == "_put_back" else (2, 0.5)
    for _ in range(2):  # as it was left, and after a start has put it in order
        np.testing.assert_array_equal(restore_params(left)["w"], value)
        assert best_miou(left) == miou
        RunCheckpoints(left).close()
        assert not (left / "replaced").exists() and os.listdir(left / "best") == ["2"]


def test_a_new_save_of_the_same_step_leaves_nothing_of_the_one_before(run):
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.save_best(2, state(7)["params"], 0.9)
        checkpoints.save_last(2, state(5))
        checkpoints.save_last(3, state(6))
    assert sorted(os.listdir(run)) == ["best", "last"] and sorted(os.listdir(run / "last")) == ["2", "3"]
    assert best_miou(run) == 0.9
    np.testing.assert_array_equal(restore_params(run)["w"], 7)


@pytest.mark.parametrize("lost", ["record", "params"])
def test_of_two_best_ones_that_a_kill_has_left_the_whole_one_is_read(run, lost):
    """The one that was being deleted is not whole any more."""
    with RunCheckpoints(run) as checkpoints:
        shutil.copytree(run / "best" / "2", run / "worse")
        assert checkpoints.save_best(4, state(4)["params"], 0.6)
    shutil.move(run / "worse", run / "best" / "2")
    shutil.rmtree(run / "best" / "2" / lost)
    np.testing.assert_array_equal(restore_params(run)["w"], 4)


def test_orbax_writes_no_tracebacks_of_what_is_told_in_one_line(run):
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    logger = logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        RunCheckpoints(run).close()
        for path in (f"/site-packages{os.sep}orbax{os.sep}checkpoint.py", "/elsewhere/file.py"):
            logger.handle(logger.makeRecord("absl", logging.ERROR, path, 1, f"of {path}", None, None))
    finally:
        logger.removeHandler(handler)
    assert written.getvalue() == "of /elsewhere/file.py\n"


@pytest.mark.slow
def test_killed_at_any_moment_while_the_same_step_is_saved_a_whole_one_is_there(tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import numpy as np
        from lcrf_jax.runfolder.checkpoints import RunCheckpoints
        checkpoints = RunCheckpoints({str(tmp_path)!r})
        for count in range(1, 1000):
            checkpoints.save_best(1, {{"w": np.full(100_000, count, np.float32)}}, count / 1000)
            print(count, flush=True)
    """
    last = 0
    for delay in range(6):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True,
                                   env=os.environ | {"JAX_PLATFORMS": "cpu"})
        with process:
            for _ in range(3 + delay):
                process.stdout.readline()
            process.kill()
        weights = restore_params(tmp_path)["w"]
        assert (weights == weights[0]).all() and best_miou(tmp_path) == pytest.approx(weights[0] / 1000)
        assert weights[0] >= last
        last = weights[0]


@pytest.mark.parametrize("changed", [lambda content: bytes(len(content)), lambda content: content[: len(content) // 2]], ids=["zeros", "half"])
def test_many_arrays_that_cannot_be_read_are_one_error_and_no_word_more(tmp_path, capfd, monkeypatch, changed):
    monkeypatch.setattr(sys, "unraisablehook", lambda fault: print(fault.exc_value, file=sys.stderr))
    arrays = {f"w{number}": np.random.default_rng(number).normal(size=3000).astype(np.float32) for number in range(60)}
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_best(1, arrays, 0.5)
    for path in (tmp_path / "best/1/params").rglob("d/*"):
        path.write_bytes(changed(path.read_bytes()))
    capfd.readouterr()
    for _ in range(3):
        with pytest.raises(Damaged, match="params is damaged"):
            restore_params(tmp_path)
    time.sleep(0.1)  # what is read in the background could come late
    gc.collect()
    assert capfd.readouterr() == ("", "")
