"""EfficientNet-Lite 0 to 4 as frozen feature extractors.

Batch normalisation is folded into the convolutions when the weights are read (`lcrf_jax.nets.pretrained`), so
the network is convolutions, biases and ReLU6 alone: no running statistics, no train/eval switch, nothing that
could be updated by accident.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.nets.trained import Layers


class Stage(NamedTuple):
    """One stage of mobile inverted bottleneck blocks."""

    repeats: int
    kernel: int
    stride: int
    expand: int
    width: int


class Size(NamedTuple):
    """A published size, against Lite0.

    Attributes:
      width: factor of the channels of every stage.
      depth: factor of the blocks of every stage but the first and the last.
      resolution: side in pixels of the images that the published weights were trained on.
    """

    width: float
    depth: float
    resolution: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
SIZES = (Size(1.0, 1.0, 224), Size(1.0, 1.1, 240), Size(1.1, 1.2, 260), Size(1.2, 1.4, 280), Size(1.4, 1.8, 300))

STEM_WIDTH = 32
HEAD_WIDTH = 1280
TAP_AFTER_STAGE = {"s4": 1, "s8": 2, "s16": 4, "s32": 6}


def stages(size: int) -> tuple[Stage, ...]:
    """The stages of a size: those of Lite0, wider and deeper.

    Args:
      size: 0 to 4.

    Returns:
      Tuple of Stage. Widths are rounded to a multiple of 8 that is at most a tenth smaller, numbers of blocks upwards.
    """
    width, depth, _ = SIZES[size]
    last = len(STAGES) - 1
    return tuple(
        stage._replace(
            repeats=stage.repeats if at in (0, last) else math.ceil(depth * stage.repeats),
            width=_multiple_of_8(width * stage.width),
        )
        for at, stage in enumerate(STAGES)
    )


def _multiple_of_8(channels):
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def tap_widths(size: int = 0) -> dict[str, int]:
    """The channels of the taps but the head's.

    Args:
      size: 0 to 4.

    Returns:
      dict from tap to int.
    """
    return {tap: stages(size)[stage].width for tap, stage in TAP_AFTER_STAGE.items()}


def layers(size: int = 0) -> Layers:
    """The layers from the input on, with the taps that are complete after them.

    Args:
      size: 0 to 4.

    Returns:
      See `lcrf_jax.nets.trained`.
    """
    tap_of_stage = {stage: (tap,) for tap, stage in TAP_AFTER_STAGE.items()}
    found: list[tuple[str, tuple[str, ...]]] = [("stem", ())]
    for index, stage in enumerate(stages(size)):
        for block in range(stage.repeats):
            complete = tap_of_stage.get(index, ()) if block == stage.repeats - 1 else ()
            found.append((f"stage{index}_block{block}", complete))
    return [*found, ("head", ("head",))]


def preprocess(image: ArrayLike) -> jax.Array:
    """Network input from an RGB image.

    Args:
      image: [..., H, W, 3] RGB, any float or uint8 type, 0..255.

    Returns:
      [..., H, W, 3] float32, (image - 127) / 128.
    """
    return (jnp.asarray(image, jnp.float32) - 127.0) / 128.0


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Padding by TensorFlow's SAME rule along one axis.

    Args:
      size: number of cells.
      kernel: number of taps.
      stride: step of the output grid, in cells.
      dilation: distance of the taps, in cells.

    Returns:
      (cells before, cells after).
    """
    out = -(-size // stride)
    total = max((out - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def depthwise_conv(x: jax.Array, kernel: jax.Array, *, stride: int = 1, dilation: int = 1) -> jax.Array:
    """Depthwise convolution as shifted multiply-adds, SAME padding.

    XLA's grouped convolution is very slow on CPU; a sum of k * k shifted products fuses into one loop on
    every platform. Its derivatives are those of reverse mode (`jax.grad`, `jax.vjp`).

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C].
      stride: step of the output grid, in input cells.
      dilation: distance of the taps, in input cells.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), C], dtype of `x`.
    """
    return _depthwise(x, kernel, stride, dilation)


def _sum_over_taps(x, kernel, stride, dilation):
    pads = _pads(x, kernel, stride, dilation)
    size = tuple(-(-n // stride) for n in x.shape[1:3])
    return _shifted_products(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel, size, stride, dilation)


def _pads(x, kernel, stride, dilation):
    return [same_padding(n, len(kernel), stride, dilation) for n in x.shape[1:3]]


def _shifted_products(x, kernel, size, stride, dilation):
    """Sum over the taps of the kernel: the padded `x` from the tap on, every `stride` cells, times the tap."""
    out = 0.0
    for i in range(len(kernel)):
        for j in range(len(kernel)):
            top, left = i * dilation, j * dilation
            bottom, right = top + (size[0] - 1) * stride + 1, left + (size[1] - 1) * stride + 1
            out = out + x[:, top:bottom:stride, left:right:stride, :] * kernel[i, j]
    return out


_depthwise = jax.custom_vjp(_sum_over_taps, nondiff_argnums=(2, 3))


def _depthwise_forward(x, kernel, stride, dilation):
    return _sum_over_taps(x, kernel, stride, dilation), (x, kernel)


def _depthwise_backward(stride, dilation, saved, grads):
    """The gradients by `x` and by the kernel.

    By `x` it is the mirrored kernel over `grads`, spread `stride` cells apart. That is one loop again; the transpose of
    the slices would make as many arrays as the kernel has taps. By the kernel it is JAX's derivative of the sum.
    """
    x, kernel = saved
    reach = (len(kernel) - 1) * dilation
    spread = [(0, 0, 0)]
    for cells, results, (before, _) in zip(x.shape[1:3], grads.shape[1:3], _pads(x, kernel, stride, dilation)):
        spread.append((reach - before, cells + before - (results - 1) * stride - 1, stride - 1))
    spread_grads = jax.lax.pad(grads, jnp.zeros((), grads.dtype), [*spread, (0, 0, 0)])
    _, by_kernel = jax.vjp(lambda kernel: _sum_over_taps(x, kernel, stride, dilation), kernel)
    return _shifted_products(spread_grads, kernel[::-1, ::-1], x.shape[1:3], 1, dilation), *by_kernel(grads)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class DepthwiseConv(nn.Module):
    """Depthwise convolution with bias; see `depthwise_conv`."""

    kernel_size: int
    stride: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", in_axis=(0, 1), out_axis=())
        kernel = self.param("kernel", init, (self.kernel_size, self.kernel_size, channels))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        x = depthwise_conv(x, kernel.astype(x.dtype), stride=self.stride, dilation=self.dilation)
        return x + bias.astype(x.dtype)


class InvertedBottleneck(nn.Module):
    """Expand (1x1), depthwise (k x k), project (1x1), with a residual where the shape allows."""

    kernel_size: int
    stride: int
    expand: int
    width: int
    dilation: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs, channels = x, x.shape[-1]
        if self.expand > 1:
            x = jax.nn.relu6(nn.Conv(channels * self.expand, (1, 1), name="expand")(x))
        x = jax.nn.relu6(DepthwiseConv(self.kernel_size, self.stride, self.dilation, name="depthwise")(x))
        x = nn.Conv(self.width, (1, 1), name="project")(x)
        return x + inputs if self.stride == 1 and channels == self.width else x


class EfficientNetLite(nn.Module):
    """An EfficientNet-Lite with taps at strides 4, 8, 16 and 32, and the 1280-channel head.

    Attributes:
      size: 0 to 4.
      last_stride: 32 as published, or 16: the last two stages then keep the grid of stride 16 and use
        dilation 2, and the taps "s32" and "head" lie on that finer grid.
      recompute: whether what lies within a block is computed again for gradients, and not kept.

    Call with [B, H, W, 3] preprocessed images (`preprocess`); H and W are best multiples of 32. Returns a
    dict from tap to array: "s4": [B, H/4, W/4, C], "s8", "s16", "s32", with C as `tap_widths` says (24, 40, 112, 320 of
    Lite0), and "head": [B, H/32, W/32, 1280].

    References:
      Tan and Le 2019; the Lite variants of 2020 (no squeeze-excite, ReLU6, fixed stem and head).
    """

    size: int = 0
    last_stride: int = 32
    recompute: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        if self.last_stride not in (16, 32):
            raise ValueError(f"last_stride: expected 16 or 32, got {self.last_stride}")
        taps: dict[str, jax.Array] = {}
        pads = [same_padding(n, 3, 2) for n in x.shape[1:3]]
        x = jax.nn.relu6(nn.Conv(STEM_WIDTH, (3, 3), strides=(2, 2), padding=pads, name="stem")(x))
        bottleneck = nn.remat(InvertedBottleneck) if self.recompute else InvertedBottleneck
        for index, stage in enumerate(stages(self.size)):
            dilated = self.last_stride == 16 and index >= 5
            for block in range(stage.repeats):
                stride = stage.stride if block == 0 and not dilated else 1
                dilation = 2 if dilated and (index > 5 or block > 0) else 1
                sizes = stage.kernel, stride, stage.expand, stage.width, dilation
                x = bottleneck(*sizes, name=f"stage{index}_block{block}")(x)
            for tap, last in TAP_AFTER_STAGE.items():
                if index == last:
                    taps[tap] = x
        taps["head"] = jax.nn.relu6(nn.Conv(HEAD_WIDTH, (1, 1), name="head")(x))
        return taps
