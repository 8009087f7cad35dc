"""A model as one small file, and the models that come with the package."""

import json
import resource

import jax
import numpy as np
import pytest

import lcrf_jax
from lcrf_jax.nets.network import backbone_variables, build_network
from lcrf_jax.runfolder import compact
from lcrf_jax.runfolder.description import CheckpointError

NETWORK = {"backbone": "small", "last_stride": 16, "taps": ["head", "s16"], "widths": [8, 6], "dropout": 0.0, "num_classes": 3}


@pytest.fixture(scope="module")
def model():
    """(description, parameters) of a network that was never trained."""
    network, (variables, digest) = build_network(NETWORK), backbone_variables(NETWORK)
    taps = jax.eval_shape(network.features, variables, np.zeros((1, 64, 64, 3), np.float32))
    shapes, rng = jax.eval_shape(network.init, jax.random.key(0), variables, taps), np.random.default_rng(0)
    decoder = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    classifier = {"weights": rng.normal(size=(96, 2)).astype(np.float32), "bias": np.zeros(2, np.float32)}
    inference = {"input_sizes": [64], "mirror": True, "unary_weight": 1.0, "num_iterations": 2, "prior_weight": 1.0,
                 "kernel": lcrf_jax.KernelParams()._asdict()}  # fmt: skip
    training = {"data": {"kind": "folder", "root": "/home/me/photographs"}, "cache": {"directory": "/scratch/me"},
                "weights": "/home/me/lite0.pth", "baselines": {"cues": {"file": "/home/me/cues.npz"}}}
    description = {"class_names": ["background", "cat", "dog"], "network": NETWORK, "inference": inference, "supervision": "image tags",
                   "training": training, "backbone_sha256": digest, "data": {"train": {"names": "a hash"}},
                   "segments": [{"machine": "my-host"}]}  # fmt: skip
    return description, {"backbone": variables, "decoder": decoder, "classifier": classifier}


def test_what_was_trained_comes_back_in_half_the_bytes(model, tmp_path):
    description, params = model
    size = compact.save_compact(tmp_path / "small.npz", description, params)
    trained = sum(leaf.size for name in ("decoder", "classifier") for leaf in jax.tree.leaves(params[name]))
    assert size == (tmp_path / "small.npz").stat().st_size < 2 * trained + 8000
    assert [path.name for path in tmp_path.iterdir()] == ["small.npz"]
    again, found = compact.load_compact(tmp_path / "small.npz")
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6), found, params)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(found))
    assert again["class_names"] == description["class_names"] and again["inference"] == json.loads(json.dumps(description["inference"]))
    text = json.dumps(again)
    assert not [word for word in ("/home/me", "/scratch", "my-host") if word in text] and "data" not in again


def test_a_file_is_loaded_as_a_run_is(model, tmp_path):
    compact.save_compact(tmp_path / "small.npz", *model)
    image = np.random.default_rng(1).integers(0, 256, (48, 64, 3), np.uint8)
    found = lcrf_jax.load(tmp_path / "small.npz").segment(image, crf=False)
    expected = lcrf_jax.predict.model.Model(*model).segment(image, crf=False)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=0.02)
    assert found.class_names == ("background", "cat", "dog")


def test_what_is_no_model_is_told(model, tmp_path):
    description, params = model
    path = tmp_path / "small.npz"
    with pytest.raises(FileNotFoundError, match="small.npz: there is no such file"):
        lcrf_jax.load(path)
    compact.save_compact(path, description, params)
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # of the archive's list of contents
    odd_method, encrypted = bytearray(whole), bytearray(whole)
    odd_method[entry + 10], encrypted[entry + 8] = 99, whole[entry + 8] | 1
    encrypted[6] |= 1
    for content in (b"", b"no model", whole[: len(whole) // 2], whole[:200] + bytes(len(whole) - 200), odd_method, encrypted):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="small.npz: expected a model"):
            lcrf_jax.load(path)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(CheckpointError, match="small.npz: expected a model"):
        lcrf_jax.load(path)
    compact.save_compact(path, {**description, "backbone_sha256": "0" * 64}, params)
    with pytest.raises(CheckpointError, match="was trained with a backbone of sha256 000000000000"):
        lcrf_jax.load(path)
    compact.save_compact(path, {name: value for name, value in description.items() if name != "inference"}, params)
    with pytest.raises(CheckpointError, match="the description has no inference"):
        lcrf_jax.load(path)


@pytest.mark.parametrize("changes, message", [
    ({"network": None}, "small.npz: network: expected an object"), ({"class_names": "abc"}, "small.npz: class_names: expected a list of names"),
    ({"class_names": ["background", "cat"]}, "small.npz: class_names: expected 3 names"), ({"inference": {}}, "small.npz: inference: it has no input_sizes"),
], ids=str)  # fmt: skip
def test_a_description_in_a_file_is_checked_as_that_of_a_run(model, tmp_path, changes, message):
    compact.save_compact(tmp_path / "small.npz", {**model[0], **changes}, model[1])
    with pytest.raises(CheckpointError, match=message):
        lcrf_jax.load(tmp_path / "small.npz")


def test_a_file_without_the_parameters_that_it_needs(model, tmp_path):
    compact.save_compact(tmp_path / "small.npz", model[0], {name: model[1][name] for name in ("backbone", "decoder")})
    with pytest.raises(CheckpointError, match="small.npz has no parameters of the classifier, which its inference.output or prior_weight needs"):
        lcrf_jax.load(tmp_path / "small.npz")


def test_what_cannot_be_written_is_told(model, tmp_path):
    description, params = model
    large = {**params, "classifier": {**params["classifier"], "bias": np.array([0.0, 1e6], np.float32)}}
    with pytest.raises(CheckpointError, match="classifier.bias has numbers above 65504 or none"):
        compact.save_compact(tmp_path / "large.npz", description, large)
    with pytest.raises(CheckpointError, match="what its backbone is"):
        compact.save_compact(tmp_path / "nameless.npz", {**description, "backbone_sha256": ""}, params)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_named_and_leaves_nothing(model, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match="make room and run the same command again: '.*small.npz'"):
            compact.save_compact(tmp_path / "small.npz", *model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
