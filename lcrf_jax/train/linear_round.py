"""A round before the first, whose network is linear: it learns from the posteriors of the class maps, and makes better ones."""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.machine.entries import entries
from lcrf_jax.machine.progress import image_progress, say
from lcrf_jax.nets.linear import beside_linear, features_of_cells, fit_linear, linear_network
from lcrf_jax.train.posteriors import features_of_parts, parts_of_posterior_evidence
from lcrf_jax.train.preparation import Prepared

POSTERIORS = "posteriors"  # within the folder of a run
KIND = "linear network"
_OF_TAP = "weights_"
MOST_IMAGES = 4096  # that cells are taken of; beyond, every second, third, ... batch of images
MOST_CELLS = 150_000  # of all images together, unless these are so many that each has
LEAST_CELLS_OF_IMAGE = 64


def parts_of_linear_posterior(prepared: Prepared, params: Mapping[str, Any], first: int = 0) -> Iterator[np.ndarray]:
    """Mean-field posteriors of the training images under a linear network, given their tags.

    Args:
      prepared: Prepared, of a configuration with "linear"; its "unary_weight" is that of the network's log-probabilities beside
        the CRF.
      params: of `fitted_to`.
      first: image to begin with.

    Returns:
      Iterator over arrays [n, g, g, K] float16, >= 0, summing to one over the classes.
    """
    return parts_of_posterior_evidence(_with_linear(prepared), params, posterior_settings(prepared.config), first)


def parts_of_later_posterior(
    prepared: Prepared, params: Mapping[str, Any], linear: Mapping[str, Any], settings: Mapping[str, Any], first: int = 0
) -> Iterator[np.ndarray]:
    """Mean-field posteriors of the training images under a trained network and the linear one beside it, given their tags.

    Args:
      prepared: Prepared.
      params: decoder parameters.
      linear: parameters of the linear network, see `fitted_to`.
      settings: as for `parts_of_posterior_evidence`; "evidence_weight" is that of the linear network's log-probabilities, in
        the place of the class maps' evidence.
      first: image to begin with.

    Returns:
      As `parts_of_linear_posterior`.
    """
    network = beside_linear(prepared.network, weight=settings["unary_weight"], linear_weight=settings["evidence_weight"])
    both = prepared._replace(plan=prepared.plan._replace(network=network))
    settings = {**settings, "unary_weight": 1.0, "evidence_weight": 0.0}
    return parts_of_posterior_evidence(both, {**params, "linear": linear}, settings, first)


def posterior_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the posteriors under the linear network.

    Args:
      config: the configuration of a run.

    Returns:
      dict, as `parts_of_posterior_evidence` takes it.
    """
    return {**config["posterior"], "unary_weight": config["linear"]["unary_weight"], "evidence_weight": 0.0}


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
            features, size = parts(part), part.stop - start
            cells = np.stack([chosen.permutation(num_cells)[:per_image] for _ in range(rows)])
            taken = np.asarray(features_of_cells(features, cells[: len(features[taps[0]])], taps=taps))
            found = np.asarray(posteriors[part]).reshape(size, num_cells, -1)
            inputs.append(taken[:size].reshape(size * per_image, -1).astype(np.float16))
            targets.append(np.take_along_axis(found, cells[:size, :, None], axis=1).reshape(size * per_image, -1))
            channels = {tap: features[tap].shape[-1] for tap in taps}
            done(size)
    return np.concatenate(inputs), np.concatenate(targets), channels
