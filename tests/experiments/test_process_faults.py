"""Processes that are killed, that do not come, and that share a run: nothing is lost by it."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from forked import Parent
from PIL import Image
from programs import ROOT, TINY, run
from small_runs import lines

from lcrf_jax.data.opening import open_source
from lcrf_jax.runfolder.checkpoints import restore_params

SMALL = ("--config.data.options.num_train=24", "--config.data.options.num_val=4", "--config.network.taps=('head', 's16')",
         "--config.network.widths=(16, 12)", "--config.class_maps.grid=6", "--config.class_maps.extra_sizes=()")

SLOW_FIXTURES = ("of_a_pair",)
# 24 steps; scored at the end of each round, and saved often enough for a kill to come between.
SHARED_STEPS = ("train", TINY, *SMALL, "--config.epochs=(4,4)", "--config.eval_every_epochs=4", "--config.save_every_steps=4")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LCRF_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def start(cache, tmp_path_factory):
    """Starts a program in a moment."""
    with Parent(tmp_path_factory.mktemp("told")) as parent:
        yield functools.partial(parent.start, cache=cache)


@pytest.fixture(scope="module")
def pair(start):
    """Starts two joined processes of a program."""

    def both(program, *arguments, num_devices=2):
        joined = ("--distributed", f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
        return [start(program, *arguments, *joined, f"--process_id={i}", num_devices=num_devices) for i in range(2)]

    return both


def assert_end_well(*processes):
    for process in processes:
        assert process.finish() == 0, process.text


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


@pytest.fixture(scope="module")
def of_a_pair(pair, tmp_path_factory):
    """The run of two processes with two devices each that nothing has interrupted."""
    workdir = tmp_path_factory.mktemp("pair")
    assert_end_well(*pair(*SHARED_STEPS, f"--workdir={workdir}"))
    return workdir


def digest_of(workdir):
    return [leaf.tobytes() for leaf in jax.tree.leaves(restore_params(workdir, "last"))]


@pytest.mark.slow
def test_a_finished_run_that_several_processes_start_again_is_scored_or_refused_by_all_of_them(pair, of_a_pair):
    """The first one decides alone whether it is finished: it reads the parameters, and the others do not wait for that."""
    again = pair(*SHARED_STEPS, f"--workdir={of_a_pair}")
    assert_end_well(*again)
    assert "is finished: all 24 steps are done; nothing is trained" in again[0].text
    for process in pair(*SHARED_STEPS, f"--workdir={of_a_pair}", "--config.seed=1"):
        assert process.finish() == 1 and "config.seed was 0, is 1" in process.text, process.text


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_program_leaves_cleanly_on_a_signal(start, tmp_path, signum):
    arguments = ("train", TINY, *SMALL, "--config.rounds=1", "--config.epochs=(40,)", f"--workdir={tmp_path}")
    process = start(*arguments, num_devices=4)
    while not (tmp_path / "last" / "2").exists():
        assert process.poll() is None, process.text
        time.sleep(0.05)
    os.kill(process.pid, signum)
    assert process.finish() == 128 + signum, process.text
    assert "saved after step" in process.text and "Traceback" not in process.text
    step = int(process.text.rsplit("saved after step ", 1)[1].split(";")[0])
    assert str(step) in os.listdir(tmp_path / "last")
    other = start(*arguments, "--config.seed=1", num_devices=4)
    assert other.finish() == 1 and "config.seed was 0, is 1" in other.text


def test_one_and_several_processes_train_the_same_network(start, pair, of_a_pair, tmp_path):
    """24 steps on one device, on four of one process, and on two of each of two processes."""
    for number in (1, 4):
        assert_end_well(start(*SHARED_STEPS, f"--workdir={tmp_path / str(number)}", num_devices=number))
    one = restore_params(tmp_path / "1", "last")
    for other in (tmp_path / "4", of_a_pair):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), restore_params(other, "last"), one)
    assert [record["step"] for record in lines(of_a_pair)] == [record["step"] for record in lines(tmp_path / "1")]
    # Scores: the parameters of one run, counted by one process and by two.
    scored = ("evaluate", f"--checkpoint={tmp_path / '1'}", "--crf", "--parts=2")
    assert_end_well(start(*scored))
    counts = (tmp_path / "1" / "results_val_crf.json").read_text()
    assert '"val[1::2]"' in counts
    (tmp_path / "1" / "results_val_crf.json").unlink()
    assert_end_well(*pair(*scored, num_devices=1))
    assert (tmp_path / "1" / "results_val_crf.json").read_text() == counts


def test_a_pair_that_lost_one_of_its_processes_goes_on_to_the_same_bits(pair, of_a_pair, tmp_path):
    both = pair(*SHARED_STEPS, f"--workdir={tmp_path}")
    while not (tmp_path / "last" / "4").exists():
        assert both[0].poll() is None, both[0].text
        time.sleep(0.05)
    both[0].kill()
    assert both[1].finish(timeout=120) != 0
    assert_end_well(*pair(*SHARED_STEPS, f"--workdir={tmp_path}"))
    assert digest_of(tmp_path) == digest_of(of_a_pair)


@pytest.mark.slow
def test_two_processes_label_500_photographs_though_one_is_killed(tiny_run, start, tmp_path):
    checkpoint, photos, masks = tiny_run[0], tmp_path / "photos", tmp_path / "masks"
    source = open_source("textures", "val", seed=2, size=96, num_train=1, num_val=25)
    images = [source[i].image for i in range(25)]
    for i in range(500):
        path = photos / f"{i % 7}" / f"photo {i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i % 25][: 60 + i % 30]).save(path)
    arguments = ("predict", f"--checkpoint={checkpoint}", f"--images={photos}/**/*.jpg", f"--out={masks}",
                 "--num_processes=2")  # fmt: skip
    start = functools.partial(start, compiled_well=True)
    first, second = (start(*arguments, f"--process_id={i}") for i in range(2))
    shares = sorted(photos.glob("*/*.jpg"))[::2], sorted(photos.glob("*/*.jpg"))[1::2]

    def done(share):
        return sum((masks / path.relative_to(photos)).with_suffix(".png").exists() for path in share)

    while min(map(done, shares)) < 20:
        assert first.poll() is None and second.poll() is None
        time.sleep(0.02)
    first.kill()
    # A mask that is being written lies in a hidden folder, and may be gone before it is looked at.
    before = {path: path.stat().st_mtime_ns for path in masks.glob("[!.]*/*.png")}
    again = start(*arguments, "--process_id=0")
    assert_end_well(again, second)
    assert "250 of them are the share of this process" in again.text and "were done before" in again.text
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
