"""What the rounds of a run learn from: posteriors of the training images, kept in its folder."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.runfolder.digests import params_digest
from lcrf_jax.train.linear_round import POSTERIORS, fitted_to, log_probs_of, posterior_settings
from lcrf_jax.train.methods import begins_with_linear, begins_with_posteriors
from lcrf_jax.train.plan import Round
from lcrf_jax.train.posteriors import parts_of_posterior_evidence, parts_of_posterior_of_maps, parts_without_network
from lcrf_jax.train.preparation import Prepared
from lcrf_jax.train.step import TrainState


def evidence_of(prepared: Prepared, workdir: pathlib.Path, this: Round, state: TrainState, done: int) -> np.ndarray | None:
    """The evidence of a round, if it is not made of the class maps in each step; kept on disk.

    That of a round after the first is from the state that the one before ended with.

    Args:
      prepared: Prepared.
      workdir: folder of the run.
      this: the round.
      state: the newest.
      done: its number of steps.

    Returns:
      [N, g, g, K] float16, memory-mapped, or None.

    Raises:
      ValueError: if a round was begun and its posteriors are not there any more.
    """
    if this.number == 0:
        return _first_evidence(prepared, workdir)

    config, method = prepared.config, prepared.plan.method
    posterior = method.posterior(config)
    identity = {
        "round": this.number,
        "posterior": {name: value for name, value in posterior.items() if value or not name.endswith("_weight")},
        "before": list(method.round_epochs(config)[: this.number]),
        "seed": config["seed"],
    }
    if "class_offsets" in prepared.plan.inference:
        identity["class_offsets"] = prepared.plan.inference["class_offsets"]
    linear: np.ndarray | None = None
    settings: Mapping[str, Any] = {**posterior, "linear_weight": 0.0}
    if posterior.get("evidence_weight"):
        identity["evidence"] = config["objective"]["likelihood_options"]["evidence"]
    if posterior.get("linear_weight") and begins_with_linear(config):
        identity |= _of_linear(config)
        linear, settings = _word_of_linear(prepared, workdir), posterior

    def parts(first):
        if done != this.first_step:
            raise ValueError(
                f"{workdir / POSTERIORS} has no posteriors that round {this.number + 1} was begun with: restore "
                "the folder and the settings of its rounds, or start again in a new one"
            )
        return parts_of_posterior_evidence(prepared, state.params, settings, first, linear)

    return _kept_evidence(prepared, workdir, identity, parts)


def _first_evidence(prepared, workdir):
    """For a first round that learns from posteriors: those of the class maps, or of a linear network that has learnt from them."""
    if not begins_with_posteriors(prepared.config):
        return None
    if not begins_with_linear(prepared.config):
        return _evidence_of_maps(prepared, workdir)
    linear, settings = _word_of_linear(prepared, workdir), posterior_settings(prepared.config)
    identity = _identity_of_linear(prepared)
    return _kept_evidence(prepared, workdir, identity, lambda first: parts_without_network(prepared, settings, linear, first))


def _evidence_of_maps(prepared, workdir):
    return _kept_evidence(prepared, workdir, _identity_of_maps(prepared), lambda first: parts_of_posterior_of_maps(prepared, first))


def _word_of_linear(prepared, workdir):
    """What the linear network says of the images; where it is not kept, it learns from the posteriors of the class maps."""
    kept = {"identity": _identity_of_linear(prepared), "directory": workdir / POSTERIORS}
    return log_probs_of(prepared, fitted_to(prepared, lambda: _evidence_of_maps(prepared, workdir), **kept), **kept)


def _identity_of_maps(prepared):
    config, peaks = prepared.config, params_digest({"peaks": prepared.maps.peaks})
    evidence = config["objective"]["likelihood_options"]["evidence"]
    return {"round": 0, "posterior": config["posterior"], "evidence": evidence, "maps": peaks}


def _identity_of_linear(prepared):
    return {**_identity_of_maps(prepared), **_of_linear(prepared.config), "seed": prepared.config["seed"]}


def _of_linear(config):
    return {"linear": config["linear"], "sizes": list(config["class_maps"]["extra_sizes"])}


def _kept_evidence(prepared, workdir, identity, parts):
    """Evidence of all training images, kept on disk; `parts` makes it from an image on."""
    with cached_arrays(workdir / POSTERIORS, identity, len(prepared.train), bounded=False) as cache:
        if cache.first < cache.num_records:
            for rows in parts(cache.first):
                cache.write(evidence=rows)
    return cache.arrays["evidence"]
