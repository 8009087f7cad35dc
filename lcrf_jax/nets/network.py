"""The inference network: a frozen backbone and a trainable decoder, as plain functions.

A network is described by a dict that JSON can hold, which is stored with every checkpoint:

    {"backbone": "efficientnet_lite0", "last_stride": 16, "taps": ["head", "s16", "s8"],
     "widths": [192, 128, 96], "dropout": 0.1, "num_classes": 7}
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lcrf_jax.nets.decoder import Decoder
from lcrf_jax.nets.efficientnet_lite import EfficientNetLite0, preprocess
from lcrf_jax.nets.pretrained import load_lite0


class Backbone(NamedTuple):
    """A frozen feature extractor.

    Attributes:
      module: function from `last_stride` to the linen module.
      variables: function without arguments to (variables, sha256 of the weights).
      head: (variables, features) -> [B, h, w, C], the features of the tag classifier, from the tap "s32"
        alone.
    """

    module: Callable
    variables: Callable
    head: Callable


class SmallBackbone(nn.Module):
    """A few convolutions with fixed random weights and the taps of the real one, for tests and trials."""

    last_stride: int = 32

    @nn.compact
    def __call__(self, x):
        taps = {}
        x = nn.relu(nn.Conv(12, (3, 3), strides=(2, 2), name="stem")(x))
        for tap, width in (("s4", 16), ("s8", 24), ("s16", 32), ("s32", 48)):
            strides = (1, 1) if tap == "s32" and self.last_stride == 16 else (2, 2)
            x = taps[tap] = nn.relu(nn.Conv(width, (3, 3), strides=strides, name=tap)(x))
        taps["head"] = nn.relu(nn.Conv(96, (1, 1), name="head")(x))
        return taps


def _small_variables():
    initialised = jax.jit(SmallBackbone().init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = jax.tree.map(np.asarray, initialised)
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(variables, sep="/").items()):
        digest.update(name.encode() + array.tobytes())
    return variables, digest.hexdigest()


def _pointwise_head(activation):
    """Head of a backbone whose last layer, "head", is a 1x1 convolution of the tap "s32"."""

    def head(variables, features):
        layer = variables["params"]["head"]
        return activation(features["s32"].astype(jnp.float32) @ layer["kernel"][0, 0] + layer["bias"])

    return head


COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
TAPS = ("head", "s32", "s16", "s8", "s4")
BACKBONES = {
    "efficientnet_lite0": Backbone(EfficientNetLite0, load_lite0, _pointwise_head(jax.nn.relu6)),
    "small": Backbone(SmallBackbone, _small_variables, _pointwise_head(jax.nn.relu)),
}


class Network(NamedTuple):
    """The inference network as pure functions.

    Attributes:
      description: the dict it was built from.
      taps: names of the features that all is computed from: what a cache has to keep. "s32" is always there.
      features: (backbone variables, images [B, H, W, 3] RGB 0..255) -> dict from tap to [B, h, w, C] float32.
      head: (backbone variables, features) -> [B, h, w, C] features of the tag classifier.
      init: (key, backbone variables, features) -> decoder parameters.
      logits: (decoder parameters, backbone variables, features, dropout key or None) -> [B, h, w, K]
        float32 on the grid of the finest tap.
      stride: pixels of the input per cell of the logits.
    """

    description: Mapping
    taps: tuple
    features: Callable
    head: Callable
    init: Callable
    logits: Callable
    stride: int


def _backbone(description):
    name = description["backbone"]
    if name not in BACKBONES:
        raise ValueError(f"network.backbone: expected one of {sorted(BACKBONES)}, got {name!r}")
    return BACKBONES[name]


def _check_description(description):
    wanted = {"backbone", "last_stride", "taps", "widths", "dropout", "num_classes"}
    if set(description) - {"compute_dtype"} != wanted:
        raise ValueError(f"network: expected the entries {sorted(wanted)}, got {sorted(description)}")
    dtype = description.get("compute_dtype", "float32")
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"network.compute_dtype: expected one of {sorted(COMPUTE_DTYPES)}, got {dtype!r}")
    taps, widths = tuple(description["taps"]), tuple(description["widths"])
    if not taps or [tap for tap in TAPS if tap in taps] != list(taps):
        raise ValueError(f"network.taps: expected some of {TAPS}, in this order, got {taps}")
    if len(widths) != len(taps):
        raise ValueError(f"network.widths: expected one for each of the taps {taps}, got {widths}")
    last_stride, dropout = description["last_stride"], description["dropout"]
    if last_stride not in (16, 32):
        raise ValueError(f"network.last_stride: expected 16 or 32, got {last_stride}")
    if not 0 <= dropout < 1:
        raise ValueError(f"network.dropout: expected a share of at least 0 and below 1, got {dropout}")
    num_classes = description["num_classes"]
    if num_classes < 2:
        raise ValueError(f"network.num_classes: expected the background and another class, got {num_classes}")


def build_network(description):
    """The network of a description.

    Args:
      description: dict with "backbone" (a key of `BACKBONES`), "last_stride" (32, or 16 for a dilated last
        stage), "taps" from coarse to fine, some of "head", "s32", "s16", "s8", "s4", "widths" (one for each
        tap), "dropout" and "num_classes"; and "compute_dtype", the type of the products within convolutions, "float32"
        (if left out) or "bfloat16". Parameters, normalisation, features and logits are float32 in any case.

    Returns:
      Network.

    Raises:
      ValueError: if an entry is missing, unknown or out of range, or taps are not from coarse to fine.
    """
    _check_description(description)
    backbone, taps = _backbone(description), tuple(description["taps"])
    module = backbone.module(last_stride=description["last_stride"])
    dtype = COMPUTE_DTYPES[description.get("compute_dtype", "float32")]
    widths, dropout = tuple(description["widths"]), description["dropout"]
    decoder = Decoder(description["num_classes"], taps, widths, dropout, dtype)
    # The head has four times the channels of s32 and is cheap to compute from it.
    kept = tuple(tap for tap in TAPS[1:] if tap in taps or tap == "s32")

    def features(variables, images):
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
        taken = module.apply(cast, preprocess(images).astype(dtype))
        return {tap: taken[tap].astype(jnp.float32) for tap in kept}

    def inputs(variables, features):
        return {tap: backbone.head(variables, features) if tap == "head" else features[tap] for tap in taps}

    def init(key, variables, features):
        return decoder.init(key, inputs(variables, features))["params"]

    def logits(params, variables, features, key=None):
        rngs = None if key is None else {"dropout": key}
        taken = inputs(variables, features)
        return decoder.apply({"params": params}, taken, train=key is not None, rngs=rngs)

    finest = 32 if taps[-1] == "head" else int(taps[-1][1:])
    stride = min(finest, description["last_stride"])
    return Network(dict(description), kept, features, backbone.head, init, logits, stride)


def feature_identity(description):
    """What the backbone's features depend on, beside its weights and the images.

    Args:
      description: see `build_network`.

    Returns:
      dict that JSON can hold.
    """
    identity = {key: description[key] for key in ("backbone", "last_stride")}
    dtype = description.get("compute_dtype", "float32")
    return identity if dtype == "float32" else {**identity, "compute_dtype": dtype}


def backbone_variables(description):
    """Frozen weights of the description's backbone, with the hash by which caches and checkpoints know them.

    Args:
      description: see `build_network`.

    Returns:
      (variables, sha256 as a hex string).

    Raises:
      ValueError: if the backbone is unknown, or its weights are not the published ones.
      FileNotFoundError: if the package with the published weights is not installed.
    """
    return _backbone(description).variables()
