r"""From simple to complex (Wei et al. 2016): the targets of its three networks."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import checked_tags, class_axis
from lcrf_jax.numerics import ONE_SET, check_finite, check_shape, check_values, first_place, promote_float


def saliency_target(saliency: ArrayLike, tags: ArrayLike) -> jax.Array:
    r"""Target of the initial network: the salient pixels of an image with one tag belong to that class.

    .. math:: p_{jk} = s_j / |y_+| \text{ for the foreground tags } y_+, \qquad p_{j0} = 1 - s_j

    An image without foreground tags is background throughout. The method is meant for images with one.

    Args:
      saliency: [m] s in 0..1.
      tags: [K] bool, index 0 is background.
    Returns:
      [m, K] float32; rows sum to one.
    Raises:
      ValueError: if the shapes do not fit, or a saliency is not in 0..1.
    References:
      Wei et al. 2016, section 3.2.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import saliency_target
      >>> saliency_target(np.array([0.25, 1.0]), np.array([True, False, True])).tolist()
      [[0.75, 0.0, 0.25], [0.0, 0.0, 1.0]]
    """
    check_shape("saliency", saliency, ("m",), ONE_SET)
    check_finite("saliency", saliency, "bring it to 0..1, such as by its ranks", minimum=0, maximum=1)
    foreground = checked_tags(tags, "K").at[0].set(False)
    salient = jnp.where(foreground.any(), promote_float(saliency), 0)[:, None]
    foreground = foreground.astype(salient.dtype)
    share = foreground / jnp.maximum(foreground.sum(), 1)
    return salient * share + (1 - salient) * jax.nn.one_hot(0, len(foreground), dtype=salient.dtype)


def tagged_labels(logits: ArrayLike, tags: ArrayLike) -> jax.Array:
    """The most probable of the tagged classes: the training masks of the enhanced and the powerful network.

    Args:
      logits: [..., K] logits, log-probabilities or probabilities.
      tags: [K] bool, index 0 is background, which counts as tagged in any case.
    Returns:
      [...] int32 labels.
    Raises:
      ValueError: if the shapes do not fit, or a logit is NaN.
    References:
      Wei et al. 2016, sections 3.3 and 3.4.
    """
    tagged = checked_tags(tags, class_axis("logits", logits)).at[0].set(True)
    check_values("logits", logits, _fault_of_order)
    return jnp.where(tagged, jax.lax.stop_gradient(promote_float(logits)), -jnp.inf).argmax(axis=-1).astype(jnp.int32)


def _fault_of_order(values):
    """Whatever is ordered has a largest class; these may be logits or probabilities."""
    if not np.isnan(values).any():
        return None
    return f"expected numbers, got nan at {first_place(np.isnan(values))}; look for a division by zero"
