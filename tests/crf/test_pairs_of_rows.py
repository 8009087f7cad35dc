"""The spatial Gaussian on half as many rows, against the Gaussian itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled

from lcrf_jax.crf import image_kernels
from lcrf_jax.crf.kernel import SpatialGaussian
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.crf.spatial import filter_by_pairs, gaussian_taps, own_weight_by_pairs, separable_filter, taps_of_pairs

filter_by_pairs = compiled(filter_by_pairs)
WIDTHS = (3.0, 4.7, 8.0)


def matrix_of(height, width):
    """[H, H] of a column of pixels: column i is what a 1 at row i becomes."""
    ones = np.eye(height, dtype=np.float32)[:, None, :]
    return np.float64(filter_by_pairs(ones, np.float32(taps_of_pairs(width)), np.ones(1, np.float32)))[:, 0]


def true_matrix(height, width):
    apart = np.subtract.outer(np.arange(height), np.arange(height))
    return np.exp(-0.5 * (apart / width) ** 2) * (abs(apart) <= np.ceil(4 * width))


@pytest.mark.parametrize("height", [31, 40])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_rows_are_those_of_the_gaussian(height, width):
    found, expected = matrix_of(height, width), true_matrix(height, width)
    np.testing.assert_allclose(found, found.T, atol=1e-6)
    assert found.min() >= 0
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < {3.0: 0.01, 4.7: 0.0025, 8.0: 0.001}[width]
    np.testing.assert_allclose(np.diag(found), own_weight_by_pairs(taps_of_pairs(width)), rtol=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_sum_and_variance_of_a_row_are_those_of_the_gaussian(width):
    rows = matrix_of(101, width)[50:52]  # an even and an odd one
    apart = np.arange(101) - np.array([[50], [51]])
    np.testing.assert_allclose(rows.sum(axis=1), np.sqrt(2 * np.pi) * width, rtol=2e-3)
    np.testing.assert_allclose((rows * apart).sum(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose((rows * apart**2).sum(axis=1) / rows.sum(axis=1), width**2, rtol=1e-2)


def test_columns_are_filtered_as_they_are():
    values = np.random.default_rng(0).normal(size=(9, 14, 3)).astype(np.float32)
    found = filter_by_pairs(values, np.float32(taps_of_pairs(3.0)), np.float32(gaussian_taps(3.0)))
    expected = np.einsum("rs,ct,stk->rck", matrix_of(9, 3.0), true_matrix(14, 3.0), values)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_taps_beyond_the_rows_change_nothing():
    values = np.random.default_rng(0).normal(size=(31, 1, 31)).astype(np.float32)
    cut, whole = (np.float32(taps_of_pairs(12.0, most=most)) for most in (17, None))
    assert len(cut) == 35 < len(whole)
    one = np.ones(1, np.float32)
    np.testing.assert_allclose(filter_by_pairs(values, cut, one), filter_by_pairs(values, whole, one), atol=1e-5)


def test_the_self_pair_is_left_out_of_the_kernel():
    gaussian = SpatialGaussian(jnp.asarray(gaussian_taps(3.0), jnp.float32), jnp.ones((9, 1)), taps_of_pairs(3.0))
    plain = gaussian._replace(row_taps=None)
    one = jnp.zeros((9, 1, 1)).at[4].set(1)
    assert float(gaussian.own_weight()) == pytest.approx(float(gaussian.filtered(one)[4, 0, 0]), rel=1e-6)
    assert plain.own_weight() == 1.0
    np.testing.assert_array_equal(plain.filtered(one), separable_filter(one, plain.taps))


def test_a_narrow_width_is_refused():
    with pytest.raises(ValueError, match=r"width: expected .*3.*separable_filter"):
        taps_of_pairs(2.0)


@pytest.mark.parametrize(("shape", "form", "width", "by_pairs"), [
    ((96, 96), "lattice", 3.0, True), ((95, 96), "lattice", 3.0, False), ((96, 96), "lattice", 2.9, False),
    ((96, 96), "exact", 3.0, False), ((96, 96), "anchors", 3.0, False),
])
def test_which_kernels_take_it(shape, form, width, by_pairs):
    params = KernelParams(gaussian_position_width=width)
    kernel = jax.eval_shape(lambda: image_kernels.image_kernel(jnp.zeros((*shape, 3)), params, form=form))
    assert (kernel.gaussian.row_taps is not None) == by_pairs
