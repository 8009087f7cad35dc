import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lcrf_jax.runfolder.checkpoints import RunCheckpoints, best_miou, restore_params
from lcrf_jax.runfolder.description import CheckpointError, library_versions, load_description, save_description
from lcrf_jax.runfolder.digests import params_digest

# When orbax gives up on a damaged file, its other reads end later and find their event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = pathlib.Path(__file__).resolve().parents[2]


class State(NamedTuple):
    step: jax.Array
    params: Any
    optimiser: Any
    key: jax.Array


def make_state(seed=0, width=8):
    rng = np.random.default_rng(seed)
    params = {"decoder": {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 4, width)), jnp.float32),
                                   "bias": jnp.asarray(rng.normal(size=width), jnp.bfloat16)}},
              "head": {"scale": jnp.float32(rng.normal())}}
    optimiser = optax.adamw(1e-3)
    return State(jnp.asarray(seed, jnp.int32), params, optimiser.init(params), jax.random.key(seed))


def data_of(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(data_of(x)), np.asarray(data_of(y))
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert x.tobytes() == y.tobytes()


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[min(int(len(content) * position), len(content) - 1)] ^= 0x10
    path.write_bytes(content)


def largest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """A run with states 1 and 2 and best parameters; copied by the tests that damage it."""
    run = tmp_path_factory.mktemp("saved") / "run"
    with RunCheckpoints(run) as checkpoints:
        for step in (1, 2):
            checkpoints.save_last(step, make_state(step), data_state=b"\x00\xffepoch %d" % step)
        assert checkpoints.save_best(2, make_state(2).params, 0.5)
    return run


@pytest.fixture
def run(saved_run, tmp_path):
    return shutil.copytree(saved_run, tmp_path / "run")


def test_the_state_comes_back_bit_for_bit(run):
    with RunCheckpoints(run) as checkpoints:
        step, state, data_state = checkpoints.restore_last(make_state(7))
    assert step == 2 and data_state == b"\x00\xffepoch 2"
    assert_same_bits(state, make_state(2))
    assert isinstance(state, State) and state.params["head"]["scale"].shape == ()
    np.testing.assert_array_equal(jax.random.normal(state.key), jax.random.normal(jax.random.key(2)))


def test_parameters_alone_come_back_as_numpy(run):
    for which in ("best", "last"):
        params = restore_params(run, which)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
        assert_same_bits(params, make_state(2).params)
    shutil.rmtree(run / "last" / "2" / "rest")
    assert_same_bits(restore_params(run, "last"), make_state(2).params)


def test_the_layout_and_how_many_are_kept(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_last(make_state()) is None
        for step in (10, 20, 30):
            checkpoints.save_last(step, make_state(step))
        assert [checkpoints.save_best(step, make_state(step).params, miou)
                for step, miou in ((10, 0.3), (20, 0.6), (30, 0.5), (40, 0.6))] == [True, True, False, False]
        checkpoints.wait()
        assert sorted(os.listdir(tmp_path / "last")) == ["20", "30"]
        assert os.listdir(tmp_path / "best") == ["20"]
    assert best_miou(tmp_path) == 0.6
    assert_same_bits(restore_params(tmp_path), make_state(20).params)


def test_a_run_taken_up_earlier_than_its_best_still_keeps_what_is_better(run):
    with RunCheckpoints(run) as checkpoints:
        assert not checkpoints.save_best(1, make_state(1).params, 0.5)
        assert checkpoints.save_best(1, make_state(1).params, 0.7)
        checkpoints.save_last(2, make_state(5))
        checkpoints.wait()
        assert_same_bits(checkpoints.restore_last(make_state()).state, make_state(5))
    assert best_miou(run) == 0.7 and os.listdir(run / "best") == ["1"]
    assert_same_bits(restore_params(run), make_state(1).params)


def test_buffers_may_be_donated_while_saving(tmp_path):
    state = make_state(3)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 if jnp.issubdtype(x.dtype, jnp.floating) else x, s),
                   donate_argnums=0)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_last(3, state)
        step(state)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore_last(make_state()).state, make_state(3))


def test_another_number_of_devices_and_another_layout(run):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs several devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,))
    like = jax.device_put(make_state(9), NamedSharding(mesh, P()))
    with RunCheckpoints(run) as checkpoints:
        restored = checkpoints.restore_last(like).state
        assert all(leaf.sharding.device_set == set(devices) for leaf in jax.tree.leaves(restored))
        assert_same_bits(restored, make_state(2))
        checkpoints.save_last(3, restored)
        on_one_device = checkpoints.restore_last(make_state(9)).state
    assert_same_bits(on_one_device, make_state(2))
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(on_one_device))


@pytest.mark.parametrize("data_state", [None, {"epoch": 3, "indices": [1, 2]}, b"", b"\xff\x00"])
def test_the_state_of_the_data_iterator_comes_back(tmp_path, data_state):
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_last(1, make_state(), data_state=data_state)
        assert checkpoints.restore_last(make_state()).data_state == data_state


def test_a_flipped_byte_in_any_file_is_an_error_or_harmless(saved_run, tmp_path):
    files = [path.relative_to(saved_run) for path in (saved_run / "best").rglob("*")
             if path.is_file() and path.stat().st_size]
    refused = 0
    for number, name in enumerate(files):
        run = shutil.copytree(saved_run, tmp_path / str(number))
        flip(run / name)
        try:
            assert_same_bits(restore_params(run), make_state(2).params)
        except CheckpointError as error:
            assert str(run / "best" / "2") in str(error)
            refused += 1
    assert refused >= 2


@pytest.mark.parametrize("position", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_a_flipped_byte_in_the_arrays_is_never_restored(run, position):
    flip(largest_file(run / "best" / "2" / "params"), position)
    try:
        params = restore_params(run)
    except CheckpointError as error:
        assert str(run / "best" / "2" / "params") in str(error)
    else:
        assert_same_bits(params, make_state(2).params)


def test_a_changed_array_is_named(run):
    record = next(path for path in (run / "best" / "2" / "record").rglob("*") if path.is_file())
    content = json.loads(record.read_text())
    name = "params.decoder.conv.kernel"
    content["sha256"]["params"][name] = "0" * 64
    record.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        restore_params(run)
    with RunCheckpoints(run) as checkpoints:
        changed = make_state(2).params
        changed["decoder"]["conv"]["kernel"] = changed["decoder"]["conv"]["kernel"].at[0, 0, 0, 0].add(1.0)
        checkpoints.save_best(2, changed, 0.9)
        checkpoints.wait()
    shutil.rmtree(run / "best" / "2" / "params")
    shutil.copytree(run / "last" / "2" / "params", run / "best" / "2" / "params")
    with pytest.raises(CheckpointError, match=f"1 of 3 arrays do not match their sha256, .* is '{name}'"):
        restore_params(run)


def damage_flip(folder):
    flip(largest_file(folder / "params"))


def damage_truncate(folder):
    for path in (folder / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def damage_empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_missing_item(folder):
    shutil.rmtree(folder / "rest")


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_empty, damage_missing_item])
def test_training_goes_on_from_the_newest_good_state(run, damage, caplog):
    damage(run / "last" / "2")
    with RunCheckpoints(run) as checkpoints:
        step, state, data_state = checkpoints.restore_last(make_state(7))
        assert step == 1 and data_state == b"\x00\xffepoch 1"
        assert_same_bits(state, make_state(1))
        assert str(run / "last" / "2") in caplog.text and "moved to" in caplog.text
        checkpoints.save_last(2, make_state(2))
        assert checkpoints.restore_last(make_state(7)).step == 2
    assert sorted(os.listdir(run / "last")) == ["1", "2"]
    assert len(os.listdir(run / "damaged")) == 1


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_empty])
def test_no_good_state_is_an_error_that_names_each_and_loses_none(run, damage):
    for step in ("1", "2"):
        damage(run / "last" / step)
    with RunCheckpoints(run) as checkpoints, pytest.raises(CheckpointError) as raised:
        checkpoints.restore_last(make_state())
    assert all(str(run / "last" / step) in str(raised.value) for step in ("1", "2"))
    assert sorted(os.listdir(run / "last")) == ["1", "2"]


def test_a_half_written_save_is_passed_over(run):
    shutil.copytree(run / "last" / "2", run / "last" / "3.orbax-checkpoint-tmp")
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.restore_last(make_state()).step == 2


def test_a_state_under_the_wrong_step_is_damaged(run):
    os.rename(run / "last" / "2", run / "last" / "7")
    with RunCheckpoints(run) as checkpoints:
        assert checkpoints.restore_last(make_state()).step == 1
    [moved] = (run / "damaged").iterdir()
    assert moved.name.startswith("last-7-")
    os.rename(run / "best" / "2", run / "best" / "3")
    with pytest.raises(CheckpointError, match="does not match its checksum or the number of its step"):
        restore_params(run)


def test_missing_and_empty_best(run, tmp_path):
    with pytest.raises(CheckpointError, match="got none; give the --workdir of a run that has saved one"):
        restore_params(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    damage_empty(run / "best" / "2")
    with pytest.raises(CheckpointError, match="best/2 is incomplete: it has no record"):
        restore_params(run)
    shutil.rmtree(run / "best")
    with pytest.raises(CheckpointError, match=r"RUN/best/STEP/ in .*; there is one in last/"):
        restore_params(run)
    with pytest.raises(ValueError, match="'best' or 'last', got 'newest'"):
        restore_params(run, "newest")


def test_another_model_is_refused_and_stays(run):
    with RunCheckpoints(run) as checkpoints:
        with pytest.raises(CheckpointError, match=r"expected 'params.decoder.conv.bias' of shape \(9,\)"):
            checkpoints.restore_last(make_state(width=9))
        other = make_state()._replace(optimiser=())
        with pytest.raises(CheckpointError, match="another model or optimiser: it lacks .* and has"):
            checkpoints.restore_last(other)
        assert checkpoints.restore_last(make_state()).step == 2


def test_refuses_what_cannot_be_saved(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="expected arrays in the state, got int at 'step'"):
            checkpoints.save_last(1, make_state()._replace(step=3))
        with pytest.raises(TypeError, match=r"the empty one 'params.w' of shape \(0, 3\)"):
            checkpoints.save_last(1, {"params": {"w": jnp.zeros((0, 3))}})
        with pytest.raises(ValueError, match="expected a state with params at its top"):
            checkpoints.save_last(1, {"weights": jnp.zeros(3)})
        with pytest.raises(TypeError, match="expected bytes or JSON as data_state, got set"):
            checkpoints.save_last(1, make_state(), data_state={1})
        with pytest.raises(ValueError, match="expected a finite mIoU at step 1, got nan"):
            checkpoints.save_best(1, make_state().params, float("nan"))


def test_killed_at_any_moment_a_good_state_remains(tmp_path):
    code = textwrap.dedent(f"""
        import sys, jax.numpy as jnp
        from lcrf_jax.runfolder.checkpoints import RunCheckpoints
        checkpoints = RunCheckpoints({str(tmp_path)!r})
        for step in range(1, 1000):
            checkpoints.save_last(step, {{"params": {{"w": jnp.full((64, 1024), step, jnp.float32)}}}})
            print(step, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    while process.stdout.readline().strip() != "4":
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stdout.close()
    with RunCheckpoints(tmp_path) as checkpoints:
        step, state, _ = checkpoints.restore_last({"params": {"w": jnp.zeros((64, 1024))}})
    assert step >= 3
    np.testing.assert_array_equal(state["params"]["w"], step)


def test_the_digest_tells_names_shapes_types_and_values_apart():
    params = {"a": np.arange(6.0, dtype=np.float32), "b": np.zeros(())}
    digest = params_digest(params)
    assert digest == params_digest(dict(reversed(params.items())))
    assert digest == params_digest({**params, "a": jnp.arange(6.0)})
    others = [{**params, "a": params["a"].reshape(2, 3)}, {**params, "a": params["a"].astype(np.int32)},
              {"a": params["b"], "b": params["a"]}, {**params, "b": np.float64(-0.0)}]
    assert len({digest, *map(params_digest, others)}) == 5


def test_the_description_comes_back_and_guards_the_folder(tmp_path):
    description = {"class_names": ["background", "cat"], "input_size": 224, "training": {"steps": 10},
                   "versions": library_versions()}
    assert description["versions"]["jax"] == jax.__version__
    save_description(tmp_path / "run", description)
    assert load_description(tmp_path / "run") == description
    longer = {**description, "training": {"steps": 20}}
    save_description(tmp_path / "run", longer)
    assert load_description(tmp_path / "run") == longer
    (tmp_path / "run" / "last" / "3").mkdir(parents=True)  # a state
    with pytest.raises(CheckpointError, match="belongs to another model: class_names differ"):
        save_description(tmp_path / "run", {**description, "class_names": ["background", "dog"]})
    assert load_description(tmp_path / "run") == longer
    assert sorted(os.listdir(tmp_path / "run")) == ["config.json", "last"]
    with pytest.raises(TypeError, match="JSON cannot hold"):
        save_description(tmp_path / "other", {"mean": np.zeros(3)})


def test_a_missing_or_damaged_description_names_its_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a run folder with config.json, got .*/none without"):
        load_description(tmp_path / "none")
    for content in (b'{"class_names": [', b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match="config.json is damaged"):
            load_description(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        load_description(tmp_path)
