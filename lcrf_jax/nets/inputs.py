"""What an image becomes before the first layer, and beside it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from PIL import Image

from lcrf_jax.nets.network import Network


def cell_means(values: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The mean over every cell of a grid that covers an image.

    Args:
      values: [B, H, W, C].
      shape: (h, w) of the grid. If the pixels do not divide evenly, cells share those on their borders.

    Returns:
      [B, h, w, C], dtype of `values`.
    """
    batch, height, width, channels = values.shape
    if height % shape[0] or width % shape[1]:
        return jax.image.resize(values, (batch, *shape, channels), "linear", antialias=True)
    return reduce(values, "b (h i) (w j) c -> b h w c", "mean", h=shape[0], w=shape[1])


def guide_image(images: jax.Array | np.ndarray, stride: int) -> jax.Array:
    """The colours that the pairwise kernel sees: every cell's mean.

    Args:
      images: [B, H, W, 3] RGB 0..255.
      stride: pixels per cell; where it does not divide H or W, cells are a little smaller.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), 3] float32, 0..255.
    """
    shape = [-(-side // stride) for side in images.shape[1:3]]
    return cell_means(jnp.asarray(images, jnp.float32), shape)


def network_inputs(
    network: Network, variables: Mapping[str, Any], images: jax.Array | np.ndarray, guide_stride: int | None = None
) -> tuple[dict[str, jax.Array], jax.Array]:
    """All that training takes from the images: the taps of the frozen backbone and the guide of the kernel.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      images: [B, S, S, 3] RGB 0..255.
      guide_stride: pixels per cell of the guide; None is the grid of the logits.

    Returns:
      (dict from tap to [B, h, w, C] float32, guide [B, S / guide_stride, S / guide_stride, 3], see `guide_image`).
    """
    return network.features(variables, images), guide_image(images, guide_stride or network.stride)


# The compiled function below takes the weights as arguments and the network as a static argument. So a second run, or a
# second source of the same sizes, compiles nothing.


@functools.partial(jax.jit, static_argnames=("network", "guide_stride", "taps"))
def chosen_inputs(
    variables: Mapping[str, Any],
    images: jax.Array | np.ndarray,
    *,
    network: Network,
    guide_stride: int | None,
    taps: tuple[str, ...],
) -> tuple[dict[str, jax.Array], jax.Array]:
    """`network_inputs` of some taps alone, compiled.

    Args:
      variables, images, network, guide_stride: see `network_inputs`.
      taps: those that are wanted; static, as the network and the stride are.

    Returns:
      (dict from tap to array, guide).
    """
    features, guide = network_inputs(network, variables, images, guide_stride)
    return {tap: features[tap] for tap in taps}, guide


def square_image(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image at size x size, as the network sees it.

    Args:
      image: [H, W, 3] uint8.
      size: side in pixels.

    Returns:
      [size, size, 3] uint8, bicubic and antialiased.
    """
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))
