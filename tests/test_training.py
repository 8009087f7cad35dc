"""The objectives against float64 transcriptions, and the train step over one and over four devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from lcrf_jax import training
from lcrf_jax.features import guide_image, network_inputs
from lcrf_jax.kernels import KernelParams, scaled
from lcrf_jax.nets.network import backbone_variables, build_network

SIZE, GRID, NUM_CLASSES, BATCH = 64, 4, 4, 8
STRIDE = SIZE // GRID
NETWORK = {"backbone": "small", "last_stride": 16, "taps": ["head", "s16"], "widths": [12, 8],
           "dropout": 0.3, "num_classes": NUM_CLASSES}
KERNEL = {"bilateral_weight": 0.7, "bilateral_position_width": 80.0, "bilateral_colour_width": 13.0,
          "gaussian_weight": 0.3, "gaussian_position_width": 24.0}
EVIDENCE = {"background_level": 0.3, "sharpness": 2.0, "floor": 0.01}
CONFIG = {"likelihood": "evidence", "likelihood_options": {"evidence": EVIDENCE}, "estimator": "gumbel_softmax",
          "temperature": 0.8, "num_samples": 2, "likelihood_weight": 1.7, "entropy_weight": 0.9,
          "pairwise_weight": 0.6, "pairwise_warmup_epochs": 2.0,
          "pairwise_stride": 0, "pairwise_form": "", "kernel": KERNEL}
OPTIONS = {
    "area": {"beta": 15.0, "foreground_share": 0.2, "background_share": 0.4},
    "evidence": EVIDENCE,
    "frozen_classifier": {"scale": 1.5},
    "gwrp": {"foreground_decay": 0.99, "background_decay": 0.999},
    "log_mean_exp": {"sharpness": 4.0},
    "max_pool": {},
    "noisy_or": {"rho": 0.2},
}
OPTIMIZER = {"learning_rate": 3e-3, "num_steps": 50, "warmup_steps": 3, "final_share": 0.1,
             "weight_decay": 1e-3, "clip_norm": 1.0}


def config_with(**changes):
    return {**CONFIG, **changes}


def with_likelihood(name, **changes):
    return config_with(likelihood=name, likelihood_options={name: OPTIONS[name]}, **changes)


@functools.cache
def network_and_variables():
    return build_network(NETWORK), backbone_variables(NETWORK)[0]


@functools.cache
def image_batch():
    """Images with everything that an objective may ask of a record, as NumPy arrays."""
    rng = np.random.default_rng(0)
    tags = rng.random((BATCH, NUM_CLASSES)) < 0.5
    tags[:, 0], tags[0], tags[1, 1:] = True, True, False
    maps = rng.normal(0.4, 0.5, (BATCH, GRID, GRID, NUM_CLASSES - 1)).astype(np.float32)
    return {
        "image": np.stack([reference.smooth_image(i, SIZE, SIZE) for i in range(BATCH)]).astype(np.uint8),
        "tags": tags,
        "class_maps": maps,
        "peaks": maps.max(axis=(1, 2)) + 0.1,
        "bias": np.tile(np.float32([-0.5, 0.2, -1.0]), (BATCH, 1)),
        "mask": rng.integers(0, NUM_CLASSES, (BATCH, SIZE, SIZE)).astype(np.uint8),
        "index": np.arange(BATCH, dtype=np.int32),
    }


@functools.cache
def feature_batch():
    """The same with float16 taps and a uint8 guide in place of the images, as the cache gives them."""
    network, variables = network_and_variables()
    batch = dict(image_batch())
    inputs = jax.jit(functools.partial(network_inputs, network, variables))(batch.pop("image"))
    guide = np.round(np.asarray(inputs.pop("guide"))).astype(np.uint8)
    return {**batch, "guide": guide, **{tap: np.asarray(x, np.float16) for tap, x in inputs.items()}}


def record(index):
    return {name: value[index] for name, value in feature_batch().items()}


def random_logits(seed, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, (GRID, GRID, NUM_CLASSES)).astype(np.float32)


def objective_of(config):
    return jax.jit(training.latent_crf_objective(config, stride=STRIDE, steps_per_epoch=10))


@functools.cache
def mean_objective(name):
    return objective_of(with_likelihood(name, estimator="mean"))


@functools.cache
def gumbel_objective():
    return objective_of(CONFIG)


def expected_terms(name, logits, given):
    """(log-likelihood of the probabilities, entropy, pairwise energy) in float64, in nats of the image."""
    probs = reference.softmax(logits).reshape(-1, NUM_CLASSES)
    kernel = reference.dense_kernel(given["guide"], scaled(KernelParams(**KERNEL), STRIDE), "symmetric")
    maps = given["class_maps"].reshape(-1, NUM_CLASSES - 1)
    if name == "evidence":
        evidence = reference.class_evidence(maps, given["peaks"], given["tags"], **EVIDENCE)
        log_likelihood = np.log((probs * evidence).sum(axis=1)).sum()
    else:
        seen = {"class_maps": maps, "bias": given["bias"]} if name == "frozen_classifier" else {}
        log_likelihood = reference.tag_log_likelihood(name, probs, given["tags"], **OPTIONS[name], **seen)
    return log_likelihood, -(probs * np.log(probs)).sum(), reference.pairwise_energy(probs, kernel)


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("index", [0, 1, 2], ids=["every tag", "no tag", "some tags"])
def test_the_objective_equals_its_definition(name, index):
    logits, given = random_logits(index), record(index)
    loss, terms = mean_objective(name)(jax.random.key(0), logits, given, jnp.int32(4))
    log_likelihood, entropy, energy = expected_terms(name, logits, given)
    num_cells, ramp = GRID * GRID, 5 / 20
    expected = -(1.7 * log_likelihood + 0.9 * entropy - 0.6 * ramp * energy) / num_cells
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert set(terms) == {"log_likelihood", "entropy", "pairwise_energy"}
    named = {"log_likelihood": log_likelihood, "entropy": entropy, "pairwise_energy": energy}
    for term, value in named.items():
        np.testing.assert_allclose(terms[term], value / num_cells, rtol=2e-5)


def test_evidence_of_an_earlier_round_takes_the_place_of_the_class_maps():
    logits, evidence = random_logits(3), reference.softmax(random_logits(4)).astype(np.float32)
    given = {**record(2), "pixel_evidence": evidence}
    del given["class_maps"], given["peaks"]
    config = config_with(estimator="mean")
    _, terms = objective_of(config)(jax.random.key(0), logits, given, jnp.int32(0))
    expected = np.log((reference.softmax(logits) * np.float64(evidence)).sum(axis=-1)).mean()
    np.testing.assert_allclose(terms["log_likelihood"], expected, rtol=1e-5)


@pytest.mark.parametrize(("epochs", "step", "expected"), [
    (2.0, 0, 1 / 20), (2.0, 9, 0.5), (2.0, 19, 1.0), (2.0, 500, 1.0), (0.5, 0, 0.2), (0.5, 5, 1.0), (0, 0, 1),
])
def test_only_the_pairwise_term_warms_up(epochs, step, expected):
    logits, given, key = random_logits(5), record(2), jax.random.key(0)
    config = config_with(estimator="mean", pairwise_warmup_epochs=epochs)
    loss, terms = objective_of(config)(key, logits, given, jnp.int32(step))
    rest = -1.7 * terms["log_likelihood"] - 0.9 * terms["entropy"]
    np.testing.assert_allclose(loss - rest, 0.6 * expected * terms["pairwise_energy"], rtol=1e-4)


def test_all_weights_one_is_the_negative_bound_per_cell():
    weights = {f"{term}_weight": 1.0 for term in ("likelihood", "entropy", "pairwise")}
    config = config_with(estimator="mean", pairwise_warmup_epochs=0, **weights)
    logits, given = random_logits(6), record(3)
    loss, _ = objective_of(config)(jax.random.key(0), logits, given, jnp.int32(0))
    log_likelihood, entropy, energy = expected_terms("evidence", logits, given)
    np.testing.assert_allclose(loss, -(log_likelihood + entropy - energy) / GRID**2, rtol=2e-5)


def bilinear(values, size):
    """[h, w, C] as [size, size, C], float64, borders repeated."""
    centres = np.clip((np.arange(size) + 0.5) * len(values) / size - 0.5, 0, len(values) - 1)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(len(values))))
    return np.einsum("Hh,hwk,Ww->HWk", weights, np.float64(values), weights)


@pytest.mark.parametrize(("stride", "form"), [(STRIDE // 2, "exact"), (STRIDE // 4, ""), (STRIDE // 4, "lattice")])
def test_the_pairwise_term_on_a_finer_grid_than_the_logits(stride, form):
    logits, given = random_logits(8), dict(record(2))
    given["guide"] = np.asarray(guide_image(image_batch()["image"][2:3], stride)[0])
    config = config_with(estimator="mean", pairwise_stride=stride, pairwise_form=form)
    loss, terms = objective_of(config)(jax.random.key(0), logits, given, jnp.int32(4))
    fine = reference.softmax(bilinear(logits, SIZE // stride)).reshape(-1, NUM_CLASSES)
    kernel = reference.dense_kernel(given["guide"], scaled(KernelParams(**KERNEL), stride), "symmetric")
    energy = reference.pairwise_energy(fine, kernel) / len(fine)
    np.testing.assert_allclose(terms["pairwise_energy"], energy, rtol=0.1 if form == "lattice" else 2e-4)
    rest = -1.7 * terms["log_likelihood"] - 0.9 * terms["entropy"]
    np.testing.assert_allclose(loss - rest, 0.6 * 5 / 20 * terms["pairwise_energy"], rtol=1e-4)
    _, coarse = mean_objective("evidence")(jax.random.key(0), logits, record(2), jnp.int32(4))
    assert abs(coarse["pairwise_energy"] / energy - 1) > 0.2


def test_an_unknown_form_of_the_kernel_is_told():
    with pytest.raises(ValueError, match="objective.pairwise_form: expected one of .*'lattice'.*got 'grid'"):
        training.latent_crf_objective(config_with(pairwise_form="grid"), stride=STRIDE, steps_per_epoch=10)


def test_samples_are_drawn_from_the_key_at_the_given_temperature():
    logits, given = random_logits(7), record(2)
    loss = gumbel_objective()
    _, terms = loss(jax.random.key(1), logits, given, jnp.int32(0))
    _, again = loss(jax.random.key(1), logits, given, jnp.int32(0))
    _, other = loss(jax.random.key(2), logits, given, jnp.int32(0))
    assert terms["log_likelihood"] == again["log_likelihood"] != other["log_likelihood"]
    assert terms["entropy"] == other["entropy"]
    evidence = reference.class_evidence(
        given["class_maps"].reshape(-1, NUM_CLASSES - 1), given["peaks"], given["tags"], **EVIDENCE)
    values = []
    for key in jax.random.split(jax.random.key(1), 2):
        noise = np.asarray(jax.random.gumbel(key, (GRID * GRID, NUM_CLASSES)))
        sample = reference.softmax((logits.reshape(-1, NUM_CLASSES) + noise) / 0.8)
        values.append(np.log((sample * evidence).sum(axis=1)).mean())
    np.testing.assert_allclose(terms["log_likelihood"], np.mean(values), rtol=1e-4)


@functools.cache
def losses_and_gradients():
    """One function for all likelihoods: the kernel is then compiled once."""
    objectives = {
        name: training.latent_crf_objective(with_likelihood(name), stride=STRIDE, steps_per_epoch=10)
        for name in OPTIONS
    }

    def of_all(logits, given, key):
        def loss(objective):
            return jax.value_and_grad(lambda x: objective(key, x, given, jnp.int32(0))[0])(logits)

        return {name: loss(objective) for name, objective in objectives.items()}

    return jax.jit(jax.vmap(of_all, in_axes=(0, 0, None)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_value_and_gradient_of_every_likelihood_are_finite(scale):
    logits = np.stack([random_logits(i, scale) for i in range(BATCH)])
    found = losses_and_gradients()(logits, feature_batch(), jax.random.key(0))
    for name, (values, gradients) in found.items():
        assert np.isfinite(values).all() and np.isfinite(gradients).all(), name
        assert scale != 1 or np.abs(gradients).max(axis=(1, 2, 3)).min() > 0, name


def test_unknown_names_are_refused_with_the_known_ones():
    unknown = config_with(likelihood="noisy_and")
    with pytest.raises(ValueError, match=r"objective\.likelihood.*noisy_or.*'noisy_and'"):
        training.latent_crf_objective(unknown, stride=STRIDE, steps_per_epoch=1)(
            jax.random.key(0), random_logits(0), record(0), 0)
    with pytest.raises(ValueError, match=r"estimator: expected one of .*'gumbel_softmax'.*got 'reinforce'"):
        training.latent_crf_objective(config_with(estimator="reinforce"), stride=STRIDE, steps_per_epoch=1)


def full_supervision(mask, logits):
    objective = training.full_supervision_objective({}, stride=STRIDE, steps_per_epoch=1)
    run = jax.jit(jax.value_and_grad(lambda x: objective(jax.random.key(0), x, {"mask": mask}, 0)[0]))
    return run(jnp.asarray(logits))


def test_full_supervision_is_the_cross_entropy_of_the_cells_that_are_not_void():
    mask = np.random.default_rng(0).integers(0, NUM_CLASSES, (SIZE, SIZE)).astype(np.uint8)
    mask[: SIZE // 2] = 255
    logits = random_logits(8)
    loss, gradient = full_supervision(mask, logits)
    log_probs, losses = np.log(reference.softmax(logits)), []
    for row, column in itertools.product(range(GRID // 2, GRID), range(GRID)):
        label = mask[row * STRIDE + STRIDE // 2, column * STRIDE + STRIDE // 2]
        losses.append(-log_probs[row, column, label])
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    assert not np.any(gradient[: GRID // 2]) and np.all(gradient[GRID // 2 :])


def test_an_image_that_is_void_altogether_teaches_nothing():
    loss, gradient = full_supervision(np.full((SIZE, SIZE), 255, np.uint8), random_logits(9))
    assert loss == 0 and not np.any(gradient)


@functools.cache
def step_function(num_devices):
    network, variables = network_and_variables()
    objective = training.latent_crf_objective(CONFIG, stride=STRIDE, steps_per_epoch=10)
    mesh = training.data_mesh(jax.devices()[:num_devices])
    return training.make_train_step(network, variables, objective, training.make_optimizer(**OPTIMIZER), mesh)


def fresh_state(num_devices, seed=0):
    network, variables = network_and_variables()
    mesh = training.data_mesh(jax.devices()[:num_devices])
    optimizer = training.make_optimizer(**OPTIMIZER)
    return training.initial_state(jax.random.key(seed), network, variables, optimizer, SIZE, mesh)


def trained(num_devices, *, num_steps=5, seed=0, batch=None):
    state, history = fresh_state(num_devices, seed), []
    for _ in range(num_steps):
        state, metrics = step_function(num_devices)(state, batch or step_batch(), jax.random.key(seed))
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.tree.map(np.asarray, state), history


def step_batch():
    return dict(feature_batch())


def test_one_and_four_devices_give_the_same_parameters():
    """With dropout and Gumbel noise: every image draws from its own key, whichever device it is on."""
    assert len(jax.devices()) >= 4
    (one, history_one), (four, history_four) = trained(1), trained(4)
    assert one.step == four.step == 5
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(history_one, history_four, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    start = jax.tree.map(np.asarray, fresh_state(1).params)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(one.params))]
    assert min(moved) > 1e-4


def test_the_same_key_gives_the_same_bits():
    (first, history), (second, _) = trained(4), trained(4)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    _, other = trained(4, num_steps=1, seed=1)
    assert other[0]["loss"] != history[0]["loss"]


@pytest.mark.parametrize("step", [0, 7])
def test_the_step_is_the_mean_over_images_with_keys_from_the_number_of_the_step(step):
    network, variables = network_and_variables()
    state, losses, terms = fresh_state(1)._replace(step=jnp.int32(step)), [], []
    keys = jax.random.split(jax.random.fold_in(jax.random.key(3), step), BATCH)
    for i in range(BATCH):
        dropout_key, sample_key = jax.random.split(keys[i])
        taps = {tap: record(i)[tap][None] for tap in network.taps}
        logits = network.logits(state.params, variables, taps, dropout_key)[0]
        loss, named = gumbel_objective()(sample_key, logits, record(i), jnp.int32(step))
        losses.append(loss)
        terms.append(named)
    new, metrics = step_function(1)(state, step_batch(), jax.random.key(3))
    assert new.step == step + 1
    assert set(metrics) == {"loss", "log_likelihood", "entropy", "pairwise_energy", "gradient_norm"}
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    for name in terms[0]:
        np.testing.assert_allclose(metrics[name], np.mean([each[name] for each in terms]), rtol=1e-5)


def test_a_batch_of_images_is_the_batch_of_their_features():
    images = {name: value for name, value in image_batch().items() if name not in ("mask", "index")}
    _, from_images = step_function(4)(fresh_state(4), images, jax.random.key(0))
    _, from_features = step_function(4)(fresh_state(4), step_batch(), jax.random.key(0))
    for name, value in from_features.items():
        np.testing.assert_allclose(value, from_images[name], rtol=1e-2)  # float16 taps, guide of 8 bits


def test_the_loss_of_a_fixed_batch_goes_down():
    _, history = trained(4, num_steps=40)
    losses = [each["loss"] for each in history]
    assert np.mean(losses[-5:]) < losses[0] - 0.1


def test_the_state_is_donated():
    state = fresh_state(1)
    step_function(1)(state, step_batch(), jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_the_rate_rises_to_its_peak_and_falls_to_its_share():
    """Adam's update of a constant gradient is the rate itself."""
    options = {**OPTIMIZER, "num_steps": 20, "warmup_steps": 5, "weight_decay": 0.0}
    optimizer, params = training.make_optimizer(**options), {"w": jnp.ones(4)}
    state, rates = optimizer.init(params), []
    for _ in range(22):
        updates, state = optimizer.update({"w": jnp.full(4, 100.0)}, state, params)
        rates.append(-float(updates["w"][0]))
    assert rates[0] == 0
    np.testing.assert_allclose(rates[1:6], 3e-3 * np.arange(1, 6) / 5, rtol=1e-4)
    np.testing.assert_allclose(rates[5 + 15 // 2 + 1], 3e-3 * (0.1 + 0.9 / 2), rtol=0.15)
    np.testing.assert_allclose(rates[20:], 3e-4, rtol=1e-4)
    assert all(np.diff(rates[5:21]) < 0)
    short = training.make_optimizer(**{**options, "num_steps": 2})  # shorter than its own warm-up
    assert np.isfinite(short.update({"w": jnp.ones(4)}, short.init(params), params)[0]["w"]).all()


def test_the_gradient_is_clipped_by_its_norm():
    optimizer, params = training.make_optimizer(**{**OPTIMIZER, "clip_norm": 0.5}), {"w": jnp.ones(4)}
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
    assert dict(training.data_mesh().shape) == {"data": len(jax.devices())}
    assert list(training.data_mesh(jax.devices()[1:3]).devices.flat) == jax.devices()[1:3]


def test_counting_and_sorting_out():
    assert training.count_parameters({"a": jnp.zeros((2, 3)), "b": [jnp.zeros(()), np.zeros(4)]}) == 11
    batch = {"name": np.array(["a", "b"]), "image": np.zeros((2, 3), np.uint8), "tags": np.ones((2, 4), bool),
             "s8": np.zeros(2, np.float16), "index": np.zeros(2, np.int32)}
    assert set(training.numeric_arrays(batch)) == {"image", "tags", "s8", "index"}
