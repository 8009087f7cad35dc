"""A functional train step over a mesh of devices.

The step is a pure function (state, batch, key) -> (state, metrics). What it minimises is an objective: a function of
one image, (key, logits, record, step) -> (loss, terms), mapped over the batch here and nowhere else.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lcrf_jax.nets.inputs import network_inputs
from lcrf_jax.nets.network import Network
from lcrf_jax.nets.trained import PART, merged


class TrainState(NamedTuple):
    """What a step changes, and all of it.

    Attributes:
      step: int32 scalar, number of steps done.
      params: parameters of the decoder, and of the layers of the backbone that are trained.
      opt_state: state of the optimiser.
      skipped: [2] int32, the steps that changed nothing since their loss or gradient was not finite: all of them, and
        those in a row up to now.
      chains: [views, images, h, w] uint8, the labels at which the Markov chain of each view stands, see
        `lcrf_jax.bound.objective.empty_chains`; None for an objective without chains.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array
    chains: jax.Array | None = None


def data_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of one axis, "data", over all devices.

    Args:
      devices: list of devices; by default all of them, process after process, so that the processes' shares of a batch
        lie one after the other.

    Returns:
      jax.sharding.Mesh.
    """
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


@functools.cache
def make_optimizer(
    *,
    learning_rate: float,
    num_steps: int,
    warmup_steps: int,
    final_share: float,
    weight_decay: float,
    clip_norm: float,
    backbone_share: float | None = None,
) -> optax.GradientTransformation:
    """AdamW with a linear warm-up, cosine decay and clipping by the global norm; the same object for the same numbers.

    Args:
      learning_rate: peak rate.
      num_steps: length of the run in steps.
      warmup_steps: steps until the peak.
      final_share: rate at the end, as a share of the peak.
      weight_decay: decoupled decay of every parameter.
      clip_norm: largest norm of the gradient.
      backbone_share: rate of the layers of the backbone that are trained, as a share of the decoder's; None where none is.

    Returns:
      optax.GradientTransformation.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(num_steps, warmup_steps + 1), learning_rate * final_share
    )
    parts = [optax.clip_by_global_norm(clip_norm), optax.adamw(schedule, weight_decay=weight_decay)]
    if backbone_share is not None:
        parts.append(optax.stateless(lambda updates, _: _with_share(updates, backbone_share)))
    return optax.chain(*parts)


def _with_share(updates, share):
    """Updates of which those of the backbone are multiplied by a share."""
    return {**updates, PART: jax.tree.map(lambda update: share * update, updates[PART])}


def check_batch_size(batch_size: int, num_devices: int, accumulation_steps: int = 1) -> None:
    """Refuse a batch that the devices cannot share.

    Args:
      batch_size: images in a step.
      num_devices: devices over all processes.
      accumulation_steps: parts of each device's share, one after the other.

    Raises:
      ValueError: if the batch is not a multiple of devices times parts.
    """
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps: expected 1 or more, got {accumulation_steps}")
    parts = num_devices * accumulation_steps
    if batch_size % parts:
        fitting = max(batch_size // parts, 1) * parts
        raise ValueError(
            f"batch_size: {batch_size} images cannot be shared by {num_devices} device(s) in {accumulation_steps} "
            f"part(s) each; choose a multiple of {parts}, such as {fitting}, or fewer devices"
        )


@functools.lru_cache(maxsize=16)
def make_train_step(
    network: Network,
    objective: Callable,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    guide_stride: int | None = None,
    *,
    accumulation_steps: int = 1,
    max_skipped: int = 10,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step, spread over the mesh with shard_map: the batch is split, the gradients are averaged.

    For equal arguments it is the same function, so that a second run of the same settings compiles nothing. The frozen
    weights are an argument of it, not a part of the program.

    Every image draws from its own key, so the result does not depend on the number of devices or parts, but for the
    order of sums. A step whose loss or gradient is not finite changes nothing but its number; after `max_skipped` of
    them in a row no step changes anything any more, until the caller looks at the state.

    Args:
      network: lcrf_jax.nets.network.Network.
      objective: function (key, logits [h, w, K], record, step) -> (loss, dict of scalars). A term "chain" [h, w] is
        not reported: it is where the Markov chain of the record's view stands, which the state keeps and the record
        of the next step has.
      optimizer: optax.GradientTransformation.
      mesh: mesh with the axis "data"; the batch must divide by its size, see `check_batch_size`.
      guide_stride: pixels per cell of the guide made of "image"; None is the grid of the logits.
      accumulation_steps: parts in which a device works through its share of the batch, for memory.
      max_skipped: steps in a row that may be skipped.

    Returns:
      Function (state, variables, batch, key) -> (state, metrics), `batch` being a `Record` of a batch without names,
        metrics being scalars averaged over the batch, and "skipped_steps". `state` is donated; `variables`
        are those of the frozen backbone. The key of the step is fold_in(key, state.step), so a resumed run draws the
        same numbers.
    """

    gradient = _gradient_of(network, objective, guide_stride)
    spread = jax.shard_map(
        _in_parts(gradient, accumulation_steps),
        mesh=mesh,
        in_specs=(P(), P(), P("data"), P("data"), P()),
        out_specs=(P(), P("data")),
        check_vma=False,
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, variables, batch, key):
        batch_size = len(batch.tags)
        keys = jax.random.split(jax.random.fold_in(key, state.step), batch_size)
        chains = state.chains
        if chains is not None:
            batch = batch._replace(chain=chains[batch.view, batch.index])
        (grads, metrics), ends = spread(state.params, variables, keys, batch, state.step)
        if chains is not None:
            chains = chains.at[batch.view, batch.index].set(ends)
            chains = jax.lax.with_sharding_constraint(chains, NamedSharding(mesh, P()))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        new = optax.apply_updates(state.params, updates), opt_state, chains
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        usable = finite & (state.skipped[1] < max_skipped)
        old = state.params, state.opt_state, state.chains
        params, opt_state, chains = jax.tree.map(functools.partial(jnp.where, usable), new, old)
        skipped = jnp.where(usable, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        metrics["skipped_steps"] = skipped[0]
        return TrainState(state.step + 1, params, opt_state, skipped, chains), metrics

    return step


def _gradient_of(network, objective, guide_stride):
    """Function (params, variables, keys, batch, step) -> ((gradient, metrics), chains), means over the batch."""

    def image_loss(params, variables, key, record, step):
        dropout_key, sample_key = jax.random.split(key)
        taps = {tap: record.features[tap][None] for tap in network.taps}
        logits = network.logits(params, variables, taps, dropout_key)[0]
        return objective(sample_key, logits, record, step)

    def gradient(params, variables, keys, batch, step):
        def with_features(weights):
            if batch.image is None:
                return batch
            features, guide = network_inputs(network, weights, batch.image, guide_stride)
            return batch._replace(image=None, features=features, guide=guide)

        frozen = None if network.trained else with_features(variables)

        def batch_loss(params):
            weights = merged(variables, params)
            records = with_features(weights) if frozen is None else frozen
            losses_of = jax.vmap(image_loss, in_axes=(None, None, 0, 0, None))
            losses, terms = losses_of(params, weights, keys, records, step)
            chains = terms.pop("chain", None)
            metrics = {"loss": losses.mean(), **{name: value.mean() for name, value in terms.items()}}
            return losses.mean(), (metrics, chains)

        grads, (metrics, chains) = jax.grad(batch_loss, has_aux=True)(params)
        return (grads, metrics), chains

    return gradient


def _in_parts(gradient, accumulation_steps):
    """The mean gradient over all devices; each works through its share of the batch in parts."""

    def shard_step(params, variables, keys, batch, step):
        if accumulation_steps == 1:
            sums, chains = gradient(params, variables, keys, batch, step)
            return jax.lax.pmean(sums, "data"), chains

        def add(sums, part):
            new, chains = gradient(params, variables, *part, step)
            return jax.tree.map(jnp.add, sums, new), chains

        parts = jax.tree.map(lambda rows: rows.reshape(accumulation_steps, -1, *rows.shape[1:]), (keys, batch))
        first = jax.tree.map(lambda rows: rows[0], parts)
        shapes, _ = jax.eval_shape(lambda part: gradient(params, variables, *part, step), first)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        sums, chains = jax.lax.scan(add, zeros, parts)
        chains = jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), chains)
        return jax.lax.pmean(jax.tree.map(lambda leaf: leaf / accumulation_steps, sums), "data"), chains

    return shard_step


def initial_state(
    key: jax.Array,
    network: Network,
    variables: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    input_size: int,
    mesh: jax.sharding.Mesh,
    chains: jax.Array | None = None,
) -> TrainState:
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
    return _initialiser(network, optimizer, input_size, mesh)(key, variables, chains)


@functools.lru_cache(maxsize=16)
def _initialiser(network, optimizer, input_size, mesh):
    def init(key, variables, chains):
        features = network.features(variables, jnp.zeros((1, input_size, input_size, 3)))
        params = network.init(key, variables, features)
        skipped = jnp.zeros(2, jnp.int32)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), skipped, chains)

    return jax.jit(init, out_shardings=NamedSharding(mesh, P()))


def replicated(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A copy of arrays on every device of a mesh.

    Args:
      tree: pytree of arrays, the same ones in every process.
      mesh: see `data_mesh`.

    Returns:
      The tree, of jax.Array.
    """
    everywhere = NamedSharding(mesh, P())

    def placed(leaf):
        return jax.make_array_from_process_local_data(everywhere, np.asarray(leaf), np.shape(leaf))

    return jax.tree.map(placed, tree)


def count_parameters(params: Any) -> int:
    """Number of scalars in a pytree of arrays.

    Args:
      params: pytree of arrays.

    Returns:
      int.
    """
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
