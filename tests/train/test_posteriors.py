"""Posteriors of training images on several devices."""

import jax
import numpy as np
import pytest
from small_runs import small_config

from lcrf_jax.bound.pixel_evidence import class_evidence
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.nets.inputs import guide_image
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.digests import params_digest
from lcrf_jax.train import fit, posteriors, preparation


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
    expected = mean_field(np.where(tags[at], settings["unary_weight"] * unary, -1e4), kernel, num_iterations=settings["num_iterations"])
    expected = jax.nn.softmax(settings["tempering"] * expected).reshape(grid, grid, -1)
    np.testing.assert_allclose(np.float32(found[at]), expected, atol=2e-3)
    if not kept:
        fields = {"class_maps": given.maps.maps, "peaks": given.maps.peaks, "objectness": given.maps.objectness,
                  "saliency": given.gradient_saliency[..., 0]}  # fmt: skip
        of_image = posteriors.map_posteriors(
            config, given.network.stride, image[None], tags[at : at + 1], {name: a[at : at + 1] for name, a in fields.items()}
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
