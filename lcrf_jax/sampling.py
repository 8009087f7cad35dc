"""Samples of factorised categorical distributions, relaxed and exact (floor 1)."""

import jax
import jax.numpy as jnp


def gumbel_softmax(key, logits, *, temperature):
    r"""One relaxed sample of every categorical distribution.

    .. math:: \bar z_{jk} = \mathrm{softmax}_k\,((g_{jk} + \epsilon_{jk}) / \tau), \quad \epsilon \sim \mathrm{Gumbel}(0, 1)

    Args:
      key: PRNG key.
      logits: [..., K] unnormalised log-probabilities.
      temperature: tau > 0. As tau -> 0 the sample becomes one-hot, exactly distributed as q, and its gradient's variance grows.

    Returns:
      [..., K] float32, positive, sums to one over the last axis.

    Raises:
      ValueError: if `temperature` is a Python number that is not positive.

    References:
      Jang, Gu and Poole 2016; Maddison, Mnih and Teh 2016.
    """
    if isinstance(temperature, (int, float)) and not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}; use `categorical` for exact samples")
    logits = jnp.asarray(logits, jnp.promote_types(jnp.result_type(logits), jnp.float32))
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.softmax((logits + noise) / temperature, axis=-1)


def straight_through(key, logits, *, temperature):
    """One exact one-hot sample whose gradient is that of the relaxed sample drawn with the same noise.

    Args:
      key: PRNG key.
      logits: [..., K] unnormalised log-probabilities.
      temperature: of the relaxation that lends its gradient, > 0.

    Returns:
      [..., K] float32, one-hot over the last axis.

    Raises:
      ValueError: if `temperature` is a Python number that is not positive.

    References:
      Bengio, Leonard and Courville 2013; Jang, Gu and Poole 2016.
    """
    relaxed = gumbel_softmax(key, logits, temperature=temperature)
    hard = jax.nn.one_hot(jnp.argmax(relaxed, axis=-1), relaxed.shape[-1], dtype=relaxed.dtype)
    return hard + (relaxed - jax.lax.stop_gradient(relaxed))


def categorical(key, logits):
    """One exact one-hot sample of every categorical distribution; no gradient flows through it.

    Args:
      key: PRNG key.
      logits: [..., K] unnormalised log-probabilities.

    Returns:
      [..., K] float32, one-hot over the last axis.
    """
    labels = jax.random.categorical(key, jnp.asarray(logits, jnp.promote_types(jnp.result_type(logits), jnp.float32)))
    return jax.nn.one_hot(labels, logits.shape[-1])
