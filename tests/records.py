"""Records as training has them, small ones, and the configuration of the objective that their tests start from."""

import functools

import jax
import numpy as np
import reference

from lcrf_jax.bound.record import Record
from lcrf_jax.nets.inputs import network_inputs
from lcrf_jax.nets.network import backbone_variables, build_network

SIZE, GRID, NUM_CLASSES, BATCH = 64, 4, 4, 8
STRIDE = SIZE // GRID
NETWORK = {"backbone": "small", "last_stride": 16, "taps": ["head", "s16"], "widths": [12, 8],
           "dropout": 0.3, "num_classes": NUM_CLASSES}
KERNEL = {"bilateral_weight": 0.7, "bilateral_position_width": 80.0, "bilateral_colour_width": 13.0,
          "gaussian_weight": 0.3, "gaussian_position_width": 24.0}
EVIDENCE = {"background_level": 0.3, "sharpness": 2.0, "floor": 0.01}
CONFIG = {"likelihood": "evidence", "likelihood_options": {"evidence": EVIDENCE}, "further_likelihoods": {},
          "cue_confidence": 0.0,
          "estimator": "gumbel_softmax", "temperature": 0.8, "final_temperature": 0.0, "anneal_epochs": 4.0,
          "num_samples": 2, "noise_block": 1,
          "num_sweeps": 2, "likelihood_weight": 1.7, "entropy_weight": 0.9,
          "pairwise_weight": 0.6, "pairwise_warmup_epochs": 2.0,
          "pairwise_stride": 0, "pairwise_form": "", "kernel": KERNEL}


def config_with(**changes):
    return {**CONFIG, **changes}


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
    return Record(
        tags=tags,
        image=np.stack([reference.smooth_image(i, SIZE, SIZE) for i in range(BATCH)]).astype(np.uint8),
        class_maps=maps,
        peaks=maps.max(axis=(1, 2)) + 0.1,
        bias=np.tile(np.float32([-0.5, 0.2, -1.0]), (BATCH, 1)),
        mask=rng.integers(0, NUM_CLASSES, (BATCH, SIZE, SIZE)).astype(np.uint8),
        index=np.arange(BATCH, dtype=np.int32),
    )


@functools.cache
def feature_batch():
    """The same with float16 taps and a uint8 guide in place of the images, as the cache gives them."""
    network, variables = network_and_variables()
    features, guide = jax.jit(functools.partial(network_inputs, network, variables))(image_batch().image)
    features = {tap: np.asarray(x, np.float16) for tap, x in features.items()}
    return image_batch()._replace(image=None, features=features, guide=np.round(np.asarray(guide)).astype(np.uint8))


def record(index):
    return jax.tree.map(lambda value: value[index], feature_batch())
