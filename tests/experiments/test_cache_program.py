"""The program that lists and cleans the cache, and programs that need no device and start none."""

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image
from programs import ROOT, assert_refused, run

from experiments import prediction_plan, predictions
from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.machine.entries import entries


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with an old entry and a new one."""
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for kind, days in (("views", 40), ("tag classifier", 0)):
        with cached_arrays(tmp_path / "cache", {"kind": kind}, 10, about=f"/photos of {kind}") as arrays:
            arrays.write(rows=np.zeros((10, 5000), np.float32))
        then = time.time() - days * 86400
        [entry] = [entry for entry in entries(tmp_path / "cache") if entry.kind == kind]
        os.utime(entry.path / "identity.json", (then, then))
    del arrays
    return tmp_path / "cache"


def test_list_says_what_there_is_and_how_large(cache, tmp_path):
    blob = tmp_path / "hub" / "hub" / "models--timm--vgg16" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(2_000_000))
    ended = run("cache", "list")
    assert ended.code == 0, ended.err
    assert "40.0 days  views" in ended.out and "/photos of views" in ended.out and "tag classifier" in ended.out
    assert f"{cache}: 2 entries, " in ended.out and "kB; no bound is set" in ended.out and "vgg16, 2.0 MB" in ended.out
    assert len(entries(cache)) == 2


def test_the_size_of_the_cache_is_told_after_training(tiny_run):
    assert "; python -m experiments.cache list tells what it holds" in tiny_run[1].out, tiny_run[1]


def test_clean_removes_what_is_old_or_all_and_only_tells_in_a_dry_run(cache):
    dry = run("cache", "clean", "--older_than_days=30", "--dry_run")
    assert "would remove" in dry.out and "views" in dry.out and "classifier" not in dry.out and len(entries(cache)) == 2
    assert "freed, 0 entries in use stay" in run("cache", "clean", "--older_than_days=30").out
    assert [entry.kind for entry in entries(cache)] == ["tag classifier"]
    assert run("cache", "clean", "--all").code == 0 and entries(cache) == []


def test_clean_leaves_what_is_in_use_and_says_so(cache):
    with cached_arrays(cache, {"kind": "views"}, 10) as arrays:
        pass
    ended = run("cache", "clean", "--all")
    assert "in use, stays" in ended.out and "1 entries in use stay" in ended.out
    assert [entry.kind for entry in entries(cache)] == ["views"] and arrays.arrays["rows"].sum() == 0


def test_what_is_not_understood_is_refused(cache, monkeypatch):
    for arguments in ((), ("purge",), ("list", "clean")):
        assert_refused(run("cache", *arguments), "expected one of list and clean, got")
    for arguments in (("clean",), ("clean", "--all", "--older_than_days=3")):
        assert_refused(run("cache", *arguments), "either --older_than_days=30, or another number, or --all")
    for flag in ("--all", "--dry_run", "--older_than_days=3"):
        assert_refused(run("cache", "list", flag), f"list: {flag.split('=')[0]} would change nothing, list shows all; leave it out")
    monkeypatch.setenv("LCRF_JAX_CACHE_GB", "many")
    assert_refused(run("cache", "list"), "LCRF_JAX_CACHE_GB: expected the most gigabytes")
    monkeypatch.setenv("LCRF_JAX_CACHE", str(cache / "nowhere"))
    assert "there is no cache" in run("cache", "clean", "--all").out


@pytest.mark.parametrize("tells", [True, False], ids=["this disk", "a disk without case"])
def test_masks_that_differ_by_case_alone_are_refused_where_one_would_replace_the_other(tmp_path, monkeypatch, tells):
    for name in ("a.jpg", "A.jpg"):
        Image.new("RGB", (4, 5)).save(tmp_path / name)
    if not tells:
        monkeypatch.setattr(prediction_plan, "own_folder", lambda *_: contextlib.nullcontext(tmp_path))
        (tmp_path / "CASE").touch()
        with pytest.raises(ValueError, match="does not tell upper from lower case: rename one"):
            prediction_plan.planned_outputs([str(tmp_path)], tmp_path / "masks", overlays=False, probabilities=False)
        return
    planned = prediction_plan.planned_outputs([str(tmp_path)], tmp_path / "masks", overlays=False, probabilities=False)
    assert len(planned) == 2


def outputs(folder, name):
    return prediction_plan.Outputs(folder / name, None, None)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOENT, errno.EILSEQ])
def test_letters_that_the_disk_does_not_have_are_a_problem_of_one_photograph(tmp_path, monkeypatch, number):
    replace = os.replace

    def exfat(source, target):
        if ":" in str(target):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", exfat)
    write = (tmp_path, np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), np.uint8), None, np.array(["a", "b"]))
    assert "a:b.png); rename it" in predictions.write_outputs(outputs(tmp_path, "a:b.png"), *write)
    assert predictions.write_outputs(outputs(tmp_path, "b.png"), *write) is None


def test_a_name_that_the_disk_does_not_take_is_a_problem_of_one_photograph(tmp_path):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    write = (unfinished, np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), np.uint8), None, np.array(["a", "b"]))
    problem = predictions.write_outputs(outputs(tmp_path, "x" * 252 + ".png"), *write)
    assert problem.startswith("its mask cannot be written (File name too long") and "rename it" in problem
    assert predictions.write_outputs(outputs(tmp_path, "a.png"), *write) is None
    assert np.asarray(Image.open(tmp_path / "a.png")).sum() == 20


def test_a_full_disk_ends_prediction_and_names_the_mask(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predictions, "save_index_png", full)
    write = (tmp_path, np.zeros((4, 5, 3), np.uint8), np.ones((4, 5), np.uint8), None, np.array(["a", "b"]))
    with pytest.raises(OSError, match=r"No space left.*make room.*a\.png"):
        predictions.write_outputs(outputs(tmp_path, "a.png"), *write)
    assert not (tmp_path / "a.png").exists()


def test_settings_are_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    share = [(tmp_path / "a.jpg", outputs(tmp_path / "masks", "a.png"))]
    settings = {"crf": True}
    assert predictions.remaining(share, tmp_path / "masks", settings, False) == share
    assert predictions.remaining(share, tmp_path / "masks", settings, False) == share
    with pytest.raises(ValueError, match="holds masks made with crf True and not False"):
        predictions.remaining(share, tmp_path / "masks", {"crf": False}, False)
    assert os.listdir(tmp_path / "masks") == ["predictions.json"]


WITHOUT_DEVICE = """
    import runpy, sys
    program, *arguments = sys.argv[1:]
    sys.argv = [f"experiments/{program}.py", *arguments]
    try:
        runpy.run_module(f"experiments.{program}", run_name="__main__")
    except SystemExit:
        pass
    from jax._src import xla_bridge
    print("devices", xla_bridge.backends_are_initialized())
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", [
    ("check_data", "--config=experiments/configs/tiny.py"), ("check_data", "--data=/nowhere"), ("cache", "list"),
    ("cache", "no such command"), ("train", "--help"), ("predict", "--help"),
], ids=" ".join)  # fmt: skip
def test_programs_that_need_no_device_start_none(command, cache):
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(WITHOUT_DEVICE), *command], cwd=ROOT, text=True,
                           capture_output=True, check=False, timeout=120)
    assert ended.stdout.rstrip().endswith("devices False"), ended.stderr[-2000:]
