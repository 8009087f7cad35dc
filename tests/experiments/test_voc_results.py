"""What the packing of masks for the evaluation server refuses, and which photographs a list chooses."""

import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from programs import run

from experiments.prediction_plan import chosen, planned_outputs
from lcrf_jax.data.sources.devkit import CLASSES
from lcrf_jax.pictures.palette import save_index_png


@pytest.fixture
def folder(tmp_path):
    """Masks of two photographs, as predict leaves them."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "predictions.json").write_text(json.dumps({"class_names": CLASSES}))
    records = []
    for name in ("2008_000001", "2008_000002"):
        Image.new("RGB", (8, 6), "red").save(tmp_path / f"{name}.jpg")
        save_index_png(tmp_path / "masks" / f"{name}.png", np.full((6, 8), 3, np.uint8))
        records.append({"image": str(tmp_path / f"{name}.jpg"), "mask": f"{name}.png"})
    (tmp_path / "masks" / "predictions.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (tmp_path / "test.txt").write_text("2008_000001\n2008_000002\n")
    return tmp_path


def packed(folder, *flags, out="results.tgz"):
    return run("voc_results", f"--masks={folder / 'masks'}", f"--list={folder / 'test.txt'}", f"--out={folder / out}", *flags)


def test_masks_are_packed_in_the_order_of_the_list(folder):
    (folder / "val.txt").write_text("2008_000002\n2008_000001\n")
    ended = packed(folder, f"--list={folder / 'val.txt'}", "--competition=comp5")
    assert ended.code == 0, ended.err
    assert "2 masks in results/VOC2012/Segmentation/comp5_val_cls" in ended.out
    with tarfile.open(folder / "results.tgz") as archive:
        found = [name.rsplit("/", 1)[-1] for name in archive.getnames()]
    assert found == ["2008_000002.png", "2008_000001.png"]


def mask(labels):
    return lambda folder: save_index_png(folder / "masks" / "2008_000002.png", np.asarray(labels, np.uint8))


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda folder: (folder / "masks" / "2008_000002.png").unlink(), "has no mask of 2008_000002 (1 of 2); run predict"),
    (mask(np.full((6, 8), 21)), "2008_000002.png: label 21 at row 0, column 0"),
    (mask(np.full((6, 8), 255)), "2008_000002.png: label 255 is no class"),
    (mask(np.zeros((6, 9))), "2008_000002.png is 9x6 and its photograph"),
    (lambda folder: (folder / "masks" / "predictions.json").unlink(), "give --masks the folder that experiments.predict"),
    (lambda folder: (folder / "masks" / "predictions.json").write_text(json.dumps({"class_names": ["background", "cat"]})),
     "has masks of other classes than VOC 2012: background, cat"),
    (lambda folder: (folder / "masks" / "predictions.json").write_text("[" * 100_000), "predictions.json is damaged (it has too many lists"),
    (lambda folder: (folder / "masks" / "predictions.json").write_text("[]"), "predictions.json is damaged (list indices"),
    (lambda folder: (folder / "test.txt").unlink(), "test.txt does not exist"),
])  # fmt: skip
def test_what_is_refused(folder, spoil, message):
    spoil(folder)
    ended = packed(folder)
    assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err
    assert not list(folder.glob("*.tgz")) and not list(folder.glob(".unfinished*"))


def test_an_archive_has_the_ending_of_one(folder):
    assert "expected a name that ends with .tar.gz or .tgz, got 'results.zip'" in packed(folder, out="results.zip").err


def test_a_list_chooses_among_the_photographs(tmp_path):
    for name in ("a/x.jpg", "a/y.jpg", "b/x.jpg", "z.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    planned = planned_outputs([str(tmp_path)], tmp_path / "out", overlays=False, probabilities=False)

    def names(text):
        (tmp_path / "list.txt").write_text(text)
        return [photo.relative_to(tmp_path).as_posix() for photo, _ in chosen(planned, tmp_path / "list.txt")]

    assert names("y\n\nb/x.jpg\n") == ["a/y.jpg", "b/x.jpg"]
    assert names("/a/x.jpg /masks/x.png\nz\n") == ["a/x.jpg", "z.jpg"]
    for text, message in (
        ("z\nx\n", r"list.txt, line 2: 'x' may be .*a/x.jpg, .*b/x.jpg; correct the list"),
        ("nothing\n", r"line 1: 'nothing' is not among --images"),
        ("\n", "names no photograph; write one a line"),
    ):
        with pytest.raises(ValueError, match=message):
            names(text)
