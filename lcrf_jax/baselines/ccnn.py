r"""Constrained optimisation of the latent labels (Pathak, Krahenbuhl and Darrell 2015)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.baselines.labels import mean_cross_entropy
from lcrf_jax.bound.arguments import by_class, check_scores, checked_tags
from lcrf_jax.numerics import check_count, check_number, check_share, known_number, promote_float, varying_like

_ABSENT = -1e9


class ConstrainedDistribution(NamedTuple):
    """The distribution closest to q whose class areas fit the tags.

    Attributes:
      log_probs: [m, K] log P.
      shifts: [K] what is added to the logits of each class; lambda of its lower minus that of its upper bound.
      residual: scalar >= 0, the largest violation of the optimality conditions, a share of the image; see
        `ccnn_distribution`.
    """

    log_probs: jax.Array
    shifts: jax.Array
    residual: jax.Array


def ccnn_distribution(
    logits: ArrayLike,
    tags: ArrayLike,
    *,
    foreground_share: ArrayLike = 0.05,
    background_least: ArrayLike = 0.3,
    background_most: ArrayLike = 0.7,
    slack: ArrayLike = 2.0,
    num_iterations: int = 30,
) -> ConstrainedDistribution:
    r"""The latent distribution: the least KL(P || Q) under linear constraints on the mean areas a_k of P.

    .. math:: a_k = 0 \text{ for absent } k, \quad a_k \ge \alpha - \xi_k \text{ for present foreground},
              \quad \beta_0 \le a_0 \le \beta_1

    with a cost of slack times xi_k. In the dual, P = softmax(g + s) with one shift s_k = lambda_k - lambda'_k for each
    class: lambda_k is the multiplier of its lower bound, lambda'_k that of its upper bound, and 0 <= lambda_k <= slack
    for the foreground. The dual problem is to minimise

    .. math:: \frac{1}{m} \sum_j \log \sum_k \exp(g_{jk} + s_k) - \sum_k \lambda_k b_k + \sum_k \lambda'_k b'_k

    The steps are those of generalised iterative scaling, s_k <- s_k + log(b_k / a_k), projected onto the bounds of
    lambda. Each step minimises an upper bound of the dual that touches it at the last s (log x <= x - 1), so no step
    size is needed. Nesterov's momentum accelerates the steps, and restarts when a step reverses direction. The residual
    measures the distance from the optimum: the largest area that a class lacks or has in excess, counted only where
    its shift may still move to correct it.

    Without foreground tags background is the only class, so its upper bound is dropped.

    Args:
      logits: [m, K] unnormalised log-probabilities of Q.
      tags: [K] bool, index 0 is background, which counts as present in any case.
      foreground_share: alpha, least area of a present foreground class, a share of the image.
      background_least: beta_0, least area of the background.
      background_most: beta_1, largest area of the background; at least beta_0.
      slack: largest lambda of the foreground classes: what a missing share costs.
      num_iterations: static number of steps.
    Returns:
      `ConstrainedDistribution`; no gradient flows through it.
    Raises:
      ValueError: if the shapes do not fit, `logits` are not finite or none, or a number is out of range.
    References:
      Pathak, Krahenbuhl and Darrell 2015, sections 4 and 5; Darroch and Ratcliff 1972, for the step; O'Donoghue and
      Candes 2015, for the restarts.
    Example:
      >>> import jax, numpy as np
      >>> from lcrf_jax import ccnn_distribution
      >>> logits, tags = np.array([[2.0, 0.0, 0.0]] * 4), np.array([True, True, False])
      >>> found = jax.jit(ccnn_distribution)(logits, tags)  # at most 0.7 background, none of the absent class
      >>> print(np.exp(found.log_probs).mean(axis=0).round(2))
      [0.7 0.3 0. ]
    """
    _, num_classes = check_scores(logits)
    tags = checked_tags(tags, num_classes)
    shares = {"foreground_share": foreground_share, "background_least": background_least}
    for name, share in {**shares, "background_most": background_most}.items():
        check_share(name, share, "give a share of the image")
    lower_bound = known_number(background_least)
    if lower_bound is not None:
        check_number("background_most", background_most, minimum=lower_bound, remedy="it is the upper bound")
    check_number("slack", slack, minimum=0, remedy="2 is usual")
    num_iterations = check_count("num_iterations", num_iterations, minimum=0, remedy="30 is usual")
    is_background = jnp.arange(num_classes) == 0
    present = tags | is_background
    logits = jax.lax.stop_gradient(promote_float(logits))
    dtype = logits.dtype
    # Less the largest of the present classes: no logit is then so low that an absent class would win.
    logits = logits - jnp.where(present, logits, -jnp.inf).max(axis=-1, keepdims=True)
    logits = jnp.where(present, logits, _ABSENT)
    least = by_class(num_classes, background=background_least, foreground=foreground_share, dtype=dtype)
    with_foreground = is_background & jnp.any(tags[1:])
    most = jnp.where(with_foreground, jnp.asarray(background_most, dtype), 1.0)
    # Background is hard on both sides; foreground has a lower bound with slack.
    highest = jnp.where(is_background, jnp.inf, jnp.where(present, jnp.asarray(slack, dtype), 0.0))
    lowest = jnp.where(with_foreground, jnp.asarray(-jnp.inf, dtype), 0.0)

    def areas(shifts):
        return jax.nn.softmax(logits + shifts, axis=-1).mean(axis=0)

    def scaled_step(shifts):
        log_areas = jnp.log(jnp.maximum(areas(shifts), 1e-30))
        up, down = shifts + jnp.log(least) - log_areas, shifts + jnp.log(most) - log_areas
        # At most one of the two multipliers of a class is not 0: the shift rises to reach `least` or falls to reach
        # `most`.
        moved = jnp.where(up > 0, up, jnp.where(down < 0, down, 0.0))
        return jnp.clip(moved, lowest, highest)

    def accelerated(_, state):
        last, before, momentum = state
        next_momentum = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        ahead = jnp.clip(last + (momentum - 1) / next_momentum * (last - before), lowest, highest)
        shifts = scaled_step(ahead)
        overshot = jnp.sum((ahead - shifts) * (shifts - last)) > 0
        return shifts, last, jnp.where(overshot, 1.0, next_momentum)

    start = varying_like(jnp.zeros_like(logits[0]), logits)
    shifts, _, _ = jax.lax.fori_loop(0, num_iterations, accelerated, (start, start, 1 + start[0]))
    found = areas(shifts)
    missing = jnp.where(shifts < highest, jnp.maximum(jnp.where(shifts < 0, most, least) - found, 0), 0)
    excess = jnp.where(shifts > lowest, jnp.maximum(found - jnp.where(shifts > 0, least, most), 0), 0)
    residual = jnp.max(jnp.where(present, jnp.maximum(missing, excess), 0))
    return ConstrainedDistribution(jax.nn.log_softmax(logits + shifts, axis=-1), shifts, residual)


def ccnn_loss(
    logits: ArrayLike,
    tags: ArrayLike,
    *,
    foreground_share: ArrayLike = 0.05,
    background_least: ArrayLike = 0.3,
    background_most: ArrayLike = 0.7,
    slack: ArrayLike = 2.0,
    num_iterations: int = 30,
) -> jax.Array:
    r"""Cross-entropy with the constrained latent distribution P, which is held fixed.

    .. math:: -\frac{1}{m} \sum_j \sum_k P_{jk} \log \phi_{jk}

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      tags: [K] bool.
      foreground_share: least area of a present foreground class, a share of the image, in (0, 1].
      background_least: least area of the background, in (0, 1].
      background_most: largest area of the background, in (0, 1], at least `background_least`.
      slack: what a missing share of a foreground class costs, >= 0.
      num_iterations: static number of steps towards P.
    Returns:
      Scalar, float32, nats, the mean over the cells. Its gradient in the logits is (phi - P) / m.
    Raises:
      ValueError: as `ccnn_distribution`.
    References:
      Pathak, Krahenbuhl and Darrell 2015, section 5.
    Example:
      >>> import jax, numpy as np
      >>> from lcrf_jax import ccnn_loss
      >>> logits, tags = np.array([[2.0, 0.0, 0.0]] * 4), np.array([True, True, False])
      >>> round(float(jax.jit(ccnn_loss)(logits, tags)), 2)
      0.84
    """
    latent = ccnn_distribution(
        logits,
        tags,
        foreground_share=foreground_share,
        background_least=background_least,
        background_most=background_most,
        slack=slack,
        num_iterations=num_iterations,
    )
    return mean_cross_entropy(promote_float(logits), jnp.exp(latent.log_probs))
