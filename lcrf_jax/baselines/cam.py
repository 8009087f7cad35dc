r"""Class activation maps with a threshold (Zhou et al. 2016): no network of its own is trained."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.pixel_evidence import LEAST_EVIDENCE, class_evidence
from lcrf_jax.numerics import ONE_SET, check_finite, check_shape, promote_float


def cam_log_probs(
    class_maps: ArrayLike,
    image_logits: ArrayLike,
    *,
    background_level: ArrayLike = 0.2,
    sharpness: ArrayLike = 2.0,
    floor: ArrayLike = 0.01,
) -> jax.Array:
    r"""Log-probabilities from the class maps of a tag classifier and the classes that it finds itself.

    A class is present where the classifier gives it at least even odds; each map is divided by its maximum and competes
    with a background of constant height, see `lcrf_jax.bound.pixel_evidence.class_evidence`. The `sharpness` does not
    change the labels, which are those of the thresholded maps.

    Args:
      class_maps: [m, K - 1] maps of the foreground classes, without bias.
      image_logits: [K - 1] logits of the classifier for the whole image.
      background_level: share of a map's maximum below which background wins, in (0, 1].
      sharpness: see `class_evidence`.
      floor: see `class_evidence`.
    Returns:
      [m, K] float32 log-probabilities.
    Raises:
      ValueError: if the shapes do not fit, a map or logit is not finite, or a number is out of range.
    References:
      Zhou et al. 2016; the odds against a constant background are ours.
    """
    _, num_foreground = check_shape("class_maps", class_maps, ("m", "K - 1"), ONE_SET)
    check_shape("image_logits", image_logits, (num_foreground,), "one logit per foreground class")
    check_finite("image_logits", image_logits, "look for a division by zero")
    check_finite("class_maps", class_maps, "look for a division by zero")
    peaks = promote_float(class_maps).max(axis=0)
    present = jnp.concatenate([jnp.ones(1, bool), promote_float(image_logits) >= 0])
    settings = {"background_level": background_level, "sharpness": sharpness, "floor": floor}
    return jnp.log(class_evidence(class_maps, peaks, present, **settings) + LEAST_EVIDENCE)
