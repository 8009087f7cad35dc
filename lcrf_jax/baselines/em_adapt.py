r"""The E-step of EM with biases that adapt to each image (Papandreou et al. 2015); M-step: `label_cross_entropy`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import by_class, check_scores, checked_tags
from lcrf_jax.numerics import check_share, promote_float


def em_adapt_labels(
    key: jax.Array,
    logits: ArrayLike,
    tags: ArrayLike,
    *,
    foreground_share: ArrayLike = 0.2,
    background_share: ArrayLike = 0.4,
) -> jax.Array:
    r"""Hard labels; every present class in turn is given at least its share of the pixels.

    Class by class, background first and then the present classes in random order, a bias b_l >= 0 is added to the
    scores f(l): the least one for which a share rho_l of the pixels takes the class,

    .. math:: b_l = \text{the } \lceil \rho_l m \rceil\text{-th smallest of } \max_{l'} f_j(l') - f_j(l)

    with the maximum over the present classes and the biases given so far. Absent classes get no pixel. A later class
    may take pixels from an earlier one.

    Args:
      key: PRNG key, for the order of the classes.
      logits: [m, K] scores f of the pixels.
      tags: [K] bool, index 0 is background, which counts as present in any case.
      foreground_share: rho of the foreground classes, in (0, 1].
      background_share: rho of the background, in (0, 1].
    Returns:
      [m] int32 labels.
    Raises:
      ValueError: if the shapes do not fit, `logits` are not finite or none, or a share is not in (0, 1].
    References:
      Papandreou, Chen, Murphy and Yuille 2015, algorithm 1 and section 3.2 (EM-Adapt).
    Example:
      >>> import jax
      >>> from lcrf_jax import em_adapt_labels
      >>> logits, tags = jax.numpy.array([[5.0, 1.0], [5.0, 4.0], [5.0, 3.0]]), jax.numpy.array([True, True])
      >>> jax.jit(em_adapt_labels)(jax.random.key(0), logits, tags).tolist()
      [0, 1, 0]
    """
    num_pixels, num_classes = check_scores(logits)
    present = checked_tags(tags, num_classes).at[0].set(True)
    for name, share in (("foreground_share", foreground_share), ("background_share", background_share)):
        check_share(name, share, "give a share of the image, 0.2 or 0.4")
    scores = jax.lax.stop_gradient(promote_float(logits))
    shares = by_class(num_classes, background=background_share, foreground=foreground_share, dtype=scores.dtype)
    ranks = jnp.ceil(shares * num_pixels).astype(jnp.int32)
    others = 1 + jax.random.permutation(key, num_classes - 1)
    order = jnp.concatenate([jnp.zeros(1, jnp.int32), others.astype(jnp.int32)])
    suppressed = jnp.where(present, scores, -jnp.inf)

    def claim(turn, state):
        top, labels = state
        label = order[turn]
        deficit = top - scores[:, label]
        bias = jnp.sort(deficit)[ranks[label] - 1]
        # Compare deficits, not biased scores, which may round to a tie. With a bias of 0 no label changes.
        takes = present[label] & (deficit <= bias) & (bias > 0)
        return jnp.where(takes, scores[:, label] + bias, top), jnp.where(takes, label, labels)

    start = suppressed.max(axis=1), suppressed.argmax(axis=1).astype(jnp.int32)
    return jax.lax.fori_loop(0, num_classes, claim, start)[1]
