"""The configurations of VOC 2012 on a small development kit, with random weights in the true names and formats."""

import importlib
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest
from devkits import write_devkit
from PIL import Image
from programs import run, run_on_one_device
from safetensors.numpy import save_file
from small_runs import lines
from vgg16_weights import vgg16_state

import lcrf_jax
from experiments.configs import voc2012
from lcrf_jax.data.sources.devkit import CLASSES
from lcrf_jax.data.sources.voc_weak import prepared as prepared_data
from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.pretrained import file_digest
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.description import load_description
from lcrf_jax.train import fit, preparation
from lcrf_jax.train.methods import METHODS
from lcrf_jax.train.step import count_parameters

EVERY_CONFIG = sorted(path.stem for path in pathlib.Path(voc2012.__file__).parent.glob("voc2012*.py"))
OTHER_BACKBONES = {"voc2012_clip": "clip_vitb16", "voc2012_dinov2": "dinov2_vitb14", "voc2012_resnet50": "resnet50"}
CONFIGS = [name for name in EVERY_CONFIG if name not in OTHER_BACKBONES]


SLOW_FIXTURES = ("tfds",)


@pytest.fixture(scope="module")
def tfds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc2012")
    prepared_data(write_devkit(folder), folder / "tfds", tags_from="boxes", any_lists=True)
    return folder / "tfds"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(vgg16_state(), path)
    return path


def small(name, tfds, weights, **changes):
    """A configuration with its own network, decoder and settings, on small pictures."""
    config = importlib.import_module(f"experiments.configs.{name}").get_config()
    stride = 4 if config.network.decoder == "original" else 8
    config.data.root, config.weights = str(tfds), str(weights)
    config.cache.directory = str(tfds / "cache")
    config.input_size = config.input_size % 32 + 64  # 64 for 224, 65 for 321
    config.class_maps.grid, config.class_maps.extra_sizes = -(-config.input_size // stride), ()
    config.inference.input_sizes = (config.input_size,)
    config.views.num_views, config.batch_size, config.epochs = 3, 4, (4,)
    config.optimizer.warmup_steps, config.log_every_steps, config.eval_every_epochs = 2, 2, 4
    config.num_threads = 2
    config = config.to_dict()
    for path, value in changes.items():
        group, _, key = path.rpartition("__")
        (config[group] if group else config)[key] = value
    return config


WIDTHS = voc2012.get_config().network.widths


@pytest.fixture(scope="module")
def prepared(tfds, weights):
    """With an eighth of the channels of the decoder: time goes into these alone."""
    # At the rate of the configuration the first steps go up and down, and what is rounding in a gradient grows with them.
    narrow = tuple(width // 8 for width in WIDTHS)
    return preparation.prepare(small("voc2012", tfds, weights, optimizer__learning_rate=2e-4, network__widths=narrow))


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """The same eight steps on one device and on four."""
    return {count: fit.train(prepared, tmp_path_factory.mktemp(f"on{count}"), devices=jax.devices()[:count]) for count in (1, 4)}


def test_eight_steps_on_one_device_and_on_four(prepared, trained, weights):
    losses, params = {}, {}
    for count, run_dir in trained.items():
        records = lines(run_dir)
        losses[count] = [record["train/loss"] for record in records if "train/loss" in record]
        assert records[-1]["step"] == 8 and len(losses[count]) == 4
        assert losses[count][-1] < losses[count][0] and np.isfinite(losses[count]).all()
        params[count] = restore_params(run_dir, "last")
        assert count_parameters(params[count]) == fit.num_trainable(prepared)
        assert load_description(run_dir)["backbone_sha256"] == file_digest(weights)
    assert fit.num_trainable(prepared.with_config(prepared.config | {"network": prepared.config["network"] | {"widths": WIDTHS}})) == 10_629_397
    # Adam divides each gradient by its own size: weights of which it is all rounding go their own ways.
    np.testing.assert_allclose(losses[1], losses[4], rtol=5e-3)
    one, other = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params[count])]) for count in (1, 4))
    assert np.linalg.norm(one - other) < 5e-3 * np.linalg.norm(one)
    start = fit.first_step(prepared)[1].params
    start = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(start)])
    assert np.linalg.norm(one - start) > 10 * np.linalg.norm(one - other)


def test_the_run_is_scored_and_restored_without_its_weight_file(trained, tfds, weights, tmp_path):
    moved = shutil.copytree(tfds / "voc_weak", tmp_path / "elsewhere" / "voc_weak").parent
    ended = run_on_one_device("evaluate", f"--checkpoint={trained[1]}", f"--data={moved}", "--split=val")
    assert ended.code == 0, ended.err
    assert "aeroplane" in ended.out and ended.last_line.startswith("mIoU")
    description = load_description(trained[1])
    assert description["network"]["decoder"] == "original" and description["class_names"] == list(CLASSES)
    assert "0.485" in description["preprocessing"] and description["training"]["weights"] == str(weights)
    model = lcrf_jax.load(trained[1])
    result = model.segment(np.full((50, 70, 3), 90, np.uint8), crf=False)
    assert result.labels.shape == (50, 70) and result.probabilities.shape == (50, 70, 21)


def test_masks_of_the_test_split_are_packed_for_the_server(trained, tfds, tmp_path):
    kit = tfds.parent / "VOCdevkit" / "VOC2012"
    listed = f"--list={kit / 'ImageSets' / 'Segmentation' / 'test.txt'}"
    ended = run("predict", f"--checkpoint={trained[1]}", f"--images={kit / 'JPEGImages'}", listed, f"--out={tmp_path / 'masks'}")
    assert ended.code == 0, ended.err
    assert "2 masks in" in ended.out
    for number in range(2):  # the same bytes each time
        ended = run("voc_results", f"--masks={tmp_path / 'masks'}", listed, f"--out={tmp_path / f'{number}.tar.gz'}")
        assert ended.code == 0, ended.err
    assert (tmp_path / "0.tar.gz").read_bytes() == (tmp_path / "1.tar.gz").read_bytes()
    names = (kit / "ImageSets" / "Segmentation" / "test.txt").read_text().split()
    with tarfile.open(tmp_path / "0.tar.gz") as archive:
        assert archive.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in names]
        for name, member in zip(names, archive.getmembers()):
            picture = Image.open(archive.extractfile(member))
            assert picture.mode == "P" and picture.size == Image.open(kit / "JPEGImages" / f"{name}.jpg").size
            assert picture.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
            np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(tmp_path / "masks" / f"{name}.png")))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_can_be_trained_with(name, tfds, weights, tmp_path):
    config = small(name, tfds, weights, epochs=(3,), batch_size=8)
    given = preparation.prepare(config)
    method = METHODS[config["method"]]
    assert name in ("voc2012", f"voc2012_{config['method']}") and given.train.masks == ("masks" in method.inputs)
    # Narrower, as it is the losses that are of interest here.
    config["network"]["widths"] = tuple(width // 64 for width in config["network"]["widths"])
    network = build_network({**config["network"], "num_classes": 21})
    run_dir = fit.train(given._replace(plan=given.plan._replace(network=network), val=None), tmp_path)
    assert lines(run_dir)[-1]["step"] == 3


def test_configurations_say_what_they_are():
    for name in CONFIGS:
        module = importlib.import_module(f"experiments.configs.{name}")
        config = module.get_config()
        text = " ".join(module.__doc__.split())
        assert f"--config=experiments/configs/{name}.py" in text and "Expected time on one H100" in text
        assert config.weights == "hf:timm/vgg16.tv_in1k" and config.data.options.name == "voc_weak/boxes"
        stride = 4 if config.network.decoder == "original" else 8
        assert config.class_maps.grid == -(-config.input_size // stride) == {224: 56, 321: 41}[config.input_size]
        assert ("Published for val" in text) == (config.method != "full_supervision") or name == "voc2012"


def test_configurations_of_other_backbones_say_what_they_are():
    assert set(OTHER_BACKBONES) < set(EVERY_CONFIG)
    for name, backbone in OTHER_BACKBONES.items():
        module = importlib.import_module(f"experiments.configs.{name}")
        config = module.get_config()
        text = " ".join(module.__doc__.split())
        assert f"--config=experiments/configs/{name}.py" in text and "Expected time on one H100" in text
        assert "no score is claimed" in text and "Published for val" not in text
        network = build_network({**config.network.to_dict(), "num_classes": 21})
        assert config.network.backbone == backbone and config.weights.startswith("hf:")
        assert config.class_maps.grid == network.grid(config.input_size)
        assert config.input_size % network.size_step == 0 and config.inference.input_sizes == (config.input_size,)


def drawn_weights(module):
    """Random weights by NumPy: a program that is compiled without optimisations takes seconds for a hundred million numbers."""
    side, rng = 4 * getattr(module, "patch", 16), np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, side, side, 3), np.float32))

    def drawn(path, leaf):
        name = path[-1].key
        if leaf.ndim == 1:
            return np.full(leaf.shape, float(name.startswith("scale")), np.float32)
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))

    return jax.tree_util.tree_map_with_path(drawn, shapes), "drawn"


@pytest.mark.parametrize("name", OTHER_BACKBONES)
def test_every_other_backbone_can_be_trained_with(name, tfds, tmp_path, monkeypatch):
    """With random weights and narrow decoders, on small pictures."""
    monkeypatch.setattr("lcrf_jax.nets.weights.random_weights", drawn_weights)
    config = small(name, tfds, "random", epochs=(3,), batch_size=8)
    size = {"voc2012_clip": 80, "voc2012_dinov2": 70, "voc2012_resnet50": 64}[name]
    config["input_size"], config["inference"]["input_sizes"] = size, (size,)
    config["class_maps"]["grid"] = {"voc2012_clip": 5, "voc2012_dinov2": 5, "voc2012_resnet50": 8}[name]
    config["network"]["widths"] = (8, 6, 4)
    if name == "voc2012_clip":  # its classifier is that of texts
        vectors = np.random.default_rng(0).normal(size=(22, 512)).astype(np.float32)
        np.savez(tmp_path / "texts.npz", **dict(zip([*CLASSES[1:], "ground", "wall"], vectors, strict=True)))
        config["classifier"]["text_embeddings"] = str(tmp_path / "texts.npz")
    given = preparation.prepare(config)
    run_dir = fit.train(given._replace(val=None), tmp_path / "run")
    assert lines(run_dir)[-1]["step"] == 3
    if name == "voc2012_clip":
        stored = restore_params(run_dir)["classifier"]
        assert stored["weights"].shape == (768, 20) and not stored["bias"].any()
    assert load_description(run_dir)["network"]["backbone"] == OTHER_BACKBONES[name]
