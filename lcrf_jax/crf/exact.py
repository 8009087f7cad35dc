"""The kernel of `lcrf_jax.crf.params` by its definition: the dense matrix, and the exact filter, block by block."""

import functools
import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.linear import solved
from lcrf_jax.crf.params import KernelParams, checked_params, colours, guide_features, position_features
from lcrf_jax.numerics import check_count, check_finite, check_shape, promote_float, squared_distances

# 2^x on 0..1 to 2e-7, highest power first: the polynomial of degree 6 through the Chebyshev nodes.
_EXP2_COEFFICIENTS = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 6, domain=[0, 1]).convert(
    kind=np.polynomial.Polynomial
).coef[::-1]
KEPT_PIXELS = 48**2
"""Up to so many pixels the matrix of `ExactGaussian` is kept for many products: 21 MB in float32."""


def gaussian_kernel(features_a: ArrayLike, features_b: ArrayLike | None = None) -> jax.Array:
    r"""The Gaussian of unit width between two sets of features, exactly.

    .. math:: K_{ij} = \exp(-|a_i - b_j|^2 / 2)

    The squared distance is summed from the differences themselves, feature by feature, so that float32 keeps
    its digits however far the features lie from the origin.

    Args:
      features_a: [m, d] features in units of their widths.
      features_b: [n, d], or None for `features_a`.
    Returns:
      [m, n] values in 0..1, with 1 on the diagonal if `features_b` is None.
    Raises:
      ValueError: if the features are not two matrices with the same number of columns, or one is known not to be
        finite.
    References:
      Krahenbuhl and Koltun 2011, eq. 2.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import gaussian_kernel
      >>> gaussian_kernel(np.zeros((2, 3)), np.zeros((4, 3))).shape
      (2, 4)
    """
    _, dimensions = check_shape("features_a", features_a, ("m", "d"), "flatten the pixels to one axis")
    features_b = features_a if features_b is None else features_b
    check_shape("features_b", features_b, ("n", dimensions), "both sets need the same features")
    for name, features in {"features_a": features_a, "features_b": features_b}.items():
        check_finite(name, features, "look at what they were computed from")
    a, b = promote_float(features_a), promote_float(features_b)
    return jnp.exp(-squared_distances(a, b) / 2)


def _normalised_symmetric(kernel):
    scale = jax.lax.rsqrt(kernel.sum(axis=1))
    return scale[:, None] * kernel * scale[None, :]


def _normalised_by_row(kernel):
    return kernel / kernel.sum(axis=1, keepdims=True)


NORMALISATIONS = {
    "none": lambda kernel: kernel,
    "row": _normalised_by_row,
    "symmetric": _normalised_symmetric,
}


def dense_kernel(
    image: ArrayLike, params: KernelParams, *, normalisation: str = "symmetric", colour_max: float | None = 255.0
) -> jax.Array:
    r"""The pairwise kernel of the dense CRF as a matrix.

    .. math:: K = w_1 N(K_{bilateral}) + w_2 N(K_{spatial}), \qquad k_{ii} = 0

    N is applied to each Gaussian alone, with the self-pair (1) in its row sums D = diag(K 1): `none` K, `row`
    D^-1 K, `symmetric` D^-1/2 K D^-1/2, the convention of Krahenbuhl's code. The diagonal is removed last, so
    rows of the result sum to a little less than w1 + w2 (`row`: never more; `symmetric`: about).

    Args:
      image: [H, W, C] colours, see `colours`.
      params: `KernelParams` for this grid; its weights may be traced, for learning them.
      normalisation: a key of `NORMALISATIONS`: 'none', 'row' or 'symmetric'.
      colour_max: the value of full colour in `image`: 255, or 1.
    Returns:
      [m, m] kernel, m = H * W, zero on the diagonal, symmetric except for 'row'. It takes 4 m^2 bytes: 39 MB
      at 56x56, so this form is for coarse grids.
    Raises:
      ValueError: if `image` is not [H, W, C], a width is not positive, or the normalisation is unknown.
    References:
      Krahenbuhl and Koltun 2011, eq. 3; Krahenbuhl and Koltun 2013 for the normalisation.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import KernelParams, dense_kernel
      >>> dense_kernel(np.zeros((2, 3, 3), np.uint8), KernelParams()).shape
      (6, 6)
    """
    if normalisation not in NORMALISATIONS:
        raise ValueError(f"normalisation: expected one of {sorted(NORMALISATIONS)}, got {normalisation!r}")
    checked_params(params)
    image = colours(image, colour_max=colour_max)
    height, width, _ = image.shape
    normalised = NORMALISATIONS[normalisation]
    guide = guide_features(
        image,
        position_width=params.bilateral_position_width,
        colour_width=params.bilateral_colour_width,
    )
    positions = position_features(height, width, position_width=params.gaussian_position_width, dtype=guide.dtype)
    kernel = params.bilateral_weight * normalised(gaussian_kernel(guide))
    kernel = kernel + params.gaussian_weight * normalised(gaussian_kernel(positions))
    return jnp.where(jnp.eye(height * width, dtype=bool), 0, kernel)


def filter_exact(features: ArrayLike, values: ArrayLike, *, block_size: int | None = None) -> jax.Array:
    r"""The Gaussian-weighted sum over all pixels, exactly, in bounded memory.

    .. math:: v'_i = \sum_j \exp(-|f_i - f_j|^2 / 2)\, v_j

    The self-pair j = i is part of the sum; subtract `values` to leave it out. Not normalised: filter ones to
    get the row sums.

    Args:
      features: [m, d] features in units of their widths.
      values: [m, K] values to filter.
      block_size: static number of rows of the kernel held at once; None takes as many as fit
        into 4 MB up to 64 x 64 pixels, into 16 MB beyond.
    Returns:
      [m, K] filtered values.
    Raises:
      ValueError: if the shapes do not fit, a number is known not to be finite, or `block_size` is smaller than 1.
    References:
      Krahenbuhl and Koltun 2011, section 3.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import filter_exact
      >>> filter_exact(np.zeros((4, 2)), np.ones((4, 1)))[:, 0].tolist()  # four pixels at one place
      [4.0, 4.0, 4.0, 4.0]
    """
    num_pixels, _ = check_shape("features", features, ("m", "d"), "flatten the pixels to one axis")
    check_shape("values", values, (num_pixels, "K"), "flatten the pixels to one axis, channels last")
    for name, array in {"features": features, "values": values}.items():
        check_finite(name, array, "look at what they were computed from")
    features, values = promote_float(features), promote_float(values)
    if block_size is None:
        # Small kernels in parts that stay in the cache of a core, large ones in parts that are worth a parallel
        # product. A single part is slower than two: XLA on CPU does not make it a matrix first.
        block_size = (2**20 if num_pixels <= 64**2 else 2**22) // num_pixels
        block_size = max(1, min(block_size, math.ceil(num_pixels / 2)))
    block_size = check_count("block_size", block_size, minimum=1, remedy="None chooses one")
    return _filtered(block_size, features, values)


def _filtered_in_blocks(block_size, features, values):
    num_pixels, dimensions = features.shape
    num_blocks = math.ceil(num_pixels / block_size)
    rows = math.ceil(num_pixels / num_blocks)
    padded = jnp.pad(features, ((0, num_blocks * rows - num_pixels), (0, 0)))

    @jax.checkpoint  # or its derivative would hold the whole kernel
    def filtered(block):
        return _product(_gaussian(block, features), values)

    blocks = jax.lax.map(filtered, padded.reshape(num_blocks, rows, dimensions))
    return blocks.reshape(num_blocks * rows, -1)[:num_pixels]


def _product(matrix, values):
    return jnp.matmul(matrix, values, precision=jax.lax.Precision.HIGHEST)


@functools.partial(jax.jit, static_argnums=0)
def _filtered(block_size, features, values):
    """The filter, which has all derivatives in both arguments; none of them stores the kernel."""
    # A batch is done image by image: blocks of all images at once would not stay in the cache.
    blocks = jax.custom_batching.sequential_vmap(functools.partial(_filtered_in_blocks, block_size))

    def system(both):
        x, y = jnp.split(both, 2)
        return jnp.concatenate([x, y - _filtered_in_blocks(block_size, features, x)])

    # The kernel is symmetric, so the sum is its own transpose in the values.
    product = functools.partial(blocks, features)
    return solved(product, product, values, beside=features, system=system)


@jax.jit
def _matrix(features):
    """The kernel [m, m], with all derivatives."""
    # With the first barrier the same features give the same bits wherever they come from; without the second XLA on CPU computes
    # the matrix anew within each product.
    features = jax.lax.optimization_barrier(features)
    return jax.lax.optimization_barrier(_gaussian(features, features))


def _gaussian(a, b):
    exponents = -squared_distances(a, b) / 2
    return _exp_of_negative(exponents) if exponents.dtype == jnp.float32 else jnp.exp(exponents)


@jax.custom_jvp
def _exp_of_negative(x):
    """exp(x) for x <= 0 in float32; on CPU by a polynomial, in two thirds of the time, to 1e-6 (4e-6 below 1e-20)."""
    return jax.lax.platform_dependent(x, cpu=_exp_by_polynomial, default=jnp.exp)


@_exp_of_negative.defjvp
def _derivative_of_exp(primals, tangents):
    value = _exp_of_negative(*primals)
    return value, value * tangents[0]


def _exp_by_polynomial(x):
    power = jnp.maximum(x * np.float32(1 / math.log(2)), np.float32(-126))
    whole = jnp.floor(power)
    rest = power - whole
    # 2^rest on 0..1, Chebyshev; the whole part goes straight into the exponent of the number.
    value = np.float32(_EXP2_COEFFICIENTS[0])
    for coefficient in _EXP2_COEFFICIENTS[1:]:
        value = value * rest + np.float32(coefficient)
    bits = jax.lax.bitcast_convert_type(value, jnp.int32) + (whole.astype(jnp.int32) << 23)
    value = jnp.where(power > -126, jax.lax.bitcast_convert_type(bits, jnp.float32), 0)
    return jnp.where(jnp.isnan(x), x, value)


class ExactGaussian(NamedTuple):
    """The Gaussian between features, summed over all pairs.

    Attributes:
      features: [m, d] features in units of their widths.
      scale: [m] factors s of diag(s) K diag(s).
      matrix: [m, m] K itself, if it is `kept`; None computes it anew in every product, block by block.
    """

    features: jax.Array
    scale: jax.Array
    matrix: jax.Array | None = None

    def splat(self, values: ArrayLike) -> ArrayLike:
        """The values [m, K] themselves."""
        return values

    def blur(self, values: ArrayLike) -> jax.Array:
        """The kernel times values [m, K], self-pairs included."""
        return self.apply(values)

    def slice(self, values: jax.Array) -> jax.Array:
        """The values [m, K] themselves."""
        return values

    def apply(self, values: ArrayLike, *, backwards: bool | jax.Array = False) -> jax.Array:
        """The kernel times values [m, K], self-pairs included; symmetric, so that there is one order only."""
        del backwards
        values = self.scale[:, None] * values
        product = filter_exact(self.features, values) if self.matrix is None else _product(self.matrix, values)
        return self.scale[:, None] * product

    def kept(self) -> Self:
        """With its matrix in memory, for many products, up to `KEPT_PIXELS`; a larger one as it is."""
        return self if len(self.features) > KEPT_PIXELS else self._replace(matrix=_matrix(self.features))

    def diagonal(self) -> jax.Array:
        """[m] the self-pairs."""
        return jnp.square(self.scale)

    def scaled(self, scale: ArrayLike) -> Self:
        """The kernel with rows and columns scaled by [m] factors, diag(s) K diag(s)."""
        return self._replace(scale=self.scale * scale)

    def row_sums(self, counted: jax.Array) -> jax.Array:
        """[m] sums of the rows over the pixels that count [m], self-pairs included."""
        return self.apply(counted[:, None])[:, 0]

    @property
    def nonnegative(self) -> bool:
        """Whether no entry can be below 0: yes."""
        return True

    @property
    def has_two_orders(self) -> bool:
        """Whether `backwards` makes a difference: no."""
        return False

    def overflowed(self) -> jax.Array:
        """False: there is nothing that could be too small."""
        return jnp.zeros((), bool)

    def cleared(self, overflowed: jax.Array) -> Self:
        """The same."""
        del overflowed
        return self
