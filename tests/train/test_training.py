"""The train step over one and over four devices, its state, chains and optimiser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from records import (
    BATCH,
    GRID,
    NUM_CLASSES,
    SIZE,
    STRIDE,
    config_with,
    feature_batch,
    image_batch,
    network_and_variables,
)

from lcrf_jax.bound import objective
from lcrf_jax.train.step import (
    check_batch_size,
    count_parameters,
    data_mesh,
    initial_state,
    make_optimizer,
    make_train_step,
    replicated,
)

OPTIMIZER = {"learning_rate": 3e-3, "num_steps": 50, "warmup_steps": 3, "final_share": 0.1,
             "weight_decay": 1e-3, "clip_norm": 1.0}
ESTIMATORS = {
    "gumbel_softmax": {},
    "mean": {},
    "straight_through": {},
    "reinforce": {"num_samples": 4},
    "exact": {},
    # One sweep with a strong kernel: where a chain stands depends on where it has been.
    "mcmc": {"entropy_weight": 1.0, "pairwise_weight": 30.0, "pairwise_warmup_epochs": 0, "num_sweeps": 1},
}
NUM_VIEWS, NUM_IMAGES, EMPTY = 2, 12, 255


def objective_of(estimator):
    config = config_with(estimator=estimator, **ESTIMATORS[estimator])
    return objective.latent_crf_objective(config, stride=STRIDE, steps_per_epoch=10)


@functools.cache
def step_function(num_devices, estimator="gumbel_softmax", accumulation_steps=1):
    mesh = data_mesh(jax.devices()[:num_devices])
    optimizer = make_optimizer(**OPTIMIZER)
    network, variables = network_and_variables()
    step = make_train_step(
        network, objective_of(estimator), optimizer, mesh, accumulation_steps=accumulation_steps, max_skipped=3)
    variables = replicated(variables, mesh)
    return lambda state, batch, key: step(state, variables, batch, key)


@functools.cache
def image_function(estimator):
    """The objective of one image after the network, (params, key, record, step) -> (loss, terms)."""
    network, variables = network_and_variables()

    def loss_and_terms(params, key, record, step):
        dropout_key, sample_key = jax.random.split(key)
        taps = {tap: record.features[tap][None] for tap in network.taps}
        logits = network.logits(params, variables, taps, dropout_key)[0]
        return objective_of(estimator)(sample_key, logits, record, step)

    return jax.jit(loss_and_terms)


def fresh_state(num_devices, seed=0, estimator="gumbel_softmax"):
    mesh = data_mesh(jax.devices()[:num_devices])
    optimizer = make_optimizer(**OPTIMIZER)
    chains = objective.empty_chains(NUM_VIEWS, NUM_IMAGES, GRID) if estimator == "mcmc" else None
    return initial_state(jax.random.key(seed), *network_and_variables(), optimizer, SIZE, mesh, chains)


def trained(num_devices, estimator="gumbel_softmax", *, num_steps=5, seed=0):
    state, history = fresh_state(num_devices, seed, estimator), []
    for _ in range(num_steps):
        state, metrics = step_function(num_devices, estimator)(state, step_batch(), jax.random.key(seed))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


def step_batch():
    """Eight of the twelve images, some of them mirrored."""
    index = np.random.default_rng(0).permutation(NUM_IMAGES)[:BATCH].astype(np.int32)
    return feature_batch()._replace(index=index, view=np.arange(BATCH, dtype=np.int32) % NUM_VIEWS)


@pytest.mark.slow
def test_one_and_four_devices_give_the_same_parameters():
    """With dropout and Gumbel noise: every image draws from its own key, whichever device it is on."""
    assert len(jax.devices()) >= 4
    (one, history_one), (four, history_four) = trained(1), trained(4)
    assert int(one.step) == int(four.step) == 5
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(history_one, history_four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    start = jax.tree.map(np.asarray, fresh_state(1).params)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(one.params))]
    assert min(moved) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "parts"), [(1, 2), (1, 8), (2, 4)])
@pytest.mark.parametrize("estimator", ["gumbel_softmax", "mcmc"])
def test_parts_of_a_batch_add_up_to_the_batch(num_devices, parts, estimator):
    key = jax.random.key(0)
    whole, metrics = step_function(1, estimator)(fresh_state(1, estimator=estimator), step_batch(), key)
    state, found = step_function(num_devices, estimator, parts)(
        fresh_state(num_devices, estimator=estimator), step_batch(), key)
    assert set(found) == set(metrics)
    for name, value in metrics.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if estimator == "mcmc":
        np.testing.assert_array_equal(state.chains, whole.chains)


@pytest.mark.slow
def test_parts_of_a_batch_of_images():
    images = image_batch()._replace(mask=None, index=None)
    _, whole = step_function(4)(fresh_state(4), images, jax.random.key(0))
    _, parts = step_function(2, accumulation_steps=2)(fresh_state(2), images, jax.random.key(0))
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5)


def poisoned(batch, row=3):
    """The batch with a class map of one image that is not a number."""
    maps = batch.class_maps.copy()
    maps[row] = np.nan
    return batch._replace(class_maps=maps)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gumbel_softmax", "mcmc"])
def test_a_step_without_a_finite_loss_changes_nothing_but_its_number(estimator):
    step, key = step_function(4, estimator), jax.random.key(0)
    state, _ = step(fresh_state(4, estimator=estimator), step_batch(), key)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, poisoned(step_batch()), key)
    assert np.isnan(metrics["loss"]) and metrics["skipped_steps"] == 1
    assert state.step == 2 and state.skipped.tolist() == [1, 1]
    for name in ("params", "opt_state", "chains"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    state, metrics = step(state, step_batch(), key)
    assert np.isfinite(metrics["loss"]) and state.skipped.tolist() == [1, 0]
    assert not np.array_equal(state.params["logits"]["kernel"], before.params["logits"]["kernel"])


@pytest.mark.slow
def test_too_many_skipped_steps_in_a_row_stay_until_they_are_seen():
    step, key, state = step_function(4), jax.random.key(0), fresh_state(4)
    for number in range(3):
        state, _ = step(state, poisoned(step_batch()), key)
        assert state.skipped.tolist() == [number + 1] * 2
    before = jax.tree.map(np.array, state.params)
    state, metrics = step(state, step_batch(), key)
    assert np.isfinite(metrics["loss"]) and state.skipped[1] == 4
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


@pytest.mark.parametrize(("batch_size", "num_devices", "parts", "message"), [
    (10, 4, 1, "10 images cannot be shared by 4 device.*multiple of 4, such as 8"),
    (8, 4, 3, "in 3 part.*multiple of 12, such as 12"),
    (8, 4, 0, "accumulation_steps: expected 1 or more, got 0"),
])
def test_batches_that_cannot_be_shared(batch_size, num_devices, parts, message):
    with pytest.raises(ValueError, match=message):
        check_batch_size(batch_size, num_devices, parts)
    check_batch_size(24, 4, 3)


def test_the_same_key_gives_the_same_bits():
    (first, history), (second, _) = trained(4), trained(4)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    _, other = trained(4, num_steps=1, seed=1)
    assert other[0]["loss"] != history[0]["loss"]


def image_by_image(estimator, params, key, step, **changes):
    """Mean loss and stacked terms of the batch, each image by itself with its own key."""
    keys = jax.random.split(jax.random.fold_in(key, step), BATCH)
    batch = step_batch()._replace(**changes)
    records = [jax.tree.map(lambda value, i=i: value[i], batch) for i in range(BATCH)]
    each = [image_function(estimator)(params, keys[i], records[i], jnp.int32(step)) for i in range(BATCH)]
    losses, terms = zip(*each, strict=True)
    return np.mean(losses), {name: np.stack([one[name] for one in terms]) for name in terms[0]}


@pytest.mark.slow_except("7")
@pytest.mark.parametrize("step", [0, 7])
def test_the_step_is_the_mean_over_images_with_keys_from_the_number_of_the_step(step):
    state, key = fresh_state(1)._replace(step=jnp.int32(step)), jax.random.key(3)
    loss, terms = image_by_image("gumbel_softmax", state.params, key, step)
    new, metrics = step_function(1)(state, step_batch(), key)
    assert new.step == step + 1
    assert set(metrics) == {"loss", "log_likelihood", "entropy", "pairwise_energy", "gradient_norm", "skipped_steps"}
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for name, values in terms.items():
        np.testing.assert_allclose(metrics[name], values.mean(), rtol=1e-5)


def batch_chains(chains):
    """[B, h, w] the chains of the batch."""
    batch = step_batch()
    return np.asarray(chains)[batch.view, batch.index]


@pytest.mark.slow
def test_a_step_with_chains_sets_those_of_its_batch_and_no_others():
    state, metrics = step_function(4, "mcmc")(fresh_state(4, estimator="mcmc"), step_batch(), jax.random.key(0))
    assert set(metrics) == {"loss", "log_prob", "entropy", "gradient_norm", "skipped_steps"}
    assert state.chains.shape == (NUM_VIEWS, NUM_IMAGES, GRID, GRID) and state.chains.dtype == jnp.uint8
    assert state.chains.sharding.is_fully_replicated
    assert batch_chains(state.chains).max() < NUM_CLASSES
    others, batch = np.ones((NUM_VIEWS, NUM_IMAGES), bool), step_batch()
    others[batch.view, batch.index] = False
    assert others.sum() == NUM_VIEWS * NUM_IMAGES - BATCH
    assert np.all(np.asarray(state.chains)[others] == EMPTY)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 4])
def test_a_step_goes_on_from_the_chains_that_the_one_before_left(num_devices):
    """Every view's chain by itself, from where it stands or, if it has not begun, from a sample of q."""
    key, state, chains = jax.random.key(0), fresh_state(num_devices, estimator="mcmc"), []
    for step in range(2):
        params, before = jax.tree.map(np.asarray, state.params), batch_chains(state.chains)
        state, metrics = step_function(num_devices, "mcmc")(state, step_batch(), key)
        chains.append(batch_chains(state.chains))
        loss, terms = image_by_image("mcmc", params, key, step, chain=before)
        np.testing.assert_array_equal(chains[step], terms["chain"])
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    _, anew = image_by_image("mcmc", params, key, 1, chain=np.full_like(before, EMPTY))
    assert np.mean(chains[1] != anew["chain"]) > 0.1


@pytest.mark.slow
def test_one_and_four_devices_give_the_same_chains():
    (one, history_one), (four, history_four) = trained(1, "mcmc"), trained(4, "mcmc")
    np.testing.assert_array_equal(one.chains, four.chains)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(history_one, history_four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_a_batch_of_images_is_the_batch_of_their_features():
    images = image_batch()._replace(mask=None, index=None)
    _, from_images = step_function(4)(fresh_state(4), images, jax.random.key(0))
    _, from_features = step_function(4)(fresh_state(4), step_batch(), jax.random.key(0))
    for name, value in from_features.items():
        np.testing.assert_allclose(value, from_images[name], rtol=1e-2)  # float16 taps, guide of 8 bits


@pytest.mark.slow_except("gumbel_softmax")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_of_a_fixed_batch_goes_down(estimator):
    """Before and after with the same noise, that of the first step."""
    state, history = trained(4, estimator, num_steps=40)
    _, metrics = step_function(4, estimator)(state._replace(step=0 * state.step), step_batch(), jax.random.key(0))
    assert metrics["loss"] < history[0]["loss"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gumbel_softmax", "mcmc"])
def test_the_state_is_donated(estimator):
    state = fresh_state(1, estimator=estimator)
    step_function(1, estimator)(state, step_batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.chains)))


def test_the_rate_rises_to_its_peak_and_falls_to_its_share():
    """Adam's update of a constant gradient is the rate itself."""
    options = {**OPTIMIZER, "num_steps": 20, "warmup_steps": 5, "weight_decay": 0.0}
    optimizer, params = make_optimizer(**options), {"w": jnp.ones(4)}
    state, rates, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(22):
        updates, state = update({"w": jnp.full(4, 100.0)}, state, params)
        rates.append(-float(updates["w"][0]))
    assert rates[0] == 0
    np.testing.assert_allclose(rates[1:6], 3e-3 * np.arange(1, 6) / 5, rtol=1e-4)
    np.testing.assert_allclose(rates[5 + 15 // 2 + 1], 3e-3 * (0.1 + 0.9 / 2), rtol=0.15)
    np.testing.assert_allclose(rates[20:], 3e-4, rtol=1e-4)
    assert all(np.diff(rates[5:21]) < 0)
    short = make_optimizer(**{**options, "num_steps": 2})  # shorter than its own warm-up
    assert np.isfinite(short.update({"w": jnp.ones(4)}, short.init(params), params)[0]["w"]).all()


def test_the_gradient_is_clipped_by_its_norm():
    optimizer, params = make_optimizer(**{**OPTIMIZER, "clip_norm": 0.5}), {"w": jnp.ones(4)}
    _, state = optimizer.update({"w": jnp.full(4, 100.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(optax.tree.get(state, "mu")), 0.1 * 0.5, rtol=1e-5)


def test_the_initial_state_lies_on_every_device_and_follows_from_the_key():
    state = fresh_state(4)
    assert state.step == 0 and state.step.dtype == jnp.int32
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert all(len(leaf.sharding.device_set) == 4 for leaf in jax.tree.leaves(state))
    same, other = fresh_state(1), fresh_state(1, seed=1)
    kernels = [np.asarray(s.params["merge_s16"]["kernel"]) for s in (state, same, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[0], kernels[2])


def test_the_mesh_has_one_axis_over_all_devices():
    assert dict(data_mesh().shape) == {"data": len(jax.devices())}
    assert list(data_mesh(jax.devices()[1:3]).devices.flat) == jax.devices()[1:3]


def test_counting():
    assert count_parameters({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(()), np.zeros(4)]}) == 11
