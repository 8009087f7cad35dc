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
