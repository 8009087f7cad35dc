"""Programs that are killed at random moments, as often as LCRF_TEST_KILLS says: what they leave is what they leave undisturbed.

    LCRF_TEST_KILLS=100 python -m pytest -n 0 tests/experiments/test_kills.py -s
"""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from forked import Parent
from PIL import Image
from programs import TINY
from small_runs import assert_same_trees, lines

from lcrf_jax.data.opening import open_source
from lcrf_jax.runfolder.checkpoints import restore_params

NUM_KILLS = int(os.environ.get("LCRF_TEST_KILLS", "20"))
# Of all kills: while features and class maps are made, in training, in evaluation, in prediction.
PREPARING, EVALUATING, PREDICTING = max(NUM_KILLS // 5, 2), max(NUM_KILLS // 10, 1), max(NUM_KILLS // 5, 2)
TRAINING = NUM_KILLS - PREPARING - EVALUATING - PREDICTING
NUM_EPOCHS = TRAINING // 2 + 4  # of three steps, in each of two rounds; a kill comes one to three steps after the last
NUM_PHOTOGRAPHS = 8 * PREDICTING + 16  # a batch, which is the most that comes from one kill to the next, and a rest
TRAIN = ("train", TINY, "--config.data.options.num_train=24", "--config.data.options.num_val=4",
         "--config.network.taps=('head', 's16')", "--config.network.widths=(16, 12)", "--config.class_maps.grid=6",
         "--config.class_maps.extra_sizes=(128,)", f"--config.epochs=({NUM_EPOCHS},{NUM_EPOCHS})", "--config.save_every_steps=1",
         "--config.eval_every_epochs=2")  # fmt: skip


class Programs:
    """Starts programs, each with the cache of its own, and kills them."""

    def __init__(self, parent, cache):
        self._parent, self.cache = parent, cache

    def finished(self, command):
        process = self._parent.start(*command, cache=self.cache)
        assert process.finish() == 0, process.text

    def seconds_until(self, command, there):
        """How long a program takes until something is there; it is killed then."""
        since, process = time.monotonic(), self._parent.start(*command, cache=self.cache)
        while not there() and process.poll() is None:
            time.sleep(0.01)
        assert process.kill() in (0, -signal.SIGKILL), process.text
        return time.monotonic() - since

    def killed(self, command, count, moment):
        """Start a program and kill it, many times; `moment` waits for when that is to be. One that was done before is no kill."""
        done, since = 0, time.monotonic()
        while done < count:
            process = self._parent.start(*command, cache=self.cache)
            moment(done, process)
            code = process.kill()
            assert code in (0, -signal.SIGKILL), process.text
            done += code != 0
        print(f"{count} kills of {command[0]}, {time.monotonic() - since:.0f} s", flush=True)


def newest(workdir):
    return max((int(path.name) for path in (workdir / "last").glob("*") if path.name.isdigit()), default=0)


def entries_of(cache):
    """Name of each entry and array of a cache -> what it holds; what is unfinished is none."""
    return {(path.parent.name, path.name): path.read_bytes() for path in cache.glob("*/*.npy") if path.parent.name[0] != "."}


def trained_though_killed(rng, tmp_path, undisturbed, disturbed):
    """The run that nothing has disturbed, and the one that was killed while it prepared and trained."""
    whole, again = tmp_path / "whole", tmp_path / "killed"
    undisturbed.finished((*TRAIN, f"--workdir={whole}"))
    shutil.rmtree(undisturbed.cache)
    cold = tmp_path / "cold"
    seconds = undisturbed.seconds_until((*TRAIN, f"--workdir={cold}"), lambda: newest(cold))
    command = (*TRAIN, f"--workdir={again}")

    def in_preparation(*_):
        until, before = time.monotonic() + rng.uniform(0.1, 1.0) * seconds, newest(again)
        while time.monotonic() < until and newest(again) == before:
            time.sleep(0.01)

    disturbed.killed(command, PREPARING, in_preparation)
    reached = [newest(again)]

    def in_training(number, process):
        if number % 4 == 0:  # while it starts
            time.sleep(rng.uniform(0.05, 0.9) * seconds)
        else:  # one to three steps later, perhaps in a save
            goal = reached[-1] + rng.randint(1, 3)
            while newest(again) < goal and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        reached.append(newest(again))

    disturbed.killed(command, TRAINING, in_training)
    disturbed.finished(command)
    print("newest state after each kill:", reached)
    assert reached == sorted(reached) and len(set(reached)) > TRAINING // 3
    return whole, again


def photographs(folder):
    source = open_source("textures", "val", seed=2, size=96, num_train=1, num_val=8)
    images = [source[i].image for i in range(8)]
    folder.mkdir()
    for i in range(NUM_PHOTOGRAPHS):
        Image.fromarray(images[i % 8][: 64 + 16 * (i % 3)]).save(folder / f"photo {i}.jpg")
    return folder


@pytest.mark.slow
def test_kills_at_random_moments_of_every_program_change_no_bit(tmp_path):
    rng = random.Random(NUM_KILLS)
    with Parent(tmp_path) as parent:
        undisturbed, disturbed = (Programs(parent, tmp_path / name) for name in ("cache", "cache of the killed"))
        whole, again = trained_though_killed(rng, tmp_path, undisturbed, disturbed)
        assert lines(again) == lines(whole)
        for which in ("best", "last"):
            assert_same_trees(restore_params(again, which), restore_params(whole, which))
        assert_same_results(rng, whole, again, undisturbed, disturbed)
        assert_same_predictions(rng, tmp_path, whole, undisturbed, disturbed)
    one, other = entries_of(undisturbed.cache), entries_of(disturbed.cache)
    assert one and one.keys() <= other.keys()
    assert [key for key in one if one[key] != other[key]] == []


def assert_same_results(rng, whole, again, undisturbed, disturbed):
    one, other = (run / "results_val_crf.json" for run in (whole, again))
    seconds = undisturbed.seconds_until(("evaluate", f"--checkpoint={whole}", "--crf"), one.exists)
    command = ("evaluate", f"--checkpoint={again}", "--crf")
    disturbed.killed(command, EVALUATING, lambda *_: time.sleep(rng.uniform(0.05, 0.8) * seconds))
    disturbed.finished(command)
    undisturbed.finished(("evaluate", f"--checkpoint={whole}", "--crf"))
    assert one.read_bytes() == other.read_bytes() and json.loads(one.read_text())["images"] == 4


def assert_same_predictions(rng, tmp_path, whole, undisturbed, disturbed):
    photos, masks = photographs(tmp_path / "photos"), [tmp_path / "masks", tmp_path / "masks of the killed"]
    predict = [("predict", f"--checkpoint={whole}", f"--images={photos}", f"--out={out}") for out in masks]
    undisturbed.finished(predict[0])

    def amid_masks(_, process):
        goal = len(list(masks[1].glob("*.png"))) + rng.randint(1, 4)
        while len(list(masks[1].glob("*.png"))) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.01))

    disturbed.killed(predict[1], PREDICTING, amid_masks)
    disturbed.finished(predict[1])
    assert_same_masks(*masks)


def assert_same_masks(whole, again):
    """The same files with the same pixels, a line for each, and nothing that is half done."""
    names = [sorted(path.relative_to(out).as_posix() for path in out.glob("**/*") if path.is_file()) for out in (whole, again)]
    assert names[0] == names[1] and len([name for name in names[0] if name.endswith(".png")]) == NUM_PHOTOGRAPHS
    for name in filter(lambda name: name.endswith((".png", ".jpg")), names[0]):
        with Image.open(whole / name) as one, Image.open(again / name) as other:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    records = [sorted(map(mask_of, (out / "predictions.jsonl").read_text().splitlines())) for out in (whole, again)]
    assert records[0] == records[1] and len(set(records[0])) == NUM_PHOTOGRAPHS


def mask_of(line):
    record = json.loads(line)
    return record["mask"], json.dumps(record["classes"])
