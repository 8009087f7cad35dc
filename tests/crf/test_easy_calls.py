"""What somebody types who comes from another library, and what he is told where it cannot be right."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import lcrf_jax
from lcrf_jax import (
    KernelParams,
    dense_crf_loss,
    image_kernel,
    kl_to_prior,
    mean_field,
    pairwise_energy,
    refine,
    refined_posterior,
)
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.feature_kernels import feature_kernel, volume_features
from lcrf_jax.crf.inference import _compiled_refine, _compiled_result, mean_field_posterior

IMAGE = reference.smooth_image(3, 12, 14).astype(np.uint8)
LOGITS = np.random.default_rng(0).normal(size=(12, 14, 3)).astype(np.float32)
NOISE = np.random.default_rng(1).integers(0, 255, (52, 48, 3)).astype(np.uint8)  # large enough for a lattice


def test_a_second_plain_call_compiles_nothing():
    first = refine(IMAGE, LOGITS)
    size = _compiled_refine._cache_size()
    second = refine(IMAGE[::-1], LOGITS, KernelParams(bilateral_weight=4.0))
    assert _compiled_refine._cache_size() == size
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(jax.jit(refine)(IMAGE, LOGITS, KernelParams()), first, atol=1e-4)
    expected = mean_field(LOGITS, image_kernel(IMAGE, KernelParams()))
    np.testing.assert_allclose(first, expected, atol=1e-4)
    np.testing.assert_allclose(refine(IMAGE.tolist(), LOGITS.tolist()), first, atol=1e-4)


@pytest.mark.parametrize("form", ["exact", "anchors", "lattice", "matrix", "features"])
@pytest.mark.parametrize("function", [mean_field, mean_field_posterior])
def test_a_second_plain_call_of_mean_field_compiles_nothing(function, form):
    rows = LOGITS.reshape(-1, 3)

    def kernel_of(image):
        if form == "matrix":
            return np.asarray(dense_kernel(image, KernelParams()))
        if form == "features":
            return feature_kernel(image.reshape(-1, 3) / 13.0, weights=2.0)
        return image_kernel(image, KernelParams(), form=form)

    kernels = [kernel_of(image) for image in (IMAGE, IMAGE[::-1])]
    function(rows, kernels[0], tolerance=1e-3)
    size = _compiled_result._cache_size()
    assert size > 0
    found = function(rows + 1, kernels[1], tolerance=2e-3)
    assert _compiled_result._cache_size() == size
    within = jax.jit(functools.partial(function, tolerance=2e-3))(rows + 1, kernels[1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, within)


def test_parameters_are_a_tree_whose_position_widths_are_static():
    params = KernelParams(1.0, 2.0, 3.0, 4.0, 5.0)
    leaves, tree = jax.tree.flatten(params)
    assert leaves == [1.0, 3.0, 4.0] and jax.tree.unflatten(tree, leaves) == params
    traced = []
    jax.jit(lambda params: traced.append(params))(params)
    assert traced[0].bilateral_position_width == 2.0 and isinstance(traced[0].bilateral_weight, jax.core.Tracer)
    gradient = jax.jit(jax.grad(lambda p: pairwise_energy(jnp.full((168, 2), 0.5), image_kernel(IMAGE, p))))(params)
    assert gradient.bilateral_weight > 0 and gradient.gaussian_position_width == 5.0


def test_words_of_pydensecrf():
    assert KernelParams.from_pydensecrf() == KernelParams()
    params = KernelParams.from_pydensecrf(sxy=40, srgb=(5, 6, 7), compat=4, gaussian_sxy=2, gaussian_compat=1)
    assert params == KernelParams(4, 40, (5, 6, 7), 1, 2)
    assert np.all(np.isfinite(refine(IMAGE, LOGITS, params)))
    with pytest.raises(TypeError, match=r"^compat: expected a number, got one of shape \[3, 3\]; .*mean_field, as compatibility"):
        KernelParams.from_pydensecrf(compat=np.eye(3))
    with pytest.raises(TypeError, match="^gaussian_sxy: .*give one number for both axes"):
        KernelParams.from_pydensecrf(gaussian_sxy=(3, 3))


def test_a_gaussian_that_pydensecrf_was_not_given_is_not_added():
    assert KernelParams.from_pydensecrf(gaussian_sxy=2, gaussian_compat=5) == KernelParams(0, 80, 13, 5, 2)
    assert KernelParams.from_pydensecrf(sxy=40, srgb=10, compat=5) == KernelParams(5, 40, 10, 0, 3)
    assert KernelParams.from_pydensecrf(srgb=10) == KernelParams(10, 80, 10, 0, 3)
    assert KernelParams.from_pydensecrf(gaussian_compat=4) == KernelParams(0, 80, 13, 4, 3)
    assert KernelParams.from_pydensecrf(compat=0, gaussian_compat=0) == KernelParams(0, 80, 13, 0, 3)


@pytest.mark.parametrize(("logits", "remedy"), [
    (np.zeros((3, 12, 14)), r"logits.transpose\(1, 2, 0\)"), (np.zeros((3, 168)), r"logits.T.reshape\(12, 14, -1\)"),
    (np.zeros((168, 3)), r"logits.reshape\(12, 14, -1\)"), (np.zeros((12, 14)), "a map of labels"),
    (np.zeros((14, 12, 3)), r"logits.transpose\(1, 0, 2\)"), (np.zeros((1, 12, 14, 3)), "one image of a batch"),
    (np.zeros((6, 7, 3)), r"jax.image.resize\(logits, \(12, 14, K\)"), (np.zeros((12, 14, 1)), "at least two classes, got one"),
])  # fmt: skip
def test_logits_of_another_layout_are_told_how_to_turn(logits, remedy):
    with pytest.raises(ValueError, match=f"^logits: .*{remedy}"):
        refine(IMAGE, logits)


def test_an_image_that_was_normalised_for_a_network_is_told_so():
    with pytest.raises(ValueError, match=r"undo that: \(image \* std \+ mean\) \* 255"):
        refine((IMAGE / 255 - 0.45) / 0.22, LOGITS)


def test_grids_and_sets_of_pixels_are_the_same():
    kernel = image_kernel(IMAGE, KernelParams())
    flat = LOGITS.reshape(-1, 3)
    np.testing.assert_array_equal(mean_field(LOGITS, kernel).reshape(-1, 3), mean_field(flat, kernel))
    probs = jax.nn.softmax(LOGITS)
    assert pairwise_energy(probs, kernel) == pairwise_energy(probs.reshape(-1, 3), kernel)
    with pytest.raises(ValueError, match=r"unary_logits: expected shape \[m, K\], got \[14, 12, 3\]; or \[H, W, K\] .* 12 x 14"):
        mean_field(LOGITS.swapaxes(0, 1), kernel)
    matrix = dense_kernel(IMAGE, KernelParams())
    assert mean_field(LOGITS, matrix).shape == (12, 14, 3)


def test_the_loss_is_the_energy_per_cell():
    kernel = image_kernel(IMAGE, KernelParams())
    probs = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(dense_crf_loss(IMAGE, LOGITS), pairwise_energy(probs, kernel) / 168, rtol=1e-5)
    fine = np.repeat(np.repeat(IMAGE, 4, axis=0), 4, axis=1)
    coarse = dense_crf_loss(fine, LOGITS)
    expected = pairwise_energy(probs, image_kernel(IMAGE, KernelParams().at_stride(4))) / 168
    np.testing.assert_allclose(coarse, expected, rtol=0.05)
    assert coarse == dense_crf_loss(fine, LOGITS, stride=4)
    with pytest.raises(ValueError, match="logits: expected a grid of the image"):
        dense_crf_loss(fine, LOGITS.swapaxes(0, 1))


def test_a_posterior_says_what_happened():
    matrix = dense_kernel(IMAGE, KernelParams())
    energies = []
    for steps in (0, 1, 3):
        posterior = mean_field_posterior(LOGITS, matrix, num_iterations=steps)
        assert posterior.num_iterations == steps and not posterior.overflowed
        energies.append(float(posterior.free_energy))
        before, after = (np.exp(mean_field(LOGITS, matrix, num_iterations=n)) for n in (max(steps - 1, 0), steps))
        np.testing.assert_allclose(posterior.change, np.abs(after - before).max(), atol=1e-5)
        np.testing.assert_array_equal(posterior.log_probs, mean_field(LOGITS, matrix, num_iterations=steps))
        q, unary = np.float64(after).reshape(-1, 3), np.log(reference.softmax(LOGITS.reshape(-1, 3)))
        expected = reference.pairwise_energy(q, np.float64(matrix), None) + np.sum(q * (np.log(q) - unary))
        np.testing.assert_allclose(posterior.free_energy, expected, rtol=1e-4)
    assert energies[0] > energies[1] > energies[2]
    early = mean_field_posterior(LOGITS, matrix, num_iterations=100, tolerance=0.05)
    assert 1 < early.num_iterations < 100 and early.change <= 0.05


@pytest.mark.slow
def test_a_lattice_that_is_too_small_is_made_larger_or_said():
    logits = np.random.default_rng(2).normal(size=(52, 48, 3)).astype(np.float32)
    params = KernelParams(10.0, 3.0, 3.0, 3.0, 3.0)
    enough = refine(NOISE, logits, params, form="lattice", capacity=52 * 48 * 6)
    np.testing.assert_array_equal(refine(NOISE, logits, params, form="lattice"), enough)
    with pytest.raises(ValueError, match=r"capacity: expected at least \d+ vertices for this image, got 100; None"):
        refine(NOISE, logits, params, form="lattice", capacity=100)
    with pytest.raises(ValueError, match="capacity: expected at least"):
        image_kernel(NOISE, params, form="lattice", capacity=100)
    posterior = jax.jit(lambda image: refined_posterior(image, logits, params, form="lattice", capacity=100))(NOISE)
    assert posterior.overflowed and posterior.num_iterations == 0
    np.testing.assert_allclose(posterior.log_probs, jax.nn.log_softmax(logits), atol=1e-6)
    both = jax.jit(jax.vmap(lambda i: refined_posterior(i, logits, params, form="lattice", capacity=4000)))(
        np.stack([NOISE, np.full_like(NOISE, 90)])
    )
    assert both.overflowed.tolist() == [True, False]
    energy = jax.jit(lambda image: pairwise_energy(
        jax.nn.softmax(logits), image_kernel(image, params, form="lattice", capacity=100)))(NOISE)
    assert np.isnan(energy)


def test_a_program_may_hold_the_image_and_the_logits_as_constants():
    logits = np.random.default_rng(2).normal(size=(52, 48, 3)).astype(np.float32)
    scaled = jax.eval_shape(lambda scale: scale * refine(NOISE, logits, form="lattice"), 2.0)
    assert scaled.shape == logits.shape
    kernel = jax.eval_shape(lambda: image_kernel(NOISE, KernelParams(), form="lattice"))
    assert kernel.bilateral_diagonal.shape == (52, 48)


@pytest.mark.slow
def test_features_that_float32_cannot_place_are_refused():
    image = np.full((52, 48, 1), 3e7, np.float32)
    image[0, 0] = -3e7
    with pytest.raises(ValueError, match="features: expected features at most .* widths apart, got .* larger width"):
        image_kernel(image, KernelParams(), form="lattice", colour_max=None)
    posterior = jax.jit(lambda image: refined_posterior(image, np.zeros((52, 48, 2)), form="lattice", colour_max=None))(image)
    assert posterior.overflowed


@pytest.mark.slow
@pytest.mark.parametrize("form", ["exact", "lattice"])
def test_volumes(form):
    rng = np.random.default_rng(4)
    volume = rng.integers(0, 4, (6, 7, 8, 2)) * 20.0
    features = volume_features(volume, position_widths=(1, 3, 2), channel_width=(10, 20))
    positions = volume_features(volume, position_widths=(1, 1, 1))
    kernel = feature_kernel(features, positions, weights=(4, 2), form=form)
    expected = 0
    for each, weight in ((features, 4), (positions, 2)):
        gaussian = reference.gaussian_kernel(np.float64(each))
        scale = gaussian.sum(axis=1) ** -0.5
        expected = expected + weight * scale[:, None] * gaussian * scale
    np.fill_diagonal(expected, 0)
    values = reference.softmax(rng.normal(size=(336, 3)) * 2)
    error = np.linalg.norm(kernel.apply(values) - expected @ values) / np.linalg.norm(expected @ values)
    assert error < (1e-5 if form == "exact" else 0.1)
    logits = np.log(values)
    assert np.mean(mean_field(logits, kernel).argmax(-1) != mean_field(logits, expected).argmax(-1)) < 0.05
    np.testing.assert_allclose(
        pairwise_energy(values, kernel), pairwise_energy(values, expected), rtol=1e-4 if form == "exact" else 0.1
    )


def test_logits_of_integers_are_taken_as_they_are():
    logits = np.where(np.arange(3) == 1, 2**40, np.zeros((12, 14, 3), int))
    assert (refine(IMAGE, logits).argmax(-1) == 1).all()


PROBS = np.asarray(jax.nn.softmax(LOGITS))
KERNEL = SimpleNamespace(grid=(12, 14), splat=len, blur=len, slice=len, apply=len)  # of which only the shape is asked for
BAD = {
    "nan": (lambda: refine(IMAGE, np.where(np.arange(3) == 1, np.nan, LOGITS)), r"logits: .* nan at \[0, 0, 1\]"),
    "infinity": (lambda: mean_field(np.full((2, 2), np.inf), np.eye(2)), "unary_logits: expected numbers below infinity"),
    "nothing possible": (lambda: mean_field(np.full((2, 2), -np.inf), np.eye(2)), "expected a class that is possible"),
    "energies": (lambda: refine(IMAGE, -np.log(PROBS)), "logits: expected logits, got energies .* sign turned"),
    "probabilities": (lambda: refine(IMAGE, PROBS), "logits: expected logits, got probabilities: .* pass their logarithm"),
    "channels first": (lambda: refine(np.zeros((3, 70, 80), np.uint8), np.zeros((3, 70, 80))), "image: .* channels seem to be first"),
    "logits channels first": (lambda: refine(IMAGE, LOGITS.transpose(2, 0, 1)), r"logits: expected shape \[12, 14, K\]"),
    "flattened": (lambda: refine(IMAGE, LOGITS.reshape(-1, 3)), r"logits: expected shape \[12, 14, K\], got \[168, 3\]"),
    "a batch or a volume": (lambda: refine(IMAGE[None], LOGITS), "jax.vmap; a volume .* lcrf_jax.feature_kernel"),
    "grey": (lambda: refine(IMAGE[:, :, 0], LOGITS), r"image\[:, :, None\]"),
    "negative weight": (lambda: image_kernel(IMAGE, KernelParams(-1.0)), "bilateral_weight: expected a finite number >= 0"),
    "nan weight": (lambda: refine(IMAGE, LOGITS, KernelParams(gaussian_weight=np.nan)), "gaussian_weight: .* got nan"),
    "jax weight": (lambda: refine(IMAGE, LOGITS, KernelParams(jnp.float32(-2))), "bilateral_weight: .* got -2"),
    "width": (lambda: refine(IMAGE, LOGITS, KernelParams(bilateral_position_width=0)), "bilateral_position_width: .* > 0"),
    "asymmetric": (lambda: mean_field(LOGITS, np.zeros((168, 168)), compatibility=[[0, 1, 1], [2, 0, 1], [1, 1, 0]]),
                   r"compatibility: expected a symmetric matrix, got mu\(0, 1\) = 1 and mu\(1, 0\) = 2"),
    "nan cost": (lambda: mean_field(np.zeros((2, 2)), np.eye(2), compatibility=np.full((2, 2), np.nan)), "compatibility: .* nan"),
    "nan kernel": (lambda: mean_field(np.zeros((2, 2)), np.full((2, 2), np.nan)), r"kernel: .* nan at \[0, 0\]"),
    "beyond float32": (lambda: refine(IMAGE, 1e300 * LOGITS.astype(float)), r"logits: .*e\+.* at \[0, 0, 0\]; scale them, or switch on"),
    "logits beyond float32": (lambda: mean_field(np.full((2, 2), 1e39), np.eye(2)), r"unary_logits: .* got 1e\+39 at \[0, 0\]; scale"),
    "a cost beyond float32": (lambda: mean_field(np.zeros((2, 2)), np.eye(2), compatibility=np.full((2, 2), 1e38)),
                              r"compatibility: expected numbers in -1e\+30..1e\+30, got 1e\+38 at \[0, 0\]"),
    "complex costs": (lambda: mean_field(np.zeros((2, 2)), np.eye(2), compatibility=1j * np.eye(2)), "compatibility: .* got complex128"),
    "other pixels": (lambda: pairwise_energy(PROBS[0], KERNEL), r"probs: expected shape \[168, K\], got \[14, 3\]; flatten the pixels"),
    "classes first": (lambda: mean_field(LOGITS.reshape(-1, 3).T, KERNEL), r"unary_logits: expected shape \[168, K\], got \[3, 168\]"),
    "other logits": (lambda: kl_to_prior(LOGITS.reshape(-1, 3).T, KERNEL), r"logits: expected shape \[168, K\], got \[3, 168\]"),
    "complex image": (lambda: refine(IMAGE.astype(complex), LOGITS), "image: expected real numbers, got complex128; take their real"),
    "complex tolerance": (lambda: jax.jit(lambda t: mean_field(np.zeros((2, 2)), np.eye(2), tolerance=t))(1j), "tolerance: .* got complex64"),
    "negative tolerance": (lambda: mean_field(np.zeros((2, 2)), np.eye(2), tolerance=-1e-3), "tolerance: expected a finite number >= 0"),
    "half an iteration": (lambda: refine(IMAGE, LOGITS, num_iterations=2.5), "num_iterations: expected a whole number, got 2.5"),
    "half a vertex": (lambda: image_kernel(IMAGE, KernelParams(), form="lattice", capacity=1000.5), "capacity: .* whole"),
    "half an anchor": (lambda: image_kernel(IMAGE, KernelParams(), form="anchors", num_anchors=3.5), "num_anchors: .* whole"),
}
WRONG_TYPES = {
    "width as a tuple": (lambda: image_kernel(IMAGE, KernelParams(10, (80, 80))), "bilateral_position_width: expected a number"),
    "parameters as a dict": (lambda: refine(IMAGE, LOGITS, {"sxy": 80}), "params: expected a KernelParams"),
    "objects": (lambda: refine(IMAGE.astype(object), LOGITS), "image: expected real numbers, got object; convert them first"),
    "masked image": (lambda: image_kernel(np.ma.array(IMAGE), KernelParams()), "image: expected an array without a mask"),
    "masked logits": (lambda: mean_field(np.ma.array(LOGITS), KERNEL), r"unary_logits: .* fill it first, \.filled\(0\)"),
    "masked pixels": (lambda: refine(IMAGE, LOGITS, valid=np.ma.ones((12, 14), bool)), "valid: expected an array without a mask"),
    "no probabilities": (lambda: pairwise_energy([[None, None]], np.ones((1, 1))), "probs: expected real numbers, got object"),
    "tolerance as a string": (lambda: mean_field(np.zeros((2, 2)), np.eye(2), tolerance="x"), "tolerance: expected a number, got 'x'"),
    "kernel as a string": (lambda: mean_field(LOGITS, "gaussian"), "kernel: expected a matrix or an object"),
    "iterations as a string": (lambda: refine(IMAGE, LOGITS, num_iterations="10"), "num_iterations: expected a number, got '10'"),
    "iterations traced": (lambda: jax.jit(lambda n: refine(IMAGE, LOGITS, num_iterations=n))(3), "num_iterations: .* static"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=list(BAD))
def test_what_cannot_be_right_is_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), WRONG_TYPES.values(), ids=list(WRONG_TYPES))
def test_types_that_cannot_be_right_are_told(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_logits_of_which_one_class_is_certain_may_be_meant():
    assert mean_field(np.array([[10.0, 0.0], [0.0, 10.0]]), np.zeros((2, 2))).argmax(-1).tolist() == [0, 1]
    assert mean_field(np.eye(2), np.zeros((2, 2))).argmax(-1).tolist() == [0, 1]


def test_values_are_checked_under_jit_where_that_is_asked_for():
    run = jax.jit(lambda logits: mean_field(logits, np.zeros((2, 2))))
    assert np.isnan(run(np.full((2, 3), np.nan))).all()
    with lcrf_jax.checked_under_jit():
        run = jax.jit(lambda logits: mean_field(logits, np.zeros((2, 2)), num_iterations=1))
        with pytest.raises(Exception, match=r"unary_logits: expected numbers below infinity, got nan at \[0, 0\]"):
            jax.block_until_ready(run(np.full((2, 3), np.nan)))


def test_numbers_of_numpy_and_jax_are_numbers():
    zero = KernelParams(gaussian_weight=np.float32(0))
    assert image_kernel(IMAGE, zero).gaussian is None and image_kernel(IMAGE, zero._replace(gaussian_weight=jnp.float32(0))).gaussian is None
    widths = KernelParams(np.float32(10), np.float64(80), jnp.float32(13), np.int64(3), np.float32(3))
    np.testing.assert_allclose(refine(IMAGE, LOGITS, widths, num_iterations=np.int64(10)), refine(IMAGE, LOGITS), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "exact", "anchors", "lattice"])
def test_precisions_mix(form):
    @jax.jit
    def results(image, logits):
        kernel = dense_kernel(image, KernelParams()) if form == "dense" else image_kernel(image, KernelParams(), form=form)
        log_probs = mean_field(logits, kernel, num_iterations=1, drop_below=1e-3)
        return log_probs, pairwise_energy(jax.nn.softmax(logits), kernel)

    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for image_type, type_ in ((np.float64, np.float32), (np.float32, np.float64), (np.uint8, np.float16)):
            log_probs, energy = results(IMAGE.astype(image_type), LOGITS.astype(type_))
            wide = np.float64 in (image_type, type_)
            assert log_probs.dtype == (np.float64 if wide else np.float32) and np.all(np.isfinite(log_probs))
            assert np.isfinite(energy)


@pytest.mark.parametrize("kind", [">f4", ">f8"])
def test_arrays_of_the_other_byte_order_are_the_same_numbers(kind):
    """Of those JAX would take the bytes for other numbers, where a program of their shape is there already."""
    colours, rows = IMAGE.astype(np.float32), LOGITS.reshape(-1, 3)
    expected = refine(colours, LOGITS)
    np.testing.assert_array_equal(refine(colours, LOGITS.astype(kind)), expected)
    np.testing.assert_array_equal(refine(colours.astype(kind), LOGITS), expected)
    np.testing.assert_array_equal(refine(IMAGE.astype(">i2"), LOGITS), expected)
    weights = [KernelParams(bilateral_weight=np.array(3.0, order)) for order in ("f4", kind)]
    np.testing.assert_array_equal(*(refine(colours, LOGITS, each) for each in weights))
    matrix = np.asarray(dense_kernel(colours, KernelParams()))
    np.testing.assert_array_equal(mean_field(rows, matrix.astype(kind)), mean_field(rows, matrix))
    for form in ("exact", "anchors", "lattice"):
        one, other = (image_kernel(image, KernelParams(), form=form) for image in (colours, colours.astype(kind)))
        np.testing.assert_array_equal(mean_field(rows.astype(kind), other), mean_field(rows, one))


def test_an_image_of_lists_is_an_array_in_every_form():
    rows = LOGITS.reshape(-1, 3)
    for form in ("exact", "anchors", "lattice"):
        one, other = (image_kernel(image, KernelParams(), form=form) for image in (IMAGE, IMAGE.tolist()))
        np.testing.assert_array_equal(mean_field(rows, other), mean_field(rows, one))


@pytest.mark.parametrize("name", KernelParams._fields)
def test_a_field_of_the_kernel_that_is_none_is_told(name):
    with pytest.raises(TypeError, match=f"{name}: expected a number, got None; a weight of 0 leaves"):
        refine(IMAGE, LOGITS, KernelParams(**{name: None}))
