"""What `predict --engine=ray` is made of, without Ray: rows, parts of the table, counted tries, URLs that are refused."""

import os
import pathlib
import sys

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from programs import assert_refused, run

from experiments import prediction_urls, predictions, ray_predictions
from experiments.prediction_plan import outputs_for
from lcrf_jax.predict import segmenter

NAMES = ("background", "ring")
JOB = ray_predictions.Job("", NAMES, False, None, False, False, {"refined": False, "tags_used": False}, 2)


class Rows(list):
    to_pylist = list.copy


@pytest.fixture
def labeller(monkeypatch):
    """A function (out, rows) that labels as an actor does; all of a photograph is a ring, without a network."""

    def labelled(_, images, tags, workers, **settings):
        assert settings == {"crf": False, "tile": None, "batch_size": 2}
        for image in images:
            yield np.ones(image.shape[:2], np.uint8), np.full(image.shape[:2], 0.5, np.float16), None

    monkeypatch.setattr(predictions, "begin_labelling", labelled)
    monkeypatch.setattr(segmenter, "make_segmenter", lambda *_: None)
    monkeypatch.setenv("LCRF_JAX_COMPILE_CACHE", "0")

    def label(out, rows):
        done = ray_predictions.Labeller(lambda: ({}, {}), JOB._replace(out=str(out)))(Rows(map(ray_predictions.decoded, rows)))
        if any(done["ends"]):
            raise ray_predictions.UserError(*done["problem"])
        return dict(zip(map(os.fsdecode, done["photo"]), done["problem"], strict=True))

    return label


def planned(folder, out, names):
    for at, name in enumerate(names):
        Image.new("RGB", (20, 10 + at), "red").save(folder / name)
    return [(folder / name, outputs_for(out, pathlib.Path(name), overlays=False, probabilities=False)) for name in names]


def table_of(out):
    return pyarrow.parquet.read_table(out / ray_predictions.TABLE).to_pylist()


def test_a_batch_has_masks_and_rows_and_tells_of_photographs_that_cannot_be_read(labeller, tmp_path):
    out, odd = tmp_path / "out", os.fsdecode(b"odd \xff.jpg")
    todo = planned(tmp_path, out, ("a.jpg", "b.jpg", odd))
    (tmp_path / "b.jpg").write_bytes(b"")
    problems = labeller(out, ray_predictions.rows_of(todo, out, None))
    assert problems == {str(tmp_path / "a.jpg"): "", str(tmp_path / odd): "",
                        str(tmp_path / "b.jpg"): f"{tmp_path / 'b.jpg'} has zero bytes; copy it again"}  # fmt: skip
    with Image.open(out / "a.png") as mask:
        assert mask.mode == "P" and (np.asarray(mask) == 1).all() and mask.size == (20, 10)
    ray_predictions.gathered(out, [])
    assert table_of(out)[0] == {
        "image": str(tmp_path / "a.jpg"), "mask": "a.png", "width": 20, "height": 10, "confidence": 0.5, "refined": False,
        "tags_used": False, "classes": [{"name": "ring", "area": 1.0, "confidence": 0.5}],
    }
    assert [row["mask"] for row in table_of(out)] == ["a.png", "odd ?.png"]
    assert sorted(os.fsencode(name) for name in os.listdir(out)) == [b"a.png", b"odd \xff.png", b"predictions.parquet"]


def test_a_mask_has_one_row_whatever_was_killed(labeller, tmp_path):
    out = tmp_path / "out"
    rows = ray_predictions.rows_of(planned(tmp_path, out, ("a.jpg", "b.jpg", "c.jpg")), out, None)
    labeller(out, rows[:2])
    labeller(out, rows[:2])  # its worker died before it could say that it was done
    labeller(out, rows[1:])  # in a batch with another one
    ray_predictions.gathered(out, ["c.png"])
    assert [row["mask"] for row in table_of(out)] == ["a.png", "b.png"]
    labeller(out, rows[2:])
    ray_predictions.gathered(out, [])
    assert [row["mask"] for row in table_of(out)] == ["a.png", "b.png", "c.png"]
    assert not (out / ray_predictions.PARTS).exists()


def test_a_batch_at_which_workers_die_is_given_up(labeller, tmp_path):
    out = tmp_path / "out"
    rows = ray_predictions.rows_of(planned(tmp_path, out, ("a.jpg",)), out, None)
    [path] = {out / ray_predictions.PARTS / f"{ray_predictions._name_of([{'mask': 'a.png'}])}.tries"}
    for tries, problem in ((ray_predictions.MOST_TRIES, "a worker has died 4 times at it"), (1, ""), ("", "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(tries))
        [told] = labeller(out, rows).values()
        assert told.startswith(problem) and bool(told) == bool(problem) and not path.exists()


def test_large_photographs_are_not_sent_through_ray(labeller, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_predictions, "LARGE_PIXELS", 199)
    out = tmp_path / "out"
    rows = ray_predictions.rows_of(planned(tmp_path, out, ("a.jpg",)), out, {tmp_path / "a.jpg": np.array([True, False])})
    assert ray_predictions.decoded(rows[0])["pixels"] == b"" and rows[0]["tags"] == b"\1\0"
    assert list(labeller(out, rows).values()) == [""] and (out / "a.png").exists()


def test_what_the_user_can_mend_comes_as_one_line(labeller, tmp_path):
    (tmp_path / "out").touch()
    rows = ray_predictions.rows_of(planned(tmp_path, tmp_path / "out", ("a.jpg",)), tmp_path / "out", None)
    with pytest.raises(ray_predictions.UserError, match="a folder that can be written|give another path"):
        labeller(tmp_path / "out", rows)


def test_urls_of_this_machine_are_paths():
    assert prediction_urls.place("file:///a%20b/c.jpg") == pathlib.Path("/a b/c.jpg")
    assert [prediction_urls.is_url(name) for name in ("s3://b/c", "file:///c", "c://d", "c")] == [True, False, True, False]


def test_flags_that_do_not_go_together_are_refused(tmp_path, monkeypatch):
    flags = (f"--checkpoint={tmp_path}", f"--images={tmp_path}", f"--out={tmp_path}")
    for url in ("--images=s3://bucket/photos", "--out=gs://bucket/masks"):
        assert_refused(run("predict", *flags, url), "--images and --out: URLs are read and written with --engine=ray")
    monkeypatch.setattr(ray_predictions, "check_installed", lambda: None)
    assert_refused(run("predict", *flags, "--images=s3://bucket/photos", "--engine=ray"), "expected folders of this machine or URLs, got both")
    for flag in ("--distributed", "--num_processes=2"):
        assert_refused(run("predict", *flags, "--engine=ray", flag), "--engine=ray shares the photographs by itself: leave out --distributed")


def test_without_ray_one_line_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ended = run("predict", f"--checkpoint={tmp_path}", f"--images={tmp_path}", f"--out={tmp_path}", "--engine=ray")
    assert_refused(ended, r"error: --engine=ray needs Ray, which is not installed: pip install '\.\[ray\]' in your clone")
