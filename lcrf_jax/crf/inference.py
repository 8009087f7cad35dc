r"""Mean-field inference in the dense conditional random field of `lcrf_jax.crf.energy` with a unary term."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.crf.energy import KernelLike, checked_compatibility, times_compatibility
from lcrf_jax.crf.image_kernels import lattice_image_kernel
from lcrf_jax.crf.kernel import as_kernel
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.numerics import check_number, check_shape, promote_float, varying_like

_ONE_SET = "flatten the pixels to one axis, classes last; for a batch use jax.vmap"


def mean_field(
    unary_logits: ArrayLike,
    kernel: KernelLike,
    *,
    num_iterations: int = 10,
    compatibility: ArrayLike | None = None,
    tolerance: ArrayLike | None = None,
    drop_below: ArrayLike | None = None,
) -> jax.Array:
    r"""Mean-field inference in the dense CRF with a unary term.

    .. math:: q_i^{t+1} = \mathrm{softmax}\Bigl(u_i - \sum_{j \ne i} k_{ij}\,\mu\,q_j^t\Bigr), \qquad
              q_i^0 = \mathrm{softmax}(u_i)

    All pixels are updated in parallel; a lattice alternates between its two orders of blurring. A fixed point is a
    stationary point of `kl_to_prior` minus the expected unary, if the kernel is symmetric. Self-pairs are left
    out.

    Labels that are improbable everywhere can be dropped: the time is about in proportion to the labels that remain.
    With a kernel that is nowhere negative, a dropped label would never exceed 2.72 `drop_below` at any pixel
    (proof: docs/engine.md, "Dropping labels"). In the result it keeps its unary logit, without a message.

    Args:
      unary_logits: [m, K] log-probabilities of a network, or any other logits.
      kernel: [m, m] matrix or kernel object of `lcrf_jax.crf.kernel`.
      num_iterations: static number of updates; 0 returns the normalised unary.
      compatibility: [K, K] cost mu(a, b); None is Potts.
      tolerance: stop early once no probability has changed by more than this, in 0..1; None never does.
      drop_below: drop labels with q^0 below this at every pixel, in 0..1, or below 1 / (2.72 R) if that is
        less, with R the largest row sum of the kernel; for Potts only. The number kept is rounded up to 4, 8,
        16, ..., up to .6 K, or else to K, and each size is compiled. None drops none. Under vmap the images
        are computed one by one.
    Returns:
      [m, K] log-probabilities; their argmax are the labels.
    Raises:
      ValueError: if shapes do not fit, a number is out of range, or labels are to be dropped with another
        compatibility than Potts.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import mean_field
      >>> unary = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 0.5]])  # the third pixel is unsure
      >>> mean_field(unary, 2 * np.ones((3, 3))).argmax(axis=1).tolist()
      [0, 0, 0]
    """
    _, num_classes = check_shape("unary_logits", unary_logits, ("m", "K"), _ONE_SET)
    check_number("num_iterations", num_iterations, minimum=0, remedy="10 is usual")
    check_number("tolerance", tolerance, minimum=0, remedy=".001 stops when labels hardly change any more")
    check_number("drop_below", drop_below, minimum=0, remedy=".001 is safe")
    if drop_below is not None and compatibility is not None:
        raise ValueError("drop_below: expected None with a compatibility, as its bound holds for Potts only")
    kernel = as_kernel(kernel)
    iterate = functools.partial(
        _iterated,
        num_iterations=num_iterations,
        compatibility=checked_compatibility(compatibility, num_classes),
        tolerance=tolerance,
    )
    log_unary = jax.nn.log_softmax(promote_float(unary_logits), axis=-1)
    if drop_below is None or num_iterations == 0:
        return jax.nn.log_softmax(iterate(log_unary, kernel), axis=-1)
    on_few = jax.custom_batching.sequential_vmap(functools.partial(_iterated_on_few, iterate, drop_below))
    return on_few(log_unary, kernel)


def _iterated(log_unary, kernel, num_iterations, compatibility, tolerance):
    """The logits of mean field after the given number of updates."""

    def updated(iteration, logits):
        # Without the barriers XLA on CPU fuses the filter into the softmax and runs it once per reduction.
        probs = jax.lax.optimization_barrier(jax.nn.softmax(logits, axis=-1))
        filtered = jax.lax.optimization_barrier(kernel.apply(probs, backwards=iteration % 2 == 1))
        # With Potts the cost is the sum over the other labels; the sum over all is the same for every label.
        message = -filtered if compatibility is None else times_compatibility(filtered, compatibility)
        return probs, log_unary - message

    if tolerance is None:
        return jax.lax.fori_loop(0, num_iterations, lambda iteration, logits: updated(iteration, logits)[1], log_unary)

    def unfinished(state):
        return (state[0] < num_iterations) & (state[1] > tolerance)

    def step(state):
        iteration, _, logits = state
        probs, new = updated(iteration, logits)
        change = jnp.max(jnp.abs(jax.nn.softmax(new, axis=-1) - probs))
        return iteration + 1, change, new

    start = (0, varying_like(jnp.array(jnp.inf, log_unary.dtype), log_unary), log_unary)
    return jax.lax.while_loop(unfinished, step, start)[2]


def _iterated_on_few(iterate, drop_below, log_unary, kernel):
    """Mean field on the labels that matter, in the smallest of the static sizes that holds them."""
    num_pixels, num_classes = log_unary.shape
    row_sums = kernel.apply(jnp.ones((num_pixels, 1), log_unary.dtype))
    peaks = jnp.exp(log_unary.max(axis=0))
    num_kept = jnp.sum(peaks > jnp.minimum(drop_below, 1 / (math.e * row_sums.max())))
    ordered = jnp.argsort(-peaks)
    sizes = [2**i for i in range(2, num_classes.bit_length()) if 2**i <= 0.6 * num_classes] + [num_classes]

    def with_labels(size):
        def iterated(log_unary, kernel):
            if size == num_classes:
                return iterate(log_unary, kernel)
            kept = ordered[:size]
            return log_unary.at[:, kept].set(iterate(log_unary[:, kept], kernel))

        return iterated

    smallest = jnp.searchsorted(jnp.array(sizes), num_kept)
    logits = jax.lax.switch(smallest, [with_labels(size) for size in sizes], log_unary, kernel)
    return jax.nn.log_softmax(logits, axis=-1)


def refine(
    image: ArrayLike,
    logits: ArrayLike,
    params: KernelParams,
    *,
    num_iterations: int = 10,
    valid: ArrayLike | None = None,
    capacity: int | None = None,
    colour_max: float | None = 255.0,
    drop_below: ArrayLike | None = 1e-3,
) -> jax.Array:
    """Mean field of the dense CRF on an image at its own size, with a network's output as the unary.

    Builds `lattice_image_kernel` (symmetric normalisation, self-pairs left out, Potts) and runs `mean_field`
    on it. All shapes are static: one compilation for each image size. Jit it with `params` closed over or
    static.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      logits: [H, W, K] unnormalised log-probabilities at the size of the image.
      params: `KernelParams` in pixels of this image.
      num_iterations: static number of mean-field updates.
      valid: [H, W] bool, the pixels that belong to the image, see `lattice_image_kernel`; None is all.
      capacity: static number of lattice vertices; None chooses, see `lattice_image_kernel`.
      colour_max: the value of full colour in `image`: 255, or 1.
      drop_below: labels less probable than this at every pixel are left out of the iterations, see
        `mean_field`; None keeps all.
    Returns:
      [H, W, K] log-probabilities; their argmax are the labels. Every one is NaN if the image needed more
      lattice vertices than the capacity, which takes strong noise or very small widths;
      `capacity=H * W * (C + 3)` is always enough.
    Raises:
      ValueError: if image and logits are not of one size, or a width or number is out of range.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    Example:
      >>> import jax, numpy as np
      >>> from lcrf_jax import KernelParams, refine
      >>> image, logits = np.zeros((4, 4, 3), np.uint8), np.tile([1.0, 0.0], (4, 4, 1))
      >>> logits[1, 1] = [0.0, 0.5]  # another label than its neighbours, but the same colour
      >>> refined = jax.jit(lambda i, z: refine(i, z, KernelParams(), drop_below=None))(image, logits)
      >>> refined.shape, refined[1, 1].argmax().item()
      ((4, 4, 2), 0)
    """
    height, width, _ = check_shape("image", image, ("H", "W", "C"), "pass one image; for a batch use jax.vmap")
    remedy = "resize the logits to the image, height first, classes last"
    num_classes = check_shape("logits", logits, (height, width, "K"), remedy)[-1]
    kernel = lattice_image_kernel(image, params, valid=valid, capacity=capacity, colour_max=colour_max)
    unary_logits = promote_float(logits).reshape(height * width, num_classes)
    log_probs = mean_field(unary_logits, kernel, num_iterations=num_iterations, drop_below=drop_below)
    return log_probs.reshape(height, width, num_classes)
