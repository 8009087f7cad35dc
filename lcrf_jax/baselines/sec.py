r"""Seed, expand and constrain (Kolesnikov and Lampert 2016): the three losses, and the cues of the first."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import by_class, checked_indices, checked_tags, class_axis
from lcrf_jax.bound.pooling import ranks
from lcrf_jax.crf.energy import KernelLike
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.crf.kernel import as_kernel, in_one_precision, pixels_within
from lcrf_jax.numerics import (
    ONE_SET,
    check_count,
    check_finite,
    check_logits,
    check_number,
    check_probs,
    check_shape,
    check_share,
    known_number,
    promote_float,
    promote_together,
)

NO_CUE = 255
_REFERENCE_CELLS = 1681  # 41 x 41, for which the decays are given


def floored_probs(logits: ArrayLike, *, min_prob: ArrayLike = 1e-4) -> jax.Array:
    r"""Softmax, mixed with a little of the uniform distribution: no probability is below `min_prob`.

    .. math:: f = \epsilon + (1 - K \epsilon)\, \mathrm{softmax}(g)

    Unlike a maximum with epsilon this sums to one and lets the gradient through.

    Args:
      logits: [..., K] unnormalised log-probabilities.
      min_prob: epsilon, in (0, 1 / K].
    Returns:
      [..., K] float32 probabilities; rows sum to one.
    Raises:
      ValueError: if `logits` are none or `min_prob` is out of range.
    References:
      Kolesnikov and Lampert 2016 keep probabilities above 1e-4; this form is ours.
    """
    num_classes = class_axis("logits", logits)
    check_number("min_prob", min_prob, minimum=0, strict=True, remedy="1e-4 is usual")
    known = known_number(min_prob)
    check_share("K * min_prob", None if known is None else num_classes * known, "1e-4 is usual")
    check_logits("logits", logits)
    logits = promote_float(logits)
    least = jnp.asarray(min_prob, logits.dtype)
    return jax.nn.softmax(logits, axis=-1) * (1 - num_classes * least) + least


def localisation_cues(
    class_maps: ArrayLike,
    peaks: ArrayLike,
    tags: ArrayLike,
    saliency: ArrayLike,
    *,
    foreground_level: ArrayLike = 0.2,
    background_share: float = 0.1,
) -> jax.Array:
    r"""Labels of the cells that serve as seeds.

    Cell j is a cue of a present foreground class k if c_jk > level * max_i c_ik. A cell that several classes claim goes
    to the class with the fewest cells. Cells that no class claims are cues of the background if they are among the
    given share with the least saliency (ties included).

    Args:
      class_maps: [m, K - 1] maps c of the foreground classes, without bias.
      peaks: [K - 1] maximum of each map over the whole image; a class whose peak is not positive has no cue.
      tags: [K] bool, index 0 is background.
      saliency: [m] any score that is higher where foreground is more likely.
      foreground_level: share of the peak, in (0, 1].
      background_share: share of the cells, in (0, 1]; a static number.
    Returns:
      [m] int32: class indices, 255 where there is no cue.
    Raises:
      ValueError: if the shapes do not fit, an array is not finite, or a share is out of range.
      TypeError: if `background_share` is no static number.
    References:
      Kolesnikov and Lampert 2016, section 3.2 and supplement.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import localisation_cues
      >>> maps, tags = np.array([[0.0], [0.1], [1.0]]), np.array([True, True])
      >>> localisation_cues(maps, maps.max(axis=0), tags, saliency=np.array([0.1, 0.5, 0.9])).tolist()
      [0, 255, 1]
    """
    num_pixels, num_foreground = check_shape("class_maps", class_maps, ("m", "K - 1"), ONE_SET)
    check_shape("peaks", peaks, (num_foreground,), "one maximum per foreground class")
    tags = checked_tags(tags, num_foreground + 1)
    check_shape("saliency", saliency, (num_pixels,), "one value per cell")
    check_share("foreground_level", foreground_level, "0.2 is usual")
    check_share("background_share", background_share, "0.1 is usual")
    share = known_number(background_share)
    if share is None:
        raise TypeError(f"background_share: expected a static number, got {background_share!r}; close over it")
    for name, array in (("class_maps", class_maps), ("peaks", peaks), ("saliency", saliency)):
        check_finite(name, array, "look for a division by zero")
    class_maps, peaks = promote_together(class_maps, peaks)
    claimed = (class_maps > jnp.asarray(foreground_level, peaks.dtype) * peaks) & (peaks > 0) & tags[1:]
    sizes = jnp.where(claimed, claimed.sum(axis=0), num_pixels + 1)
    foreground = 1 + jnp.argmin(sizes, axis=1).astype(jnp.int32)
    saliency = promote_float(saliency)
    rank = max(1, round(share * num_pixels))
    quiet = saliency <= jnp.sort(saliency)[rank - 1]
    return jnp.where(claimed.any(axis=1), foreground, jnp.where(quiet, 0, NO_CUE).astype(jnp.int32))


def seed_loss(probs: ArrayLike, cues: ArrayLike) -> jax.Array:
    r"""Seeding loss: cross-entropy at the cues.

    .. math:: -\frac{1}{|S|} \sum_{j \in S} \log f_{j c_j}

    Args:
      probs: [m, K] positive probabilities f, see `floored_probs`.
      cues: [m] integers; a value outside 0..K - 1 means no cue.
    Returns:
      Scalar, float32, nats; the mean over the cues, 0 if there is none.
    Raises:
      ValueError: if the shapes do not fit, or `probs` are none or not positive.
      TypeError: if `cues` are no integers.
    References:
      Kolesnikov and Lampert 2016, eq. 2.
    """
    num_pixels, _ = check_shape("probs", probs, ("m", "K"), ONE_SET)
    check_shape("cues", cues, (num_pixels,), "one label per cell, 255 where there is no cue")
    _check_positive(probs)
    return _seed_loss(promote_float(probs), checked_indices("cues", cues))


def _check_positive(probs):
    check_probs("probs", probs)
    check_finite("probs", probs, "keep them above 0, as floored_probs does", minimum=1e-30)


def _seed_loss(probs, cues):
    chosen = cues[:, None] == jnp.arange(probs.shape[1], dtype=cues.dtype)
    log_probs = jnp.log(probs)
    return -jnp.sum(jnp.where(chosen, log_probs, 0)) / jnp.maximum(chosen.sum(), 1).astype(log_probs.dtype)


def expand_loss(
    probs: ArrayLike, tags: ArrayLike, *, foreground_decay: ArrayLike = 0.996, background_decay: ArrayLike = 0.999
) -> jax.Array:
    r"""Expansion loss: present classes cover a part of the image, absent ones no pixel.

    .. math:: -\frac{1}{|y_+|} \sum_{k \in y_+} \log G_k(d_+)
              - \frac{1}{|y_-|} \sum_{k \in y_-} \log(1 - \max_j f_{jk}) - \log G_0(d_0)

    with y_+ the present and y_- the absent foreground classes and G global weighted rank pooling
    (`lcrf_jax.bound.pooling.ranked_mean`); an empty mean is 0.

    Args:
      probs: [m, K] probabilities f in (0, 1), see `floored_probs`.
      tags: [K] bool, index 0 is background, which counts as present in any case.
      foreground_decay: d_+ at 41 x 41 cells, in (0, 1].
      background_decay: d_0 at 41 x 41 cells, in (0, 1].
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, `probs` are none, one is 0 or 1, or a decay is out of range.
    References:
      Kolesnikov and Lampert 2016, eq. 3 to 5.
    """
    _, num_classes = check_shape("probs", probs, ("m", "K"), ONE_SET)
    tags = checked_tags(tags, num_classes)
    check_share("foreground_decay", foreground_decay, "0.996 is usual")
    check_share("background_decay", background_decay, "0.999 is usual")
    _check_positive(probs)
    if num_classes > 1:
        check_finite("probs", probs, "keep them below 1, as floored_probs does", maximum=1 - 1e-7)
    return _expand_loss(promote_float(probs), tags, foreground_decay, background_decay)


def _expand_loss(probs, tags, foreground_decay, background_decay):
    num_classes = len(tags)
    is_foreground = jnp.arange(num_classes) > 0
    decays = by_class(num_classes, background=background_decay, foreground=foreground_decay, dtype=probs.dtype)
    ranked, weights = ranks(probs, decays, _REFERENCE_CELLS)
    pooled = jnp.sum(weights * ranked, axis=0)
    present, absent = is_foreground & tags, is_foreground & ~tags

    def mean_over(chosen, values):
        return jnp.sum(jnp.where(chosen, values, 0)) / jnp.maximum(chosen.sum(), 1).astype(values.dtype)

    shown = mean_over(present, -jnp.log(pooled))
    # By index: the gradient of a maximum tests for equality, which fails if the compiler computes the values twice.
    peaks = jnp.take_along_axis(probs, jnp.argmax(probs, axis=0)[None], axis=0)[0]
    hidden = mean_over(absent, -jnp.log1p(-peaks))
    return shown + hidden - jnp.log(pooled[0])


def constrain_loss(probs: ArrayLike, kernel: KernelLike, *, num_iterations: int = 10) -> jax.Array:
    r"""Constrain-to-boundary loss: KL to the output's refinement by the dense CRF, which is held fixed.

    .. math:: \frac{1}{m} \sum_j \sum_k Q_{jk} \log \frac{Q_{jk}}{f_{jk}}

    Args:
      probs: [m, K] positive probabilities f, see `floored_probs`.
      kernel: pairwise kernel of the image, see `lcrf_jax.crf.inference.mean_field`.
      num_iterations: static number of mean-field updates; Q is mean field with log f as its unary.
    Returns:
      Scalar, float32, nats, the mean over the cells. No gradient flows through Q.
    Raises:
      ValueError: if the shapes do not fit, or `probs` are none or not positive.
    References:
      Kolesnikov and Lampert 2016, eq. 6; Krahenbuhl and Koltun 2011.
    """
    check_shape("probs", probs, (pixels_within(kernel), "K"), ONE_SET)
    num_iterations = check_count("num_iterations", num_iterations, minimum=0, remedy="10 is usual")
    _check_positive(probs)
    return _constrain_loss(promote_float(probs), kernel, num_iterations)


def _constrain_loss(probs, kernel, num_iterations):
    kernel, probs = in_one_precision(as_kernel(kernel), probs)
    log_probs = jnp.log(probs)
    log_refined = mean_field(jax.lax.stop_gradient(log_probs), kernel, num_iterations=num_iterations)
    # mean_field may give -inf, where Q is 0 and so is its part of the sum.
    log_refined = jax.lax.stop_gradient(jnp.maximum(log_refined, -1e4))
    return jnp.sum(jnp.exp(log_refined) * (log_refined - log_probs)) / len(log_probs)


def sec_loss(
    logits: ArrayLike,
    tags: ArrayLike,
    cues: ArrayLike,
    kernel: KernelLike,
    *,
    min_prob: ArrayLike = 1e-4,
    num_iterations: int = 10,
    foreground_decay: ArrayLike = 0.996,
    background_decay: ArrayLike = 0.999,
) -> jax.Array:
    r"""The sum of the three losses, weights 1 : 1 : 1.

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      tags: [K] bool.
      cues: [m] integers, see `localisation_cues`.
      kernel: pairwise kernel of the image.
      min_prob: see `floored_probs`.
      num_iterations: see `constrain_loss`.
      foreground_decay: d_+ at 41 x 41 cells, in (0, 1], see `expand_loss`.
      background_decay: d_0 at 41 x 41 cells, in (0, 1].
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit, `logits` are none, or a number is out of range.
      TypeError: if `cues` are no integers.
    References:
      Kolesnikov and Lampert 2016, eq. 1.
    Example:
      >>> import jax, numpy as np
      >>> from lcrf_jax import sec_loss
      >>> logits, kernel = np.array([[2.0, 0.0], [0.0, 2.0]]), 0.1 * np.ones((2, 2))
      >>> loss = jax.jit(sec_loss)(logits, tags=np.array([True, True]), cues=np.array([0, 255]), kernel=kernel)
      >>> round(float(loss), 2)
      0.71
    """
    num_pixels, num_classes = check_shape("logits", logits, (pixels_within(kernel), "K"), ONE_SET)
    tags = checked_tags(tags, num_classes)
    check_shape("cues", cues, (num_pixels,), "one label per cell, 255 where there is no cue")
    check_share("foreground_decay", foreground_decay, "0.996 is usual")
    check_share("background_decay", background_decay, "0.999 is usual")
    num_iterations = check_count("num_iterations", num_iterations, minimum=0, remedy="10 is usual")
    probs = floored_probs(logits, min_prob=min_prob)
    kernel, probs = in_one_precision(as_kernel(kernel), probs)
    seed = _seed_loss(probs, checked_indices("cues", cues))
    expand = _expand_loss(probs, tags, foreground_decay, background_decay)
    return seed + expand + _constrain_loss(probs, kernel, num_iterations)
