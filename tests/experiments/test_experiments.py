"""The programs, end to end: train, evaluate and predict, on one short run that all tests share."""

import csv
import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags
from PIL import Image
from programs import SHORT, SMALL, TINY, run

import lcrf_jax
from experiments import reporting
from experiments.configs import base, textures, tiny, voc_animals
from lcrf_jax.bound.objective import latent_crf_objective
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.masks import read_mask
from lcrf_jax.data.opening import open_source
from lcrf_jax.pictures.palette import palette
from lcrf_jax.predict.segmenter import make_segmenter, segment
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.description import CheckpointError, load_description
from lcrf_jax.runfolder.metrics import metrics_history

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLASSES = ("background", "ring", "cross", "star", "stripes", "chequer", "dots")


def score(line):
    """The number of a line `mIoU 0.xxx`."""
    match = re.fullmatch(r"mIoU ([01]\.\d{3})", line)
    assert match, line
    return float(match.group(1))


def assert_refused(ended, message):
    assert ended.code == 1, ended
    assert re.search(message, ended.err), ended.err
    assert "Traceback" not in ended.err


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCRF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(tiny_run, tmp_path_factory):
    """A copy of the finished run, which the tests may write to."""
    assert tiny_run[1].code == 0, tiny_run[1].err
    return shutil.copytree(tiny_run[0], tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder in VOC layout made of the embedded images: 24 to train on without masks, 3 with masks."""
    folder = tmp_path_factory.mktemp("photos")
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    rows = ["image,tags"]
    for split, count in (("train", 24), ("val", 3)):
        source = open_source("textures", split, masks=split == "val", seed=1, size=96, num_train=24, num_val=3)
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(source.names) + "\n")
        for example in (source[i] for i in range(count)):
            size = slice(0, 80 if split == "val" else 96)
            Image.fromarray(example.image[size]).save(folder / "JPEGImages" / f"{example.name}.png")
            if example.mask is not None:
                Image.fromarray(example.mask[size]).save(folder / "SegmentationClass" / f"{example.name}.png")
            present = [name for name, tag in zip(CLASSES[1:], example.tags[1:], strict=True) if tag]
            rows.append(f"{example.name},{';'.join(present)}")
    (folder / "tags.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_train_prints_the_table_and_ends_with_the_score(tiny_run):
    workdir, ended = tiny_run
    assert ended.code == 0, ended.err
    value = score(ended.last_line)
    for name in CLASSES:
        assert re.search(rf"^{name} +(\d\.\d{{3}}|-)$", ended.out, re.MULTILINE), name
    assert "24 training images with tags of 6 classes; logits 6 x 6" in ended.out
    assert "average precision on training tags: mean" in ended.out
    assert "image tags for training, no tags at test time" in ended.out
    for label, path in (("pictures", "pictures_val.png"), ("results", "results_val.json"), ("checkpoint", "")):
        shown = re.search(rf"^{label} +(.+)$", ended.out, re.MULTILINE).group(1)
        assert pathlib.Path(shown) == workdir / path and (workdir / path).exists()
    results = json.loads((workdir / "results_val.json").read_text())
    assert results["plain"]["miou"] == pytest.approx(value, abs=6e-4) and "refined" not in results
    assert results["images"] == 4 and np.sum(results["plain"]["confusion"]) == 4 * 96 * 96
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "metrics.jsonl", "tensorboard", "last", "best"}
    assert load_description(workdir)["class_names"] == list(CLASSES)
    assert re.search(r"images/s", ended.err)


@pytest.mark.slow
def test_training_again_in_the_same_folder_only_prints_the_score(tiny_run, checkpoint):
    again = run("train", TINY, *SMALL, f"--workdir={checkpoint}")
    assert again.code == 0 and "continuing after step 6" in again.out
    assert again.last_line == tiny_run[1].last_line
    other = run("train", TINY, *SMALL, f"--workdir={checkpoint}", "--config.network.dropout=0.5")
    assert_refused(other, "error: .*belongs to another model: network")


def test_evaluate_gives_the_score_of_training(tiny_run, checkpoint):
    ended = run("evaluate", f"--checkpoint={checkpoint}")
    assert ended.code == 0, ended.err
    assert ended.last_line == tiny_run[1].last_line
    assert "4 images of val" in ended.out


@pytest.mark.slow
def test_evaluate_with_refinement_ends_with_the_refined_score(tiny_run, checkpoint):
    ended = run("evaluate", f"--checkpoint={checkpoint}", "--split=val", "--crf")
    assert ended.code == 0, ended.err
    assert re.search(r"^class +plain +refined$", ended.out, re.MULTILINE)
    results = json.loads((checkpoint / "results_val_crf.json").read_text())
    assert score(ended.last_line) == pytest.approx(results["refined"]["miou"], abs=6e-4)
    assert f"{tiny_run[1].last_line} without refinement" in ended.out
    assert (checkpoint / "pictures_val_crf.png").exists()


@pytest.mark.slow
def test_a_checkpoint_may_be_moved(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "moved to" / "here")
    ended = run("evaluate", f"--checkpoint={tmp_path / 'moved to' / 'here'}", "--tags_given")
    assert ended.code == 0, ended.err
    score(ended.last_line)
    assert "tags at test time" in ended.out and "no tags at test time" not in ended.out
    assert (tmp_path / "moved to" / "here" / "results_val_tags_given.json").exists()


def test_class_maps_are_scored_with_tags_given(checkpoint):
    ended = run("evaluate", f"--checkpoint={checkpoint}", "--cam", "--tags_given")
    assert ended.code == 0, ended.err
    levels = dict(re.findall(r"(0\.\d+): (0\.\d{3})", ended.out))
    assert len(levels) == len(reporting.CAM_LEVELS) and score(ended.last_line) == max(map(float, levels.values()))
    assert_refused(run("evaluate", f"--checkpoint={checkpoint}", "--cam"), "--cam needs --tags_given")
    both = run("evaluate", f"--checkpoint={checkpoint}", "--cam", "--tags_given", "--crf")
    assert_refused(both, "--cam and --crf")


@pytest.mark.slow
def test_photographs_in_a_folder(photos, checkpoint, tmp_path):
    """Trained from tags alone: the training split has no masks at all."""
    config = tmp_path / "mine.py"
    config.write_text(
        "from experiments.configs import base, tiny\n\n\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        "    config.data.kind = 'folder'\n"
        "    config.data.options = base.options()\n"
        "    return config\n")
    workdir = tmp_path / "run"
    ended = run("train", f"--config={config}", *SHORT, f"--config.data.root={photos}", f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    value = score(ended.last_line)
    evaluated = run("evaluate", f"--checkpoint={workdir}", f"--data={photos}", "--split=val")
    assert evaluated.code == 0 and score(evaluated.last_line) == value
    other = run("evaluate", f"--checkpoint={checkpoint}", f"--data={photos}")
    assert other.code == 0 and "3 images of val" in other.out, other.err
    assert_refused(run("evaluate", f"--checkpoint={workdir}", f"--data={photos}", "--split=test"), "has no test.txt")
    assert_refused(run("evaluate", f"--checkpoint={workdir}", f"--data={photos}", "--split=train"), "has no mask for")


def test_data_with_other_classes_is_refused(photos, checkpoint, tmp_path):
    shutil.copytree(photos, tmp_path / "other")
    classes = ("background", "cross", "ring", *CLASSES[3:])
    (tmp_path / "other" / "classes.txt").write_text("\n".join(classes) + "\n")
    ended = run("evaluate", f"--checkpoint={checkpoint}", f"--data={tmp_path / 'other'}")
    assert_refused(ended, "the run knows the classes .*same class list in the same order")


@pytest.mark.slow
def test_predict_writes_a_palette_png_for_every_photograph(checkpoint, tmp_path):
    images = tmp_path / "photos"
    (images / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = {"one.jpg": (40, 60), "two words ä.png": (31, 17), "sub/three.jpeg": (5, 1)}
    for name, (height, width) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(images / name)
    out = tmp_path / "masks"
    ended = run("predict", f"--checkpoint={checkpoint}", f"--images={images}/**", f"--out={out}", "--crf")
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
    (tmp_path / "tags.json").write_text('{"a": ["ring"], "b.png": ["star", "dots"], "elsewhere": []}')
    command = ("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path}/*.png", f"--out={tmp_path / 'masks'}")
    ended = run(*command, f"--tags={tmp_path}/tags.json")
    assert_refused(ended, r"1 of 3 images could not be done:\n.*c.png: has no row in .*tags.json")
    assert "tags.json are used: no other class can occur" in ended.out
    records = [json.loads(line) for line in (tmp_path / "masks" / "predictions.jsonl").read_text().splitlines()]
    assert [record["tags_used"] for record in records] == [True, True]
    for record, allowed in zip(records, ({"background", "ring"}, {"background", "star", "dots"}), strict=True):
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
def test_ablation_trains_every_variation_once_and_compares_them(tmp_path):
    command = ("ablation", TINY, *SMALL, f"--workdir={tmp_path}", "--variations=temperature 0.2,mean")
    first = run(*command)
    assert first.code == 0, first.err
    folders = {"mean": tmp_path / "mean" / "seed_0", "temperature 0.2": tmp_path / "temperature_0.2" / "seed_0"}
    with (tmp_path / "ablation.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["variation", "settings", "seed 0"]
    flag = "--config.objective."
    assert [row[:2] for row in rows] == [["mean", f"{flag}estimator=mean"], ["temperature 0.2", f"{flag}temperature=0.2"]]
    table = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    for name, settings, value in rows:
        scores = [line["val/miou"] for line in metrics_history(folders[name]) if "val/miou" in line]
        assert len(scores) == 2 and float(value) == scores[-1]
        assert f"| {name} | `{settings}` | {scores[-1]:.3f} |".replace("| 0.", "| .") in table
    assert "4 images of val" in table and table.split("\n\n")[0] in first.out
    given = [load_description(folder)["training"]["objective"] for folder in folders.values()]
    assert [(each["estimator"], each["temperature"]) for each in given] == [("mean", 1.0), ("gumbel_softmax", 0.2)]
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in folders.values()]
    again = run(*command)
    assert again.code == 0, again.err
    assert again.out.count("continuing after step 6") == 2
    assert [(folder / "metrics.jsonl").read_bytes() for folder in folders.values()] == logs
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8") == table
    assert_refused(run(*command, "--config.optimizer.learning_rate=0.1"), r"holds a run with another setting of \['optimizer'\]")
    assert [(folder / "metrics.jsonl").read_bytes() for folder in folders.values()] == logs


@pytest.fixture(scope="module")
def ablation():
    """What experiments/ablation.py defines, without its flags."""
    before = set(flags.FLAGS)
    defined = runpy.run_path(str(ROOT / "experiments" / "ablation.py"), run_name="ablation")
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    return defined


def test_every_variation_can_be_trained(ablation):
    groups, chosen = ablation["VARIATIONS"], ablation["chosen_variations"]
    every = chosen(["all"])
    assert len(every) == sum(len(group) for group in groups.values())  # no name in two groups
    assert chosen(["mean", "terms"]) == {**groups["terms"], "mean": groups["estimators"]["mean"]}
    assert not set(every) & {"all", *groups}
    for (name, settings), module in itertools.product(every.items(), (base, textures, tiny, voc_animals)):
        config = module.get_config().lock()
        for key, value in settings.items():
            assert key in config.objective, name
            config.objective[key] = value
        assert callable(latent_crf_objective(config.objective.to_dict(), stride=8, steps_per_epoch=10)), name


def test_scores_of_several_seeds_are_a_mean_and_a_standard_deviation(ablation):
    assert ablation["mean_and_deviation"]([0.5]) == ".500"
    assert ablation["mean_and_deviation"]([0.5, 0.6, 0.58]) == ".560 ± .053"


@pytest.mark.parametrize(("command", "message"), [
    (["train", "--workdir=x"], "flag --config=None: Flag --config must have a value"),
    (["train", TINY], "flag --workdir=None: Flag --workdir must have a value"),
    (["train", TINY, "--workdir=x", "--cnofig.seed=1"], "Unknown command line flag 'cnofig.seed'"),
    (["train", TINY, "--workdir=x", "seed=1"], r"error: unknown arguments \['seed=1'\]"),
    (["train", TINY, "--workdir=x", "--config.epoch=1"], "error: the flags or the configuration .*epoch"),
    (["train", TINY, "--workdir=x", "--config.batch_size=abc"], "config.batch_size=abc: invalid literal"),
    (["train", "--config=nothing.py", "--workdir=x"], r"error: .*Failed loading config file (.|\n)*nothing\.py"),
    (["train", TINY, "--workdir=x", "--config.method=crf"], "error: method: expected one of"),
    (["train", TINY, "--workdir=x", "--config.data.kind=folder"], "error: "),
    (["train", TINY, "--workdir=x", "--config.data.root=nowhere"], "error: textures .*no folder"),
    (["train", TINY, *SMALL, "--workdir=x", "--config.batch_size=32"], "error: batch_size: 24 training images"),
    (["ablation", TINY, "--workdir=x", "--variations=mean,meen"],
     r"error: --variations: \['meen'\] not known; expected some of \['terms', .*'mcmc', .*'all'\]"),
    (["ablation", TINY, *SMALL, "--workdir=x", "--config.data.val_split="], "error: there are no masks"),
    (["evaluate", "--checkpoint=nowhere"], "error: expected a run folder with config.json"),
    (["evaluate"], "Flag --checkpoint must have a value"),
    (["predict", "--images=x", "--out=y"], "Flag --checkpoint must have a value"),
], ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, list) else "")
def test_wrong_flags_end_with_one_clear_line(command, message):
    assert_refused(run(*command), message)
    assert not (ROOT / "x").exists() and not (ROOT / "y").exists()


@pytest.mark.slow
def test_the_programs_run_on_their_own(checkpoint, tmp_path):
    """One of them as a user starts it."""
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a.jpg")
    command = [sys.executable, "-m", "experiments.predict", f"--checkpoint={checkpoint}",
               f"--images={tmp_path}/*.jpg", f"--out={tmp_path / 'masks'}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert read_mask(tmp_path / "masks" / "a.png", len(CLASSES)).shape == (30, 20)
