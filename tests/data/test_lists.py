"""Splits of a folder: by lists, by folders and by chance; what is kept for a test is never trained on."""

import json
import os
import time

import pytest

from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.listing import scan_folder


def photographs(root, *names, tags=True):
    """Files that look like photographs: none is opened here."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if tags:
        (root / "tags.json").write_text(json.dumps({name: [["cat"], ["dog"]][at % 2] for at, name in enumerate(names)}))


def split_names(root, **options):
    found = scan_folder(root, **options)
    assert not found.problems and not found.missing, (found.problems, found.missing)
    return {split: [found.images[row] for row in rows] for split, rows in found.splits.items() if len(rows)}, found.not_taken


@pytest.mark.parametrize(
    "train, val",
    [("train", "val"), ("Train", "Val"), ("TRAINING", "validation"), ("train2017", "val2017"), ("images/train", "images/valid")],
)
def test_folders_of_splits_in_any_words(tmp_path, train, val):
    photographs(tmp_path, f"{train}/1.jpg", f"{val}/2.jpg")
    assert split_names(tmp_path)[0] == {"train": [f"{train}/1.jpg"], "val": [f"{val}/2.jpg"]}


@pytest.mark.parametrize("folders", [("train", "Test"), ("train", "val", "testing"), ("photographs", "test")])
def test_folders_of_a_test_are_kept_out_of_training_and_validation(tmp_path, folders):
    photographs(tmp_path, *(f"{folder}/{at}.jpg" for folder in folders for at in range(2)))
    splits, line = split_names(tmp_path)
    assert splits["test"] == [f"{folders[-1]}/0.jpg", f"{folders[-1]}/1.jpg"]
    assert splits["train"] == [f"{folders[0]}/0.jpg", f"{folders[0]}/1.jpg"]
    assert "2 photographs are kept for the split 'test', out of training and validation" in line
    assert FolderSource(tmp_path, "test").names == tuple(splits["test"])


def test_a_folder_of_a_test_stays_out_where_val_alone_has_a_list(tmp_path):
    photographs(tmp_path, "train/1.jpg", "train/2.jpg", "test/3.jpg")
    (tmp_path / "val.txt").write_text("train/1.jpg\n")
    assert split_names(tmp_path)[0] == {"train": ["train/2.jpg"], "val": ["train/1.jpg"], "test": ["test/3.jpg"]}


def test_folders_of_splits_and_others(tmp_path):
    photographs(tmp_path, "train/1.jpg", "val/2.jpg", "more/3.jpg", "4.jpg")
    splits, line = split_names(tmp_path)
    assert splits == {"train": ["4.jpg", "more/3.jpg", "train/1.jpg"], "val": ["val/2.jpg"]}
    assert "photographs of other folders (more, none) belong to the split 'train'" in line


def test_classes_that_have_the_names_of_splits(tmp_path):
    photographs(tmp_path, "train/1.jpg", "test/2.jpg", "bus/3.jpg", tags=False)
    (tmp_path / "classes.txt").write_text("background\nbus\ntest\ntrain\n")
    assert len(split_names(tmp_path)[0]["train"]) == 3


@pytest.mark.parametrize("name", ["test", "Test", "testing"])
def test_a_list_of_a_test_is_kept_out_of_training(tmp_path, name):
    photographs(tmp_path, *(f"{at}.jpg" for at in range(6)))
    photographs(tmp_path, "untagged.jpg", tags=False)
    (tmp_path / f"{name}.txt").write_text("0.jpg\n1\nuntagged.jpg\nelsewhere.jpg\n")
    splits, line = split_names(tmp_path)
    assert splits == {"test": ["0.jpg", "1.jpg"], "train": [f"{at}.jpg" for at in range(2, 6)]} and "2 photographs are kept" in line
    (tmp_path / "val.txt").write_text("2\n")
    assert split_names(tmp_path)[0] == {"test": ["0.jpg", "1.jpg"], "train": ["3.jpg", "4.jpg", "5.jpg"], "val": ["2.jpg"]}
    with pytest.raises(ValueError, match="there is no photograph 'elsewhere.jpg'"):
        FolderSource(tmp_path, "test")


def test_photographs_in_no_list_are_told_and_lists_have_one_name(tmp_path):
    photographs(tmp_path, *(f"{at}.jpg" for at in range(6)))
    (tmp_path / "train.txt").write_text("0\n")
    (tmp_path / "validation.txt").write_text("1\n")
    splits, line = split_names(tmp_path)
    assert splits == {"train": ["0.jpg"], "val": ["1.jpg"]}
    assert line == "4 photographs stand in no list and are not used: 2.jpg, 3.jpg, 4.jpg and 1 more"
    (tmp_path / "val.txt").write_text("1\n")
    with pytest.raises(ValueError, match="holds val.txt, validation.txt, lists of one split; keep one"):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("0.jpg, 1.jpg, 2.jpg\n", "train.txt, line 1: several photographs on a line .* write one a line"),
        ("1.jpg\n" + ",".join(f"{at}.jpg" for at in range(90)), "train.txt, line 2: several photographs on a line"),
        ("x" * 300, "train.txt, line 1: 'x{60}' and what follows is longer than the name of a file"),
        ("0.jpg 1.jpg\n", "train.txt, line 1: .*1.jpg is a photograph with tags and no mask; write one photograph a line"),
    ],
)
def test_lines_of_lists_that_are_refused(tmp_path, text, message):
    photographs(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        scan_folder(tmp_path)


@pytest.mark.parametrize("name", ["train.txt", "val.txt", "test.txt", "classes.txt", "colours.csv", "tags.csv", "masks"])
def test_links_that_lead_nowhere_are_named(tmp_path, name):
    photographs(tmp_path, "0.jpg", tags=False)
    os.symlink(tmp_path / "gone" / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=f"{name} is a link to .*gone/{name}, which does not exist; mend or remove the link"):
        scan_folder(tmp_path)


def test_names_of_options_that_are_too_long(tmp_path):
    photographs(tmp_path, "0.jpg")
    for option in ("tags", "classes", "mask_folder"):
        with pytest.raises(FileNotFoundError, match=f"{option}: .*xxx (does not exist|is no folder)"):
            scan_folder(tmp_path, **{option: "x" * 300})


def test_many_masks_that_are_missing_are_told_soon(tmp_path):
    photographs(tmp_path, *(f"{at}.jpg" for at in range(1500)))
    (tmp_path / "train.txt").write_text("".join(f"{at}.jpg masks/{at}.png\n" for at in range(1500)))
    begin = time.process_time()
    assert len(scan_folder(tmp_path).missing) == 1500
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("line", ["b.jpg 3", "b.jpg -1", "b 1", "b.jpg,7", "b.jpg dog", "b.jpg\tdog;cat", "b.jpg: 0.5", "x/b.jpg 2"])
def test_a_label_behind_a_photograph_in_a_list_is_a_problem(tmp_path, line):
    photographs(tmp_path, *(f"x/{name}.jpg" for name in "abcd"))
    (tmp_path / "train.txt").write_text(f"a.jpg\n{line}\n")
    found = scan_folder(tmp_path)  # no row that is merely missing, which may be skipped
    [problem] = found.problems
    assert "train.txt, line 2: a label stands behind the photograph" in problem and "write x/b.jpg, and its tags into tags.csv" in problem
    assert not found.missing


def test_a_list_of_a_test_with_labels_is_kept_out_of_training(tmp_path):
    photographs(tmp_path, *(f"{name}.jpg" for name in "abcd"))
    (tmp_path / "test.txt").write_text("b.jpg 3\nc.jpg dog\nnowhere.jpg 2\n")
    splits, _ = split_names(tmp_path)
    assert splits["test"] == ["b.jpg", "c.jpg"] and splits["train"] == ["a.jpg", "d.jpg"]


def test_a_name_with_a_number_that_is_not_there_is_missing(tmp_path):
    photographs(tmp_path, "photo.jpg", "b.jpg", "photo 7.jpg")
    (tmp_path / "train.txt").write_text("b.jpg\nphoto 7\nphoto 8\n")
    found = scan_folder(tmp_path)
    assert not found.problems and ["photo 8" in line for line in found.missing] == [True]
