import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lcrf_jax.lattice import (
    apply_lattice,
    build_lattice,
    default_capacity,
    lattice_diagonal,
    lattice_overflowed,
)

build = jax.jit(build_lattice, static_argnums=1)
apply = jax.jit(apply_lattice, static_argnames="symmetric")


def relative(got, expected):
    return np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def photograph():
    """Features of a 48x48 picture, values of it, its exactly filtered values and ones, and its lattice."""
    image = reference.smooth_image(0, 48, 48)
    features = reference.guide_features(image, 20.0, 13.0)
    values = np.concatenate([image.reshape(-1, 3) > 128, np.ones((48 * 48, 1))], axis=1).astype(np.float64)
    return features, values, reference.gaussian_kernel(features) @ values, build(features, 13824)


@pytest.mark.parametrize("num_features", [1, 2, 3, 5, 6])
def test_equals_a_lattice_of_dictionaries(num_features):
    rng = np.random.default_rng(num_features)
    features, values = rng.normal(size=(80, num_features)) * 2, rng.normal(size=(80, 3))
    expected, num_vertices = reference.permutohedral_filter(features, values)
    lattice = build(features, 80 * (num_features + 1))
    assert int(lattice.num_vertices) == num_vertices
    np.testing.assert_allclose(apply(lattice, values), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_approximates_the_exact_filter_on_a_picture(photograph):
    _, values, exact, lattice = photograph
    filtered = np.asarray(apply(lattice, values))
    assert relative(filtered[:, :-1] / filtered[:, -1:], exact[:, :-1] / exact[:, -1:]) < 0.03
    assert relative(filtered, exact) < 0.35
    both = np.asarray(apply(lattice, values, symmetric=True))
    assert relative(both[:, :-1] / both[:, -1:], exact[:, :-1] / exact[:, -1:]) < 0.03


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
    mass = 2**2 * 1.5**0.5 / 2**0.5
    np.testing.assert_allclose(apply(lattice, np.ones((1, 1))), 1.25 * (2 * np.pi) ** 0.5 / mass, rtol=1e-6)


def test_barycentric_weights_are_a_partition_of_unity(photograph):
    weights = photograph[3].weights
    assert np.all(weights > -1e-5)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-5)


def test_does_not_depend_on_capacity_or_order(photograph):
    features, values, _, lattice = photograph
    expected = np.asarray(apply(lattice, values))
    tight = build(features, int(lattice.num_vertices))
    assert not lattice_overflowed(tight)
    np.testing.assert_allclose(apply(tight, values), expected, rtol=1e-4, atol=1e-3)
    order = np.random.default_rng(0).permutation(len(features))
    np.testing.assert_allclose(apply(build(features[order], 13824), values[order]), expected[order], rtol=1e-4, atol=1e-3)


def test_a_lattice_too_small_says_so(photograph):
    features, _, _, lattice = photograph
    assert not lattice_overflowed(lattice)
    for capacity in (int(lattice.num_vertices) - 1, 5):
        assert lattice_overflowed(build(features, capacity))


def test_the_symmetric_form_is_symmetric_and_the_gradient_is_the_transpose():
    features = np.random.default_rng(1).normal(size=(60, 3)) * 1.5
    lattice = build(features, 240)
    forwards = np.asarray(apply(lattice, np.eye(60)))
    both = np.asarray(apply(lattice, np.eye(60), symmetric=True))
    assert relative(forwards, forwards.T) > 1e-3
    np.testing.assert_allclose(both, (forwards + forwards.T) / 2, atol=1e-5)
    rng = np.random.default_rng(2)
    values, cotangent = rng.normal(size=(2, 60, 4)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(cotangent * apply_lattice(lattice, v))))(values)
    np.testing.assert_allclose(gradient, forwards.T @ cotangent, atol=1e-4)


def test_diagonal_is_the_weight_of_the_pixel_itself():
    rng = np.random.default_rng(3)
    dense = rng.uniform(-3, 3, size=(1500, 2))
    lattice = build(dense, 1024)
    inside = np.abs(dense).max(axis=1) < 1
    matrix = np.asarray(apply(lattice, np.eye(1500)))
    np.testing.assert_allclose(lattice_diagonal(lattice)[inside], np.diagonal(matrix)[inside], rtol=1e-4)
    assert np.all(lattice_diagonal(lattice) >= np.diagonal(matrix) - 1e-5)


def test_vmap_equals_a_loop_in_value_and_gradient():
    rng = np.random.default_rng(4)
    features, values = rng.normal(size=(3, 30, 3)) * 2, rng.normal(size=(3, 30, 2)).astype(np.float32)

    def square(values, features):
        filtered = apply_lattice(build_lattice(features, 120), values)
        return jnp.sum(jnp.square(filtered)), filtered

    one = jax.value_and_grad(square, has_aux=True)
    loop = jax.jit(one)
    looped = [loop(v, f) for v, f in zip(values, features, strict=True)]
    (_, filtered), gradients = jax.jit(jax.vmap(one))(values, features)
    np.testing.assert_allclose(filtered, np.stack([f for (_, f), _ in looped]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients, np.stack([g for _, g in looped]), rtol=1e-4, atol=1e-4)


def test_default_capacity_follows_the_pixels():
    assert default_capacity(100, 5) == 600
    assert default_capacity(20_000, 5) == 2**16
    assert default_capacity(187_500, 5) == 187_500


@pytest.mark.parametrize(("call", "message"), [
    (lambda: build_lattice(np.zeros((2, 3, 4))), r"features: expected shape \[m, d\]"),
    (lambda: build_lattice(np.zeros((2, 3)), 0), "capacity"),
    (lambda: apply_lattice(build(np.zeros((1, 1)), 2), np.zeros((3, 1))), r"values: expected shape \[1, K\]"),
    (lambda: default_capacity(0, 5), "num_pixels"),
])
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
