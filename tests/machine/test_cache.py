import concurrent.futures
import errno
import fcntl
import os
import pathlib
import shutil
import threading
import time

import numpy as np
import pytest

from lcrf_jax.machine import cache
from lcrf_jax.machine.cache import cached_arrays, default_directory

IDENTITY = {"weights": "abc", "sizes": [224, 384]}


def made(directory, identity, num_records, batches):
    """The arrays, with what is missing from a function of the rows that are there."""
    with cached_arrays(directory, identity, num_records) as cache:
        if cache.first < num_records:
            for batch in batches(cache.first):
                cache.write(**batch)
    return cache.arrays


def as_arrays(rows):
    taps = np.broadcast_to(rows[:, None, None], (len(rows), 2, 3))
    return {"taps": taps.astype(np.float16), "guide": rows.astype(np.uint8)}


def batches(first=0, offset=0, sizes=(4, 4, 2)):
    """Ten rows of two arrays, in three batches."""
    for start, size in zip(np.cumsum((0, *sizes)), sizes):
        if start >= first:
            yield as_arrays(np.arange(start, start + size) + offset)


def check(arrays, offset=0):
    assert set(arrays) == {"taps", "guide"}
    for name, values in as_arrays(np.arange(10) + offset).items():
        assert arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(arrays[name], values)


def never(first):
    raise AssertionError("the arrays were there")


def test_made_once_and_read_the_second_time(tmp_path):
    directory = tmp_path / "not there" / "yet"
    calls = []

    def counted(first):
        calls.append(first)
        return batches()

    check(made(directory, IDENTITY, 10, counted))
    check(made(directory, IDENTITY, 10, never))
    check(made(str(directory), dict(reversed(IDENTITY.items())), 10, never))
    assert calls == [0]
    [folder] = directory.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["guide.npy", "identity.json", "taps.npy"]
    assert '"weights": "abc"' in (folder / "identity.json").read_text()


def test_the_arrays_are_memory_mapped_and_read_only(tmp_path):
    arrays = made(tmp_path, IDENTITY, 10, batches)
    assert all(isinstance(array, np.memmap) for array in arrays.values())
    with pytest.raises(ValueError, match="read-only"):
        arrays["guide"][0] = 1


def test_another_identity_has_other_arrays(tmp_path):
    check(made(tmp_path, IDENTITY, 10, batches))
    check(made(tmp_path, {**IDENTITY, "weights": "abd"}, 10, lambda first: batches(first, offset=50)), offset=50)
    check(made(tmp_path, {**IDENTITY, "sizes": [384, 224]}, 10, lambda first: batches(first, offset=60)), offset=60)
    fewer = made(tmp_path, IDENTITY, 4, lambda first: batches(first, sizes=(4,)))
    assert len(fewer["guide"]) == 4
    check(made(tmp_path, IDENTITY, 10, never))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_an_interruption_leaves_nothing_that_looks_finished_and_loses_no_row(tmp_path, error, num_before):
    firsts = []

    def interrupted(first):
        for count, batch in enumerate(batches()):
            if count == num_before:
                raise error("in the middle")
            yield batch
        raise error("at the end")

    def rest(first):
        firsts.append(first)
        return batches(first)

    with pytest.raises(error):
        made(tmp_path, IDENTITY, 10, interrupted)
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    check(made(tmp_path, IDENTITY, 10, rest))
    assert firsts == {0: [0], 1: [4], 3: []}[num_before]  # after three batches nothing is missing
    [folder] = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["guide.npy", "identity.json", "taps.npy"]


@pytest.mark.parametrize("noted", [False, True])
def test_a_killed_run_is_continued_where_it_had_noted_to_be(tmp_path, monkeypatch, noted):
    """What is on the disk in the middle of a run stays there, as after kill -9."""
    monkeypatch.setattr(cache, "_SECONDS_BETWEEN_NOTES", -1.0 if noted else 100.0)
    left, firsts = tmp_path / "left", []

    def killed(first):
        for count, batch in enumerate(batches()):
            if count == 2:
                shutil.copytree(tmp_path / "cache", left)
            yield batch

    def rest(first):
        firsts.append(first)
        return batches(first)

    made(tmp_path / "cache", IDENTITY, 10, killed)
    assert len(list(left.iterdir())) == 1
    check(made(left, IDENTITY, 10, rest))
    check(made(left, IDENTITY, 10, never))
    assert firsts == [8 if noted else 0]


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "progress.json").write_text("{"),
    lambda folder: (folder / "progress.json").write_text('{"rows": 4, "arrays": []}'),
    lambda folder: (folder / "taps.npy").unlink(),
    lambda folder: (folder / "taps.npy").write_bytes(b""),
    lambda folder: np.save(folder / "guide.npy", np.zeros(3, np.uint8)),
], ids=["progress cut short", "no arrays", "an array missing", "an array empty", "another length"])  # fmt: skip
def test_damaged_beginnings_are_made_anew(tmp_path, damage):
    def interrupted(first):
        yield next(batches())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, IDENTITY, 10, interrupted)
    [folder] = tmp_path.iterdir()
    damage(folder)
    check(made(tmp_path, IDENTITY, 10, lambda first: batches(first, offset=0 if first == 0 else 1)))


@pytest.mark.parametrize(("sizes", "got"), [((4, 4), "got 8"), ((4, 4, 4), "got more"), ((), "got 0")])
def test_another_number_of_rows_is_refused(tmp_path, sizes, got):
    with pytest.raises(ValueError, match=f"expected 10 rows for the cache .*{got}"):
        made(tmp_path, IDENTITY, 10, lambda first: batches(first, sizes=sizes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("second", [
    {"taps": np.zeros((6, 2, 3), np.float16)},
    {"taps": np.zeros((6, 2, 3), np.float16), "guide": np.zeros(1, np.uint8)},
    {"taps": np.zeros((6, 1, 3), np.float16), "guide": np.zeros(6, np.uint8)},
    {"taps": np.zeros((6, 2, 3), np.float32), "guide": np.zeros(6, np.uint8)},
    {"taps": np.zeros((6, 2, 3), np.float16), "guide": np.zeros(6, np.uint8), "more": np.zeros(6)},
    {},
], ids=["an array missing", "one row", "another shape", "another type", "an array more", "nothing"])
def test_batches_unlike_the_first_are_refused(tmp_path, second):
    def uneven(first):
        yield next(batches())
        yield second

    with pytest.raises(ValueError, match="expected arrays of one length, like the first batch"):
        made(tmp_path, IDENTITY, 10, uneven)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=120)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = rf"the cache {tmp_path} needs 0.00013 MB, its disk has 0.00012 MB left: .*LCRF_JAX_CACHE"
    with pytest.raises(OSError, match=message):
        made(tmp_path, IDENTITY, 10, batches)
    assert list(tmp_path.iterdir()) == []
    # Ten rows of 6 halves and a byte are 130 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=140))
    check(made(tmp_path, IDENTITY, 10, batches))


def test_an_array_wider_than_the_disk_is_refused_at_the_first_batch(tmp_path):
    def wide(first):
        yield {"taps": np.broadcast_to(np.float32(0), (1, 1 << 30))}
        raise AssertionError("the first batch was taken")

    with pytest.raises(OSError, match=r"needs 4294967\.3 GB"):
        made(tmp_path, IDENTITY, 10**6, wide)


def test_of_many_runs_at_once_one_makes_the_arrays_and_the_others_wait(tmp_path):
    calls, started = [], threading.Barrier(4)

    def slow(first):
        calls.append(first)
        time.sleep(0.5)  # the others come to the lock meanwhile, or find all done
        yield from batches(first)

    def at_once():
        started.wait(timeout=30)
        return made(tmp_path, IDENTITY, 10, slow)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for run in [pool.submit(at_once) for _ in range(4)]:
            check(run.result(timeout=60))
    assert calls == [0]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_system_without_locks_serves_too(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    check(made(tmp_path, IDENTITY, 10, batches))
    check(made(tmp_path, IDENTITY, 10, never))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_space_is_reserved_before_it_is_written_to(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"the cache {tmp_path} needs .*cache\.features=False"):
        made(tmp_path, IDENTITY, 10, batches)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    path = tmp_path / "cache"
    path.write_text("a file")
    with pytest.raises(OSError, match="cache"):
        made(path, IDENTITY, 10, batches)


def test_the_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path))
    assert default_directory() == tmp_path
    monkeypatch.setenv("LCRF_JAX_CACHE", "~/somewhere")
    assert default_directory() == pathlib.Path.home() / "somewhere"
    monkeypatch.delenv("LCRF_JAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_directory() == tmp_path / "xdg" / "lcrf_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == pathlib.Path.home() / ".cache" / "lcrf_jax"
    assert not (tmp_path / "xdg").exists()


def test_an_account_without_a_home_is_told_the_variable(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    for name in ("LCRF_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pathlib.Path, "home", nobody)
    with pytest.raises(OSError, match="name one with the environment variable LCRF_JAX_CACHE"):
        default_directory()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM])
def test_a_folder_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(OSError, match="LCRF_JAX_CACHE.*cache"):
        made(tmp_path / "cache", IDENTITY, 10, batches)


@pytest.mark.parametrize("place", ["/proc/nowhere", "a file/below", "dangling"])
def test_a_folder_that_can_never_be_made_is_told_and_not_tried_for_ever(tmp_path, monkeypatch, place):
    (tmp_path / "a file").touch()
    (tmp_path / "dangling").symlink_to("/proc/nowhere")
    with pytest.raises(OSError, match="LCRF_JAX_CACHE"):
        made(tmp_path / place, IDENTITY, 10, batches)


def test_a_photograph_that_vanishes_ends_the_run_once(tmp_path):
    calls = []

    def vanished(first):
        calls.append(first)
        yield next(batches())
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "photo.jpg")

    with pytest.raises(FileNotFoundError, match="photo.jpg"):
        made(tmp_path, IDENTITY, 10, vanished)
    assert calls == [0]
    check(made(tmp_path, IDENTITY, 10, batches))


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "identity.json").unlink(), lambda folder: (folder / "identity.json").write_text("{"),
    lambda folder: (folder / "taps.npy").unlink(), lambda folder: cut(folder / "taps.npy"),
    lambda folder: (folder / "guide.npy").write_bytes(b""), lambda folder: np.save(folder / "guide.npy", np.zeros(3, np.uint8)),
], ids=["no identity", "half an identity", "an array missing", "an array cut short", "an array empty", "another length"])  # fmt: skip
def test_finished_arrays_that_are_damaged_are_told_and_made_anew(tmp_path, damage, caplog):
    made(tmp_path, IDENTITY, 10, batches)
    [folder] = tmp_path.iterdir()
    damage(folder)
    check(made(tmp_path, IDENTITY, 10, batches))
    assert f"{folder} is damaged" in caplog.text and list(tmp_path.iterdir()) == [folder]
    check(made(tmp_path, IDENTITY, 10, never))


def test_a_disk_that_does_not_answer_removes_nothing(tmp_path, monkeypatch):
    made(tmp_path, IDENTITY, 10, batches)

    def failing(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(np, "load", failing)
        with pytest.raises(OSError, match="Input/output error.*LCRF_JAX_CACHE"):
            made(tmp_path, IDENTITY, 10, never)
    check(made(tmp_path, IDENTITY, 10, never))


@pytest.mark.parametrize("failing", ["identity.json", "progress.json"])
def test_a_disk_that_is_full_at_the_end_keeps_the_rows(tmp_path, monkeypatch, failing):
    write_whole = cache.write_whole

    def full(path, text):
        if path.name == failing and len(noted) > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        noted.append(path.name)
        write_whole(path, text)

    noted, firsts = [], []
    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_whole", full)
        patch.setattr(cache, "_SECONDS_BETWEEN_NOTES", -1.0)
        with pytest.raises(OSError, match="No space left on device; name another folder.*LCRF_JAX_CACHE"):
            made(tmp_path, IDENTITY, 10, batches)
    check(made(tmp_path, IDENTITY, 10, lambda first: firsts.append(first) or batches(first)))
    assert firsts in ([], [4])


def test_space_is_taken_by_writing_where_it_cannot_be_reserved(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    check(made(tmp_path, IDENTITY, 10, batches))
    large = {"taps": np.ones((1, 700_000), np.uint8)}
    arrays = made(tmp_path, {"kind": "large"}, 3, lambda first: [large] * 3)
    assert arrays["taps"].all() and os.stat(arrays["taps"].filename).st_blocks * 512 >= 2_100_000
