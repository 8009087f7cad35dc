r"""Seed, expand and constrain (Kolesnikov and Lampert 2016): the three losses, and the cues of the first."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.likelihoods import ranked_mean
from lcrf_jax.crf.energy import KernelLike
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.numerics import check_shape, check_share, promote_float

_ONE_SET = "flatten the pixels of one image to one axis; for a batch use jax.vmap"
NO_CUE = 255


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
      ValueError: if `min_prob` is out of range.
    References:
      Kolesnikov and Lampert 2016 keep probabilities above 1e-4; this form is ours.
    """
    num_classes = jnp.shape(logits)[-1]
    check_share("K * min_prob", num_classes * min_prob, "1e-4 is usual")
    return jax.nn.softmax(promote_float(logits), axis=-1) * (1 - num_classes * min_prob) + min_prob


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
      background_share: share of the cells, in (0, 1].
    Returns:
      [m] int32: class indices, 255 where there is no cue.
    Raises:
      ValueError: if the shapes do not fit or a share is out of range.
    References:
      Kolesnikov and Lampert 2016, section 3.2 and supplement.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import localisation_cues
      >>> maps, tags = np.array([[0.0], [0.1], [1.0]]), np.array([True, True])
      >>> localisation_cues(maps, maps.max(axis=0), tags, saliency=np.array([0.1, 0.5, 0.9])).tolist()
      [0, 255, 1]
    """
    num_pixels, num_foreground = check_shape("class_maps", class_maps, ("m", "K - 1"), _ONE_SET)
    check_shape("peaks", peaks, (num_foreground,), "one maximum per foreground class")
    check_shape("tags", tags, (num_foreground + 1,), "one tag per class, background first")
    check_shape("saliency", saliency, (num_pixels,), "one value per cell")
    check_share("foreground_level", foreground_level, "0.2 is usual")
    check_share("background_share", background_share, "0.1 is usual")
    peaks = promote_float(peaks)
    claimed = (promote_float(class_maps) > foreground_level * peaks) & (peaks > 0) & jnp.asarray(tags, bool)[1:]
    sizes = jnp.where(claimed, claimed.sum(axis=0), num_pixels + 1)
    foreground = 1 + jnp.argmin(sizes, axis=1)
    saliency = promote_float(saliency)
    rank = max(1, round(background_share * num_pixels))
    quiet = saliency <= jnp.sort(saliency)[rank - 1]
    return jnp.where(claimed.any(axis=1), foreground, jnp.where(quiet, 0, NO_CUE)).astype(jnp.int32)


def seed_loss(probs: ArrayLike, cues: ArrayLike) -> jax.Array:
    r"""Seeding loss: cross-entropy at the cues.

    .. math:: -\frac{1}{|S|} \sum_{j \in S} \log f_{j c_j}

    Args:
      probs: [m, K] positive probabilities f, see `floored_probs`.
      cues: [m] integers; a value outside 0..K - 1 means no cue.
    Returns:
      Scalar, float32, nats; the mean over the cues, 0 if there is none.
    Raises:
      ValueError: if the shapes do not fit.
    References:
      Kolesnikov and Lampert 2016, eq. 2.
    """
    num_pixels, num_classes = check_shape("probs", probs, ("m", "K"), _ONE_SET)
    check_shape("cues", cues, (num_pixels,), "one label per cell, 255 where there is no cue")
    cues = jnp.asarray(cues).astype(jnp.int32)
    chosen = cues[:, None] == jnp.arange(num_classes)
    log_probs = jnp.log(promote_float(probs))
    return -jnp.sum(jnp.where(chosen, log_probs, 0)) / jnp.maximum(chosen.sum(), 1).astype(log_probs.dtype)


def expand_loss(
    probs: ArrayLike, tags: ArrayLike, *, foreground_decay: ArrayLike = 0.996, background_decay: ArrayLike = 0.999
) -> jax.Array:
    r"""Expansion loss: present classes cover a part of the image, absent ones no pixel.

    .. math:: -\frac{1}{|y_+|} \sum_{k \in y_+} \log G_k(d_+)
              - \frac{1}{|y_-|} \sum_{k \in y_-} \log(1 - \max_j f_{jk}) - \log G_0(d_0)

    with y_+ the present and y_- the absent foreground classes and G global weighted rank pooling
    (`lcrf_jax.bound.likelihoods.ranked_mean`); an empty mean is 0.

    Args:
      probs: [m, K] probabilities f in (0, 1), see `floored_probs`.
      tags: [K] bool, index 0 is background, which counts as present in any case.
      foreground_decay: d_+ at 41 x 41 cells, in (0, 1].
      background_decay: d_0 at 41 x 41 cells, in (0, 1].
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if the shapes do not fit or a decay is out of range.
    References:
      Kolesnikov and Lampert 2016, eq. 3 to 5.
    """
    _, num_classes = check_shape("probs", probs, ("m", "K"), _ONE_SET)
    check_shape("tags", tags, (num_classes,), "one tag per class, background first")
    check_share("foreground_decay", foreground_decay, "0.996 is usual")
    check_share("background_decay", background_decay, "0.999 is usual")
    probs, tags = promote_float(probs), jnp.asarray(tags, bool)
    is_foreground = jnp.arange(num_classes) > 0
    pooled = ranked_mean(probs, jnp.where(is_foreground, foreground_decay, background_decay))
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
      ValueError: if the shapes do not fit.
    References:
      Kolesnikov and Lampert 2016, eq. 6; Krahenbuhl and Koltun 2011.
    """
    check_shape("probs", probs, ("m", "K"), _ONE_SET)
    log_probs = jnp.log(promote_float(probs))
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
    **decays: ArrayLike,
) -> jax.Array:
    r"""The sum of the three losses, weights 1 : 1 : 1.

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      tags: [K] bool.
      cues: [m] integers, see `localisation_cues`.
      kernel: pairwise kernel of the image.
      min_prob: see `floored_probs`.
      num_iterations: see `constrain_loss`.
      decays: keyword arguments of `expand_loss`.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: as the three losses.
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
    probs = floored_probs(logits, min_prob=min_prob)
    expand = expand_loss(probs, tags, **decays)
    return seed_loss(probs, cues) + expand + constrain_loss(probs, kernel, num_iterations=num_iterations)
