"""A linear multi-label classifier of image tags on frozen features.

Its class maps become evidence for the labels of pixels in `lcrf_jax.bound.pixel_evidence.class_evidence`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


class TagClassifier(NamedTuple):
    """The frozen tag classifier; the logit of class k is mean over cells of F . weights[:, k] + bias[k].

    Attributes:
      weights: [C, K - 1] float32, foreground classes only.
      bias: [K - 1] float32.
    """

    weights: jax.Array
    bias: jax.Array


STREAMED_ABOVE = 1e9  # bytes of features that are taken into memory at most
_ROWS_IN_MEMORY = 8192


@jax.jit
def _minimised(start, inputs, targets, l2, max_iterations, tolerance):
    """(parameters, number of steps, loss) after L-BFGS from `start`."""

    def loss(params):
        logits = inputs @ params.weights + params.bias
        cross_entropy = optax.sigmoid_binary_cross_entropy(logits, targets).mean()
        return cross_entropy + 0.5 * l2 * jnp.sum(params.weights**2)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)

    def step(carry):
        params, state = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    def unfinished(carry):
        count, grad = (optax.tree.get(carry[1], name) for name in ("count", "grad"))
        return (count == 0) | ((count < max_iterations) & (optax.tree.norm(grad, ord=jnp.inf) > tolerance))

    params, state = jax.lax.while_loop(unfinished, step, (start, solver.init(start)))
    return params, optax.tree.get(state, "count"), loss(params)


def fit_tag_classifier(
    pooled: np.ndarray, tags: np.ndarray, *, l2: float = 1e-3, max_iterations: int = 200, tolerance: float = 1e-5
) -> tuple[TagClassifier, int, float]:
    """Fit the classifier by L-BFGS on the mean binary cross-entropy, every class weighted the same.

    While fitting, the features are centred and divided by their standard deviation. The division makes the penalty
    treat every channel alike. The centring does not move the minimum, only the number of steps to it changes.
    More than a gigabyte of features is read part by part in every step, and may be memory-mapped: then memory does not grow
    with N.

    Args:
      pooled: [N, C] spatially averaged features of the training images.
      tags: [N, K] bool; column 0 (background) is not fitted.
      l2: weight of the penalty l2 / 2 * |weights|^2 on the weights of the scaled features.
      max_iterations: bound on the number of L-BFGS steps.
      tolerance: stop when no entry of the gradient is larger.

    Returns:
      (TagClassifier, number of iterations, final loss in nats).

    Raises:
      ValueError: if the shapes do not agree.
    """
    if pooled.ndim != 2 or tags.ndim != 2 or len(pooled) != len(tags) or not pooled.size or tags.shape[1] < 2:
        shapes = f"{pooled.shape} and {tags.shape}"
        raise ValueError(f"expected pooled [N, C] and tags [N, K] with N, C >= 1 and K >= 2, got {shapes}")
    if pooled.nbytes > STREAMED_ABOVE:
        return _fitted_by_parts(pooled, np.asarray(tags, bool)[:, 1:], l2, max_iterations, tolerance)
    # In float32 a constant channel would keep a rounding error, and be scaled up to count like the others.
    pooled = np.asarray(pooled, np.float64)
    mean, scale = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
    inputs = jnp.asarray((pooled - mean) / scale, jnp.float32)
    targets = jnp.asarray(tags, jnp.float32)[:, 1:]
    rate = jnp.clip(targets.mean(0), 1e-3, 1 - 1e-3)
    start = TagClassifier(jnp.zeros((inputs.shape[1], targets.shape[1])), jnp.log(rate / (1 - rate)))
    params, count, value = _minimised(start, inputs, targets, l2, max_iterations, tolerance)
    weights = np.asarray(params.weights, np.float64) / scale[:, None]
    bias = np.asarray(params.bias) - mean @ weights
    classifier = TagClassifier(jnp.asarray(weights, jnp.float32), jnp.asarray(bias, jnp.float32))
    return classifier, int(count), float(value)


def _fitted_by_parts(pooled, targets, l2, max_iterations, tolerance):
    """`fit_tag_classifier` of features that are not in memory: (classifier, number of iterations, final loss)."""
    from scipy.optimize import minimize  # a requirement of JAX

    parts = _parts(pooled)
    num_rows, num_channels = pooled.shape
    num_classes = targets.shape[1]
    mean, deviation = column_moments(pooled)
    scale = deviation + 1e-6
    shift, factor = mean.astype(np.float32), (1 / scale).astype(np.float32)

    def loss_and_gradient(values):
        params = values.reshape(num_channels + 1, num_classes)
        weights, bias = params[:-1].astype(np.float32), params[-1].astype(np.float32)
        loss, gradient = 0.0, np.zeros_like(params)
        for part in parts:
            inputs, target = (pooled[part] - shift) * factor, targets[part]
            logits = inputs @ weights + bias
            loss += float(np.logaddexp(0, logits).sum(dtype=np.float64) - logits[target].sum(dtype=np.float64))
            errors = (0.5 * np.tanh(0.5 * logits) + 0.5) - target
            gradient[:-1] += inputs.T @ errors
            gradient[-1] += errors.sum(axis=0, dtype=np.float64)
        gradient /= num_rows * num_classes
        gradient[:-1] += l2 * params[:-1]
        return loss / (num_rows * num_classes) + 0.5 * l2 * np.square(params[:-1]).sum(), gradient.ravel()

    rate = np.clip(targets.mean(axis=0), 1e-3, 1 - 1e-3)
    start = np.concatenate([np.zeros((num_channels, num_classes)), np.log(rate / (1 - rate))[None]])
    options = {"maxiter": max_iterations, "gtol": tolerance, "ftol": 0.0, "maxcor": 10}
    found = minimize(loss_and_gradient, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    params = found.x.reshape(start.shape)
    weights = params[:-1] / scale[:, None]
    classifier = TagClassifier(jnp.asarray(weights, jnp.float32), jnp.asarray(params[-1] - mean @ weights, jnp.float32))
    return classifier, int(found.nit), float(found.fun)


def column_moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column, summed in float64 without a copy of all rows in it.

    Args:
      rows: [N, C] of any float type; it may be memory-mapped.

    Returns:
      (mean [C], standard deviation [C]), float64.
    """
    mean = sum(rows[part].sum(axis=0, dtype=np.float64) for part in _parts(rows)) / len(rows)
    variance = sum(np.square(rows[part] - mean).sum(axis=0) for part in _parts(rows)) / len(rows)
    return mean, np.sqrt(variance)


def _parts(rows):
    return [slice(start, start + _ROWS_IN_MEMORY) for start in range(0, len(rows), _ROWS_IN_MEMORY)]


def average_precision(scores: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """Average precision of each class: the mean precision at the rank of every positive.

    Args:
      scores: [N, K] any real scores, higher is more likely.
      targets: [N, K] bool.

    Returns:
      [K] float64 NumPy array in [0, 1]; NaN for a class without positives. Ties are broken by position.

    Raises:
      ValueError: if scores and targets are not of one shape [N, K].
    """
    scores, targets = np.asarray(scores, np.float64), np.asarray(targets, bool)
    if scores.ndim != 2 or scores.shape != targets.shape:
        shapes = f"{scores.shape} and {targets.shape}"
        raise ValueError(f"expected scores and targets of one shape [N, K], got {shapes}")
    ranked = np.take_along_axis(targets, np.argsort(-scores, axis=0, kind="stable"), axis=0)
    precision = np.cumsum(ranked, axis=0) / np.arange(1, len(ranked) + 1)[:, None]
    positives = ranked.sum(0)
    return np.where(positives > 0, (precision * ranked).sum(0) / np.maximum(positives, 1), np.nan)
