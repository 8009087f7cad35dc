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

from lcrf_jax.features import network_inputs


class TrainState(NamedTuple):
    """What a step changes, and all of it.

    Attributes:
      step: int32 scalar, number of steps done.
      params: parameters of the decoder.
      opt_state: state of the optimiser.
      chains: [views, images, h, w] uint8, the labels at which the Markov chain of each view stands, see
        `lcrf_jax.objectives.empty_chains`; None for an objective without chains.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    chains: Any = None


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


def make_train_step(network, variables, objective, optimizer, mesh, guide_stride=None):
    """The jitted step, spread over the mesh with shard_map: the batch is split, the gradients are averaged.

    Every image draws from its own key, so the result does not depend on the number of devices, but for the order of
    sums.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its frozen backbone, used where a batch has "image" instead of features.
      objective: function (key, logits [h, w, K], record, step) -> (loss, dict of scalars). A term "chain" [h, w] is
        not reported: it is where the Markov chain of the record's view stands, which the state keeps and the record
        of the next step has.
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
            chains = terms.pop("chain", None)
            metrics = {"loss": losses.mean(), **{name: value.mean() for name, value in terms.items()}}
            return losses.mean(), (metrics, chains)

        grads, (metrics, chains) = jax.grad(batch_loss, has_aux=True)(params)
        return jax.lax.pmean((grads, metrics), "data"), chains

    spread = jax.shard_map(
        shard_step,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data"), P()),
        out_specs=(P(), P("data")),
        check_vma=False,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        batch_size = len(batch["tags"])
        keys = jax.random.split(jax.random.fold_in(key, state.step), batch_size)
        chains = state.chains
        if chains is not None:
            batch = {**batch, "chain": chains[batch["view"], batch["index"]]}
        (grads, metrics), ends = spread(state.params, keys, batch, state.step)
        if chains is not None:
            chains = chains.at[batch["view"], batch["index"]].set(ends)
            chains = jax.lax.with_sharding_constraint(chains, NamedSharding(mesh, P()))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, chains), metrics

    return step


def initial_state(key, network, variables, optimizer, input_size, mesh, chains=None):
    """A fresh training state, replicated over the mesh.

    Args:
      key: PRNG key.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      optimizer: optax.GradientTransformation.
      input_size: side of the square input in pixels.
      mesh: see `data_mesh`.
      chains: see `TrainState`.

    Returns:
      TrainState at step 0.
    """

    def init(key, chains):
        features = network.features(variables, jnp.zeros((1, input_size, input_size, 3)))
        params = network.init(key, variables, features)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), chains)

    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))(key, chains)


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
