r"""Measurements of gradient estimators for `experiments.estimators`: the cases, the exact gradients, the errors.

With g an estimate and g* the exact gradient, both with respect to the logits,

.. math:: \text{bias} = \frac{|E g - g^*|}{|g^*|}, \quad \text{sd} = \frac{\sqrt{E |g - E g|^2}}{|g^*|}, \quad
          \text{rmse} = \sqrt{\text{bias}^2 + \text{sd}^2}, \quad \cos = \frac{\langle E g, g^* \rangle}{|E g|\,|g^*|}

The mean over repetitions has an error of its own, which would pass for a bias: the squared norms of E g - g* and of
E g are estimated without bias, from products of the means of different batches. Their standard errors come from
leaving out one batch at a time (jackknife), which overstates them by up to sqrt(2) where there is no bias.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.estimators import expected_log_prob
from lcrf_jax.bound.likelihoods import EXPECTATIONS, IMAGE_LIKELIHOODS, TAG_LIKELIHOODS
from lcrf_jax.bound.pixel_evidence import class_evidence, log_evidence
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.params import KernelParams

NUM_CLASSES = 3
NUM_BATCHES = 32
BURN_IN = 100
# Background and class 1 are tagged, class 2 is not.
TAGS = (True, True, False)
# The evidence of the default configuration, and its kernel at stride 8.
EVIDENCE = {"background_level": 0.2, "sharpness": 2.0, "floor": 0.01}
KERNEL = KernelParams(0.3, 80.0, 13.0, 0.1, 24.0).at_stride(8)
FLIP_PROBABILITY = 0.05
MOST_LABELLINGS = 3**9


class Case(NamedTuple):
    """An image of side x side pixels: logits, log p(y|z,x) of labels, its expectation as a function of logits.

    `log_potentials` [m, K] are None unless the likelihood is their sum over the pixels.
    """

    side: int
    logits: jax.Array
    log_likelihood: Any
    expectation: Any
    log_potentials: Any = None


def smooth_maps(rng, side):
    """[m, K - 1] maps of a few waves of at most 1.5 periods, the same at every size but for their sampling."""
    centres = (np.stack(np.mgrid[:side, :side], axis=-1).reshape(-1, 1, 2) + 0.5) / side
    frequencies, phases = rng.uniform(-1.5, 1.5, (6, 2)), rng.uniform(0, 1, (NUM_CLASSES - 1, 6))
    return np.cos(2 * np.pi * ((centres * frequencies).sum(-1)[:, None] + phases)).mean(axis=-1)


def rare_classes(logits):
    """The logits plus a constant for each class, such that each foreground class has one pixel on average.

    Then P(no pixel has class k), the product of 1 - phi_jk, is about 1 / e at any size: the or is not saturated.
    """
    num_pixels, num_classes = logits.shape
    target = np.array([num_pixels - num_classes + 1, *[1] * (num_classes - 1)])
    for _ in range(200):
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        logits = logits + np.log(target / probs.sum(axis=0))
    return logits


def make_case(likelihood, num_pixels, seed):
    """The `Case` of a likelihood: standard normal logits, by the seed; those of max_pool shifted by `rare_classes`."""
    side = round(num_pixels**0.5)
    if side < 2 or side**2 != num_pixels:
        raise ValueError(f"pixels: expected the square of a side of at least 2, such as 100, got {num_pixels}")
    map_rng, logit_rng = np.random.default_rng(seed).spawn(2)
    logits, options = logit_rng.normal(size=(num_pixels, NUM_CLASSES)), {"tags": np.array(TAGS)}
    log_potentials = None
    if likelihood == "evidence":
        maps = smooth_maps(map_rng, side)
        options["pixel_evidence"] = class_evidence(maps, maps.max(axis=0), options["tags"], **EVIDENCE)
        log_potentials = log_evidence(options["pixel_evidence"])
    if likelihood == "max_pool":
        logits, options["flip_probability"] = rare_classes(logits), FLIP_PROBABILITY
    log_likelihood = functools.partial((TAG_LIKELIHOODS | IMAGE_LIKELIHOODS)[likelihood], **options)
    if likelihood in EXPECTATIONS:
        expectation = functools.partial(EXPECTATIONS[likelihood], **options)
    else:
        expectation = functools.partial(enumerated_expectation, log_likelihood)
    return Case(side, jnp.asarray(logits, jnp.float32), log_likelihood, expectation, log_potentials)


def labellings(num_pixels, num_classes):
    """[K ** m, m, K] one-hot, all of them."""
    if num_classes**num_pixels > MOST_LABELLINGS:
        raise ValueError(f"pixels: expected at most 9 for a sum over all labellings, got {num_pixels}")
    return jnp.eye(num_classes)[np.array(list(itertools.product(range(num_classes), repeat=num_pixels)))]


def enumerated_expectation(log_likelihood, logits):
    """E_q of a log-likelihood as the sum over all labellings."""
    every = labellings(*logits.shape)
    log_q = jnp.sum(every * jax.nn.log_softmax(logits, axis=-1), axis=(1, 2))
    return jnp.sum(jnp.exp(log_q) * jax.vmap(log_likelihood)(every))


def posterior_marginals(case, kernel):
    """[m, K] marginals of p(z|x,y) under the dense CRF, by enumeration."""
    every = labellings(*case.logits.shape)
    agreement = jnp.einsum("nik,njk,ij->n", every, every, kernel, precision=jax.lax.Precision.HIGHEST)
    log_joint = agreement / 2 + jax.vmap(case.log_likelihood)(every)
    return jnp.einsum("n,nik->ik", jax.nn.softmax(log_joint), every, precision=jax.lax.Precision.HIGHEST)


def crf_kernel(side, coupling, seed):
    """[m, m] kernel of a picture with little contrast; rows sum to about .35 times the coupling at 3 x 3 pixels."""
    image = np.random.default_rng(seed).uniform(110, 140, (side, side, 3))
    return coupling * dense_kernel(image, KERNEL)


class Errors(NamedTuple):
    """Errors of an estimator; `bias` and `cosine` are None where the noise hides them.

    Attributes:
      bias: relative bias.
      bias_below: if `bias` is None, the bound that holds up to three standard errors; otherwise None.
      sd: relative standard deviation.
      rmse: relative root mean squared error.
      cosine: cosine between the mean estimate and the exact gradient.
    """

    bias: float | None
    bias_below: float | None
    sd: float
    rmse: float
    cosine: float | None


class Measured(NamedTuple):
    """Errors of the gradient in the logits, of its sum over the pixels, and of the value, in nats per pixel."""

    logits: Errors
    summed: Errors
    value_error: float


def errors(exact, means, scatters, size):
    """`Errors` from batches of estimates.

    Args:
      exact: [...] the exact gradient.
      means: [B, ...] each batch's mean deviation from it.
      scatters: [B] each batch's sum of squared distances from its mean.
      size: estimates in a batch.
    Returns:
      `Errors`.
    """
    exact, means = np.ravel(exact).astype(np.float64), np.asarray(means, np.float64).reshape(len(means), -1)
    norm, num_batches = np.linalg.norm(exact), len(means)
    gram, along = means @ means.T / norm**2, means @ exact / norm**2
    squared, squared_error = _with_standard_error(_squared_bias, gram, along)
    cosine, cosine_error = _with_standard_error(_cosine, gram, along)
    hidden = squared < 3 * squared_error
    scatter = np.sum(scatters) / norm**2
    # A cosine is shown to two digits.
    return Errors(
        bias=None if hidden else float(np.sqrt(max(squared, 0))),
        bias_below=float(np.sqrt(max(squared, 0) + 3 * squared_error)) if hidden else None,
        sd=float(np.sqrt(scatter / (num_batches * (size - 1)))),
        rmse=float(np.sqrt(scatter / (num_batches * size) + np.trace(gram) / num_batches)),
        cosine=float(np.clip(cosine, -1, 1)) if cosine_error < 0.03 else None,
    )


def _squared_bias(gram, along):
    """Squared norm of the mean deviation: the mean product of two different batches."""
    return (gram.sum() - np.trace(gram)) / (len(gram) * (len(gram) - 1))


def _cosine(gram, along):
    return (1 + along.mean()) / np.sqrt(max(1 + 2 * along.mean() + _squared_bias(gram, along), 1e-12))


def _with_standard_error(statistic, gram, along):
    """A statistic of the batches and its standard error by the jackknife."""
    every, n = np.arange(len(gram)), len(gram)
    without = [statistic(gram[np.ix_(rest, rest)], along[rest]) for rest in (every[every != i] for i in every)]
    return statistic(gram, along), np.sqrt((n - 1) * np.var(without))


def measured(key, estimate, exact, repetitions):
    """`Measured` for each setting of an estimator.

    Args:
      key: PRNG key.
      estimate: function of a key to estimates of value and gradient, [T] and [T, m, K], one for each setting.
      exact: the exact (value, gradient [m, K]), or [T] and [T, m, K] where settings have their own.
      repetitions: estimates drawn, in `NUM_BATCHES` batches of two at least.
    Returns:
      List of T `Measured`.
    """
    size = max(2, repetitions // NUM_BATCHES)

    def batch(keys):
        values, gradients = jax.vmap(estimate)(keys)
        deviations = gradients - exact[1]
        return values.mean(axis=0), _mean_and_scatter(deviations), _mean_and_scatter(deviations.sum(axis=-2))

    # One batch after the other: what is kept of each does not grow with its size.
    run = jax.jit(lambda keys: jax.lax.map(batch, keys))
    values, of_logits, of_sums = jax.tree.map(np.asarray, run(jax.random.split(key, (NUM_BATCHES, size))))
    exact_values = np.broadcast_to(exact[0], values.shape[1:])
    exact_gradients = np.broadcast_to(exact[1], of_logits[0].shape[1:])
    return [
        Measured(
            errors(exact_gradients[i], of_logits[0][:, i], of_logits[1][:, i], size),
            errors(exact_gradients[i].sum(axis=0), of_sums[0][:, i], of_sums[1][:, i], size),
            float(values[:, i].mean(dtype=np.float64) - exact_values[i]) / exact_gradients.shape[1],
        )
        for i in range(len(exact_values))
    ]


def _mean_and_scatter(deviations):
    """Mean of [n, T, ...] over n, and [T] the sum of squared distances from it."""
    mean = deviations.mean(axis=0)
    return mean, jnp.square(deviations - mean).sum(axis=(0, *range(2, deviations.ndim)))


def likelihood_estimates(estimator, case, temperatures, num_samples, groups=None):
    """Function of a key to value and gradient of an estimator at every temperature, from the same noise."""

    def at(temperature, key, logits):
        options = {"temperature": temperature, "num_samples": num_samples, "groups": groups}
        return estimator(key, logits, case.log_likelihood, **options)

    both = jax.vmap(jax.value_and_grad(at, argnums=2), (0, None, None))
    return lambda key: both(jnp.asarray(temperatures), key, case.logits)


def chain_estimates(case, kernels, sweeps):
    """Function of a key to value and gradient of E log q from a chain, for each (kernel, persistent, number of sweeps).

    The chain begins at a sample of q. A cold estimate is the mean over its first sweeps; a persistent one that over
    the sweeps after `BURN_IN` others, since in training a chain goes on from step to step.
    """
    if case.log_potentials is None:
        unary, rest = jnp.zeros_like(case.logits), case.log_likelihood
    else:
        unary, rest = case.log_potentials, None
    starts, lengths = jnp.repeat(jnp.array([0, BURN_IN]), len(sweeps)), jnp.tile(jnp.array(sweeps), 2)

    def means(kernel, start, keys):
        def sweep(labels, key):
            return gibbs(key, labels, kernel, unary, log_likelihood=rest)

        _, marginals = jax.lax.scan(sweep, start, keys)
        sums = jnp.pad(jnp.cumsum(marginals, axis=0), ((1, 0), (0, 0), (0, 0)))
        return (sums[starts + lengths] - sums[starts]) / lengths[:, None, None]

    def estimates(key):
        start_key, key = jax.random.split(key)
        start = jax.random.categorical(start_key, case.logits)
        keys = jax.random.split(key, BURN_IN + max(sweeps))
        targets = jax.vmap(means, (0, None, None))(kernels, start, keys).reshape(-1, *case.logits.shape)
        return jax.vmap(jax.value_and_grad(expected_log_prob), (None, 0))(case.logits, targets)

    return estimates
