r"""Likelihoods log p(y | z, x) of the image tags given the pixel labels.

None has a trainable parameter. `labels` z is [m, K]: one-hot rows, or points of the simplex (relaxed samples,
probabilities), so that every function is defined and differentiable in between. `tags` y is [K] bool with
index 0 the background, which is always present. Except for `evidence`, the tags are independent given z,
y_k ~ Bernoulli(pi_k), and a function differs from the next in its pi_k:

.. math:: \log p(y|z,x) = \sum_k y_k \log \pi_k + (1 - y_k) \log (1 - \pi_k)

`TAG_LIKELIHOODS` do not look at the image; `IMAGE_LIKELIHOODS` take what a frozen classifier sees in it as
third argument: its class maps, or evidence made from them. Where the expectation of a likelihood under a factorised
q has a closed form, it stands in `EXPECTATIONS`.
"""

import math
import numbers

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.pixel_evidence import log_evidence
from lcrf_jax.numerics import check_number, check_shape, check_share, promote_float

_ONE_IMAGE = "pass one image, pixels flattened to one axis; for a batch use jax.vmap"
_TINY = 1e-6


def _checked(labels: ArrayLike, tags: ArrayLike) -> tuple[jax.Array, jax.Array]:
    _, num_classes = check_shape("labels", labels, ("m", "K"), _ONE_IMAGE)
    check_shape("tags", tags, (num_classes,), "one tag per class, background first")
    return promote_float(labels), jnp.asarray(tags, bool)


def _bernoulli(pi: jax.Array, tags: jax.Array) -> jax.Array:
    """Sum over classes of the log-probability of the tags, pi kept _TINY away from 0 and 1."""
    pi = jnp.clip(pi, _TINY, 1 - _TINY)
    return jnp.sum(jnp.where(tags, jnp.log(pi), jnp.log1p(-pi)))


def noisy_or(labels: ArrayLike, tags: ArrayLike, *, rho: ArrayLike = 0.1) -> jax.Array:
    r"""Every pixel of a class raises its tag with probability rho, independently.

    .. math:: \pi_k = 1 - \prod_j (1 - \rho z_{jk})

    Computed in the log domain; the pi of a present tag is kept above 1e-6. With many pixels it saturates: at
    initialisation every pi_k is close to 1.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      rho: probability in (0, 1) that one pixel raises the tag.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit or rho is not in (0, 1).
    References:
      Pearl 1988, the noisy-or gate.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import noisy_or
      >>> labels, tags = np.eye(2)[[0, 0, 1]], np.array([True, True])
      >>> round(float(noisy_or(labels, tags, rho=0.5)), 3)
      -0.981
    """
    labels, tags = _checked(labels, tags)
    check_share("rho", rho, "use a probability between 0 and 1")
    if isinstance(rho, numbers.Real) and rho == 1:
        raise ValueError(f"rho: expected a probability below 1, got {rho}; for a hard or use max_pool")
    log_absent = jnp.sum(jnp.log1p(-(labels * rho)), axis=0)
    # log(1 - exp(x)) for x <= 0; the bound keeps value and gradient finite where no pixel has the class.
    log_present = jnp.log(-jnp.expm1(jnp.minimum(log_absent, math.log1p(-_TINY))))
    return jnp.sum(jnp.where(tags, log_present, log_absent))


def _check_flip_probability(value):
    if isinstance(value, numbers.Real) and not 0 < value < 0.5:
        raise ValueError(f"flip_probability: expected a number in (0, 0.5), got {value}; 1e-6 is almost never")


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
      ValueError: if the shapes do not fit or epsilon is out of range.
    References:
      Pathak et al. 2015, multi-class multiple instance learning.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import max_pool
      >>> labels, tags = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, True])
      >>> round(float(max_pool(labels, tags)), 3)
      -0.329
    """
    labels, tags = _checked(labels, tags)
    _check_flip_probability(flip_probability)
    largest = labels.max(axis=0)
    # Both cases are computed directly: 1 - pi would lose the digits of a small epsilon.
    right = jnp.where(tags, largest, 1 - largest)
    return jnp.sum(jnp.log(flip_probability + (1 - 2 * flip_probability) * right))


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
      ValueError: if the shapes do not fit or epsilon is out of range.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import expected_max_pool
      >>> logits, tags = np.zeros((8, 2)), np.array([True, True])
      >>> round(float(expected_max_pool(logits, tags, flip_probability=0.01)), 3)
      -0.056
    """
    logits, tags = _checked(logits, tags)
    _check_flip_probability(flip_probability)
    # Kept just below 0, so that the log-probability of absence stays finite where a pixel is certain of a class.
    log_probs = jnp.minimum(jax.nn.log_softmax(logits, axis=-1), -1e-7)
    absent = jnp.exp(jnp.sum(jnp.log(-jnp.expm1(log_probs)), axis=0))
    right = jnp.where(tags, 1 - absent, absent)
    return jnp.sum(right * jnp.log1p(jnp.negative(flip_probability)) + (1 - right) * jnp.log(flip_probability))


def log_mean_exp(labels: ArrayLike, tags: ArrayLike, *, sharpness: ArrayLike = 5.0) -> jax.Array:
    r"""A smooth maximum over the pixels.

    .. math:: \pi_k = \frac1r \log \frac1m \sum_j \exp(r z_{jk})

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      sharpness: r > 0; 0 is the mean, infinity the maximum.
    Returns:
      Scalar, float32, nats; pi is kept 1e-6 away from 0 and 1.
    Raises:
      ValueError: if the shapes do not fit or the sharpness is not positive.
    References:
      Pinheiro and Collobert 2015.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import log_mean_exp
      >>> labels, tags = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, True])
      >>> round(float(log_mean_exp(labels, tags)), 3)
      -0.669
    """
    labels, tags = _checked(labels, tags)
    check_number("sharpness", sharpness, minimum=0, strict=True, remedy="5 is usual")
    pooled = jax.nn.logsumexp(sharpness * labels, axis=0) - jnp.log(labels.shape[0])
    return _bernoulli(pooled / sharpness, tags)


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
      ValueError: if the shapes do not fit, beta is not positive or a share is not in (0, 1].
    References:
      Pathak, Krahenbuhl and Darrell 2015, for constraints on the area.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import area
      >>> labels, tags = np.eye(3)[[0, 0, 1]], np.array([True, True, False])
      >>> round(float(area(labels, tags)), 3)
      -0.137
    """
    labels, tags = _checked(labels, tags)
    check_number("beta", beta, minimum=0, strict=True, remedy="20 is usual")
    check_share("foreground_share", foreground_share, "use a share of the image, say 0.1")
    check_share("background_share", background_share, "use a share of the image, say 0.3")
    alpha = jnp.where(jnp.arange(labels.shape[1]) == 0, background_share, foreground_share)
    logits = beta * (labels.mean(axis=0) - alpha)
    return jnp.sum(jax.nn.log_sigmoid(jnp.where(tags, logits, -logits)))


def ranked_mean(labels: ArrayLike, decays: ArrayLike, *, reference_cells: ArrayLike = 1681) -> jax.Array:
    r"""Global weighted rank pooling of each class: its i-th most certain pixel counts d^(i-1).

    .. math:: G_k = \sum_i d_k^{i-1} z_{(i)k} \Big/ \sum_i d_k^{i-1}

    On m cells d^(reference_cells / m) is used, so that the same share of the image is meant at every resolution.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      decays: [K] d of each class, in (0, 1].
      reference_cells: number of cells for which the decays are given (41 x 41 in the source).
    Returns:
      [K] float32, each between the mean and the maximum of its column.
    Raises:
      ValueError: if the shapes do not fit.
    References:
      Kolesnikov and Lampert 2016, section 3.3.
    """
    num_pixels, num_classes = check_shape("labels", labels, ("m", "K"), _ONE_IMAGE)
    check_shape("decays", decays, (num_classes,), "one decay per class, background first")
    log_decay = jnp.log(decays) * reference_cells / num_pixels
    weights = jnp.exp(jnp.arange(num_pixels, dtype=log_decay.dtype)[:, None] * log_decay[None, :])
    ranked = -jnp.sort(-promote_float(labels), axis=0)
    return jnp.sum(weights * ranked, axis=0) / weights.sum(axis=0)


def gwrp(
    labels: ArrayLike,
    tags: ArrayLike,
    *,
    foreground_decay: ArrayLike = 0.996,
    background_decay: ArrayLike = 0.999,
    reference_cells: ArrayLike = 1681,
) -> jax.Array:
    r"""Global weighted rank pooling: the i-th most certain pixel counts d^(i-1).

    .. math:: \pi_k = \sum_i d_k^{i-1} z_{(i)k} \Big/ \sum_i d_k^{i-1}

    The decays are those of a grid of `reference_cells`; on m cells d^(reference_cells / m) is used, so that
    the same share of the image is meant at every resolution.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool.
      foreground_decay: d of the foreground classes, in (0, 1]; 1 is the mean.
      background_decay: d of the background, in (0, 1].
      reference_cells: number of cells for which the decays are given (41 x 41 in the source).
    Returns:
      Scalar, float32, nats; pi is kept 1e-6 away from 0 and 1.
    Raises:
      ValueError: if the shapes do not fit or a decay is not in (0, 1].
    References:
      Kolesnikov and Lampert 2016, section 3.3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import gwrp
      >>> labels, tags = np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([True, True])
      >>> round(float(gwrp(labels, tags)), 3)
      -0.625
    """
    labels, tags = _checked(labels, tags)
    check_share("foreground_decay", foreground_decay, "use a number just below 1")
    check_share("background_decay", background_decay, "use a number just below 1")
    check_number("reference_cells", reference_cells, minimum=1, remedy="41 * 41 is usual")
    decay = jnp.where(jnp.arange(labels.shape[1]) == 0, background_decay, foreground_decay)
    return _bernoulli(ranked_mean(labels, decay, reference_cells=reference_cells), tags)


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
      ValueError: if the shapes do not fit or the scale is negative.
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
    labels, tags = _checked(labels, tags)
    num_pixels, num_foreground = labels.shape[0], labels.shape[1] - 1
    check_shape("class_maps", class_maps, (num_pixels, num_foreground), "one map per foreground class")
    if jnp.ndim(bias):
        check_shape("bias", bias, (num_foreground,), "one bias per foreground class, or one number for all")
    check_number("scale", scale, minimum=0, remedy="1 is the classifier as it was fitted")
    logits = scale * jnp.mean(labels[:, 1:] * promote_float(class_maps), axis=0) + promote_float(bias)
    return jnp.sum(jax.nn.log_sigmoid(jnp.where(tags[1:], logits, -logits)))


def evidence(labels: ArrayLike, tags: ArrayLike, pixel_evidence: ArrayLike) -> jax.Array:
    r"""A product over pixels of the evidence that a frozen classifier gives to their labels.

    .. math:: \log p(y|z,x) = \sum_j \log \sum_k z_{jk}\, e_{jk}(x, y)

    The tags act through the evidence, which suppresses absent classes; see `class_evidence`. The sum over the
    classes is kept above 1e-12.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] bool; checked for its shape only.
      pixel_evidence: [m, K] positive evidence.
    Returns:
      Scalar, float32, nats, not divided by m.
    Raises:
      ValueError: if the shapes do not fit.
    References:
      The original leaves p(y|z,x) open; this factorised form is ours.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import evidence
      >>> labels, tags = np.eye(2)[[0, 1]], np.array([True, True])
      >>> round(float(evidence(labels, tags, np.array([[0.9, 0.1], [0.4, 0.6]]))), 3)
      -0.616
    """
    labels, _ = _checked(labels, tags)
    check_shape("pixel_evidence", pixel_evidence, labels.shape, "evidence and labels lie on the same grid")
    return jnp.sum(log_evidence(jnp.sum(labels * promote_float(pixel_evidence), axis=1)))


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
      ValueError: if the shapes do not fit.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax.bound import expected_evidence
      >>> logits, tags = np.zeros((2, 2)), np.array([True, True])
      >>> round(float(expected_evidence(logits, tags, np.array([[0.9, 0.1], [0.4, 0.6]]))), 3)
      -1.918
    """
    logits, _ = _checked(logits, tags)
    check_shape("pixel_evidence", pixel_evidence, logits.shape, "evidence and logits lie on the same grid")
    return jnp.sum(jax.nn.softmax(logits, axis=-1) * log_evidence(pixel_evidence))


TAG_LIKELIHOODS = {
    "area": area,
    "gwrp": gwrp,
    "log_mean_exp": log_mean_exp,
    "max_pool": max_pool,
    "noisy_or": noisy_or,
}

IMAGE_LIKELIHOODS = {"evidence": evidence, "frozen_classifier": frozen_classifier}
EXPECTATIONS = {"evidence": expected_evidence, "max_pool": expected_max_pool}
