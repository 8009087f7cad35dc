"""Decoders of published networks on VGG16: that of the latent CRF, and the large field of DeepLab."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

_HE = nn.initializers.he_normal()


class TransposedConv(nn.Module):
    """Transposed 3x3 convolution of stride 2, with SAME padding, as one matrix product and a sum of its parts.

    Every cell adds K_ij x to the nine cells around twice its position: an even row of the result has two such terms, an
    odd one has one. XLA's own form of it multiplies by the zeros between the cells, and is slow on CPU.

    Attributes:
      width: channels of the result.
      dtype: type of the products.

    Call with [B, h, w, C]; returns [B, 2h, 2w, width], as `flax.linen.ConvTranspose` with the same parameters does.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", _HE, (3, 3, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        parts = jnp.einsum("bhwc,ijcd->ijbhwd", x.astype(self.dtype), kernel.astype(self.dtype))
        rows = jnp.stack([parts[2] + _from_before(parts[0], 2), parts[1]], axis=3)  # [j, B, h, 2, w, D]
        cells = jnp.stack([rows[2] + _from_before(rows[0], 3), rows[1]], axis=4)  # [B, h, 2, w, 2, D]
        return rearrange(cells, "b h i w j d -> b (h i) (w j) d") + bias.astype(self.dtype)


def _from_before(x, axis):
    """Each entry along an axis from the one before it; the first is 0."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (1, 0)
    return jax.lax.slice_in_dim(jnp.pad(x, padding), 0, x.shape[axis], axis=axis)


class OriginalDecoder(nn.Module):
    """The decoder of the latent CRF's own network.

    The coarsest tap is brought to the grid of the next one by a transposed 3x3 convolution of stride 2, concatenated with
    it and convolved 3x3, and so on; logits by a 1x1 convolution. With taps s16, s8 and s4 of VGG16, widths (512, 512, 256,
    512) and 21 classes it has 10,629,397 weights. The size of the transposed kernels is not published; with 3x3 the number
    of weights is the published one. Two choices are not from the publication. Every tap is standardised over its
    channels, without parameters, since the taps of VGG16 differ in scale. And a ReLU follows each convolution.

    Attributes:
      num_classes: K, background included.
      taps: names of the taps from coarse to fine, two or more.
      widths: for each tap after the first, channels of the transposed convolution and of the one after it.
      dropout: share of the coarsest tap's channels that is dropped in training.
      dtype: type of the products in convolutions; parameters, standardisation and logits are float32 in any case.

    Call with a dict from tap to [B, h, w, C] and `train`; returns logits [B, h, w, K] float32 on the grid of the finest
    tap. A PRNG key named "dropout" is needed when `train` is true and `dropout` is positive.

    References:
      Pandey and Dukkipati 2017.
    """

    num_classes: int
    taps: Sequence[str] = ("s16", "s8", "s4")
    widths: Sequence[int] = (512, 512, 256, 512)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        x = _standardised(features[self.taps[0]])
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        for tap, up, merged in zip(self.taps[1:], self.widths[::2], self.widths[1::2], strict=True):
            skip = _standardised(features[tap])
            doublings = 0
            while x.shape[1] < skip.shape[1] or x.shape[2] < skip.shape[2]:
                x = nn.relu(TransposedConv(up, self.dtype, name=f"up_{tap}_{doublings}")(x))
                doublings += 1
            x = jnp.concatenate([x[:, : skip.shape[1], : skip.shape[2]], skip.astype(x.dtype)], axis=-1)
            x = nn.relu(nn.Conv(merged, (3, 3), dtype=self.dtype, kernel_init=_HE, name=f"merge_{tap}")(x))
        return _logits(self.num_classes, x)


class LargeField(nn.Module):
    """The last layers of the DeepLab network with a large field: a 3x3 convolution of dilation 12, and a 1x1 one.

    In SEC they start from the fully connected layers of VGG16, and the whole network is trained. Here they start at
    random, on a frozen backbone. With 21 classes, the tap of 512 channels and widths (1024, 1024) it has 5,790,741
    weights.

    Attributes:
      num_classes: K, background included.
      taps: the name of one tap, "s16" of VGG16 with last_stride 8.
      widths: channels of the two convolutions.
      dropout: share of channels that is dropped after each of them in training.
      dtype: as of `OriginalDecoder`.

    Call as `OriginalDecoder`; the logits are on the grid of the tap.

    References:
      Chen et al. 2015 (DeepLab); Kolesnikov and Lampert 2016 (SEC).
    """

    num_classes: int
    taps: Sequence[str] = ("s16",)
    widths: Sequence[int] = (1024, 1024)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        x = _standardised(features[self.taps[0]])
        for name, width, size, dilation in (("fc6", self.widths[0], 3, 12), ("fc7", self.widths[1], 1, 1)):
            layer = nn.Conv(
                width, (size, size), kernel_dilation=dilation, dtype=self.dtype, kernel_init=_HE, name=name
            )
            x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(nn.relu(layer(x)))
        return _logits(self.num_classes, x)


def _standardised(x):
    """A tap with mean 0 and variance 1 over the channels of every cell."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)


def _logits(num_classes, x):
    return nn.Dense(num_classes, kernel_init=nn.initializers.normal(0.01), name="logits")(x.astype(jnp.float32))
