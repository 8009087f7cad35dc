"""Mean field on an image with a network's output as the unary, compiled once for each padded size."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.crf.inference import refined_posterior
from lcrf_jax.crf.lattice_building import default_capacity
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.predict.resizing import padded_to

MAX_VERTICES_PER_PIXEL = 6  # of a lattice over two positions and three colours


@functools.partial(
    jax.jit, static_argnames=("kernel_params", "num_iterations", "unary_weight", "capacity", "coarse_iterations")
)
def refined_by_lattice(
    log_probs: jax.Array,
    image: jax.Array | np.ndarray,
    valid: jax.Array | np.ndarray,
    *,
    kernel_params: KernelParams,
    num_iterations: int,
    unary_weight: float,
    capacity: int | None = None,
    coarse_iterations: int = 0,
) -> jax.Array:
    """Log-probabilities after mean field on the image.

    Args:
      log_probs: [h, w, K] log-probabilities of the network.
      image: [h, w, 3] RGB 0..255.
      valid: [h, w] bool, which pixels are true ones and not padding.
      kernel_params: the pairwise kernel, in pixels of the image.
      num_iterations: of mean field.
      unary_weight: factor of the network's log-probabilities.
      capacity: vertices that the kernel's lattice may have; None takes the usual number.
      coarse_iterations: the first ones of mean field, on the image at half its resolution, see
        `lcrf_jax.crf.inference.refine`.

    Returns:
      [h, w, K] float32. All are NaN if the lattice needs more vertices than the capacity.
    """
    return _refined(image, unary_weight * log_probs, kernel_params, num_iterations, valid, capacity, coarse_iterations)


def _refined(image, unary, kernel_params, num_iterations, valid, capacity, coarse_iterations):
    posterior = refined_posterior(
        image, unary, kernel_params, num_iterations=num_iterations, valid=valid, capacity=capacity,
        coarse_iterations=coarse_iterations,
    )
    return jnp.where(posterior.overflowed, jnp.nan, posterior.log_probs)


def adjustable_refinement(
    inference: Mapping[str, Any], changed: Mapping[str, Any], shape: tuple[int, int]
) -> Callable[..., jax.Array]:
    """A refinement with other settings than those of the run, compiled once for many values of them.

    Args:
      inference: settings of the run, see `make_segmenter`.
      changed: dict with new values of "unary_weight", "num_iterations" and fields of the kernel. Three changes compile
        again: the number of iterations, `gaussian_position_width`, and a kernel so narrow that its lattice has to be
        larger.
      shape: (h, w) in pixels of the image that is refined, see `lcrf_jax.predict.resizing.working_size`.

    Returns:
      Function (log-probabilities, image, valid, capacity=None), as `Segmenter.refine`.
    """
    kernel = {**inference["kernel"], **{name: value for name, value in changed.items() if name in KernelParams._fields}}
    width = kernel.pop("gaussian_position_width")
    narrow = kernel["bilateral_position_width"] * kernel["bilateral_colour_width"]
    share = min(1.0, 2.0 ** math.ceil(math.log2(320 / narrow)))
    own_capacity = default_capacity(padded_to(shape[0]) * padded_to(shape[1]), 5, share=share)
    numbers = {**kernel, "unary_weight": changed.get("unary_weight", inference["unary_weight"])}
    numbers = {name: np.float32(value) for name, value in numbers.items()}
    num_iterations = changed.get("num_iterations", inference["num_iterations"])
    coarse_iterations = min(inference.get("coarse_iterations", 0), num_iterations)

    def refine(log_probs, image, valid, capacity=None):
        return _refined_by(
            log_probs, image, valid, numbers, width=width, num_iterations=num_iterations, capacity=capacity or own_capacity,
            coarse_iterations=coarse_iterations,
        )

    return refine


@functools.partial(jax.jit, static_argnames=("width", "num_iterations", "capacity", "coarse_iterations"))
def _refined_by(log_probs, image, valid, numbers, *, width, num_iterations, capacity, coarse_iterations):
    kernel = {name: value for name, value in numbers.items() if name != "unary_weight"}
    kernel_params = KernelParams(**kernel, gaussian_position_width=width)
    return _refined(image, numbers["unary_weight"] * log_probs, kernel_params, num_iterations, valid, capacity, coarse_iterations)
