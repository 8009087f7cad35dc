r"""Multiple-instance learning with smooth pooling (Pinheiro and Collobert 2015), and its two priors at test time."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.numerics import check_number, check_shape, promote_float

_ONE_SET = "flatten the pixels of one image to one axis; for a batch use jax.vmap"


def mil_lse_scores(logits: ArrayLike, *, sharpness: ArrayLike = 5.0) -> jax.Array:
    r"""The score of each class for the whole image: a smooth maximum over the pixels.

    .. math:: s_k = \frac{1}{r} \log \frac{1}{m} \sum_j \exp(r\, g_{jk})

    Args:
      logits: [m, K] scores g of the pixels.
      sharpness: r > 0; the mean for r towards 0, the maximum for large r.
    Returns:
      [K] float32 scores, between the mean and the maximum of each column.
    Raises:
      ValueError: if `logits` is not [m, K] or `sharpness` is not positive.
    References:
      Pinheiro and Collobert 2015, eq. 2.
    """
    num_pixels, _ = check_shape("logits", logits, ("m", "K"), _ONE_SET)
    check_number("sharpness", sharpness, minimum=0, strict=True, remedy="5 is usual")
    logits = promote_float(logits)
    return (jax.nn.logsumexp(sharpness * logits, axis=0) - jnp.log(num_pixels)) / sharpness


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
      ValueError: if the shapes do not fit or `sharpness` is not positive.
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
    check_shape("tags", tags, scores.shape, "one tag per class, background first")
    tags = jnp.asarray(tags, bool)
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
      ValueError: if `logits` is not [m, K] or `sharpness` is not positive.
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
    References:
      Pinheiro and Collobert 2015, section 3.2 (smoothing prior).
    """
    labels, segments = np.asarray(labels), np.asarray(segments)
    if labels.ndim != 2 or labels.shape != segments.shape or not labels.size:
        raise ValueError(f"expected labels and segments of one shape [H, W], got {labels.shape} and {segments.shape}")
    if labels.min() < 0 or segments.min() < 0:
        raise ValueError("expected labels and segments >= 0, got a negative one; relabel the segments from 0 on")
    num_classes = int(labels.max()) + 1
    pairs = segments.astype(np.int64) * num_classes + labels
    counts = np.bincount(pairs.ravel(), minlength=(int(segments.max()) + 1) * num_classes)
    return counts.reshape(-1, num_classes).argmax(axis=1).astype(labels.dtype)[segments]
