r"""Multiple-instance learning with smooth pooling (Pinheiro and Collobert 2015), and its two priors at test time."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import check_scores, checked_tags
from lcrf_jax.bound.pooling import smooth_maximum_parts
from lcrf_jax.numerics import check_number, promote_float


def mil_lse_scores(logits: ArrayLike, *, sharpness: ArrayLike = 5.0) -> jax.Array:
    r"""The score of each class for the whole image: a smooth maximum over the pixels.

    .. math:: s_k = \frac{1}{r} \log \frac{1}{m} \sum_j \exp(r\, g_{jk})

    Args:
      logits: [m, K] scores g of the pixels.
      sharpness: r > 0; the mean for r towards 0, the maximum for large r.
    Returns:
      [K] float32 scores, between the mean and the maximum of each column.
    Raises:
      ValueError: if `logits` is not [m, K], not finite or no logits, or `sharpness` is not positive.
    References:
      Pinheiro and Collobert 2015, eq. 2.
    """
    check_scores(logits)
    check_number("sharpness", sharpness, minimum=0, strict=True, remedy="5 is usual")
    logits = promote_float(logits)
    largest, below = smooth_maximum_parts(logits, jnp.asarray(sharpness, logits.dtype))
    return largest + below


def mil_lse_loss(logits: ArrayLike, tags: ArrayLike, *, sharpness: ArrayLike = 5.0) -> jax.Array:
    r"""Cross-entropy of the image's class scores with its tags.

    .. math:: -\frac{1}{|y|} \sum_{k: y_k} \log p(k|x), \qquad p(\cdot|x) = \mathrm{softmax}(s)

    Background counts as a tag that every image has.

    Args:
      logits: [m, K] scores g of the pixels.
      tags: [K] bool, index 0 is background.
      sharpness: see `mil_lse_scores`.
    Returns:
      Scalar, float32, nats; the mean over the tags that are present, 0 if none is.
    Raises:
      ValueError: if the shapes do not fit, `logits` are not finite or none, or `sharpness` is not positive.
    References:
      Pinheiro and Collobert 2015, section 3.1.
    Example:
      >>> import jax, numpy as np
      >>> from lcrf_jax import mil_lse_loss
      >>> logits, tags = np.array([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), np.array([True, True, False])
      >>> round(float(jax.jit(mil_lse_loss)(logits, tags)), 3)
      0.768
    """
    scores = mil_lse_scores(logits, sharpness=sharpness)
    tags = checked_tags(tags, len(scores))
    log_probs = jax.nn.log_softmax(scores)
    return -jnp.sum(jnp.where(tags, log_probs, 0)) / jnp.maximum(tags.sum(dtype=log_probs.dtype), 1)


def ilp_log_probs(logits: ArrayLike, *, sharpness: ArrayLike = 5.0) -> jax.Array:
    r"""The pixels' probabilities times those of the image: the image-level prior that is used at test time.

    .. math:: \hat p_j(k) \propto p_j(k)\, p(k|x)

    Args:
      logits: [m, K] scores g of the pixels.
      sharpness: see `mil_lse_scores`.
    Returns:
      [m, K] float32 log-probabilities.
    Raises:
      ValueError: if `logits` is not [m, K], not finite or no logits, or `sharpness` is not positive.
    References:
      Pinheiro and Collobert 2015, section 3.2.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import ilp_log_probs
      >>> logits = np.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(np.exp(ilp_log_probs(logits)).round(2))
      [[0.95 0.05]
       [0.5  0.5 ]]
    """
    prior = jax.nn.log_softmax(mil_lse_scores(logits, sharpness=sharpness))
    return jax.nn.log_softmax(promote_float(logits) + prior, axis=-1)


def majority_labels(labels: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Every pixel takes the most frequent label of its segment.

    Args:
      labels: [H, W] NumPy array of class indices >= 0.
      segments: [H, W] NumPy array of segment numbers >= 0, such as superpixels.
    Returns:
      [H, W] NumPy array, dtype of `labels`; the smallest of equally frequent labels.
    Raises:
      ValueError: if the shapes differ or an entry is negative.
      TypeError: if one of the arrays does not hold integers.
    References:
      Pinheiro and Collobert 2015, section 3.2 (smoothing prior).
    """
    labels, segments = np.asarray(labels), np.asarray(segments)
    if labels.ndim != 2 or labels.shape != segments.shape or not labels.size:
        raise ValueError(f"expected labels and segments of one shape [H, W], got {labels.shape} and {segments.shape}")
    for name, array in (("labels", labels), ("segments", segments)):
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name}: expected integers, got {array.dtype}; number the classes and segments from 0 on")
    if labels.min() < 0 or segments.min() < 0:
        raise ValueError("expected labels and segments >= 0, got a negative one; relabel the segments from 0 on")
    # Numbered anew, so that large numbers take no more memory than small ones.
    classes, of_class = np.unique(labels, return_inverse=True)
    numbers, of_segment = np.unique(segments, return_inverse=True)
    pairs = of_segment.ravel() * len(classes) + of_class.ravel()
    counts = np.bincount(pairs, minlength=len(numbers) * len(classes)).reshape(len(numbers), len(classes))
    return classes[counts.argmax(axis=1)][of_segment].reshape(labels.shape)
