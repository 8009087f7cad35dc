"""A small segmenter with weights that are drawn, and pictures for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference

from lcrf_jax.nets.network import backbone_variables, build_network
from lcrf_jax.predict.segmenter import make_segmenter

NUM_CLASSES = 4
NETWORK = {"backbone": "small", "last_stride": 16, "taps": ["head", "s16"], "widths": [12, 8], "dropout": 0.2,
           "num_classes": NUM_CLASSES}
KERNEL = {"bilateral_weight": 4.0, "bilateral_position_width": 30.0, "bilateral_colour_width": 13.0,
          "gaussian_weight": 2.0, "gaussian_position_width": 2.0}
SETTINGS = {"input_sizes": [64], "mirror": False, "kernel": KERNEL, "num_iterations": 3, "unary_weight": 0.7}


@functools.cache
def parameters():
    """A backbone and a decoder drawn so that its logits differ from cell to cell."""
    network, variables = build_network(NETWORK), backbone_variables(NETWORK)[0]
    shapes = jax.eval_shape(network.features, variables, jnp.zeros((1, 64, 64, 3)))
    shapes = jax.eval_shape(network.init, jax.random.key(0), variables, shapes)
    rng = np.random.default_rng(0)
    decoder = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.5).astype(np.float32), shapes)
    return {"backbone": variables, "decoder": decoder}


@functools.cache
def segmenter(input_sizes=(64,), mirror=False):
    settings = {**SETTINGS, "input_sizes": list(input_sizes), "mirror": mirror}
    description = {"network": NETWORK, "class_names": ["background", "a", "b", "c"], "inference": settings}
    return make_segmenter(description, parameters())


def picture(seed, height, width):
    return reference.smooth_image(seed, height, width).astype(np.uint8)
