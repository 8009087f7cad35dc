"""A round before the first, whose network is linear: it learns from the posteriors of the class maps, and makes better ones."""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.machine.entries import entries
from lcrf_jax.machine.progress import image_progress, say
from lcrf_jax.nets.linear import features_of_cells, fit_linear, linear_network
from lcrf_jax.nets.network import Network
from lcrf_jax.train.class_maps import ROWS_IN_MEMORY, mean_map
from lcrf_jax.train.features import of_squares
from lcrf_jax.train.posteriors import BATCH_SIZE, features_of_parts, mean_log_probs
from lcrf_jax.train.preparation import Prepared
from lcrf_jax.train.spread import over_devices

POSTERIORS = "posteriors"  # within the folder of a run
KIND = "linear network"
_OF_TAP = "weights_"
_BATCH_SIZE_OF_IMAGES = 8  # on each device
MOST_IMAGES = 4096  # that cells are taken of; beyond, every second, third, ... batch of images
MOST_CELLS = 150_000  # of all images together, unless these are so many that each has
LEAST_CELLS_OF_IMAGE = 64


def posterior_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the posteriors under the linear network and the class maps.

    Args:
      config: the configuration of a run, with "linear": its "unary_weight" is that of the linear network's log-probabilities
        beside the CRF, its "evidence_weight" that of the class maps' log-evidence.

    Returns:
      dict, as `lcrf_jax.train.posteriors.parts_without_network` takes it.
    """
    linear = config["linear"]
    weights = {"linear_weight": linear["unary_weight"], "evidence_weight": linear.get("evidence_weight", 0.0)}
    return {**config["posterior"], **weights}


def fitted_to(
    prepared: Prepared, posteriors: Callable[[], np.ndarray], *, identity: Mapping[str, Any], directory: str | os.PathLike
) -> dict[str, Any]:
    """The parameters of a linear network that has learnt from posteriors of the training images, kept on disk.

    Args:
      prepared: Prepared, of a configuration with "linear": "num_steps", "learning_rate" and "weight_decay" of
        `lcrf_jax.nets.linear.fit_linear`.
      posteriors: function without arguments to [N, g, g, K], called where the parameters are not kept yet.
      identity: dict that JSON can hold: what identifies the posteriors and the settings.
      directory: folder of the run's posteriors.

    Returns:
      The parameters of `lcrf_jax.nets.linear.linear_network`.
    """
    with cached_arrays(directory, {**identity, "kind": KIND}, 1, bounded=False) as cache:
        if not cache.first:
            made = _fitted(_with_linear(prepared), posteriors())
            cache.write(**{name: array[None] for name, array in made.items()})
    return _by_tap(cache.arrays)


def log_probs_of(
    prepared: Prepared, params: Mapping[str, Any], *, identity: Mapping[str, Any], directory: str | os.PathLike
) -> np.ndarray:
    """What a linear network says of the training images without their tags, kept on disk.

    The mean over the sizes that class maps are made at, the main size with its mirror image counting once. In a larger image
    the features of a cell know less of what is around it, so that borders come nearer to their place.

    Args:
      prepared: Prepared, of a configuration with "linear".
      params: of `fitted_to`.
      identity: dict that JSON can hold: what identifies the parameters and the sizes.
      directory: folder of the run's posteriors.

    Returns:
      [N, g, g, K] float16 mean of log-probabilities on the grid of the logits; their exponentials sum to one nearly.
    """
    network, source, grid = _with_linear(prepared).network, prepared.train, prepared.plan.grid
    fixed, sizes = (params, prepared.variables), prepared.config["class_maps"]["extra_sizes"]
    of_features, _ = over_devices(_of_features, fixed, len(source), BATCH_SIZE, network=network)
    of_images, rows = over_devices(_of_images, fixed, len(source), _BATCH_SIZE_OF_IMAGES, network=network, grid=grid)
    features, num_rows = features_of_parts(prepared)

    def at_main_size(part):
        pieces = (slice(start, min(start + num_rows, part.stop)) for start in range(part.start, part.stop, num_rows))
        found = [np.asarray(of_features(*features(piece)))[: piece.stop - piece.start] for piece in pieces]
        return np.concatenate(found)

    key = {**identity, "kind": "log-probabilities of the linear network"}
    with (
        image_progress("linear network", len(source) * (1 + len(sizes))) as done,
        cached_arrays(directory, key, len(source), bounded=False) as cache,
    ):
        if 0 < cache.first < len(source):
            done(cache.first * (1 + len(sizes)), earlier=True)
        for start in range(cache.first, len(source), ROWS_IN_MEMORY):
            part = slice(start, min(start + ROWS_IN_MEMORY, len(source)))
            of_main = at_main_size(part)
            done(len(of_main))
            cache.write(log_probs=mean_map(of_main, None, [of_squares(of_images, source, part, size, rows, done) for size in sizes]).astype(np.float16))
    return cache.arrays["log_probs"]


def log_probs_of_squares(
    network: Network, variables: Mapping[str, Any], params: Mapping[str, Any], squares: Sequence[ArrayLike]
) -> np.ndarray:
    """What `log_probs_of` makes of any images, for scoring it where there are masks.

    Args:
      network: lcrf_jax.nets.network.Network, with its own decoder.
      variables: of its backbone.
      params: of `fitted_to`.
      squares: the same images at several sizes, each [B, S, S, 3] RGB 0..255; the first one is the main size.

    Returns:
      [B, g, g, K] float32.
    """
    main, *others = map(np.asarray, squares)
    found = functools.partial(_of_images, params, variables, network=linear_network(network), grid=network.grid(main.shape[1]))
    of_main = mean_log_probs(found(main), found(main[:, :, ::-1]))
    return mean_map(np.asarray(of_main), None, [np.asarray(found(each)) for each in others])


@functools.partial(jax.jit, static_argnames="network")
def _of_features(params, variables, plain, mirrored, *, network):
    return mean_log_probs(*(network.logits(params, variables, features) for features in (plain, mirrored)))


@functools.partial(jax.jit, static_argnames=("network", "grid"))
def _of_images(params, variables, images, *, network, grid):
    logits = network.logits(params, variables, network.features(variables, images))
    return jax.nn.log_softmax(jax.image.resize(logits, (len(logits), grid, grid, logits.shape[-1]), "linear"))


def kept_in(run_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The parameters of the linear network that a run began with.

    Args:
      run_dir: folder of the run.

    Returns:
      As `fitted_to`; None where the run had none, or its posteriors are not there.
    """
    folder = pathlib.Path(run_dir) / POSTERIORS
    for entry in entries(folder) if folder.is_dir() else ():  # the newest first
        if entry.kind == KIND:
            return _by_tap({path.stem: np.load(path) for path in entry.path.glob("*.npy")})
    return None


def _by_tap(arrays):
    taps = {name.removeprefix(_OF_TAP): np.array(rows[0]) for name, rows in arrays.items() if name.startswith(_OF_TAP)}
    return {"weights": taps, "bias": np.array(arrays["bias"][0])}


def _with_linear(prepared):
    return prepared._replace(plan=prepared.plan._replace(network=linear_network(prepared.network)))


def _fitted(linear, posteriors):
    settings, seed = linear.config["linear"], linear.config["seed"]
    inputs, targets, channels = _sampled(linear, posteriors, np.random.default_rng(seed))
    options = {name: settings[name] for name in ("num_steps", "learning_rate", "weight_decay")}
    weights, bias, loss = fit_linear(inputs, targets, seed=seed, **options)
    say(f"linear network: fitted to the posteriors of {len(inputs)} cells, cross-entropy {loss:.3f}")
    ends = np.cumsum(list(channels.values()))[:-1]
    parts = zip(channels, np.split(weights, ends), strict=True)
    return {"bias": bias, **{f"{_OF_TAP}{tap}": part for tap, part in parts}}


def _sampled(linear, posteriors, chosen):
    """(features [M, C] float16, posteriors [M, K] of the same cells, channels of each tap)."""
    taps, count = linear.network.taps, len(linear.train)
    parts, rows = features_of_parts(linear)
    starts = range(0, count, rows * -(-count // MOST_IMAGES))
    num_images = sum(min(rows, count - start) for start in starts)
    num_cells = posteriors.shape[1] * posteriors.shape[2]
    per_image = min(num_cells, max(LEAST_CELLS_OF_IMAGE, MOST_CELLS // num_images))
    inputs, targets, channels = [], [], {}
    with image_progress("cells", num_images) as done:
        for start in starts:
            part = slice(start, min(start + rows, count))
            (features, _), size = parts(part), part.stop - start
            cells = np.stack([chosen.permutation(num_cells)[:per_image] for _ in range(rows)])
            taken = np.asarray(features_of_cells(features, cells[: len(features[taps[0]])], taps=taps))
            found = np.asarray(posteriors[part]).reshape(size, num_cells, -1)
            inputs.append(taken[:size].reshape(size * per_image, -1).astype(np.float16))
            targets.append(np.take_along_axis(found, cells[:size, :, None], axis=1).reshape(size * per_image, -1))
            channels = {tap: features[tap].shape[-1] for tap in taps}
            done(size)
    return np.concatenate(inputs), np.concatenate(targets), channels
