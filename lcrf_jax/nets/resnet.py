"""ResNet-50 as a frozen feature extractor, with batch norm folded into the convolutions."""

import flax.linen as nn
import jax

from lcrf_jax.nets.trained import Layers

# Blocks of each stage, and the channels within them; four times as many come out.
STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
TAPS = ("s4", "s8", "s16", "s32")


def layers() -> Layers:
    """The layers from the input on, with the taps that are complete after them.

    Returns:
      See `lcrf_jax.nets.trained`.
    """
    found: list[tuple[str, tuple[str, ...]]] = [("stem", ())]
    for stage, ((count, _), tap) in enumerate(zip(STAGES, TAPS, strict=True)):
        complete = (tap, "head") if tap == TAPS[-1] else (tap,)
        found += [(f"stage{stage}_block{block}", complete if block == count - 1 else ()) for block in range(count)]
    return found


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3 and 1x1 with a residual, which is projected where the shape changes.

    Attributes:
      width: channels within; four times as many come out.
      stride: of the 3x3 convolution.
      dilation: of the same.

    Call with [B, H, W, C].
    """

    width: int
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, channels, strides = x, 4 * self.width, (self.stride, self.stride)
        x = jax.nn.relu(nn.Conv(self.width, (1, 1), name="conv1")(x))
        middle = nn.Conv(self.width, (3, 3), strides, self.dilation, kernel_dilation=self.dilation, name="conv2")
        x = nn.Conv(channels, (1, 1), name="conv3")(jax.nn.relu(middle(x)))
        if self.stride > 1 or inputs.shape[-1] != channels:
            inputs = nn.Conv(channels, (1, 1), strides, name="shortcut")(inputs)
        return jax.nn.relu(x + inputs)


class ResNet50(nn.Module):
    """The convolutions of ResNet-50 (version 1.5: the stride is in the 3x3 convolution) with the output of each stage.

    Attributes:
      last_stride: 32 as published; 16 or 8: the last stage, or the last two, keep the grid of stride 16 or 8. Their
        convolutions are dilated instead, from the second block of a stage on by the stride that is left out, as in
        torchvision and timm.
      recompute: whether what lies within a block is computed again for gradients, and not kept.

    Call with [B, H, W, 3] preprocessed images (`lcrf_jax.nets.vgg.preprocess`) of any size; a grid that cannot be halved is
    rounded up. Returns a dict from tap to array after ReLU: "s4" [B, H/4, W/4, 256], "s8" 512 channels, "s16" 1024, "s32"
    2048, which is also "head", the features of the tag classifier.

    References:
      He et al. 2016; Chen et al. 2017 (dilated stages).
    """

    last_stride: int = 32
    recompute: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        if self.last_stride not in (8, 16, 32):
            raise ValueError(f"last_stride: expected 8, 16 or 32, got {self.last_stride}")
        taps: dict[str, jax.Array] = {}
        x = jax.nn.relu(nn.Conv(64, (7, 7), (2, 2), 3, name="stem")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        reached, dilation = 4, 1
        bottleneck = nn.remat(Bottleneck) if self.recompute else Bottleneck
        for stage, ((count, width), tap) in enumerate(zip(STAGES, TAPS, strict=True)):
            stride, before = 1 if stage == 0 else 2, dilation
            if reached * stride > self.last_stride:
                stride, dilation = 1, dilation * stride
            reached *= stride
            for block in range(count):
                sizes = (stride, before) if block == 0 else (1, dilation)
                x = bottleneck(width, *sizes, name=f"stage{stage}_block{block}")(x)
            taps[tap] = x
        taps["head"] = taps["s32"]
        return taps
