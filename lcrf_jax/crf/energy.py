r"""The energy of the dense conditional random field, and the KL divergence to it.

The prior over labels is p(z|x) = exp(-sum_{i<j} k_ij mu(z_i, z_j)) / Z(x): pairwise only, k_ii = 0, each
unordered pair once. Everything here takes its kernel either as a dense matrix [m, m], whose diagonal is
ignored, or as an object of `lcrf_jax.crf.kernel`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.crf.kernel import Kernel, as_kernel, filter_symmetric
from lcrf_jax.numerics import check_shape, entropy, promote_float

_ONE_SET = "flatten the pixels to one axis, classes last; for a batch use jax.vmap"
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
      ValueError: if it is not [K, K].
    """
    if compatibility is None:
        return None
    check_shape("compatibility", compatibility, (num_classes, num_classes), "give one row and column per class")
    compatibility = promote_float(compatibility)
    return (compatibility + compatibility.T) / 2


def _energy_of_sums(probs, kernel, compatibility):
    """The energy from the splatted values alone, without a slice back to the pixels."""
    splatted = kernel.splat(probs)
    mixed = jax.tree.map(lambda sums: times_compatibility(sums, compatibility), splatted)
    products = jax.tree.map(jnp.vdot, mixed, kernel.blur(splatted))
    return sum(jax.tree.leaves(products)) / 2


@jax.custom_vjp
def _pairwise_energy(probs, kernel, compatibility):
    return _energy_of_sums(probs, kernel, compatibility)


def _pairwise_energy_forward(*arguments):
    """The arguments come from JAX with `symbolic_zeros`: each array says whether its gradient is needed."""
    def is_leaf(node):
        return isinstance(node, jax.custom_derivatives.CustomVJPPrimal)

    probs, kernel, compatibility = jax.tree.map(lambda leaf: leaf.value, arguments, is_leaf=is_leaf)
    sought = any(leaf.perturbed for leaf in jax.tree.leaves(arguments[1:], is_leaf=is_leaf))
    # The gradient is needed anyway, and its product with q is the cheapest way to the energy.
    gradient = times_compatibility(filter_symmetric(kernel, probs), compatibility)
    return jnp.vdot(probs, gradient) / 2, (gradient, (probs, kernel, compatibility) if sought else None)


def _pairwise_energy_backward(residuals, cotangent):
    """The gradient in the probabilities comes from the forward pass; those in the kernel and in mu are made here."""
    gradient, arguments = residuals
    if arguments is None:
        return cotangent * gradient, None, None
    # The energy is linear in the kernel and in mu.
    probs, kernel, compatibility = arguments
    _, pull = jax.vjp(functools.partial(_energy_of_sums, probs), kernel, compatibility)
    return (cotangent * gradient, *pull(cotangent))


_pairwise_energy.defvjp(_pairwise_energy_forward, _pairwise_energy_backward, symbolic_zeros=True)


def pairwise_energy(probs: ArrayLike, kernel: KernelLike, *, compatibility: ArrayLike | None = None) -> jax.Array:
    r"""Expected pairwise energy of the dense CRF under a factorised q.

    .. math:: E = \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j

    Each unordered pair counts once and i = j never does. Only the symmetric parts of k and mu affect the
    energy: with a kernel that is not symmetric, k_ij stands for (k_ij + k_ji) / 2.
    The value alone needs no slice (see `lcrf_jax.crf.kernel`), value and gradient in `probs` together a single
    filtering, and the gradient is the exact one of this value. Gradients in a dense kernel, in the two weights of
    an `ImageKernel` and in mu are exact as well; there are none in the arrays of a lattice. Reverse mode only.

    Args:
      probs: [m, K] probabilities, rows summing to 1 (not checked; the energy is defined without that).
      kernel: [m, m] matrix or kernel object, of any normalisation.
      compatibility: [K, K] cost mu(a, b) of a pair with labels a and b; None is Potts, mu(a, b) = [a != b].
    Returns:
      Scalar, not divided by m.
    Raises:
      ValueError: if `probs` is not [m, K], or kernel or compatibility do not fit it.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Tang et al. 2018, the dense-CRF loss.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import pairwise_energy
      >>> labels, kernel = np.eye(2)[[0, 0, 1]], 0.5 * np.ones((3, 3))
      >>> float(pairwise_energy(labels, kernel))  # two of the three pairs differ, each costs 0.5
      1.0
    """
    _, num_classes = check_shape("probs", probs, ("m", "K"), _ONE_SET)
    probs = promote_float(probs)
    return _pairwise_energy(probs, as_kernel(kernel), checked_compatibility(compatibility, num_classes))


def kl_to_prior(logits: ArrayLike, kernel: KernelLike, *, compatibility: ArrayLike | None = None) -> jax.Array:
    r"""KL(q || p) of a factorised q to the dense-CRF prior, without log Z.

    .. math:: \sum_i \sum_k \phi_{ik}\log\phi_{ik} + \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j

    Each unordered pair counts once; k_ii = 0; log Z(x) is not included, which no parameter of q changes.

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      kernel: [m, m] matrix or kernel object of `lcrf_jax.crf.kernel`.
      compatibility: [K, K] cost mu(a, b); None is Potts.
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
    check_shape("logits", logits, ("m", "K"), _ONE_SET)
    logits = promote_float(logits)
    probs = jax.nn.softmax(logits, axis=-1)
    return pairwise_energy(probs, kernel, compatibility=compatibility) - entropy(logits).sum()
