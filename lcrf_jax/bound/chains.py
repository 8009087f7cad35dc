r"""Samples of the posterior p(z | x, y) of the dense CRF by blocked Gibbs sampling.

The pixels fall into blocks that are updated in turn, all pixels of a block at once. Within a block B the pairwise
term is split by Gaussian fields u, one for each class,

.. math:: u_k \mid z \sim N(A z_k,\; A), \qquad A = K_{BB} + \mathrm{diag}(d),

Given u, the pixels of the block are independent: p(z_i = k | u, rest) is the softmax of the sum of u_ik, the messages
of the other blocks and the unary. Any diagonal d that makes A positive definite leaves the posterior as it is, since
sum_k z_ik^2 = 1. With one pixel per block this is single-site Gibbs, up to d = 1e-3.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import check_indices, checked_indices
from lcrf_jax.bound.sampling import categorical
from lcrf_jax.numerics import (
    ONE_SET,
    check_count,
    check_finite,
    check_logits,
    check_shape,
    promote_float,
    promote_together,
    varying_like,
)


class GibbsSamples(NamedTuple):
    """The result of a chain.

    Attributes:
      labels: [m] int32, the state after the last sweep; pass it to the next call to continue the chain.
      marginals: [m, K] float32, the mean over the sweeps of the labels' conditional distributions (of the labels
        themselves, where there is a likelihood that does not factorise); rows sum to one.
    """

    labels: jax.Array
    marginals: jax.Array


class _Block(NamedTuple):
    """The indices of a block's pixels (m is padding), their rows of K, and A = factor factor^T."""

    pixels: jax.Array
    rows: jax.Array
    diagonal: jax.Array
    factor: jax.Array


def _blocks(kernel: jax.Array, num_blocks: int) -> _Block:
    """The blocks, stacked: pixel i belongs to block i modulo their number, so neighbours lie in different blocks."""
    num_pixels = len(kernel)
    size = -(-num_pixels // num_blocks)
    pixels = jnp.arange(size)[None, :] * num_blocks + jnp.arange(num_blocks)[:, None]
    pixels = jnp.minimum(pixels, num_pixels)
    rows = jnp.pad(kernel, ((0, 1), (0, 1)))[pixels]
    within = jnp.take_along_axis(rows, jnp.broadcast_to(pixels[:, None, :], (*pixels.shape, size)), axis=2)
    # Diagonally dominant with a margin, hence positive definite in float32 too.
    diagonal = 1.001 * jnp.abs(within).sum(axis=-1) + 1e-3
    factor = jnp.linalg.cholesky(within + jax.vmap(jnp.diag)(diagonal))
    return _Block(pixels, rows[..., :num_pixels], diagonal, factor)


def gibbs(
    key: jax.Array,
    labels: ArrayLike,
    kernel: ArrayLike,
    unary_logits: ArrayLike,
    *,
    log_likelihood: Callable[[jax.Array], jax.Array] | None = None,
    num_sweeps: int = 1,
    num_blocks: int = 8,
) -> GibbsSamples:
    r"""Sweeps of a Markov chain whose stationary distribution is the posterior of the dense CRF with Potts costs.

    .. math:: p(z) \propto \exp\Bigl(\sum_j u_{j z_j} - \sum_{i<j} k_{ij} [z_i \ne z_j] + \ell(z)\Bigr)

    A likelihood that factorises over the pixels goes into the unary and is sampled exactly. Any other, l(z), enters
    through a Metropolis-Hastings test of each block as a whole: the more pixels in a block, the more often it is
    rejected. No gradient flows through the samples.

    Args:
      key: PRNG key.
      labels: [m] int, the initial state. A persistent chain, whose state is kept from call to call, needs few sweeps.
      kernel: [m, m] matrix; only its symmetric part counts, and its diagonal is ignored. With row sums above about 1
        the chain mixes slowly; with row sums of 10 it may stay near its initial state.
      unary_logits: [m, K] log-potentials of the pixels, such as `lcrf_jax.bound.pixel_evidence.log_evidence`.
      log_likelihood: function l from one-hot labels [m, K] to a scalar, or None.
      num_sweeps: static, >= 1; every pixel is updated once in each.
      num_blocks: static, >= 1; at most m are used. Few large blocks are fast, many small ones mix better. With a
        log-likelihood use blocks of about 8 pixels: with larger ones a hard likelihood rejects every proposal.
    Returns:
      `GibbsSamples`.
    Raises:
      ValueError: if the shapes do not fit, a label is no class, the kernel is not finite, `unary_logits` are none, or a
        number is out of range or not whole.
      TypeError: if the labels are no integers, or a number is not static.
    References:
      Geman and Geman 1984; Martens and Sutskever 2010, for the Gaussian fields; Metropolis et al. 1953, Hastings 1970.
    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lcrf_jax import gibbs
      >>> unary = jnp.array([[0.0, 9.0]] * 4)  # four pixels that are nearly sure of their label
      >>> gibbs(jax.random.key(0), jnp.zeros(4, int), 0.1 * jnp.ones((4, 4)), unary).labels.tolist()
      [1, 1, 1, 1]
    """
    num_pixels, num_classes = check_shape("unary_logits", unary_logits, ("m", "K"), ONE_SET)
    check_shape("labels", labels, (num_pixels,), "give the number of a class for each pixel")
    check_shape("kernel", kernel, (num_pixels, num_pixels), "pass a dense matrix, see lcrf_jax.dense_kernel")
    num_sweeps = check_count("num_sweeps", num_sweeps, minimum=1, remedy="5 is usual for a chain that is kept")
    num_blocks = check_count("num_blocks", num_blocks, minimum=1, remedy="8 is usual")
    check_indices("labels", labels, num_classes, "start with a class at every pixel")
    check_finite("kernel", kernel, "look for a division by zero")
    check_logits("unary_logits", unary_logits)
    unary_logits, kernel = jax.lax.stop_gradient(promote_together(unary_logits, kernel))
    dtype = kernel.dtype
    kernel = jnp.where(jnp.eye(num_pixels, dtype=bool), 0, (kernel + kernel.T) / 2)
    blocks = _blocks(kernel, min(num_blocks, num_pixels))

    def sweep(carry, sweep_key):
        one_hot, total = carry
        keys = jax.random.split(sweep_key, len(blocks.pixels))

        def update(state, block_and_key):
            return _updated(*state, *block_and_key, unary_logits, log_likelihood), None

        (one_hot, marginals), _ = jax.lax.scan(update, (one_hot, one_hot), (blocks, keys))
        return (one_hot, total + marginals), None

    one_hot = jax.nn.one_hot(checked_indices("labels", labels), num_classes, dtype=dtype)
    for array in (unary_logits, kernel, jax.random.key_data(key)):
        one_hot = varying_like(one_hot, array)
    start = one_hot, jnp.zeros_like(one_hot)
    (one_hot, total), _ = jax.lax.scan(sweep, start, jax.random.split(key, num_sweeps))
    return GibbsSamples(one_hot.argmax(axis=-1).astype(jnp.int32), total / num_sweeps)


def _updated(one_hot, marginals, block, key, unary_logits, log_likelihood):
    """The labels after an update of one block, and its marginals: the conditionals or, after a test, the labels."""
    field_key, label_key, test_key = jax.random.split(key, 3)

    def product(a, b):
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    # Padding has the index m: reading it gives the last pixel, and writing it is dropped.
    mean = product(block.rows, one_hot) + block.diagonal[:, None] * one_hot[block.pixels]
    noise = jax.random.normal(field_key, mean.shape, mean.dtype)
    logits = mean + product(block.factor, noise) + unary_logits[block.pixels]
    proposed = one_hot.at[block.pixels].set(categorical(label_key, logits), mode="drop")
    if log_likelihood is None:
        return proposed, marginals.at[block.pixels].set(jax.nn.softmax(logits, axis=-1), mode="drop")
    gain = promote_float(log_likelihood(proposed) - log_likelihood(one_hot))
    check_shape("log_likelihood", gain, (), "return one number for all tags together")
    accepted = jnp.log(jax.random.uniform(test_key, dtype=gain.dtype)) < gain
    one_hot = jnp.where(accepted, proposed, one_hot)
    return one_hot, one_hot
