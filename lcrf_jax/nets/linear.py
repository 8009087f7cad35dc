"""A linear network: log-probabilities of every cell from the frozen features there alone, fitted in seconds.

It has few weights, and no layer of its own to remember single images with. So where the labels that it learns from are often
wrong in the same image and seldom in the same way, what it says of these images is nearer to the truth than they were.
"""

import functools
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lcrf_jax.nets.network import Network
from lcrf_jax.nets.tag_classifier import column_moments
from lcrf_jax.numerics import promote_float

_BATCH_SIZE = 1024
_LEAST_DEVIATION = 1e-3


def linear_network(network: Network) -> Network:
    """The network with a linear decoder in the place of its own: on the same features, and with logits on the same grid.

    Args:
      network: lcrf_jax.nets.network.Network.

    Returns:
      Network. Its parameters are {"weights": {tap: [C, K]}, "bias": [K]} for the taps of `network.taps`, all zero from
      `init`; `fit_linear` fits them. The logits are the sum of the maps of all taps, enlarged linearly.
    """

    def init(key, variables, features):
        del key, variables
        num_classes = network.description["num_classes"]
        weights = {tap: jnp.zeros((features[tap].shape[-1], num_classes)) for tap in network.taps}
        return {"weights": weights, "bias": jnp.zeros(num_classes)}

    def logits(params, variables, features, key=None):
        del variables, key
        grid = _grid(network.taps, features)
        maps = [_enlarged(promote_float(features[tap]) @ params["weights"][tap], grid) for tap in network.taps]
        return sum(maps[1:], maps[0]) + params["bias"]

    return network._replace(description={**network.description, "decoder": "linear"}, init=init, logits=logits)


def _grid(taps, features):
    """(rows, columns) of the finest tap."""
    return features[taps[-1]].shape[1:3]


def _enlarged(maps, grid):
    return maps if maps.shape[1:3] == grid else jax.image.resize(maps, (len(maps), *grid, maps.shape[-1]), "linear")


@functools.partial(jax.jit, static_argnames="taps")
def features_of_cells(features: Mapping[str, ArrayLike], cells: ArrayLike, *, taps: tuple[str, ...]) -> jax.Array:
    """All features of some cells of the finest tap's grid; those of coarser taps between their cells, linearly.

    Args:
      features: dict from tap to [B, h, w, C].
      cells: [B, n] int, numbers of cells in rows.
      taps: names from coarse to fine.

    Returns:
      [B, n, C], the channels of the taps one after the other.
    """
    grid = _grid(taps, features)
    every = jnp.concatenate([_enlarged(promote_float(features[tap]), grid) for tap in taps], axis=-1)
    return jnp.take_along_axis(every.reshape(len(every), -1, every.shape[-1]), jnp.asarray(cells)[..., None], axis=1)


def fit_linear(
    inputs: np.ndarray, targets: np.ndarray, *, num_steps: int, seed: int = 0, learning_rate: float = 1e-3, weight_decay: float = 1e-2
) -> tuple[np.ndarray, np.ndarray, float]:
    """Fit a linear softmax classifier to probabilities, by some steps of AdamW with a rate that falls to 0.

    The mean cross-entropy is lowered and not brought to its least: what few steps do not reach is what is peculiar to few
    cells. Inputs are centred and divided by their standard deviation while fitting. A step takes 1,024 rows, or all where there
    are fewer; the rows are gone through in an order of chance, again and again.

    Args:
      inputs: [M, C] of any float type.
      targets: [M, K], >= 0, each row summing to one.
      num_steps: at least 1.
      seed: of the order of the rows.
      learning_rate: at the start.
      weight_decay: of AdamW.

    Returns:
      (weights [C, K] float32, bias [K] float32, mean loss in nats of the last tenth of the steps).

    Raises:
      ValueError: if the shapes do not agree, or there is nothing to fit.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or len(inputs) != len(targets) or not inputs.size or num_steps < 1:
        raise ValueError(
            f"expected inputs [M, C], targets [M, K] and a step or more, with M and C >= 1; got {inputs.shape}, {targets.shape} and {num_steps}"
        )
    mean, deviation = (moments.astype(np.float32) for moments in column_moments(inputs))
    deviation += np.float32(_LEAST_DEVIATION)
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, num_steps), weight_decay=weight_decay)
    params = {"weights": jnp.zeros((inputs.shape[1], targets.shape[1])), "bias": jnp.zeros(targets.shape[1])}
    state, losses, step = optimizer.init(params), [], jax.jit(functools.partial(_stepped, optimizer))
    for rows in itertools.islice(_batches_of_rows(len(inputs), np.random.default_rng(seed)), num_steps):
        batch = (np.asarray(inputs[rows], np.float32) - mean) / deviation
        params, state, loss = step(params, state, batch, np.asarray(targets[rows], np.float32))
        losses.append(loss)
    weights = np.asarray(params["weights"]) / deviation[:, None]
    bias = np.asarray(params["bias"]) - mean @ weights
    return weights, bias, float(np.mean(losses[-max(1, len(losses) // 10) :]))


def _batches_of_rows(count, chosen):
    """Without end: the rows of a step, each row once before any comes again."""
    size = min(_BATCH_SIZE, count)
    while True:
        order = chosen.permutation(count)
        yield from (np.sort(order[start : start + size]) for start in range(0, count - size + 1, size))


def _stepped(optimizer, params, state, inputs, targets):
    def loss(params):
        return optax.softmax_cross_entropy(inputs @ params["weights"] + params["bias"], targets).mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value
