"""What lies in the cache, its bound, and what is never removed: what somebody uses."""

import errno
import fcntl
import json
import os
import time

import numpy as np
import pytest

from lcrf_jax.machine import entries as module
from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.machine.entries import BOUND, bound_in_bytes, entries, keep_within_bound, remove, size_text, total_line
from lcrf_jax.machine.locks import locked, own_folder

SIZE = 40_000  # bytes of one entry's array


def made(directory, number, *, days=0.0, bounded=True):
    """An entry that was last used some days ago; its arrays."""
    with cached_arrays(directory, {"kind": "views", "number": number}, 100, about=f"folder {number}", bounded=bounded) as cache:
        if cache.first < 100:
            cache.write(taps=np.full((100, SIZE // 400), number, np.float32))
    arrays = cache.arrays
    [entry] = [entry for entry in entries(directory) if entry.about == f"folder {number}"]
    then = time.time() - days * 86400
    os.utime(entry.path / "identity.json", (then, then))
    return arrays


def abouts(directory):
    return [entry.about for entry in entries(directory)]


def test_every_entry_says_what_it_is_of(tmp_path):
    for number, days in ((1, 3.0), (2, 0.0)):
        made(tmp_path, number, days=days)
    (tmp_path / "programs" / ("a" * 16)).mkdir(parents=True)
    (tmp_path / "programs" / ("a" * 16) / "a-cache").write_bytes(bytes(10_000))
    (tmp_path / ("." + "0" * 24)).mkdir()
    (tmp_path / "notes of mine.txt").write_text("not of the cache")
    found = {entry.kind: entry for entry in entries(tmp_path)}
    assert abouts(tmp_path)[0] in ("folder 2", "compiled programs of one kind of processor")
    assert set(found) == {"views", "programs", "unfinished"} and len(entries(tmp_path)) == 4
    assert found["views"].size >= SIZE and found["programs"].size >= 10_000
    assert f"{tmp_path}: {size_text(sum(entry.size for entry in entries(tmp_path)))}; python -m experiments.cache list" in total_line(tmp_path)
    assert entries(tmp_path / "nowhere") == []


def test_entries_of_earlier_versions_are_listed_and_read(tmp_path):
    made(tmp_path, 1)
    [entry] = entries(tmp_path)
    identity = json.loads((entry.path / "identity.json").read_text())["identity"]
    (entry.path / "identity.json").write_text(json.dumps(identity))
    assert [(entry.kind, entry.about) for entry in entries(tmp_path)] == [("views", "")]
    with cached_arrays(tmp_path, {"kind": "views", "number": 1}, 100) as cache:
        assert cache.first == 100 and cache.arrays["taps"][0, 0] == 1


def test_what_is_in_use_stays_until_the_last_array_is_gone(tmp_path):
    arrays = made(tmp_path, 1)
    row = arrays["taps"][3]  # a part of it is enough
    del arrays
    [entry] = entries(tmp_path)
    assert not remove(entry) and entry.path.is_dir() and row[0] == 1
    del row
    assert remove(entry) and os.listdir(tmp_path) == []
    assert remove(entry)  # it is gone


def test_what_is_being_made_stays_and_what_was_left_goes(tmp_path):
    folder = tmp_path / ("." + "a" * 24)
    with locked(folder / "lock"), own_folder(tmp_path, f".{'b' * 24}-"):
        assert [remove(entry) for entry in entries(tmp_path)] == [False, False]
    assert [remove(entry) for entry in entries(tmp_path)] == [True] and os.listdir(tmp_path) == []


def test_without_locks_only_what_was_not_used_for_a_day_goes(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    for number, days in ((1, 2.0), (2, 0.0)):
        made(tmp_path, number, days=days)
    found = [entry for entry in entries(tmp_path) if entry.kind == "views"]
    assert {entry.about: remove(entry) for entry in found} == {"folder 1": True, "folder 2": False}


def test_a_removal_that_was_cut_short_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    made(tmp_path, 1)
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # killed just then
    [entry] = entries(tmp_path)
    assert remove(entry)
    assert [entry.kind for entry in entries(tmp_path)] == ["unfinished"]
    monkeypatch.undo()
    made(tmp_path, 1)
    assert sorted(entry.kind for entry in entries(tmp_path)) == ["unfinished", "views"]
    [left] = [entry for entry in entries(tmp_path) if entry.kind == "unfinished"]
    assert remove(left) and not left.path.exists()


def test_the_bound_removes_what_was_not_used_for_longest(tmp_path, monkeypatch, caplog):
    for number, days in ((1, 1.0), (2, 3.0), (3, 2.0)):
        made(tmp_path, number, days=days)
    total = sum(entry.size for entry in entries(tmp_path))
    monkeypatch.setenv(BOUND, str(total / 1e9))
    assert keep_within_bound(tmp_path) == []
    made(tmp_path, 4)
    assert abouts(tmp_path) == ["folder 4", "folder 1", "folder 3"]
    assert "removed 1 entries" in caplog.text and "were not used for longest" in caplog.text
    made(tmp_path, 3)  # used now
    made(tmp_path, 5)
    assert set(abouts(tmp_path)) == {"folder 3", "folder 4", "folder 5"}


def test_what_is_in_use_may_be_more_than_the_bound_which_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(BOUND, "1e-5")
    used = [made(tmp_path, number) for number in (1, 2)]
    assert len(used) == len(entries(tmp_path)) == 2 and "the rest of it is in use" in caplog.text
    made(tmp_path, 3, bounded=False)
    assert len(entries(tmp_path)) == 3


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan"])
def test_a_bound_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(BOUND, text)
    with pytest.raises(ValueError, match=f"{BOUND}: expected the most gigabytes .* got '{text}'"):
        bound_in_bytes()


def test_no_bound_where_none_is_set(monkeypatch, tmp_path):
    monkeypatch.setenv(BOUND, " ")
    assert bound_in_bytes() == float("inf") and keep_within_bound(tmp_path, 10**15) == []


def test_sizes_for_people():
    assert [size_text(size) for size in (2.1e9, 3.26e6, 900)] == ["2.1 GB", "3.3 MB", "0.9 kB"]


def test_folders_of_the_user_are_no_entries(tmp_path):
    own = tmp_path / "programs" / "my_project"
    own.mkdir(parents=True)
    (own / "thesis.tex").write_text("x")
    (tmp_path / "programs" / "notes").write_text("x")
    deep = tmp_path / "programs" / ("0" * 16) / "sources"
    deep.mkdir(parents=True)
    assert entries(tmp_path) == []
    compiled = tmp_path / "programs" / ("1" * 16)
    compiled.mkdir()
    (compiled / "checked.json").write_text("{}")
    assert [entry.path for entry in entries(tmp_path)] == [compiled]
