r"""Samples of factorised categorical distributions, relaxed and exact.

Every sample adds Gumbel noise to the logits; the largest one is then a sample of softmax(logits). The noise of
pixels is independent, or shared within groups of them: the distribution of each single pixel is the same either way.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import check_indices, class_axis
from lcrf_jax.numerics import check_count, check_logits, check_number, check_shape, native, promote_float


def block_groups(height: int, width: int, block: int) -> jax.Array:
    """The groups of a grid in square blocks, for samples whose noise is constant within a block.

    Args:
      height: rows of the grid.
      width: columns of the grid.
      block: side of a block in cells, >= 1; blocks at the lower and the right border may be cut off.
    Returns:
      [height * width] int32, the number of the block of each cell, rows first.
    Raises:
      ValueError: if a size is smaller than 1 or not whole.
      TypeError: if a size is no static number.
    Example:
      >>> from lcrf_jax import block_groups
      >>> block_groups(2, 4, block=2).reshape(2, 4).tolist()
      [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    remedy = "sizes are in cells; a block of 1 is a group for each cell"
    height, width, block = (
        check_count(name, value, minimum=1, remedy=remedy)
        for name, value in (("height", height), ("width", width), ("block", block))
    )
    rows, columns = jnp.arange(height) // block, jnp.arange(width) // block
    return (rows[:, None] * -(-width // block) + columns).reshape(-1).astype(jnp.int32)


def check_samples(logits: ArrayLike, groups: ArrayLike | None = None) -> None:
    """Refuse logits, or groups of their pixels, that cannot be sampled from.

    Args:
      logits: [..., K] unnormalised log-probabilities of q.
      groups: [m] int in 0..m-1, for logits [m, K], or None.
    Raises:
      ValueError: if there is no class axis, `logits` are none where they are known, or the groups do not fit.
      TypeError: if the groups are no integers.
    """
    class_axis("logits", logits)
    check_logits("logits", logits)
    if groups is None:
        return
    remedy = "groups are of the pixels of one image; for a batch use vmap"
    num_pixels, _ = check_shape("logits", logits, ("m", "K"), remedy)
    remedy = "give the number of a group, below m, for each pixel"
    check_shape("groups", groups, (num_pixels,), remedy)
    check_indices("groups", groups, num_pixels, remedy)


def check_temperature(temperature: ArrayLike) -> None:
    """Refuse a temperature that is not positive, where it is known.

    Args:
      temperature: tau.
    Raises:
      ValueError: if it is not positive and finite.
      TypeError: if it is no number.
    """
    check_number("temperature", temperature, minimum=0, strict=True, remedy="for exact samples use categorical")


def _perturbed(key: jax.Array, logits: ArrayLike, groups: ArrayLike | None = None) -> jax.Array:
    """Logits plus Gumbel noise, at least in float32; rows of one group have the same noise."""
    logits = promote_float(logits)
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    if groups is None:
        return logits + noise
    return logits + noise[jnp.asarray(native(groups))]


def _relaxed(perturbed: jax.Array, temperature: ArrayLike) -> jax.Array:
    """softmax(perturbed / temperature); the largest is taken off first, so that no quotient overflows."""
    largest = jax.lax.stop_gradient(perturbed.max(axis=-1, keepdims=True))
    return jax.nn.softmax((perturbed - largest) / jnp.asarray(temperature, perturbed.dtype), axis=-1)


def gumbel_softmax(
    key: jax.Array, logits: ArrayLike, *, temperature: ArrayLike, groups: ArrayLike | None = None
) -> jax.Array:
    r"""One relaxed sample of every categorical distribution.

    .. math:: \bar z_{jk} = \mathrm{softmax}_k\,((g_{jk} + \epsilon_{jk}) / \tau), \quad
              \epsilon \sim \mathrm{Gumbel}(0, 1)

    Its largest entry is an exact sample of q at any temperature.

    Args:
      key: PRNG key.
      logits: [..., K] unnormalised log-probabilities of q, K >= 1; -inf is allowed, but not in every class.
      temperature: tau > 0. As tau -> 0 the sample becomes one-hot and the variance of its gradient grows.
      groups: [m] int in 0..m-1, for logits [m, K]: pixels with the same number share their noise, see
        `block_groups`; None is independent noise.
    Returns:
      [..., K] float32, not negative, sums to one over the last axis.
    Raises:
      ValueError: if `logits` has no class axis or holds NaN, infinity or -inf in every class, `groups` do not fit it, or
        `temperature` is not positive and finite.
    References:
      Jang, Gu and Poole 2016; Maddison, Mnih and Teh 2016.
    Example:
      >>> import jax
      >>> from lcrf_jax import gumbel_softmax
      >>> z = gumbel_softmax(jax.random.key(0), jax.numpy.zeros((4, 3)), temperature=0.5)
      >>> z.shape, bool((abs(z.sum(axis=-1) - 1) < 1e-3).all())
      ((4, 3), True)
    """
    check_samples(logits, groups)
    check_temperature(temperature)
    return _relaxed(_perturbed(key, logits, groups), temperature)


def straight_through(
    key: jax.Array, logits: ArrayLike, *, temperature: ArrayLike, groups: ArrayLike | None = None
) -> jax.Array:
    r"""One exact one-hot sample whose gradient is that of the relaxed sample drawn with the same noise.

    .. math:: z = \mathrm{onehot}\,\arg\max_k\,(g_k + \epsilon_k), \qquad
              \partial z / \partial g := \partial \bar z / \partial g

    Args:
      key: PRNG key; the same key gives the noise of `gumbel_softmax`.
      logits: [..., K] unnormalised log-probabilities of q, K >= 1; -inf is allowed, but not in every class.
      temperature: of the relaxation whose gradient is used, > 0.
      groups: [m] int in 0..m-1, for logits [m, K]: pixels with the same number share their noise, see
        `block_groups`; None is independent noise.
    Returns:
      [..., K] float32, one-hot over the last axis.
    Raises:
      ValueError: if `logits` has no class axis or holds NaN, infinity or -inf in every class, `groups` do not fit it, or
        `temperature` is not positive and finite.
    References:
      Bengio, Leonard and Courville 2013; Jang, Gu and Poole 2016.
    Example:
      >>> import jax
      >>> from lcrf_jax import straight_through
      >>> logits = jax.numpy.array([[9.0, -9.0], [-9.0, 9.0]])
      >>> print(straight_through(jax.random.key(0), logits, temperature=0.5).round(2))
      [[1. 0.]
       [0. 1.]]
    """
    check_samples(logits, groups)
    check_temperature(temperature)
    perturbed = _perturbed(key, logits, groups)
    relaxed = _relaxed(perturbed, temperature)
    # Not the argmax of the relaxed sample: at a high temperature its entries are equal in float32.
    hard = jax.nn.one_hot(perturbed.argmax(axis=-1), perturbed.shape[-1], dtype=relaxed.dtype)
    return hard + (relaxed - jax.lax.stop_gradient(relaxed))


def categorical(key: jax.Array, logits: ArrayLike) -> jax.Array:
    r"""One exact one-hot sample of every categorical distribution; no gradient flows through it.

    .. math:: z \sim \mathrm{Categorical}(\mathrm{softmax}(g))

    Args:
      key: PRNG key; the same key gives the labels of `straight_through`.
      logits: [..., K] unnormalised log-probabilities of q, K >= 1; -inf is allowed, but not in every class.
    Returns:
      [..., K] float32, one-hot over the last axis.
    Raises:
      ValueError: if `logits` has no class axis or holds NaN, infinity or -inf in every class.
    References:
      Maddison, Mnih and Teh 2016, the Gumbel-max trick.
    Example:
      >>> import jax
      >>> from lcrf_jax import categorical
      >>> logits = jax.numpy.array([[9.0, -9.0], [-9.0, 9.0]])
      >>> print(categorical(jax.random.key(0), logits))
      [[1. 0.]
       [0. 1.]]
    """
    check_samples(logits)
    perturbed = _perturbed(key, logits)
    return jax.nn.one_hot(perturbed.argmax(axis=-1), perturbed.shape[-1], dtype=perturbed.dtype)
