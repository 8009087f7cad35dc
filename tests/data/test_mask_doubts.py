"""Masks whose indices may mean something else: check_data ends with a problem, training and evaluation say it again."""

import json

import numpy as np
import pytest
from PIL import Image
from programs import run

from lcrf_jax.data.check import mask_doubts, read_all
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.train import splits

ACCEPT = "--config.data.options.untagged_in_masks=accept"


@pytest.fixture
def folder(tmp_path):
    """Twenty rings and stars; the first four have masks and are the split val."""
    (tmp_path / "masks").mkdir()
    for number in range(20):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)).save(tmp_path / f"{number:02}.png")
    (tmp_path / "tags.json").write_text(json.dumps({f"{number:02}": [["ring", "star"][number % 2]] for number in range(20)}))
    (tmp_path / "classes.txt").write_text("background\nring\nstar\n")
    write_masks(tmp_path, [1, 2, 1, 2])
    return tmp_path


def write_masks(folder, labels, background=0):
    for number, label in enumerate(labels):
        mask = np.full((12, 16), background, np.uint8)
        mask[2:8, 2:8] = label
        Image.fromarray(mask).save(folder / "masks" / f"{number:02}.png")


def doubts(folder, **options):
    source = FolderSource(folder, "val", masks=True, **options)
    return mask_doubts(source, read_all(source))


def test_masks_that_agree_with_the_tags_raise_no_doubt(folder):
    assert doubts(folder) == []
    source = open_source("textures", "val", masks=True, num_val=6)
    assert mask_doubts(source, read_all(source)) == []
    plain = FolderSource(folder, "train")
    assert mask_doubts(plain, read_all(plain)) == []


def test_indices_that_are_numbered_in_each_picture(folder):
    write_masks(folder, [1, 1, 1, 1])
    [line] = doubts(folder)
    assert line.startswith("val: the masks of 2 of 4 photographs show classes that these are not tagged with; mend the tags, or the")
    assert "untagged_in_masks=accept\n  01.png (ring)\n  03.png (ring)" in line
    assert doubts(folder, untagged_in_masks="accept") == []
    with pytest.raises(ValueError, match="untagged_in_masks: expected 'tell' or 'accept', got 'maybe'"):
        FolderSource(folder, "val", untagged_in_masks="maybe")


def test_masks_that_show_nothing(folder):
    write_masks(folder, [0, 0, 0, 0])
    assert doubts(folder) == ["val: no mask shows a class, though 4 of their photographs have tags; write objects as the indices of their classes"]


def test_background_at_another_index(folder):
    (folder / "classes.txt").write_text("background\nring\nstar\nsky\n")
    write_masks(folder, [1, 2, 1, 2], background=3)
    first, second = doubts(folder)
    assert first == "val: no mask shows the background, which is index 0, and every one shows index 3 (sky); save the background as 0"
    assert "4 of 4 photographs show classes" in second
    write_masks(folder, [1, 2, 1, 2], background=255)
    assert doubts(folder, untagged_in_masks="accept") == [
        "val: no mask shows the background, which is index 0; save the background as 0"]


def test_check_data_ends_with_the_problem_and_training_says_it_again(folder, capsys):
    write_masks(folder, [1, 1, 1, 1])
    ended = run("check_data", f"--data={folder}")
    assert ended.code == 1 and "error: 1 problem: training would go on, with a warning" in ended.err, ended
    assert "the masks of 2 of 4 photographs show classes" in ended.out and "03.png (ring)" in ended.out
    assert run("check_data", f"--data={folder}", ACCEPT).code == 0
    config = {"data": {"kind": "folder", "root": str(folder), "options": {}, "train_split": "train", "val_split": "val"},
              "method": "latent_crf"}  # fmt: skip
    capsys.readouterr()
    splits.open_data(config)
    assert "warning: val: the masks of 2 of 4 photographs show classes" in capsys.readouterr().out
    splits.checked_split(config, "val", masks=True)  # as evaluation opens it
    assert "warning: val: the masks of 2 of 4" in capsys.readouterr().out
    config["data"]["options"] = {"untagged_in_masks": "accept"}
    splits.open_data(config)
    assert "warning" not in capsys.readouterr().out


def test_check_data_tells_doubtful_names_and_what_is_not_taken(folder):
    (folder / "more").mkdir()
    (folder / "more" / "x.heic").touch()
    assert "1 file not taken: 1 .heic (install the package pillow-heif" in run("check_data", f"--data={folder}").out
    (folder / "classes.txt").unlink()
    (folder / "tags.json").write_text(json.dumps({f"{number:02}": ["ring", "star", "star ring"][number % 3] for number in range(20)}))
    ended = run("check_data", f"--data={folder}")
    assert ended.code == 1 and "error: 2 problems: training would stop there\n" in ended.err
    assert "the tag 'star ring' has the tags 'star' and 'ring' in it" in ended.out and "no classes.txt says which class is which" in ended.out


def test_options_of_a_plain_folder_are_refused_for_the_layout_of_voc(tmp_path):
    (tmp_path / "ImageSets" / "Segmentation").mkdir(parents=True)
    for options, words in (({"val_share": 0.5}, "val_share"), ({"split_seed": 1, "mask_folder": "m"}, "mask_folder, split_seed")):
        with pytest.raises(ValueError, match=f"data.options: {words} cannot be used: .* has the layout of PASCAL VOC"):
            open_source("folder", "train", root=tmp_path, **options)
