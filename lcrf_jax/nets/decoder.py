"""The trainable part of the inference network: a U-Net-like decoder on frozen features."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange


class UpConv(nn.Module):
    """Transposed 2x2 convolution of stride 2, as one matrix product and a rearrangement."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return rearrange(nn.Dense(4 * self.width, dtype=self.dtype)(x), "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)


class Decoder(nn.Module):
    """Logits g(x) from feature taps, coarse to fine, with skip connections.

    Every tap is normalised over its channels. The coarsest one is projected; then, tap by tap, the grid is
    brought to that of the next finer tap by transposed convolutions, concatenated with it and convolved 3x3.

    Attributes:
      num_classes: K, background included.
      taps: names of the taps from coarse to fine.
      widths: channels after each tap, as many as `taps`.
      dropout: share of the coarsest tap's channels that is dropped in training.
      dtype: type of the products in convolutions; parameters, normalisation and logits are float32 in any case.

    Call with a dict from tap to [B, h, w, C] and `train`; returns logits [B, h, w, K] float32 on the grid of
    the finest tap. A PRNG key named "dropout" is needed when `train` is true and `dropout` is positive.

    References:
      Pandey and Dukkipati 2017; Ronneberger, Fischer and Brox 2015.
    """

    num_classes: int
    taps: Sequence[str] = ("s32", "s16", "s8", "s4")
    widths: Sequence[int] = (256, 128, 96, 64)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, jax.Array], *, train: bool = False) -> jax.Array:
        if len(self.taps) != len(self.widths) or not self.taps:
            taps, widths = tuple(self.taps), tuple(self.widths)
            raise ValueError(f"widths: expected one for each of the taps {taps}, got {widths}")

        def normalised(tap):
            return nn.LayerNorm(name=f"norm_{tap}")(features[tap].astype(jnp.float32))

        x = normalised(self.taps[0])
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        x = nn.relu(nn.Dense(self.widths[0], dtype=self.dtype, name=f"project_{self.taps[0]}")(x))
        for tap, width in zip(self.taps[1:], self.widths[1:]):
            skip = normalised(tap)
            # The layers are numbered, not named after the grid: the same parameters serve every image size.
            doublings = 0
            while x.shape[1] < skip.shape[1] or x.shape[2] < skip.shape[2]:
                x = UpConv(width, self.dtype, name=f"up_{tap}_{doublings}")(x)
                doublings += 1
            x = x[:, : skip.shape[1], : skip.shape[2]]
            x = nn.Conv(width, (3, 3), dtype=self.dtype, name=f"merge_{tap}")(jnp.concatenate([x, skip], axis=-1))
            x = nn.relu(nn.LayerNorm(name=f"post_{tap}")(x.astype(jnp.float32)))
        logits = nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(0.01), name="logits")
        return logits(x.astype(jnp.float32))
