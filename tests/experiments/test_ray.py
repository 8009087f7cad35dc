"""`predict --engine=ray` in an environment of its own on top of this one: a worker is killed, and the masks are those of the plain run.

    LCRF_TEST_RAY=2000 python -m pytest -n 0 tests/experiments/test_ray.py -s

labels so many photographs, both ways twice, in turns, and prints what each has cost: seconds, those from the first mask to the
last, and seconds of the processor of all processes. LCRF_TEST_RAY_MODEL=animals takes another model than the tiny run.
"""

import contextlib
import json
import os
import pathlib
import secrets
import signal
import subprocess
import time

import pyarrow.parquet
import pytest
from environments import on_top
from PIL import Image
from programs import ROOT, flags_for

from lcrf_jax.data.opening import open_source

NUM_PHOTOGRAPHS = int(os.environ.get("LCRF_TEST_RAY", "60"))
TURNS = 2 if "LCRF_TEST_RAY" in os.environ else 1
MODEL = os.environ.get("LCRF_TEST_RAY_MODEL")
MARK = "LCRF_TEST_RAY_MARK"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    return on_top(tmp_path_factory.mktemp("ray"), ROOT / "experiments" / "ray_requirements.txt")


class Program:
    """A program and all processes that it starts, known by a mark in their environments.

    Args:
      command: the arguments.
    """

    def __init__(self, *command):
        self.mark = secrets.token_hex(8)
        environment = os.environ | {MARK: self.mark, "XLA_FLAGS": flags_for(1), "RAY_DEDUP_LOGS": "0"}
        self._since, self._cpu = time.monotonic(), {}
        self._process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, text=True,
                                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    def processes(self):
        """dict from number to command line."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
                    ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
                    self._cpu[folder.name] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        return found

    def finished(self, masks, kill_at=None):
        """(exit code, text, seconds, of the processor); a worker is killed once there are so many masks."""
        killed = kill_at is None
        while True:
            running = self.processes()
            if not killed and len(list(masks.glob("*.png"))) >= kill_at:
                worker = next(number for number, name in sorted(running.items()) if name.startswith("ray::MapWorker"))
                os.kill(worker, signal.SIGKILL)
                killed = True
            try:
                text = self._process.communicate(timeout=0.3)[0]
                break
            except subprocess.TimeoutExpired:
                continue
        assert killed, text
        return self._process.returncode, text, time.monotonic() - self._since, sum(self._cpu.values())


def photographs(folder):
    """Some of three heights."""
    source = open_source("textures", "val", seed=3, size=128, num_train=1, num_val=NUM_PHOTOGRAPHS)
    folder.mkdir()
    for i in range(NUM_PHOTOGRAPHS):
        image = source[i].image
        Image.fromarray(image[: image.shape[0] - 16 * (i % 3)]).save(folder / f"{i:05}.jpg", quality=92)
    return folder


def told(name, masks, seconds, cpu):
    times = [path.stat().st_ctime for path in masks.glob("*.png")]  # the other time is that of the photograph
    print(f"{name:<6} {len(times)} masks  {seconds:7.1f} s  {max(times) - min(times):7.1f} s from the first mask to the last  "
          f"{cpu:7.1f} s of the processor", flush=True)  # fmt: skip


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_worker_costs_nothing_but_its_batch(python, checkpoint, tmp_path):
    photos, results = photographs(tmp_path / "photos"), {}
    command = (python, "-m", "experiments.predict", f"--checkpoint={MODEL or checkpoint}", f"--images={photos}", "--crf")
    for turn in range(TURNS):
        for engine, flags in (("local", ()), ("ray", ("--engine=ray", "--workers=2"))):
            out = tmp_path / f"{engine} {turn}"
            kill_at = NUM_PHOTOGRAPHS // 3 if engine == "ray" and turn == 0 else None
            code, text, *cost = Program(*command, *flags, f"--out={out}").finished(out, kill_at)
            assert code == 0 and f"{NUM_PHOTOGRAPHS} masks in" in text, text
            told(f"{engine} {turn}", out, *cost)
            results[engine, turn] = contents(out)
    plain, records = results["local", 0], {"predictions.json", "predictions.jsonl", "predictions.parquet"}
    assert len([name for name in plain if name.endswith(".png")]) == NUM_PHOTOGRAPHS
    for (engine, turn), found in results.items():
        assert {name: found[name] for name in found if name not in records} == {name: plain[name] for name in plain if name not in records}
        assert found["predictions.json"] == plain["predictions.json"]
        assert engine == "local" or check_table(tmp_path / f"ray {turn}", tmp_path / "local 0")
    assert_goes_on(command, tmp_path / "ray 0", photos)


def check_table(out, plain):
    """Of each photograph one row, with the numbers of the plain run."""
    rows = pyarrow.parquet.read_table(out / "predictions.parquet").to_pylist()
    lines = [json.loads(line) for line in (plain / "predictions.jsonl").read_text().splitlines()]
    for row in rows:
        row["classes"] = {entry.pop("name"): entry for entry in row["classes"]}
    assert rows == sorted(lines, key=lambda line: line["mask"]) and len(rows) == NUM_PHOTOGRAPHS
    return True


def assert_goes_on(command, out, photos):
    """What is missing is made, what is there is not, and a photograph that cannot be read is told of."""
    before = contents(out)
    (out / "00003.png").unlink()
    (photos / "broken.jpg").write_bytes((photos / "00003.jpg").read_bytes()[:300])
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    code, text, *_ = Program(*command, "--engine=ray", "--workers=1", f"--out=file://{out}", "--progress=quiet").finished(out)
    assert code == 1 and f"{NUM_PHOTOGRAPHS - 1} of these were done before" in text, text
    assert text.rstrip().splitlines()[-1].startswith(f"{photos / 'broken.jpg'}: {photos / 'broken.jpg'} is damaged or cut short"), text
    assert {path: path.stat().st_mtime_ns for path in times} == times
    after = contents(out)
    assert {name: after[name] for name in after if not name.endswith(".parquet")} == {
        name: before[name] for name in before if not name.endswith(".parquet")}
    assert check_table(out, out.with_name("local 0"))


def test_urls_within_this_process(python):
    """The tests of test_prediction_urls.py, which need the extra."""
    command = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", ROOT / "tests/experiments/test_prediction_urls.py"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "skipped" not in ended.stdout, ended.stdout
