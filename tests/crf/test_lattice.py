import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lcrf_jax.crf import lattice as lattice_module
from lcrf_jax.crf import lattice_building
from lcrf_jax.crf.lattice import Lattice, lattice_overflowed
from lcrf_jax.crf.lattice_building import build_lattice, default_capacity

# The sizes of the cells that the kernels of images use, in widths: rows, columns, colours.
CELLS = (0.2, 0.2, 0.5, 0.5, 0.5)
SMALL_CELLS = (0.7, 0.7, 0.7)

build = jax.jit(build_lattice, static_argnums=1, static_argnames="cell_sizes")
apply = jax.jit(Lattice.apply)


@jax.jit
def apply_symmetric(lattice, values):
    return lattice.slice(lattice.blur(lattice.splat(values)))


def relative(got, expected):
    return np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)


def expected_filter(features, values, cell_sizes, valid):
    """Values filtered by a lattice of dictionaries, of the means of the cells; and cells and vertices in use."""
    cells, means = reference.cells(features[valid], cell_sizes or (1e-7,) * features.shape[1])
    sums = np.zeros((len(means), values.shape[1]))
    np.add.at(sums, cells, values[valid])
    filtered, num_vertices = reference.permutohedral_filter(means, sums)
    expected = np.zeros(values.shape)
    expected[valid] = filtered[cells]
    return expected, len(means), num_vertices


@pytest.fixture(scope="module", params=[None, CELLS], ids=["pixels", "cells"])
def photograph(request):
    """Features of a 48x48 picture, values of it, its exactly filtered values and ones, and its lattice."""
    image = reference.smooth_image(0, 48, 48)
    features = reference.guide_features(image, 20.0, 13.0)
    values = np.concatenate([image.reshape(-1, 3) > 128, np.ones((48 * 48, 1))], axis=1).astype(np.float64)
    exact = reference.gaussian_kernel(features) @ values
    return features, values, exact, build(features, 13824, cell_sizes=request.param)


@pytest.fixture(scope="module")
def small():
    """Features of 60 points, their lattice, downsampled and without some of the points, and its matrices."""
    rng = np.random.default_rng(1)
    features, valid = rng.normal(size=(60, 3)) * 1.2, rng.uniform(size=60) < 0.9
    lattice = build(features, 240, cell_sizes=SMALL_CELLS, valid=valid)
    assert int(lattice.num_cells) < valid.sum() < 60
    forwards, both = (np.asarray(function(lattice, np.eye(60))) for function in (apply, apply_symmetric))
    return features, valid, lattice, forwards, both


@pytest.mark.slow_except("2")
@pytest.mark.parametrize("num_features", [1, 2, 6])
def test_equals_a_lattice_of_dictionaries(num_features):
    rng = np.random.default_rng(num_features)
    features, values = rng.normal(size=(80, num_features)) * 2, rng.normal(size=(80, 3))
    expected, num_vertices = reference.permutohedral_filter(features, values)
    lattice = build(features, 80 * (num_features + 1))
    assert int(lattice.num_vertices) == num_vertices
    np.testing.assert_allclose(apply(lattice, values), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(("cell_sizes", "blocks"), [
    ((0.8, 1.5, 0.6), None),
    ((1e-4, 1e-4, 1e-4), None),
    ((0.8, 1.5, 0.6), (16, 56)),
    (None, (16, 56)),
])
def test_cells_and_blocks_and_pixels_that_do_not_count(cell_sizes, blocks, monkeypatch):
    if blocks:
        for module in (lattice_module, lattice_building):
            monkeypatch.setattr(module, "CELL_BLOCK", blocks[0])
            monkeypatch.setattr(module, "VERTEX_BLOCK", blocks[1])
        jax.clear_caches()  # parts that were traced with blocks of another size
    rng = np.random.default_rng(6)
    # Away from the origin, where float32 has fewer digits for a mean.
    features, values = rng.normal(size=(100, 3)) * 1.5 + [40, -30, 20], rng.normal(size=(100, 2))
    valid = rng.uniform(size=100) < 0.8
    values[~valid] = 1e6

    @jax.jit
    def filtered(features, values, valid):
        lattice = build_lattice(features, 400, cell_sizes=cell_sizes, valid=valid)
        return lattice, lattice.apply(values), lattice.diagonal()

    lattice, got, diagonal = filtered(features, values, valid)
    expected, num_cells, num_vertices = expected_filter(features, values, cell_sizes, valid)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=3e-4 * np.abs(expected).max())
    assert np.all((np.asarray(diagonal) > 0) == valid)
    # Without cells each pixel is one, whether it counts or not.
    assert int(lattice.num_cells) == (num_cells if cell_sizes else 100)
    assert int(lattice.num_vertices) == num_vertices
    if blocks:
        assert lattice.weights.shape[1] == 112
        assert 16 < num_cells and 56 < num_vertices < 400 - 56


@pytest.mark.slow
def test_approximates_the_exact_filter_on_a_picture(photograph):
    features, values, exact, lattice = photograph
    filtered = np.asarray(apply(lattice, values))
    assert relative(filtered[:, :-1] / filtered[:, -1:], exact[:, :-1] / exact[:, -1:]) < 0.03
    assert relative(filtered, exact) < 0.35
    both = np.asarray(apply_symmetric(lattice, values))
    assert relative(both[:, :-1] / both[:, -1:], exact[:, :-1] / exact[:, -1:]) < 0.03
    num_cells = int(lattice.num_cells)
    assert num_cells == len(features) or 0.05 < num_cells / len(features) < 0.9


@pytest.mark.slow
def test_has_the_integral_of_the_gaussian_where_features_are_dense():
    grid = np.stack(np.meshgrid(*2 * [np.arange(-4, 4, 0.1)], indexing="ij"), axis=-1).reshape(-1, 2)
    inside = np.abs(grid).max(axis=1) < 0.5
    sums = apply(build(grid, 4096), np.ones((len(grid), 1)))[inside, 0]
    np.testing.assert_allclose(np.mean(sums), 2 * np.pi / 0.1**2, rtol=0.01)


def test_one_pixel_by_hand():
    # At the origin all weight is on one of the two corners. Blurring in the one direction and then in the other leads
    # from it to the second corner and back, which adds a quarter.
    lattice = build(np.zeros((1, 1)), 2)
    assert int(lattice.num_vertices) == 2
    np.testing.assert_allclose(np.sort(lattice.weights[:, 0]), [0, 1])
    mass = 2**2 * (1.5 / lattice_module.NARROWING**2) ** 0.5 / 2**0.5
    np.testing.assert_allclose(apply(lattice, np.ones((1, 1))), 1.25 * (2 * np.pi) ** 0.5 / mass, rtol=1e-6)


@pytest.mark.slow
def test_barycentric_weights_are_a_partition_of_unity(photograph):
    weights = photograph[3].weights[:, : int(photograph[3].num_cells)]
    assert np.all(weights > -1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)


@pytest.mark.slow
def test_does_not_depend_on_capacity_or_order_and_is_deterministic(small):
    features, valid, lattice, expected, _ = small
    tight = build(features, int(lattice.num_vertices), cell_sizes=SMALL_CELLS, valid=valid)
    assert not lattice_overflowed(tight)
    np.testing.assert_allclose(apply(tight, np.eye(60)), expected, rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(0).permutation(60)
    permuted = build(features[order], 240, cell_sizes=SMALL_CELLS, valid=valid[order])
    np.testing.assert_allclose(apply(permuted, np.eye(60)), expected[np.ix_(order, order)], rtol=1e-4, atol=1e-5)
    again = build(features, 240, cell_sizes=SMALL_CELLS, valid=valid)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(lattice), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(apply(again, np.eye(60)), expected)


@pytest.mark.slow
def test_a_lattice_too_small_says_so():
    # Thirty points far from each other in one dimension: two vertices each.
    features = 5 * np.arange(30.0)[:, None]
    assert not lattice_overflowed(build(features, 60))
    for capacity in (59, 5):
        overflowed = build(features, capacity)
        assert lattice_overflowed(overflowed)
        assert int(overflowed.num_vertices) > capacity
    assert lattice_overflowed(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), overflowed))


@pytest.mark.slow
def test_slice_is_the_transpose_of_splat_and_the_blur_is_symmetric(small):
    _, _, lattice, _, both = small
    rng = np.random.default_rng(8)
    values = rng.normal(size=(60, 4)).astype(np.float32)
    one, other = rng.normal(size=(2, 240, 4)).astype(np.float32)
    one[int(lattice.num_vertices):] = other[int(lattice.num_vertices):] = 0

    @jax.jit
    def products(lattice, values, one, other):
        splatted, sliced = lattice.splat(values), lattice.slice(one)
        blurred = lattice.blur(one), lattice.blur(other), lattice.blur(one, symmetric=False)
        return splatted, sliced, blurred, lattice.slice(lattice.blur(splatted))

    splatted, sliced, (of_one, of_other, one_way), filtered = products(lattice, values, one, other)
    assert 10 < int(lattice.num_vertices) < 240
    np.testing.assert_allclose(np.vdot(splatted, one), np.vdot(values, sliced), rtol=1e-4)
    np.testing.assert_allclose(np.vdot(of_one, other), np.vdot(one, of_other), rtol=1e-4)
    assert abs(np.vdot(of_one, other) - np.vdot(one_way, other)) > 1e-3 * abs(np.vdot(of_one, other))
    np.testing.assert_allclose(filtered, both @ values, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_scaled_lattice_is_the_kernel_with_rows_and_columns_scaled(small):
    _, _, lattice, matrix, _ = small
    scale = np.random.default_rng(9).uniform(0.5, 2, 61).astype(np.float32)[np.asarray(lattice.cells)]
    scaled = lattice.scaled(scale)
    np.testing.assert_allclose(apply(scaled, np.eye(60)), scale[:, None] * matrix * scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.diagonal(), scale**2 * lattice.diagonal(), rtol=1e-5)


def test_the_symmetric_form_is_symmetric_and_the_gradient_is_the_transpose(small):
    _, _, lattice, forwards, both = small
    assert relative(forwards, forwards.T) > 1e-3
    np.testing.assert_allclose(both, (forwards + forwards.T) / 2, atol=1e-5)
    np.testing.assert_allclose(apply(lattice.reversed(True), np.eye(60)), forwards.T, atol=1e-5)
    np.testing.assert_array_equal(apply(lattice.reversed(False), np.eye(60)), forwards)
    rng = np.random.default_rng(2)
    values, cotangent = rng.normal(size=(2, 60, 4)).astype(np.float32)

    @jax.jit
    def products(values):
        return [jnp.sum(cotangent * function(lattice, values)) for function in (apply, apply_symmetric)]

    for gradient, matrix in zip(jax.jacrev(products)(values), (forwards, both), strict=True):
        np.testing.assert_allclose(gradient, matrix.T @ cotangent, atol=1e-4)


def test_diagonal_is_the_weight_of_the_pixel_itself():
    rng = np.random.default_rng(3)
    dense = rng.uniform(-3, 3, size=(600, 2))
    lattice = build(dense, 1024, cell_sizes=(0.2, 0.3))
    diagonal = np.diagonal(apply(lattice, np.eye(600)))
    np.testing.assert_allclose(lattice.diagonal(), diagonal, rtol=1e-4)


@pytest.mark.slow
def test_float64_stays_float64():
    rng = np.random.default_rng(10)
    features, values = rng.normal(size=(40, 2)), rng.normal(size=(40, 2))
    expected, _ = reference.permutohedral_filter(features, values)
    with jax.enable_x64(True):
        lattice = build(features, 120)
        filtered = apply(lattice, values)
        assert filtered.dtype == lattice.weights.dtype == jnp.float64
    np.testing.assert_allclose(filtered, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_vmap_does_every_image_by_itself_in_value_and_gradient():
    rng = np.random.default_rng(4)
    # Few cells in the first, many in the last: their loops differ in length.
    features = rng.normal(size=(3, 30, 3)) * np.array([0.2, 0.6, 2])[:, None, None]
    values, valid = rng.normal(size=(3, 30, 2)).astype(np.float32), rng.uniform(size=(3, 30)) < 0.9

    @jax.jit
    @jax.vmap
    @functools.partial(jax.value_and_grad, has_aux=True)
    def square(values, features, valid):
        lattice = build_lattice(features, 120, cell_sizes=SMALL_CELLS, valid=valid)
        filtered = lattice.apply(values)
        return jnp.sum(jnp.square(filtered)), (filtered, lattice.num_cells)

    (_, (filtered, num_cells)), gradients = square(values, features, valid)
    assert len(set(num_cells.tolist())) == 3
    for i in range(3):
        matrix, expected_cells, _ = expected_filter(features[i], np.eye(30), SMALL_CELLS, valid[i])
        expected = matrix @ values[i]
        assert int(num_cells[i]) == expected_cells
        np.testing.assert_allclose(filtered[i], expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(gradients[i], 2 * matrix.T @ expected, rtol=1e-3, atol=1e-3)


def test_default_capacity_follows_the_pixels():
    assert default_capacity(1, 5) == 6
    assert default_capacity(1_000, 5) == 6_000
    assert default_capacity(5_000, 5) == 2**14
    assert default_capacity(20_000, 5) == 40_000
    assert default_capacity(50_000, 5) == 2**16
    assert default_capacity(187_500, 5) == 187_500
    assert default_capacity(187_500, 5, share=0.5) == 93_750
    assert default_capacity(187_500, 5, share=0.1) == 2**16


def lattice_of_one():
    return build(np.zeros((1, 1)), 2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: build_lattice(np.zeros((2, 3, 4))), r"features: expected shape \[m, d\]"),
    (lambda: build_lattice(np.zeros((2, 3)), 0), "capacity"),
    (lambda: build_lattice(np.zeros((2, 3)), valid=np.ones(3, bool)), r"valid: expected shape \[2\]"),
    (lambda: build_lattice(np.zeros((2, 3)), cell_sizes=(1.0, 1.0)), r"cell_sizes: expected shape \[3\], got \[2\]"),
    (lambda: build_lattice(np.zeros((2, 3)), cell_sizes=(1.0, 0.0, 1.0)), "cell_sizes.*> 0, got 0.0"),
    (lambda: lattice_of_one().apply(np.zeros((3, 1))), r"values: expected shape \[1, K\]"),
    (lambda: lattice_of_one().splat(np.zeros(1)), r"values: expected shape \[1, K\]"),
    (lambda: lattice_of_one().blur(np.zeros((1, 1))), r"table: expected shape \[2, K\].*splat"),
    (lambda: lattice_of_one().slice(np.zeros((1, 1))), r"table: expected shape \[2, K\]"),
    (lambda: lattice_of_one().scaled(np.zeros((1, 1))), r"scale: expected shape \[1\]"),
    (lambda: default_capacity(0, 5), "num_pixels"),
    (lambda: default_capacity(5, 0), "num_features"),
    (lambda: default_capacity(5, 5, share=0), "share"),
])
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
