"""Files known by what they hold: moved, touched, renamed they are the same; changed they are not."""

import json
import os
import shutil

import pytest

from lcrf_jax.machine import contents
from lcrf_jax.machine.contents import content_digests


@pytest.fixture(autouse=True)
def memo(tmp_path, monkeypatch):
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path / "cache"))
    contents._known().clear()
    yield tmp_path / "cache" / "contents.json"
    contents._known().clear()


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / "photos" / name for name in ("a.jpg", "b.jpg")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode() * 1000)
        os.utime(path, (1e9, 1e9))
    return paths


@pytest.fixture
def old_clock(monkeypatch):
    """All files look settled, as those of users do."""
    monkeypatch.setattr(contents, "_SECONDS_OF_A_CLOCK", -100.0)


@pytest.fixture
def reads(monkeypatch):
    seen, digest = [], contents._digest
    monkeypatch.setattr(contents, "_digest", lambda fact: seen.append(os.path.basename(fact[0])) or digest(fact))
    return seen


def test_moved_renamed_and_touched_files_are_the_same_and_changed_ones_are_not(files, tmp_path):
    before = content_digests(files)
    assert len(set(before)) == 2
    os.utime(files[0])
    shutil.move(tmp_path / "photos", tmp_path / "moved")
    moved = [tmp_path / "moved" / path.name for path in files]
    assert content_digests(moved) == before
    moved[1] = moved[1].rename(tmp_path / "moved" / "c.jpg")
    assert content_digests(moved) == before
    content, times = moved[0].read_bytes(), os.stat(moved[0])
    moved[0].write_bytes(b"x" + content[1:])
    os.utime(moved[0], ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and time
    assert content_digests(moved)[0] != before[0] and content_digests(moved)[1] == before[1]


def test_unchanged_files_are_read_once(files, reads, old_clock):
    assert content_digests(files) == content_digests(files) == content_digests([*files, files[0]])[:2]
    assert sorted(reads) == ["a.jpg", "b.jpg"]


def test_a_file_that_was_just_written_is_read_again(files, reads):
    files[0].write_bytes(b"new")
    content_digests(files)
    content_digests(files)
    assert reads.count("a.jpg") == 2


def test_of_much_that_was_read_a_memo_is_kept(files, reads, memo, old_clock, monkeypatch):
    content_digests(files)
    assert not memo.exists()  # of little it is not worth it
    monkeypatch.setattr(contents, "WORTH_A_MEMO", 1)
    contents._known().clear()
    before = content_digests(files)
    contents._known().clear()
    reads.clear()
    assert content_digests(files) == before and reads == []
    assert len(json.loads(memo.read_text())) == 2


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "[[1]]", '[["a", "b", "c"]]'])
def test_a_damaged_memo_is_none(files, memo, old_clock, monkeypatch, text):
    monkeypatch.setattr(contents, "WORTH_A_MEMO", 1)
    memo.parent.mkdir()
    memo.write_text(text)
    assert len(content_digests(files)) == 2


def test_a_memo_that_cannot_be_written_is_no_reason_to_fail(files, memo, old_clock, monkeypatch):
    monkeypatch.setattr(contents, "WORTH_A_MEMO", 1)
    memo.parent.write_text("a file")
    assert len(content_digests(files)) == 2


def test_a_file_that_is_not_there_is_named(files):
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg does not exist. It was there when the data was looked at: bring it back, and run the same command"):
        content_digests(files)
    assert content_digests([]) == ()


def test_a_file_that_cannot_be_read_is_told_from_all_others_and_looked_at_again(files, old_clock, monkeypatch):
    def refused(path, *_):
        if str(path).endswith("a.jpg"):
            raise PermissionError(13, "Permission denied")
        return open(path, "rb")

    monkeypatch.setattr(contents, "open", refused, raising=False)
    unreadable, whole = content_digests(files)
    assert unreadable == "unreadable" and len(whole) == 64
    monkeypatch.undo()
    monkeypatch.setenv("LCRF_JAX_CACHE", str(files[0].parent))
    assert len(content_digests(files)[0]) == 64
