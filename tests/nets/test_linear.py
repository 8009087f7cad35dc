"""The linear network: its logits by loops, and what its fit finds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lcrf_jax.nets.linear import features_of_cells, fit_linear, linear_network
from lcrf_jax.nets.network import build_network

DESCRIPTION = {"backbone": "small", "last_stride": 32, "taps": ["head", "s16", "s8"], "widths": [8, 8, 8], "dropout": 0.0, "num_classes": 3}
GRIDS, CHANNELS = {"s32": 2, "s16": 3, "s8": 6}, {"s32": 5, "s16": 4, "s8": 2}


def case():
    """(linear network, features of two images, parameters)."""
    rng, network = np.random.default_rng(0), linear_network(build_network(DESCRIPTION))
    features = {tap: rng.normal(size=(2, GRIDS[tap], GRIDS[tap], CHANNELS[tap])).astype(np.float32) for tap in network.taps}
    shapes = network.init(None, {}, features)
    return network, features, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def enlarged(values, cells):
    """[h, w, C] on cells x cells by loops in float64: between the middles of the cells, linearly, and no further."""
    size = len(values)
    at = np.clip((np.arange(cells) + 0.5) * size / cells - 0.5, 0, size - 1)
    low = np.minimum(at.astype(int), size - 2) if size > 1 else at.astype(int)
    found = np.zeros((cells, cells, values.shape[-1]))
    for row in range(cells):
        for column in range(cells):
            for i in range(2):
                for j in range(2):
                    share = [w if k else 1 - w for w, k in ((at[row] - low[row], i), (at[column] - low[column], j))]
                    found[row, column] += share[0] * share[1] * values[low[row] + i, low[column] + j]
    return found


def test_the_logits_are_the_sum_of_the_maps_of_all_taps():
    network, features, params = case()
    logits = network.logits(params, {}, features)
    assert logits.shape == (2, 6, 6, 3) and logits.dtype == jnp.float32 and network.taps == tuple(GRIDS)
    for image in range(2):
        maps = [enlarged(np.float64(features[tap][image]) @ np.float64(params["weights"][tap]), 6) for tap in GRIDS]
        np.testing.assert_allclose(logits[image], sum(maps) + np.float64(params["bias"]), atol=1e-5)


def test_the_features_of_cells_are_those_that_the_logits_are_made_of():
    network, features, params = case()
    cells = np.array([[0, 7, 35, 13], [1, 1, 20, 30]])
    taken = features_of_cells({tap: array.astype(np.float16) for tap, array in features.items()}, cells, taps=network.taps)
    assert taken.shape == (2, 4, sum(CHANNELS.values())) and taken.dtype == jnp.float32
    weights = np.concatenate([params["weights"][tap] for tap in network.taps])
    of_cells = np.take_along_axis(np.asarray(network.logits(params, {}, features)).reshape(2, 36, 3), cells[..., None], axis=1)
    np.testing.assert_allclose(taken @ weights + params["bias"], of_cells, atol=0.02)  # half precision


def test_networks_differ_from_their_linear_ones_and_not_from_each_other():
    one, other = build_network(DESCRIPTION), build_network(DESCRIPTION)
    assert linear_network(one) == linear_network(other) != one
    assert hash(linear_network(one)) == hash(linear_network(other)) and linear_network(one).features is one.features


def probabilities(rows):
    """(inputs of different scales, a teacher's probabilities, its entropy in nats)."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(rows, 6)) * (0.1, 1, 30, 1, 1, 1) + (0, 5, -100, 0, 0, 0)
    logits = ((inputs - inputs.mean(axis=0)) / inputs.std(axis=0)) @ rng.normal(size=(6, 4)) + rng.normal(size=4)
    probs = reference.softmax(logits)
    return inputs.astype(np.float32), probs.astype(np.float32), -(probs * np.log(probs)).sum(axis=1).mean()


@pytest.mark.parametrize("rows", [5000, 300], ids=["batches", "all-at-once"])
def test_the_fit_finds_the_probabilities_of_a_linear_teacher(rows):
    inputs, targets, entropy = probabilities(rows)
    weights, bias, loss = fit_linear(inputs, targets, num_steps=800, learning_rate=0.1, weight_decay=0.0)
    assert weights.shape == (6, 4) and bias.shape == (4,) and weights.dtype == bias.dtype == np.float32
    found = reference.softmax(np.float64(inputs) @ np.float64(weights) + np.float64(bias))
    cross_entropy = -(targets * np.log(found)).sum(axis=1).mean()
    np.testing.assert_allclose(cross_entropy, entropy, atol=2e-3)
    np.testing.assert_allclose(loss, entropy, atol=2e-2)
    np.testing.assert_allclose(found, targets, atol=0.05)


def test_the_fit_is_the_same_bits_of_one_seed_and_stops_early():
    inputs, targets, entropy = probabilities(3000)
    one, again, other = (fit_linear(inputs.astype(np.float16), targets.astype(np.float16), num_steps=5, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one[0], again[0])
    assert np.abs(one[0] - other[0]).max() > 0 and one[2] > entropy + 0.05


@pytest.mark.parametrize("shapes", [((0, 3), (0, 2), 1), ((4, 3), (5, 2), 1), ((4,), (4, 2), 1), ((4, 3), (4, 2), 0)])
def test_what_cannot_be_fitted_is_refused(shapes):
    inputs, targets, num_steps = shapes
    with pytest.raises(ValueError, match=r"expected inputs \[M, C\], targets \[M, K\] and a step or more"):
        fit_linear(np.zeros(inputs, np.float32), np.zeros(targets, np.float32), num_steps=num_steps)
