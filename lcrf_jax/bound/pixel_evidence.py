"""Evidence for the label of each pixel, from a frozen classifier or from cues: the input of `likelihoods.evidence`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import checked_indices, checked_tags
from lcrf_jax.numerics import (
    ONE_SET,
    check_finite,
    check_number,
    check_shape,
    check_share,
    known_number,
    promote_float,
    promote_together,
)

LEAST_EVIDENCE = 1e-12
"""What is added to evidence before its logarithm is taken."""
_DIVIDED = "look for a division by zero"
_LEAST_OBJECTNESS = 1e-4
_OF_MAPS = 0.75  # of the power of the strongest map that objectness takes the place of


def class_evidence(
    class_maps: ArrayLike,
    peaks: ArrayLike,
    tags: ArrayLike,
    *,
    background_level: ArrayLike,
    sharpness: ArrayLike = 1.0,
    floor: ArrayLike = 1e-3,
    saliency: ArrayLike | None = None,
    saliency_weight: ArrayLike = 0.0,
    objectness: ArrayLike | None = None,
    objectness_weight: ArrayLike = 0.0,
) -> jax.Array:
    r"""Per-pixel evidence e_k(x_j) from the class maps of a frozen classifier.

    .. math:: e_{jk} \propto \mathrm{clip}(c_{jk} / \max_i c_{ik}, \epsilon, 1)^\beta \text{ for present } k,
              \quad e_{j0} \propto \ell^\beta e^{w (1/2 - s_j)},
              \quad e_{jk} \propto \epsilon^\beta \text{ for absent } k

    With objectness o the ratio r of each present class is multiplied, before it is clipped, by

    .. math:: (o_j / \max_k r_{jk}^{3/4})^{v / n}, \quad n \text{ the number of present foreground classes.}

    So in an image of one class the objectness says where the object is, since a class map is high at what tells classes
    apart, a face, and not at the rest of the animal. In an image of several classes, where the most conspicuous object
    need not be of the class, the maps count for more. Which class a pixel has is said by the maps alone.

    Args:
      class_maps: [m, K - 1] maps c of the foreground classes.
      peaks: [K - 1] maximum of each map over the whole image (not just the m pixels of a crop).
      tags: [K] bool.
      background_level: l in (0, 1), the share of the peak at which foreground and background are equally
        likely.
      sharpness: beta > 0, how fast the odds change with the map.
      floor: epsilon, the least ratio; it bounds the cost of one pixel by beta log(1 / epsilon).
      saliency: [m] s in 0..1, such as `lcrf_jax.train.cues.saliency_rank`, or None for a background that is the same
        everywhere.
      saliency_weight: w >= 0; the log-odds of the background fall by it from the least to the most salient pixel.
      objectness: [m] o in 0..1, such as `lcrf_jax.nets.objectness.objectness`, or None.
      objectness_weight: v >= 0; 1 is usual, 0 leaves objectness out.
    Returns:
      [m, K] float32, positive, rows sum to one.
    Raises:
      ValueError: if the shapes do not fit, a map or peak is not finite, or a number is out of range.
    References:
      Zhou et al. 2016, for the maps; the odds against the background, and the way that objectness enters, are ours.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import class_evidence
      >>> maps, tags = np.array([[0.0], [1.0]]), np.array([True, True])
      >>> print(class_evidence(maps, maps.max(axis=0), tags, background_level=1 / 3).round(2))
      [[1.   0.  ]
       [0.25 0.75]]
    """
    num_pixels, num_foreground = check_shape("class_maps", class_maps, ("m", "K - 1"), ONE_SET)
    check_shape("peaks", peaks, (num_foreground,), "one maximum per foreground class")
    tags = checked_tags(tags, num_foreground + 1)
    check_share("background_level", background_level, "use a share of the peak, say 0.2")
    check_number("sharpness", sharpness, minimum=0, strict=True, remedy="1 is usual")
    check_share("floor", floor, "use a small positive number, say 1e-3")
    check_number("saliency_weight", saliency_weight, minimum=0, remedy="2 is usual, 0 leaves saliency out")
    check_number("objectness_weight", objectness_weight, minimum=0, remedy="1 is usual, 0 leaves objectness out")
    _check_beside("saliency", saliency, saliency_weight, num_pixels)
    _check_beside("objectness", objectness, objectness_weight, num_pixels)
    check_finite("class_maps", class_maps, _DIVIDED)
    check_finite("peaks", peaks, _DIVIDED)
    class_maps, peaks, salient, objects = promote_together(
        class_maps, peaks, 0.5 if saliency is None else saliency, 1.0 if objectness is None else objectness
    )
    dtype = class_maps.dtype
    floor = jnp.asarray(floor, dtype)
    ratio = class_maps / jnp.maximum(peaks, 1e-6)
    ratio = jnp.where(tags[1:], jnp.clip(ratio, floor, 1.0), floor)
    if objectness is not None:
        share = jnp.asarray(objectness_weight, dtype) / jnp.maximum(tags[1:].sum(), 1).astype(dtype)
        # The derivative of a power at 0 is infinite.
        factor = (jnp.maximum(objects, _LEAST_OBJECTNESS) / ratio.max(axis=1) ** _OF_MAPS) ** share
        ratio = jnp.where(tags[1:], jnp.clip(ratio * factor[:, None], floor, 1.0), floor)
    background = jnp.full((len(ratio), 1), background_level, dtype)
    log_odds = jnp.log(jnp.concatenate([background, ratio], axis=1)) * jnp.asarray(sharpness, dtype)
    log_odds = log_odds.at[:, 0].add(jnp.asarray(saliency_weight, dtype) * (0.5 - salient))
    return jax.nn.softmax(log_odds, axis=1)


def _check_beside(name, values, weight, num_pixels):
    """Refuse what stands beside the maps, one value of 0..1 for each pixel, if it is wanted and not there, or wrong."""
    if values is None and (known_number(weight) or 0) > 0:
        raise ValueError(f"{name}: expected [m] values for {name}_weight={weight}, got None; or use weight 0")
    if values is not None:
        check_shape(name, values, (num_pixels,), "one value per pixel")
        check_finite(name, values, "bring it to 0..1, such as by its ranks", minimum=0, maximum=1)


def cue_evidence(
    cues: ArrayLike, tags: ArrayLike, *, confidence: ArrayLike, absent_level: ArrayLike = 0.01
) -> jax.Array:
    r"""Per-pixel evidence from cues, labels of some of the pixels, each right with probability p.

    .. math:: e_{jk} = p \text{ for } k = c_j, \quad (1 - p) / (K - 1) \text{ for the others}

    A pixel without a cue leaves the present classes equally likely, and each absent one `absent_level` times as much.

    Args:
      cues: [m] integers, the class of each pixel, or any number outside 0..K-1, such as 255, for no cue.
      tags: [K] bool.
      confidence: p in (0, 1).
      absent_level: in (0, 1].
    Returns:
      [m, K] float32, positive, rows sum to one.
    Raises:
      ValueError: if the shapes do not fit or a number is out of range.
      TypeError: if `cues` are no integers.
    References:
      Kolesnikov and Lampert 2016, for cues as training signal; as a likelihood they are ours.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import cue_evidence
      >>> cues = np.array([1, 255])  # the second pixel has no cue
      >>> print(cue_evidence(cues, np.array([True, True]), confidence=0.75).round(2))
      [[0.25 0.75]
       [0.5  0.5 ]]
    """
    check_shape("cues", cues, ("m",), ONE_SET)
    tags = checked_tags(tags, "K")
    check_share("confidence", confidence, "0.97 is usual")
    if known_number(confidence) == 1:
        raise ValueError("confidence: expected a probability below 1, got 1; 0.97 is usual")
    check_share("absent_level", absent_level, "0.01 is usual")
    of_class = jax.nn.one_hot(checked_indices("cues", cues), len(tags), dtype=bool)
    confidence, absent_level = promote_together(confidence, absent_level)
    cued = jnp.where(of_class, confidence, (1 - confidence) / max(1, len(tags) - 1))
    free = jnp.where(tags, 1.0, absent_level)
    found = jnp.where(of_class.any(axis=1, keepdims=True), cued, free)
    return found / found.sum(axis=1, keepdims=True)


def log_evidence(pixel_evidence: ArrayLike) -> jax.Array:
    """The logarithm of the evidence, 1e-12 added to it: the terms that `evidence` of one-hot labels sums.

    Args:
      pixel_evidence: array of numbers >= 0.
    Returns:
      Array of the same shape, float32.
    Raises:
      ValueError: if one is negative or not finite.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import log_evidence
      >>> print(np.asarray(log_evidence(np.array([1.0, 0.5, 0.0]))).round(2))
      [  0.    -0.69 -27.63]
    """
    check_evidence(pixel_evidence)
    return jnp.log(promote_float(pixel_evidence) + LEAST_EVIDENCE)


def check_evidence(pixel_evidence: ArrayLike) -> None:
    """Refuse evidence that is negative or not finite, where it is known.

    Args:
      pixel_evidence: array of numbers >= 0.
    Raises:
      ValueError: if one is negative or not finite.
    """
    check_finite("pixel_evidence", pixel_evidence, "for log-probabilities take their exponential", minimum=0)
