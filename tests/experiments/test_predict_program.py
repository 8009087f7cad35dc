"""Prediction from a finished run: what is taken for a photograph, what is written and what is not, and `load`."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from programs import CLASSES, ROOT, assert_refused, run, run_on_one_device

import lcrf_jax
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.masks import read_mask
from lcrf_jax.pictures.palette import palette
from lcrf_jax.predict.segmenter import make_segmenter, segment
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.description import CheckpointError


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCRF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.slow
def test_a_model_that_comes_with_the_package_is_named(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    (tmp_path / "photos").mkdir()
    Image.fromarray(image).save(tmp_path / "photos/one.png")
    ended = run("predict", "--checkpoint=animals", f"--images={tmp_path / 'photos'}", f"--out={tmp_path / 'masks'}", "--nooverlays")
    assert ended.code == 0 and "1 cat" in ended.out, ended.err
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "masks/one.png")), lcrf_jax.load("animals").segment(image, crf=False).labels)
    ended = run("predict", "--checkpoint=animal", f"--images={tmp_path / 'photos'}", f"--out={tmp_path / 'others'}")
    assert_refused(ended, "animal: there is no such folder or file.*did you mean 'animals'")


@pytest.mark.slow
def test_predict_writes_a_palette_png_for_every_photograph(checkpoint, tmp_path):
    images = tmp_path / "photos"
    (images / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"one.jpg": (40, 60), "two words ä.png": (31, 17), "sub/three.jpeg": (5, 1)}
    for name, (height, width) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(images / name)
    out = tmp_path / "masks"
    ended = run_on_one_device("predict", f"--checkpoint={checkpoint}", f"--images={images}/**", f"--out={out}", "--crf")
    assert ended.code == 0, ended.err
    assert "3 masks in" in ended.out and "0 background, 1 ring" in ended.out
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(
        ["predictions.json", "predictions.jsonl", *(str(pathlib.Path(name).with_suffix(".png")) for name in sizes),
         *(str("overlays" / pathlib.Path(name).with_suffix(".jpg")) for name in sizes)])
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {record["mask"] for record in records} == {str(pathlib.Path(name).with_suffix(".png")) for name in sizes}
    for record in records:
        labels = np.asarray(Image.open(out / record["mask"]))
        assert (record["height"], record["width"]) == labels.shape and record["refined"] and not record["tags_used"]
        areas = {CLASSES[label]: float((labels == label).mean()) for label in np.unique(labels)}
        assert {name: entry["area"] for name, entry in record["classes"].items()} == pytest.approx(areas, abs=1e-5)
        mean = sum(entry["area"] * entry["confidence"] for entry in record["classes"].values())
        assert record["confidence"] == pytest.approx(mean, abs=1e-3) and 1 / 7 < record["confidence"] <= 1
    for name, size in sizes.items():
        path = (out / name).with_suffix(".png")
        with Image.open(path) as mask:
            assert mask.mode == "P" and mask.size == size[::-1]
            assert mask.getpalette()[:21] == palette(7).ravel().tolist()
        assert read_mask(path, len(CLASSES)).shape == size


def test_a_broken_photograph_is_listed_and_the_others_are_done(checkpoint, tmp_path):
    for name in ("a.jpg", "c.png"):
        Image.new("RGB", (20, 30), "red").save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    (tmp_path / "d.jpg").write_bytes(b"")
    (tmp_path / "e.jpg").write_text("not an image")
    out = tmp_path / "masks"
    ended = run("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/*.*", f"--out={out}")
    assert_refused(ended, "error: 3 of 5 images could not be done:")
    last = ended.err.rstrip().splitlines()[-3:]
    assert [str(tmp_path / name) in line for name, line in zip(("b.jpg", "d.jpg", "e.jpg"), last)] == [True] * 3
    assert sorted(path.name for path in out.iterdir()) == [
        "a.png", "c.png", "overlays", "predictions.json", "predictions.jsonl"]


def test_masks_that_are_there_are_not_made_again_and_never_mixed(checkpoint, tmp_path):
    out = tmp_path / "masks"
    for name in "abc":
        Image.new("RGB", (20, 30), "red").save(tmp_path / f"{name}.jpg")
    command = ("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/*.jpg", f"--out={out}")
    assert "done before" not in run(*command).out
    (out / "b.png").unlink()
    Image.new("RGB", (30, 30), "blue").save(tmp_path / "c.jpg")
    os.utime(tmp_path / "c.jpg", ns=(time.time_ns() + 10**9,) * 2)
    before = (out / "a.png").stat().st_mtime_ns
    again = run(*command)
    assert again.code == 0 and "1 of these were done before" in again.out and "3 masks in" in again.out
    assert (out / "a.png").stat().st_mtime_ns == before and read_mask(out / "c.png", 7).shape == (30, 30)
    os.utime(tmp_path / "c.jpg", ns=(before,) * 2)
    nothing = run(*command)
    assert nothing.code == 0 and "3 of these were done before" in nothing.out, nothing.err
    assert_refused(run(*command, "--crf"), "holds masks made with crf False and not True; give another --out")
    (out / "predictions.json").unlink()
    assert_refused(run(*command), "holds masks of unknown origin; give another --out, or --overwrite")


@pytest.mark.slow
def test_masks_are_made_again_with_other_settings_where_that_is_asked_for(checkpoint, tmp_path):
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.jpg")
    command = ("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/a.jpg", f"--out={tmp_path / 'masks'}")
    assert run(*command).code == 0
    before = (tmp_path / "masks" / "a.png").stat().st_mtime_ns
    assert run(*command, "--crf", "--overwrite").code == 0
    assert (tmp_path / "masks" / "a.png").stat().st_mtime_ns > before
    assert '"crf": true' in (tmp_path / "masks" / "predictions.json").read_text()


def test_processes_share_the_photographs_by_their_numbers(checkpoint, tmp_path):
    for name in "abcde":
        Image.new("RGB", (20, 30), "red").save(tmp_path / f"{name}.jpg")
    command = ("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/*.jpg", f"--out={tmp_path / 'masks'}")
    ended = run(*command, "--num_processes=2", "--process_id=1")
    assert ended.code == 0 and "5 images" in ended.out and "2 of them are the share of this process" in ended.out
    assert sorted(path.name for path in (tmp_path / "masks").glob("*.png")) == ["b.png", "d.png"]
    assert run(*command, "--num_processes=2", "--process_id=0").code == 0
    assert len(list((tmp_path / "masks").glob("*.png"))) == 5
    assert_refused(run(*command, "--process_id=0"), "--process_id: expected 0 to --num_processes - 1, got 0 of None")
    assert_refused(run(*command, "--num_processes=2", "--process_id=2"), "got 2 of 2")


def test_predict_takes_files_folders_and_patterns(checkpoint, tmp_path):
    photos = tmp_path / "photos"
    (photos / "old").mkdir(parents=True)
    (photos / "old" / "predictions.json").touch()
    (photos / "tags.csv").touch()
    for name in ("a.jpg", "sub/b[1].png", "sub/notes.txt", ".hidden/c.jpg", "other/d.webp", "old/e.png", "masks/f.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), "red").save(photos / name) if is_photograph(name) else (photos / name).touch()
    out = photos / "new"  # within the folder: masks, these and others, are not taken for photographs
    command = ("predict", f"--checkpoint={checkpoint}", f"--out={out}", "--nooverlays")
    for repeated in range(2):
        ended = run(*command, f"--images={photos}")
        assert ended.code == 0 and "3 images;" in ended.out, ended.err
        assert ("3 of these were done before" in ended.out) == bool(repeated)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "a.png", "other/d.png", "predictions.json", "predictions.jsonl", "sub/b[1].png"]
    other = run(*command[:2], f"--out={tmp_path / 'few'}", f"--images={photos}/sub/b[1].png", f"--images={photos}/oth*/*")
    assert other.code == 0 and "2 masks in" in other.out
    assert sorted(str(path.relative_to(tmp_path / "few")) for path in (tmp_path / "few").rglob("*.png")) == [
        "other/d.png", "sub/b[1].png"]


def test_predict_takes_photographs_of_every_kind(checkpoint, tmp_path):
    """EXIF rotation, grey, transparent, CMYK, 16 bits, palette, animation, one pixel: a mask of the size that is shown."""
    photos = tmp_path / "photos"
    photos.mkdir()
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image, exif = Image.fromarray(rgb), Image.Exif()
    exif[0x0112] = 6
    image.save(photos / "turned.jpg", exif=exif)
    for name, mode in (("grey.png", "L"), ("alpha.png", "RGBA"), ("clear grey.png", "LA"), ("cmyk.jpg", "CMYK"), ("p.png", "P")):
        image.convert(mode).save(photos / name)
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(photos / "deep.tiff")
    image.save(photos / "moving.gif", save_all=True, append_images=[image.rotate(180)])
    image.convert("RGB").save(photos / "really a png.jpg", format="PNG")
    Image.new("RGB", (1, 1)).save(photos / "pixel.bmp")
    Image.new("RGB", (66_000, 1)).save(photos / "line.png")
    ended = run("predict", f"--checkpoint={checkpoint}", f"--images={photos}", f"--out={tmp_path / 'masks'}")
    assert ended.code == 0 and "11 masks in" in ended.out, ended.err
    for path in photos.iterdir():
        size = {"turned": (20, 30), "pixel": (1, 1), "line": (66_000, 1)}.get(path.stem, (30, 20))
        assert Image.open(tmp_path / "masks" / f"{path.stem}.png").size == size
        overlaid = Image.open(tmp_path / "masks" / "overlays" / f"{path.stem}.jpg").size
        assert overlaid == (size if path.stem != "line" else (65_000, 1))


def test_predict_with_tags_says_so_and_keeps_to_them(checkpoint, tmp_path):
    for name in "abc":
        Image.fromarray(np.random.default_rng(ord(name)).integers(0, 256, (40, 40, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "tags.json").write_text('{"a": [], "b.png": ["star", "dots"], "elsewhere": []}')
    command = ("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/*.png", f"--out={tmp_path / 'masks'}")
    ended = run(*command, f"--tags={tmp_path}/tags.json")
    assert_refused(ended, r"1 of 3 images could not be done:\n.*c.png: has no row in .*tags.json")
    assert "tags.json are used: no other class can occur" in ended.out
    assert re.search(r"masks of background alone: [12] of 2", ended.out)  # one may have no other class
    records = [json.loads(line) for line in (tmp_path / "masks" / "predictions.jsonl").read_text().splitlines()]
    assert [record["tags_used"] for record in records] == [True, True]
    for record, allowed in zip(records, ({"background"}, {"background", "star", "dots"}), strict=True):
        assert set(record["classes"]) <= allowed
    assert_refused(run(*command), "holds masks made with tags_sha256 .*; give another --out")
    (tmp_path / "tags.json").write_text('{"a": ["bird"]}')
    assert_refused(run(*command, f"--tags={tmp_path}/tags.json"), r"tags.json, 'a': unknown class 'bird': expected one of back")


@pytest.mark.slow
def test_predict_with_flips_scales_tiles_and_probabilities(checkpoint, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)).save(tmp_path / "a.png")
    base = ("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/a.png")
    found = {}
    for name, options in {
        "plain": ["--noflips", "--probabilities"], "flips": ["--flips", "--probabilities"],
        "scales": ["--noflips", "--scales=1,1.34", "--probabilities"], "small": ["--noflips", "--max_side=100", "--probabilities"],
        "tiles": ["--tile=96", "--crf"],
    }.items():  # fmt: skip
        out = tmp_path / name
        ended = run(*base, f"--out={out}", *options)
        assert ended.code == 0 and re.search(r"1 of them made in [\d.]+ s, .*: [\d.]+ images/s", ended.out), ended.err
        assert read_mask(out / "a.png", 7).shape == (150, 200)
        if name != "tiles":
            with np.load(out / "probabilities" / "a.npz", allow_pickle=False) as stored:
                found[name] = np.float32(stored["probabilities"])
                assert stored["class_names"].tolist() == list(CLASSES)
            np.testing.assert_allclose(found[name].sum(axis=-1), 1, atol=5e-3)
    assert found["small"].shape == (75, 100, 7) and found["plain"].shape == (150, 200, 7)
    assert np.abs(found["flips"] - found["plain"]).max() > 1e-3 and np.abs(found["scales"] - found["plain"]).max() > 1e-3
    settings = json.loads((tmp_path / "scales" / "predictions.json").read_text())
    assert settings["inference"]["input_sizes"] == [96, 128] and settings["inference"]["mirror"] is False
    assert_refused(run(*base, "--out=y", "--scales=1,two"), "--scales: expected factors from 0.1 to 10, got '1,two'")
    assert_refused(run(*base, "--out=y", "--tile=64", "--probabilities"), "--probabilities and --tile do not go together")


@pytest.mark.slow
def test_a_model_is_loaded_as_a_library(checkpoint, tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert run("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/a.png", f"--out={tmp_path / 'm'}", "--crf").code == 0
    model = lcrf_jax.load(checkpoint)
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), rgb, Image.fromarray(rgb)):
        result = model.segment(image)
        np.testing.assert_array_equal(result.labels, read_mask(tmp_path / "m" / "a.png", 7))
    assert result.class_names == CLASSES and result.palette.shape == (7, 3)
    np.testing.assert_array_equal(result.probabilities.argmax(axis=-1), result.labels)
    np.testing.assert_allclose(result.confidence, result.probabilities.max(axis=-1), atol=1e-3)
    assert set(np.unique(model.segment(rgb, tags=["ring"]).labels)) <= {0, 1}
    assert model.segment(rgb[..., 0]).labels.shape == (30, 50)
    assert model.segment(Image.fromarray(rgb).convert("CMYK"), crf=False).labels.shape == (30, 50)
    decoder = restore_params(checkpoint, "last")
    newest = make_segmenter(model.description, {**restore_params(checkpoint), "decoder": decoder})
    expected = segment(newest, rgb, crf=False).labels
    np.testing.assert_array_equal(lcrf_jax.load(checkpoint, which="last").segment(rgb, crf=False).labels, expected)
    for wrong, message in (
        (rgb / 255, r"expected an image of uint8 in 0..255, got float64 in 0..1; scale it"),
        (rgb.transpose(2, 0, 1), r"got \[3, 30, 50\]; it looks like \[3, H, W\]: use .transpose"),
        (rgb[None], r"got \[1, 30, 50, 3\]; take one image of a batch"),
        (np.zeros((0, 5, 3), np.uint8), r"got \[0, 5, 3\]"), (np.zeros((4, 5, 4), np.uint8), "convert it to RGB"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.segment(wrong)
    with pytest.raises(ValueError, match="unknown class 'bird'"):
        model.segment(rgb, tags=["bird"])
    with pytest.raises(FileNotFoundError, match="none.png does not exist"):
        model.segment(tmp_path / "none.png")
    with pytest.raises(CheckpointError, match="expected a run folder with config.json"):
        lcrf_jax.load(tmp_path)


def test_photographs_are_not_lost_to_masks(checkpoint, tmp_path):
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (20, 30), "red").save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    arguments = f"--checkpoint={checkpoint}", f"--images={tmp_path}/*"
    assert_refused(run("predict", *arguments, f"--out={tmp_path / 'masks'}"), r"a\.jpg and .*a\.png would both be")
    ended = run("predict", arguments[0], f"--images={tmp_path}/*.png", f"--out={tmp_path}")
    assert_refused(ended, "would be written over the photograph .*give another --out")
    assert (tmp_path / "a.png").read_bytes() == before and not (tmp_path / "masks").exists()
    assert_refused(run("predict", arguments[0], f"--images={tmp_path}/*.gif", "--out=x"), "no file fits the pattern")


@pytest.mark.slow
def test_the_programs_run_on_their_own(checkpoint, tmp_path):
    """One of them as a user starts it."""
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.jpg")
    command = [sys.executable, "-m", "experiments.predict", f"--checkpoint={checkpoint}",
               f"--images={tmp_path}/*.jpg", f"--out={tmp_path / 'masks'}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert read_mask(tmp_path / "masks" / "a.png", len(CLASSES)).shape == (30, 20)


@pytest.mark.parametrize("flag, message", [
    ("--out=", "--out: expected a folder, got an empty name; is a variable not set"),
    ("--out={folder}/file", "--out={folder}/file is a file; give a folder"),
    ("--out={folder}/file/below", "--out={folder}/file/below: {folder}/file is a file; give a folder"),
    ("--tags=", "--tags: expected a file, got an empty name"), ("--tags={folder}", "{folder} is no file"), ("--tags={folder}/fil", "fil does not exist; did you mean"),
    ("--list=", "--list: expected a file, got an empty name"), ("--list={folder}/fil", "fil does not exist; did you mean"),
    ("--workers=2", "--workers: it is of --engine=ray alone"), ("--cores=2", "--cores: it is of --engine=ray alone"),
    ("--checkpoint=", "expected the folder of a run, a file of a model or its name, got an empty one"),
    ("--checkpoint={folder}/config.json", "{folder}/config.json describes a run: give its folder, {folder}"),
])  # fmt: skip
def test_flags_that_cannot_be_are_told_before_anything_is_done(tmp_path, flag, message):
    for name in ("file", "config.json"):
        (tmp_path / name).write_text("{}")
    ended = run("predict", "--checkpoint=animals", "--images=docs/animals.jpg", f"--out={tmp_path / 'out'}", flag.format(folder=tmp_path))
    assert_refused(ended, f"^error: .*{re.escape(message.format(folder=tmp_path))}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "file"]
