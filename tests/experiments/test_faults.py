"""What machines do to a run: every fault of docs/faults.md, and that nothing is lost by it.

Those that need processes of their own are slow: a part of `make test-all`.
"""

import contextlib
import copy
import io
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image
from programs import ROOT, TINY, finish, run, start
from small_runs import assert_same_trees, lines, small_config

from lcrf_jax.data.opening import open_source
from lcrf_jax.machine import signals
from lcrf_jax.machine.locks import Locked, locked, own_folder
from lcrf_jax.runfolder.checkpoints import RunCheckpoints, restore_params
from lcrf_jax.runfolder.description import CheckpointError
from lcrf_jax.runfolder.metrics import MetricsWriter, metrics_history
from lcrf_jax.train import fit, preparation

SMALL = ("--config.data.options.num_train=24", "--config.data.options.num_val=4", "--config.network.taps=('head', 's16')",
         "--config.network.widths=(16, 12)", "--config.class_maps.grid=6", "--config.class_maps.extra_sizes=()")


SLOW_FIXTURES = ("uninterrupted", "of_a_pair")
SHARED_STEPS = ("train", TINY, *SMALL, "--config.epochs=(4,4)")  # 24


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
    def interrupted(config):
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


def test_other_settings_are_told(prepared, uninterrupted, capsys):
    config = copy.deepcopy(prepared.config)
    config["optimizer"]["learning_rate"] = 0.5
    fit.train(prepared.with_config(config), uninterrupted)
    assert "other setting than before: config.optimizer.learning_rate was 0.001, is 0.5" in capsys.readouterr().out
    fit.train(prepared, uninterrupted)
    capsys.readouterr()
    fit.train(prepared, uninterrupted)
    assert "other setting" not in capsys.readouterr().out


def test_a_batch_that_the_devices_cannot_share_is_told_before_anything_is_computed(tmp_path):
    with pytest.raises(ValueError, match="batch_size: 6 images cannot be shared by 4 device.*a multiple of 4, such as 4"):
        preparation.prepare(small_config(tmp_path, batch_size=6))
    with pytest.raises(ValueError, match="batch_size: 8 images .* in 3 part.*a multiple of 12, such as 12"):
        preparation.prepare(small_config(tmp_path, accumulation_steps=3))
    assert not any(tmp_path.iterdir())


# Processes


@pytest.mark.parametrize(("flags", "message"), [
    (["--num_processes=2"], "of use with --distributed alone"),
    (["--distributed", "--num_processes=2"], "go together"),
    (["--distributed", "--coordinator=here", "--num_processes=2", "--process_id=0"], "expected host:port, got 'here'"),
    (["--distributed", "--coordinator=here:1", "--num_processes=2", "--process_id=2"], "expected 0 to 1 for 2 processes"),
])  # fmt: skip
def test_flags_of_processes_that_do_not_fit_are_refused(tmp_path, flags, message):
    ended = run("train", TINY, f"--workdir={tmp_path}", *flags)
    assert ended.code == 1 and message in ended.err


@pytest.mark.slow
def test_a_coordinator_that_does_not_answer_is_named():
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from lcrf_jax.machine import processes
        try:
            processes.join("127.0.0.1:9", 2, 1, timeout=1)
        except processes.ProcessError as error:
            print(error)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
                           check=False)
    assert "no answer from process 0 at 127.0.0.1:9 within 1 s" in ended.stdout, ended.stderr


@pytest.mark.slow
def test_processes_that_do_not_come_are_waited_for_with_a_word():
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from lcrf_jax.machine import processes
        processes.join("127.0.0.1:{free_port()}", 3, 0, timeout=1)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
                           check=False)
    assert ended.returncode != 0 and "waiting for 2 more processes at 127.0.0.1:" in ended.stderr, ended.stderr


def free_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def pair(program, *arguments, num_devices=2):
    """Two joined processes of a program."""
    joined = ("--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    return [start(program, *arguments, *joined, f"--process_id={i}", num_devices=num_devices) for i in range(2)]


@pytest.fixture(scope="module")
def of_a_pair(cache, tmp_path_factory):
    """The run of two processes with two devices each that nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("pair")
    for ended in map(finish, pair(*SHARED_STEPS, f"--workdir={workdir}")):
        assert ended.code == 0, ended.err
    return workdir


def digest_of(workdir):
    return [leaf.tobytes() for leaf in jax.tree.leaves(restore_params(workdir, "last"))]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(cache, tmp_path):
    """Some while the program starts, some in the first round, in the posteriors, in the second round, in a save."""
    arguments = ("train", TINY, *SMALL, "--config.epochs=(12,12)", "--config.save_every_steps=1",
                 "--config.eval_every_epochs=2")  # 72 steps
    whole = finish(start(*arguments, f"--workdir={tmp_path / 'whole'}"))
    assert whole.code == 0, whole.err
    begun = time.monotonic()
    again = start(*arguments, f"--workdir={tmp_path / 'whole'}")
    next(line for line in again.stdout if "continuing after step" in line)
    again.kill()
    length, rng, reached = time.monotonic() - begun, random.Random(0), [0]

    def newest():
        states = (tmp_path / "killed" / "last").glob("*")
        return max((int(path.name) for path in states if path.name.isdigit()), default=0)

    for number in range(20):
        process = start(*arguments, f"--workdir={tmp_path / 'killed'}")
        if number % 3 == 0:  # while it starts
            time.sleep(rng.uniform(0.1, 1.1) * length)
        else:  # one to three steps later, perhaps in a save
            goal = reached[-1] + rng.randint(1, 3)
            while newest() < goal and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, f"the run ended by itself after {number} kills: {finish(process)}"
        process.kill()
        process.wait()
        reached.append(newest())
    print("newest state after each kill:", reached)
    assert len(set(reached)) >= 5 and reached == sorted(reached)
    last = finish(start(*arguments, f"--workdir={tmp_path / 'killed'}"))
    assert last.code == 0, last.err
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    for which in ("best", "last"):
        assert_same_trees(restore_params(tmp_path / "killed", which), restore_params(tmp_path / "whole", which))


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_program_leaves_cleanly_on_a_signal(cache, tmp_path, signum):
    arguments = ("train", TINY, *SMALL, "--config.epochs=(40,)", f"--workdir={tmp_path}")
    process = start(*arguments)
    while not (tmp_path / "last" / "2").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.05)
    process.send_signal(signum)
    ended = finish(process)
    assert ended.code == 128 + signum and "saved after step" in ended.err and "Traceback" not in ended.err
    step = int(ended.err.rsplit("saved after step ", 1)[1].split(";")[0])
    assert str(step) in os.listdir(tmp_path / "last")
    other = finish(start(*arguments[:-2], "--config.epochs=(40,)", f"--workdir={tmp_path}", "--config.seed=1"))
    assert other.code == 1 and "config.seed was 0, is 1" in other.err


def test_one_and_several_processes_train_the_same_network(cache, of_a_pair, tmp_path):
    """24 steps on one device, on four of one process, and on two of each of two processes."""
    for number in (1, 4):
        ended = finish(start(*SHARED_STEPS, f"--workdir={tmp_path / str(number)}", num_devices=number))
        assert ended.code == 0, ended.err
    one = restore_params(tmp_path / "1", "last")
    for other in (tmp_path / "4", of_a_pair):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), restore_params(other, "last"), one)
    assert [record["step"] for record in lines(of_a_pair)] == [record["step"] for record in lines(tmp_path / "1")]
    # Scores: the parameters of one run, counted by one process and by two.
    alone = finish(start("evaluate", f"--checkpoint={tmp_path / '1'}", "--crf", num_devices=1))
    assert alone.code == 0, alone.err
    counts = (tmp_path / "1" / "results_val_crf.json").read_text()
    (tmp_path / "1" / "results_val_crf.json").unlink()
    for ended in map(finish, pair("evaluate", f"--checkpoint={tmp_path / '1'}", "--crf", num_devices=1)):
        assert ended.code == 0, ended.err
    assert (tmp_path / "1" / "results_val_crf.json").read_text() == counts


def test_a_pair_that_lost_one_of_its_processes_goes_on_to_the_same_bits(cache, of_a_pair, tmp_path):
    both = pair(*SHARED_STEPS, f"--workdir={tmp_path}")
    while not (tmp_path / "last" / "4").exists():
        assert both[0].poll() is None, finish(both[0])
        time.sleep(0.05)
    both[0].kill()
    assert both[1].wait(timeout=120) != 0
    for ended in map(finish, pair(*SHARED_STEPS, f"--workdir={tmp_path}")):
        assert ended.code == 0, ended.err
    assert digest_of(tmp_path) == digest_of(of_a_pair)


@pytest.mark.slow
def test_two_processes_label_500_photographs_though_one_is_killed(tiny_run, cache, tmp_path):
    checkpoint, photos, masks = tiny_run[0], tmp_path / "photos", tmp_path / "masks"
    source = open_source("textures", "val", seed=2, size=96, num_train=1, num_val=25)
    images = [source[i].image for i in range(25)]
    for i in range(500):
        path = photos / f"{i % 7}" / f"photo {i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i % 25][: 60 + i % 30]).save(path)
    arguments = ("predict", f"--checkpoint={checkpoint}", f"--images={photos}/**/*.jpg", f"--out={masks}",
                 "--num_processes=2")  # fmt: skip
    first, second = (start(*arguments, f"--process_id={i}", num_devices=1) for i in range(2))
    shares = sorted(photos.glob("*/*.jpg"))[::2], sorted(photos.glob("*/*.jpg"))[1::2]

    def done(share):
        return sum((masks / path.relative_to(photos)).with_suffix(".png").exists() for path in share)

    while min(map(done, shares)) < 20:
        assert first.poll() is None and second.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    before = {path: path.stat().st_mtime_ns for path in masks.glob("*/*.png")}
    again = finish(start(*arguments, "--process_id=0", num_devices=1))
    ended = finish(second)
    assert again.code == ended.code == 0, again.err + ended.err
    assert "250 of them are the share of this process" in again.out and "were done before" in again.out
    found = sorted(masks.glob("**/*"))
    assert sum(path.suffix == ".png" for path in found) == 500
    assert not [path for path in found if path.name.startswith(".")]
    for path in masks.glob("*/*.png"):
        with Image.open(path) as mask, Image.open(photos / path.relative_to(masks).with_suffix(".jpg")) as photo:
            mask.load()
            assert mask.mode == "P" and mask.size == photo.size
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())  # none twice
    once_more = run("predict", *arguments[1:-1])
    assert "500 of these were done before" in once_more.out and once_more.code == 0
    other = run("predict", *arguments[1:-1], "--crf")
    assert other.code == 1 and "holds masks made with crf False and not True; give another --out" in other.err


