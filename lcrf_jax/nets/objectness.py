"""Where in an image an object is, of whatever class, by frozen features and the border of the image."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.numerics import promote_float

_LEAST_RANGE = 1e-6


def objectness(features: ArrayLike, head: ArrayLike) -> jax.Array:
    """How much each cell of an image looks like an object, relative to the other cells of the same image.

    The mean of two maps, each brought to 0..1 by its least and greatest value in the image: the length of the features
    of the last convolutions, since a network that was trained on objects answers weakly to what is none; and minus the
    cosine between the head's features and their mean direction along the border of the image, since the border mostly shows
    background. Nothing is fitted. An object that fills the border is not found by the second.

    Args:
      features: [B, h, w, C] of the tap "s32".
      head: [B, h, w, C'] features of the tag classifier, see `lcrf_jax.nets.network.Network.head`.

    Returns:
      [B, h, w] float32 in 0..1. A map that is the same everywhere counts 1/2 everywhere.

    References:
      Wei et al. 2012, Geodesic saliency using background priors, for the border; features in the place of colours are ours.
    """
    features, head = promote_float(features), promote_float(head)
    directions = _unit(head)
    top_and_bottom, sides = directions[:, (0, -1)], directions[:, :, (0, -1)]
    border = jnp.concatenate([part.reshape(len(head), -1, head.shape[-1]) for part in (top_and_bottom, sides)], axis=1)
    unlike = -jnp.einsum("bhwc,bc->bhw", directions, _unit(border.mean(axis=1)))
    return (_stretched(jnp.linalg.norm(features, axis=-1)) + _stretched(unlike)) / 2


def _unit(vectors):
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), _LEAST_RANGE)


def _stretched(values):
    """[B, h, w] from its least to its greatest value in each image, as 0..1."""
    least, greatest = (reduced(values, axis=(1, 2), keepdims=True) for reduced in (jnp.min, jnp.max))
    bound = _LEAST_RANGE * jnp.maximum(1.0, jnp.abs(greatest))  # what rounding alone may do
    stretched = (values - least) / jnp.maximum(greatest - least, bound)
    return jnp.where(greatest - least <= bound, 0.5, stretched)
