"""Objectives of the records of records.py, and the evidence that their class maps stand for."""

import numpy as np
import reference
from records import EVIDENCE, GRID, NUM_CLASSES, STRIDE, config_with

from lcrf_jax.bound import objective

OPTIONS = {
    "area": {"beta": 15.0, "foreground_share": 0.2, "background_share": 0.4},
    "evidence": EVIDENCE,
    "frozen_classifier": {"scale": 1.5},
    "gwrp": {"foreground_decay": 0.99, "background_decay": 0.999},
    "log_mean_exp": {"sharpness": 4.0},
    "max_pool": {},
    "noisy_or": {"rho": 0.2},
}


def with_likelihood(name, **changes):
    return config_with(likelihood=name, likelihood_options={name: OPTIONS[name]}, **changes)


def random_logits(seed, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, (GRID, GRID, NUM_CLASSES)).astype(np.float32)


def objective_from(config):
    return objective.latent_crf_objective(config, stride=STRIDE, steps_per_epoch=10)


def evidence_of(given):
    maps = given.class_maps.reshape(-1, given.class_maps.shape[-1])
    return reference.class_evidence(maps, given.peaks, given.tags, **EVIDENCE)


FURTHER = {"area": 2.0, "gwrp": 0.5, "noisy_or": 0.0}


def product_config(name="evidence", **changes):
    """The likelihood times an area likelihood squared and the root of a gwrp."""
    return config_with(likelihood=name, likelihood_options=OPTIONS, further_likelihoods=FURTHER, **changes)
