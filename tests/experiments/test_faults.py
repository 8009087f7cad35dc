"""What machines do to a run within its process: every fault of docs/faults.md, and that nothing is lost by it."""

import contextlib
import copy
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from programs import ROOT, TINY, run
from small_runs import Killed, assert_same_trees, lines, small_config

from lcrf_jax.machine import signals
from lcrf_jax.machine.locks import Locked, locked, own_folder
from lcrf_jax.runfolder.checkpoints import RunCheckpoints, restore_params
from lcrf_jax.runfolder.description import CheckpointError
from lcrf_jax.runfolder.metrics import MetricsWriter, metrics_history
from lcrf_jax.train import fit, preparation

SLOW_FIXTURES = ("uninterrupted",)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LCRF_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def prepared(cache):
    with contextlib.redirect_stderr(io.StringIO()):
        return preparation.prepare(small_config(cache, eval_every_epochs=9, epochs=(2, 1)))


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    with contextlib.redirect_stderr(io.StringIO()):
        return fit.train(prepared, tmp_path_factory.mktemp("run"))


# Signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_signal_saves_the_state_after_the_step_and_the_run_goes_on_to_the_same_bits(
    prepared, uninterrupted, tmp_path, monkeypatch, signum, step
):
    before, asked = signal.getsignal(signum), fit._asked_to_stop

    def interrupting(stop, synchronised):
        if next(counter) == step:
            os.kill(os.getpid(), signum)
            time.sleep(0.05)
        return asked(stop, synchronised)

    counter = iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_asked_to_stop", interrupting)
        with pytest.raises(signals.Interrupted, match=f"saved after step {step}; the same command") as raised:
            fit.train(prepared, tmp_path)
    assert raised.value.signum == signum and signal.getsignal(signum) is before
    assert str(step) in os.listdir(tmp_path / "last")
    fit.train(prepared, tmp_path)
    assert_same_trees(restore_params(tmp_path, "last"), restore_params(uninterrupted, "last"))
    assert lines(tmp_path) == lines(uninterrupted)


def test_the_second_signal_ends_at_once():
    with pytest.raises(signals.Interrupted, match="at once") as raised, signals.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert stop.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert raised.value.signum == signal.SIGTERM


@pytest.mark.parametrize(("signum", "message"), [
    (signal.SIGTERM, "terminated; what was"), (signal.SIGINT, "interrupted; what was"),
])  # fmt: skip
def test_a_signal_before_training_ends_the_program_with_a_word(tmp_path, monkeypatch, signum, message):
    def interrupted(config, **_):
        os.kill(os.getpid(), signum)
        time.sleep(5)

    monkeypatch.setattr(preparation, "prepare", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs this in the background
    ended = run("train", TINY, f"--workdir={tmp_path / 'run'}")
    signal.signal(signal.SIGINT, before)
    assert ended.code == 128 + signum and message in ended.err and not (tmp_path / "run").exists()


def test_signals_are_left_alone_in_a_thread():
    seen = []

    def thread():
        with signals.StopRequest() as stop:
            seen.append((stop.signum, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    worker = threading.Thread(target=thread)
    worker.start()
    worker.join()
    assert seen == [(0, before)]


# Two runs


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(prepared, tmp_path):
    message = rf"{tmp_path} is in use by process {os.getpid()} on .*another folder"
    with locked(tmp_path / "lock"), pytest.raises(Locked, match=message):
        fit.train(prepared, tmp_path)
    assert os.listdir(tmp_path) == ["lock"]
    fit.train(prepared, tmp_path)
    with locked(tmp_path / "lock"):
        pass


def test_a_lock_goes_with_its_process(tmp_path):
    code = f"""
        import os, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from lcrf_jax.machine.locks import locked, own_folder
        with locked({str(tmp_path / "lock")!r}), own_folder({str(tmp_path)!r}, ".unfinished-") as folder:
            (folder / "half").write_text("x")
            print("held", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Locked, match=f"process {process.pid} on"), locked(tmp_path / "lock"):
            pass
        with own_folder(tmp_path, ".unfinished-"):
            assert len(list(tmp_path.glob(".unfinished-*/half"))) == 1  # of a process that lives
        process.kill()
    with locked(tmp_path / "lock"), own_folder(tmp_path, ".unfinished-") as own:
        assert list(tmp_path.glob(".unfinished-*")) == [own]
    assert os.listdir(tmp_path) == ["lock"]


# A full disk


@pytest.mark.slow
def test_a_full_disk_is_told_before_anything_is_written(prepared, uninterrupted, tmp_path, monkeypatch):
    disk_usage = fit.RunCheckpoints.__init__.__globals__["shutil"].disk_usage
    space = iter([10**9, 10**9, 10**9, 1000])

    def shrinking(path):
        return disk_usage(path)._replace(free=next(space, 1000))

    frequent = prepared.with_config({**prepared.config, "save_every_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr("lcrf_jax.runfolder.checkpoints.shutil.disk_usage", shrinking)
        with pytest.raises(CheckpointError, match=rf"disk of {tmp_path} is full: .*the state of step 3 is kept; make room"):
            fit.train(frequent, tmp_path)
    assert sorted(os.listdir(tmp_path / "last")) == ["2", "3"]
    fit.train(frequent, tmp_path)
    assert_same_trees(restore_params(tmp_path, "last"), restore_params(uninterrupted, "last"))


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_is_an_error_and_loses_nothing(tmp_path):
    """Files may not grow over a limit, which fails as a full disk does, in the middle of a save."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        import numpy as np
        from lcrf_jax.runfolder.checkpoints import CheckpointError, RunCheckpoints
        state = lambda size: {{"params": {{"w": np.random.default_rng(0).normal(size=size)}}}}
        try:
            with RunCheckpoints({str(tmp_path)!r}) as checkpoints:
                checkpoints.save_last(1, state(1000))
                checkpoints.wait()
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
                checkpoints.save_last(2, state(1_000_000))
        except CheckpointError as error:
            print("refused:", error)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
                           check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert "refused: saving to" in ended.stdout, ended.stderr[-2000:]
    assert "is the disk full? the state of step 1 is kept" in ended.stdout
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_last({"params": {"w": np.zeros(1000)}}).step == 1


def test_metrics_on_a_full_disk_name_their_file(tmp_path):
    """/dev/full takes nothing."""
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with MetricsWriter(tmp_path) as writer:
        writer._lines.close()
        writer._lines = pathlib.Path("/dev/full").open("w")  # noqa: SIM115 - the writer closes it
        with pytest.raises(OSError, match="make room.*metrics.jsonl"):
            writer.write(1, {"loss": 0.5})


# Losses that are not finite


class Poisoned:
    """Records of which some have features that are not numbers."""

    def __init__(self, records, images):
        self._records, self._images = records, images

    def __len__(self):
        return len(self._records)

    def __getitem__(self, position):
        record = self._records[position]
        if int(record.index) in self._images:
            record = record._replace(features={**record.features, "s16": np.full_like(record.features["s16"], np.nan)})
        return record


def with_poison(patch, images):
    training_records = preparation.training_records
    patch.setattr(fit, "training_records", lambda *args: Poisoned(training_records(*args), images))


@pytest.mark.slow
def test_a_batch_without_a_finite_loss_changes_nothing_and_is_counted(prepared, tmp_path, monkeypatch):
    often = prepared.with_config({**prepared.config, "log_every_steps": 1, "save_every_steps": 1})._replace(val=None)
    with monkeypatch.context() as patch:
        with_poison(patch, {5})
        fit.train(often, tmp_path)
    skipped = [record["train/skipped_steps"] for record in metrics_history(tmp_path)]
    bad = [step for step, record in enumerate(metrics_history(tmp_path), 1) if np.isnan(record["train/loss"])]
    assert len(bad) == 3 and skipped[5] == 2  # once in each epoch; the second round counts anew
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restore_params(tmp_path, "last")))


@pytest.mark.slow
def test_a_diverged_run_ends_with_the_names_of_its_images_and_keeps_what_it_has(prepared, tmp_path, monkeypatch):
    config = {**prepared.config, "max_skipped_in_a_row": 2, "log_every_steps": 3, "save_every_steps": 1}
    with monkeypatch.context() as patch:
        with_poison(patch, set(range(24)))
        with pytest.raises(ValueError, match="of 2 steps in a row, from step 1 on, were not finite") as raised:
            fit.train(prepared.with_config(config), tmp_path)
    names = [name for name in prepared.train.names if name in str(raised.value)]
    assert len(names) == 16 and "step 1: " in str(raised.value) and "step 3: " not in str(raised.value)
    assert "learning_rate" in str(raised.value)
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["1"]  # one is less than too many


# Settings


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("batch_size", 4), ("input_size", 64)])
def test_settings_that_make_another_run_are_refused(prepared, uninterrupted, name, value):
    config = {**prepared.config, name: value}
    with pytest.raises(CheckpointError, match=rf"{uninterrupted} holds a run of other settings \(config.{name} was"):
        fit.train(prepared.with_config(config), uninterrupted)


def test_other_settings_are_told(prepared, uninterrupted, tmp_path, monkeypatch, capsys):
    """Against those of the newest state: what a start left that was killed before it saved is forgotten."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(max(run.glob("last/[0-9]*"), key=lambda path: int(path.name)))
    config = copy.deepcopy(prepared.config)
    config["optimizer"]["learning_rate"] = 0.5

    def killed(*_):
        raise Killed

    monkeypatch.setattr(fit, "_train_round", killed)
    with pytest.raises(Killed):
        fit.train(prepared.with_config(config), run)
    assert "other setting than before: config.optimizer.learning_rate was 0.001, is 0.5" in capsys.readouterr().out
    with pytest.raises(Killed):
        fit.train(prepared, run)
    assert "other setting" not in capsys.readouterr().out


def test_a_batch_that_the_devices_cannot_share_is_told_before_anything_is_computed(tmp_path):
    with pytest.raises(ValueError, match="batch_size: 6 images cannot be shared by 4 device.*a multiple of 4, such as 4"):
        preparation.prepare(small_config(tmp_path, batch_size=6))
    with pytest.raises(ValueError, match="batch_size: 8 images .* in 3 part.*a multiple of 12, such as 12"):
        preparation.prepare(small_config(tmp_path, accumulation_steps=3))
    assert not any(tmp_path.iterdir())
