"""The convolutions of VGG16 as a frozen feature extractor."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.nets.trained import Layers

# Convolutions of each block: width and number; a block ends with max pooling.
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TAP_OF_BLOCK = {2: "s4", 3: "s8", 4: "s16"}


def layers() -> Layers:
    """The layers from the input on, with the taps that are complete after them.

    Returns:
      See `lcrf_jax.nets.trained`.
    """
    found: list[tuple[str, tuple[str, ...]]] = []
    for block, (_, count) in enumerate(BLOCKS):
        complete = (TAP_OF_BLOCK[block],) if block in TAP_OF_BLOCK else ()
        if block == len(BLOCKS) - 1:
            complete = (*complete, "s32", "head")
        found += [(f"conv{block + 1}_{number + 1}", complete if number == count - 1 else ()) for number in range(count)]
    return found


def preprocess(image: ArrayLike) -> jax.Array:
    """Network input from an RGB image, as the published weights want it.

    Args:
      image: [..., H, W, 3] RGB, any float or uint8 type, 0..255.

    Returns:
      [..., H, W, 3] float32, (image / 255 - MEAN) / STD for each channel.
    """
    return (jnp.asarray(image, jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


class VGG16(nn.Module):
    """The thirteen convolutions of VGG16 with taps conv3_3, conv4_3 and conv5_3.

    Attributes:
      last_stride: 32: the tap "s32" is conv5_3 after its max pooling; 16: it is conv5_3 itself; 8: the last two poolings
        have stride 1 and the last block dilation 2, so that all taps from "s8" on lie at stride 8 (large field).
      recompute: whether what lies within a block is computed again for gradients, and not kept.

    Call with [B, H, W, 3] preprocessed images (`preprocess`) of any size from 32 on; a grid that cannot be halved is
    rounded up. Returns a dict from tap to array after ReLU: "s4" is conv3_3 [B, H/4, W/4, 256], "s8" conv4_3
    [B, H/8, W/8, 512], "s16" conv5_3 [B, H/16, W/16, 512], and "s32", which is also "head", the features of the tag
    classifier.

    References:
      Simonyan and Zisserman 2015; Chen et al. 2015 (DeepLab, large field).
    """

    last_stride: int = 32
    recompute: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        if self.last_stride not in (8, 16, 32):
            raise ValueError(f"last_stride: expected 8, 16 or 32, got {self.last_stride}")
        taps: dict[str, jax.Array] = {}
        for block, (width, count) in enumerate(BLOCKS):
            dilation = 2 if block == 4 and self.last_stride == 8 else 1
            convolutions = _convolutions(block, width, count, dilation)
            x = (nn.remat(convolutions) if self.recompute else convolutions)(self, x)
            if block in TAP_OF_BLOCK:
                taps[TAP_OF_BLOCK[block]] = x
            if block < 3 or block == 3 and self.last_stride > 8:
                x = _halved(x)
            elif block == 3:  # the grid stays; three cells wide, as in the large-field network
                x = nn.max_pool(x, window_shape=(3, 3), strides=(1, 1), padding="SAME")
        taps["s32"] = taps["head"] = _halved(x) if self.last_stride == 32 else x
        return taps


def _convolutions(block, width, count, dilation):
    """A block without its pooling: function of the network, whose layers these are, and its input."""

    def convolutions(_, x):
        for number in range(count):
            name = f"conv{block + 1}_{number + 1}"
            convolution = nn.Conv(
                width, (3, 3), kernel_dilation=dilation, padding=dilation, dtype=x.dtype, name=name
            )
            x = jax.nn.relu(convolution(x))
        return x

    return convolutions


def _halved(x):
    return nn.max_pool(x, window_shape=(2, 2), strides=(2, 2), padding="SAME")
