r"""The evidence lower bound of the latent CRF.

.. math:: \log p(y|x) \ge E_q \log p(y|z,x) - KL(q \,\|\, p(z|x)) , \qquad
          KL = -H(q) + \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j + \log Z(x)

The KL is exact, up to log Z(x), which no parameter of q changes. The first term is estimated by one of `ESTIMATORS`,
which share one signature. `reinforce_likelihood` is unbiased in value and gradient; `straight_through_likelihood` in
value only. With relaxed samples, or with the probabilities in place of samples, the first term is not this
expectation. The sum is then a different objective and not a strict bound. Some likelihoods have their expectation in
closed form, see `lcrf_jax.bound.likelihoods.EXPECTATIONS`.

q can also be fitted to MCMC samples of the posterior p(z|x,y), see `lcrf_jax.bound.chains`, by maximising
their `expected_log_prob`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.bound.arguments import check_possible
from lcrf_jax.bound.sampling import categorical, check_samples, check_temperature, gumbel_softmax, straight_through
from lcrf_jax.crf.energy import KernelLike, pairwise_energy
from lcrf_jax.crf.kernel import as_kernel, in_one_precision, pixels_within
from lcrf_jax.numerics import (
    ONE_SET,
    check_count,
    check_finite,
    check_logits,
    check_probs,
    check_shape,
    entropy,
    native,
    promote_float,
    promote_together,
)


class ElboTerms(NamedTuple):
    """The terms of the bound for one image, in nats, not divided by the number of pixels.

    Attributes:
      log_likelihood: estimate of E_q log p(y|z,x).
      entropy: H(q), exact.
      pairwise_energy: expected pairwise energy under q, exact.
      log_partition: log Z(x) where the caller knows it, else 0; then `bound` is the bound plus log Z(x).

    Example:
      >>> from lcrf_jax import ElboTerms
      >>> float(ElboTerms(log_likelihood=-3.0, entropy=2.0, pairwise_energy=0.5, log_partition=0.0).bound)
      -1.5
    """

    log_likelihood: jax.Array
    entropy: jax.Array
    pairwise_energy: jax.Array
    log_partition: jax.Array

    @property
    def bound(self) -> jax.Array:
        """log-likelihood + entropy - pairwise energy - log Z: what is maximised, every weight being 1."""
        return self.reweighted() - self.log_partition

    def reweighted(
        self, *, likelihood: ArrayLike = 1.0, entropy: ArrayLike = 1.0, pairwise: ArrayLike = 1.0
    ) -> jax.Array:
        """The terms with weights >= 0, without log Z. Any weight but 1 makes it another objective than the bound."""
        for name, weight in (("likelihood", likelihood), ("entropy", entropy), ("pairwise", pairwise)):
            check_finite(name, weight, "1 is the bound, 0 leaves the term out", minimum=0)
        _, likelihood, entropy, pairwise = promote_together(self.log_likelihood, likelihood, entropy, pairwise)
        return self.log_likelihood * likelihood + self.entropy * entropy - self.pairwise_energy * pairwise


def _check_pixels(logits, groups=None):
    check_shape("logits", logits, ("m", "K"), ONE_SET)
    check_samples(logits, groups)


def _mean_over_samples(key, num_samples, function):
    """Mean of a function of a key over the samples' own keys."""
    remedy = "one sample is the least; for none use mean_likelihood"
    num_samples = check_count("num_samples", num_samples, minimum=1, remedy=remedy)
    return jnp.mean(jax.vmap(function)(jax.random.split(key, num_samples)))


def gumbel_softmax_likelihood(
    key: jax.Array,
    logits: ArrayLike,
    log_likelihood: Callable[[jax.Array], jax.Array],
    *,
    temperature: ArrayLike = 1.0,
    num_samples: int = 1,
    groups: ArrayLike | None = None,
) -> jax.Array:
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
      groups: [m] int, pixels that share their noise, see `lcrf_jax.bound.sampling.block_groups`; None is independent
        noise. Pixels of a group are then dependent: the joint distribution is not q, but its marginals are those
        of q.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if `logits` are not [m, K] or none, `num_samples` is smaller than 1 or not whole, the temperature is
        not positive, or the groups do not fit.
    References:
      Jang, Gu and Poole 2016.
    Example:
      >>> import jax
      >>> from lcrf_jax import gumbel_softmax_likelihood
      >>> from lcrf_jax.bound import noisy_or
      >>> tags = jax.numpy.array([True, True])
      >>> logits = jax.numpy.array([[9.0, -9.0], [-9.0, 9.0]])  # nearly certain: all samples are the same
      >>> value = gumbel_softmax_likelihood(jax.random.key(0), logits, lambda z: noisy_or(z, tags))
      >>> round(float(value), 2)
      -4.61
    """

    _check_pixels(logits, groups)
    check_temperature(temperature)

    def one(sample_key):
        return log_likelihood(gumbel_softmax(sample_key, logits, temperature=temperature, groups=groups))

    return _mean_over_samples(key, num_samples, one)


def straight_through_likelihood(
    key: jax.Array,
    logits: ArrayLike,
    log_likelihood: Callable[[jax.Array], jax.Array],
    *,
    temperature: ArrayLike = 1.0,
    num_samples: int = 1,
    groups: ArrayLike | None = None,
) -> jax.Array:
    r"""E_q log p(y|z,x) over exact samples, with the gradient of relaxed ones.

    .. math:: \frac1S \sum_s \log p(y \mid z^{(s)}, x), \qquad
              \partial z / \partial g := \partial \bar z / \partial g

    The value is unbiased, the gradient is biased: it uses the slope of the likelihood at a corner of the simplex in
    place of its difference between corners. The two agree if log p(y|z,x) is linear in z and the temperature small.

    Args:
      key: PRNG key; the same key gives the noise of `gumbel_softmax_likelihood`.
      logits: [m, K] unnormalised log-probabilities of q.
      log_likelihood: function from labels [m, K] to a scalar.
      temperature: of the relaxation whose gradient is used, > 0.
      num_samples: S >= 1, static.
      groups: see `gumbel_softmax_likelihood`.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if `logits` are not [m, K] or none, `num_samples` is smaller than 1 or not whole, the temperature is
        not positive, or the groups do not fit.
    References:
      Bengio, Leonard and Courville 2013; Jang, Gu and Poole 2016.
    Example:
      >>> import jax
      >>> from lcrf_jax import straight_through_likelihood
      >>> from lcrf_jax.bound import noisy_or
      >>> tags = jax.numpy.array([True, True])
      >>> logits = jax.numpy.array([[9.0, -9.0], [-9.0, 9.0]])  # nearly certain: all samples are the same
      >>> value = straight_through_likelihood(jax.random.key(0), logits, lambda z: noisy_or(z, tags))
      >>> round(float(value), 2)
      -4.61
    """

    _check_pixels(logits, groups)
    check_temperature(temperature)

    def one(sample_key):
        return log_likelihood(straight_through(sample_key, logits, temperature=temperature, groups=groups))

    return _mean_over_samples(key, num_samples, one)


def reinforce_likelihood(
    key: jax.Array,
    logits: ArrayLike,
    log_likelihood: Callable[[jax.Array], jax.Array],
    *,
    temperature: ArrayLike = 1.0,
    num_samples: int = 2,
    groups: ArrayLike | None = None,
) -> jax.Array:
    r"""E_q log p(y|z,x) over exact samples, with the score-function gradient: both are unbiased.

    .. math:: \frac1S \sum_s (f_s - \tfrac1{S-1} \textstyle\sum_{t \ne s} f_t)\,\nabla \log q(z^{(s)} | x), \qquad
              f_s = \log p(y \mid z^{(s)}, x)

    The mean of the other samples is the baseline. The likelihood is only ever evaluated at labellings and need not be
    differentiable. The variance grows with the number of pixels.

    Args:
      key: PRNG key.
      logits: [m, K] unnormalised log-probabilities of q.
      log_likelihood: function from labels [m, K] to a scalar.
      temperature: not used; the estimators share one signature.
      num_samples: S >= 2, static.
      groups: must be None: with shared noise, log q is no longer a sum over pixels.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if `logits` are not [m, K] or none, `num_samples` is smaller than 2 or not whole, or groups are given.
    References:
      Williams 1992; Mnih and Rezende 2016, and Kool, van Hoof and Welling 2019, for the baseline.
    Example:
      >>> import jax
      >>> from lcrf_jax import reinforce_likelihood
      >>> from lcrf_jax.bound import noisy_or
      >>> tags = jax.numpy.array([True, True])
      >>> logits = jax.numpy.array([[9.0, -9.0], [-9.0, 9.0]])  # nearly certain: all samples are the same
      >>> value = reinforce_likelihood(jax.random.key(0), logits, lambda z: noisy_or(z, tags))
      >>> round(float(value), 2)
      -4.61
    """
    del temperature
    remedy = "each sample's baseline is the mean of the others"
    num_samples = check_count("num_samples", num_samples, minimum=2, remedy=remedy)
    _check_pixels(logits)
    if groups is not None:
        raise ValueError("groups: expected None, as reinforce needs independent pixels; use gumbel_softmax for blocks")
    log_probs = jax.nn.log_softmax(promote_float(logits), axis=-1)

    def one(sample_key):
        labels = jax.lax.stop_gradient(categorical(sample_key, logits))
        chosen = jnp.take_along_axis(log_probs, labels.argmax(axis=-1, keepdims=True), axis=-1)
        return log_likelihood(labels), chosen.sum()

    values, log_q = jax.vmap(one)(jax.random.split(key, num_samples))
    fixed = jax.lax.stop_gradient(values)
    # f_s minus the mean of the others is S / (S - 1) times f_s minus the mean of all.
    score = jnp.sum((fixed - fixed.mean()) * log_q) / (num_samples - 1)
    # The score term has value 0. Its gradient is added to that of the likelihood's own arguments.
    return values.mean() + score - jax.lax.stop_gradient(score)


def mean_likelihood(
    key: jax.Array,
    logits: ArrayLike,
    log_likelihood: Callable[[jax.Array], jax.Array],
    *,
    temperature: ArrayLike = 1.0,
    num_samples: int = 1,
    groups: ArrayLike | None = None,
) -> jax.Array:
    r"""log p(y|phi,x): the probabilities themselves in place of samples, the control to compare samples with.

    It is the expectation if log p(y|z,x) is linear in z, and at least the expectation if it is concave in z,
    as that of `evidence` is.

    Args:
      key: not used; the estimators share one signature.
      logits: [m, K] unnormalised log-probabilities of q.
      log_likelihood: function from labels [m, K] to a scalar.
      temperature: not used.
      num_samples: not used.
      groups: not used.
    Returns:
      Scalar, float32, nats.
    Raises:
      ValueError: if `logits` are not [m, K] or none.
    Example:
      >>> import jax
      >>> from lcrf_jax import mean_likelihood
      >>> from lcrf_jax.bound import noisy_or
      >>> tags = jax.numpy.array([True, True])
      >>> logits = jax.numpy.array([[9.0, -9.0], [-9.0, 9.0]])
      >>> value = mean_likelihood(jax.random.key(0), logits, lambda z: noisy_or(z, tags))
      >>> round(float(value), 2)
      -4.61
    """
    del key, temperature, num_samples, groups
    _check_pixels(logits)
    return log_likelihood(jax.nn.softmax(promote_float(logits), axis=-1))


ESTIMATORS = {
    "gumbel_softmax": gumbel_softmax_likelihood,
    "mean": mean_likelihood,
    "reinforce": reinforce_likelihood,
    "straight_through": straight_through_likelihood,
}


def expected_log_prob(logits: ArrayLike, target_probs: ArrayLike) -> jax.Array:
    r"""E log q(z|x) under given marginals: what fits q to samples of the posterior by maximum likelihood.

    .. math:: \sum_j \sum_k P_{jk} \log q(z_{jk} = 1 | x)

    With P the marginals of p(z|x,y) the maximum is where q has the same marginals. This minimises the forward
    KL(p || q), which covers all modes; the bound minimises KL(q || p), which picks one.

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      target_probs: [m, K] marginals or one-hot labels, such as those of `lcrf_jax.bound.chains.gibbs`; constants here.
    Returns:
      Scalar, float32, nats, not divided by m.
    Raises:
      ValueError: if the shapes do not fit, `logits` or `target_probs` are none, or a class with a target has -inf.
    References:
      Bornschein and Bengio 2015, the wake phase of the inference network.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import expected_log_prob
      >>> round(float(expected_log_prob(np.zeros((3, 2)), np.eye(2)[[0, 1, 1]])), 3)
      -2.079
    """
    shape = check_shape("logits", logits, ("m", "K"), ONE_SET)
    check_shape("target_probs", target_probs, shape, "give one row per pixel, one column per class")
    check_logits("logits", logits)
    check_probs("target_probs", target_probs)
    logits, target_probs = promote_together(logits, jax.lax.stop_gradient(native(target_probs)))
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    check_possible(log_probs, target_probs > 0)
    return jnp.sum(target_probs * jnp.where(target_probs > 0, log_probs, 0))


def elbo(
    key: jax.Array,
    logits: ArrayLike,
    kernel: KernelLike | None,
    log_likelihood: Callable[[jax.Array], jax.Array],
    *,
    estimator: Callable[..., jax.Array] = gumbel_softmax_likelihood,
    compatibility: ArrayLike | None = None,
    log_partition: ArrayLike = 0.0,
) -> ElboTerms:
    """The terms of the bound for one image.

    Args:
      key: PRNG key of the samples.
      logits: [m, K] unnormalised log-probabilities of q.
      kernel: [m, m] matrix or kernel object of `lcrf_jax.crf.kernel`; its weights are those of the pairwise term.
        None is a prior without pairs, whose energy is 0.
      log_likelihood: function from labels [m, K] to log p(y|z,x), a scalar; see `lcrf_jax.bound.likelihoods`.
      estimator: how E_q log p(y|z,x) is estimated: `gumbel_softmax_likelihood` or another function of
        (key, logits, log_likelihood); bind a temperature and a number of samples with functools.partial.
      compatibility: [K, K] cost mu(a, b); None is Potts.
      log_partition: log Z(x), where it is known.
    Returns:
      ElboTerms of scalars, in nats, not divided by m. Their `bound` is to be maximised.
    Raises:
      ValueError: if the shapes do not fit, `logits` are none, or the log-likelihood is not a scalar.
    References:
      Pandey and Dukkipati 2017; Krahenbuhl and Koltun 2011.
    Example:
      >>> import jax
      >>> from lcrf_jax import elbo, likelihoods
      >>> logits, tags = jax.numpy.zeros((4, 2)), jax.numpy.array([True, True])
      >>> kernel = 0.1 * jax.numpy.ones((4, 4))
      >>> terms = elbo(jax.random.key(0), logits, kernel, lambda z: likelihoods.max_pool(z, tags))
      >>> round(float(terms.entropy), 3), round(float(terms.pairwise_energy), 3)
      (2.773, 0.3)
    """
    check_shape("logits", logits, (pixels_within(kernel), "K"), ONE_SET)
    given, checks_them = logits, getattr(estimator, "func", estimator) in ESTIMATORS.values()
    if not checks_them:
        check_logits("logits", logits)
    check_finite("log_partition", log_partition, "leave it out where it is not known")
    logits = promote_float(logits)
    if kernel is not None:
        kernel, logits = in_one_precision(as_kernel(kernel), logits)
    expected_log_likelihood = estimator(key, given if checks_them else logits, log_likelihood)
    check_shape("log_likelihood", expected_log_likelihood, (), "return one number for all tags together")
    probs = jax.nn.softmax(logits, axis=-1)
    energy = 0.0 if kernel is None else pairwise_energy(probs, kernel, compatibility=compatibility)
    return ElboTerms(
        log_likelihood=jnp.asarray(expected_log_likelihood, logits.dtype),
        entropy=entropy(logits).sum(),
        pairwise_energy=jnp.asarray(energy, logits.dtype),
        log_partition=jnp.asarray(log_partition, logits.dtype),
    )
