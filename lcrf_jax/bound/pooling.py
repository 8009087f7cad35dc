"""Means over the pixels that favour the largest: from the labels of a class to one number for the image."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.numerics import ONE_SET, check_finite, check_number, check_shape, promote_float

_IMPOSSIBLE = -1e4


def smooth_maximum(values: ArrayLike, *, sharpness: ArrayLike = 5.0) -> jax.Array:
    r"""The logarithm of the mean exponential of each column, a smooth maximum over the pixels.

    .. math:: s_k = \frac{1}{r} \log \frac{1}{m} \sum_j \exp(r\, z_{jk})

    Args:
      values: [m, K] finite numbers.
      sharpness: r > 0; the mean for r towards 0, the maximum for large r.
    Returns:
      [K] float32, between the mean and the maximum of each column.
    Raises:
      ValueError: if `values` are not [m, K] or not finite, or `sharpness` is not positive.
    References:
      Pinheiro and Collobert 2015, eq. 2.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound.pooling import smooth_maximum
      >>> [round(float(x), 3) for x in smooth_maximum(np.array([[0.0, 1.0], [1.0, 1.0]]))]
      [0.863, 1.0]
    """
    check_shape("values", values, ("m", "K"), ONE_SET)
    check_number("sharpness", sharpness, minimum=0, strict=True, remedy="5 is usual")
    check_finite("values", values, "look for a division by zero")
    values = promote_float(values)
    largest, below = smooth_maximum_parts(values, jnp.asarray(sharpness, values.dtype))
    return largest + below


def smooth_maximum_parts(values: jax.Array, sharpness: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maximum of each column, and the smooth maximum less it: exact for any sharpness, and without checks.

    Args:
      values: [m, K] float.
      sharpness: scalar r > 0 of the same type.
    Returns:
      [K] and [K]; the second is not positive, and the gradient of the sum flows through it alone.
    """
    largest = jax.lax.stop_gradient(values.max(axis=0))
    growth = jnp.mean(jnp.expm1(sharpness * (values - largest)), axis=0)
    # Of 1 + growth: near 0 the sum would lose the digits of a small sharpness, near -1 those of a large one.
    small = growth > -0.5
    power = jnp.mean(jnp.exp(sharpness * (values - largest)), axis=0)
    logarithm = jnp.where(small, jnp.log1p(jnp.where(small, growth, 0)), jnp.log(power))
    return largest, logarithm / sharpness


def ranked_mean(labels: ArrayLike, decays: ArrayLike, *, reference_cells: ArrayLike = 1681) -> jax.Array:
    r"""Global weighted rank pooling of each class: its i-th most certain pixel counts d^(i-1).

    .. math:: G_k = \sum_i d_k^{i-1} z_{(i)k} \Big/ \sum_i d_k^{i-1}

    On m cells d^(reference_cells / m) is used, so that the same share of the image is meant at every resolution.

    Args:
      labels: [m, K] one-hot or relaxed labels, or any finite numbers.
      decays: [K] d of each class, in (0, 1].
      reference_cells: number of cells for which the decays are given (41 x 41 in the source).
    Returns:
      [K] float32, each between the mean and the maximum of its column.
    Raises:
      ValueError: if the shapes do not fit, a label is not finite, or a decay is not in (0, 1].
    References:
      Kolesnikov and Lampert 2016, section 3.3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound.pooling import ranked_mean
      >>> print(ranked_mean(np.array([[0.0, 1.0], [1.0, 1.0]]), np.array([1.0, 0.9]), reference_cells=2))
      [0.5 1. ]
    """
    _, num_classes = check_shape("labels", labels, ("m", "K"), ONE_SET)
    check_shape("decays", decays, (num_classes,), "one decay per class, background first")
    check_number("reference_cells", reference_cells, minimum=1, remedy="41 * 41 is usual")
    check_finite("labels", labels, "look for a division by zero")
    check_finite("decays", decays, "use numbers just below 1", minimum=1e-30, maximum=1)
    labels = promote_float(labels)
    ranked, weights = ranks(labels, jnp.asarray(decays).astype(labels.dtype), reference_cells)
    return jnp.sum(weights * ranked, axis=0)


def ranks(labels: jax.Array, decays: jax.Array, reference_cells: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Each column from the largest on, and the weights of rank pooling, which sum to 1; without checks.

    Args:
      labels: [m, K] float.
      decays: [K] of the same type.
      reference_cells: see `ranked_mean`.
    Returns:
      [m, K] and [m, K].
    """
    num_pixels = len(labels)
    log_decay = jnp.log(decays) * (jnp.asarray(reference_cells, labels.dtype) / num_pixels)
    weights = jnp.exp(jnp.arange(num_pixels, dtype=labels.dtype)[:, None] * log_decay[None, :])
    return -jnp.sort(-labels, axis=0), weights / weights.sum(axis=0)


def log_absences(logits: jax.Array) -> jax.Array:
    r"""The log-probability of each class that no pixel has it; without checks.

    .. math:: \sum_j \log (1 - \phi_{jk})

    1 - phi of the most probable class is summed from the others, as it would round to 0.

    Args:
      logits: [m, K] unnormalised log-probabilities of q, float.
    Returns:
      [K], at most 0.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    is_top = jax.nn.one_hot(log_probs.argmax(axis=-1), log_probs.shape[-1], dtype=bool)
    others = jnp.where(is_top, -jnp.inf, log_probs)
    possible = others.max(axis=-1, keepdims=True) > -jnp.inf
    of_top = jax.nn.logsumexp(jnp.where(possible, others, 0), axis=-1, keepdims=True)
    of_others = jnp.log1p(-jnp.exp(jnp.where(is_top, -1.0, log_probs)))
    return jnp.sum(jnp.where(is_top, jnp.where(possible, of_top, _IMPOSSIBLE), of_others), axis=0)
