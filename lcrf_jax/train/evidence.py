"""What the rounds of a run learn from: posteriors of the training images, kept in its folder."""

import pathlib

import numpy as np

from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.runfolder.digests import params_digest
from lcrf_jax.train.linear_round import POSTERIORS, fitted_to, parts_of_later_posterior, parts_of_linear_posterior
from lcrf_jax.train.methods import begins_with_linear, begins_with_posteriors
from lcrf_jax.train.plan import Round
from lcrf_jax.train.posteriors import parts_of_posterior_evidence, parts_of_posterior_of_maps
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
        "posterior": {name: value for name, value in posterior.items() if name != "evidence_weight" or value},
        "before": list(method.round_epochs(config)[: this.number]),
        "seed": config["seed"],
    }
    linear = None
    if posterior.get("evidence_weight"):
        identity["evidence"] = config["objective"]["likelihood_options"]["evidence"]
        if begins_with_linear(config):
            identity["linear"] = config["linear"]
            linear = _linear_network(prepared, workdir)

    def parts(first):
        if done != this.first_step:
            raise ValueError(
                f"{workdir / POSTERIORS} has no posteriors that round {this.number + 1} was begun with: restore "
                "the folder and the settings of its rounds, or start again in a new one"
            )
        if linear is None:
            return parts_of_posterior_evidence(prepared, state.params, posterior, first)
        return parts_of_later_posterior(prepared, state.params, linear, posterior, first)

    return _kept_evidence(prepared, workdir, identity, parts)


def _first_evidence(prepared, workdir):
    """For a first round that learns from posteriors: those of the class maps, or of a linear network that has learnt from them."""
    if not begins_with_posteriors(prepared.config):
        return None
    if not begins_with_linear(prepared.config):
        return _evidence_of_maps(prepared, workdir)
    params = _linear_network(prepared, workdir)
    identity = _identity_of_linear(prepared)
    return _kept_evidence(prepared, workdir, identity, lambda first: parts_of_linear_posterior(prepared, params, first))


def _evidence_of_maps(prepared, workdir):
    return _kept_evidence(prepared, workdir, _identity_of_maps(prepared), lambda first: parts_of_posterior_of_maps(prepared, first))


def _linear_network(prepared, workdir):
    """The parameters of the linear network; where they are not kept, it learns from the posteriors of the class maps."""
    return fitted_to(
        prepared, lambda: _evidence_of_maps(prepared, workdir), identity=_identity_of_linear(prepared), directory=workdir / POSTERIORS
    )


def _identity_of_maps(prepared):
    config, peaks = prepared.config, params_digest({"peaks": prepared.maps.peaks})
    evidence = config["objective"]["likelihood_options"]["evidence"]
    return {"round": 0, "posterior": config["posterior"], "evidence": evidence, "maps": peaks}


def _identity_of_linear(prepared):
    return {**_identity_of_maps(prepared), "linear": prepared.config["linear"], "seed": prepared.config["seed"]}


def _kept_evidence(prepared, workdir, identity, parts):
    """Evidence of all training images, kept on disk; `parts` makes it from an image on."""
    with cached_arrays(workdir / POSTERIORS, identity, len(prepared.train), bounded=False) as cache:
        if cache.first < cache.num_records:
            for rows in parts(cache.first):
                cache.write(evidence=rows)
    return cache.arrays["evidence"]
