"""Files that are written whole, and only once, on disks of every kind."""

import concurrent.futures
import errno
import fcntl
import os
import pathlib
import threading

import pytest

from lcrf_jax.machine.errors import UserError
from lcrf_jax.machine.files import (
    NO_LINKS,
    at_home,
    move_whole,
    naming,
    parsed_json,
    real_path,
    write_once,
    write_whole,
)


def refusing(number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    return refused


def test_a_file_is_replaced_in_one_move_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "results.json"
    for text in ("old", "new ä"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert os.listdir(tmp_path) == ["results.json"]


def test_programs_that_write_one_file_at_once_leave_a_whole_one(tmp_path):
    path, started = tmp_path / "checked.json", threading.Barrier(4)

    def write(letter):
        started.wait(timeout=10)
        for _ in range(10):
            write_whole(path, letter * 50_000)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert path.read_text() in {letter * 50_000 for letter in "abcd"} and os.listdir(tmp_path) == ["checked.json"]


@pytest.mark.parametrize(("function", "number", "word"), [
    ("fsync", errno.ENOSPC, "make room"), ("replace", errno.EIO, "look at that disk"), ("replace", errno.EROFS, "can be written"),
])  # fmt: skip
def test_what_fails_names_the_file_and_changes_nothing(tmp_path, monkeypatch, function, number, word):
    path = tmp_path / "results.json"
    write_whole(path, "old")
    monkeypatch.setattr(os, function, refusing(number))
    with pytest.raises(OSError, match=rf"{word}.*results\.json'") as raised:
        write_whole(path, "new")
    assert raised.value.errno == number
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_a_disk_that_cannot_sync_a_file_serves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refusing(errno.EINVAL))
    write_whole(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"


def test_errors_with_a_text_of_their_own_stay_as_they_are():
    with pytest.raises(OSError, match="^needs 3 GB$"), naming("file"):
        raise OSError("needs 3 GB")


@pytest.mark.parametrize("number", [None, *sorted(NO_LINKS)], ids=lambda number: errno.errorcode.get(number, "links"))
@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_the_first_one_writes_with_and_without_hard_links_and_locks(tmp_path, monkeypatch, number, locks):
    path = tmp_path / "predictions.json"
    if number is not None:
        monkeypatch.setattr(os, "link", refusing(number))
    if not locks:
        monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    assert write_once(path, "first") and not write_once(path, "second")
    assert path.read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["predictions.json"]


def test_of_many_at_once_one_writes_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    started = threading.Barrier(4)

    def write(text):
        started.wait(timeout=10)
        return write_once(tmp_path / "predictions.json", text)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        won = list(pool.map(write, "abcd"))
    assert sum(won) == 1 and (tmp_path / "predictions.json").read_text() == "abcd"[won.index(True)]
    assert os.listdir(tmp_path) == ["predictions.json"]


def test_a_link_that_fails_otherwise_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refusing(errno.EIO))
    with pytest.raises(OSError, match="predictions.json"):
        write_once(tmp_path / "predictions.json", "text")
    assert os.listdir(tmp_path) == []


def test_dev_full_is_named():
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    match = "No space left.*make room.*'masks/a.png'"
    with pytest.raises(OSError, match=match), naming("masks/a.png"), open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def test_a_file_moves_to_another_disk_whole(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    replace = os.replace

    def replace_here(source, target):
        if pathlib.Path(source).parent != pathlib.Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_here)
    (tmp_path / "half.png").write_text("mask")
    (tmp_path / "disk" / "a.png").write_text("old")
    move_whole(tmp_path / "half.png", tmp_path / "disk" / "a.png")
    assert (tmp_path / "disk" / "a.png").read_text() == "mask"
    assert os.listdir(tmp_path / "disk") == ["a.png"] and not (tmp_path / "half.png").exists()
    monkeypatch.setattr(os, "replace", refusing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        move_whole(tmp_path / "disk" / "a.png", tmp_path / "a.png")


@pytest.mark.parametrize("text, message", [
    ("[" * 100_000, "^it has too many lists or objects within each other$"), ("[" + "9" * 5000 + "]", "^it has a number of thousands of digits$"),
    ("{", "line 1 column 2"), (b"\xff", "decode"),
], ids=["deep", "long", "cut", "bytes"])  # fmt: skip
def test_whatever_is_wrong_with_json_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        parsed_json(text)


def test_a_link_in_a_circle_is_named(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "loop" / "below"):
        with pytest.raises(UserError, match=f"^{path}: a link that leads back to itself; remove the link"):
            real_path(path)
    (tmp_path / "gone").symlink_to(tmp_path / "there")
    assert real_path(tmp_path / "gone") == (tmp_path / "there").resolve()


def test_the_home_of_nobody_is_told():
    assert at_home("~/run") == pathlib.Path.home() / "run" and at_home("a/~b") == pathlib.Path("a/~b")
    with pytest.raises(FileNotFoundError, match="^~nobody-of-this-name/run: there is no home folder ~nobody-of-this-name; give the path without ~"):
        at_home("~nobody-of-this-name/run")
