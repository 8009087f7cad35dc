"""Vision transformers as frozen feature extractors: DINOv2, the image tower of CLIP, and AugReg.

One module serves all of them; `VARIANTS` says in what they differ. Patch tokens are given back as grids, class and register
tokens are used within and left out. Attention is two matrix products and a softmax in float32.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import ArrayLike

from lcrf_jax.nets.trained import Layers


class Variant(NamedTuple):
    """What one published vision transformer is.

    Attributes:
      width: channels of a token.
      heads: of the attention.
      patch: side of a patch in pixels.
      grid: patches along a side of the images it was trained on.
      registers: number of register tokens.
      depth: number of blocks.
      layer_scale: whether each branch is multiplied by a learnt vector.
      normalised_first: whether the tokens are normalised before the first block, and patches have no bias (CLIP).
      quick_gelu: x sigmoid(1.702 x) in the place of the exact GELU.
      antialias: how positions are interpolated, see `resampling`.
      epsilon: of the layer norms.
      mean, std: of the images, for each channel, as shares of 255.
    """

    width: int
    heads: int
    patch: int
    grid: int
    registers: int = 0
    depth: int = 12
    layer_scale: bool = False
    normalised_first: bool = False
    quick_gelu: bool = False
    antialias: bool = False
    epsilon: float = 1e-6
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


_DINOV2_SMALL = Variant(384, 6, 14, 37, layer_scale=True)
_DINOV2_BASE = _DINOV2_SMALL._replace(width=768, heads=12)
_AUGREG_SMALL = Variant(384, 6, 16, 14, antialias=True, mean=(0.5,) * 3, std=(0.5,) * 3)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VARIANTS = {
    "dinov2_vits14": _DINOV2_SMALL,
    "dinov2_vitb14": _DINOV2_BASE,
    "dinov2_vits14_reg": _DINOV2_SMALL._replace(registers=4, antialias=True),
    "dinov2_vitb14_reg": _DINOV2_BASE._replace(registers=4, antialias=True),
    "clip_vitb16": Variant(
        768, 12, 16, 14, normalised_first=True, quick_gelu=True, epsilon=1e-5, mean=_CLIP_MEAN, std=_CLIP_STD
    ),
    "augreg_vits16": _AUGREG_SMALL,
    "augreg_vitb16": _AUGREG_SMALL._replace(width=768, heads=12),
}


def taps_of(variant: Variant) -> tuple[str, ...]:
    """Names of the taps, the deepest first.

    Args:
      variant: Variant.

    Returns:
      "head", "s32", "block11" ... "block1" for twelve blocks.
    """
    return ("head", "s32", *(f"block{number}" for number in range(variant.depth - 1, 0, -1)))


def layers(variant: Variant) -> Layers:
    """The layers from the input on, with the taps that are complete after them; those before the first block first.

    Args:
      variant: Variant.

    Returns:
      See `lcrf_jax.nets.trained`.
    """
    names = ["patches", "positions", "class_token", *(["registers"] if variant.registers else [])]
    names += ["norm_first"] if variant.normalised_first else []
    names += [f"block{number}" for number in range(1, variant.depth + 1)]
    there = taps_of(variant)
    return [*((name, (name,) if name in there else ()) for name in names), ("norm", ("s32", "head"))]


def preprocess(variant: Variant, image: ArrayLike) -> jax.Array:
    """Network input from an RGB image, as the published weights want it.

    Args:
      variant: Variant.
      image: [..., H, W, 3] RGB, any float or uint8 type, 0..255.

    Returns:
      [..., H, W, 3] float32, (image / 255 - mean) / std for each channel.
    """
    return (jnp.asarray(image, jnp.float32) / 255 - jnp.array(variant.mean)) / jnp.array(variant.std)


def resampling(cells: int, wanted: int, antialias: bool) -> np.ndarray:
    """The matrix that brings values along one axis to another number of cells by cubic interpolation.

    Args:
      cells: number of cells that there are.
      wanted: number of cells of the result.
      antialias: False: four neighbours with a = -0.75, those beyond the edge are the edge's, as PyTorch's bicubic; True: a
        kernel with a = -0.5 that is as wide as the larger cells, its weights on the axis summing to 1, as PyTorch's
        bicubic with antialiasing.

    Returns:
      [wanted, cells] float64.
    """
    places = (np.arange(wanted) + 0.5) * cells / wanted - 0.5
    if antialias:
        weights = _cubic((np.arange(cells) - places[:, None]) / max(cells / wanted, 1.0), -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    weights = np.zeros((wanted, cells))
    for neighbour in (-1, 0, 1, 2):
        taken = np.floor(places) + neighbour
        np.add.at(weights, (np.arange(wanted), np.clip(taken, 0, cells - 1).astype(int)), _cubic(places - taken, -0.75))
    return weights


def _cubic(distances, a):
    x = np.abs(distances)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampled(positions: jax.Array, shape: tuple[int, int], antialias: bool) -> jax.Array:
    """Position embeddings on another grid.

    Args:
      positions: [g * g, C] of a square grid.
      shape: (h, w) of the grid that is wanted.
      antialias: see `resampling`.

    Returns:
      [h * w, C] float32; the positions themselves where the grid is theirs.
    """
    positions = positions.astype(jnp.float32)
    side = round(len(positions) ** 0.5)
    if shape == (side, side):
        return positions
    down, across = (jnp.asarray(resampling(side, cells, antialias), jnp.float32) for cells in shape)
    grid = rearrange(positions, "(a b) c -> a b c", a=side)
    return rearrange(jnp.einsum("ia,jb,abc->ijc", down, across, grid), "i j c -> (i j) c")


class Block(nn.Module):
    """Self-attention and two dense layers, each with a layer norm before it and a residual around it.

    Attributes:
      variant: Variant.

    Call with [B, N, C]; returns the same shape and type.
    """

    variant: Variant

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        this = self.variant

        def scaled(branch, name):
            return branch * self.param(name, nn.initializers.ones, (this.width,)) if this.layer_scale else branch

        taken = nn.Dense(3 * this.width, name="qkv")(nn.LayerNorm(this.epsilon, name="norm1")(x))
        attended = nn.Dense(this.width, name="out")(_attention(taken, this.heads))
        x = x + scaled(attended, "scale1")
        taken = nn.Dense(4 * this.width, name="up")(nn.LayerNorm(this.epsilon, name="norm2")(x))
        taken = taken * jax.nn.sigmoid(1.702 * taken) if this.quick_gelu else jax.nn.gelu(taken, approximate=False)
        return x + scaled(nn.Dense(this.width, name="down")(taken), "scale2")


def _attention(taken, heads):
    queries, keys, values = rearrange(taken, "b n (kind h d) -> kind h b n d", kind=3, h=heads)
    # On a CPU one head after the other: the scores of one stay in the cache, those of all do not.
    attended = jax.lax.platform_dependent(queries, keys, values, cpu=_each_head, default=jax.vmap(_of_head))
    return rearrange(attended, "h b n d -> b n (h d)")


def _each_head(queries, keys, values):
    return jax.lax.map(lambda head: _of_head(*head), (queries, keys, values))


def _of_head(queries, keys, values):
    scores = jnp.einsum("bnd,bmd->bnm", queries, keys).astype(jnp.float32) / np.sqrt(queries.shape[-1])
    return jnp.einsum("bnm,bmd->bnd", jax.nn.softmax(scores).astype(values.dtype), values)


class VisionTransformer(nn.Module):
    """A vision transformer whose taps are grids of patch tokens, all of one stride.

    Attributes:
      variant: Variant.
      last_stride: the side of a patch; there is no other.
      recompute: whether what lies within a block is computed again for gradients, and not kept.

    Call with [B, H, W, 3] preprocessed images (`preprocess`), H and W multiples of the patch; positions are interpolated to
    the grid. Returns a dict from tap to [B, H / patch, W / patch, C]: "block3" is the patch tokens after the third block,
    and so on; "s32", which is also "head", those after the last block and the last layer norm, the features of the tag
    classifier. The name says that it is the deepest tap, as of every backbone; its stride is that of the others.

    References:
      Dosovitskiy et al. 2021; Steiner et al. 2022 (AugReg); Radford et al. 2021 (CLIP); Oquab et al. 2024 (DINOv2); Darcet
      et al. 2024 (registers).
    """

    variant: Variant
    last_stride: int = 0
    recompute: bool = False

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.variant.patch

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        this = self.variant
        if self.last_stride not in (0, this.patch):
            raise ValueError(f"last_stride: expected {this.patch}, the side of a patch, got {self.last_stride}")
        if any(not side or side % this.patch for side in x.shape[1:3]):
            raise ValueError(f"expected sides that are multiples of {this.patch}, got an image of {x.shape[1:3]}")
        window = (this.patch, this.patch)
        embed = nn.Conv(this.width, window, window, "VALID", use_bias=not this.normalised_first, name="patches")
        x = embed(x)
        shape = x.shape[1:3]
        x, first = self._with_positions(rearrange(x, "b h w c -> b (h w) c"), shape)
        if this.normalised_first:
            x = nn.LayerNorm(this.epsilon, name="norm_first")(x)

        def grid(tokens):
            return rearrange(tokens[:, first:], "b (h w) c -> b h w c", h=shape[0])

        block = nn.remat(Block) if self.recompute else Block
        taps: dict[str, jax.Array] = {}
        for number in range(1, this.depth + 1):
            x = block(this, name=f"block{number}")(x)
            if number < this.depth:
                taps[f"block{number}"] = grid(x)
        taps["s32"] = taps["head"] = grid(nn.LayerNorm(this.epsilon, name="norm")(x))
        return taps

    def _with_positions(self, x, shape):
        """(class token, register tokens, patch tokens with their positions; number of tokens before the patches)."""
        this, draw = self.variant, nn.initializers.normal(0.02)
        positions = self.param("positions", draw, (1 + this.grid**2, this.width))
        token = self.param("class_token", draw, (this.width,))
        x = x + resampled(positions[1:], shape, this.antialias).astype(x.dtype)
        front = (token + positions[0])[None]
        if this.registers:
            front = jnp.concatenate([front, self.param("registers", draw, (this.registers, this.width))])
        front = jnp.broadcast_to(front.astype(x.dtype), (len(x), *front.shape))
        return jnp.concatenate([front, x], axis=1), front.shape[1]
