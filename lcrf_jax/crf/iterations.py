"""The iterations of mean field: all labels or those that matter, all of them or until nothing changes, and derivatives."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcrf_jax.crf.coarse import CoarseGrid, averaged, enlarged
from lcrf_jax.crf.energy import times_compatibility
from lcrf_jax.crf.kernel import Kernel
from lcrf_jax.crf.linear import is_tree_of_arrays, sought_parts
from lcrf_jax.numerics import varying_like

_LEAST_LOG_PROB = -1e4
_IMPOSSIBLE = -1e9  # a logit whose probability is 0, and which stays finite
_MOST_KEPT = 2**28  # bytes of what the kernels of a batch keep for many products


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
    coarse: CoarseGrid | None
    of_cells: jax.Array | None


class _Level(NamedTuple):
    """A grid, and the updates that are made on it."""

    log_unary: jax.Array
    kernel: Any
    counted: jax.Array | None


def iterated(
    log_unary: jax.Array, kernel: Kernel, compatibility: jax.Array | None, *, num_iterations: tuple[int, int],
    tolerance: Any, drop_below: Any, coarse: CoarseGrid | None, measured: bool,
) -> Iterated:
    """The updates of mean field, see `lcrf_jax.crf.inference.mean_field`.

    Args:
      log_unary: [m, K] normalised unary.
      kernel: kernel object.
      compatibility: [K, K] symmetric, or None for Potts.
      num_iterations: static numbers of updates on the coarse grid and at the pixels, >= 0.
      tolerance: stop at such a change, or None; each grid by itself.
      drop_below: leave labels out that are less probable everywhere, or None.
      coarse: the coarse grid, or None if no update is made there.
      measured: static, whether the change is wanted also without a tolerance.
    Returns:
      `Iterated`.
    """
    coarse = coarse if num_iterations[0] else None
    of_cells = None if coarse is None else _unary_of_cells(log_unary, coarse)
    arguments = _Arguments(log_unary, kernel, compatibility, tolerance, drop_below, coarse, of_cells)
    run = functools.partial(_run, num_iterations, measured)
    if sum(num_iterations) == 0:
        return Iterated(log_unary, jnp.int32(0), jnp.zeros((), log_unary.dtype))
    is_known = is_tree_of_arrays(arguments)
    kept = sum(map(_bytes_kept, (kernel, coarse and coarse.kernel))) if is_known else 0
    if tolerance is None and drop_below is None and not kept:
        return run(arguments)
    if not is_known:
        return run(arguments, for_derivative=True)  # JAX cannot look into the kernel
    # A batch that drops labels is done image by image: each keeps a number of its own.
    most = 0 if drop_below is not None else _MOST_KEPT // max(kept, 1)
    return _with_derivative(run, most)(arguments)


def _unary_of_cells(log_unary, coarse):
    """[h w, K] the means of the log-probabilities over the cells, normalised."""
    # One pixel of a cell must not forbid what another one forces.
    finite = jnp.maximum(log_unary, _LEAST_LOG_PROB).reshape(*coarse.counted.shape, -1)
    return jax.nn.log_softmax(averaged(finite, coarse.counted).reshape(-1, log_unary.shape[1]), axis=-1)


def _bytes_kept(kernel):
    """What a kernel for many products takes more than one for a single product."""

    def size(made):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(made)))

    return size(kernel.kept) - size(lambda: kernel) if hasattr(kernel, "kept") else 0


def _in_batches(run, most):
    """A function that is done for all images of a batch at once if they are not more than so many, and else image by image."""
    once = jax.custom_batching.custom_vmap(run)

    @once.def_vmap
    def batched(size, are_batched, arguments):
        function = run if size <= most else jax.custom_batching.sequential_vmap(run)
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, are_batched[0])
        result = jax.vmap(function, in_axes=(axes,))(arguments)
        return result, jax.tree.map(lambda _: True, result)

    return once


def _with_derivative(run, most):
    """The iterations as one function with derivatives of its own: those of loops whose length is static, which keep nothing."""
    once = _in_batches(run, most)

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
    log_unary, kernel, compatibility, tolerance, drop_below, coarse, of_cells = arguments
    updates = functools.partial(_updates, for_derivative=for_derivative, compatibility=compatibility, tolerance=tolerance)
    iterate = functools.partial(_coarse_to_fine, updates, num_iterations, measured)
    levels = [_Level(log_unary, kernel, None)]
    if coarse is not None:
        levels.insert(0, _Level(of_cells, coarse.kernel, coarse.counted))
    if not for_derivative:
        levels = [level._replace(kernel=_kept(level.kernel)) for level in levels]
    if drop_below is None:
        return iterate(levels)
    return _few_labels(iterate, drop_below, levels, for_derivative)


def _kept(kernel):
    """The kernel for many products, if it can be that."""
    return kernel.kept() if hasattr(kernel, "kept") else kernel


def _coarse_to_fine(updates, num_iterations, measured, levels):
    """The updates on the coarse grid, if there is one, and those at the pixels."""
    of_coarse, of_fine = num_iterations
    log_unary, kernel, _ = levels[-1]
    if len(levels) == 1:
        return updates(of_fine, measured, log_unary, kernel, log_unary)
    below, coarse_kernel, counted = levels[0]
    first = updates(of_coarse, measured and of_fine == 0, below, coarse_kernel, below)
    message = (first.logits - below).reshape(*coarse_kernel.grid, -1)
    # Without the barrier XLA on CPU enlarges once for each of the two uses in softmax.
    message = jax.lax.optimization_barrier(enlarged(message, counted).reshape(log_unary.shape))
    if of_fine == 0:
        return first._replace(logits=log_unary + message)
    result = updates(of_fine, measured, log_unary, kernel, log_unary + message)
    return result._replace(num_iterations=first.num_iterations + result.num_iterations)


def _updates(num_iterations, measured, log_unary, kernel, start, *, for_derivative, compatibility, tolerance):
    """Updates on one grid, from the logits `start` on."""
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
        logits = jax.lax.fori_loop(0, before, lambda iteration, logits: updated(iteration, logits)[1], start)
        number, change = jnp.int32(num_iterations), unknown
        if measured:
            _, change, logits = step((before, unknown, logits))
        return Iterated(logits, number, change)

    def unfinished(state):
        return (state[0] < num_iterations) & ~(state[1] <= tolerance)

    state = (varying_like(jnp.int32(0), log_unary), unknown, start)
    if for_derivative:
        # Of a loop of static length JAX can take every derivative.
        def step_or_stay(_, state):
            goes_on = unfinished(state)
            return jax.tree.map(lambda new, old: jnp.where(goes_on, new, old), step(state), state)

        number, change, logits = jax.lax.fori_loop(0, num_iterations, step_or_stay, state)
    else:
        number, change, logits = jax.lax.while_loop(unfinished, step, state)
    return Iterated(logits, number, change)


def _few_labels(iterate, drop_below, levels, for_derivative):
    """Mean field on the labels that matter, in the smallest of the static sizes that holds them.

    For derivatives it is made of all labels, of which the others have no probability: JAX cannot transpose the tangents of a
    batch through a choice that each of its images makes for itself.
    """
    log_unary = levels[-1].log_unary
    num_classes = log_unary.shape[1]
    sizes = [2**i for i in range(2, num_classes.bit_length()) if 2**i <= 0.6 * num_classes] + [num_classes]
    if len(sizes) == 1 or not all(hasattr(level.kernel, "largest_row_sums") for level in levels):
        return iterate(levels)
    positive, negative = map(jnp.stack, zip(*(level.kernel.largest_row_sums() for level in levels), strict=True))
    lowest = jnp.minimum(drop_below, 1 / (math.e * positive.max())) * jnp.exp(-negative.max())
    # The mean of log-probabilities over a cell, normalised, may be above what any of its pixels has.
    peaks = jnp.exp(jnp.stack([level.log_unary.max(axis=0) for level in levels]).max(axis=0))
    num_kept = jnp.sum(~(peaks <= lowest))
    ordered = jnp.argsort(-peaks)
    smallest = jnp.searchsorted(jnp.array(sizes), num_kept)
    if for_derivative:
        rank = jnp.zeros(num_classes, int).at[ordered].set(jnp.arange(num_classes))
        kept = rank < jnp.array(sizes)[smallest]
        alone = [level._replace(log_unary=jnp.where(kept, level.log_unary, _IMPOSSIBLE)) for level in levels]
        result = iterate(alone)
        return result._replace(logits=jnp.where(kept, result.logits, log_unary))

    def with_labels(size):
        def of_kept(levels):
            if size == num_classes:
                return iterate(levels)
            kept = ordered[:size]
            result = iterate([level._replace(log_unary=level.log_unary[:, kept]) for level in levels])
            return result._replace(logits=levels[-1].log_unary.at[:, kept].set(result.logits))

        return of_kept

    return jax.lax.switch(smallest, [with_labels(size) for size in sizes], levels)
