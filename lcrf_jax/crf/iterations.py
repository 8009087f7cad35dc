"""The iterations of mean field: all labels or those that matter, all of them or until nothing changes, and derivatives."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcrf_jax.crf.energy import times_compatibility
from lcrf_jax.crf.kernel import Kernel
from lcrf_jax.crf.linear import is_tree_of_arrays, sought_parts
from lcrf_jax.numerics import varying_like


class Iterated(NamedTuple):
    """What the iterations end with.

    Attributes:
      logits: [m, K] those of q, not normalised.
      num_iterations: int32, updates that were made.
      change: the largest change of a probability in the last update; NaN where nobody asked.
    """

    logits: jax.Array
    num_iterations: jax.Array
    change: jax.Array


class _Arguments(NamedTuple):
    """What JAX may trace, batch and differentiate."""

    log_unary: jax.Array
    kernel: Any
    compatibility: jax.Array | None
    tolerance: Any
    drop_below: Any


def iterated(
    log_unary: jax.Array, kernel: Kernel, compatibility: jax.Array | None, *, num_iterations: int, tolerance: Any,
    drop_below: Any, measured: bool,
) -> Iterated:
    """The updates of mean field, see `lcrf_jax.crf.inference.mean_field`.

    Args:
      log_unary: [m, K] normalised unary.
      kernel: kernel object.
      compatibility: [K, K] symmetric, or None for Potts.
      num_iterations: static number of updates, >= 0.
      tolerance: stop at such a change, or None.
      drop_below: leave labels out that are less probable everywhere, or None.
      measured: static, whether the change is wanted also without a tolerance.
    Returns:
      `Iterated`.
    """
    arguments = _Arguments(log_unary, kernel, compatibility, tolerance, drop_below)
    run = functools.partial(_run, num_iterations, measured)
    if num_iterations == 0:
        return Iterated(log_unary, jnp.int32(0), jnp.zeros((), log_unary.dtype))
    if tolerance is None and drop_below is None:
        return run(arguments)
    if not is_tree_of_arrays(arguments):
        return run(arguments, for_derivative=True)  # JAX cannot look into the kernel
    return _with_derivative(run, in_turn=drop_below is not None)(arguments)


def _with_derivative(run, in_turn):
    """The iterations as one function with derivatives of its own: those of loops whose length is static."""
    # A batch that drops labels is done image by image: each keeps a number of its own.
    once = jax.custom_batching.sequential_vmap(run) if in_turn else run

    @jax.custom_jvp
    def iterated(arguments):
        return once(arguments)

    @functools.partial(iterated.defjvp, symbolic_zeros=True)
    def derivative(primals, tangents):
        leaves, leaf_tangents, replaced = sought_parts(primals[0], tangents[0])

        def logits_of(new):
            result = run(replaced(new), for_derivative=True)
            return result.logits, result[1:]

        logits, tangent, rest = jax.jvp(logits_of, (leaves,), (leaf_tangents,), has_aux=True)
        none = Iterated(tangent, jax.numpy.zeros((), jax.dtypes.float0), jnp.zeros_like(rest[1]))
        return Iterated(logits, *rest), none

    return iterated


def _run(num_iterations, measured, arguments, for_derivative=False):
    log_unary, kernel, compatibility, tolerance, drop_below = arguments
    iterate = functools.partial(_all_labels, num_iterations, measured, for_derivative, compatibility, tolerance)
    if drop_below is None:
        return iterate(log_unary, kernel)
    return _few_labels(iterate, drop_below, log_unary, kernel)


def _all_labels(num_iterations, measured, for_derivative, compatibility, tolerance, log_unary, kernel):
    signed = getattr(kernel, "signed", False)
    row_sums = jnp.maximum(kernel.apply(jnp.ones_like(log_unary[:, :1])), 0) if signed else None

    def updated(iteration, logits):
        # Without the barriers XLA on CPU fuses the filter into the softmax and runs it once per reduction.
        probs = jax.lax.optimization_barrier(jax.nn.softmax(logits, axis=-1))
        filtered = jax.lax.optimization_barrier(kernel.apply(probs, backwards=iteration % 2 == 1))
        if row_sums is not None:
            # A weighted sum with weights >= 0 lies between those of the smallest and the largest probability.
            filtered = jnp.clip(filtered, row_sums * probs.min(axis=0), row_sums * probs.max(axis=0))
        # With Potts the cost is the sum over the other labels; the sum over all is the same for every label.
        message = -filtered if compatibility is None else times_compatibility(filtered, compatibility)
        return probs, log_unary - message

    def step(state):
        iteration, _, logits = state
        probs, new = updated(iteration, logits)
        change = jnp.max(jnp.abs(jax.nn.softmax(new, axis=-1) - probs))
        return iteration + 1, change, new

    unknown = varying_like(jnp.array(jnp.nan, log_unary.dtype), log_unary)
    if tolerance is None:
        before = num_iterations - 1 if measured else num_iterations
        logits = jax.lax.fori_loop(0, before, lambda iteration, logits: updated(iteration, logits)[1], log_unary)
        number, change = jnp.int32(num_iterations), unknown
        if measured:
            _, change, logits = step((before, unknown, logits))
        return Iterated(logits, number, change)

    def unfinished(state):
        return (state[0] < num_iterations) & ~(state[1] <= tolerance)

    start = (varying_like(jnp.int32(0), log_unary), unknown, log_unary)
    if for_derivative:
        # Of a loop of static length JAX can take every derivative.
        def step_or_stay(_, state):
            goes_on = unfinished(state)
            return jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), step(state), state)

        number, change, logits = jax.lax.fori_loop(0, num_iterations, step_or_stay, start)
    else:
        number, change, logits = jax.lax.while_loop(unfinished, step, start)
    return Iterated(logits, number, change)


def _few_labels(iterate, drop_below, log_unary, kernel):
    """Mean field on the labels that matter, in the smallest of the static sizes that holds them."""
    num_classes = log_unary.shape[1]
    sizes = [2**i for i in range(2, num_classes.bit_length()) if 2**i <= 0.6 * num_classes] + [num_classes]
    if len(sizes) == 1 or not hasattr(kernel, "largest_row_sums"):
        return iterate(log_unary, kernel)
    positive, negative = kernel.largest_row_sums()
    lowest = jnp.minimum(drop_below, 1 / (math.e * positive)) * jnp.exp(-negative)
    peaks = jnp.exp(log_unary.max(axis=0))
    num_kept = jnp.sum(~(peaks <= lowest))
    ordered = jnp.argsort(-peaks)

    def with_labels(size):
        def of_kept(log_unary, kernel):
            if size == num_classes:
                return iterate(log_unary, kernel)
            kept = ordered[:size]
            result = iterate(log_unary[:, kept], kernel)
            return result._replace(logits=log_unary.at[:, kept].set(result.logits))

        return of_kept

    smallest = jnp.searchsorted(jnp.array(sizes), num_kept)
    return jax.lax.switch(smallest, [with_labels(size) for size in sizes], log_unary, kernel)
