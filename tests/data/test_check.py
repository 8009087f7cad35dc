"""Whether photographs can be read: what is found, what is left out, and what check_data and train say of it."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from programs import SMALL_FOLDER, run

from lcrf_jax.data.check import equal_pictures, head_problems, notes, read_all, usable
from lcrf_jax.data.example import PartOfSource, Source
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.train import splits


@pytest.fixture
def folder(tmp_path):
    """Twenty pictures of cats and dogs; the first four have masks and are the split val."""
    root = tmp_path / "photographs"
    (root / "masks").mkdir(parents=True)
    tags = {}
    for i in range(20):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50 + i, 3), np.uint8)).save(root / f"{i:02}.jpg")
        tags[f"{i:02}"] = ["cat"] if i % 2 else ["dog"]
    for i in range(4):
        mask = np.zeros((40, 50 + i), np.uint8)
        mask[5:20, 5:20] = 1 if i % 2 else 2
        Image.fromarray(mask).save(root / "masks" / f"{i:02}.png")
    (root / "tags.json").write_text(json.dumps(tags))
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    return root


def break_some(folder):
    (folder / "07.jpg").write_bytes((folder / "07.jpg").read_bytes()[:-700])
    (folder / "09.jpg").write_bytes(b"")
    (folder / "11.jpg").write_text("no image")


def test_every_example_is_read_once(folder):
    source, seen = FolderSource(folder, "val", masks=True), []
    readings = read_all(source, progress=seen.append)
    assert [reading.size for reading in readings] == [(40, 50 + i) for i in range(4)] and sum(seen) == 4
    assert [reading.labels for reading in readings] == [(0, 2), (0, 1), (0, 2), (0, 1)]
    assert len({reading.digest for reading in readings}) == 4 and not any(reading.problem for reading in readings)
    break_some(folder)
    problems = [reading.problem for reading in read_all(FolderSource(folder, "train")) if reading.problem]
    assert [re.search(r"\d\d\.jpg", problem).group() for problem in problems] == ["07.jpg", "09.jpg", "11.jpg"]


def test_the_head_tells_of_empty_files_and_files_that_are_no_images_but_not_of_the_rest(folder):
    break_some(folder)
    problems = head_problems(FolderSource(folder, "train"))
    assert len(problems) == 2 and "09.jpg has zero bytes" in problems[0] and "11.jpg is not an image" in problems[1]
    assert head_problems(open_source("textures", "train", num_train=3)) == []


def test_what_is_usable(folder):
    source = FolderSource(folder, "train")
    assert usable(source, "error", decode=False) == (source, [], []) and usable(source, "skip", decode=False) == (source, [], [])
    break_some(folder)
    with pytest.raises(ValueError, match=r"(?s)2 of 16 examples of train cannot be used:\n.*09.jpg.*11.jpg.*on_bad_image=skip"):
        usable(source, "error", decode=False)
    with pytest.raises(ValueError, match=r"3 of 16 examples"):
        usable(source, "error", decode=True)
    part, problems, _ = usable(source, "skip", decode=False)
    assert len(part) == 13 == len(part.tags) and len(problems) == part.left_out == 3 and isinstance(part, Source)
    assert part.names == tuple(name for name in source.names if name not in ("07.jpg", "09.jpg", "11.jpg"))
    np.testing.assert_array_equal(part[3].image, source[4].image)
    assert part.fingerprint != source.fingerprint
    with pytest.raises(IndexError, match="outside the 13 examples"):
        part[13]
    with pytest.raises(ValueError, match="on_bad_image: expected one of error, skip, got 'maybe'"):
        usable(source, "maybe", decode=False)
    for path in folder.glob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 16 examples of train can be used"):
        usable(source, "skip", decode=False)


def test_notes_on_tags_and_masks(folder):
    source = FolderSource(folder, "val", masks=True)
    assert notes(source, read_all(source), few=0) == []
    (folder / "classes.txt").write_text("background\ncat\ndog\nbird\n")
    rows = {f"{i:02}": ["cat", "dog"] if i > 3 else ["dog"] for i in range(20)}
    (folder / "tags.json").write_text(json.dumps(rows))
    train, val = FolderSource(folder, "train"), FolderSource(folder, "val", masks=True)
    lines = "\n".join(notes(train, read_all(train), few=20))
    assert lines.count("train: every photograph has the tag 'cat': nothing tells it apart from the background") == 1 and "add some tens of photographs without it" in lines
    assert "train: no photograph has the tag 'bird'" in lines
    assert "the tags 'cat' and 'dog' always come together" in lines
    lines = "\n".join(notes(val, read_all(val), few=0))
    assert "2 photographs have tags that their masks do not show" in lines and "01.jpg (dog)" in lines


def test_a_tag_that_every_photograph_has_is_a_warning_of_training(folder, capsys):
    config = {"method": "latent_crf", "data": {"kind": "folder", "root": str(folder), "train_split": "train", "val_split": "", "options": {}}}
    splits.open_data(config)
    assert "every photograph" not in capsys.readouterr().out
    (folder / "tags.json").write_text(json.dumps({f"{i:02}": ["cat", "dog"][: 1 + i % 2] for i in range(20)}))
    splits.open_data(config)
    assert "warning: train: every photograph has the tag 'cat': nothing tells it apart from the background" in capsys.readouterr().out


def test_equal_pictures(folder):
    (folder / "12.jpg").write_bytes((folder / "00.jpg").read_bytes())
    found = [(source, read_all(source)) for source in (FolderSource(folder, "train"), FolderSource(folder, "val"))]
    assert equal_pictures(found) == ["the same picture: 12.jpg (train), 00.jpg (val)"]
    (folder / "13.jpg").write_bytes((folder / "12.jpg").read_bytes())  # a cat, and a dog there
    source = FolderSource(folder, "train")
    assert equal_pictures([(source, read_all(source))]) == [
        "the same picture: 12.jpg (train), 13.jpg (train); they have different tags: keep one, with all its tags"]


def test_check_data_describes_good_data(folder):
    ended = run("check_data", f"--data={folder}")
    assert ended.code == 0 and ended.last_line == "no problems: training can begin", ended
    assert re.search(r"train +16 +0 +0\nval +4 +4 +0\n", ended.out) and re.search(r"cat +8 +8 +2 +2\n", ended.out)
    assert "tags of a photograph, train: 1: 16" in ended.out and "width 54 to 69" in ended.out
    assert re.search(r"photographs with both tags\n +cat +dog\ncat +10 +0\ndog +0 +10\n", ended.out)
    assert "train: 8 photographs have the tag 'cat': that is few" in ended.out


def test_check_data_names_every_problem_at_once(folder):
    break_some(folder)
    rows = json.loads((folder / "tags.json").read_text())
    del rows["15"]
    (folder / "tags.json").write_text(json.dumps(rows))
    Image.fromarray(np.full((40, 50), 7, np.uint8)).save(folder / "masks" / "00.png")
    ended = run("check_data", f"--data={folder}")
    assert ended.code == 1 and "error: 5 problems" in ended.err and "Traceback" not in ended.err
    for words in ("07.jpg is damaged", "09.jpg has zero bytes", "11.jpg is not an image", "00.png: label 7 at row 0",
                  "12 training images do not fill one batch of 16", "1 photographs have no row in"):  # fmt: skip
        assert words in ended.out, words
    (folder / "tags.json").write_text('{"00": ["dog"], "lost": ["dog"], "gone": ["dog"]}')
    ended = run("check_data", f"--data={folder}")
    assert ended.code == 1 and "no photograph 'lost'" in ended.out and "no photograph 'gone'" in ended.out
    ended = run("check_data", f"--data={folder}/nowhere")
    assert ended.code == 1 and "nowhere does not exist" in ended.out
    assert "needs root=FOLDER" in run("check_data").out


@pytest.mark.slow
def test_train_refuses_bad_images_or_leaves_them_out_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path / "cache"))
    break_some(folder)
    command = ("train", *SMALL_FOLDER, f"--config.data.root={folder}", f"--workdir={tmp_path / 'run'}")
    ended = run(*command)
    assert ended.code == 1 and "2 of 16 examples of train cannot be used" in ended.err and "on_bad_image=skip" in ended.err
    assert not (tmp_path / "run").exists()
    ended = run(*command, "--on_bad_image=skip")
    assert ended.code == 0, ended.err
    assert "train: 3 photographs cannot be used and are left out:" in ended.out and "07.jpg is damaged" in ended.out
    assert "13 training images" in ended.out and "3 photographs of train were left out" in ended.out.split("13 training")[1]
    assert (tmp_path / "run" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["data"]["on_bad_image"] == "skip"
    assert run(*command).code == 1  # the bad ones are still there


def test_masks_are_looked_at_before_training(folder):
    config = {"data": {"kind": "folder", "root": str(folder), "options": {}, "train_split": "train", "val_split": "val"},
              "method": "full_supervision"}  # fmt: skip
    (folder / "train.txt").write_text("00\n01\n02\n")
    (folder / "val.txt").write_text("03\n")
    train, val = splits.open_data(config)
    assert train.masks and len(train) == 3 and len(val) == 1 and splits.without_masks(config, train).masks is False
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(folder / "masks" / "01.png")
    with pytest.raises(ValueError, match=r"01.png is 5x4 pixels and its photograph"):
        splits.open_data(config)
    config["data"]["on_bad_image"] = "skip"
    train, _ = splits.open_data(config)
    assert isinstance(train, PartOfSource) and train.names == ("00.jpg", "02.jpg") == splits.without_masks(config, train).names
    assert splits.without_masks(config, train)[1].mask is None


@pytest.mark.slow
def test_photographs_with_no_tag_every_tag_and_the_same_tag_are_trained_on(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path / "cache"))
    (folder / "classes.txt").write_text("background\ncat\ndog\nbird\n")  # never seen: a bird
    rows = {f"{i:02}": ["cat", "dog", "bird"] if i == 5 else [] if i == 7 else ["dog"] for i in range(20)}
    for name, given in (("various", rows), ("all the same", {name: ["dog"] for name in rows})):
        (folder / "tags.json").write_text(json.dumps(given))
        for number in range(4):
            Image.fromarray(np.full((40, 50 + number), 2, np.uint8)).save(folder / "masks" / f"{number:02}.png")
        ended = run("train", *SMALL_FOLDER, "--config.least_steps=5", f"--config.data.root={folder}", f"--workdir={tmp_path / name}")
        assert ended.code == 0 and re.fullmatch(r"mIoU [01]\.\d{3}", ended.last_line), ended.err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        assert lines and all(np.isfinite(json.loads(line).get("train/loss", 0)) for line in lines)
        assert all(json.loads(line).get("train/skipped_steps", 0) == 0 for line in lines)
        assert json.loads(lines[-1])["step"] == 8  # two epochs of two steps are fewer than 5: each of them is two passes
