"""Folders of other processes where the file system knows no locks; with locks they are in test_faults.py."""

import errno
import fcntl

import pytest

from lcrf_jax.machine import locks
from lcrf_jax.machine.locks import locked, own_folder


@pytest.fixture
def without_locks(monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refused)


def test_nothing_is_held_and_that_is_told(without_locks, tmp_path):
    with locked(tmp_path / "lock") as held:
        assert held is False


def test_folders_of_others_stay_where_nobody_can_tell_whether_they_are_in_use(without_locks, tmp_path):
    other = tmp_path / ".unfinished-of another"
    other.mkdir()
    (other / "half").write_text("x")
    (tmp_path / locks.lock_name(other.name)).touch()
    with own_folder(tmp_path, ".unfinished-") as folder:
        assert folder != other and folder.is_dir()
    assert (other / "half").read_text() == "x" and not folder.exists()
