r"""Likelihoods log p(y | z, x) of the image tags given the pixel labels.

None has a trainable parameter. `labels` z is [m, K]: one-hot rows, or points of the simplex (relaxed samples,
probabilities), so that every function is defined and differentiable in between. `tags` y is [K] bool with
index 0 the background, which is always present. Except for `evidence`, the tags are independent given z,
y_k ~ Bernoulli(pi_k), and a function differs from the next in its pi_k:

.. math:: \log p(y|z,x) = \sum_k y_k \log \pi_k + (1 - y_k) \log (1 - \pi_k)

`TAG_LIKELIHOODS` do not look at the image; `IMAGE_LIKELIHOODS` take what a frozen classifier sees in it as
third argument: its class maps, or evidence made from them. Where the expectation of a likelihood under a factorised
q has a closed form, it stands in `EXPECTATIONS`.

No probability is quite 0 or 1: pi is mixed with a little epsilon, 1e-6 unless said otherwise, so that value and
gradient are finite everywhere, and the gradient is not 0 where a tag is far from what the labels imply.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import by_class, checked_labels, checked_logits
from lcrf_jax.bound.pixel_evidence import LEAST_EVIDENCE, check_evidence
from lcrf_jax.bound.pooling import log_absences, ranks, smooth_maximum_parts
from lcrf_jax.numerics import (
    check_finite,
    check_number,
    check_shape,
    check_share,
    known_number,
    promote_together,
)

_EPSILON = 1e-6


def _bernoulli(pi: jax.Array, rest: jax.Array, tags: jax.Array) -> jax.Array:
    """Sum over classes of the log-probability of the tags. `rest` is 1 - pi, made without loss of digits."""
    right = jnp.where(tags, pi, rest)
    return jnp.sum(jnp.log(_EPSILON + (1 - 2 * _EPSILON) * right))


def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, exact near 0; far from it the derivative of expm1, 1 + expm1(x), would round to 0."""
    return jnp.where(x > -1, -jnp.expm1(jnp.maximum(x, -1)), 1 - jnp.exp(x))


def noisy_or(labels: ArrayLike, tags: ArrayLike, *, rho: ArrayLike = 0.1) -> jax.Array:
    r"""Every pixel of a class raises its tag with probability rho, independently.

    .. math:: \pi_k = 1 - (1 - \epsilon) \prod_j (1 - \rho z_{jk}), \qquad \epsilon = 10^{-6}

    Computed in the log domain. Epsilon is a leak: the probability of a tag that no pixel raises. With many pixels pi
    saturates: at initialisation every pi_k is close to 1.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      rho: probability in (0, 1 - 1e-6] that one pixel raises the tag.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, a row of labels is not on the simplex, or rho is out of range.
    References:
      Pearl 1988, the noisy-or gate and its leak.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import noisy_or
      >>> labels, tags = np.eye(2)[[0, 0, 1]], np.array([True, True])
      >>> round(float(noisy_or(labels, tags, rho=0.5)), 3)
      -0.981
    """
    labels, tags = checked_labels(labels, tags)
    check_share("rho", rho, "use a probability between 0 and 1")
    known = known_number(rho)
    if known is not None and known > 1 - _EPSILON:
        raise ValueError(f"rho: expected a probability below 1, got {known}; for a hard or use max_pool")
    rho = jnp.asarray(rho, labels.dtype)
    log_absent = jnp.log1p(-_EPSILON) + jnp.sum(jnp.log1p(-(labels * rho)), axis=0)
    return jnp.sum(jnp.where(tags, jnp.log(_one_minus_exp(log_absent)), log_absent))


def _check_flip_probability(value):
    known, remedy = known_number(value), "1e-6 is almost never"
    if known is not None and not 1e-30 <= known < 0.5:
        raise ValueError(f"flip_probability: expected a number in (0, 0.5), got {known}; {remedy}")
    check_number("flip_probability", value, minimum=0, remedy=remedy)


def max_pool(labels: ArrayLike, tags: ArrayLike, *, flip_probability: ArrayLike = 1e-6) -> jax.Array:
    r"""A tag is as likely as the most certain pixel of its class; on one-hot labels a hard or.

    .. math:: \pi_k = \epsilon + (1 - 2 \epsilon) \max_j z_{jk}

    Each tag differs from what the labels imply with probability epsilon.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      flip_probability: epsilon in (0, 0.5).
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, a row of labels is not on the simplex, or epsilon is out of range.
    References:
      Pathak et al. 2015, multi-class multiple instance learning.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import max_pool
      >>> labels, tags = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, True])
      >>> round(float(max_pool(labels, tags)), 3)
      -0.329
    """
    _check_flip_probability(flip_probability)
    labels, tags = checked_labels(labels, tags)
    flip = jnp.asarray(flip_probability, labels.dtype)
    largest = labels.max(axis=0)
    # Both cases are computed directly: 1 - pi would lose the digits of a small epsilon.
    right = jnp.where(tags, largest, 1 - largest)
    # Labels may exceed 1 by their rounding, and by more than a tiny epsilon.
    return jnp.sum(jnp.log(jnp.maximum(flip + (1 - 2 * flip) * right, flip / 2)))


def expected_max_pool(logits: ArrayLike, tags: ArrayLike, *, flip_probability: ArrayLike = 1e-6) -> jax.Array:
    r"""E_q of `max_pool` over exact, that is one-hot, labels: closed form.

    .. math:: \sum_k P_k \log \pi(y_k | 1) + (1 - P_k) \log \pi(y_k | 0), \qquad
              P_k = 1 - \prod_j (1 - \phi_{jk})

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      tags: [K] bool.
      flip_probability: epsilon in (0, 0.5).
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, `logits` are none, or epsilon is out of range.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import expected_max_pool
      >>> logits, tags = np.zeros((8, 2)), np.array([True, True])
      >>> round(float(expected_max_pool(logits, tags, flip_probability=0.01)), 3)
      -0.056
    """
    _check_flip_probability(flip_probability)
    logits, tags = checked_logits(logits, tags)
    flip = jnp.asarray(flip_probability, logits.dtype)
    log_absent = log_absences(logits)
    right = jnp.where(tags, _one_minus_exp(log_absent), jnp.exp(log_absent))
    return jnp.sum(right * jnp.log1p(-flip) + (1 - right) * jnp.log(flip))


def log_mean_exp(labels: ArrayLike, tags: ArrayLike, *, sharpness: ArrayLike = 5.0) -> jax.Array:
    r"""A smooth maximum over the pixels.

    .. math:: \pi_k = \epsilon + (1 - 2 \epsilon)\, \frac1r \log \frac1m \sum_j \exp(r z_{jk}), \qquad
              \epsilon = 10^{-6}

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      sharpness: r > 0; the mean for r towards 0, the maximum for large r.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, a row of labels is not on the simplex, or the sharpness is not positive.
    References:
      Pinheiro and Collobert 2015.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import log_mean_exp
      >>> labels, tags = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, True])
      >>> round(float(log_mean_exp(labels, tags)), 3)
      -0.669
    """
    labels, tags = checked_labels(labels, tags)
    check_number("sharpness", sharpness, minimum=0, strict=True, remedy="5 is usual")
    largest, below = smooth_maximum_parts(labels, jnp.asarray(sharpness, labels.dtype))
    return _bernoulli(largest + below, (1 - largest) - below, tags)


def area(
    labels: ArrayLike,
    tags: ArrayLike,
    *,
    beta: ArrayLike = 20.0,
    foreground_share: ArrayLike = 0.1,
    background_share: ArrayLike = 0.3,
) -> jax.Array:
    r"""A tag is likely once its class covers enough of the image.

    .. math:: \pi_k = \sigma(\beta\,(\tfrac1m \textstyle\sum_j z_{jk} - \alpha_k))

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      beta: steepness, > 0.
      foreground_share: alpha_k of every foreground class, a share of the image.
      background_share: alpha_0.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, a row of labels is not on the simplex, beta is not positive or a share is not
        in (0, 1].
    References:
      Pathak, Krahenbuhl and Darrell 2015, for constraints on the area.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import area
      >>> labels, tags = np.eye(3)[[0, 0, 1]], np.array([True, True, False])
      >>> round(float(area(labels, tags)), 3)
      -0.137
    """
    labels, tags = checked_labels(labels, tags)
    check_number("beta", beta, minimum=0, strict=True, remedy="20 is usual")
    check_share("foreground_share", foreground_share, "use a share of the image, say 0.1")
    check_share("background_share", background_share, "use a share of the image, say 0.3")
    num_classes, dtype = labels.shape[1], labels.dtype
    alpha = by_class(num_classes, background=background_share, foreground=foreground_share, dtype=dtype)
    logits = jnp.asarray(beta, dtype) * (labels.mean(axis=0) - alpha)
    return jnp.sum(jax.nn.log_sigmoid(jnp.where(tags, logits, -logits)))


def gwrp(
    labels: ArrayLike,
    tags: ArrayLike,
    *,
    foreground_decay: ArrayLike = 0.996,
    background_decay: ArrayLike = 0.999,
    reference_cells: ArrayLike = 1681,
) -> jax.Array:
    r"""Global weighted rank pooling: the i-th most certain pixel counts d^(i-1).

    .. math:: \pi_k = \epsilon + (1 - 2 \epsilon) \sum_i d_k^{i-1} z_{(i)k} \Big/ \sum_i d_k^{i-1}, \qquad
              \epsilon = 10^{-6}

    The decays are those of a grid of `reference_cells`; on m cells d^(reference_cells / m) is used, so that
    the same share of the image is meant at every resolution.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      foreground_decay: d of the foreground classes, in (0, 1]; 1 is the mean.
      background_decay: d of the background, in (0, 1].
      reference_cells: number of cells for which the decays are given (41 x 41 in the source).
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, a row of labels is not on the simplex, or a decay is not in (0, 1].
    References:
      Kolesnikov and Lampert 2016, section 3.3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import gwrp
      >>> labels, tags = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, True])
      >>> round(float(gwrp(labels, tags)), 3)
      -0.625
    """
    labels, tags = checked_labels(labels, tags)
    check_share("foreground_decay", foreground_decay, "use a number just below 1")
    check_share("background_decay", background_decay, "use a number just below 1")
    check_number("reference_cells", reference_cells, minimum=1, remedy="41 * 41 is usual")
    decays = by_class(labels.shape[1], background=background_decay, foreground=foreground_decay, dtype=labels.dtype)
    ranked, weights = ranks(labels, decays, reference_cells)
    return _bernoulli(jnp.sum(weights * ranked, axis=0), jnp.sum(weights * (1 - ranked), axis=0), tags)


def frozen_classifier(
    labels: ArrayLike, tags: ArrayLike, class_maps: ArrayLike, *, bias: ArrayLike, scale: ArrayLike = 1.0
) -> jax.Array:
    r"""A frozen linear classifier, pooled over the pixels with the label of its class.

    .. math:: \pi_k = \sigma\Bigl(\frac{s}{m} \sum_j z_{jk}\, c_{jk} + b_k\Bigr), \qquad
              c_{jk} = w_k^\top F_j(x)

    Background has no classifier and no factor.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      class_maps: [m, K - 1] maps c of the foreground classes, without bias.
      bias: [K - 1] or scalar b.
      scale: s >= 0; 1 is the classifier as it was fitted on whole images.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, a row of labels is not on the simplex, a map or bias is not finite, or the
        scale is negative.
    References:
      Zhou et al. 2016, for the maps.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import frozen_classifier
      >>> labels, tags = np.eye(2)[[0, 1]], np.array([True, True])
      >>> class_maps = np.array([[0.0], [6.0]])  # one foreground class, strong at the second pixel
      >>> round(float(frozen_classifier(labels, tags, class_maps, bias=-1.0)), 3)
      -0.127
    """
    labels, tags = checked_labels(labels, tags)
    num_pixels, num_foreground = labels.shape[0], labels.shape[1] - 1
    check_shape("class_maps", class_maps, (num_pixels, num_foreground), "one map per foreground class")
    check_finite("class_maps", class_maps, "look for a division by zero")
    if np.ndim(bias):
        check_shape("bias", bias, (num_foreground,), "one bias per foreground class, or one number for all")
    check_finite("bias", bias, "give that of the classifier")
    check_number("scale", scale, minimum=0, remedy="1 is the classifier as it was fitted")
    labels, class_maps, bias = promote_together(labels, class_maps, bias)
    logits = jnp.asarray(scale, labels.dtype) * jnp.mean(labels[:, 1:] * class_maps, axis=0) + bias
    return jnp.sum(jax.nn.log_sigmoid(jnp.where(tags[1:], logits, -logits)))


def evidence(labels: ArrayLike, tags: ArrayLike, pixel_evidence: ArrayLike) -> jax.Array:
    r"""A product over pixels of the evidence that a frozen classifier gives to their labels.

    .. math:: \log p(y|z,x) = \sum_j \log \sum_k z_{jk}\, e_{jk}(x, y)

    The tags act through the evidence, which suppresses absent classes; see `class_evidence`. 1e-12 is added to the sum
    over the classes.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool; checked for its shape only.
      pixel_evidence: [m, K] positive evidence.
    Returns:
      Scalar, float32, nats, not divided by m.
    Raises:
      ValueError: if the shapes do not fit, a row of labels is not on the simplex, or evidence is negative or not finite.
    References:
      The original leaves p(y|z,x) open; this factorised form is ours.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import evidence
      >>> labels, tags = np.eye(2)[[0, 1]], np.array([True, True])
      >>> round(float(evidence(labels, tags, np.array([[0.9, 0.1], [0.4, 0.6]]))), 3)
      -0.616
    """
    labels, _ = checked_labels(labels, tags)
    check_shape("pixel_evidence", pixel_evidence, labels.shape, "evidence and labels lie on the same grid")
    check_evidence(pixel_evidence)
    labels, found = promote_together(labels, pixel_evidence)
    return jnp.sum(jnp.log(jnp.sum(labels * found, axis=1) + LEAST_EVIDENCE))


def expected_evidence(logits: ArrayLike, tags: ArrayLike, pixel_evidence: ArrayLike) -> jax.Array:
    r"""E_q of `evidence` over exact, that is one-hot, labels: closed form.

    .. math:: \sum_j \sum_k \phi_{jk} \log e_{jk}

    By Jensen's inequality it is at most `evidence` of the probabilities. Its optimum under the bound is sharper.

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      tags: [K] bool; checked for its shape only.
      pixel_evidence: [m, K] positive evidence.
    Returns:
      Scalar, float32, nats, not divided by m.
    Raises:
      ValueError: if the shapes do not fit, `logits` are none, or evidence is negative or not finite.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import expected_evidence
      >>> logits, tags = np.zeros((2, 2)), np.array([True, True])
      >>> round(float(expected_evidence(logits, tags, np.array([[0.9, 0.1], [0.4, 0.6]]))), 3)
      -1.918
    """
    logits, _ = checked_logits(logits, tags)
    check_shape("pixel_evidence", pixel_evidence, logits.shape, "evidence and logits lie on the same grid")
    check_evidence(pixel_evidence)
    logits, found = promote_together(logits, pixel_evidence)
    return jnp.sum(jax.nn.softmax(logits, axis=-1) * jnp.log(found + LEAST_EVIDENCE))


TAG_LIKELIHOODS: dict[str, Callable[..., jax.Array]] = {
    "area": area,
    "gwrp": gwrp,
    "log_mean_exp": log_mean_exp,
    "max_pool": max_pool,
    "noisy_or": noisy_or,
}

IMAGE_LIKELIHOODS = {"evidence": evidence, "frozen_classifier": frozen_classifier}
EXPECTATIONS = {"evidence": expected_evidence, "max_pool": expected_max_pool}
