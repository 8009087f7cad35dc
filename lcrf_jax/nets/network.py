"""The inference network: a backbone, frozen as a rule, and a trainable decoder, as plain functions.

A network is described by a dict that JSON can hold, which is stored with every checkpoint:

    {"backbone": "efficientnet_lite0", "last_stride": 16, "taps": ["head", "s16", "s8"],
     "widths": [192, 128, 96], "dropout": 0.1, "num_classes": 7}
    {"backbone": "vgg16", "last_stride": 16, "taps": ["s16", "s8", "s4"], "decoder": "original",
     "widths": [512, 512, 256, 512], "dropout": 0.0, "num_classes": 21}
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike

from lcrf_jax.nets import efficientnet_lite, resnet, vgg, vision_transformer
from lcrf_jax.nets.decoder import Decoder
from lcrf_jax.nets.original import LargeField, OriginalDecoder
from lcrf_jax.nets.trained import Layers, trained_layers, with_part
from lcrf_jax.nets.weights import load_weights, variable_shapes


class Backbone(NamedTuple):
    """A frozen feature extractor.

    Attributes:
      module: function from `last_stride` to the linen module.
      preprocess: function from images, RGB 0..255, to what the module takes.
      normalisation: the same in words.
      last_strides: what `last_stride` may be.
      size_step: sides of the input are multiples of it.
      head: (variables, features) -> [B, h, w, C], the features of the tag classifier, from the tap "s32"
        alone.
      layers: from the input on, see `lcrf_jax.nets.trained`.
      weights: the source of the weights if the user names none.
      taps: names of the taps, the deepest first.
    """

    module: Callable[..., nn.Module]
    preprocess: Callable[[ArrayLike], jax.Array]
    normalisation: str
    last_strides: tuple[int, ...]
    size_step: int
    head: Callable[[Mapping[str, Any], Mapping[str, jax.Array]], jax.Array]
    layers: Layers
    weights: str = ""
    taps: tuple[str, ...] = ("head", "s32", "s16", "s8", "s4")


class SmallBackbone(nn.Module):
    """A few convolutions with fixed random weights and the taps of the real one, for tests and trials."""

    last_stride: int = 32
    recompute: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        taps: dict[str, jax.Array] = {}
        convolution = nn.remat(nn.Conv) if self.recompute else nn.Conv
        x = nn.relu(nn.Conv(12, (3, 3), strides=(2, 2), name="stem")(x))
        for tap, width in (("s4", 16), ("s8", 24), ("s16", 32), ("s32", 48)):
            strides = (1, 1) if tap == "s32" and self.last_stride == 16 else (2, 2)
            x = taps[tap] = nn.relu(convolution(width, (3, 3), strides=strides, name=tap)(x))
        taps["head"] = nn.relu(nn.Conv(96, (1, 1), name="head")(x))
        return taps


def _pointwise_head(activation):
    """Head of a backbone whose last layer, "head", is a 1x1 convolution of the tap "s32"."""

    def head(variables, features):
        layer = variables["params"]["head"]
        return activation(features["s32"].astype(jnp.float32) @ layer["kernel"][0, 0] + layer["bias"])

    return head


COMPUTE_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_LITE_INPUT = (efficientnet_lite.preprocess, "(x - 127) / 128")


def _lite(size):
    module = functools.partial(efficientnet_lite.EfficientNetLite, size)
    return Backbone(module, *_LITE_INPUT, (16, 32), 32, _pointwise_head(jax.nn.relu6), efficientnet_lite.layers(size))


def _transformer(variant):
    return Backbone(
        functools.partial(vision_transformer.VisionTransformer, variant),
        functools.partial(vision_transformer.preprocess, variant),
        f"(x / 255 - {variant.mean}) / {variant.std}", (variant.patch,), variant.patch, _deepest,
        vision_transformer.layers(variant), taps=vision_transformer.taps_of(variant),
    )  # fmt: skip


def _deepest(variables, features):
    """Head of a backbone that has none: the deepest tap."""
    return features["s32"].astype(jnp.float32)


_SMALL_LAYERS = (("stem", ()), *((tap, (tap,)) for tap in ("s4", "s8", "s16", "s32", "head")))
_IMAGENET_INPUT = (vgg.preprocess, f"(x / 255 - {vgg.MEAN}) / {vgg.STD}")
BACKBONES = {
    **{f"efficientnet_lite{size}": _lite(size) for size in range(len(efficientnet_lite.SIZES))},
    "small": Backbone(
        SmallBackbone, *_LITE_INPUT, (16, 32), 32, _pointwise_head(jax.nn.relu), _SMALL_LAYERS, weights="random"
    ),
    "vgg16": Backbone(vgg.VGG16, *_IMAGENET_INPUT, (8, 16, 32), 1, _deepest, vgg.layers()),
    "resnet50": Backbone(resnet.ResNet50, *_IMAGENET_INPUT, (8, 16, 32), 1, _deepest, resnet.layers()),
    **{name: _transformer(variant) for name, variant in vision_transformer.VARIANTS.items()},
}


class _DecoderKind(NamedTuple):
    """A decoder, and how many taps and widths it takes."""

    module: Callable[..., nn.Module]
    least_taps: int
    most_taps: float
    num_widths: Callable[[int], int]


DECODERS = {
    "skip": _DecoderKind(Decoder, 1, math.inf, lambda taps: taps),
    "original": _DecoderKind(OriginalDecoder, 2, math.inf, lambda taps: 2 * (taps - 1)),
    "large_field": _DecoderKind(LargeField, 1, 1, lambda taps: 2),
}


class Network(NamedTuple):
    """The inference network as pure functions.

    Two networks of one description are equal and have one hash. So a program that takes the network as a static
    argument, and the weights as arrays, is compiled once for both.

    Attributes:
      description: the dict it was built from.
      taps: names of the features that everything else is computed from, which a cache has to keep; always with "s32".
      features: (backbone variables, images [B, H, W, 3] RGB 0..255) -> dict from tap to [B, h, w, C] float32.
      head: (backbone variables, features) -> [B, h, w, C] features of the tag classifier.
      init: (key, backbone variables, features) -> decoder parameters.
      logits: (decoder parameters, backbone variables, features, dropout key or None) -> [B, h, w, K]
        float32 on the grid of the finest tap.
      stride: pixels of the input per cell of the logits; the last cell of a row may have fewer.
      size_step: sides of the input are multiples of it.
      trained: names of the layers of the backbone that are trained, whose weights `init` puts beside the decoder's; those
        who train or use them take `lcrf_jax.nets.trained.merged` for the backbone variables.
    """

    description: Mapping[str, Any]
    taps: tuple[str, ...]
    features: Callable[[Mapping[str, Any], jax.Array | np.ndarray], dict[str, jax.Array]]
    head: Callable[[Mapping[str, Any], Mapping[str, jax.Array]], jax.Array]
    init: Callable[[jax.Array, Mapping[str, Any], Mapping[str, jax.Array]], dict[str, Any]]
    logits: Callable[..., jax.Array]
    stride: int
    size_step: int
    trained: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self):
        return json.dumps(self.description, sort_keys=True)

    def grid(self, size: int) -> int:
        """Number of cells along a side of the logits, for an input of `size` pixels along that side."""
        return -(-size // self.stride)


def _backbone(description):
    name = description["backbone"]
    if name not in BACKBONES:
        raise ValueError(f"network.backbone: expected one of {sorted(BACKBONES)}, got {name!r}")
    return BACKBONES[name]


def _check_description(description):
    wanted = {"backbone", "last_stride", "taps", "widths", "dropout", "num_classes"}
    if set(description) - {"compute_dtype", "decoder", "trainable_from", "recompute"} != wanted:
        raise ValueError(f"network: expected the entries {sorted(wanted)}, got {sorted(description)}")
    dtype, name = description.get("compute_dtype", "float32"), description.get("decoder", "skip")
    if dtype not in COMPUTE_DTYPES:
        raise ValueError(f"network.compute_dtype: expected one of {sorted(COMPUTE_DTYPES)}, got {dtype!r}")
    if name not in DECODERS:
        raise ValueError(f"network.decoder: expected one of {sorted(DECODERS)}, got {name!r}")
    taps, widths = tuple(description["taps"]), tuple(description["widths"])
    there = _backbone(description).taps
    if not taps or [tap for tap in there if tap in taps] != list(taps):
        raise ValueError(f"network.taps: expected some of {there}, in this order, got {taps}")
    decoder = DECODERS[name]
    if not decoder.least_taps <= len(taps) <= decoder.most_taps:
        number = {1: "one tap", 2: "two taps or more"}[decoder.least_taps]
        raise ValueError(f"network.taps: expected {number} for the decoder {name!r}, got {taps}")
    if len(widths) != decoder.num_widths(len(taps)):
        number = f"{decoder.num_widths(len(taps))} for the decoder {name!r} and"
        raise ValueError(
            f"network.widths: expected {'one for each of' if name == 'skip' else number} the taps {taps}, got {widths}"
        )
    if not all(isinstance(width, int) and not isinstance(width, bool) and width >= 1 for width in widths):
        raise ValueError(f"network.widths: expected whole numbers of at least 1, got {widths}")
    last_stride, dropout = description["last_stride"], description["dropout"]
    last_strides = _backbone(description).last_strides
    if last_stride not in last_strides:
        expected = " or ".join(filter(None, [", ".join(map(str, last_strides[:-1])), str(last_strides[-1])]))
        raise ValueError(f"network.last_stride: expected {expected}, got {last_stride}")
    if not 0 <= dropout < 1:
        raise ValueError(f"network.dropout: expected a share of at least 0 and below 1, got {dropout}")
    num_classes = description["num_classes"]
    if num_classes < 2:
        raise ValueError(f"network.num_classes: expected the background and another class, got {num_classes}")


def build_network(description: Mapping[str, Any]) -> Network:
    """The network of a description.

    Args:
      description: dict with "backbone" (a key of `BACKBONES`), "last_stride" (32, or 16 for a dilated last
        stage; see the backbone), "taps" from coarse to fine, some of those of the backbone ("head", "s32", "s16", "s8", "s4";
        of a vision transformer "head", "s32", "block11" and so on), "widths" (one for each tap, or as its decoder says), "dropout" and "num_classes"; and "decoder", a key of `DECODERS`, "skip" if
        left out, and "compute_dtype", the type of the products within convolutions, "float32" (if left out) or
        "bfloat16", and "trainable_from", see `lcrf_jax.nets.trained.trained_layers`, "" if left out, and "recompute", whether
        gradients of these layers keep the results of blocks alone, False if left out. Parameters, normalisation, features and logits are float32 in any case.

    Returns:
      Network.

    Raises:
      ValueError: if an entry is missing, unknown or out of range, or taps are not from coarse to fine.
    """
    _check_description(description)
    backbone, taps = _backbone(description), tuple(description["taps"])
    module = backbone.module(last_stride=description["last_stride"], recompute=description.get("recompute", False))
    dtype = COMPUTE_DTYPES[description.get("compute_dtype", "float32")]
    widths, dropout = tuple(description["widths"]), description["dropout"]
    decoder = DECODERS[description.get("decoder", "skip")].module(
        description["num_classes"], taps, widths, dropout, dtype
    )
    trained = trained_layers(backbone.layers, description.get("trainable_from", ""), taps)
    # The head has four times the channels of s32 and is cheap to compute from it.
    kept = tuple(tap for tap in backbone.taps[1:] if tap in taps or tap == "s32")

    def features(variables, images):
        cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables)
        taken = module.apply(cast, backbone.preprocess(images).astype(dtype))
        return {tap: taken[tap].astype(jnp.float32) for tap in kept}

    def inputs(variables, features):
        return {tap: backbone.head(variables, features) if tap == "head" else features[tap] for tap in taps}

    def init(key, variables, features):
        return with_part(decoder.init(key, inputs(variables, features))["params"], variables, trained)

    def logits(params, variables, features, key=None):
        rngs = None if key is None else {"dropout": key}
        taken = inputs(variables, features)
        return decoder.apply({"params": params}, taken, train=key is not None, rngs=rngs)

    finest = taps[-1][1:]  # the digits of "s8"; "head" and the blocks of a transformer lie on the last grid
    stride = min(int(finest) if finest.isdigit() else 32, description["last_stride"])
    return Network(dict(description), kept, features, backbone.head, init, logits, stride, backbone.size_step, trained)


def feature_identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """What the backbone's features depend on, beside its weights and the images.

    Args:
      description: see `build_network`.

    Returns:
      dict that JSON can hold.
    """
    identity = {key: description[key] for key in ("backbone", "last_stride")}
    dtype = description.get("compute_dtype", "float32")
    return identity if dtype == "float32" else {**identity, "compute_dtype": dtype}


def preprocessing(description: Mapping[str, Any]) -> str:
    """What happens to a photograph before the network sees it, in words.

    Args:
      description: see `build_network`.

    Returns:
      str.
    """
    return f"RGB in 0..255, resized to a square (bicubic), {_backbone(description).normalisation}"


def backbone_variables(description: Mapping[str, Any], weights: str = "") -> tuple[dict[str, Any], str]:
    """Frozen weights of the description's backbone, with the hash by which caches and checkpoints know them.

    Args:
      description: see `build_network`.
      weights: where they come from, see `lcrf_jax.nets.weights`; "" is the backbone's own source.

    Returns:
      (variables, sha256 as a hex string).

    Raises:
      ValueError: if the backbone is unknown, has no such source, or the source does not hold its weights.
      FileNotFoundError: if the file, the repository or the package is not there.
    """
    backbone = _backbone(description)
    module = backbone.module(last_stride=description["last_stride"])
    variables, digest = load_weights(description["backbone"], module, weights or backbone.weights)
    return jax.device_put(variables), digest


def unfit_parameters(description: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    """Which parameters are not those that a network has.

    Args:
      description: see `build_network`.
      params: dict with "backbone" variables, and "decoder" parameters where there are some.

    Returns:
      A line for each array that is missing or has another shape; none if all fit.
    """
    network, backbone = build_network(description), _backbone(description)
    variables = variable_shapes(backbone.module(last_stride=description["last_stride"]))
    side = 4 * backbone.size_step
    expected: dict[str, Any] = {"backbone": variables}
    if "decoder" in params:
        taps = jax.eval_shape(network.features, variables, jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32))
        expected["decoder"] = jax.eval_shape(network.init, jax.random.key(0), variables, taps)
    found = flatten_dict({name: params[name] for name in expected}, sep="/")
    lines = []
    for name, leaf in flatten_dict(expected, sep="/").items():
        shape = np.shape(found[name]) if name in found else None
        if shape != leaf.shape:
            got = "is missing" if shape is None else f"has the shape {list(shape)}"
            lines.append(f"{name} {got}, expected {list(leaf.shape)}")
    return lines
