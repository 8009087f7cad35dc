import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled
from jax.sharding import PartitionSpec

from lcrf_jax.crf.anchor_building import build_anchors
from lcrf_jax.crf.anchors import Anchors

build_anchors = compiled(build_anchors)

STATIC = ("position_width", "colour_width", "num_anchors", "block_size")
build = jax.jit(build_anchors, static_argnames=STATIC)
diagonal = jax.jit(Anchors.diagonal)


def filtered(anchors, values):
    return anchors.slice(anchors.blur(anchors.splat(values)))


apply = jax.jit(filtered)
square_gradient = jax.jit(jax.grad(lambda values, anchors: jnp.sum(filtered(anchors, values) ** 2)))


def matrix(anchors):
    return np.asarray(apply(anchors, np.eye(anchors.weights.size, dtype=anchors.weights.dtype)))


def exact(image, position_width, colour_width):
    return reference.gaussian_kernel(reference.guide_features(image, position_width, colour_width))


def relative(got, expected):
    return np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)


def off_diagonal(kernel):
    return kernel - np.diag(np.diagonal(kernel))


@pytest.fixture(scope="module")
def textured():
    """A picture with texture, soft probabilities of five classes at its pixels, and its exact kernel."""
    rng = np.random.default_rng(5)
    image = reference.smooth_image(5, 36, 45, noise=0)
    coarse = rng.normal(size=(9, 9, 3)) * 12
    image = np.clip(image + np.kron(coarse, np.ones((4, 5, 1))) + rng.normal(size=image.shape) * 5, 0, 255)
    logits = np.kron(rng.normal(size=(4, 5, 5)), np.ones((9, 9, 1))) + 0.3 * rng.normal(size=(36, 45, 5))
    return image, reference.softmax(4 * logits).reshape(-1, 5), exact(image, 10.0, 13.0)


def errors(picture, **options):
    """Relative error of the filtered probabilities and of the Potts energy, self-pairs left out."""
    image, probs, kernel = picture
    anchors = build(image, position_width=10.0, colour_width=13.0, **options)
    got = np.float64(apply(anchors, probs)) - np.float64(diagonal(anchors))[:, None] * probs
    expected = off_diagonal(kernel) @ probs
    energies = [np.sum(product) - np.sum(probs * product) for product in (got, expected)]
    return relative(got, expected), abs(energies[0] / energies[1] - 1)


def test_approximates_the_exact_sum_without_any_scale(textured):
    gradient_error, energy_error = errors(textured)
    assert gradient_error < 0.035
    assert energy_error < 0.012


@pytest.mark.slow
def test_more_anchors_and_smaller_blocks_are_more_accurate(textured):
    by_anchors = [errors(textured, num_anchors=number, block_size=5)[0] for number in (8, 48, 256)]
    assert np.all(np.diff(by_anchors) < 0)
    assert by_anchors[0] > 0.15
    assert by_anchors[-1] < 0.02
    by_blocks = [errors(textured, num_anchors=256, block_size=size)[0] for size in (10, 3)]
    assert by_blocks[1] < 0.01 and by_blocks[0] > 0.03


def test_exact_where_each_pixel_is_a_block_and_each_colour_an_anchor():
    rng = np.random.default_rng(0)
    palette = np.array([[0, 0, 0], [20, 0, 0], [0, 25, 5], [200, 100, 50], [210, 110, 40]])
    image = palette[rng.integers(0, 5, size=(7, 9))]
    with jax.enable_x64(True):
        anchors = build(np.float64(image), position_width=3.0, colour_width=13.0, num_anchors=16, block_size=1)
        assert anchors.root.dtype == np.float64
        got = matrix(anchors)
    np.testing.assert_allclose(got, exact(image, 3.0, 13.0), atol=3e-4)


def test_one_colour_is_the_gaussian_over_positions_by_hand():
    # Two blocks of three pixels in a row: on each the Gaussian is replaced by its least-squares fit on 1 and column.
    anchors = build(np.full((1, 6, 3), 90.0), position_width=4.0, colour_width=13.0, num_anchors=4, block_size=3)
    functions = np.array([[1.0, 1, 1], [-1, 0, 1]]).T
    fit = np.kron(np.eye(2), functions @ np.linalg.inv(functions.T @ functions) @ functions.T)
    gaussian = np.exp(-0.5 * np.square(np.subtract.outer(np.arange(6), np.arange(6)) / 4.0))
    np.testing.assert_allclose(matrix(anchors), fit @ gaussian @ fit, atol=1e-4)


# The last has more than 341 blocks: another way through the blur.
@pytest.mark.slow_except("shape0-5")
@pytest.mark.parametrize(("shape", "block_size"), [((13, 17, 3), 5), ((5, 23, 1), 4), ((21, 18, 4), 1)])
def test_is_symmetric_and_positive_with_the_diagonal_it_says(shape, block_size):
    image = np.random.default_rng(1).uniform(80, 160, size=shape).round()
    anchors = build(image, position_width=6.0, colour_width=13.0, num_anchors=40, block_size=block_size)
    kernel = matrix(anchors)
    np.testing.assert_allclose(kernel, kernel.T, atol=3e-5)
    assert np.linalg.eigvalsh(np.float64(kernel)).min() > -1e-4
    np.testing.assert_allclose(diagonal(anchors), np.diagonal(kernel), atol=3e-5)
    assert np.trace(kernel) > 0.2 * len(kernel)


def test_slice_is_the_transpose_of_splat_and_the_splat_has_the_energy(textured):
    image, probs, _ = textured
    anchors = build(image, position_width=10.0, colour_width=13.0, num_anchors=64)
    coarse = jax.jit(Anchors.splat)(anchors, probs)
    other = np.random.default_rng(2).normal(size=coarse.shape).astype(np.float32)
    sliced = jax.jit(Anchors.slice)(anchors, other)
    np.testing.assert_allclose(np.vdot(np.float64(coarse), other), np.vdot(probs, np.float64(sliced)), rtol=1e-4)
    energy = np.vdot(np.float64(coarse), anchors.blur(coarse))
    np.testing.assert_allclose(energy, np.vdot(probs, np.float64(apply(anchors, probs))), rtol=1e-4)


def test_the_gradient_is_the_transpose(textured):
    image, probs, _ = textured
    anchors = build(image, position_width=10.0, colour_width=13.0, num_anchors=64)
    cotangent = np.random.default_rng(3).normal(size=probs.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda values: jnp.vdot(cotangent, filtered(anchors, values))))(np.float32(probs))
    np.testing.assert_allclose(gradient, apply(anchors, cotangent), atol=2e-3)


@pytest.mark.slow
def test_scaled_anchors_scale_rows_and_columns():
    image = reference.smooth_image(1, 12, 10)
    anchors = build(image, position_width=5.0, colour_width=13.0, num_anchors=32)
    scale = np.random.default_rng(4).uniform(0.1, 2, size=120)
    scaled = anchors.scaled(scale)
    expected = scale[:, None] * matrix(anchors) * scale
    np.testing.assert_allclose(matrix(scaled), expected, atol=1e-5)
    np.testing.assert_allclose(diagonal(scaled), np.diagonal(expected), atol=1e-5)


@pytest.mark.slow
def test_pixels_that_do_not_count_take_no_part():
    image = reference.smooth_image(2, 16, 14)
    valid = np.zeros((16, 14), bool)
    valid[:11, :9] = True
    options = {"position_width": 6.0, "colour_width": 13.0, "num_anchors": 64}
    kernel = matrix(build(image, valid=valid, **options))
    inside = valid.ravel()
    assert np.all(kernel[~inside] == 0)
    assert np.all(kernel[:, ~inside] == 0)
    assert relative(kernel[inside][:, inside], exact(image[:11, :9], 6.0, 13.0)) < 0.08
    # What such pixels contain makes no difference.
    other = np.where(valid[:, :, None], image, 255 - image[::-1, ::-1])
    np.testing.assert_allclose(matrix(build(other, valid=valid, **options)), kernel, atol=1e-6)


@pytest.mark.slow
def test_everything_large_goes_block_by_block_through_the_cache(monkeypatch):
    image = reference.smooth_image(3, 20, 26)
    values = np.random.default_rng(5).normal(size=(520, 3)).astype(np.float32)
    anchors = build(image, position_width=9.0, colour_width=13.0, num_anchors=48)
    expected, expected_diagonal = apply(anchors, values), diagonal(anchors)
    monkeypatch.setattr("lcrf_jax.crf.anchors._CACHED", 2 * 48 * 36)
    np.testing.assert_allclose(jax.jit(lambda v: filtered(anchors, v))(values), expected, atol=1e-4)
    np.testing.assert_allclose(jax.jit(lambda: anchors.diagonal())(), expected_diagonal, atol=1e-5)


@pytest.mark.slow_except("image2-*", "image5-*")
@pytest.mark.parametrize(("image", "position_width", "colour_width", "num_anchors"), [
    (np.full((9, 9, 3), 128.0), 4.0, 13.0, 32),
    (np.full((1, 1, 3), 7.0), 4.0, 13.0, 128),
    (np.zeros((1, 40, 3)), 80.0, 13.0, 8),
    (np.linspace(0, 255, 40).reshape(40, 1, 1), 80.0, 13.0, 64),
    (np.random.default_rng(0).uniform(0, 255, size=(8, 9, 3)), 0.3, 13.0, 96),
    (np.random.default_rng(1).uniform(0, 255, size=(8, 9, 3)), 8.0, 1e-3, 20),
    (255.0 * (np.indices((8, 8)).sum(axis=0) % 2)[:, :, None], 5.0, 1e-2, 7),
    (np.random.default_rng(2).uniform(0, 255, size=(6, 7, 5)), 5.0, 1e5, 50),
])
def test_extremes_are_finite_and_near_the_exact_kernel(image, position_width, colour_width, num_anchors):
    anchors = build(image, position_width=position_width, colour_width=colour_width, num_anchors=num_anchors)
    kernel = matrix(anchors)
    assert np.all(np.isfinite(kernel))
    # Blocks are linear fits: within 5 % of the largest entry. Colours without an anchor lack their self-pair alone.
    expected = off_diagonal(exact(image, position_width, colour_width))
    np.testing.assert_allclose(off_diagonal(kernel), expected, atol=0.05)
    assert np.all(np.isfinite(square_gradient(np.ones((len(kernel), 2), np.float32), anchors)))


def test_an_image_that_is_not_constant_finds_its_few_colours_whatever_their_share():
    # One pixel in 500 has the second colour; both have to be anchors.
    image = np.full((25, 20, 3), 30.0)
    image[13, 7] = 220.0
    anchors = build(image, position_width=20.0, colour_width=13.0, num_anchors=2)
    np.testing.assert_allclose(np.sort(np.asarray(anchors.centres)[:, 0] * 13), [30, 220], rtol=1e-5)
    np.testing.assert_allclose(diagonal(anchors)[13 * 20 + 7], 1, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.uint8])
def test_other_dtypes_are_computed_in_float32(dtype):
    image = jnp.asarray(reference.smooth_image(4, 11, 12).round(), dtype)
    values = jnp.asarray(np.random.default_rng(6).uniform(0, 4, size=(132, 3)), dtype)
    got = apply(build(image, position_width=6.0, colour_width=13.0, num_anchors=48), values)
    assert got.dtype == jnp.float32
    single = build(image.astype(np.float32), position_width=6.0, colour_width=13.0, num_anchors=48)
    np.testing.assert_allclose(got, apply(single, values.astype(np.float32)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_float64_is_computed_in_float64():
    image = reference.smooth_image(4, 11, 12)
    values = np.random.default_rng(6).uniform(size=(132, 3))
    options = {"position_width": 6.0, "colour_width": 13.0, "num_anchors": 48}
    single = apply(build(image, **options), values)
    with jax.enable_x64(True):
        double = apply(build(image, **options), values)
        assert double.dtype == np.float64
    np.testing.assert_allclose(single, double, rtol=1e-3)


def built_and_filtered(image, values):
    anchors = build_anchors(image, position_width=7.0, colour_width=13.0, num_anchors=32)
    return filtered(anchors, values), anchors.diagonal()


def batch(size):
    images = np.stack([reference.smooth_image(seed, 15, 19) for seed in range(size)]).astype(np.float32)
    return images, np.random.default_rng(7).normal(size=(size, 285, 2)).astype(np.float32)


@pytest.mark.slow
def test_vmap_equals_a_loop():
    images, values = batch(2)
    one = jax.jit(built_and_filtered)
    looped = [one(image, v) for image, v in zip(images, values, strict=True)]
    for got, expected in zip(jax.jit(jax.vmap(built_and_filtered))(images, values), zip(*looped, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(expected), atol=1e-3)


@pytest.mark.slow
def test_shard_map_equals_one_device():
    images, values = batch(jax.device_count())
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("data")
    many = jax.vmap(built_and_filtered)
    spread = jax.shard_map(many, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec))
    for got, expected in zip(jax.jit(spread)(images, values), jax.jit(many)(images, values), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-3)


@pytest.mark.slow
def test_the_width_may_be_traced_where_the_block_size_is_given():
    image = reference.smooth_image(4, 11, 12)
    options = {"colour_width": 13.0, "num_anchors": 32, "block_size": 4}
    traced = jax.jit(lambda width: build_anchors(image, position_width=width, **options))(6.0)
    np.testing.assert_allclose(matrix(traced), matrix(build(image, position_width=6.0, **options)), atol=1e-5)


def build_with(**changes):
    arguments = {"image": np.zeros((4, 4, 3)), "position_width": 4.0, "colour_width": 13.0, "num_anchors": 4}
    return build_anchors(**{**arguments, **changes})


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: build_with(image=np.zeros((2, 4, 4, 3))), ValueError, r"image: expected shape \[H, W, C\].*vmap"),
    (lambda: build_with(position_width=0.0), ValueError, "position_width: expected a finite number > 0"),
    (lambda: build_with(colour_width=-1.0), ValueError, "colour_width"),
    (lambda: build_with(num_anchors=0), ValueError, "num_anchors"),
    (lambda: build_with(block_size=0), ValueError, "block_size"),
    (lambda: build_with(valid=np.ones((4, 3), bool)), ValueError, r"valid: expected shape \[4, 4\]"),
    (lambda: jax.jit(lambda w: build_with(position_width=w))(2.0), TypeError, "position_width.*block_size"),
    (lambda: build_with().splat(np.zeros((4, 4, 2))), ValueError, r"values: expected shape \[16, K\]"),
    (lambda: build_with().splat(np.zeros((15, 2))), ValueError, r"values: expected shape \[16, K\]"),
    (lambda: build_with().blur(np.zeros((1, 2, 3, 4, 2))), ValueError, "coarse.*splat"),
    (lambda: build_with().slice(np.zeros((2, 2, 3, 5, 2))), ValueError, "coarse.*blur"),
    (lambda: build_with().scaled(np.ones((4, 4))), ValueError, r"scale: expected shape \[16\]"),
])
def test_bad_arguments_are_told(call, error, message):
    with pytest.raises(error, match=message):
        call()
