"""A functional train step over a mesh of devices.

The step is a pure function (state, batch, key) -> (state, metrics). What it minimises is an objective: a function of
one image, (key, logits, record, step) -> (loss, terms), mapped over the batch here and nowhere else.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lcrf_jax import elbo, observation
from lcrf_jax.crf import pairwise_energy
from lcrf_jax.features import network_inputs
from lcrf_jax.filters import FORMS, image_kernel
from lcrf_jax.kernels import KernelParams, scaled


class TrainState(NamedTuple):
    """What a step changes, and all of it.

    Attributes:
      step: int32 scalar, number of steps done.
      params: parameters of the decoder.
      opt_state: state of the optimiser.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def data_mesh(devices=None):
    """A mesh of one axis, "data", over all devices.

    Args:
      devices: list of devices; by default all of them.

    Returns:
      jax.sharding.Mesh.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def make_optimizer(*, learning_rate, num_steps, warmup_steps, final_share, weight_decay, clip_norm):
    """AdamW with a linear warm-up, cosine decay and clipping by the global norm.

    Args:
      learning_rate: peak rate.
      num_steps: length of the run in steps.
      warmup_steps: steps until the peak.
      final_share: rate at the end, as a share of the peak.
      weight_decay: decoupled decay of every parameter.
      clip_norm: largest norm of the gradient.

    Returns:
      optax.GradientTransformation.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(num_steps, warmup_steps + 1), learning_rate * final_share
    )
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay))


def tag_log_likelihood(config, record):
    """log p(y | z, x) of one record as a function of the labels z.

    Args:
      config: Mapping with "likelihood", a name of `lcrf_jax.observation`, and "likelihood_options", a dict from such
        a name to keyword arguments; those of "evidence" are for `class_evidence`.
      record: one record: "tags" and, for the image likelihoods, "class_maps" and "peaks", or "pixel_evidence".

    Returns:
      Function from labels [m, K] to a scalar.

    Raises:
      ValueError: if the name is unknown.
    """
    name, tags = config["likelihood"], record["tags"]
    options = config["likelihood_options"].get(name, {})
    if name in observation.TAG_LIKELIHOODS:
        return lambda labels: observation.TAG_LIKELIHOODS[name](labels, tags, **options)
    if name not in observation.IMAGE_LIKELIHOODS:
        known = sorted({**observation.TAG_LIKELIHOODS, **observation.IMAGE_LIKELIHOODS})
        raise ValueError(f"objective.likelihood: expected one of {known}, got {name!r}")
    if name == "frozen_classifier":
        maps = _pixels(record["class_maps"])
        return lambda labels: observation.frozen_classifier(labels, tags, maps, bias=record["bias"], **options)
    if "pixel_evidence" in record:
        evidence = _pixels(record["pixel_evidence"])
    else:
        evidence = observation.class_evidence(_pixels(record["class_maps"]), record["peaks"], tags, **options)
    return lambda labels: observation.evidence(labels, tags, evidence)


def _pixels(grid):
    """[h, w, C] as [m, C]."""
    return grid.reshape(-1, grid.shape[-1])


def latent_crf_objective(config, *, stride, steps_per_epoch):
    """The negative bound of one image, divided by its number of cells, with the weights of the configuration.

    With all weights 1 this is the bound, up to log Z(x); any other weights make a re-weighted objective of it. On a
    guide finer than the logits the pairwise energy is that of the logits' bilinear interpolation, per pixel of the
    guide, times the number of cells: the three terms keep their proportions.

    Args:
      config: Mapping with "likelihood" and "likelihood_options" (see `tag_log_likelihood`), "estimator" (a key of
        `lcrf_jax.elbo.ESTIMATORS`), "temperature", "num_samples", "likelihood_weight", "entropy_weight",
        "pairwise_weight", "pairwise_warmup_epochs", "pairwise_stride" (pixels of the input per cell of the guide,
        0 for the grid of the logits), "pairwise_form" (a key of `lcrf_jax.filters.FORMS`, or "" for the default)
        and "kernel", the fields of `KernelParams` in pixels of the network's input.
      stride: pixels of the input per cell of the logits.
      steps_per_epoch: for the warm-up of the pairwise weight.

    Returns:
      Function (key, logits [h, w, K], record, step) -> (loss, dict of terms in nats per cell).

    Raises:
      ValueError: if the estimator is unknown; when the function is called, if the likelihood is.
    """
    if config["estimator"] not in elbo.ESTIMATORS:
        known = sorted(elbo.ESTIMATORS)
        raise ValueError(f"objective.estimator: expected one of {known}, got {config['estimator']!r}")
    if config["pairwise_form"] not in ("", *FORMS):
        raise ValueError(f"objective.pairwise_form: expected one of {sorted(FORMS)} or '', got {config['pairwise_form']!r}")
    kernel_params = scaled(KernelParams(**config["kernel"]), config["pairwise_stride"] or stride)
    estimator = functools.partial(
        elbo.ESTIMATORS[config["estimator"]],
        temperature=config["temperature"],
        num_samples=config["num_samples"],
    )
    warmup_steps = config["pairwise_warmup_epochs"] * steps_per_epoch

    def energy_per_cell(logits, guide):
        # The kernel holds no parameter, and its gradient would double the cost of the step.
        kernel = jax.lax.stop_gradient(image_kernel(guide, kernel_params, form=config["pairwise_form"] or None))
        fine = jax.image.resize(logits, (*guide.shape[:2], logits.shape[-1]), "linear")
        return pairwise_energy(jax.nn.softmax(_pixels(fine), axis=-1), kernel) / (guide.shape[0] * guide.shape[1])

    def objective(key, logits, record, step):
        terms = elbo.elbo(key, _pixels(logits), None, tag_log_likelihood(config, record), estimator=estimator)
        num_cells = logits.shape[0] * logits.shape[1]
        terms = terms._replace(pairwise_energy=num_cells * energy_per_cell(logits, record["guide"]))
        ramp = jnp.minimum(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        loss = -(
            config["likelihood_weight"] * terms.log_likelihood
            + config["entropy_weight"] * terms.entropy
            - config["pairwise_weight"] * ramp * terms.pairwise_energy
        )
        reported = ("log_likelihood", "entropy", "pairwise_energy")
        return loss / num_cells, {name: getattr(terms, name) / num_cells for name in reported}

    return objective


def full_supervision_objective(config, *, stride, steps_per_epoch):
    """Cross-entropy with the masks, the upper bound of every weakly supervised method.

    Args:
      config: not used.
      stride: pixels of the input per cell of the logits.
      steps_per_epoch: not used.

    Returns:
      Function (key, logits [h, w, K], record, step) -> (loss, dict of terms), the mean over cells that are not
      void.
    """
    del config, steps_per_epoch

    def objective(key, logits, record, step):
        del key, step
        labels = record["mask"][stride // 2 :: stride, stride // 2 :: stride].astype(jnp.int32)
        known = labels < logits.shape[-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(known, labels, 0))
        loss = jnp.sum(losses * known) / jnp.maximum(known.sum(), 1)
        return loss, {"cross_entropy": loss}

    return objective


OBJECTIVES = {"latent_crf": latent_crf_objective, "full_supervision": full_supervision_objective}


def make_train_step(network, variables, objective, optimizer, mesh, guide_stride=None):
    """The jitted step, spread over the mesh with shard_map: the batch is split, the gradients are averaged.

    Every image draws from its own key, so the result does not depend on the number of devices, but for the order of
    sums.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its frozen backbone, used where a batch has "image" instead of features.
      objective: function (key, logits [h, w, K], record, step) -> (loss, dict of scalars).
      optimizer: optax.GradientTransformation.
      mesh: mesh with the axis "data"; the batch must divide by its size.
      guide_stride: pixels per cell of the guide made of "image"; None is the grid of the logits.

    Returns:
      Function (state, batch, key) -> (state, metrics), metrics being scalars averaged over the batch. `state` is
        donated. The key of the step is fold_in(key, state.step), so a resumed run draws the same numbers.
    """

    def image_loss(params, key, record, step):
        dropout_key, sample_key = jax.random.split(key)
        taps = {tap: record[tap][None] for tap in network.taps}
        logits = network.logits(params, variables, taps, dropout_key)[0]
        return objective(sample_key, logits, record, step)

    def shard_step(params, keys, batch, step):
        records = {name: value for name, value in batch.items() if name != "image"}
        if "image" in batch:
            records.update(network_inputs(network, variables, batch["image"], guide_stride))

        def batch_loss(params):
            losses, terms = jax.vmap(image_loss, in_axes=(None, 0, 0, None))(params, keys, records, step)
            return losses.mean(), {"loss": losses.mean(), **{name: value.mean() for name, value in terms.items()}}

        grads, metrics = jax.grad(batch_loss, has_aux=True)(params)
        return jax.lax.pmean((grads, metrics), "data")

    spread = jax.shard_map(
        shard_step, mesh=mesh, in_specs=(P(), P("data"), P("data"), P()), out_specs=P(), check_vma=False
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        batch_size = len(batch["tags"])
        keys = jax.random.split(jax.random.fold_in(key, state.step), batch_size)
        grads, metrics = spread(state.params, keys, batch, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

    return step


def initial_state(key, network, variables, optimizer, input_size, mesh):
    """A fresh training state, replicated over the mesh.

    Args:
      key: PRNG key.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      optimizer: optax.GradientTransformation.
      input_size: side of the square input in pixels.
      mesh: see `data_mesh`.

    Returns:
      TrainState at step 0.
    """

    def init(key):
        features = network.features(variables, jnp.zeros((1, input_size, input_size, 3)))
        params = network.init(key, variables, features)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))(key)


def count_parameters(params):
    """Number of scalars in a pytree of arrays.

    Args:
      params: pytree of arrays.

    Returns:
      int.
    """
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def numeric_arrays(batch: Mapping):
    """The part of a batch that a step can take: everything but strings.

    Args:
      batch: dict from name to array.

    Returns:
      dict without names and other text.
    """
    return {name: value for name, value in batch.items() if np.dtype(value.dtype).kind in "biuf"}
