"""Cross-entropies with targets: labels of cells, hard or soft. The M-step of all methods that make such targets."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import check_possible, checked_indices
from lcrf_jax.numerics import ONE_SET, check_logits, check_probs, check_shape, promote_float, promote_together


def label_cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    r"""Cross-entropy with the labels of the cells that have one.

    .. math:: -\frac{1}{|U|} \sum_{j \in U} \log \phi_{j z_j}, \qquad U = \{j : 0 \le z_j < K\}

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      labels: [m] integers; a value outside 0..K - 1, such as 255, means no label.
    Returns:
      Scalar, float32, nats; the mean over the cells with a label, 0 if there is none.
    Raises:
      ValueError: if the shapes do not fit, `logits` are none, or a class that is a label has -inf.
      TypeError: if `labels` are no integers.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import label_cross_entropy
      >>> round(float(label_cross_entropy(np.zeros((3, 2)), np.array([0, 1, 255]))), 3)
      0.693
    """
    num_pixels, num_classes = check_shape("logits", logits, ("m", "K"), ONE_SET)
    check_shape("labels", labels, (num_pixels,), "one class index per cell")
    check_logits("logits", logits)
    labels = checked_indices("labels", labels)
    known = (labels >= 0) & (labels < num_classes)
    log_probs = jax.nn.log_softmax(promote_float(logits), axis=-1)
    picked = jnp.take_along_axis(log_probs, jnp.where(known, labels, 0)[:, None], axis=1)
    check_possible(picked, known[:, None])
    picked = jnp.where(known, picked[:, 0], 0)
    return -jnp.sum(picked) / jnp.maximum(known.sum(), 1).astype(picked.dtype)


def soft_cross_entropy(logits: ArrayLike, probs: ArrayLike) -> jax.Array:
    r"""Cross-entropy with a distribution over the labels of every cell, which is held fixed.

    .. math:: -\frac{1}{m} \sum_j \sum_k p_{jk} \log \phi_{jk}

    Its gradient in the logits is (phi - p) / m.

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      probs: [m, K] target p; rows sum to one. No gradient flows into it.
    Returns:
      Scalar, float32, nats, the mean over the cells.
    Raises:
      ValueError: if the shapes do not fit, `logits` or `probs` are none, or a class with a target has -inf.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import soft_cross_entropy
      >>> round(float(soft_cross_entropy(np.zeros((2, 2)), np.array([[0.9, 0.1], [0.2, 0.8]]))), 3)
      0.693
    """
    num_pixels, num_classes = check_shape("logits", logits, ("m", "K"), ONE_SET)
    check_shape("probs", probs, (num_pixels, num_classes), "one distribution per cell")
    check_logits("logits", logits)
    check_probs("probs", probs)
    logits, probs = promote_together(logits, probs)
    check_possible(jax.nn.log_softmax(logits, axis=-1), probs > 0)
    return mean_cross_entropy(logits, probs)


def mean_cross_entropy(logits: jax.Array, probs: jax.Array) -> jax.Array:
    """`soft_cross_entropy` without checks.

    Args:
      logits: [m, K] float.
      probs: [m, K] of the same type.
    Returns:
      Scalar.
    """
    probs = jax.lax.stop_gradient(probs)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0)) / len(logits)
