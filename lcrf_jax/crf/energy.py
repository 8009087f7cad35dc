r"""The energy of the dense conditional random field, and the KL divergence to it.

The prior over labels is p(z|x) = exp(-sum_{i<j} k_ij mu(z_i, z_j)) / Z(x): pairwise only, k_ii = 0, each
unordered pair once. Everything here takes its kernel either as a dense matrix [m, m], whose diagonal is
ignored, or as an object of `lcrf_jax.crf.kernel`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.kernel import Kernel, as_kernel, filter_symmetric, in_one_precision, pixels_of
from lcrf_jax.crf.linear import is_sought, is_tree_of_arrays, sought_parts
from lcrf_jax.numerics import (
    check_finite,
    check_logits,
    check_shape,
    check_values,
    entropy,
    first_place,
    is_float64_enabled,
    promote_float,
)

_LARGEST_COST = 1e30  # its sums over pairs of pixels stay within float32
LARGEST = 1e12  # of the values that an energy multiplies with each other and adds up over pairs, in float32

KernelLike = ArrayLike | Kernel
"""What every function takes as its kernel: a dense matrix [m, m], or an object of `lcrf_jax.crf.kernel`."""


def times_compatibility(values: jax.Array, compatibility: jax.Array | None) -> jax.Array:
    """Values times the label compatibility mu; for Potts, mu = 1 - I, without the matrix.

    Args:
      values: [m, K].
      compatibility: [K, K], or None for Potts.
    Returns:
      [m, K].
    """
    if compatibility is None:
        return values.sum(axis=-1, keepdims=True) - values
    return jnp.matmul(values, compatibility, precision=jax.lax.Precision.HIGHEST)


def checked_compatibility(compatibility: ArrayLike | None, num_classes: int) -> jax.Array | None:
    """The symmetric part of a label compatibility, the only part that affects an unordered pair.

    Args:
      compatibility: [K, K] cost mu(a, b), or None for Potts.
      num_classes: K.
    Returns:
      [K, K], or None for Potts.
    Raises:
      ValueError: if it is not [K, K], or its values are known and not finite, too large for float32, or not symmetric.
      TypeError: if it holds no numbers.
    """
    if compatibility is None:
        return None
    check_shape("compatibility", compatibility, (num_classes, num_classes), "give one row and column per class")
    most = math.inf if is_float64_enabled() else _LARGEST_COST
    check_finite("compatibility", compatibility, "None is Potts", minimum=-most, maximum=most)

    def fault_of(costs):
        costs = costs.astype(np.float64)  # differences of booleans and bytes are no numbers of their kind
        apart = np.abs(costs - costs.T)
        if apart.max() <= 1e-5 * np.abs(costs).max():
            return None
        a, b = first_place(apart == apart.max())
        return (
            f"expected a symmetric matrix, got mu({a}, {b}) = {costs[a, b]:g} and mu({b}, {a}) = {costs[b, a]:g}; a pair of "
            "pixels has no order, so only (mu + mu.T) / 2 has a meaning: pass that"
        )

    check_values("compatibility", compatibility, fault_of)
    compatibility = promote_float(compatibility)
    return (compatibility + compatibility.T) / 2


def _energy_of_sums(probs, kernel, compatibility):
    """The energy from the splatted values alone, without a slice back to the pixels."""
    splatted = kernel.splat(probs)
    mixed = jax.tree.map(lambda sums: times_compatibility(sums, compatibility), splatted)
    products = jax.tree.map(jnp.vdot, mixed, kernel.blur(splatted))
    return sum(jax.tree.leaves(products)) / 2


@jax.custom_jvp
def _pairwise_energy(probs, kernel, compatibility):
    return _energy_of_sums(probs, kernel, compatibility)


@functools.partial(_pairwise_energy.defjvp, symbolic_zeros=True)
def _pairwise_energy_derivative(primals, tangents):
    probs, kernel, compatibility = primals
    # The gradient is needed anyway, and its product with q is the cheapest way to the energy.
    gradient = times_compatibility(filter_symmetric(kernel, probs), compatibility)
    value = jnp.vdot(probs, gradient) / 2
    derivative = jnp.vdot(gradient, tangents[0]) if is_sought(tangents[0]) else jnp.zeros_like(value)
    leaves, leaf_tangents, replaced = sought_parts((kernel, compatibility), tangents[1:])
    if leaves:
        # The energy is linear in the kernel and in mu.
        along = jax.jvp(lambda new: _energy_of_sums(probs, *replaced(new)), (leaves,), (leaf_tangents,))[1]
        derivative = derivative + along
    return value, derivative


def pairwise_energy(probs: ArrayLike, kernel: KernelLike, *, compatibility: ArrayLike | None = None) -> jax.Array:
    r"""Expected pairwise energy of the dense CRF under a factorised q.

    .. math:: E = \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j

    Each unordered pair counts once and i = j never does. Only the symmetric parts of k and mu affect the
    energy: with a kernel that is not symmetric, k_ij stands for (k_ij + k_ji) / 2.
    The value alone needs no slice (see `lcrf_jax.crf.kernel`), value and gradient in `probs` together a single
    filtering, and the gradient is the exact one of this value. Derivatives in a dense kernel, in the two weights of
    an `ImageKernel` and in mu are exact as well; in the image and the widths they exist for the forms 'exact' and
    'anchors', and a lattice refuses them. All modes and orders (table: docs/engine.md, "Derivatives").

    Args:
      probs: [m, K], or [H, W, K] on the grid of the kernel: probabilities, rows summing to 1 (not checked; the energy
        is defined without that, for values within +-1e12).
      kernel: [m, m] matrix or kernel object, of any normalisation.
      compatibility: [K, K] symmetric cost mu(a, b) of a pair with labels a and b; None is Potts, mu(a, b) = [a != b].
        Under jit its symmetric part is taken.
    Returns:
      Scalar, not divided by m.
    Raises:
      ValueError: if `probs` is not [m, K] or has a value that is not finite or beyond +-1e12, or kernel or compatibility
        do not fit it.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Tang et al. 2018, the dense-CRF loss.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import pairwise_energy
      >>> labels, kernel = np.eye(2)[[0, 0, 1]], 0.5 * np.ones((3, 3))
      >>> float(pairwise_energy(labels, kernel))  # two of the three pairs differ, each costs 0.5
      1.0
    """
    kernel = as_kernel(kernel)
    check = functools.partial(check_finite, remedy="take the softmax of logits", minimum=-LARGEST, maximum=LARGEST)
    probs, shape = pixels_of("probs", probs, kernel, check)
    compatibility = checked_compatibility(compatibility, shape[-1])
    kernel, probs = in_one_precision(kernel, probs)
    if compatibility is not None:
        compatibility = compatibility.astype(probs.dtype)
    if is_tree_of_arrays(kernel):
        return _pairwise_energy(probs, kernel, compatibility)
    return _energy_of_sums(probs, kernel, compatibility)  # JAX cannot look into the kernel


def kl_to_prior(logits: ArrayLike, kernel: KernelLike, *, compatibility: ArrayLike | None = None) -> jax.Array:
    r"""KL(q || p) of a factorised q to the dense-CRF prior, without log Z.

    .. math:: \sum_i \sum_k \phi_{ik}\log\phi_{ik} + \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j

    Each unordered pair counts once; k_ii = 0; log Z(x) is not included, which no parameter of q changes.

    Args:
      logits: [m, K], or [H, W, K] on the grid of the kernel: unnormalised log-probabilities of q.
      kernel: [m, m] matrix or kernel object of `lcrf_jax.crf.kernel`.
      compatibility: [K, K] symmetric cost mu(a, b); None is Potts.
    Returns:
      Scalar in nats, not divided by m. Add log Z(x) to get the divergence itself.
    Raises:
      ValueError: if `logits` is not [m, K], or kernel or compatibility do not fit it.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import kl_to_prior
      >>> round(float(kl_to_prior(np.zeros((3, 2)), 0.5 * np.ones((3, 3)))), 3)
      -1.329
    """
    kernel = as_kernel(kernel)
    logits, _ = pixels_of("logits", logits, kernel, check_logits)
    probs = jax.nn.softmax(logits, axis=-1)
    return pairwise_energy(probs, kernel, compatibility=compatibility) - entropy(logits).sum()
