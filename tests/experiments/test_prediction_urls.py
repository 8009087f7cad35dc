"""Photographs and masks at URLs, on the file system of this process' memory: it has one tree for all, and no second process sees it."""

import datetime
import functools
import io
import os

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from test_ray_pieces import labeller  # noqa: F401 - a fixture

from experiments import prediction_photographs, prediction_urls, predictions, ray_predictions
from experiments.prediction_plan import outputs_for

pytest.importorskip("upath", reason="the extra ray is tested in an environment of its own, see test_ray.py")
OUTPUTS = functools.partial(outputs_for, overlays=False, probabilities=False)


@pytest.fixture
def bucket():
    import fsspec

    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    return prediction_urls.place("memory://bucket")


def put(bucket, *names):
    for name in names:
        content = io.BytesIO()
        Image.new("RGB", (20, 10), "red").save(content, format="PNG")
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).write_bytes(content.getvalue())


def planned(patterns, out):
    found = prediction_urls.planned_at_urls(patterns, out, OUTPUTS)
    return {str(photo).removeprefix("memory://bucket/"): str(outputs.mask).removeprefix(f"{out}/") for photo, outputs in found}


def test_folders_patterns_and_files_are_found_as_on_a_disk(bucket):
    put(bucket, "photos/a.jpg", "photos/sub/b.png", "photos/notes.txt", "photos/.hidden/c.jpg", "photos/@eaDir/d.jpg", "photos/._e.jpg",
        "photos/old/predictions.json", "photos/old/f.png", "photos/out/g.png", "other/h.webp")  # fmt: skip
    out = bucket / "photos/out"
    assert planned(["memory://bucket/photos"], out) == {"photos/a.jpg": "a.png", "photos/sub/b.png": "sub/b.png"}
    assert planned(["memory://bucket/photos/sub/*.png"], out) == {"photos/sub/b.png": "b.png"}
    assert planned(["memory://bucket/photos/a.jpg"], out) == {"photos/a.jpg": "a.png"}
    assert planned(["memory://bucket/photos", "memory://bucket/other"], bucket / "masks") == {
        "photos/a.jpg": "photos/a.png", "photos/sub/b.png": "photos/sub/b.png", "photos/out/g.png": "photos/out/g.png",
        "other/h.webp": "other/h.png"}  # fmt: skip


def test_what_cannot_be_is_refused(bucket):
    put(bucket, "photos/a.jpg", "photos/a.webp", "b.png")
    with pytest.raises(FileNotFoundError, match="--images: there is no photograph at memory://bucket/none"):
        planned(["memory://bucket/none"], bucket / "out")
    with pytest.raises(ValueError, match=r"a\.jpg and .*a\.webp would both be written to .*a\.png"):
        planned(["memory://bucket/photos"], bucket / "out")
    with pytest.raises(ValueError, match=r"b\.png would be written over the photograph"):
        planned(["memory://bucket/b.png"], bucket)
    with pytest.raises(ValueError, match="nope://bucket cannot be reached .*give a folder, or a URL"):
        prediction_urls.place("nope://bucket")


def test_a_photograph_is_read_and_told_of_by_its_url(bucket):
    put(bucket, "a.png")
    (bucket / "b.jpg").write_bytes(b"no image")
    assert prediction_photographs.read_photograph("memory://bucket/a.png").shape == (10, 20, 3)
    assert prediction_photographs.read_photograph("memory://bucket/b.jpg") == "memory://bucket/b.jpg is not an image that Pillow can read"
    assert prediction_photographs.read_photograph("memory://bucket/c.jpg").startswith("memory://bucket/c.jpg cannot be read (")


def test_masks_and_rows_come_to_a_url_and_what_is_there_is_not_made_again(bucket, labeller):  # noqa: F811
    put(bucket, "photos/a.png", "photos/sub/b.png")
    out, settings = bucket / "masks", {"crf": False}
    todo = prediction_urls.planned_at_urls(["memory://bucket/photos"], out, OUTPUTS)
    assert predictions.remaining(todo, out, settings, overwrite=False) == todo
    problems = labeller(out, ray_predictions.rows_of(todo, out, None))
    assert set(problems.values()) == {""} and len(problems) == 2
    ray_predictions.gathered(out, [])
    assert sorted(bucket.fs.find("/bucket/masks")) == [
        f"/bucket/masks/{name}" for name in ("a.png", "predictions.json", "predictions.parquet", "sub/b.png")]
    with (out / "sub/b.png").open("rb") as file, Image.open(file) as mask:
        assert mask.mode == "P" and (np.asarray(mask) == 1).all()
    with (out / "predictions.parquet").open("rb") as file:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    assert [(row["image"], row["mask"]) for row in rows] == [
        ("memory://bucket/photos/a.png", "a.png"), ("memory://bucket/photos/sub/b.png", "sub/b.png")]
    assert predictions.remaining(todo, out, settings, overwrite=False) == []
    (out / "a.png").unlink()
    assert [str(photo) for photo, _ in predictions.remaining(todo, out, settings, overwrite=False)] == ["memory://bucket/photos/a.png"]
    with pytest.raises(ValueError, match="holds masks made with crf False and not True"):
        predictions.remaining(todo, out, {"crf": True}, overwrite=False)
    assert predictions.remaining(todo, out, {"crf": True}, overwrite=True) == todo


def test_a_bucket_is_asked_no_more_often_for_many_photographs(bucket, monkeypatch):
    asked = []
    for name in ("info", "exists", "isfile"):
        method = getattr(type(bucket.fs), name)
        monkeypatch.setattr(type(bucket.fs), name, lambda self, *args, method=method, **more: asked.append(args) or method(self, *args, **more))

    def times_asked(folder, count):
        put(bucket, *(f"{folder}/photos/{number}.png" for number in range(count)))
        out = bucket / folder / "masks"
        asked.clear()
        todo = prediction_urls.planned_at_urls([f"memory://bucket/{folder}/photos"], out, OUTPUTS)
        assert predictions.remaining(todo, out, {}, overwrite=False) == todo
        first = len(asked)
        for _, outputs in todo:
            with outputs.mask.open("wb") as file:
                file.write(b"a mask")
        between = len(asked)
        assert predictions.remaining(todo, out, {}, overwrite=False) == []
        return first, len(asked) - between

    assert times_asked("few", 2) == times_asked("many", 40)


@pytest.mark.parametrize(("about", "seconds"), [
    ({"mtime": 5.5}, 5.5), ({"LastModified": datetime.datetime(1970, 1, 1, 0, 1, tzinfo=datetime.UTC)}, 60),
    ({"updated": "1970-01-01T00:00:02.500Z"}, 2.5), ({"updated": "yesterday"}, 0), ({}, 0), ({"mtime": None, "created": 3}, 3)])  # fmt: skip
def test_file_systems_tell_of_times_in_their_own_ways(about, seconds):
    assert prediction_urls._written(about) == seconds * 10**9


def test_what_cannot_be_sent_is_told_with_its_url(bucket, labeller, tmp_path, monkeypatch):  # noqa: F811
    put(bucket, "a.png")
    todo = prediction_urls.planned_at_urls(["memory://bucket/a.png"], bucket / "out", OUTPUTS)

    def refuse(*_, **__):
        raise RuntimeError("403 forbidden")

    monkeypatch.setattr(type(bucket.fs), "put_file", refuse)
    with pytest.raises(ray_predictions.UserError, match=r"memory://bucket/out/.* cannot be written \(403 forbidden\); what is done is kept"):
        labeller(bucket / "out", ray_predictions.rows_of(todo, bucket / "out", None))
    assert os.listdir(tmp_path) == []


def test_a_table_of_urls(bucket, tmp_path):
    put(bucket, "photos/b/1.png", "photos/a.png")
    urls = ["memory://bucket/photos/b/1.png", "memory://bucket/photos/a.png", "memory://bucket/photos/gone.png"]
    pyarrow.parquet.write_table(pyarrow.table({"url": urls}), tmp_path / "list.parquet")
    listed = prediction_photographs.urls_in(str(tmp_path / "list.parquet"))
    todo = prediction_urls.planned_at_urls([], tmp_path / "out", OUTPUTS, listed)
    assert [(str(photo), str(outputs.mask.relative_to(tmp_path))) for photo, outputs in todo] == [
        (urls[1], "out/a.png"), (urls[0], "out/b/1.png"), (urls[2], "out/gone.png")]
    assert predictions.remaining(todo[:2], tmp_path / "out", {}, overwrite=False) == todo[:2]
    problems = [ray_predictions.decoded(row)["problem"] for row in ray_predictions.rows_of(todo, tmp_path / "out", None)]
    assert problems[:2] == ["", ""] and problems[2].startswith(f"{urls[2]} cannot be read (")
