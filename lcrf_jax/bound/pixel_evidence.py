"""Evidence for the label of each pixel, from a frozen classifier or from cues: the input of `likelihoods.evidence`."""

import numbers

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.numerics import check_number, check_shape, check_share, promote_float

_ONE_IMAGE = "pass one image, pixels flattened to one axis; for a batch use jax.vmap"
_TINY = 1e-6


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
) -> jax.Array:
    r"""Per-pixel evidence e_k(x_j) from the class maps of a frozen classifier.

    .. math:: e_{jk} \propto \mathrm{clip}(c_{jk} / \max_i c_{ik}, \epsilon, 1)^\beta \text{ for present } k,
              \quad e_{j0} \propto \ell^\beta e^{w (1/2 - s_j)},
              \quad e_{jk} \propto \epsilon^\beta \text{ for absent } k

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
    Returns:
      [m, K] float32, positive, rows sum to one.
    Raises:
      ValueError: if the shapes do not fit or a number is out of range.
    References:
      Zhou et al. 2016, for the maps; the odds against the background are ours.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import class_evidence
      >>> maps, tags = np.array([[0.0], [1.0]]), np.array([True, True])
      >>> print(class_evidence(maps, maps.max(axis=0), tags, background_level=1 / 3).round(2))
      [[1.   0.  ]
       [0.25 0.75]]
    """
    num_pixels, num_foreground = check_shape("class_maps", class_maps, ("m", "K - 1"), _ONE_IMAGE)
    check_shape("peaks", peaks, (num_foreground,), "one maximum per foreground class")
    check_shape("tags", tags, (num_foreground + 1,), "one tag per class, background first")
    check_share("background_level", background_level, "use a share of the peak, say 0.2")
    check_number("sharpness", sharpness, minimum=0, strict=True, remedy="1 is usual")
    check_share("floor", floor, "use a small positive number, say 1e-3")
    ratio = promote_float(class_maps) / jnp.maximum(promote_float(peaks), _TINY)
    ratio = jnp.where(jnp.asarray(tags, bool)[1:], jnp.clip(ratio, floor, 1.0), floor)
    background = jnp.full((num_pixels, 1), background_level, ratio.dtype)
    log_odds = jnp.log(jnp.concatenate([background, ratio], axis=1)) * sharpness
    check_number("saliency_weight", saliency_weight, minimum=0, remedy="2 is usual, 0 leaves saliency out")
    if saliency is None and isinstance(saliency_weight, numbers.Real) and saliency_weight > 0:
        at = f"saliency_weight={saliency_weight}"
        raise ValueError(f"saliency: expected [m] values for {at}, got None; or use weight 0")
    if saliency is not None:
        check_shape("saliency", saliency, (num_pixels,), "one value per pixel")
        log_odds = log_odds.at[:, 0].add(saliency_weight * (0.5 - promote_float(saliency)))
    return jax.nn.softmax(log_odds, axis=1)


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
    check_shape("cues", cues, ("m",), _ONE_IMAGE)
    (num_classes,) = check_shape("tags", tags, ("K",), "one tag per class, background first")
    check_share("confidence", confidence, "0.97 is usual")
    if isinstance(confidence, numbers.Real) and confidence == 1:
        raise ValueError("confidence: expected a probability below 1, got 1; 0.97 is usual")
    check_share("absent_level", absent_level, "0.01 is usual")
    of_class = jax.nn.one_hot(cues, num_classes, dtype=bool)
    cued = jnp.where(of_class, confidence, (1 - confidence) / max(1, num_classes - 1))
    free = jnp.where(jnp.asarray(tags, bool), 1.0, absent_level)
    found = jnp.where(of_class.any(axis=1, keepdims=True), cued, free)
    return promote_float(found / found.sum(axis=1, keepdims=True))


def log_evidence(pixel_evidence: ArrayLike) -> jax.Array:
    """The logarithm of the evidence, kept above that of 1e-12: the terms that `evidence` of one-hot labels sums.

    Args:
      pixel_evidence: array of positive numbers.
    Returns:
      Array of the same shape, float32.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import log_evidence
      >>> print(np.asarray(log_evidence(np.array([1.0, 0.5, 0.0]))).round(2))
      [  0.    -0.69 -27.63]
    """
    return jnp.log(jnp.maximum(promote_float(pixel_evidence), _TINY**2))
