"""Runs: rounds, interruption, posteriors, and scores."""

import contextlib
import copy
import io
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from small_runs import Killed, assert_same_trees, lines, small_config, train_and_kill

from experiments.measuring import CompilationCount
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.data.example import PartOfSource
from lcrf_jax.predict import evaluation
from lcrf_jax.predict.segmenter import make_segmenter
from lcrf_jax.runfolder.checkpoints import RunCheckpoints, best_miou, restore_params
from lcrf_jax.runfolder.description import CheckpointError, load_description
from lcrf_jax.train import evidence, fit, plan, posteriors, preparation
from lcrf_jax.train import step as step_module
from lcrf_jax.train.methods import METHODS


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(cache):
    with contextlib.redirect_stderr(io.StringIO()):
        return preparation.prepare(small_config(cache))


@pytest.fixture(scope="module")
def uninterrupted(prepared, tmp_path_factory):
    with contextlib.redirect_stderr(io.StringIO()):
        return fit.train(prepared, tmp_path_factory.mktemp("run"))


def test_planned_rounds():
    config = {"epochs": (2, 3), "batch_size": 8, "method": "latent_crf"}
    first, second = plan.planned_rounds(config, 30)
    assert (first.number, first.first_step, first.last_step, first.steps_per_epoch) == (0, 0, 6, 3)
    assert (second.number, second.first_step, second.last_step, second.epochs) == (1, 6, 15, 3)
    first, second = plan.planned_rounds({**config, "least_steps": 8}, 30)
    assert (first.last_step, first.steps_per_epoch, first.epochs, first.passes) == (12, 6, 2, 2)
    assert (second.first_step, second.last_step, second.passes) == (12, 21, 1)
    [only] = plan.planned_rounds({**config, "method": "full_supervision"}, 30)
    assert (only.first_step, only.last_step, only.epochs) == (0, 15, 5)


def test_rare_classes_have_the_larger_offsets():
    tags = np.zeros((1000, 5), bool)
    for number, count in enumerate((1000, 400, 100, 1, 0)):
        tags[:count, number] = True
    np.testing.assert_allclose(plan.class_offsets(tags, 0.5), [0, 0, np.log(2), np.log(10) / 2, np.log(10) / 2])
    assert plan.class_offsets(tags[:, :1], 0.5) == (0.0,) and not any(plan.class_offsets(np.zeros((3, 2), bool), 1.0))


@pytest.mark.parametrize(("epochs", "num_images", "message"), [
    ((2,), 7, "7 training images do not fill one batch of 8"),
    ((), 30, "epochs: expected one or more rounds"),
    ((0,), 30, "epochs: .*at least one epoch"),
    ((2, 0), 30, "epochs: .*at least one epoch"),
])
def test_rounds_that_cannot_be_are_refused(epochs, num_images, message):
    with pytest.raises(ValueError, match=message):
        plan.planned_rounds({"epochs": epochs, "batch_size": 8, "method": "latent_crf"}, num_images)


def test_a_run_leaves_its_description_checkpoints_and_metrics(prepared, uninterrupted):
    description = load_description(uninterrupted)
    assert description["class_names"] == list(prepared.train.class_names)
    assert description["network"]["num_classes"] == 7 and description["supervision"] == "image tags"
    assert description["inference"]["input_sizes"] == [96]
    assert set(restore_params(uninterrupted, "best")) == {"backbone", "classifier", "decoder"}
    assert [record["step"] for record in lines(uninterrupted)] == [2, 3, 3, 4, 6, 6, 8, 9, 9]
    assert [record["step"] for record in lines(uninterrupted) if "val/miou" in record] == [3, 6, 9]
    first = next(iter(lines(uninterrupted)))
    assert {"train/loss", "train/log_likelihood", "train/entropy", "train/pairwise_energy"} < set(first)


def test_the_classifier_of_the_checkpoint_is_the_one_that_was_fitted(prepared, uninterrupted):
    stored = restore_params(uninterrupted)
    assert_same_trees(stored["classifier"], jax.tree.map(np.asarray, prepared.classifier._asdict()))
    assert_same_trees(stored["backbone"], prepared.variables)


@pytest.mark.slow_except("within a round")
@pytest.mark.parametrize("stop", [3, 6, 9], ids=["within a round", "between rounds", "before the first save"])
def test_a_run_that_was_killed_continues_to_the_same_bits(prepared, uninterrupted, tmp_path, monkeypatch, stop):
    train_and_kill(prepared, tmp_path, monkeypatch, stop, before_saving=stop == 9)
    fit.train(prepared, tmp_path)
    assert_same_trees(restore_params(tmp_path, "last"), restore_params(uninterrupted, "last"))
    assert_same_trees(restore_params(tmp_path, "best"), restore_params(uninterrupted, "best"))
    assert lines(tmp_path) == lines(uninterrupted)


@pytest.mark.slow
def test_a_second_run_a_resumed_one_and_a_second_segmenter_compile_nothing(prepared, uninterrupted, tmp_path, monkeypatch):
    """All that is compiled takes the weights as arguments, and is known by a description of the network."""
    train_and_kill(prepared, tmp_path / "first", monkeypatch, 6)
    fit.train(prepared, tmp_path / "first")
    description, params = load_description(uninterrupted), restore_params(uninterrupted)
    first = evaluation.evaluate(make_segmenter(description, params), prepared.val, crf=False)
    count = CompilationCount()
    train_and_kill(prepared, tmp_path / "second", monkeypatch, 6)
    fit.train(prepared, tmp_path / "second")
    other = {**params, "decoder": jax.tree.map(np.negative, params["decoder"])}
    again = [evaluation.evaluate(make_segmenter(description, each), prepared.val, crf=False) for each in (params, other)]
    assert count.number == 0
    np.testing.assert_array_equal(again[0].plain, first.plain)
    assert (again[1].plain != first.plain).any()


def newest_state(prepared, workdir):
    rounds = prepared.plan.rounds
    with RunCheckpoints(workdir) as checkpoints:
        state, _, _ = fit._newest_state(prepared, checkpoints, rounds, jax.random.key(0), step_module.data_mesh())
    return state


def with_chains(prepared):
    """One round of three epochs, so that the views of the first come again; a kernel that remembers the start."""
    changes = {"estimator": "mcmc", "num_sweeps": 1, "pairwise_weight": 100.0, "pairwise_warmup_epochs": 0}
    config = copy.deepcopy(prepared.config) | {"epochs": (3,), "rounds": 1}
    config["objective"] |= changes
    return prepared.with_config(config)._replace(val=None)


@pytest.mark.slow
def test_a_run_with_chains_that_was_killed_continues_to_the_same_bits(prepared, tmp_path, monkeypatch):
    """The third epoch goes on with the chains of the first, which lie before the interruption."""
    chained = with_chains(prepared)
    fit.train(chained, tmp_path / "whole")
    train_and_kill(chained, tmp_path / "killed", monkeypatch, 3)
    chains = np.asarray(newest_state(chained, tmp_path / "killed").chains)
    assert chains.shape == (2, 24, 6, 6) and chains[0].max() < 7 and np.all(chains[1] == 255)
    fit.train(chained, tmp_path / "killed")
    whole, killed = (newest_state(chained, tmp_path / name) for name in ("whole", "killed"))
    assert whole.step == 9 and np.asarray(whole.chains).max() < 7
    assert_same_trees(killed, whole)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.fixture(scope="module")
def simple_to_complex(cache):
    """STC: the first two of three rounds see the images of a single tag, round 2 and 3 the labels of the one before."""
    with contextlib.redirect_stderr(io.StringIO()):
        return preparation.prepare(small_config(cache, method="stc", data__val_split=""))


@pytest.mark.slow
def test_rounds_on_a_part_of_the_images_continue_to_the_same_bits(simple_to_complex, tmp_path, monkeypatch):
    config = copy.deepcopy(simple_to_complex.config) | {"eval_every_epochs": 1}
    given = simple_to_complex.with_config(config)
    seen, subset = [], fit.ImageSubset

    def watched(records, images, num_views):
        seen.append(np.asarray(images).tolist())
        return subset(records, images, num_views)

    monkeypatch.setattr(fit, "ImageSubset", watched)
    fit.train(given, tmp_path / "whole")
    simple = np.flatnonzero(given.train.tags[:, 1:].sum(axis=1) == 1).tolist()
    assert seen == [simple, simple] and 0 < len(simple) < 24
    train_and_kill(given, tmp_path / "killed", monkeypatch, 6)
    fit.train(given, tmp_path / "killed")
    assert_same_trees(restore_params(tmp_path / "killed"), restore_params(tmp_path / "whole"))
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert lines(tmp_path / "whole")[-1]["step"] == 9


@pytest.mark.slow
def test_targets_between_rounds_of_stc_are_unrefined_and_restricted_to_the_tags(simple_to_complex):
    given, rng = simple_to_complex, np.random.default_rng(0)
    state = fit._fresh_state(given, given.plan.rounds[0], jax.random.key(0), step_module.data_mesh())
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32), state.params)
    found = posteriors.posterior_evidence(given, params, METHODS["stc"].posterior(given.config))
    assert (np.float32(found)[~np.broadcast_to(given.train.tags[:, None, None], found.shape)] == 0).all()
    network, log_probs = given.network, []
    for view in (0, 1):
        taps = {tap: given.views.tap(tap, view)[:4] for tap in network.taps}
        log_probs.append(np.log(reference.softmax(network.logits(params, given.variables, taps))))
    mean = np.where(given.train.tags[:4, None, None], (log_probs[0] + log_probs[1][:, :, ::-1]) / 2, -1e4)
    np.testing.assert_allclose(np.float32(found[:4]), reference.softmax(mean), atol=2e-3)


@pytest.mark.slow
def test_class_maps_are_a_run_that_trains_nothing(cache, tmp_path):
    given = preparation.prepare(small_config(cache, method="cam"))
    fit.train(given, tmp_path)
    fit.train(given, tmp_path)
    params, description = restore_params(tmp_path), load_description(tmp_path)
    other = given.with_config({**given.config, "classifier": {"l2": 1.0}})
    with pytest.raises(CheckpointError, match="finished run of other settings .*config.classifier.l2 was 0.01, is 1.0"):
        fit.train(other, tmp_path)
    assert load_description(tmp_path) == description and best_miou(tmp_path) is None
    assert set(params) == {"backbone", "classifier"}
    assert description["inference"]["output"] == "class_maps" and description["inference"]["input_sizes"] == [96, 128]
    scores = evaluation.evaluate(make_segmenter(description, params), given.val, crf=False)
    features = preparation.validation_features(given, given.val)
    again = evaluation.evaluate(make_segmenter(description, params), given.val, crf=False, features=features)
    assert len(features) == 2 and scores.plain.sum() > 0
    np.testing.assert_array_equal(scores.plain, again.plain)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 8])
def test_scores_from_cached_features_are_those_of_the_images(prepared, uninterrupted, batch_size):
    segmenter = make_segmenter(load_description(uninterrupted), restore_params(uninterrupted, "best"))
    features = preparation.validation_features(prepared, prepared.val)
    expected = evaluation.evaluate(segmenter, prepared.val, crf=True, num_samples=2, batch_size=batch_size)
    never = segmenter._replace(network_features=None)
    found = evaluation.evaluate(never, prepared.val, crf=True, num_samples=2, batch_size=batch_size, features=features)
    np.testing.assert_array_equal(found.plain, expected.plain)
    np.testing.assert_array_equal(found.refined, expected.refined)
    assert len(found.samples) == 2
    assert_same_trees(found.samples, expected.samples)


@pytest.mark.slow
def test_the_memory_of_a_step_is_at_least_that_of_its_state(prepared):
    rounds = prepared.plan.rounds
    state = fit._fresh_state(prepared, rounds[0], jax.random.key(0), step_module.data_mesh())
    least = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    assert least < fit.step_bytes(prepared) < 50 * least + 1e8
    step, *arguments = fit.first_step(prepared)
    assert fit.step_bytes(prepared) == fit.planned_bytes(step.lower(*arguments).compile())


class StateWithoutChains(NamedTuple):
    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array


def test_a_state_that_was_saved_without_chains_is_one_of_an_ordinary_run(prepared, uninterrupted, tmp_path):
    state = newest_state(prepared, uninterrupted)
    assert state.chains is None and state.step == 3
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_last(9, StateWithoutChains(state.step, state.params, state.opt_state, state.skipped))
    assert_same_trees(newest_state(prepared, tmp_path), state)
    with pytest.raises(CheckpointError, match=r"lacks \['chains'\].*new folder"):
        newest_state(with_chains(prepared), tmp_path)


def test_a_finished_run_is_left_as_it_is(prepared, uninterrupted, monkeypatch):
    before, records = restore_params(uninterrupted, "last"), lines(uninterrupted)
    monkeypatch.setattr(step_module, "make_train_step", None)
    fit.train(prepared, uninterrupted)
    assert_same_trees(restore_params(uninterrupted, "last"), before)
    assert lines(uninterrupted) == records


def test_settings_that_change_nothing_any_more_are_refused(prepared, uninterrupted):
    before = (uninterrupted / "config.json").read_bytes()
    config = copy.deepcopy(prepared.config)
    config["optimizer"]["learning_rate"] = 0.5
    with pytest.raises(CheckpointError, match=r"finished run of other settings \(config.optimizer.learning_rate was 0.001, is 0.5\)"):
        fit.train(prepared.with_config(config), uninterrupted)
    assert (uninterrupted / "config.json").read_bytes() == before


def test_the_description_has_a_segment_for_each_start_that_trains(prepared, tmp_path, monkeypatch):
    train_and_kill(prepared, tmp_path, monkeypatch, 3)
    begun = load_description(tmp_path)
    assert [segment["first_step"] for segment in begun["segments"]] == [1] and begun["data"]["train"]["images"] == 24
    config = copy.deepcopy(prepared.config)
    config["optimizer"]["learning_rate"] = 0.5

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fit, "_train_round", killed)
        with pytest.raises(Killed):
            fit.train(prepared.with_config(config), tmp_path)
    now = load_description(tmp_path)
    assert now["training"]["optimizer"]["learning_rate"] == 0.5 and now["segments"][0] == begun["segments"][0]
    assert now["segments"][1]["first_step"] == 4
    assert now["segments"][1]["changed"] == {"optimizer.learning_rate": {"was": 0.001, "is": 0.5}}
    config["seed"] = 1
    with pytest.raises(CheckpointError, match="config.seed was 0, is 1"):
        fit.train(prepared.with_config(config), tmp_path)
    assert load_description(tmp_path) == now
    renamed = PartOfSource(prepared.train, range(23))
    with pytest.raises(CheckpointError, match=r"other training data \(24 images then, 23 now"):
        fit.train(prepared._replace(train=renamed), tmp_path)
    assert load_description(tmp_path) == now


def test_a_folder_with_another_model_is_refused(prepared, uninterrupted):
    config = copy.deepcopy(prepared.config)
    config["network"]["widths"] = [8, 8]
    with pytest.raises(CheckpointError, match="belongs to another model: network differ"):
        fit.train(prepared.with_config(config), uninterrupted)


def test_posteriors_are_not_made_from_the_wrong_state(prepared, tmp_path):
    second = prepared.plan.rounds[1]
    with pytest.raises(ValueError, match="has no posteriors that round 2 was begun with"):
        evidence.evidence_of(prepared, tmp_path, second, None, done=second.first_step + 1)


@pytest.mark.slow
@pytest.mark.parametrize("balance", [0.0, 10.0])  # large beside the logits of random weights
def test_posteriors_are_the_mean_field_of_the_network_given_the_tags(prepared, balance):
    prepared = prepared.with_config({**prepared.config, "balance_weight": balance})
    network, views = prepared.network, prepared.views
    shapes = {tap: jnp.zeros((1, *views.tap(tap).shape[1:])) for tap in network.taps}
    shapes = jax.eval_shape(network.init, jax.random.key(0), prepared.variables, shapes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.5).astype(np.float32), shapes)
    settings = {**prepared.config["posterior"], "num_iterations": 3, "unary_weight": 0.8, "tempering": 1.5}
    result = posteriors.posterior_evidence(prepared, params, settings)
    assert result.shape == (24, 6, 6, 7) and result.dtype == np.float16
    tags = prepared.train.tags
    np.testing.assert_allclose(np.float32(result).sum(axis=-1), 1, atol=3e-3)
    assert not result[~np.broadcast_to(tags[:, None, None], result.shape)].any()
    kernel_params = KernelParams(**settings["kernel"]).at_stride(network.stride)
    for index in (1, 23):  # with tags that are rarer than others
        each = []
        for view in (0, 1):
            taps = {tap: views.tap(tap, view)[index : index + 1] for tap in network.taps}
            each.append(np.log(reference.softmax(network.logits(params, prepared.variables, taps)[0])))
        counts = tags[:, 1:].sum(axis=0)
        offsets = [0, *(balance * np.log(counts.max() / counts))]  # none is as rare as a tenth here
        unary = 0.8 * ((each[0] + each[1][:, ::-1]) / 2 + offsets)
        unary = np.where(tags[index], unary, -1e4).reshape(-1, 7)
        kernel = reference.dense_kernel(views.guide()[index], kernel_params, "symmetric")
        probs = reference.mean_field(unary, kernel, 3)
        expected = probs**1.5 / (probs**1.5).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(result[index].reshape(-1, 7), expected, atol=2e-3)


@pytest.mark.slow
def test_posteriors_without_cached_features_are_the_same(prepared, cache):
    plain = preparation.prepare(small_config(cache, cache__features=False, views__num_views=1))
    rng = np.random.default_rng(0)
    shapes = {tap: jnp.zeros((1, *prepared.views.tap(tap).shape[1:])) for tap in prepared.network.taps}
    shapes = jax.eval_shape(prepared.network.init, jax.random.key(0), prepared.variables, shapes)
    params = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.5).astype(np.float32), shapes)
    cached, computed = (
        np.float32(posteriors.posterior_evidence(each, params, each.config["posterior"])) for each in (prepared, plain)
    )
    # Cached features have 16 bits and the cached guide eight, and the random weights make much of both.
    assert np.abs(cached - computed).mean() < 1e-3 and (np.abs(cached - computed) > 2e-2).mean() < 1e-2
    assert np.abs(computed - computed[::-1]).mean() > 0.05


@pytest.mark.slow
def test_two_rounds_without_cached_features(cache, tmp_path):
    given = preparation.prepare(small_config(cache, cache__features=False, views__num_views=3, epochs=(1, 1)))
    fit.train(given._replace(val=None), tmp_path)
    steps = [record["step"] for record in lines(tmp_path)]
    assert steps[-1] == 6 and (tmp_path / "posteriors").is_dir()


@pytest.mark.slow
def test_a_run_with_a_pairwise_term_finer_than_the_logits(prepared, cache, tmp_path):
    fine = preparation.prepare(small_config(cache, objective__pairwise_stride=4))
    assert fine.views.guide().shape == (24, 24, 24, 3) and prepared.views.guide().shape == (24, 6, 6, 3)
    averaged = fine.views.guide().reshape(24, 6, 4, 6, 4, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(averaged, prepared.views.guide(), atol=1)
    fit.train(fine._replace(val=None), tmp_path)  # both rounds: the posteriors stay on the grid of the logits
    energies = [record["train/pairwise_energy"] for record in lines(tmp_path)]
    assert len(energies) > 2 and np.all(np.isfinite(energies)) and min(energies) > 0


@pytest.mark.slow
def test_without_validation_the_newest_parameters_are_the_best(prepared, uninterrupted, tmp_path):
    fit.train(prepared._replace(val=None), tmp_path)
    assert not any("val/miou" in record for record in lines(tmp_path))
    last = restore_params(uninterrupted, "last")
    assert_same_trees(restore_params(tmp_path, "last"), last)
    assert_same_trees(restore_params(tmp_path, "best")["decoder"], last)
    assert best_miou(tmp_path) is None
