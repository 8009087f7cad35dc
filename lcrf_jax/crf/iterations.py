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

    unary: jax.Array
    kernel: Any
    compatibility: jax.Array | None
    tolerance: Any
    drop_below: Any
    coarse: CoarseGrid | None
    of_cells: jax.Array | None


class _Level(NamedTuple):
    """A grid, and the updates that are made on it.

    The normalised unary is an expression of arrays that are there already: kept for all iterations, it would be a further array of
    the size of the image times the labels.
    """

    unary: jax.Array
    largest: jax.Array
    log_sum: jax.Array
    kernel: Any
    counted: jax.Array | None

    @property
    def log_unary(self) -> jax.Array:
        """[m, K] `jax.nn.log_softmax` of the unary, or what is left of it where labels are dropped."""
        return _normalised(self.unary, self.largest, self.log_sum)


def _normalised(unary, largest, log_sum):
    return unary - largest - log_sum


def iterated(
    unary: jax.Array, kernel: Kernel, compatibility: jax.Array | None, *, num_iterations: tuple[int, int],
    tolerance: Any, drop_below: Any, coarse: CoarseGrid | None, measured: bool,
) -> Iterated:
    """The updates of mean field, see `lcrf_jax.crf.inference.mean_field`.

    Args:
      unary: [m, K] logits.
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
    of_cells = None if coarse is None else _unary_of_cells(jax.nn.log_softmax(unary), coarse)
    arguments = _Arguments(unary, kernel, compatibility, tolerance, drop_below, coarse, of_cells)
    run = functools.partial(_run, num_iterations, measured)
    if sum(num_iterations) == 0:
        return Iterated(jax.nn.log_softmax(unary), jnp.int32(0), jnp.zeros((), unary.dtype))
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
    """A function that is done for a batch at once if this has not more kernels than so many, and else image by image."""
    once = jax.custom_batching.custom_vmap(run)

    @once.def_vmap
    def batched(size, are_batched, arguments):
        num_kernels = size if any(jax.tree.leaves((are_batched[0].kernel, are_batched[0].coarse))) else 1
        function = run if num_kernels <= most else jax.custom_batching.sequential_vmap(run)
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
    unary, kernel, compatibility, tolerance, drop_below, coarse, of_cells = arguments
    updates = functools.partial(_updates, for_derivative=for_derivative, compatibility=compatibility, tolerance=tolerance)
    iterate = functools.partial(_coarse_to_fine, updates, num_iterations, measured)
    largest = jax.lax.stop_gradient(unary.max(axis=-1, keepdims=True))
    log_sum = jnp.log(jnp.exp(unary - largest).sum(axis=-1, keepdims=True))
    levels = [_Level(unary, largest, log_sum, kernel, None)]
    if coarse is not None:
        none = jnp.zeros_like(of_cells[:, :1])
        levels.insert(0, _Level(of_cells, none, none, coarse.kernel, coarse.counted))
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
    fine = levels[-1]
    if len(levels) == 1:
        return updates(of_fine, measured, fine, fine.log_unary)
    below = levels[0]
    first = updates(of_coarse, measured and of_fine == 0, below, below.log_unary)
    message = (first.logits - below.log_unary).reshape(*below.kernel.grid, -1)
    # Without the barrier XLA on CPU enlarges once for each of the two uses in softmax.
    message = jax.lax.optimization_barrier(enlarged(message, below.counted).reshape(fine.unary.shape))
    if of_fine == 0:
        return first._replace(logits=fine.log_unary + message)
    result = updates(of_fine, measured, fine, fine.log_unary + message)
    return result._replace(num_iterations=first.num_iterations + result.num_iterations)


def _updates(num_iterations, measured, level, start, *, for_derivative, compatibility, tolerance):
    """Updates on one grid, from the logits `start` on."""
    kernel = level.kernel
    signed = getattr(kernel, "signed", False)
    row_sums = jnp.maximum(kernel.apply(jnp.ones_like(start[:, :1])), 0) if signed else None

    def updated(iteration, logits):
        # Without the barriers XLA on CPU fuses the filter into the softmax and runs it once per reduction; and it makes the array of
        # the normalised unary before the loop, if nothing of it comes from within.
        probs, *normaliser = jax.lax.optimization_barrier((jax.nn.softmax(logits, axis=-1), level.largest, level.log_sum))
        filtered = jax.lax.optimization_barrier(kernel.apply(probs, backwards=iteration % 2 == 1))
        if row_sums is not None:
            # A weighted sum with weights >= 0 lies between those of the smallest and the largest probability.
            filtered = jnp.clip(filtered, row_sums * probs.min(axis=0), row_sums * probs.max(axis=0))
        # With Potts the cost is the sum over the other labels; the sum over all is the same for every label.
        message = -filtered if compatibility is None else times_compatibility(filtered, compatibility)
        return probs, _normalised(level.unary, *normaliser) - message

    def largest_change(probs, new):
        return jnp.max(jnp.abs(jax.nn.softmax(new, axis=-1) - probs))

    def step(state):
        iteration, _, logits = state
        probs, new = updated(iteration, logits)
        return iteration + 1, largest_change(probs, new), new

    unknown = varying_like(jnp.array(jnp.nan, start.dtype), start)
    if tolerance is None:

        def step_of_many(iteration, state):
            probs, new = updated(iteration, state[0])
            if not measured:
                return new, state[1]
            # Within the loop, and of its last step alone: a step of its own would hold what it needs beside the loop.
            of_last = jax.lax.cond(
                iteration == num_iterations - 1, largest_change, lambda *_: unknown, *jax.lax.stop_gradient((probs, new))
            )
            return new, of_last

        logits, change = jax.lax.fori_loop(0, num_iterations, step_of_many, (start, unknown))
        return Iterated(logits, jnp.int32(num_iterations), change)

    def unfinished(state):
        return (state[0] < num_iterations) & ~(state[1] <= tolerance)

    state = (varying_like(jnp.int32(0), start), unknown, start)
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
    num_classes = levels[-1].unary.shape[1]
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
        result = iterate([level._replace(unary=jnp.where(kept, level.unary, _IMPOSSIBLE)) for level in levels])
        return result._replace(logits=jnp.where(kept, result.logits, levels[-1].log_unary))

    def with_labels(size):
        def of_kept(levels):
            if size == num_classes:
                return iterate(levels)
            kept = ordered[:size]
            result = iterate([level._replace(unary=level.unary[:, kept]) for level in levels])
            return result._replace(logits=levels[-1].log_unary.at[:, kept].set(result.logits))

        return of_kept

    return jax.lax.switch(smallest, [with_labels(size) for size in sizes], levels)
