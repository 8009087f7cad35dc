"""Locks and folders of other processes; with whole runs they are in test_faults.py."""

import errno
import fcntl
import logging
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from lcrf_jax.machine import locks
from lcrf_jax.machine.locks import Locked, locked, own_folder, shared, unused


@pytest.fixture
def without_locks(monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(locks, "_told_of", set())


def test_nothing_is_held_and_that_is_told_once(without_locks, tmp_path, caplog):
    for name in ("one", "two"):
        with locked(tmp_path / name / "lock") as held:
            assert held is False
    assert caplog.text.count("knows no locks: nothing keeps a second run out") == 1 and str(tmp_path) in caplog.text


def test_folders_of_others_stay_where_nobody_can_tell_whether_they_are_in_use(without_locks, tmp_path):
    other = tmp_path / ".unfinished-of another"
    other.mkdir()
    (other / "half").write_text("x")
    (tmp_path / locks.lock_name(other.name)).touch()
    with own_folder(tmp_path, ".unfinished-") as folder:
        assert folder != other and folder.is_dir()
    assert (other / "half").read_text() == "x" and not folder.exists()


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES], ids=["here", "on a share of Windows"])
def test_a_lock_that_somebody_has_is_told_whatever_the_system_calls_it(tmp_path, monkeypatch, number):
    def taken(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", taken)
    with pytest.raises(Locked, match="is in use by another process"), locked(tmp_path / "lock"):
        pass


def test_another_error_of_the_disk_is_no_lock(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock"):
        pass


def test_what_was_removed_while_one_waited_is_locked_anew(tmp_path):
    """Who waits for a lock that its holder then removes holds a file that nobody else can see."""
    path, order = tmp_path / "folder" / "lock", []

    def waiting():
        with locked(path, wait=True):
            order.append(path.exists())
            with unused(path) as free:
                order.append(free)

    with locked(path):
        thread = threading.Thread(target=waiting)
        thread.start()
        time.sleep(0.05)
        path.unlink()
        path.parent.rmdir()
    thread.join(timeout=10)
    assert order == [True, False]


def test_waiting_is_told_again_and_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_SECONDS_BETWEEN_WORDS", 0.01)
    monkeypatch.setattr(locks, "_SECONDS_BETWEEN_LOOKS", 0.02)
    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=lambda: locked(tmp_path / "lock", wait=True).__enter__())
        thread.start()
        time.sleep(0.15)
    thread.join(timeout=10)
    assert caplog.text.count(f"waiting for process {os.getpid()} on") >= 3


@pytest.mark.parametrize("make", [lambda path: path.write_text("a file"), lambda path: path.symlink_to("/proc/nowhere")])
def test_a_folder_that_cannot_be_made_is_told_and_not_tried_for_ever(tmp_path, monkeypatch, make):
    monkeypatch.setattr(locks, "MOST_TRIES", 3)
    make(tmp_path / "cache")
    with pytest.raises(OSError, match="cache"), locked(tmp_path / "cache" / "lock"):
        pass


def test_a_file_that_others_remove_for_ever_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "MOST_TRIES", 3)
    monkeypatch.setattr(locks, "_is_at", lambda file, path: False)
    with pytest.raises(OSError, match="other processes removed this file 3 times"), locked(tmp_path / "lock"):
        pass
    with pytest.raises(OSError, match="other processes removed|are all in use"), own_folder(tmp_path, ".unfinished-"):
        pass


def test_readers_share_a_file_and_nobody_removes_it_meanwhile(tmp_path):
    path = tmp_path / "identity.json"
    assert shared(path) is None
    path.write_text("{}")
    with shared(path), shared(path), unused(path) as free:
        assert free is False
    with unused(path) as free:
        assert free is True
    with unused(tmp_path / "missing") as free:
        assert free is False and not (tmp_path / "missing").exists()


def test_nobody_can_tell_without_locks(without_locks, tmp_path):
    path = tmp_path / "identity.json"
    path.write_text("{}")
    with shared(path) as file, unused(path) as free:
        assert file.read() == b"{}" and free is None


def test_folders_that_were_left_go_and_those_in_use_stay(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name in (".unfinished-left", ".unfinished-older"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    (tmp_path / locks.lock_name(".unfinished-left")).touch()
    (tmp_path / locks.lock_name(".unfinished-never made")).touch()
    with own_folder(tmp_path, ".unfinished-") as first, own_folder(tmp_path, ".unfinished-") as second:
        assert sorted(tmp_path.glob(".unfinished-*")) == sorted([first, second])
    assert os.listdir(tmp_path) == [] and caplog.text == ""


STARTS = """
    import os, runpy, sys
    own_folder = runpy.run_path(sys.argv[2])["own_folder"]  # without JAX, which takes seconds to import
    failures = []
    for _ in range(int(sys.argv[3])):
        try:
            with own_folder(sys.argv[1], ".unfinished-") as own:
                (own / "half").write_text("x")
                os.replace(own / "half", own / "whole")
                (own / "whole").read_text()
        except OSError as error:
            failures.append(repr(error))
    print(len(failures), failures[:1])
"""


@pytest.mark.slow
def test_sixteen_processes_start_in_one_folder_again_and_again(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(STARTS), str(tmp_path), str(locks.__file__), "60"]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(16)]
    assert [process.communicate(timeout=300)[0].strip() for process in started] == ["0 []"] * 16
    assert os.listdir(tmp_path) == []


def test_on_a_full_disk_a_lock_is_held_without_a_word(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        with locked(tmp_path / "lock") as held, pytest.raises(Locked), locked(tmp_path / "lock"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert held and (tmp_path / "lock").read_text() == ""
