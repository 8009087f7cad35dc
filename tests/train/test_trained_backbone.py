"""Runs in which layers of the backbone are trained."""

import contextlib
import io

import jax
import numpy as np
import pytest
import reference
from small_runs import assert_same_trees, lines, small_config, train_and_kill

from lcrf_jax.data.example import PartOfSource
from lcrf_jax.nets.inputs import square_image
from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.trained import PART, merged
from lcrf_jax.predict.evaluation import evaluate
from lcrf_jax.predict.export import image_function
from lcrf_jax.predict.model import load
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.compact import save_compact
from lcrf_jax.runfolder.description import CheckpointError, load_description
from lcrf_jax.train import fit, plan, posteriors, preparation
from lcrf_jax.train.beginning import check_start

SLOW_FIXTURES = ("prepared", "run")
CHANGES = {"network__trainable_from": "s16", "cache__features": False, "views__num_views": 1}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    with contextlib.redirect_stderr(io.StringIO()):
        return preparation.prepare(small_config(tmp_path_factory.mktemp("cache"), **CHANGES))


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    with contextlib.redirect_stderr(io.StringIO()):
        return fit.train(prepared, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(("changes", "message"), [
    ({"cache__features": True}, "network.trainable_from='s16': features of a backbone that is trained .* set cache.features=False"),
    ({"inference__prior_weight": 1.0}, "network.trainable_from='s16': the tag classifier .* set inference.prior_weight=0"),
    ({"network__trainable_from": "s64"}, "network.trainable_from: expected '' for none, or one of stem, s4, s8, s16, s32, head"),
    ({"optimizer__backbone_share": 0.0}, "optimizer.backbone_share: expected a finite number > 0"),
])
def test_what_does_not_go_with_a_trained_backbone_is_refused_before_data_is_read(tmp_path, changes, message):
    config = small_config(tmp_path, **{**CHANGES, **changes})
    with pytest.raises(ValueError, match=message):
        plan.check_without_data(config)


def test_a_backbone_that_is_frozen_has_nothing_to_compute_again(tmp_path):
    plan.check_without_data(small_config(tmp_path, **CHANGES, recompute_backbone=True))
    with pytest.raises(ValueError, match="recompute_backbone: a frozen backbone has no gradients .* set network.trainable_from"):
        plan.check_without_data(small_config(tmp_path, recompute_backbone=True))


def test_a_method_that_trains_nothing_leaves_it_frozen(tmp_path):
    plan.check_without_data(small_config(tmp_path, **{**CHANGES, "cache__features": True, "method": "cam"}))


def test_layers_from_the_named_one_on_are_trained_and_no_others(prepared, run):
    last = restore_params(run, "last")
    assert set(last[PART]) == {"s16", "s32", "head"}
    for name, layer in last[PART].items():
        for field, array in layer.items():
            assert np.isfinite(array).all() and (array != prepared.variables["params"][name][field]).any(), (name, field)
    best = restore_params(run)
    assert_same_trees(best["backbone"], prepared.variables)  # those of the source: the tag classifier is of them
    assert set(best["decoder"][PART]) == set(last[PART])
    assert fit.num_trainable(prepared) == sum(leaf.size for leaf in jax.tree.leaves(last))
    assert all(np.isfinite(list(line.values())).all() for line in lines(run))


def test_a_model_of_it_uses_the_trained_layers(prepared, run, tmp_path):
    model, params = load(run, which="last"), restore_params(run, "last")
    network = build_network({**prepared.network.description, "trainable_from": ""})
    variables = merged(prepared.variables, params)
    decoder = {name: leaf for name, leaf in params.items() if name != PART}
    image = square_image(prepared.val[0].image, 96)
    logits = [network.logits(decoder, variables, network.features(variables, view[None]))[0] for view in (image, image[:, ::-1])]
    log_probs = [np.log(reference.softmax(np.float64(each))) for each in (logits[0], logits[1][:, ::-1])]
    expected = reference.softmax((log_probs[0] + log_probs[1]) / 2)
    np.testing.assert_allclose(np.exp(model.segmenter.network_log_probs(image[None])[0]), expected, atol=2e-5)

    few = PartOfSource(prepared.val, range(2))
    before = evaluate(load(run).segmenter, few, crf=False).plain
    assert before.sum() > 0
    save_compact(tmp_path / "small.npz", load_description(run), restore_params(run))
    images = np.random.default_rng(0).integers(0, 256, (1, 60, 80, 3), np.uint8)
    whole = image_function(load_description(run), restore_params(run), crf=False)(images)
    small = load(tmp_path / "small.npz").segment(images[0], crf=False)
    assert np.abs(np.asarray(whole[0]).max(-1) - small.confidence).max() < 0.02


def test_labels_of_a_later_round_are_of_the_trained_backbone(prepared, run):
    params = restore_params(run, "last")
    settings = prepared.config["posterior"]
    found = posteriors.posterior_evidence(prepared, params, settings)
    decoder = {name: leaf for name, leaf in params.items() if name != PART}
    moved = prepared._replace(variables=merged(prepared.variables, params))
    np.testing.assert_array_equal(found, posteriors.posterior_evidence(moved, decoder, settings))
    assert (found != posteriors.posterior_evidence(prepared, decoder, settings)).any()


def test_a_run_that_was_killed_continues_to_the_same_bits(prepared, run, tmp_path, monkeypatch):
    train_and_kill(prepared, tmp_path, monkeypatch, 4)
    fit.train(prepared, tmp_path)
    assert_same_trees(restore_params(tmp_path, "last"), restore_params(run, "last"))
    assert_same_trees(restore_params(tmp_path, "best"), restore_params(run, "best"))


def test_another_part_of_the_backbone_is_another_model(prepared, run):
    config = {**prepared.config, "network": {**prepared.config["network"], "trainable_from": "s32"}}
    with pytest.raises(CheckpointError, match="belongs to another model: .*network.trainable_from was 's16', is 's32'"):
        check_start(run, config)


def test_a_run_that_computes_blocks_again_is_the_same_run(prepared, run, tmp_path, monkeypatch):
    """It may be switched on in the middle; the sums may differ in their last bits."""
    train_and_kill(prepared, tmp_path, monkeypatch, 4)
    fit.train(prepared.with_config({**prepared.config, "recompute_backbone": True}), tmp_path)
    one, other = restore_params(tmp_path, "last"), restore_params(run, "last")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), one, other)
    assert "recompute" not in load_description(tmp_path)["network"]
