r"""The evidence lower bound of the latent CRF.

.. math:: \log p(y|x) \ge E_q \log p(y|z,x) - KL(q \,\|\, p(z|x)) , \qquad
          KL = -H(q) + \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j + \log Z(x)

The KL is exact, up to log Z(x), which no parameter of q changes. The first term is estimated. With relaxed
samples, or with the probabilities in place of samples, it is not the expectation of the bound, so that the
sum is a hybrid objective and not a strict bound.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcrf_jax.crf import pairwise_energy
from lcrf_jax.numerics import check_number, check_shape, entropy, promote_float
from lcrf_jax.sampling import gumbel_softmax

__all__ = ["ESTIMATORS", "ElboTerms", "elbo", "gumbel_softmax_likelihood", "mean_likelihood"]


class ElboTerms(NamedTuple):
    """The terms of the bound for one image, in nats, not divided by the number of pixels.

    Attributes:
      log_likelihood: estimate of E_q log p(y|z,x).
      entropy: H(q), exact.
      pairwise_energy: expected pairwise energy under q, exact.
      log_partition: log Z(x) where the caller knows it, else 0; then `bound` is the bound plus log Z(x).
    """

    log_likelihood: jax.Array
    entropy: jax.Array
    pairwise_energy: jax.Array
    log_partition: jax.Array

    @property
    def bound(self):
        """log-likelihood + entropy - pairwise energy - log Z: what is maximised, every weight being 1."""
        return self.log_likelihood + self.entropy - self.pairwise_energy - self.log_partition


def gumbel_softmax_likelihood(key, logits, log_likelihood, *, temperature=1.0, num_samples=1):
    r"""E_q log p(y|z,x) through relaxed samples: the gradient flows back through them.

    .. math:: \frac1S \sum_s \log p(y \mid \bar z^{(s)}, x), \quad
              \bar z = \mathrm{softmax}((g + \epsilon) / \tau)

    A relaxed sample is not a labelling, so this is a biased estimate; the bias goes to 0 with the
    temperature, and the variance of the gradient grows.

    Args:
      key: PRNG key.
      logits: [m, K] unnormalised log-probabilities of q.
      log_likelihood: function from labels [m, K] to a scalar.
      temperature: tau > 0.
      num_samples: S >= 1, static.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if `num_samples` is smaller than 1 or the temperature is not positive.
    References:
      Jang, Gu and Poole 2016.
    """
    remedy = "one sample is the least; for none use mean_likelihood"
    check_number("num_samples", num_samples, minimum=1, remedy=remedy)

    def one(sample_key):
        return log_likelihood(gumbel_softmax(sample_key, logits, temperature=temperature))

    return jnp.mean(jax.vmap(one)(jax.random.split(key, num_samples)))


def mean_likelihood(key, logits, log_likelihood, *, temperature=1.0, num_samples=1):
    r"""log p(y|phi,x): the probabilities themselves in place of samples, the control to compare samples with.

    It is the expectation if log p(y|z,x) is linear in z, and at least the expectation if it is concave in z,
    as that of `evidence` is.

    Args:
      key: not used; the estimators share one signature.
      logits: [m, K] unnormalised log-probabilities of q.
      log_likelihood: function from labels [m, K] to a scalar.
      temperature: not used.
      num_samples: not used.
    Returns:
      Scalar, float32, nats.
    Raises:
      Nothing of its own.
    References:
      None.
    """
    del key, temperature, num_samples
    return log_likelihood(jax.nn.softmax(promote_float(logits), axis=-1))


ESTIMATORS = {"gumbel_softmax": gumbel_softmax_likelihood, "mean": mean_likelihood}


def elbo(
    key,
    logits,
    kernel,
    log_likelihood,
    *,
    estimator=gumbel_softmax_likelihood,
    compatibility=None,
    log_partition=0.0,
):
    """The terms of the bound for one image.

    Args:
      key: PRNG key of the samples.
      logits: [m, K] unnormalised log-probabilities of q.
      kernel: [m, m] matrix or kernel object of `lcrf_jax.filters`; its weights are those of the pairwise term.
        None is a prior without pairs, whose energy is 0.
      log_likelihood: function from labels [m, K] to log p(y|z,x), a scalar; see `lcrf_jax.observation`.
      estimator: how E_q log p(y|z,x) is estimated: `gumbel_softmax_likelihood` or another function of
        (key, logits, log_likelihood); bind a temperature and a number of samples with functools.partial.
      compatibility: [K, K] cost mu(a, b); None is Potts.
      log_partition: log Z(x), where it is known.
    Returns:
      ElboTerms of scalars, in nats, not divided by m. Their `bound` is to be maximised.
    Raises:
      ValueError: if the shapes do not fit or the log-likelihood is not a scalar.
    References:
      Pandey and Dukkipati 2017; Krahenbuhl and Koltun 2011.
    """
    remedy = "pass one image, pixels flattened to one axis; for a batch use jax.vmap"
    check_shape("logits", logits, ("m", "K"), remedy)
    logits = promote_float(logits)
    expected_log_likelihood = estimator(key, logits, log_likelihood)
    check_shape("log_likelihood", expected_log_likelihood, (), "return one number for all tags together")
    probs = jax.nn.softmax(logits, axis=-1)
    energy = 0.0 if kernel is None else pairwise_energy(probs, kernel, compatibility=compatibility)
    return ElboTerms(
        log_likelihood=expected_log_likelihood,
        entropy=entropy(logits).sum(),
        pairwise_energy=jnp.asarray(energy, logits.dtype),
        log_partition=jnp.asarray(log_partition, logits.dtype),
    )
