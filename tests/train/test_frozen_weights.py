"""The programs of VGG16 as JAX lowers them: weights are arguments of all of them, and stand in the text of none."""

import contextlib
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from records import BATCH, GRID, NUM_CLASSES, SIZE, STRIDE, config_with, image_batch
from small_runs import small_config
from small_segmenter import SETTINGS

from lcrf_jax.bound import objective
from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.vgg import VGG16
from lcrf_jax.predict.model import load
from lcrf_jax.predict.segmenter import make_segmenter
from lcrf_jax.train import fit, preparation
from lcrf_jax.train.step import count_parameters, data_mesh, initial_state, make_optimizer, make_train_step

SLOW_FIXTURES = ("programs",)
MOST_CHARACTERS = 5_000_000  # the weights are 118 million of them as text
MOST_NUMBERS = 4096  # characters of one array, two for each byte
NETWORK = {"backbone": "vgg16", "last_stride": 16, "taps": ["s32", "s16"], "widths": [8, 8], "dropout": 0.0,
           "num_classes": NUM_CLASSES}  # fmt: skip
OPTIMIZER = make_optimizer(
    learning_rate=1e-3, num_steps=9, warmup_steps=1, final_share=0.1, weight_decay=0.0, clip_norm=1.0)


@functools.cache
def weights():
    """Variables of the true shapes. They differ from each other: an array of equal numbers is a short text."""
    shapes = jax.eval_shape(VGG16().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda leaf: np.random.default_rng(0).random(leaf.shape, np.float32) - 0.5, shapes)
    assert count_parameters(variables) == 14_714_688
    return variables


def assert_holds_no_weights(text):
    assert len(text) < MOST_CHARACTERS
    longest = max((len(numbers) for numbers in re.findall(r'dense<"0x([0-9A-F]*)"', text)), default=0)
    assert longest < MOST_NUMBERS


@contextlib.contextmanager
def texts_of_programs(folder):
    """A dict that has at the end, for each program that was new, name -> texts as they were handed to the compiler."""
    before, texts = jax.config.values["jax_dump_ir_to"], {}
    jax.config.update("jax_dump_ir_to", str(folder))
    try:
        yield texts
    finally:
        jax.config.update("jax_dump_ir_to", before)
    for path in sorted(folder.glob("*.mlir")):
        name = re.match(r"jax_ir\d+_jit_(\w+?)_compile", path.name)[1]
        texts.setdefault(name, []).append(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_text_of_the_step_holds_no_weights():
    network, mesh = build_network(NETWORK), data_mesh(jax.devices()[:1])
    step = make_train_step(
        network, objective.latent_crf_objective(config_with(), stride=STRIDE, steps_per_epoch=5), OPTIMIZER, mesh)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: initial_state(key, network, weights(), OPTIMIZER, SIZE, mesh))
    lowered = step.lower(state, weights(), image_batch(), key)
    assert f"tensor<{BATCH}x{GRID}x{GRID}x512xf32>" in lowered.as_text()  # the backbone is in it
    assert_holds_no_weights(lowered.as_text())
    # What the assertion would say of weights that the program is closed over.
    with pytest.raises(AssertionError):
        assert_holds_no_weights(jax.jit(lambda images: network.features(weights(), images)).lower(image_batch().image).as_text())


def test_the_texts_of_a_segmenter_hold_no_weights(tmp_path):
    network = build_network(NETWORK)
    features = jax.eval_shape(network.features, weights(), image_batch().image[:1])
    decoder = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(network.init, jax.random.key(0), weights(), features),
    )
    description = {"network": NETWORK, "class_names": list("abcd"), "inference": {**SETTINGS, "mirror": True}}
    segmenter = make_segmenter(description, {"backbone": weights(), "decoder": decoder})
    with texts_of_programs(tmp_path) as texts:
        jax.block_until_ready(segmenter.network_log_probs(image_batch().image[:1, :32, :32]))
    assert {"_network_features", "_log_probs"} <= set(texts)
    for text in itertools.chain(*texts.values()):
        assert_holds_no_weights(text)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Name -> texts of the programs of training, with features in the cache and without, and of a photograph."""
    folder = tmp_path_factory.mktemp("programs")
    with texts_of_programs(folder / "texts") as texts:
        for name, kept in (("cached", True), ("computed", False)):
            config = small_config(
                folder / "cache", network__backbone="vgg16", weights="random", network__last_stride=32, input_size=32,
                network__taps=("s32", "s16"), network__widths=(8, 8), class_maps__extra_sizes=(48,), class_maps__grid=2,
                inference__input_sizes=(32,), epochs=(1, 1), views__num_views=2, cache__features=kept)
            config["data"]["options"] |= {"num_train": 8, "num_val": 2}
            config["objective"]["likelihood_options"]["evidence"]["saliency_weight"] = 0.5  # of the classifier's gradient
            fit.train(preparation.prepare(config), folder / name, devices=jax.devices()[:1])
        load(folder / name).segment(np.full((30, 40, 3), 90, np.uint8), crf=True)
    return texts


def test_the_texts_of_a_run_hold_no_weights(programs):
    wanted = {"step", "init", "chosen_inputs", "_pooled", "_maps_of_tap", "_maps_of_images", "_gradient_maps", "_test_time_taps",
              "_posteriors", "_inputs_of_images", "_network_features", "_log_probs"}  # fmt: skip
    assert wanted <= set(programs)
    assert len(programs["step"]) >= 4  # of two rounds, with features and with images
    for text in itertools.chain(*programs.values()):
        assert_holds_no_weights(text)
