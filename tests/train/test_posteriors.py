"""Posteriors of training images on several devices."""

import jax
import numpy as np
import pytest
from small_runs import small_config

from lcrf_jax.train import posteriors, preparation


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
