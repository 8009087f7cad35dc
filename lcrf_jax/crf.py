r"""The dense conditional random field: pairwise energy, KL to the prior, and mean field.

The prior over labels is p(z|x) = exp(-sum_{i<j} k_ij mu(z_i, z_j)) / Z(x): pairwise only, k_ii = 0, each
unordered pair once. Everything here takes its kernel either as a dense matrix [m, m] or as an object with two
pure methods,

* `apply(values [m, K]) -> [m, K]`: the kernel times the values, self-pairs left out, and
* `apply_symmetric(values)`: the same with its symmetric part (K + K^T) / 2,

such as `ImageKernel`. A dense matrix may have anything on its diagonal: it is ignored.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcrf_jax.kernels import filter_exact, gaussian_taps, guide_features, separable_filter
from lcrf_jax.lattice import Lattice, apply_lattice, build_lattice, lattice_diagonal
from lcrf_jax.numerics import check_number, check_shape, entropy, promote_float

__all__ = [
    "ImageKernel",
    "exact_image_kernel",
    "filter_symmetric",
    "filter_with",
    "image_kernel",
    "kl_to_prior",
    "mean_field",
    "pairwise_energy",
    "refine",
]

_ONE_SET = "flatten the pixels to one axis, classes last; for a batch use jax.vmap"


class ImageKernel(NamedTuple):
    """The pairwise kernel of one image, k_ij of `lcrf_jax.kernels` with symmetric normalisation, as two filters.

    Made by `image_kernel` or `exact_image_kernel`; everything here takes it in place of a matrix. The two
    weights may be replaced, also by traced values, without building anything again.

    Attributes:
      bilateral: the bilateral Gaussian, a `Lattice`, or [m, 2 + C] features for the exact one.
      bilateral_weight: w1.
      bilateral_scale: [m] D^-1/2 of the bilateral Gaussian.
      bilateral_diagonal: [m] its self-pairs after normalisation.
      gaussian_taps: [2 r + 1] the spatial Gaussian in one dimension.
      gaussian_weight: w2.
      gaussian_scale: [H, W] D^-1/2 of the spatial Gaussian.
    """

    bilateral: Lattice | jax.Array
    bilateral_weight: jax.Array
    bilateral_scale: jax.Array
    bilateral_diagonal: jax.Array
    gaussian_taps: jax.Array
    gaussian_weight: jax.Array
    gaussian_scale: jax.Array

    def apply(self, values):
        """The kernel times values [m, K], self-pairs left out; with a lattice it is not quite symmetric."""
        return self._applied(values, symmetric=False)

    def apply_symmetric(self, values):
        """The symmetric part of the kernel times values [m, K], self-pairs left out."""
        return self._applied(values, symmetric=True)

    def _applied(self, values, symmetric):
        height, width = self.gaussian_scale.shape
        num_pixels, channels = check_shape("values", values, (height * width, "K"), _ONE_SET)
        values = promote_float(values)
        scale = self.bilateral_scale[:, None]
        bilateral = scale * _gaussian_sum(self.bilateral, scale * values, symmetric)
        bilateral = bilateral - self.bilateral_diagonal[:, None] * values
        scale = self.gaussian_scale[:, :, None]
        grid = values.reshape(height, width, channels)
        gaussian = scale * (separable_filter(scale * grid, self.gaussian_taps) - scale * grid)
        return self.bilateral_weight * bilateral + self.gaussian_weight * gaussian.reshape(num_pixels, channels)


def _gaussian_sum(bilateral, values, symmetric=False):
    if isinstance(bilateral, Lattice):
        return apply_lattice(bilateral, values, symmetric=symmetric)
    return filter_exact(bilateral, values)


def _guide_and_mask(image, params, valid):
    """Guide features [m, 2 + C] and which pixels count [m, 1], as 0 and 1."""
    guide = guide_features(
        image,
        position_width=params.bilateral_position_width,
        colour_width=params.bilateral_colour_width,
    )
    if valid is None:
        return guide, jnp.ones_like(guide[:, :1])
    check_shape("valid", valid, jnp.shape(image)[:2], "give one boolean per pixel of the image")
    valid = jnp.reshape(valid, (-1, 1)).astype(bool)
    # Pixels that do not count sit where one that does is, so that they need no vertices of their own.
    return jnp.where(valid, guide, guide[jnp.argmax(valid)]), valid.astype(guide.dtype)


def _normalised(image, params, bilateral, mask, row_sums, diagonal):
    """The kernel with both Gaussians normalised; row sums and self-pairs of the bilateral one are given."""
    dtype = row_sums.dtype
    taps = jnp.asarray(gaussian_taps(params.gaussian_position_width), dtype)
    grid = mask.reshape(*jnp.shape(image)[:2], 1)
    gaussian_sums = separable_filter(grid, taps)
    mask = mask[:, 0]
    return ImageKernel(
        bilateral=bilateral,
        bilateral_weight=jnp.asarray(params.bilateral_weight, dtype),
        bilateral_scale=jnp.where(mask > 0, jax.lax.rsqrt(row_sums), 0),
        bilateral_diagonal=jnp.where(mask > 0, diagonal / row_sums, 0),
        gaussian_taps=taps,
        gaussian_weight=jnp.asarray(params.gaussian_weight, dtype),
        gaussian_scale=jnp.where(grid > 0, jax.lax.rsqrt(gaussian_sums), 0)[:, :, 0],
    )


def image_kernel(image, params, *, valid=None, capacity=None):
    r"""The pairwise kernel of the dense CRF as fast filters, for images of any size.

    .. math:: K = w_1 D_1^{-1/2} K_{bilateral} D_1^{-1/2} + w_2 D_2^{-1/2} K_{spatial} D_2^{-1/2}, \qquad k_{ii} = 0

    The same convention as `dense_kernel(image, params, normalisation='symmetric')`, which it approximates:
    row sums D are the filter's own and include the self-pair; the diagonal is removed last. The bilateral
    Gaussian is a permutohedral lattice, the spatial one separable and cut off at four widths. A lattice that
    overflowed would be silently wrong, so everything this kernel touches is NaN then.

    Args:
      image: [H, W, C] colours in 0..255.
      params: `KernelParams` for this grid; `gaussian_position_width` a Python number.
      valid: [H, W] booleans, at least one of them true; pixels that are false, such as padding, have no pairs
        at all, and the others none with them. None means that all pixels count.
      capacity: static number of lattice vertices; None is `default_capacity(H * W, 2 + C)`.
    Returns:
      An `ImageKernel`; `lattice_overflowed(kernel.bilateral)` tells whether the capacity sufficed.
    Raises:
      ValueError: if `image` is not [H, W, C], `valid` does not fit it or a width is not positive.
      TypeError: if `gaussian_position_width` is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Adams, Baek and Davis 2010.
    """
    guide, mask = _guide_and_mask(image, params, valid)
    lattice = build_lattice(guide, capacity)
    row_sums = apply_lattice(lattice, mask)[:, 0]
    row_sums = jnp.where(lattice.num_vertices > lattice.neighbours.shape[-1], jnp.nan, row_sums)
    return _normalised(image, params, lattice, mask, row_sums, lattice_diagonal(lattice))


def exact_image_kernel(image, params, *, valid=None):
    r"""The pairwise kernel of the dense CRF without its matrix, for coarse grids.

    .. math:: K = w_1 D_1^{-1/2} K_{bilateral} D_1^{-1/2} + w_2 D_2^{-1/2} K_{spatial} D_2^{-1/2}, \qquad k_{ii} = 0

    The same numbers as `dense_kernel(image, params, normalisation='symmetric')`, but for the spatial Gaussian
    being cut off at four widths. The bilateral one is computed anew, block by block, at every use: bounded
    memory, and time quadratic in the pixels.

    Args:
      image: [H, W, C] colours in 0..255.
      params: `KernelParams` for this grid; `gaussian_position_width` a Python number.
      valid: [H, W] booleans, at least one of them true; pixels that are false, such as padding, have no pairs
        at all, and the others none with them. None means that all pixels count.
    Returns:
      An `ImageKernel`.
    Raises:
      ValueError: if `image` is not [H, W, C], `valid` does not fit it or a width is not positive.
      TypeError: if `gaussian_position_width` is not a Python number.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    """
    guide, mask = _guide_and_mask(image, params, valid)
    row_sums = filter_exact(guide, mask)[:, 0]
    return _normalised(image, params, guide, mask, row_sums, jnp.ones_like(row_sums))


def _dense_product(kernel, values):
    product = jnp.matmul(kernel, values, precision=jax.lax.Precision.HIGHEST)
    return product - jnp.diagonal(kernel)[:, None] * values


def filter_with(kernel, values):
    r"""The kernel applied to values, self-pairs left out.

    .. math:: v'_i = \sum_{j \ne i} k_{ij} v_j

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or an object with `apply` (see the module).
      values: [m, K] values to filter.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if a dense kernel does not fit the values.
    References:
      Krahenbuhl and Koltun 2011, section 3.
    """
    num_pixels, _ = check_shape("values", values, ("m", "K"), _ONE_SET)
    values = promote_float(values)
    if hasattr(kernel, "apply"):
        return kernel.apply(values)
    check_shape("kernel", kernel, (num_pixels, num_pixels), "the kernel needs one row and column per pixel")
    return _dense_product(promote_float(kernel), values)


def filter_symmetric(kernel, values):
    r"""The symmetric part of the kernel applied to values, self-pairs left out.

    .. math:: v'_i = \sum_{j \ne i} \tfrac12 (k_{ij} + k_{ji}) v_j

    Args:
      kernel: [m, m] matrix, whose diagonal is ignored, or an object with `apply_symmetric` (see the module).
      values: [m, K] values to filter.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if a dense kernel does not fit the values.
    References:
      None.
    """
    num_pixels, _ = check_shape("values", values, ("m", "K"), _ONE_SET)
    values = promote_float(values)
    if hasattr(kernel, "apply_symmetric"):
        return kernel.apply_symmetric(values)
    check_shape("kernel", kernel, (num_pixels, num_pixels), "the kernel needs one row and column per pixel")
    kernel = promote_float(kernel)
    return (_dense_product(kernel, values) + _dense_product(kernel.T, values)) / 2


def _times_compatibility(values, compatibility):
    """values [m, K] times mu [K, K]; Potts, mu = 1 - I, without the matrix."""
    if compatibility is None:
        return values.sum(axis=-1, keepdims=True) - values
    return jnp.matmul(values, compatibility, precision=jax.lax.Precision.HIGHEST)


def _checked_compatibility(compatibility, num_classes):
    if compatibility is None:
        return None
    check_shape("compatibility", compatibility, (num_classes, num_classes), "give one row and column per class")
    compatibility = promote_float(compatibility)
    return (compatibility + compatibility.T) / 2


def _energy_and_gradient(probs, kernel, compatibility):
    gradient = _times_compatibility(filter_symmetric(kernel, probs), compatibility)
    return jnp.sum(probs * gradient) / 2, gradient


@jax.custom_vjp
def _pairwise_energy(probs, kernel, compatibility):
    return _energy_and_gradient(probs, kernel, compatibility)[0]


def _pairwise_energy_forward(probs, kernel, compatibility):
    energy, gradient = _energy_and_gradient(probs, kernel, compatibility)
    return energy, (gradient, probs, kernel, compatibility)


def _pairwise_energy_backward(residuals, cotangent):
    gradient, probs, kernel, compatibility = residuals
    # The energy is linear in the kernel and in mu. Where nobody asks for these two, jit drops the work.
    linear = functools.partial(_energy_and_gradient, probs)
    _, pull = jax.vjp(lambda *parts: linear(*parts)[0], kernel, compatibility)
    return (cotangent * gradient, *pull(cotangent))


_pairwise_energy.defvjp(_pairwise_energy_forward, _pairwise_energy_backward)


def pairwise_energy(probs, kernel, *, compatibility=None):
    r"""Expected pairwise energy of the dense CRF under a factorised q.

    .. math:: E = \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j

    Each unordered pair counts once and i = j never does. An unordered pair sees only the symmetric parts of k
    and mu, and so does this function: with a kernel that is not symmetric k_ij stands for (k_ij + k_ji) / 2.
    Value and gradient in `probs` come from a single filtering, and the gradient is the exact one of this
    value. Gradients in the kernel (a dense matrix, or the float leaves of a kernel object) and in mu are
    exact as well. Reverse mode only.

    Args:
      probs: [m, K] probabilities, rows summing to 1 (not checked; the energy is defined without that).
      kernel: [m, m] matrix or kernel object; see the module. Its normalisation is the caller's choice.
      compatibility: [K, K] cost mu(a, b) of a pair with labels a and b; None is Potts, mu(a, b) = [a != b].
    Returns:
      Scalar, not divided by m.
    Raises:
      ValueError: if `probs` is not [m, K], or kernel or compatibility do not fit it.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Tang et al. 2018, the dense-CRF loss.
    """
    _, num_classes = check_shape("probs", probs, ("m", "K"), _ONE_SET)
    probs = promote_float(probs)
    return _pairwise_energy(probs, kernel, _checked_compatibility(compatibility, num_classes))


def kl_to_prior(logits, kernel, *, compatibility=None):
    r"""KL(q || p) of a factorised q to the dense-CRF prior, without log Z.

    .. math:: \sum_i \sum_k \phi_{ik}\log\phi_{ik} + \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j

    Each unordered pair counts once; k_ii = 0; log Z(x) is not included, which no parameter of q changes.

    Args:
      logits: [m, K] unnormalised log-probabilities of q.
      kernel: [m, m] matrix or kernel object; see the module.
      compatibility: [K, K] cost mu(a, b); None is Potts.
    Returns:
      Scalar in nats, not divided by m. Add log Z(x) to get the divergence itself.
    Raises:
      ValueError: if `logits` is not [m, K], or kernel or compatibility do not fit it.
    References:
      Krahenbuhl and Koltun 2011, eq. 3.
    """
    check_shape("logits", logits, ("m", "K"), _ONE_SET)
    logits = promote_float(logits)
    probs = jax.nn.softmax(logits, axis=-1)
    return pairwise_energy(probs, kernel, compatibility=compatibility) - entropy(logits).sum()


def mean_field(unary_logits, kernel, *, num_iterations=10, compatibility=None):
    r"""Mean-field inference in the dense CRF with a unary term.

    .. math:: q_i^{t+1} = \mathrm{softmax}\Bigl(u_i - \sum_{j \ne i} k_{ij}\,\mu\,q_j^t\Bigr), \qquad
              q_i^0 = \mathrm{softmax}(u_i)

    All pixels are updated in parallel. A fixed point is a stationary point of `kl_to_prior` minus the
    expected unary, if the kernel is symmetric. Self-pairs are left out.

    Args:
      unary_logits: [m, K] log-probabilities of a network, or any other logits.
      kernel: [m, m] matrix or kernel object; see the module.
      num_iterations: static number of updates; 0 returns the normalised unary.
      compatibility: [K, K] cost mu(a, b); None is Potts.
    Returns:
      [m, K] log-probabilities; their argmax are the labels.
    Raises:
      ValueError: if shapes do not fit or `num_iterations` is negative.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    """
    _, num_classes = check_shape("unary_logits", unary_logits, ("m", "K"), _ONE_SET)
    check_number("num_iterations", num_iterations, minimum=0, remedy="10 is usual")
    unary_logits = promote_float(unary_logits)
    compatibility = _checked_compatibility(compatibility, num_classes)

    def updated(_, log_probs):
        # Without the barriers XLA on CPU fuses the filter into the softmax and runs it once per reduction.
        probs = jax.lax.optimization_barrier(jnp.exp(log_probs))
        filtered = jax.lax.optimization_barrier(filter_with(kernel, probs))
        return jax.nn.log_softmax(unary_logits - _times_compatibility(filtered, compatibility), axis=-1)

    return jax.lax.fori_loop(0, num_iterations, updated, jax.nn.log_softmax(unary_logits, axis=-1))


def refine(image, logits, params, *, num_iterations=10, valid=None, capacity=None):
    """Mean field of the dense CRF on an image at its own size, with a network's output as the unary.

    Builds `image_kernel` (symmetric normalisation, self-pairs left out, Potts) and runs `mean_field`
    on it. All shapes are static: one compilation for each image size. Jit it with `params` closed over or
    static.

    Args:
      image: [H, W, C] colours in 0..255, any real dtype; an image in 0..1 has to be multiplied by 255 first.
      logits: [H, W, K] unnormalised log-probabilities at the size of the image.
      params: `KernelParams` in pixels of this image.
      num_iterations: static number of mean-field updates.
      valid: [H, W] bool, the pixels that belong to the image, see `image_kernel`; None is all.
      capacity: static number of lattice vertices; None is `lcrf_jax.lattice.default_capacity`.
    Returns:
      [H, W, K] log-probabilities. Every one is NaN if the image needed more lattice vertices than the
      capacity, which takes strong noise or very small widths; `capacity=H * W * (C + 3)` is always enough.
    Raises:
      ValueError: if image and logits are not of one size, or a width or number is out of range.
    References:
      Krahenbuhl and Koltun 2011, algorithm 1.
    """
    height, width, _ = check_shape("image", image, ("H", "W", "C"), "pass one image; for a batch use jax.vmap")
    remedy = "resize the logits to the image, height first, classes last"
    num_classes = check_shape("logits", logits, (height, width, "K"), remedy)[-1]
    kernel = image_kernel(image, params, valid=valid, capacity=capacity)
    unary_logits = promote_float(logits).reshape(height * width, num_classes)
    log_probs = mean_field(unary_logits, kernel, num_iterations=num_iterations)
    return log_probs.reshape(height, width, num_classes)
