"""Posteriors of training images on several devices."""

import jax
import numpy as np
import pytest
import reference
from small_runs import Killed, assert_same_trees, small_config, train_and_kill

from lcrf_jax.bound.pixel_evidence import class_evidence
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.nets.inputs import guide_image, square_image
from lcrf_jax.nets.linear import linear_network
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.digests import params_digest
from lcrf_jax.train import features, fit, linear_round, posteriors, preparation


@pytest.mark.slow
def test_class_maps_on_another_grid_than_the_logits(tmp_path):
    """They are brought to the cells of the logits, as the views of records bring them."""
    config = small_config(tmp_path, evidence_posterior=True, class_maps__grid=9)
    config["posterior"]["evidence_weight"] = 1.0
    given = preparation.prepare(config)
    found = posteriors.posterior_of_maps(given)
    assert found.shape == (24, 6, 6, 7) and given.maps.maps.shape[1] == 9
    settings = {**config["posterior"], "num_iterations": 0}
    alone = posteriors.posterior_of_maps(given._replace(plan=given.plan._replace(config={**config, "posterior": settings})))
    maps = jax.image.resize(np.float32(given.maps.maps[3]), (6, 6, 6), "linear", antialias=False).reshape(36, 6)
    evidence = config["objective"]["likelihood_options"]["evidence"]
    expected = np.where(given.train.tags[3], class_evidence(maps, given.maps.peaks[3], given.train.tags[3], **evidence), 0)
    np.testing.assert_allclose(np.float32(alone[3]).reshape(36, 7), expected / expected.sum(axis=1, keepdims=True), atol=2e-3)
    taps = {tap: given.views.tap(tap)[:1] for tap in given.network.taps}
    params = given.network.init(jax.random.key(0), given.variables, taps)
    assert posteriors.posterior_evidence(given, params, config["posterior"]).shape == found.shape


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["features", "images"])
def test_posteriors_of_class_maps_are_mean_field_on_their_evidence(tmp_path, kept):
    config = small_config(tmp_path, cache__features=kept, evidence_posterior=True)
    evidence = {**config["objective"]["likelihood_options"]["evidence"], "objectness_weight": 1.0, "saliency_weight": 1.0}
    config["objective"]["likelihood_options"] = {**config["objective"]["likelihood_options"], "evidence": evidence}
    given = preparation.prepare(config)
    found = posteriors.posterior_of_maps(given)
    tags, grid = given.train.tags, given.plan.grid
    assert found.shape == (len(tags), grid, grid, tags.shape[1]) and found.dtype == np.float16
    np.testing.assert_allclose(np.float32(found).sum(axis=-1), 1, atol=2e-3)
    assert not found[~np.broadcast_to(tags[:, None, None], found.shape)].any(), "classes that are not tagged"
    at = 5
    image = given.views[at].image if not kept else None
    guide = given.views.guide()[at : at + 1] if kept else guide_image(image[None], given.plan.guide_stride)
    cells = np.float32(given.maps.maps[at]).reshape(-1, tags.shape[1] - 1)
    beside = {"objectness": given.maps.objectness[at].reshape(-1), "saliency": given.gradient_saliency[at].reshape(-1)}
    unary = np.log(class_evidence(cells, given.maps.peaks[at], tags[at], **beside, **evidence) + 1e-12)
    params = KernelParams(**config["posterior"]["kernel"]).at_stride(given.network.stride)
    kernel = dense_kernel(guide_image(guide, given.network.stride // given.plan.guide_stride)[0], params)
    settings = config["posterior"]
    expected = mean_field(np.where(tags[at], settings["maps_weight"] * unary, -1e4), kernel, num_iterations=settings["num_iterations"])
    expected = jax.nn.softmax(settings["tempering"] * expected).reshape(grid, grid, -1)
    np.testing.assert_allclose(np.float32(found[at]), expected, atol=2e-3)
    if not kept:
        fields = {"class_maps": given.maps.maps, "peaks": given.maps.peaks, "objectness": given.maps.objectness,
                  "saliency": given.gradient_saliency[..., 0]}  # fmt: skip
        of_image = posteriors.posteriors_of_images(
            config, posteriors.settings_of_maps(config), given.network.stride, image[None], tags[at : at + 1], {name: a[at : at + 1] for name, a in fields.items()}
        )
        np.testing.assert_allclose(of_image[0], np.float32(found[at]), atol=2e-3)


@pytest.mark.slow
def test_class_maps_keep_their_word_in_later_rounds(tmp_path):
    """With all the weight on the evidence the posteriors are those of the class maps, whatever the network says."""
    config = small_config(tmp_path, evidence_posterior=True)
    given = preparation.prepare(config)
    taps = {tap: given.views.tap(tap)[:1] for tap in given.network.taps}
    params = given.network.init(jax.random.key(0), given.variables, taps)
    alone = posteriors.posterior_of_maps(given)
    settings = {**config["posterior"], "unary_weight": 1e-6, "evidence_weight": 1.0}
    np.testing.assert_allclose(np.float32(posteriors.posterior_evidence(given, params, settings)), np.float32(alone), atol=2e-3)
    both = posteriors.posterior_evidence(given, params, {**settings, "unary_weight": 1.0})
    without = posteriors.posterior_evidence(given, params, config["posterior"])
    assert np.abs(np.float32(both) - np.float32(without)).max() > 0.01


@pytest.mark.slow
def test_a_run_that_begins_with_posteriors_goes_on_to_the_same_bits(tmp_path):
    config = small_config(tmp_path / "cache", evidence_posterior=True, inference__prior_weight=1.0)
    given = preparation.prepare(config)
    fit.train(given, tmp_path / "run")
    first = params_digest(restore_params(tmp_path / "run"))
    fit.train(given, tmp_path / "run")  # finished: left as it is
    fit.train(given, tmp_path / "again")
    assert params_digest(restore_params(tmp_path / "again")) == first
    assert len(list((tmp_path / "run" / "posteriors").iterdir())) >= len(given.plan.rounds)


def with_linear(directory, **changes):
    config = small_config(directory, evidence_posterior=True, **changes)
    config["linear"] = {**config["linear"], "num_steps": 60, "learning_rate": 1e-2, "unary_weight": 0.5}
    return config


def evidence_of(given, at):
    return {"class_maps": given.maps.maps[at], "peaks": given.maps.peaks[at]}  # the objectness has no weight here


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["features", "images"])
def test_a_linear_network_learns_from_the_posteriors_and_makes_those_of_the_first_round(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(posteriors, "BATCH_SIZE", 5)  # on four devices the last four images are padded
    monkeypatch.setattr(linear_round, "BATCH_SIZE", 5)
    monkeypatch.setattr(linear_round, "ROWS_IN_MEMORY", 9)
    config = with_linear(tmp_path, cache__features=kept, class_maps__extra_sizes=(128, 64))
    given = preparation.prepare(config)
    of_maps = np.float32(posteriors.posterior_of_maps(given))
    where = {"identity": {"of": "maps"}, "directory": tmp_path / "run" / linear_round.POSTERIORS}
    params = linear_round.fitted_to(given, lambda: of_maps, **where)
    assert {tap: weights.shape[1] for tap, weights in params["weights"].items()} == dict.fromkeys(given.network.taps, 7)
    kept_ones = linear_round.kept_in(tmp_path / "run")
    assert_same_trees(kept_ones, params)
    assert linear_round.kept_in(tmp_path) is linear_round.kept_in("setup.cfg") is None

    word = linear_round.log_probs_of(given, params, **where)
    assert word.shape == of_maps.shape and word.dtype == np.float16
    settings = linear_round.posterior_settings(config)
    found = np.concatenate(list(posteriors.parts_without_network(given, settings, word)))
    assert found.shape == of_maps.shape and found.dtype == np.float16
    assert not found[~np.broadcast_to(given.train.tags[:, None, None], found.shape)].any(), "classes that are not tagged"
    differences = np.abs(np.float32(found) - of_maps).mean(), np.abs(np.roll(np.float32(found), 1, axis=0) - of_maps).mean()
    assert 0.01 < differences[0] < differences[1] / 2, "it says nearly what it has learnt from, of the same image"
    later = list(posteriors.parts_without_network(given, settings, word, first=20))
    np.testing.assert_allclose(np.float32(np.concatenate(later)), np.float32(found[20:]), atol=2e-3)

    taps = jax.eval_shape(given.network.features, given.variables, np.zeros((1, 96, 96, 3), np.float32))
    own = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), jax.eval_shape(given.network.init, jax.random.key(0), given.variables, taps))
    alone = np.concatenate(list(posteriors.parts_of_posterior_evidence(given, own, {**settings, "unary_weight": 0.0}, 0, word)))
    np.testing.assert_allclose(np.float32(alone), np.float32(found), atol=3e-3, err_msg="all the weight on the linear network")

    at = slice(3, 5)
    images = [given.train[i].image for i in (3, 4)]
    squares = [np.stack([square_image(image, size) for image in images]) for size in (config["input_size"], 128, 64)]
    of_squares = linear_round.log_probs_of_squares(given.network, given.variables, params, squares)
    np.testing.assert_allclose(of_squares, np.float32(word[at]), atol=0.02, rtol=2e-3)
    of_images = posteriors.posteriors_of_images(
        config, settings, given.network.stride, squares[0], given.train.tags[at], evidence_of(given, at), of_squares
    )
    np.testing.assert_allclose(of_images, np.float32(found[at]), atol=0.04)  # kept features are of half precision


@pytest.mark.slow
def test_what_a_linear_network_says_is_the_mean_over_mirroring_and_sizes(tmp_path):
    given = preparation.prepare(with_linear(tmp_path, class_maps__extra_sizes=(128,)))
    rng, linear = np.random.default_rng(0), linear_network(given.network)
    image, variables = given.train[7].image, given.variables
    main, larger = square_image(image, given.config["input_size"]), square_image(image, 128)
    zero = linear.init(None, variables, linear.features(variables, main[None]))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), zero)

    def log_probs(square, turn=1):
        logits = linear.logits(params, variables, linear.features(variables, square[None]))[0]
        logits = jax.image.resize(logits, (given.plan.grid, given.plan.grid, logits.shape[-1]), "linear")
        return np.log(reference.softmax(np.float64(logits)))[:, ::turn]

    expected = log_probs(main) / 4 + log_probs(main[:, ::-1], -1) / 4 + log_probs(larger) / 2
    found = linear_round.log_probs_of(given, params, identity={}, directory=tmp_path / "run")
    np.testing.assert_allclose(np.float32(found[7]), expected, atol=0.03, rtol=2e-3)
    assert np.abs(expected - log_probs(main)).max() > 0.3


@pytest.mark.slow
def test_class_maps_and_a_linear_network_have_their_weights(tmp_path):
    config = with_linear(tmp_path)
    given = preparation.prepare(config)
    of_maps = posteriors.posterior_of_maps(given)
    word = np.log(np.float32(np.roll(of_maps, 1, axis=-1)) + 0.1)  # says otherwise

    def found(linear_weight, evidence_weight):
        settings = {**config["posterior"], "linear_weight": linear_weight, "evidence_weight": evidence_weight}
        return np.float32(np.concatenate(list(posteriors.parts_without_network(given, settings, word))))

    np.testing.assert_array_equal(found(0.0, 1.0), np.float32(of_maps))
    alone, both = found(0.5, 0.0), found(0.5, 0.25)
    far, near = (np.abs(some - np.float32(of_maps)).mean() for some in (alone, both))
    assert near < 0.9 * far and np.abs(both - alone).mean() > 0.005
    settings = linear_round.posterior_settings({**config, "linear": {"unary_weight": 0.3, "evidence_weight": 0.2}})
    assert settings == {**config["posterior"], "linear_weight": 0.3, "evidence_weight": 0.2}


@pytest.mark.slow
def test_the_weight_of_the_class_maps_alone_is_that_of_the_first_posteriors(tmp_path):
    given = preparation.prepare(small_config(tmp_path, evidence_posterior=True))
    posterior = {**given.config["posterior"], "num_iterations": 0}

    def found(**weights):
        return np.float64(posteriors.posterior_of_maps(given.with_config({**given.config, "posterior": {**posterior, **weights}})))

    once, twice = found(), found(maps_weight=2.0)
    np.testing.assert_allclose(twice, once**2 / (once**2).sum(axis=-1, keepdims=True), atol=3e-3)
    np.testing.assert_array_equal(once, found(unary_weight=3.0))


@pytest.mark.slow
def test_cells_are_taken_of_some_images_where_there_are_many(tmp_path, monkeypatch):
    monkeypatch.setattr(posteriors, "BATCH_SIZE", 2)
    monkeypatch.setattr(linear_round, "MOST_IMAGES", 8)
    monkeypatch.setattr(linear_round, "MOST_CELLS", 40)
    monkeypatch.setattr(linear_round, "LEAST_CELLS_OF_IMAGE", 3)
    given = preparation.prepare(with_linear(tmp_path))
    linear, numbers = linear_round._with_linear(given), np.arange(24)[:, None, None, None]
    inputs, targets, channels = linear_round._sampled(linear, np.broadcast_to(numbers, (24, 6, 6, 7)), np.random.default_rng(0))
    assert sorted(set(targets[:, 0])) == list(range(8)) and len(inputs) == len(targets) == 8 * 5
    assert inputs.dtype == np.float16 and inputs.shape[1] == sum(channels.values())
    finest = np.asarray(given.views.tap("s16"))  # on the grid of the posteriors
    inputs, targets, channels = linear_round._sampled(linear, finest[..., :7], np.random.default_rng(0))
    assert list(channels) == ["s32", "s16"] and np.ptp(targets) > 0.1
    np.testing.assert_array_equal(targets, inputs[:, channels["s32"] :][:, :7])


@pytest.mark.slow
def test_a_run_that_begins_with_a_linear_network_is_killed_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    config = with_linear(tmp_path / "cache")
    config["posterior"] = {**config["posterior"], "linear_weight": 0.5, "evidence_weight": 0.25}  # in the second round
    given = preparation.prepare(config)
    fit.train(given, tmp_path / "whole")
    parts, of_squares = posteriors.parts_without_network, features.square_batches

    def broken_off(*arguments):
        yield next(parts(*arguments))[:7]
        raise Killed

    def not_begun(*arguments):
        yield next(of_squares(*arguments))
        raise Killed

    for name, function in (("features.square_batches", not_begun), ("evidence.parts_without_network", broken_off)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(f"lcrf_jax.train.{name}", function)
            fit.train(given, tmp_path / "run")
    train_and_kill(given, tmp_path / "run", monkeypatch, 3)
    fit.train(given, tmp_path / "run")
    assert params_digest(restore_params(tmp_path / "run")) == params_digest(restore_params(tmp_path / "whole"))
    assert_same_trees(linear_round.kept_in(tmp_path / "run"), linear_round.kept_in(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False], ids=["features", "images"])
def test_posteriors_on_several_devices_are_those_on_one(tmp_path, monkeypatch, kept):
    given = preparation.prepare(small_config(tmp_path, cache__features=kept))
    network, rng = given.network, np.random.default_rng(0)
    size = given.config["input_size"]
    taps = jax.eval_shape(network.features, given.variables, np.zeros((1, size, size, 3), np.float32))
    shapes = jax.eval_shape(network.init, jax.random.key(0), given.variables, taps)
    params = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.5).astype(np.float32), shapes)
    monkeypatch.setattr(posteriors, "BATCH_SIZE", 5)  # 24 images: 20 on four devices, and the last four, padded

    def found():
        return np.float32(posteriors.posterior_evidence(given, params, given.config["posterior"]))

    spread = found()
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    alone = found()
    assert spread.shape == alone.shape and len(alone) == 24
    np.testing.assert_array_equal(spread[:20], alone[:20])
    np.testing.assert_allclose(spread[20:], alone[20:], atol=2e-3)  # a batch of four there, of five here
    assert np.abs(alone - alone[::-1]).mean() > 0.05
