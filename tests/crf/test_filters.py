import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from pictures import COARSE, PIXELS, case_of, picture, relative, soft_labels

from lcrf_jax.crf.anchors import Anchors
from lcrf_jax.crf.exact import NORMALISATIONS, ExactGaussian
from lcrf_jax.crf.image_kernels import (
    FORMS,
    anchor_image_kernel,
    default_form,
    exact_image_kernel,
    image_kernel,
    lattice_image_kernel,
)
from lcrf_jax.crf.kernel import DenseKernel, ImageKernel, as_kernel, filter_symmetric, filter_with
from lcrf_jax.crf.lattice import Lattice
from lcrf_jax.crf.params import KernelParams

TYPES = {"anchors": Anchors, "exact": ExactGaussian, "lattice": Lattice}
# How far products with soft labels may be off. Raw values of a lattice lack a constant that normalisation cancels.
ERRORS = {"anchors": 0.08, "exact": 2e-5, "lattice": 0.08}
ERROR_OF_A_RAW_LATTICE = 0.3


@pytest.fixture(scope="module", params=list(itertools.product(sorted(FORMS), sorted(NORMALISATIONS))), ids="-".join)
def case(request):
    """A form and a normalisation, the kernel of a picture, what it and its symmetric part are, and should be."""
    return case_of(*request.param)


@pytest.mark.slow_except("anchors-symmetric", "exact-row", "lattice-symmetric")
def test_equals_the_dense_kernel(case):
    assert isinstance(case.kernel.bilateral, TYPES[case.form])
    raw_lattice = case.form == "lattice" and case.normalisation == "none"
    error = ERROR_OF_A_RAW_LATTICE if raw_lattice else ERRORS[case.form]
    labels = soft_labels()
    assert relative(case.matrix @ labels, case.dense @ labels) < error
    symmetric = (case.dense + case.dense.T) / 2
    assert relative(case.symmetric @ labels, symmetric @ labels) < error
    if case.form == "exact":
        # The spatial Gaussian is cut off at four widths.
        np.testing.assert_allclose(case.matrix, case.dense, rtol=1e-4, atol=2e-3)
    if case.form != "lattice":
        energy = np.vdot(labels, symmetric @ labels)
        np.testing.assert_allclose(np.vdot(labels, case.symmetric @ labels), energy, rtol=0.02)


@pytest.mark.slow_except("anchors-symmetric", "exact-row", "lattice-symmetric")
def test_leaves_self_pairs_out(case):
    for matrix in (case.matrix, case.symmetric):
        own = np.diagonal(matrix)
        np.testing.assert_allclose(own, 0, atol=1e-4)


@pytest.mark.slow_except("anchors-symmetric", "exact-row", "lattice-symmetric")
def test_the_symmetric_part_is_that_of_the_kernel(case):
    np.testing.assert_allclose(case.symmetric, case.symmetric.T, atol=1e-5 * case.symmetric.max())
    part = (case.matrix + case.matrix.T) / 2
    # With row normalisation a lattice is close to it only: its row sums are those of the blur in one order.
    if case.form == "lattice" and case.normalisation == "row":
        assert relative(case.symmetric, part) < 0.05
    else:
        np.testing.assert_allclose(case.symmetric, part, atol=1e-5 * case.symmetric.max())
    if case.form != "lattice":
        assert (relative(case.matrix, case.matrix.T) < 1e-5) == (case.normalisation != "row")


@jax.jit
def _products(kernel, values, one, other):
    def product(a, b):
        return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    across = product(kernel.splat(values), one), product(values, kernel.slice(one))
    return *across, product(kernel.blur(one), other), product(one, kernel.blur(other))


@pytest.mark.slow_except("exact-row", "lattice-symmetric")
def test_slice_is_the_transpose_of_splat_and_the_blur_is_symmetric(case):
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(case.kernel.splat, np.zeros((PIXELS, 4), np.float32))
    one, other = (jax.tree.map(lambda x: np.float32(rng.uniform(size=x.shape)), shapes) for _ in range(2))
    if case.form == "lattice":
        for part in (*one[0], *other[0]):
            part[int(case.kernel.bilateral.num_vertices):] = 0
    splatted, sliced, blurred, other_way = _products(case.kernel, np.float32(soft_labels()), one, other)
    np.testing.assert_allclose(splatted, sliced, rtol=1e-4)
    np.testing.assert_allclose(blurred, other_way, rtol=1e-4)


@pytest.mark.slow_except("exact")
@pytest.mark.parametrize("form", sorted(FORMS))
def test_backwards_is_the_transpose_of_a_symmetrically_normalised_kernel(form):
    case, values = case_of(form, "symmetric"), soft_labels()
    backwards = jax.jit(lambda kernel, values: kernel.apply(values, backwards=True))(case.kernel, values)
    assert relative(backwards, case.matrix.T @ values) < 1e-5
    if form == "lattice":
        assert relative(backwards, case.matrix @ values) > 1e-3


@pytest.mark.slow_except("exact-row")
@pytest.mark.parametrize(("form", "normalisation"), [("anchors", "symmetric"), ("exact", "row"), ("lattice", "row")])
def test_padding_that_is_not_valid_changes_nothing(form, normalisation):
    rng = np.random.default_rng(6)
    image = np.float32(rng.uniform(0, 255, (12, 14, 3)))
    image[:9, :11] = reference.smooth_image(2, 9, 11)
    valid = np.zeros((12, 14), bool)
    valid[:9, :11] = True
    values = rng.normal(size=(12, 14, 3))

    def filtered(image, values, **options):
        kernel = image_kernel(image, COARSE, form=form, normalisation=normalisation, **options)
        return filter_symmetric(kernel, values.reshape(-1, 3)).reshape(values.shape)

    padded = jax.jit(functools.partial(filtered, valid=valid))
    product = np.asarray(padded(image, values))
    np.testing.assert_array_equal(product[~valid], 0)
    changed = padded(np.where(valid[..., None], image, rng.permuted(image)), np.where(valid[..., None], values, 1e3))
    np.testing.assert_allclose(np.asarray(changed)[valid], product[valid], atol=1e-5)
    image, values = image[:9, :11], values[:9, :11]
    if form == "lattice":
        expected = jax.jit(filtered)(image, values)
    else:
        dense = reference.dense_kernel(image, COARSE, normalisation)
        expected = ((dense + dense.T) / 2 @ values.reshape(-1, 3)).reshape(values.shape)
    expected = np.reshape(expected, (-1, 3))
    # The blocks of the anchors are laid over the padding as well.
    assert relative(product[valid], expected) < (0.1 if form == "anchors" else 1e-4)


@pytest.mark.slow_except("5-exact")
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("channels", [1, 5])
def test_a_guide_of_any_channels_with_a_width_for_each(form, channels):
    rng = np.random.default_rng(channels)
    units, widths = np.array([1, 0.01, -3, 40, 1])[:channels], np.array([13, 30, 40, 50, 60])[:channels]
    colours = reference.smooth_image(3, 14, 12, noise=2.0)[..., rng.integers(0, 3, channels)]
    guide = colours * units
    params = COARSE._replace(bilateral_colour_width=tuple((widths * np.abs(units)).tolist()))
    # What has one channel is taken for an image in 0..1, too.
    colour_max = 1.0 if channels == 1 else None

    @jax.jit
    def filtered(guide, values):
        return filter_with(image_kernel(guide, params, form=form, colour_max=colour_max), values)

    labels = soft_labels(168)
    dense = reference.dense_kernel(colours, params._replace(bilateral_colour_width=widths), "symmetric")
    got = filtered(np.float32(guide / 255 if colour_max else guide), labels)
    assert relative(got, dense @ labels) < {"anchors": 0.12, "exact": 1e-4, "lattice": 0.12}[form]


def test_weights_can_be_given_later():
    image, weights = picture()[:8, :9], jnp.array([2.0, 5.0])

    @jax.jit
    def build(image, weights):
        params = COARSE._replace(bilateral_weight=weights[0], gaussian_weight=weights[1])
        return exact_image_kernel(image, params)

    replaced = build(image, 0 * weights)._replace(bilateral_weight=weights[0], gaussian_weight=weights[1])
    dense = reference.dense_kernel(image, COARSE._replace(bilateral_weight=2.0, gaussian_weight=5.0), "symmetric")
    for kernel in (replaced, build(image, weights)):
        np.testing.assert_allclose(filter_with(kernel, soft_labels(72)), dense @ soft_labels(72), rtol=2e-4)


def float_dtypes(form, image):
    kernel = jax.eval_shape(functools.partial(image_kernel, params=COARSE, form=form), image)
    return {leaf.dtype for leaf in jax.tree.leaves(kernel) if jnp.issubdtype(leaf.dtype, jnp.floating)}


@pytest.mark.slow_except("uint8", "bfloat16")
@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float64"])
def test_dtypes_of_images_and_values(dtype):
    image = np.round(picture()[:8, :9]).astype(jnp.dtype(dtype))
    values = soft_labels(72).astype("float32" if dtype == "uint8" else jnp.dtype(dtype))
    kernel = jax.jit(lambda image: exact_image_kernel(image, COARSE))(image)
    filtered = filter_with(kernel, values)
    assert filtered.dtype == jnp.float32
    expected = reference.dense_kernel(np.float64(image), COARSE, "symmetric") @ np.float64(values)
    np.testing.assert_allclose(filtered, expected, rtol=2e-4)
    for form in FORMS if dtype == "float16" else ():
        assert float_dtypes(form, image) == {jnp.dtype("float32")}


@pytest.mark.slow
def test_float64_stays_float64():
    image, labels = np.float64(picture()[:8, :9]), soft_labels(72)
    params = COARSE._replace(gaussian_weight=0)
    with jax.enable_x64(True):
        filtered = jax.jit(lambda image, values: filter_with(exact_image_kernel(image, params), values))(image, labels)
        assert filtered.dtype == jnp.float64
        for form in FORMS:
            assert float_dtypes(form, image) == {jnp.dtype("float64")}
    expected = reference.dense_kernel(image, params, "symmetric") @ labels
    np.testing.assert_allclose(filtered, expected, rtol=1e-10)


@pytest.mark.slow_except("weights1")
@pytest.mark.parametrize("weights", [(0, 3.0), (10.0, 0.0), (0, 0)])
def test_a_weight_of_zero_leaves_a_gaussian_out(weights):
    image, labels = picture()[:8, :9], soft_labels(72)
    params = COARSE._replace(bilateral_weight=weights[0], gaussian_weight=weights[1])
    for form in FORMS:
        kernel = jax.eval_shape(functools.partial(image_kernel, params=params, form=form, normalisation="row"), image)
        assert (kernel.bilateral is None, kernel.gaussian is None) == (weights[0] == 0, weights[1] == 0)

    @jax.jit
    def filtered(image, values):
        kernels = [exact_image_kernel(image, params, normalisation=normalisation) for normalisation in ("row", "none")]
        return filter_with(kernels[0], values), filter_symmetric(kernels[0], values), filter_with(kernels[1], values)

    dense, raw = (reference.dense_kernel(image, params, normalisation) for normalisation in ("row", "none"))
    for product, matrix in zip(filtered(image, labels), (dense, (dense + dense.T) / 2, raw), strict=True):
        np.testing.assert_allclose(product, matrix @ labels, rtol=2e-4, atol=1e-6)


@pytest.mark.slow_except("exact")
@pytest.mark.parametrize("form", ["exact", "lattice"])
def test_one_pixel_has_no_pairs(form):
    filtered = jax.jit(lambda image: filter_with(image_kernel(image, COARSE, form=form), jnp.ones((1, 2))))
    np.testing.assert_allclose(filtered(np.full((1, 1, 3), 7.0)), 0, atol=1e-5)


def test_a_matrix_as_a_kernel():
    rng = np.random.default_rng(12)
    matrix, values = rng.uniform(size=(7, 7)), rng.normal(size=(7, 3))
    off_diagonal = matrix - np.diag(np.diagonal(matrix))
    np.testing.assert_allclose(filter_with(matrix, values), off_diagonal @ values, rtol=1e-4, atol=1e-5)
    symmetric = (off_diagonal + off_diagonal.T) / 2
    np.testing.assert_allclose(filter_symmetric(matrix, values), symmetric @ values, rtol=1e-4, atol=1e-5)
    kernel = as_kernel(matrix)
    assert isinstance(kernel, DenseKernel) and as_kernel(kernel) is kernel


def test_the_form_follows_the_number_of_pixels_and_the_normalisation():
    for height, width, normalisation, form in [
        (1, 1, "symmetric", "exact"),
        (48, 48, "symmetric", "exact"),
        (48, 48, "none", "exact"),
        (48, 49, "symmetric", "lattice"),
        (48, 49, "row", "lattice"),
        (48, 49, "none", "anchors"),
        (321, 322, "none", "anchors"),
    ]:
        assert default_form(height * width, normalisation) == form
        image = jax.ShapeDtypeStruct((height, width, 3), jnp.float32)
        build = functools.partial(image_kernel, params=COARSE, normalisation=normalisation)
        assert isinstance(jax.eval_shape(build, image).bilateral, TYPES[form])


@pytest.mark.slow
def test_the_capacity_of_a_lattice_follows_the_widths():
    def capacity(params, **options):
        build = functools.partial(lattice_image_kernel, params=params, **options)
        kernel = jax.eval_shape(build, jax.ShapeDtypeStruct((400, 500, 3), jnp.float32))
        return kernel.bilateral.neighbours.shape[-1]

    assert capacity(KernelParams(1.0, 80.0, 13.0)) == 2**16
    assert capacity(KernelParams(1.0, 80.0, 5.0)) == 160_000
    assert capacity(KernelParams(1.0, 3.0, 5.0)) == 200_000
    assert capacity(KernelParams(1.0, 80.0, 13.0), capacity=1000) == 1000


IMAGE = np.full((4, 6, 3), 100.0)


@pytest.mark.parametrize("make", [image_kernel, *FORMS.values()])
@pytest.mark.parametrize(("image", "options", "message"), [
    (IMAGE, {"normalisation": "rows"}, r"normalisation: expected one of \['none', 'row', 'symmetric'\], got 'rows'"),
    (IMAGE[None], {}, r"image: expected shape \[H, W, C\], got \[1, 4, 6, 3\].*jax\.vmap"),
    (IMAGE, {"valid": np.ones((6, 4), bool)}, r"valid: expected shape \[4, 6\], got \[6, 4\]"),
    (IMAGE, {"colour_max": 1.0}, "image: expected values in 0..1.0, got 100..100; pass colour_max=255"),
    (np.arange(72.0).reshape(4, 6, 3) / 72, {}, "pass colour_max=1"),
])
def test_bad_images_are_told(make, image, options, message):
    with pytest.raises(ValueError, match=message):
        make(image, COARSE, **options)


@pytest.mark.parametrize("make", FORMS.values())
@pytest.mark.parametrize(("width", "value", "name"), [
    ("bilateral_position_width", 0, "position_width"),
    ("bilateral_colour_width", 0.0, "colour_width"),
    ("bilateral_colour_width", (13.0, 0.0, 13.0), "colour_width"),
    ("bilateral_colour_width", (13.0, 13.0), "colour_width"),
    ("gaussian_position_width", -1, "width"),
])
def test_bad_widths_are_told(make, width, value, name):
    with pytest.raises(ValueError, match=name):
        jax.eval_shape(lambda image: make(image, COARSE._replace(**{width: value})), IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("trace", [
    lambda function: jax.eval_shape(function, 3.0),
    lambda function: jax.eval_shape(jax.grad(function), 3.0),
    lambda function: jax.eval_shape(jax.jacfwd(function), 3.0),
    lambda function: jax.eval_shape(jax.vmap(function), np.ones(2)),
], ids=["jit", "grad", "jacfwd", "vmap"])
def test_traced_widths_that_set_sizes_are_told(trace):
    def build(make, name):
        def of_width(width):
            return make(IMAGE, COARSE._replace(**{name: width})).apply(np.ones((IMAGE.shape[0] * IMAGE.shape[1], 1)))[0, 0]

        return trace(of_width)

    for make in FORMS.values():
        with pytest.raises(TypeError, match="gaussian_position_width: .* no derivative .* static_argnums, or take dense_kernel"):
            build(make, "gaussian_position_width")
    with pytest.raises(TypeError, match="bilateral_position_width: .* no derivative .* dense_kernel"):
        build(anchor_image_kernel, "bilateral_position_width")
    build(exact_image_kernel, "bilateral_position_width")


def test_widths_of_colours_may_be_traced():
    for make in FORMS.values():
        jax.eval_shape(lambda width: make(IMAGE, COARSE._replace(bilateral_colour_width=width)), 3.0)  # noqa: B023


def kernel_of_24_pixels():
    ones = np.ones(24, np.float32)
    exact = ExactGaussian(np.ones((24, 5), np.float32), ones)
    return ImageKernel(exact, np.float32(1), ones.reshape(4, 6), None, np.float32(0), None)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: image_kernel(IMAGE, COARSE, form="grid"),
     r"form: expected one of \['anchors', 'exact', 'lattice'\] or None, got 'grid'"),
    (lambda: filter_with(np.ones((2, 2)), np.ones(2)), r"values: expected shape \[m, K\]"),
    (lambda: filter_symmetric(np.ones((2, 3)), np.ones((2, 1))), r"kernel: expected shape \[2, 2\]"),
    (lambda: filter_with(kernel_of_24_pixels(), np.ones((23, 2))), r"values: expected shape \[24, K\]"),
    (lambda: filter_symmetric(kernel_of_24_pixels(), np.ones(24)), r"values: expected shape \[24, K\]"),
    (lambda: lattice_image_kernel(IMAGE, COARSE, capacity=0), "capacity"),
    (lambda: anchor_image_kernel(IMAGE, COARSE, num_anchors=0), "num_anchors"),
])
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()
