import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled
from jax.test_util import check_grads

from lcrf_jax.crf import exact, image_kernels
from lcrf_jax.crf.exact import NORMALISATIONS, ExactGaussian, dense_kernel, filter_exact, gaussian_kernel
from lcrf_jax.crf.params import KernelParams, colours, guide_features, position_features
from lcrf_jax.crf.spatial import gaussian_taps, separable_filter

colours, dense_kernel, filter_exact, gaussian_kernel, guide_features, position_features, separable_filter = map(
    compiled, (colours, dense_kernel, filter_exact, gaussian_kernel, guide_features, position_features, separable_filter)
)
PARAMS = KernelParams(10.0, 6.0, 13.0, 3.0, 1.5)


def test_guide_features_are_rows_columns_and_channels_in_units_of_their_widths():
    image = reference.smooth_image(0, 5, 7)
    features = jax.jit(lambda x: guide_features(x, position_width=3.0, colour_width=13.0))(image)
    expected = reference.guide_features(image, 3.0, 13.0)
    np.testing.assert_allclose(features, expected, rtol=1e-5)
    np.testing.assert_allclose(position_features(5, 7, position_width=3.0), np.asarray(features)[:, :2], rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_any_number_of_channels(channels):
    image = np.random.default_rng(0).uniform(0, 255, (3, 4, channels))
    assert guide_features(image, position_width=2.0, colour_width=9.0).shape == (12, 2 + channels)
    assert dense_kernel(image, PARAMS).shape == (12, 12)


def test_gaussian_kernel_equals_float64_far_from_the_origin():
    features = np.random.default_rng(1).normal(size=(60, 5)) * 2 + 100
    features = np.float32(features)
    np.testing.assert_allclose(
        jax.jit(gaussian_kernel)(features), reference.gaussian_kernel(features), rtol=1e-5, atol=1e-30
    )
    np.testing.assert_allclose(
        gaussian_kernel(features[:7], features), reference.gaussian_kernel(features[:7], features), rtol=1e-5, atol=1e-30
    )


@pytest.mark.parametrize("normalisation", sorted(NORMALISATIONS))
def test_dense_kernel_equals_the_loops(normalisation):
    image = reference.smooth_image(2, 6, 5)
    kernel = jax.jit(lambda x: dense_kernel(x, PARAMS, normalisation=normalisation))(image)
    np.testing.assert_allclose(kernel, reference.dense_kernel(image, PARAMS, normalisation), rtol=2e-5, atol=1e-7)


def test_two_pixels_by_hand():
    image = np.array([[[0.0], [13.0]]])
    params = KernelParams(2.0, 1.0, 13.0, 5.0, 1.0)
    bilateral, spatial = np.exp(-1.0), np.exp(-0.5)
    raw = 2 * bilateral + 5 * spatial
    normalised = 2 * bilateral / (1 + bilateral) + 5 * spatial / (1 + spatial)
    np.testing.assert_allclose(dense_kernel(image, params, normalisation="none"), [[0, raw], [raw, 0]], rtol=1e-6)
    for normalisation in ("row", "symmetric"):
        kernel = dense_kernel(image, params, normalisation=normalisation)
        np.testing.assert_allclose(kernel, [[0, normalised], [normalised, 0]], rtol=1e-6)


def test_self_pairs_are_in_the_row_sums_and_removed_last():
    image = reference.smooth_image(3, 6, 6)
    only_spatial = PARAMS._replace(bilateral_weight=0.0, gaussian_weight=1.0)
    sums = reference.gaussian_kernel(reference.guide_features(image, 1.5, 1.0)[:, :2]).sum(axis=1)
    kernel = dense_kernel(image, only_spatial, normalisation="row")
    np.testing.assert_allclose(kernel.sum(axis=1), 1 - 1 / sums, rtol=1e-5)
    np.testing.assert_array_equal(np.diagonal(dense_kernel(image, PARAMS)), 0)


def test_kernel_does_not_see_a_shift_of_colours_and_follows_a_flip():
    image = reference.smooth_image(4, 5, 6) / 2
    with jax.disable_jit():  # fused, the two halves of the matrix differ in the last bit
        kernel = np.asarray(dense_kernel(image, PARAMS))
    np.testing.assert_allclose(dense_kernel(image + 40, PARAMS), kernel, rtol=1e-4, atol=1e-6)
    flipped = np.asarray(dense_kernel(image[::-1, ::-1], PARAMS))
    np.testing.assert_allclose(flipped[::-1, ::-1], kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(kernel, kernel.T, rtol=1e-6)


def test_a_coarser_grid_has_smaller_widths():
    assert KernelParams().at_stride(4) == KernelParams(10.0, 20.0, 13.0, 3.0, 0.75)
    with pytest.raises(ValueError, match="stride"):
        KernelParams().at_stride(0)


def test_weights_are_differentiable():
    image = reference.smooth_image(5, 3, 3)

    def total(bilateral, spatial):
        params = PARAMS._replace(bilateral_weight=bilateral, gaussian_weight=spatial)
        return jnp.sum(jnp.square(dense_kernel(image, params)))

    with jax.enable_x64(True):
        check_grads(total, (1.3, 0.7), order=1)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_dtypes_of_the_image(dtype):
    image = np.round(reference.smooth_image(6, 4, 4)).astype(dtype)
    kernel = dense_kernel(image, PARAMS)
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, reference.dense_kernel(image, PARAMS, "symmetric"), rtol=2e-5, atol=1e-7)


def test_extremes_are_finite():
    one_pixel = dense_kernel(np.zeros((1, 1, 3)), PARAMS)
    np.testing.assert_array_equal(one_pixel, [[0.0]])
    black_and_white = np.array([[[0.0] * 3, [255.0] * 3]])
    narrow = KernelParams(1.0, 1e-3, 1e-3, 1.0, 1e-3)
    np.testing.assert_allclose(dense_kernel(black_and_white, narrow), 0, atol=1e-30)
    constant = dense_kernel(np.full((3, 3, 3), 7.0), KernelParams(1.0, 1e6, 13.0, 0.0, 3.0))
    np.testing.assert_allclose(constant, (1 - np.eye(9)) / 9, rtol=1e-5)


def test_images_in_other_ranges_are_the_same_image():
    image = reference.smooth_image(8, 4, 5)
    kernel = jax.jit(lambda x: dense_kernel(x, PARAMS, colour_max=1))(image / 255)
    np.testing.assert_allclose(kernel, reference.dense_kernel(image, PARAMS, "symmetric"), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(jax.jit(lambda x: colours(x, colour_max=1.0))(image / 255), image, rtol=1e-6)
    sixteen_bits = np.round(image * 257).astype(np.uint16)
    np.testing.assert_allclose(colours(sixteen_bits, colour_max=65535), image, atol=0.01)
    # What is known under jit is not traced.
    np.testing.assert_allclose(jax.jit(lambda: colours(image / 255, colour_max=1.0))(), image, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float16", "bfloat16", "float32"])
def test_colours_are_floats(dtype):
    image = np.arange(24).reshape(2, 4, 3).astype(jnp.dtype(dtype))
    colour_max = 1 if dtype == "bool" else 255
    got = colours(image, colour_max=colour_max)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, image.astype(np.float32) * (255 / colour_max))


def test_what_may_be_dark_or_no_image_is_let_through():
    black = np.zeros((2, 2, 3))
    for image, colour_max in [
        (black, 255), (black, 1.0), (black + 0.5, 255), (np.arange(12).reshape(2, 2, 3) % 2, 255), (black + 255, 255),
        (black + 1, 1), (black - 7, None), (black + 1e6, None), (black + np.nan, None),
    ]:
        np.testing.assert_allclose(colours(image, colour_max=colour_max), image * (255 if colour_max == 1 else 1))
    traced = jax.jit(lambda x: colours(x, colour_max=1.0))(black + 7)
    np.testing.assert_allclose(traced, 7 * 255)


FRACTIONS = np.linspace(0, 1, 12).reshape(2, 2, 3)


def test_what_resampling_overshoots_is_accepted():
    image = 270 * FRACTIONS - 8
    np.testing.assert_allclose(colours(image, colour_max=255), image, rtol=1e-6)


@pytest.mark.parametrize(("image", "colour_max", "message"), [
    (FRACTIONS, 255, r"image: expected values in 0..255, got 0..1, .*pass colour_max=1"),
    (np.float16(FRACTIONS), 255, "pass colour_max=1"),
    (jnp.asarray(FRACTIONS, jnp.bfloat16), 255.0, "pass colour_max=1"),
    (FRACTIONS > 0.5, 255, "pass colour_max=1"),
    (255 * FRACTIONS, 65535, "pass colour_max=1"),
    (255 * FRACTIONS, 1.0, r"expected values in 0..1.0, got 0..255; pass colour_max=255"),
    (np.uint8(255 * FRACTIONS), 1, r"image: expected floats in 0..1, got integers; pass colour_max=255"),
    (np.uint8(FRACTIONS), 1.0, "got integers"),
    (np.where(FRACTIONS > 0.8, np.nan, 90.0), 255, r"expected finite numbers, got nan at \[1, 1, 0\]"),
    (np.where(FRACTIONS > 0.8, np.inf, 90.0), 255, r"expected finite numbers, got inf at \[1, 1, 0\]"),
    (4 * FRACTIONS - 2, 255, r"got -2..2"),
    (300 * FRACTIONS, 255, r"got 0..300"),
    (np.arange(12).reshape(2, 2, 3) - 1, 255, r"got -1..10"),
    (255 * FRACTIONS, 0, "colour_max: expected a finite number > 0, got 0"),
    (255 * FRACTIONS, -255.0, "colour_max"),
    (255 * FRACTIONS[0], 255, r"image: expected shape \[H, W, C\], got \[2, 3\]"),
])
def test_colours_that_cannot_be_right_are_told(image, colour_max, message):
    with jax.disable_jit(), pytest.raises(ValueError, match=message):  # the values are seen outside jit alone
        colours(image, colour_max=colour_max)


def test_integers_that_a_colour_max_of_one_forbids_are_told_under_jit():
    with pytest.raises(ValueError, match="got integers"):
        jax.jit(lambda x: colours(x, colour_max=1))(np.zeros((2, 2, 3), np.uint8))


def test_a_width_for_each_channel():
    image = reference.smooth_image(9, 3, 4)
    widths = [13.0, 5.0, 40.0]
    expected = reference.guide_features(image, 3.0, np.array(widths))
    for given in (widths, tuple(widths), np.array(widths), jnp.array(widths)):
        np.testing.assert_allclose(guide_features(image, position_width=3.0, colour_width=given), expected, rtol=1e-5)
    traced = jax.jit(lambda x, w: guide_features(x, position_width=3.0, colour_width=w))(image, np.array(widths))
    np.testing.assert_allclose(traced, expected, rtol=1e-5)


@pytest.mark.parametrize("block_size", [None, 1, 7, 64, 1000])
def test_filter_exact_equals_float64_for_every_block_size(block_size):
    rng = np.random.default_rng(7)
    image = reference.smooth_image(7, 9, 11)
    features, values = reference.guide_features(image, 6.0, 13.0), rng.normal(size=(99, 4))
    filtered = jax.jit(lambda f, v: filter_exact(f, v, block_size=block_size))(features, values)
    expected = reference.gaussian_kernel(features) @ values
    np.testing.assert_allclose(filtered, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_filter_exact_under_vmap_equals_a_loop():
    rng = np.random.default_rng(8)
    features, values = rng.normal(size=(3, 20, 5)), rng.normal(size=(3, 20, 2))
    looped = jnp.stack([filter_exact(f, v) for f, v in zip(features, values, strict=True)])
    np.testing.assert_allclose(jax.vmap(filter_exact)(features, values), looped, rtol=1e-5, atol=1e-6)


def exact_gaussian(seed=9, num_pixels=30):
    rng = np.random.default_rng(seed)
    features, scale = rng.normal(size=(num_pixels, 5)), rng.uniform(0.5, 1, num_pixels)
    gaussian = ExactGaussian(jnp.float32(features), jnp.float32(scale))
    return gaussian, scale[:, None] * reference.gaussian_kernel(features) * scale, rng.normal(size=(num_pixels, 4))


def test_a_gaussian_that_is_kept_has_the_same_products():
    gaussian, matrix, values = exact_gaussian()
    assert gaussian.matrix is None and gaussian.kept().matrix.shape == (30, 30)
    for given in (gaussian, gaussian.kept()):
        np.testing.assert_allclose(given.apply(values), matrix @ values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gaussian.kept().scaled(2.0).apply(values), 4 * matrix @ values, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), gaussian)
        np.testing.assert_allclose(wide.kept().apply(values), wide.apply(values), rtol=1e-12)


def test_a_gaussian_of_many_pixels_is_not_kept():
    for num_pixels, is_kept in ((exact.KEPT_PIXELS, True), (exact.KEPT_PIXELS + 1, False)):
        given = ExactGaussian(jnp.zeros((num_pixels, 2)), jnp.ones(num_pixels))
        assert (jax.eval_shape(lambda given: given.kept(), given).matrix is not None) == is_kept


@pytest.mark.parametrize("is_kept", [True, False])
def test_an_exact_gaussian_has_the_derivatives_of_its_features_kept_or_not(is_kept):
    gaussian, _, values = exact_gaussian(num_pixels=6)

    def found(features):
        given = gaussian._replace(features=features)
        return jnp.sum(jnp.sin((given.kept() if is_kept else given).apply(values)))

    def expected(features):
        scale = gaussian.scale[:, None]
        return jnp.sum(jnp.sin(scale * (gaussian_kernel(features) @ (scale * values))))

    for derivative in (jax.grad, jax.hessian):
        wanted = derivative(expected)(gaussian.features)
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(derivative(found)(gaussian.features), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(9, 14, 2), (1, 5, 1), (3, 1, 2)])
@pytest.mark.parametrize("width", [0.2, 1.5, 4.0])
def test_separable_filter_is_the_gaussian_over_positions_up_to_the_border(shape, width):
    values = np.random.default_rng(9).uniform(size=shape)
    filtered = jax.jit(lambda v: separable_filter(v, gaussian_taps(width)))(values)
    features = reference.guide_features(np.zeros((*shape[:2], 1)), width, 1.0)
    expected = reference.gaussian_kernel(features) @ values.reshape(-1, shape[2])
    np.testing.assert_allclose(filtered, expected.reshape(shape), rtol=1e-3)


def test_separable_filter_by_hand():
    values = np.zeros((3, 4, 1))
    values[0, 1] = 1
    filtered = separable_filter(values, np.array([2.0, 1.0, 0.5]))[..., 0]
    np.testing.assert_allclose(filtered, [[0.5, 1, 2, 0], [1, 2, 4, 0], [0, 0, 0, 0]])


def test_separable_filter_under_vmap_equals_a_loop():
    values = np.random.default_rng(10).normal(size=(3, 5, 6, 2))
    taps = gaussian_taps(1.0)
    looped = jnp.stack([separable_filter(v, taps) for v in values])
    np.testing.assert_allclose(jax.vmap(lambda v: separable_filter(v, taps))(values), looped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: dense_kernel(np.zeros((2, 3, 4, 3)), PARAMS), r"image: expected shape \[H, W, C\].*jax\.vmap"),
    (lambda: dense_kernel(np.zeros((4, 4)), PARAMS), r"got \[4, 4\]"),
    (lambda: dense_kernel(np.zeros((2, 2, 3)), PARAMS, normalisation="rows"), "one of .*'row'.*got 'rows'"),
    (lambda: dense_kernel(np.zeros((2, 2, 3)), PARAMS._replace(bilateral_colour_width=0)), "colour_width.*got 0"),
    (lambda: dense_kernel(np.zeros((2, 2, 3)), PARAMS._replace(gaussian_position_width=-1)), "position_width"),
    (lambda: position_features(0, 3, position_width=1.0), "height"),
    (lambda: gaussian_kernel(np.zeros((3, 2)), np.zeros((3, 4))), r"features_b: expected shape \[n, 2\]"),
    (lambda: filter_exact(np.zeros((3, 2)), np.zeros((4, 1))), r"values: expected shape \[3, K\]"),
    (lambda: filter_exact(np.zeros((3, 2)), np.zeros((3, 1)), block_size=0), "block_size"),
    (lambda: guide_features(np.zeros((2, 2, 3)), position_width=1.0, colour_width=(1.0, 2.0)),
     r"colour_width: expected shape \[3\], got \[2\]"),
    (lambda: guide_features(np.zeros((2, 2, 2)), position_width=1.0, colour_width=(1.0, 0.0)), "colour_width.*got 0"),
    (lambda: dense_kernel(FRACTIONS, PARAMS), "pass colour_max=1"),
    (lambda: gaussian_taps(0.0), "width"),
    (lambda: separable_filter(np.zeros((3, 3)), np.ones(3)), "values"),
    (lambda: separable_filter(np.zeros((3, 3, 1)), np.ones(4)), "odd number"),
])
def test_bad_arguments_are_told(call, message):
    with jax.disable_jit(), pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("form", image_kernels.FORMS)
def test_a_gaussian_wider_than_the_image_takes_no_more_memory_than_the_image(form):
    params = KernelParams(gaussian_position_width=1e19)
    for shape in ((12, 14, 3), (97, 96, 3), (3, 600, 3)):
        gaussian = jax.eval_shape(lambda image: image_kernels.image_kernel(image, params, form=form), jnp.zeros(shape)).gaussian
        assert len(gaussian.taps) == 2 * max(512, *shape) + 1
        assert (gaussian.row_taps is not None) == (form == "lattice" and shape[0] == 97)
        assert gaussian.row_taps is None or len(gaussian.row_taps) == 1025


def test_taps_beyond_the_grid_change_nothing():
    values = np.random.default_rng(9).uniform(size=(9, 14, 2)).astype(np.float32)
    np.testing.assert_array_equal(gaussian_taps(4.0, most=13), gaussian_taps(4.0)[3:30])
    np.testing.assert_array_equal(gaussian_taps(4.0, most=16), gaussian_taps(4.0))
    found = separable_filter(values, gaussian_taps(4.0, most=13))
    np.testing.assert_allclose(found, separable_filter(values, gaussian_taps(4.0)), rtol=1e-6)


def test_a_traced_width_of_the_taps_is_told():
    with pytest.raises(TypeError, match="static_argnums"):
        jax.jit(gaussian_taps)(3.0)
