"""The table of methods: what their objectives are, their rounds, their inputs, and that each can learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from records import BATCH, GRID, KERNEL, NUM_CLASSES, STRIDE, config_with, feature_batch

from experiments.configs import base, textures
from lcrf_jax import baselines
from lcrf_jax.bound.record import Record
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.data.opening import open_source
from lcrf_jax.machine.errors import SettingError
from lcrf_jax.metrics import mean_iou
from lcrf_jax.predict import evaluation
from lcrf_jax.predict.outputs import OUTPUTS
from lcrf_jax.predict.segmenter import make_segmenter
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.description import load_description
from lcrf_jax.runfolder.metrics import metrics_history
from lcrf_jax.train import fit, methods, plan, preparation
from lcrf_jax.train.methods import METHODS, make_objective
from lcrf_jax.train.step import data_mesh

TRAINED = [name for name, method in METHODS.items() if method.objective]


def config_of(method):
    settings = base.get_config().baselines.to_dict()
    settings["sec"]["kernel"] = KERNEL
    return {"method": method, "objective": config_with(), "baselines": settings, "epochs": (3, 4)}


@functools.cache
def batch():
    """Records with the inputs of every method."""
    rng = np.random.default_rng(1)
    cues = rng.choice(np.uint8([0, 1, 2, 3, 255]), (BATCH, GRID, GRID))
    cues[0] = 255
    return feature_batch()._replace(cues=cues, saliency=rng.random((BATCH, GRID, GRID, 1)).astype(np.float16))


def record(index):
    return jax.tree.map(lambda value: value[index], batch())


def logits_of(seed, scale=1.5):
    return np.random.default_rng(seed).normal(0, scale, (GRID, GRID, NUM_CLASSES)).astype(np.float32)


@functools.cache
def objective_of(name):
    return jax.jit(make_objective(config_of(name), stride=STRIDE, steps_per_epoch=10))


def value_of(name, logits, given):
    return objective_of(name)(jax.random.key(3), logits, given, jnp.int32(0))


def test_the_table_names_what_exists():
    for name, method in METHODS.items():
        assert set(method.inputs) <= set(methods.INPUTS) and method.output in OUTPUTS and method.title, name
        assert method.supervision == ("masks" if "masks" in method.inputs else "image tags")
        assert bool(methods.localisation(config_of(name))) == bool(method.inputs), "what sees maps, cues or masks says so"
    assert set(base.get_config().baselines) >= set(METHODS) - {"latent_crf", "full_supervision"}


def test_cues_of_the_latent_crf_are_an_input_by_configuration():
    config = config_of("latent_crf")
    assert methods.inputs_of(config) == ("class_maps",) and methods.localisation(config) == "class maps"
    config["objective"]["cue_confidence"] = 0.9
    assert methods.inputs_of(config) == ("class_maps", "cues")
    assert methods.localisation(config) == methods.localisation(config_of("sec")) == "class maps and gradient saliency"
    assert methods.localisation(config_of("mil_ilp")) == ""
    sec = config_of("sec")
    sec["baselines"]["cues"]["background_by"] = "objectness"
    assert methods.localisation(sec) == "class maps and objectness"


def test_gradient_saliency_is_an_input_where_the_evidence_asks_for_it():
    config = config_of("latent_crf")
    evidence = {**config["objective"]["likelihood_options"]["evidence"], "saliency_weight": 2.0}
    config["objective"]["likelihood_options"] = {"evidence": evidence}
    assert methods.inputs_of(config) == ("class_maps", "gradient_saliency")
    assert methods.localisation(config) == "class maps and gradient saliency"
    config["objective"]["likelihood"] = "gwrp"
    assert methods.inputs_of(config) == ("class_maps",), "what does not see the evidence"


def test_objectness_is_an_input_where_the_evidence_asks_for_it():
    config = config_of("latent_crf")
    evidence = {**config["objective"]["likelihood_options"]["evidence"], "objectness_weight": 1.0}
    config["objective"]["likelihood_options"] = {"evidence": evidence}
    assert methods.inputs_of(config) == ("class_maps", "objectness")
    assert methods.localisation(config) == "class maps and objectness"


def test_the_prior_of_test_time_needs_the_classifier_and_tells_nothing_of_places():
    for name, expected in (("mil_ilp", ("tag_classifier",)), ("cam", ("class_maps",)), ("latent_crf", ("tag_classifier", "class_maps"))):
        config = config_of(name)
        before = methods.localisation(config)
        config["inference"] = {"prior_weight": 1.0}
        assert methods.inputs_of(config) == expected and methods.localisation(config) == before


def test_posteriors_of_class_maps_begin_a_run_of_the_latent_crf_alone():
    config = config_of("latent_crf")
    assert not methods.begins_with_posteriors(config)
    config["evidence_posterior"] = True
    assert methods.begins_with_posteriors(config)
    assert not methods.begins_with_posteriors({**config, "method": "sec"})
    for change in ({"likelihood": "gwrp"}, {"cue_confidence": 0.9}, {"further_likelihoods": {"area": 1.0}}):
        with pytest.raises(SettingError, match="evidence_posterior: "):
            methods.begins_with_posteriors({**config, "objective": {**config["objective"], **change}})


@jax.jit
def losses_of_arrays(cells, tags, cues, saliency, kernel):
    return {
        "mil_ilp": baselines.mil_lse_loss(cells, tags),
        "em_adapt": baselines.label_cross_entropy(cells, baselines.em_adapt_labels(jax.random.key(3), cells, tags)),
        "ccnn": baselines.ccnn_loss(cells, tags),
        "sec": baselines.sec_loss(cells, tags, cues, kernel),
        "stc": baselines.soft_cross_entropy(cells, baselines.saliency_target(saliency, tags)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 2], ids=["every tag", "no tag", "some tags"])
def test_objectives_are_the_losses_of_the_record(index):
    given, logits = record(index), logits_of(index)
    cells, tags = logits.reshape(-1, NUM_CLASSES), given.tags
    kernel = reference.dense_kernel(given.guide, KernelParams(**KERNEL).at_stride(STRIDE), "symmetric")
    expected = losses_of_arrays(cells, tags, given.cues.reshape(-1), given.saliency.reshape(-1), kernel)
    for name, value in expected.items():
        np.testing.assert_allclose(value_of(name, logits, given)[0], value, rtol=1e-4, err_msg=name)


def test_terms_that_are_reported():
    given, logits = record(2), logits_of(2)
    loss, terms = value_of("sec", logits, given)
    assert set(terms) == {"seed", "expand", "constrain"}
    np.testing.assert_allclose(loss, sum(terms.values()), rtol=1e-6)
    assert set(value_of("ccnn", logits, given)[1]) == {"ccnn", "residual"}


def test_a_later_round_of_stc_fits_the_tagged_labels_of_the_round_before():
    evidence, logits = reference.softmax(logits_of(5)).astype(np.float32), logits_of(6)
    given = record(2)._replace(pixel_evidence=evidence)
    labels = baselines.tagged_labels(evidence.reshape(-1, NUM_CLASSES), given.tags)
    expected = baselines.label_cross_entropy(logits.reshape(-1, NUM_CLASSES), labels)
    np.testing.assert_allclose(value_of("stc", logits, given)[0], expected, rtol=1e-5)
    assert set(np.asarray(labels).tolist()) <= set(np.flatnonzero(given.tags).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_the_train_step_of_every_method_lowers_its_loss(name):
    """Linear logits of the features of a batch, fitted by forty steps of Adam."""
    objective = make_objective(config_of(name), stride=STRIDE, steps_per_epoch=1)
    records = batch()
    features = jnp.asarray(records.features["s16"], jnp.float32)
    weights = jnp.zeros((features.shape[-1] + 1, NUM_CLASSES))
    keys = jax.random.split(jax.random.key(0), BATCH)
    optimizer = optax.adam(0.05)

    def loss(weights):
        logits = features @ weights[:-1] + weights[-1]
        return jax.vmap(objective, in_axes=(0, 0, 0, None))(keys, logits, records, jnp.int32(100))[0].mean()

    @jax.jit
    def step(weights, state):
        value, gradient = jax.value_and_grad(loss)(weights)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(weights, updates), state, value

    state, values = optimizer.init(weights), []
    for _ in range(40):
        weights, state, value = step(weights, state)
        values.append(float(value))
    assert np.isfinite(values).all() and values[-1] < values[0] - 0.02


@pytest.mark.parametrize(("name", "epochs", "lengths"), [
    ("latent_crf", (3, 4), [3, 4]), ("sec", (3, 4), [7]), ("stc", (3, 4), [2, 2, 3]), ("stc", (1, 2), [1, 1, 1]), ("cam", (3, 4), []),
])
def test_every_method_has_the_same_number_of_steps(name, epochs, lengths):
    rounds = plan.planned_rounds({"method": name, "epochs": epochs, "batch_size": 4}, 17)
    assert [this.epochs for this in rounds] == lengths
    assert not rounds or rounds[-1].last_step == 4 * sum(epochs)


def test_too_few_epochs_for_the_rounds_are_refused():
    with pytest.raises(ValueError, match=r"epochs: .*got \(2,\), which makes rounds of \[0, 0, 2\] for stc"):
        plan.planned_rounds({"method": "stc", "epochs": (2,), "batch_size": 4}, 17)


def test_only_images_of_one_tag_take_part_in_the_simple_rounds():
    tags = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 1]], bool)
    rounds = plan.planned_rounds({"method": "stc", "epochs": (3,), "batch_size": 2}, 4)
    chosen = [plan.images_of_round(METHODS["stc"], this, tags) for this in rounds]
    np.testing.assert_array_equal(chosen[0], [0, 3])
    np.testing.assert_array_equal(chosen[1], [0, 3])
    assert chosen[2] is None and plan.images_of_round(METHODS["sec"], rounds[0], tags) is None
    with pytest.raises(ValueError, match="STC begins with images of a single tag, and none of the 2 .* is one"):
        plan.images_of_round(METHODS["stc"], rounds[0], tags[1:3])


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def small_textures(cell_count, epochs, cache):
    """96 embedded images with the published backbone; the cache is shared by all methods."""
    config = textures.get_config()
    config.data.options = base.options(seed=0, size=96, num_train=96, num_val=32)
    size = 8 * cell_count
    config.input_size, config.class_maps.grid, config.inference.input_sizes = size, cell_count, (size,)
    config.network.widths = (48, 32, 32)
    config.epochs, config.optimizer.warmup_steps, config.log_every_steps = epochs, 10, 12
    config.baselines.em_adapt.foreground_share = 0.3
    config.cache.directory = str(cache)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_to_segment(caches, tmp_path, name):
    """Better on held-out images than the network it began with, and some also than background everywhere.

    The latent CRF is not among these: so early it has not left the background; it takes the seven epochs of the configuration.
    What rests on class maps needs them at 16 x 16 cells.
    """
    cell_count, epochs = {"cam": (16, (8, 8)), "sec": (16, (8, 8)), "full_supervision": (12, (16, 16))}.get(name, (12, (6, 6)))
    config = small_textures(cell_count, epochs, caches)
    config.method, config.data.val_split = name, ""
    if name in ("cam", "sec"):
        config.views.num_views = 1  # alone on this grid: one view is enough for them
    if name in ("sec", "full_supervision"):
        config.optimizer.learning_rate = 3e-3  # these are to have learnt something within so few steps
    prepared = preparation.prepare(config.to_dict())
    devices = jax.devices()[:1]
    fit.train(prepared, tmp_path, devices=devices)
    val = open_source("textures", "val", masks=True, **config.data.options.to_dict())
    features, description = preparation.validation_features(prepared, val), load_description(tmp_path)

    def confusion_of(params):
        return evaluation.evaluate(make_segmenter(description, params), val, crf=False, features=features).plain

    confusion = confusion_of(restore_params(tmp_path))
    nothing = np.zeros_like(confusion)
    nothing[:, 0] = confusion.sum(axis=1)
    if name in ("cam", "sec", "full_supervision"):
        assert mean_iou(confusion) > mean_iou(nothing) + 0.03
    if METHODS[name].objective is None:
        return
    rounds = prepared.plan.rounds
    untrained = fit._fresh_state(prepared, rounds[0], jax.random.key(0), data_mesh(devices)).params
    assert mean_iou(confusion) > mean_iou(confusion_of(preparation.inference_params(prepared, untrained)))
    losses = [record["train/loss"] for record in metrics_history(tmp_path) if "train/loss" in record]
    assert len(rounds) > 1 or losses[-1] < losses[0]


@pytest.mark.slow_except("4-64-*", "9-65-*")
@pytest.mark.parametrize(("cells", "pixels", "expected"), [
    (4, 64, [8, 24, 40, 56]), (2, 2, [0, 1]), (3, 9, [1, 4, 7]), (9, 65, [3, 10, 18, 25, 32, 39, 46, 54, 61]),
])  # fmt: skip
def test_full_supervision_looks_at_the_middle_of_each_cell(cells, pixels, expected):
    assert methods._centres(cells, pixels).tolist() == expected
    mask = np.arange(pixels * pixels).reshape(pixels, pixels) % 3
    logits = jnp.zeros((cells, cells, 3))
    objective = methods.make_objective(config_of("full_supervision"), stride=1, steps_per_epoch=1)
    labels = mask[np.ix_(expected, expected)]
    loss = objective(jax.random.key(0), logits.at[..., 1].set(2.0), Record(jnp.ones(3, bool), mask=jnp.asarray(mask, jnp.uint8)), 0)[0]
    log_probs = np.log(reference.softmax(np.array([0.0, 2.0, 0.0])))
    np.testing.assert_allclose(loss, -log_probs[labels].mean(), rtol=1e-5)
