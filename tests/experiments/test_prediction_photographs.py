"""Photographs within shards and tables in Parquet: `predict` takes them as it takes files."""

import functools
import os
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from programs import assert_refused, run
from test_ray_pieces import labeller  # noqa: F401 - a fixture

from experiments import prediction_photographs, predictions, ray_predictions
from experiments.prediction_plan import planned_outputs
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sharding import write_shards

NAMES = ("barn/7.jpg", "barn/8.png", "odd name ä.jpg")
planned = functools.partial(planned_outputs, overlays=False, probabilities=False)


@pytest.fixture
def folder(tmp_path):
    """A folder of three photographs."""
    folder = tmp_path / "photos"
    (folder / "barn").mkdir(parents=True)
    for at, name in enumerate(NAMES):
        noise = np.random.default_rng(at).integers(0, 256, (12 + at, 20, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def table(file, /, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=2)
    return file


def contents(folder):
    return [(folder / name).read_bytes() for name in NAMES]


def masks_of(pairs, out):
    return [outputs.mask.relative_to(out).as_posix() for _, outputs in pairs]


def assert_read_as_files(pairs, folder):
    for (photo, _), name in zip(pairs, NAMES, strict=True):
        expected = prediction_photographs.read_photograph(folder / name)
        np.testing.assert_array_equal(prediction_photographs.read_photograph(photo), expected)
        assert prediction_photographs.size_of(photo) == expected.shape[:2]


def test_a_table_of_bytes_with_names(folder, tmp_path):
    rows = [{"bytes": content, "path": name} for content, name in zip(contents(folder), NAMES, strict=True)]
    pairs = planned([str(table(tmp_path / "photos.parquet", image=rows))], tmp_path / "out")
    assert masks_of(pairs, tmp_path / "out") == ["barn/7.png", "barn/8.png", "odd name ä.png"]
    assert_read_as_files(pairs, folder)
    names = pyarrow.array([f"./{NAMES[0]}", NAMES[1].replace("/", "//"), NAMES[2]]).dictionary_encode()
    pairs = planned([str(table(tmp_path / "two.PARQUET", image=contents(folder), file_name=names, tags=["a"] * 3))], tmp_path / "out")
    assert masks_of(pairs, tmp_path / "out") == ["barn/7.png", "barn/8.png", "odd name ä.png"]
    assert_read_as_files(pairs, folder)


@pytest.mark.parametrize("names", [None, ["a.jpg", "./a.jpg", "b.jpg"], ["a.jpg", None, "b.jpg"], ["/a.jpg", "b.jpg", "c.jpg"],
                                   ["../a.jpg", "b.jpg", "c.jpg"], ["a\0.jpg", "b.jpg", "c.jpg"]])  # fmt: skip
def test_bytes_without_names_that_can_be_those_of_masks_are_called_by_their_rows(folder, tmp_path, names):
    columns = {"image": contents(folder)} | ({} if names is None else {"path": names})
    pairs = planned([str(table(tmp_path / "photos.parquet", **columns))], tmp_path / "out")
    assert masks_of(pairs, tmp_path / "out") == ["00000000.png", "00000001.png", "00000002.png"]
    assert_read_as_files(pairs, folder)


def test_a_table_of_paths(folder, tmp_path):
    beside = table(tmp_path / "list.parquet", path=[f"photos/{name}" for name in NAMES])
    assert masks_of(planned([str(beside)], tmp_path / "out"), tmp_path / "out") == ["photos/barn/7.png", "photos/barn/8.png", "photos/odd name ä.png"]
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    absolute = table(elsewhere / "list.parquet", image=[f"file://{folder}/barn/7.jpg", f"{folder}/barn/8.png", f"{folder}/barn/../odd name ä.jpg"])
    pairs = planned([str(absolute)], tmp_path / "out")
    assert masks_of(pairs, tmp_path / "out") == ["barn/7.png", "barn/8.png", "odd name ä.png"]
    assert_read_as_files(pairs, folder)
    gone = table(tmp_path / "gone.parquet", path=["photos/gone.jpg"])
    ((photo, _),) = planned([str(gone)], tmp_path / "out")
    assert prediction_photographs.read_photograph(photo) == f"{photo} does not exist"


def test_columns_of_views_and_categories_are_of_their_kind(folder, tmp_path):
    for number, kind in enumerate((pyarrow.binary_view(), pyarrow.large_binary(), pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()))):
        rows = table(tmp_path / f"{number}.parquet", image=pyarrow.array(contents(folder)).cast(kind), path=pyarrow.array(NAMES).cast(pyarrow.large_string()))
        pairs = planned([str(rows)], tmp_path / "out")
        assert masks_of(pairs, tmp_path / "out") == ["barn/7.png", "barn/8.png", "odd name ä.png"]
        assert_read_as_files(pairs, folder)


def test_a_pattern_of_tables(folder, tmp_path):
    for name in "ab":
        table(tmp_path / f"{name}.parquet", image=contents(folder)[:2])
    given = prediction_photographs.expanded([str(tmp_path / "*.parquet"), str(folder / "*.jpg")])
    assert given == [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"), str(folder / "*.jpg")]
    assert masks_of(planned(given[:2], tmp_path / "out"), tmp_path / "out") == [
        "a.parquet/00000000.png", "a.parquet/00000001.png", "b.parquet/00000000.png", "b.parquet/00000001.png"]


def test_shards_with_all_their_splits(tmp_path):
    sources = {split: open_source("textures", split, size=96, num_train=5, num_val=2) for split in ("train", "val")}
    write_shards(sources, tmp_path / "shards", shard_bytes=10_000)
    pairs = planned([str(tmp_path / "shards")], tmp_path / "out")
    expected = [f"{split}/{name}.png" for split in sources for name in sources[split].names]
    assert masks_of(pairs, tmp_path / "out") == expected and len(pairs) == 7
    for (photo, _), image in zip(pairs, (source[at].image for source in sources.values() for at in range(len(source))), strict=True):
        np.testing.assert_array_equal(prediction_photographs.read_photograph(photo), image)
    missing = prediction_photographs.read_photograph(tmp_path / "shards/train/gone")
    assert missing == f"{tmp_path / 'shards/train/gone'} does not exist"


def test_names_with_a_dot_and_no_extension_keep_what_is_behind_it(folder, tmp_path):
    rows = table(tmp_path / "photos.parquet", image=contents(folder), path=["a.1", "a.2", "b.jpg"])
    assert masks_of(planned([str(rows)], tmp_path / "out"), tmp_path / "out") == ["a.1.png", "a.2.png", "b.png"]


def test_a_mask_is_made_again_where_the_table_was_written_since(folder, tmp_path):
    rows = table(tmp_path / "photos.parquet", image=contents(folder))
    pairs = planned([str(rows)], tmp_path / "out")
    assert predictions.remaining(pairs, tmp_path / "out", {}, overwrite=False) == pairs
    for _, outputs in pairs:
        outputs.mask.write_bytes(b"a mask")
    assert predictions.remaining(pairs, tmp_path / "out", {}, overwrite=False) == []
    os.utime(rows, (outputs.mask.stat().st_mtime + 5,) * 2)
    prediction_photographs._OPEN.clear()  # as another process
    assert predictions.remaining(pairs, tmp_path / "out", {}, overwrite=False) == pairs


def test_actors_of_ray_label_them(folder, tmp_path, labeller):  # noqa: F811
    out = tmp_path / "out"
    pairs = planned([str(table(tmp_path / "photos.parquet", image=contents(folder)[:2]))], out)
    rows = ray_predictions.rows_of(pairs, out, None)
    assert set(labeller(out, rows).values()) == {""}
    with Image.open(out / "00000001.png") as mask:
        assert mask.size == (20, 13)


def test_what_is_wrong_names_the_table(folder, tmp_path):
    def told(**columns):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            planned([str(table(tmp_path / "odd.parquet", **columns))], tmp_path / "out")
        prediction_photographs._OPEN.clear()
        return str(error.value).removeprefix(str(tmp_path))

    expected = "/odd.parquet: expected a column of paths or bytes of photographs, named one of image, path, file, "
    assert told(picture=[b"a"]).startswith(expected) and "it has picture: rename it" in told(picture=[b"a"])
    assert told(image=[1, 2]) == "/odd.parquet: expected paths as text or bytes of photographs in the column 'image', got int64; write it anew"
    assert told(path=["a.jpg", ""]) == "/odd.parquet: the column 'path' has no path in row 1; leave the row out, or give one"
    assert told(path=["a\0.jpg"]).endswith("has no path in row 0; leave the row out, or give one")
    assert told(path=pyarrow.array([], pyarrow.string())) == f"--images: {tmp_path / 'odd.parquet'} holds no photographs"
    (tmp_path / "cut.parquet").write_bytes(table(tmp_path / "odd.parquet", image=contents(folder)).read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut.parquet is no table in Parquet \(.*\); write it again"):
        planned([str(tmp_path / "cut.parquet")], tmp_path / "out")
    with pytest.raises(ValueError, match="lists URLs and paths of this machine, s3://b/a.jpg and b.jpg"):
        prediction_photographs.urls_in(str(table(tmp_path / "mixed.parquet", url=["s3://b/a.jpg", "b.jpg"])))


def test_a_row_without_bytes_is_a_problem_of_one_photograph(folder, tmp_path):
    rows = table(tmp_path / "photos.parquet", image=[contents(folder)[0], b"", b"no picture"])
    read = [prediction_photographs.read_photograph(photo) for photo, _ in planned([str(rows)], tmp_path / "out")]
    assert read[0].shape == (12, 20, 3)
    assert read[1] == f"{rows}/00000001 has no bytes in row 1 of the table; write it again"
    assert read[2] == f"{rows}/00000002 is not an image that Pillow can read"


def test_without_pyarrow_a_table_is_refused_with_what_to_install(tmp_path, monkeypatch):
    rows = table(tmp_path / "list.parquet", path=["a.jpg"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a table in Parquet needs pyarrow .*pip install '.\[ray\]'"):
        planned([str(rows)], tmp_path / "out")


@pytest.mark.slow
def test_masks_of_shards_and_tables_are_those_of_the_files(checkpoint, folder, tmp_path):
    (tmp_path / "tags.csv").write_text("image,tags\n" + "".join(f"photos/{name},ring\n" for name in NAMES))
    assert run("shards", f"--data={tmp_path}", f"--out={tmp_path / 'shards'}").code == 0
    table(tmp_path / "photos.parquet", image=contents(folder), path=list(NAMES))
    command = "predict", f"--checkpoint={checkpoint}", "--nooverlays", "--crf"
    found = {}
    for name in ("photos", "shards", "photos.parquet"):
        ended = run(*command, f"--images={tmp_path / name}", f"--out={tmp_path / 'masks' / name}")
        assert ended.code == 0 and "3 masks in" in ended.out, ended.err
        found[name] = [path.read_bytes() for path in sorted((tmp_path / "masks" / name).rglob("*.png"))]
    assert found["photos"] == found["shards"] == found["photos.parquet"] and len(found["photos"]) == 3
    again = run(*command, f"--images={tmp_path / 'shards'}", f"--out={tmp_path / 'masks/shards'}")
    assert again.code == 0 and "3 of these were done before" in again.out
    table(tmp_path / "urls.parquet", url=["s3://bucket/a.jpg"])
    assert_refused(run(*command, f"--images={tmp_path / 'urls.parquet'}", f"--out={tmp_path / 'other'}"), "URLs are read and written with --engine=ray")


def test_a_table_or_shards_that_vanish_after_they_were_opened_are_read_all_the_same(folder, tmp_path):
    rows = table(tmp_path / "photos.parquet", image=contents(folder), path=NAMES)
    of_table = planned([str(rows)], tmp_path / "out")
    write_shards({"train": open_source("textures", "train", size=96, num_train=3, num_val=2)}, tmp_path / "shards", shard_bytes=10_000)
    of_shards = planned([str(tmp_path / "shards")], tmp_path / "others")
    rows.unlink()
    (tmp_path / "shards/shards.json").unlink()
    for pairs in (of_table, of_shards):
        assert len(pairs) == 3
        assert not [photo for photo, _ in pairs if isinstance(prediction_photographs.read_photograph(photo), str)]
        assert all(prediction_photographs.changed(photo) for photo, _ in pairs)


def test_a_folder_of_tables_or_shards_alone_says_what_to_give(folder, tmp_path):
    place = tmp_path / "tables"
    (place / "deep").mkdir(parents=True)
    rows = table(place / "deep/a.parquet", image=contents(folder))
    with pytest.raises(FileNotFoundError, match=f"holds no photographs .* \\(it holds 1 table in Parquet: give --images={rows}\\)"):
        planned([str(place)], tmp_path / "out")
    table(place / "deep/b.parquet", image=contents(folder))
    with pytest.raises(FileNotFoundError, match=rf"it holds 2 tables in Parquet: give --images='{place}/deep/\*.parquet'"):
        planned([str(place)], tmp_path / "out")
    (place / "shards").mkdir()
    (place / "shards/train-00000.array_record").touch()
    for name in ("a", "b"):
        (place / f"deep/{name}.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"it holds array_record files without shards.json: give the folder of shards"):
        planned([str(place)], tmp_path / "out")
    (place / "shards/shards.json").touch()
    with pytest.raises(FileNotFoundError, match=f"it holds shards: give --images={place}/shards\\)"):
        planned([str(place)], tmp_path / "out")
