"""Compiled programs kept between runs: the second start reads them, and nothing damaged is left for it."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import warnings
import zlib

import jax
import pytest
from conftest import FLAGS, merged_flags, wanted_flags
from programs import ROOT

from lcrf_jax.machine import compilation
from lcrf_jax.machine.compilation import keep_programs


@pytest.fixture
def unchosen(monkeypatch):
    """No folder of JAX's own chosen, as for most users; what a test sets is taken back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv(compilation.SWITCH, raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def folder(unchosen, tmp_path):
    return keep_programs(tmp_path)


def entry(folder, name, content=b"compiled " * 100):
    path = folder / f"{name}-cache"
    path.write_bytes(zlib.compress(content))
    return path


def test_the_folder_lies_in_that_of_the_caches_and_only_the_owner_may_write_it(folder, tmp_path):
    assert folder.parent == tmp_path / "programs" and jax.config.jax_compilation_cache_dir == str(folder)
    assert folder.stat().st_mode & 0o022 == 0
    assert keep_programs(tmp_path) == folder


def test_a_folder_that_the_user_has_chosen_is_left_alone(unchosen, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert keep_programs(tmp_path) is None and jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert not (tmp_path / "programs").exists()


def test_it_can_be_switched_off(unchosen, tmp_path, monkeypatch):
    monkeypatch.setenv("LCRF_JAX_COMPILE_CACHE", "0")
    assert keep_programs(tmp_path) is None and not any(tmp_path.iterdir())
    monkeypatch.setenv("LCRF_JAX_COMPILE_CACHE", "no")
    with pytest.raises(ValueError, match="LCRF_JAX_COMPILE_CACHE: expected 0 .* or 1, got 'no'"):
        keep_programs(tmp_path)


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(unchosen, tmp_path, caplog):
    (tmp_path / "programs").write_text("a file")
    assert keep_programs(tmp_path) is None and jax.config.jax_compilation_cache_dir is None
    assert "compiled programs are not kept" in caplog.text and "LCRF_JAX_CACHE" in caplog.text


def test_entries_that_are_cut_off_or_have_changed_are_dropped(folder, tmp_path):
    whole, cut, empty = entry(folder, "whole"), entry(folder, "cut"), folder / "empty-cache"
    cut.write_bytes(cut.read_bytes()[:-3])
    empty.write_bytes(b"")
    keep_programs(tmp_path)
    assert whole.exists() and not cut.exists() and not empty.exists()
    entry(folder, "whole", b"another program")  # whole, but not what was there before
    later = entry(folder, "later")
    keep_programs(tmp_path)
    assert not whole.exists() and later.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"whole-cache": 3}'])
def test_a_damaged_list_of_what_was_whole_is_made_anew(folder, tmp_path, text):
    whole, list_file = entry(folder, "whole"), folder / "checked.json"
    list_file.write_text(text)
    keep_programs(tmp_path)
    if text.startswith('{"'):
        assert not whole.exists()
    else:
        assert json.loads(list_file.read_text()) == {whole.name: hashlib.sha256(whole.read_bytes()).hexdigest()}


def test_the_oldest_entries_go_where_there_are_too_many_bytes(folder, tmp_path, monkeypatch):
    paths = [entry(folder, name) for name in ("new", "old", "older")]
    for age, path in enumerate(paths):
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compilation, "MOST_BYTES", 2 * paths[0].stat().st_size)
    keep_programs(tmp_path)
    assert [path.exists() for path in paths] == [True, True, False]


START = """
    import sys
    import jax, jax.numpy as jnp
    from lcrf_jax.machine import compilation
    hits, compilation.LEAST_SECONDS = [], 0  # on a fast machine this program takes less than is worth keeping
    jax.monitoring.register_event_listener(lambda name, **kw: hits.append(name) if name.endswith("cache_hits") else None)
    compilation.keep_programs(sys.argv[1])
    value = jax.jit(lambda x: jnp.sort(jnp.linalg.inv(x @ x.T + jnp.eye(24))))(jnp.outer(jnp.arange(24.0), jnp.ones(24)))
    print(len(hits) > 0, float(value.sum()).hex())
"""


@pytest.mark.slow
def test_the_second_start_compiles_nothing_anew_and_gives_the_same_bits(tmp_path):
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_") or name == "JAX_PLATFORMS"}
    printed = []
    for _ in range(3):
        command = [sys.executable, "-c", textwrap.dedent(START), str(tmp_path)]
        printed.append(subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout.split())
        if len(printed) == 2:
            for path in tmp_path.glob("programs/*/*-cache"):
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert [hit for hit, _ in printed] == ["False", "True", "False"]
    assert len({value for _, value in printed}) == 1


def test_flags_of_a_developer_are_merged_flag_by_flag():
    own = "--xla_dump_to=there --xla_backend_optimization_level=3"
    flags = merged_flags(own, FLAGS).split()
    assert flags[:2] == own.split() and len(flags) == len(FLAGS) + 1
    assert "--xla_force_host_platform_device_count=4" in flags and "--xla_backend_optimization_level=0" not in flags
    assert merged_flags("", FLAGS) == " ".join(f"{name}={value}" for name, value in FLAGS.items())
    assert list(wanted_flags({"LCRF_TEST_DEFAULT_FLAGS": "1"})) == ["--xla_force_host_platform_device_count"]
    assert wanted_flags({}) == FLAGS
