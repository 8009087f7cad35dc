"""Photographs in shards: what is written is what is read, a killed writer goes on, and nothing that is wrong is silent."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from lcrf_jax.data import sharding
from lcrf_jax.data.example import PartOfSource
from lcrf_jax.data.files.shard_files import ShardRecord, packed, unpacked
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sharding import write_shards
from lcrf_jax.data.sources.shards import ShardsSource

SMALL = 4000  # bytes: some photographs a shard


@pytest.fixture
def photographs(tmp_path):
    root = tmp_path / "photographs"
    (root / "masks").mkdir(parents=True)
    rows, draw = ["image,tags"], np.random.default_rng(0)
    for number in range(12):
        pixels = draw.integers(0, 256, (24, 32 + number, 3), np.uint8)
        turn = Image.Exif()
        turn[0x0112] = 6 if number == 3 else 1
        Image.fromarray(pixels).save(root / f"{number:02}.{'jpg' if number % 2 else 'png'}", exif=turn)
        rows.append(f"{number:02},{('cat', 'cat;dog', '')[number % 3]}")
    for number in (0, 2, 3):
        shape = (32 + number, 24) if number == 3 else (24, 32 + number)
        Image.fromarray(np.tile(np.arange(shape[1], dtype=np.uint8) % 3, (shape[0], 1))).save(root / "masks" / f"{number:02}.png")
    (root / "tags.csv").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text("background\ncat\ndog\n")
    (root / "val.txt").write_text("00\n02\n")
    return root


def sources(root, **options):
    return {split: open_source("folder", split, root=root, masks=split == "val", **options) for split in ("train", "val")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_examples(one, other):
    assert (one.names, one.class_names, one.masks, len(one)) == (other.names, other.class_names, other.masks, len(other))
    np.testing.assert_array_equal(one.tags, other.tags)
    for index in range(len(one)):
        for here, there in zip(one[index], other[index], strict=True):
            np.testing.assert_array_equal(here, there)


def test_what_is_read_is_what_the_folder_has_to_the_byte(photographs, tmp_path):
    index, folder = write_shards(sources(photographs), tmp_path / "shards", shard_bytes=SMALL), sources(photographs)
    assert len(index["splits"]["train"]["shards"]) > 2 and index["splits"]["train"]["counts"] == {"cat": 7, "dog": 4}
    for split in ("train", "val"):
        source = open_source("shards", split, root=tmp_path / "shards", masks=split == "val")
        assert_same_examples(source, folder[split])
        assert [source.encoded(row) for row in range(len(source))] == [path.read_bytes() for path in folder[split].paths]
    assert not {path.suffix for path in (tmp_path / "shards").iterdir()} - {".json", ".npz", ".array_record"}
    part = open_source("shards", "train[1::2]", root=tmp_path / "shards")
    assert part.names == folder["train"].names[1::2] and part.encoded(0) == folder["train"].paths[1].read_bytes()


def test_a_start_opens_no_shard(photographs, tmp_path, monkeypatch):
    write_shards(sources(photographs), tmp_path / "shards", shard_bytes=SMALL)
    from array_record.python import array_record_module

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", None)
    source = ShardsSource(tmp_path / "shards", "train")
    assert source.tags.sum() == 10 + 7 + 4 and source.fingerprint
    with pytest.raises(TypeError):
        source[0]


def test_the_fingerprint_is_of_the_contents(photographs, tmp_path):
    for name in ("one", "two"):
        write_shards(sources(photographs), tmp_path / name, shard_bytes=SMALL)
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(photographs / "04.png")
    write_shards(sources(photographs), tmp_path / "three", shard_bytes=SMALL)
    one, two, three = (ShardsSource(tmp_path / name, "train").fingerprint for name in ("one", "two", "three"))
    assert one == two != three


def test_a_source_without_files_keeps_its_pixels(tmp_path):
    textures = open_source("textures", "val", masks=True, num_val=3, size=96)
    write_shards({"val": textures}, tmp_path / "shards", shard_bytes=SMALL)
    assert_same_examples(ShardsSource(tmp_path / "shards", "val", masks=True), textures)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("noted", [True, False])
def test_a_killed_writer_goes_on_to_the_same_files(photographs, tmp_path, monkeypatch, stop, noted):
    write_shards(sources(photographs), tmp_path / "whole", shard_bytes=SMALL)
    shards, write, made = tmp_path / "shards", sharding._written, []

    def killed(out, name, *rest):
        if noted and len(made) == stop:
            (out / f".{name}.tmp").write_bytes(b"half")
            raise Killed
        made.append(write(out, name, *rest))
        if not noted and len(made) == stop + 1:  # on the disk, and not noted
            raise Killed
        return made[-1]

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(sharding, "_written", killed)
        write_shards(sources(photographs), shards, shard_bytes=SMALL)
    with pytest.raises(FileNotFoundError, match="not finished; run the same"):
        ShardsSource(shards, "train")
    before = len(made)
    monkeypatch.setattr(sharding, "_written", lambda *all_of_it: made.append(write(*all_of_it)) or made[-1])
    write_shards(sources(photographs), shards, shard_bytes=SMALL)
    whole = contents(tmp_path / "whole")
    assert contents(shards) == whole
    assert len(made) - before == len([name for name in whole if name.endswith("record")]) - stop


def test_a_second_run_writes_nothing_and_other_contents_are_refused(photographs, tmp_path):
    shards = tmp_path / "shards"
    write_shards(sources(photographs), shards, shard_bytes=SMALL)
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    write_shards(sources(photographs), shards, shard_bytes=SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    with pytest.raises(ValueError, match="other contents: shard_bytes differ"):
        write_shards(sources(photographs), shards, shard_bytes=2 * SMALL)
    both = sources(photographs)
    with pytest.raises(ValueError, match=r"the split train \(10 photographs without masks then, 9 photographs without masks now\)"):
        write_shards({**both, "train": PartOfSource(both["train"], range(9))}, shards, shard_bytes=SMALL)
    with pytest.raises(ValueError, match="holds no shards, but 00.png"):
        write_shards(both, photographs, shard_bytes=SMALL)
    os.utime(photographs / "05.jpg", (4e9, 4e9))
    with pytest.raises(ValueError, match=r"1 photographs were changed after their shards were written \(05.jpg\)"):
        write_shards(both, shards, shard_bytes=SMALL)


def test_what_is_missing_cut_or_exchanged_is_named(photographs, tmp_path):
    shards = tmp_path / "shards"
    write_shards(sources(photographs), shards, shard_bytes=SMALL)
    with pytest.raises(FileNotFoundError, match=r"no split 'trian': there are train \(10\), val \(2\); did you mean 'train'"):
        ShardsSource(shards, "trian")
    with pytest.raises(FileNotFoundError, match="no masks of the split 'train'"):
        ShardsSource(shards, "train", masks=True)
    with pytest.raises(ValueError, match="holds shards, and no photographs.*the configuration shards"):
        open_source("folder", "train", root=shards)
    first = min(shards.glob("train*.array_record"))
    for name, damage, message in (
        ("missing", lambda at: (at / first.name).unlink(), "00000.array_record is missing, and shards.json tells of it"),
        ("cut", lambda at: os.truncate(at / first.name, 100), "has 100 bytes, and .* cut short or another"),
        ("table", lambda at: (at / "train.npz").write_bytes(b"x"), "train.npz is not the table"),
        ("index", lambda at: (at / "shards.json").write_text("{"), "shards.json is no index of shards"),
        ("later", lambda at: edit(at, version=2), "has version 2, and this lcrf_jax reads 1"),
    ):
        damage(at := shutil.copytree(shards, tmp_path / name).resolve())
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            ShardsSource(at, "train")
    with pytest.raises(FileNotFoundError, match="holds no shards.json; .* does not exist: give the folder"):
        ShardsSource(tmp_path / "nowhere", "train")


def edit(folder, **changes):
    path = folder / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_damaged_or_exchanged_record_is_named(photographs, tmp_path):
    shards = tmp_path / "shards"
    write_shards({"train": sources(photographs)["train"]}, shards, shard_bytes=10**6)
    path, source = next(shards.glob("*.array_record")), ShardsSource(shards, "train")
    content = path.read_bytes()
    at = content.index(source.encoded(1)) + 200
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    damaged = ShardsSource(shards, "train")
    with pytest.raises(ValueError, match=f"00000.array_record/{source.names[1]}: the shard is damaged or gone .*hash mismatch"):
        damaged[1]
    assert damaged[0].name == source.names[0]
    path.write_bytes(content.replace(source.names[2].encode(), source.names[3].encode(), 1))
    with pytest.raises(ValueError, match="damaged|holds"):
        ShardsSource(shards, "train")[2]


def test_a_record_of_any_names():
    record = ShardRecord("höhe/1 \U0001f600.jpg", ("ring", "größe"), b"\0\1" * 9, b"")
    assert unpacked(packed(record)) == record
    for content in (b"", b"\4\0\0\0{}", packed(record)[:-1], packed(record) + b"x"):
        with pytest.raises(ValueError, match="no photograph with tags"):
            unpacked(content)


def test_a_full_disk_is_told(photographs, tmp_path, monkeypatch):
    from array_record.python import array_record_module

    class Full:
        def __init__(self, *_):
            pass

        def write(self, content):
            raise RuntimeError("write() failed: No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="cannot be written .*; make room and run the same command again") as told:
        write_shards(sources(photographs), tmp_path / "shards", shard_bytes=SMALL)
    assert told.value.errno == 28 and "train-00000" in str(told.value)
