r"""Mean-field inference in the dense conditional random field of `lcrf_jax.crf.energy` with a unary term."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.assembly import grown_capacity
from lcrf_jax.crf.coarse import CoarseGrid, check_coarse, checked_coarse_iterations, coarse_grid
from lcrf_jax.crf.energy import KernelLike, checked_compatibility, kl_to_prior
from lcrf_jax.crf.image_kernels import default_form, image_kernel
from lcrf_jax.crf.iterations import iterated
from lcrf_jax.crf.kernel import as_kernel, in_one_precision, pixels_of
from lcrf_jax.crf.linear import is_traced, is_tree_of_arrays
from lcrf_jax.crf.params import STATIC_WIDTHS, KernelParams, check_image_shape, checked_params, colours
from lcrf_jax.numerics import check_count, check_logits, check_number, check_shape, known_number, native

_EXACT_PIXELS = 64**2


class MeanFieldPosterior(NamedTuple):
    r"""The factorised posterior q that mean field ends with, and how it came about.

    Attributes:
      log_probs: log q, in the shape of the unary; rows of probabilities sum to 1.
      num_iterations: int32, updates that were made; fewer than asked only with a tolerance.
      change: the largest change of a probability in the last update, in 0..1; 0 without an update.
      free_energy: E_q[-u] + sum_{i<j} k_ij q_i^T mu q_j - H(q), in nats, for the normalised unary u: what the updates
        lower, up to the approximations of a lattice.
      overflowed: bool, whether the lattice of the kernel had too little room; then log_probs are those of the unary,
        without any update.

    Example:
      >>> from lcrf_jax import MeanFieldPosterior
      >>> MeanFieldPosterior._fields
      ('log_probs', 'num_iterations', 'change', 'free_energy', 'overflowed')
    """

    log_probs: jax.Array
    num_iterations: jax.Array
    change: jax.Array
    free_energy: jax.Array
    overflowed: jax.Array


def mean_field(
    unary_logits: ArrayLike,
    kernel: KernelLike,
    *,
    num_iterations: int = 10,
    compatibility: ArrayLike | None = None,
    tolerance: ArrayLike | None = None,
    drop_below: ArrayLike | None = None,
    coarse: CoarseGrid | None = None,
    coarse_iterations: int = 0,
) -> jax.Array:
    r"""Mean-field inference in the dense CRF with a unary term.

    .. math:: q_i^{t+1} = \mathrm{softmax}\Bigl(u_i - \sum_{j \ne i} k_{ij}\,\mu\,q_j^t\Bigr), \qquad
              q_i^0 = \mathrm{softmax}(u_i)

    All pixels are updated in parallel; a lattice alternates between its two orders of blurring. A fixed point is a
    stationary point of `kl_to_prior` minus the expected unary, if the kernel is symmetric. Self-pairs are left
    out.

    The first updates can be made on a coarse grid, where they cost less: on the image averaged over 2 x 2 pixels, with half
    the widths and the mean of the log-probabilities. Their last message, enlarged, is added to the unary, and the others
    go on from there at the pixels. Large regions settle sooner so (docs/engine.md, "Coarse to fine").

    Labels that are improbable everywhere can be dropped: the time is about in proportion to the labels that remain.
    A dropped label would never exceed 2.72 `drop_below` at any pixel (proof for every form of the kernel:
    docs/engine.md, "Dropping labels"). In the result it keeps its unary logit, without a message.

    Derivatives in the unary, in a dense kernel, in the weights of an `ImageKernel` and in the compatibility: all modes
    and orders, under jit and vmap. There are none in the tolerance and in `drop_below`.

    Args:
      unary_logits: [m, K], or [H, W, K] on the grid of the kernel: log-probabilities of a network, or any other
        logits. Energies, as pydensecrf takes them, are logits with the sign turned.
      kernel: [m, m] matrix or kernel object of `lcrf_jax.crf.kernel`.
      num_iterations: static number of updates; 0 returns the normalised unary.
      compatibility: [K, K] symmetric cost mu(a, b); None is Potts. Under jit its symmetric part is taken.
      tolerance: stop early once no probability has changed by more than this, in 0..1; None never does.
      drop_below: drop labels with q^0 below this at every pixel, in 0..1, or below 1 / (2.72 R) if that is
        less, with R the largest row sum of the kernel; for Potts only. The number kept is rounded up to 4, 8,
        16, ..., up to .6 K, or else to K, and each size is compiled. None drops none, and none is dropped where
        the kernel may have negative entries, as that of `anchors`. Under vmap the images are computed one by one.
      coarse: the `coarse_grid` of the image; None for a kernel without one.
      coarse_iterations: static number of updates on the coarse grid: the first ones of `num_iterations`.
    Returns:
      Log-probabilities in the shape of `unary_logits`; their argmax are the labels. Where the lattice of the kernel
      has overflowed they are those of the unary; `mean_field_posterior` tells.
    Raises:
      ValueError: if shapes do not fit, a number is out of range, values that are known are not logits, labels are to be
        dropped with another compatibility than Potts, or there are coarse iterations without a coarse grid.
      TypeError: if a number of iterations is traced, or `coarse` is no `CoarseGrid`.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import mean_field
      >>> unary = np.array([[3.0, 0.0], [3.0, 0.0], [0.0, 0.5]])  # the third pixel is unsure
      >>> mean_field(unary, 2 * np.ones((3, 3))).argmax(axis=1).tolist()
      [0, 0, 0]
    """
    return _posterior(unary_logits, kernel, num_iterations, compatibility, tolerance, drop_below, coarse, coarse_iterations, False)


def mean_field_posterior(
    unary_logits: ArrayLike,
    kernel: KernelLike,
    *,
    num_iterations: int = 10,
    compatibility: ArrayLike | None = None,
    tolerance: ArrayLike | None = None,
    drop_below: ArrayLike | None = None,
    coarse: CoarseGrid | None = None,
    coarse_iterations: int = 0,
) -> MeanFieldPosterior:
    """`mean_field`, and what happened: iterations used, the last change, the free energy, and whether a lattice overflowed.

    Takes the time of one more product with the kernel.

    Args:
      unary_logits: [m, K] or [H, W, K], as for `mean_field`.
      kernel: [m, m] matrix or kernel object.
      num_iterations: static number of updates.
      compatibility: [K, K] symmetric cost mu(a, b); None is Potts.
      tolerance: stop once no probability has changed by more than this; None never does.
      drop_below: drop labels that are less probable than this everywhere; None drops none.
      coarse: the `coarse_grid` of the image, or None.
      coarse_iterations: static number of updates on it, the first ones.
    Returns:
      A `MeanFieldPosterior`.
    Raises:
      ValueError: as `mean_field`.
      TypeError: if `num_iterations` is traced.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import mean_field_posterior
      >>> posterior = mean_field_posterior(np.zeros((3, 2)), np.ones((3, 3)), tolerance=1e-3)
      >>> int(posterior.num_iterations), round(float(posterior.free_energy), 3)  # uniform: nothing to change
      (1, 1.5)
    """
    return _posterior(unary_logits, kernel, num_iterations, compatibility, tolerance, drop_below, coarse, coarse_iterations, True)


def _posterior(
    unary_logits, kernel, num_iterations, compatibility, tolerance, drop_below, coarse, coarse_iterations, measured
):
    kernel = as_kernel(kernel)
    unary, shape = pixels_of("unary_logits", unary_logits, kernel, check_logits)
    num_iterations = check_count("num_iterations", num_iterations, minimum=0, remedy="10 is usual")
    of_coarse = checked_coarse_iterations(coarse_iterations, num_iterations)
    check_coarse(coarse, of_coarse, len(unary))
    check_number("tolerance", tolerance, minimum=0, remedy=".001 stops when labels hardly change any more")
    check_number("drop_below", drop_below, minimum=0, remedy=".001 is safe")
    if drop_below is not None and compatibility is not None:
        raise ValueError("drop_below: expected None with a compatibility, as its bound holds for Potts only")
    compatibility = checked_compatibility(compatibility, shape[-1])
    (kernel, coarse), unary = in_one_precision((kernel, coarse if of_coarse else None), unary)
    if compatibility is not None:
        compatibility = compatibility.astype(unary.dtype)
    arguments = (unary, kernel, compatibility, tolerance, drop_below, coarse)
    # Inside a program of the caller's this is a part of it; called plainly it is one that is compiled once.
    plain = is_tree_of_arrays(arguments) and not is_traced(arguments)
    result = (_compiled_result if plain else _result)(
        *arguments, num_iterations=(of_coarse, num_iterations - of_coarse), measured=measured
    )
    return result._replace(log_probs=result.log_probs.reshape(shape)) if measured else result.reshape(shape)


def _result(unary, kernel, compatibility, tolerance, drop_below, coarse, *, num_iterations, measured):
    """The posterior, or its log-probabilities alone where nothing is measured, [m, K]."""
    log_unary = jax.nn.log_softmax(unary, axis=-1)
    overflowed, usable, coarse = _usable(kernel, coarse)
    result = iterated(
        unary, usable, compatibility, num_iterations=num_iterations, tolerance=tolerance, drop_below=drop_below, coarse=coarse,
        measured=measured,
    )  # fmt: skip
    logits = result.logits if overflowed is None else jnp.where(overflowed, log_unary, result.logits)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if not measured:
        return log_probs
    expected_unary = jnp.sum(jnp.exp(log_probs) * jnp.where(jnp.exp(log_probs) > 0, log_unary, 0))
    overflow = jnp.zeros((), bool) if overflowed is None else overflowed
    return MeanFieldPosterior(
        log_probs=log_probs,
        num_iterations=jnp.where(overflow, 0, result.num_iterations),
        change=jnp.where(overflow, 0, result.change),
        free_energy=kl_to_prior(log_probs, kernel, compatibility=compatibility) - expected_unary,
        overflowed=overflow,
    )


@functools.partial(jax.jit, static_argnames=("num_iterations", "measured"))
def _compiled_result(*arguments, **options):
    return _result(*arguments, **options)


def _usable(kernel, coarse):
    """Whether a kernel has overflowed, or None if it cannot, and both kernels such that products are finite in any case."""
    overflowed, usable = None, kernel
    if hasattr(kernel, "overflowed") and hasattr(kernel, "without_overflow"):
        overflowed, usable = kernel.overflowed(), kernel.without_overflow()
    if coarse is None:
        return overflowed, usable, None
    of_coarse = coarse.kernel.overflowed()
    overflowed = of_coarse if overflowed is None else overflowed | of_coarse
    return overflowed, usable, coarse._replace(kernel=coarse.kernel.without_overflow())


def refine(
    image: ArrayLike,
    logits: ArrayLike,
    params: KernelParams = KernelParams(),  # noqa: B008 - a tuple of numbers
    *,
    form: str | None = None,
    num_iterations: int = 10,
    valid: ArrayLike | None = None,
    capacity: int | None = None,
    colour_max: float | None = 255.0,
    drop_below: ArrayLike | None = 1e-3,
    coarse_iterations: int = 0,
) -> jax.Array:
    """Mean field of the dense CRF on an image at its own size, with a network's output as the unary.

    Builds `image_kernel` (symmetric normalisation, self-pairs left out, Potts) and runs `mean_field` on it. Called
    plainly it is compiled once for each size of image; inside jit, vmap or grad it is a part of your program.
    Derivatives: those of `mean_field`, in the logits and the two weights; in the image and the widths with the forms
    'exact' and 'anchors'.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      logits: [H, W, K] unnormalised log-probabilities at the size of the image.
      params: `KernelParams` in pixels of this image; the default is the usual one.
      form: of the kernel, see `image_kernel`; None is 'exact' up to 64 x 64 pixels, and `default_form` beyond.
      num_iterations: static number of mean-field updates.
      valid: [H, W] bool, the pixels that belong to the image, see `image_kernel`; None is all.
      capacity: static number of lattice vertices, see `lattice_image_kernel`; None chooses, and chooses again where
        it was too small and `refine` is called plainly.
      colour_max: the value of full colour in `image`: 255, or 1.
      drop_below: labels less probable than this at every pixel are left out of the iterations, see
        `mean_field`; None keeps all.
      coarse_iterations: static number of updates on the image averaged over 2 x 2 pixels, the first ones of
        `num_iterations`, see `mean_field`; 6 of 10 pay on photographs with many probable labels (docs/engine.md).
    Returns:
      [H, W, K] log-probabilities; their argmax are the labels. Inside jit they are those of the unary if the image
      needed more lattice vertices than the capacity, which takes strong noise or very small widths:
      `refined_posterior` tells, and `capacity=H * W * (C + 3)` is always enough.
    Raises:
      ValueError: if image and logits are not of one size, a width or number is out of range, values that are known
        are no colours or no logits, or, called plainly, a given `capacity` was too small.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import refine
      >>> image, logits = np.zeros((4, 4, 3), np.uint8), np.tile([1.0, 0.0], (4, 4, 1))
      >>> logits[1, 1] = [0.0, 0.5]  # another label than its neighbours, but the same colour
      >>> refined = refine(image, logits)
      >>> refined.shape, refined[1, 1].argmax().item()
      ((4, 4, 2), 0)
    """
    return _refined(image, logits, params, form, num_iterations, valid, capacity, colour_max, drop_below, coarse_iterations, False)


def refined_posterior(
    image: ArrayLike,
    logits: ArrayLike,
    params: KernelParams = KernelParams(),  # noqa: B008 - a tuple of numbers
    *,
    form: str | None = None,
    num_iterations: int = 10,
    valid: ArrayLike | None = None,
    capacity: int | None = None,
    colour_max: float | None = 255.0,
    drop_below: ArrayLike | None = 1e-3,
    coarse_iterations: int = 0,
) -> MeanFieldPosterior:
    """`refine`, and what happened, see `MeanFieldPosterior`.

    Args:
      image: [H, W, C] colours, as for `refine`.
      logits: [H, W, K] unnormalised log-probabilities at the size of the image.
      params: `KernelParams` in pixels of this image.
      form: of the kernel; None chooses.
      num_iterations: static number of mean-field updates.
      valid: [H, W] bool, the pixels that belong to the image; None is all.
      capacity: static number of lattice vertices; None chooses.
      colour_max: the value of full colour in `image`: 255, or 1.
      drop_below: labels less probable than this at every pixel are left out; None keeps all.
      coarse_iterations: static number of updates on the coarse grid, the first ones.
    Returns:
      A `MeanFieldPosterior` with log_probs [H, W, K].
    Raises:
      ValueError: as `refine`.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import refined_posterior
      >>> posterior = refined_posterior(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 2)), num_iterations=5)
      >>> int(posterior.num_iterations), bool(posterior.overflowed)
      (5, False)
    """
    return _refined(image, logits, params, form, num_iterations, valid, capacity, colour_max, drop_below, coarse_iterations, True)


def _remedy_of_layout(shape, height, width):
    """What to do with logits of a shape that does not fit the image."""
    if len(shape) == 3 and shape[1:] == (height, width):
        return "move the classes to the end, logits.transpose(1, 2, 0)"
    if len(shape) == 2 and shape[1] == height * width:
        return f"give the pixels their axes and move the classes to the end, logits.T.reshape({height}, {width}, -1)"
    if len(shape) == 2 and shape[0] == height * width:
        return f"give the pixels their axes, logits.reshape({height}, {width}, -1)"
    if shape[:2] == (height, width):
        return "a map of labels has no probabilities: give log-probabilities of each class, classes last"
    if len(shape) == 3 and shape[:2] == (width, height):
        return "height comes first, logits.transpose(1, 0, 2)"
    if len(shape) == 4:
        return "take one image of a batch, or use jax.vmap"
    return f'resize them to the image, jax.image.resize(logits, ({height}, {width}, K), "linear"), height first, classes last'


def _refined(
    image, logits, params, form, num_iterations, valid, capacity, colour_max, drop_below, coarse_iterations, measured
):
    # Lists of numbers are arrays as well.
    image, logits, valid = (x if x is None or hasattr(x, "dtype") else np.asarray(x) for x in (image, logits, valid))
    height, width, channels = check_image_shape(image)
    check_shape("logits", logits, (height, width, "K"), _remedy_of_layout(np.shape(logits), height, width))
    if np.shape(logits)[-1] == 1:
        raise ValueError("logits: expected at least two classes, got one; for a network of two classes with one output x give "
                         "jnp.stack([jnp.zeros_like(x), x], axis=-1), with x its logit")  # fmt: skip
    if valid is not None:
        check_shape("valid", valid, (height, width), "give one boolean per pixel of the image")
    if isinstance(logits, np.ndarray) and logits.dtype.kind in "iu":
        logits = logits.astype(np.float32)  # as `promote_float`, before JAX keeps the lower half of large ones
    checked_params(params)
    num_iterations = check_count("num_iterations", num_iterations, minimum=0, remedy="10 is usual")
    check_number("drop_below", drop_below, minimum=0, remedy=".001 is safe")
    if form is None:
        # Exact costs more than a lattice beyond 48 x 48; for an image that is refined once that is worth it up to here.
        form = "exact" if height * width <= _EXACT_PIXELS else default_form(height * width, num_channels=channels)
    of_coarse = checked_coarse_iterations(coarse_iterations, num_iterations)
    options = {"form": form, "colour_max": colour_max, "measured": measured}
    options |= {"num_iterations": num_iterations, "coarse_iterations": of_coarse}
    widths = {name: getattr(params, name) for name in STATIC_WIDTHS}
    if is_traced((image, logits, params, valid, drop_below, colour_max, widths)):
        return _refine(image, logits, params, valid, drop_below, capacity=capacity, **options)[0]
    # Values are known here alone: the program below is compiled once, for any values.
    colours(image, colour_max=colour_max)
    check_logits("logits", logits)
    static = params._replace(**{name: known_number(width) for name, width in widths.items()})
    options["colour_max"] = known_number(colour_max)
    tried, given = capacity, jax.tree.map(native, (image, logits, static, valid, drop_below))
    while True:
        result, needed = _compiled_refine(*given, capacity=tried, **options)
        # Inside a program of the caller's, which holds image and logits as constants, nothing is known either.
        if form != "lattice" or isinstance(needed, jax.core.Tracer) or not bool(needed > 0):
            return result
        tried = grown_capacity(int(needed), capacity, height * width, channels + 2)


def _refine(
    image, logits, params, valid, drop_below, *, form, num_iterations, coarse_iterations, capacity, colour_max, measured
):
    """The posterior or its log-probabilities, and the vertices that were needed if they were too many, 0 else."""
    given = {"form": form, "valid": valid, "colour_max": colour_max, "capacity": capacity}
    kernel, coarse = image_kernel(image, params, **given), None
    needed = _missing(kernel)
    if coarse_iterations:
        coarse = coarse_grid(image, params, **given)
        needed = jnp.maximum(needed, _missing(coarse.kernel))
    result = _posterior(
        logits, kernel, num_iterations, None, None, drop_below, coarse, coarse_iterations, measured
    )
    return result, needed


def _missing(kernel):
    """The vertices that a kernel needed if they were too many, 0 else."""
    return jnp.where(kernel.overflowed(), getattr(kernel.bilateral, "num_vertices", 0), 0)


_STATIC = ("form", "num_iterations", "coarse_iterations", "capacity", "colour_max", "measured")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _compiled_refine(image, logits, params, valid, drop_below, **options):
    return _refine(image, logits, params, valid, drop_below, **options)
