"""Arrays that a disk has changed are never used: they are told, and made anew."""

import json
import logging
import os

import numpy as np
import pytest

from lcrf_jax.machine import cache, checksums
from lcrf_jax.machine.cache import cached_arrays

IDENTITY = {"kind": "views"}
ROWS = np.arange(4000, dtype=np.float32).reshape(1000, 4)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(checksums, "PIECE", 4096)


def made(directory, calls, **options):
    with cached_arrays(directory, IDENTITY, len(ROWS), **options) as entry:
        if entry.first < len(ROWS):
            calls.append(entry.first)
            entry.write(rows=ROWS[entry.first :])
    return entry.arrays["rows"]


def flip(path, at):
    """Change one bit, and leave size and time as they were."""
    times = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("at", [130, 5000, 128 + 16000 - 1])
def test_a_flipped_bit_in_finished_arrays_is_told_and_they_are_made_anew(tmp_path, at, caplog):
    calls = []
    made(tmp_path, calls)
    [folder] = tmp_path.iterdir()
    flip(folder / "rows.npy", at)
    np.testing.assert_array_equal(made(tmp_path, calls), ROWS)
    assert calls == [0, 0] and f"{folder} is damaged (rows.npy does not match its checksums); it is made anew" in caplog.text
    np.testing.assert_array_equal(made(tmp_path, calls), ROWS)
    assert calls == [0, 0]


def test_arrays_are_compared_once_in_a_process_and_not_after_they_were_written(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(checksums, "checksums", lambda path: compared.append(path.name) or checksums_of(path))
    checksums_of = cache.checksums
    made(tmp_path, [])
    made(tmp_path, [])
    assert compared == []  # what this process has written
    checksums._seen.cache_clear()
    made(tmp_path, [])
    made(tmp_path, [])
    assert compared == ["rows.npy"]


def test_arrays_of_a_version_without_checksums_are_read(tmp_path, caplog):
    calls = []
    with caplog.at_level(logging.WARNING):
        made(tmp_path, calls)
        [identity] = tmp_path.glob("*/identity.json")
        content = json.loads(identity.read_text())
        assert len(content["arrays"]["rows"].pop("crc32")) == 4
        identity.write_text(json.dumps(content))
        np.testing.assert_array_equal(made(tmp_path, calls), ROWS)
    assert calls == [0] and not caplog.text


def test_another_number_of_pieces_is_a_change(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10000))
    whole = checksums.checksums(path)
    assert len(whole) == 3
    checksums.refuse_changed(path, whole)
    for other in (whole[:2], [*whole, 0], None, {}):
        checksums._seen.cache_clear()
        with pytest.raises(ValueError, match="file does not match its checksums"):
            checksums.refuse_changed(path, other)


def test_damaged_arrays_of_a_run_are_put_aside(tmp_path):
    calls = []
    made(tmp_path, calls, bounded=False)
    [folder] = tmp_path.iterdir()
    flip(folder / "rows.npy", 5000)
    damaged = (folder / "rows.npy").read_bytes()
    np.testing.assert_array_equal(made(tmp_path, calls, bounded=False), ROWS)
    [aside] = tmp_path.glob("damaged-*")
    assert (aside / "rows.npy").read_bytes() == damaged and calls == [0, 0]
