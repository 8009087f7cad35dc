"""What a dense CRF must not do, in every form of its kernel."""

import functools

import jax
import numpy as np
import pytest
import reference
from cases import logits_and_kernel
from pictures import COARSE, PIXELS, builder, matrices, picture

from lcrf_jax.crf.coarse import coarse_grid
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.image_kernels import FORMS, default_form, image_kernel
from lcrf_jax.crf.inference import mean_field, refine
from lcrf_jax.crf.kernel import DenseKernel
from lcrf_jax.crf.params import KernelParams

PROBS = ([0.6, 0.4, 1e-6], [0.4, 0.35, 0.25], [0.501, 0.498, 0.001])


def flips(image, form, position_width, colour_width, *, tried=PROBS, coarse_iterations=(0,)):
    """How many pixels change their label where all have one distribution, for weak and strong kernels and near ties.

    One number for each number of iterations on the coarse grid, in one program: what they share is compiled once.
    """
    height, width, _ = image.shape
    params = KernelParams(1.0, position_width, colour_width, 1.0, 3.0)

    @jax.jit
    def numbers(image, tried, weights):
        def of_weights(weights):
            weighted = params._replace(bilateral_weight=weights[0], gaussian_weight=weights[1])
            kernel = image_kernel(image, weighted, form=form)
            coarse = coarse_grid(image, weighted, form=form) if any(coarse_iterations) else None

            def of_probs(probs):
                unary = jax.numpy.log(jax.numpy.tile(probs, (height * width, 1)))
                found = [mean_field(unary, kernel, coarse=coarse, coarse_iterations=number) for number in coarse_iterations]
                return [jax.numpy.sum(each.argmax(-1) != 0) for each in found]

            return jax.lax.map(of_probs, tried)

        return jax.lax.map(of_weights, weights)

    found = numbers(image, np.float32(tried), np.float32([(1, 1), (10, 3), (40, 0.1)]))
    return [int(np.sum(each)) for each in found]


def picture_with_rare_colours(height, width):
    """A smooth picture with single pixels of other colours: those that a lattice once took too much from."""
    rng = np.random.default_rng(height)
    image = reference.smooth_image(height, height, width)
    rare = rng.uniform(size=(height, width)) < 0.05
    return np.where(rare[..., None], rng.uniform(0, 255, (height, width, 3)), image).astype(np.float32)


WIDTHS = {"narrow": (3.0, 3.0), "wide": (80.0, 13.0), "between": (10.0, 5.0)}
# Each pair of size, widths and form: two sizes in turns on the table of widths and forms.
PAIRS = [((24, 40)[(row + column) % 2], widths, form) for row, widths in enumerate(WIDTHS) for column, form in enumerate(sorted(FORMS))]


@pytest.mark.slow_except("24-narrow-lattice")
@pytest.mark.parametrize(("size", "widths", "form"), PAIRS)
def test_pixels_that_all_have_one_distribution_keep_their_label(size, widths, form):
    assert flips(picture_with_rare_colours(size, size + 8), form, *WIDTHS[widths]) == [0]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "widths", "form"), PAIRS)
def test_so_they_do_where_iterations_are_made_on_the_coarse_grid(size, widths, form):
    image = picture_with_rare_colours(size + 1, size + 8)
    assert flips(image, form, *WIDTHS[widths], coarse_iterations=(5, 10)) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(3.0, 3.0), (80.0, 13.0)])
def test_so_do_those_of_a_large_picture(widths):
    assert flips(picture_with_rare_colours(200, 264), "lattice", *widths, tried=PROBS[2:]) == [0]


# One program of each for all weights.
kernel_of = jax.jit(image_kernel, static_argnames="form")
row_sums = jax.jit(lambda kernel: kernel.largest_row_sums())
iterated = jax.jit(mean_field, static_argnames=("num_iterations", "coarse_iterations"))


def dropped_too_far(kernel, num_pixels, allowed=1e-3, seed=0):
    """The largest share that a label reaches which is no more probable anywhere than may be dropped."""
    rng = np.random.default_rng(seed)
    positive, negative = row_sums(kernel)
    peak = min(allowed, 1 / (np.e * float(positive))) * np.exp(-float(negative))
    unary = np.log(rng.dirichlet(np.full(40, 0.3), size=num_pixels).clip(1e-8))
    unary[:, 7] = np.log(peak) - rng.exponential(1.0, num_pixels) * (rng.uniform(size=num_pixels) < 0.3)
    others = np.delete(np.arange(40), 7)
    rest = np.log1p(-np.exp(unary[:, 7]))
    unary[:, others] += (rest - np.log(np.exp(unary[:, others]).sum(axis=1)))[:, None]
    # The kernel is an argument: the compiler would compute with constants.
    return max(float(np.exp(iterated(unary, kernel, num_iterations=steps)[:, 7].max())) for steps in (1, 2, 10)), peak


@functools.partial(jax.jit, static_argnames="form")
def kernels_and_row_sums(image, params, form):
    """Of the pixels and of the coarse grid."""
    kernel, coarse = image_kernel(image, params, form=form), coarse_grid(image, params, form=form)
    return kernel, coarse, [each.largest_row_sums()[0] for each in (kernel, coarse.kernel)]


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("weight", [1.0, 40.0])
def test_so_it_does_where_iterations_are_made_on_the_coarse_grid(weight, form):
    image, params = picture_with_rare_colours(24, 24), KernelParams(weight, 20.0, 10.0, 3.0, 3.0)
    kernel, coarse, rows = kernels_and_row_sums(image, params, form)
    peak = min(1e-3, 1 / (np.e * max(map(float, rows))))
    rng = np.random.default_rng(0)
    # Rows of one cell are alike: so the mean of their log-probabilities is no higher than they are.
    unary = np.repeat(np.repeat(rng.dirichlet(np.full(40, 0.3), size=(12, 12)).clip(1e-8), 2, axis=0), 2, axis=1)
    unary[:, :, 7] = 0
    unary *= (1 - peak) / unary.sum(axis=-1, keepdims=True)
    unary[:, :, 7] = peak
    for of_coarse in (1, 5, 10):
        found = iterated(np.log(unary), kernel, num_iterations=10, coarse=coarse, coarse_iterations=of_coarse)
        assert float(np.exp(found[:, :, 7].max())) <= 2.72 * peak * (1 + 1e-4)


@pytest.mark.slow_except("40.0-exact")
@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("weight", [1.0, 10.0, 40.0])
def test_a_label_that_may_be_dropped_stays_below_the_bound_in_every_form(weight, form):
    image = picture_with_rare_colours(24, 24)
    kernel = kernel_of(image, KernelParams(weight, 20.0, 10.0, 3.0, 3.0), form=form)
    grown, peak = dropped_too_far(kernel, 24 * 24)
    assert grown <= 2.72 * peak * (1 + 1e-4)

@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(FORMS))
def test_no_message_is_beyond_what_weights_that_are_not_negative_can_give(form):
    kernel = builder(form, "symmetric")(picture())
    alone = np.full(PIXELS, 1e-6)
    alone[PIXELS // 2] = 1 - 1e-6
    unary = np.log(np.stack([alone, 1 - alone], axis=1)).astype(np.float32)
    iterate = jax.jit(lambda unary, kernel: (mean_field(unary, kernel, num_iterations=1), kernel.apply(np.ones((PIXELS, 1), np.float32))))
    after, rows = map(np.float64, iterate(unary, kernel))
    change = (after[:, 0] - after[:, 1]) - (unary[:, 0] - unary[:, 1])
    assert (np.abs(change) <= rows[:, 0] * (1 + 1e-4) + 1e-5).all()
    assert np.abs(change).max() > 0.1


@pytest.mark.parametrize("least", [0.0, -0.4])
def test_and_with_a_matrix_that_has_entries_of_either_sign(least):
    matrix = np.random.default_rng(1).uniform(least, 0.5, (30, 30))
    kernel = DenseKernel(np.float32(matrix + matrix.T) / 2)
    grown, peak = dropped_too_far(kernel, 30, allowed=0.5)
    assert grown <= 2.72 * peak * np.exp(float(kernel.largest_row_sums()[1])) * (1 + 1e-4)


@pytest.mark.slow_except("lattice")
@pytest.mark.parametrize("form", FORMS)
def test_the_row_sums_are_those_of_the_matrices(form):
    largest = set()
    for image in (picture(), np.flipud(picture())):  # one order of a lattice's directions has the larger sums in each
        kernel = builder(form, "symmetric")(image)
        sums, negative = row_sums(kernel)
        matrix = np.asarray(matrices(kernel, np.eye(PIXELS))[0])
        of_orders = matrix.sum(axis=1).max(), matrix.sum(axis=0).max()
        np.testing.assert_allclose(sums, max(of_orders), rtol=1e-4)
        assert negative == 0
        largest.add(int(np.argmax(of_orders)))
    assert form != "lattice" or largest == {0, 1}


def test_the_row_sums_of_a_matrix_by_hand():
    matrix = np.array([[9.0, 2.0, -1.0], [2.0, 9.0, 3.0], [-1.0, 3.0, 9.0]])
    assert [float(part) for part in DenseKernel(matrix).largest_row_sums()] == [5.0, 1.0]


def test_a_negative_weight_drops_no_label():
    _, kernel = logits_and_kernel(0)
    kernel = image_kernel(np.zeros((4, 4, 3), np.uint8), COARSE)
    assert np.isinf(kernel._replace(gaussian_weight=-1.0).largest_row_sums()[1])


@pytest.mark.parametrize(("num_pixels", "normalisation", "channels", "form"), [
    (48 * 48, "symmetric", 3, "exact"), (48 * 48 + 1, "symmetric", 3, "lattice"), (10**6, "none", 3, "anchors"),
    (60 * 80, "symmetric", 5, "lattice"), (60 * 80, "symmetric", 6, "exact"), (60 * 80, "symmetric", 200, "exact"),
])
def test_the_form_suits_size_and_channels(num_pixels, normalisation, channels, form):
    assert default_form(num_pixels, normalisation, num_channels=channels) == form


@pytest.mark.slow
@pytest.mark.parametrize("bands", [4, 6, 32, 200])
def test_an_image_of_many_bands_gets_the_labels_of_the_exact_form(bands):
    rng = np.random.default_rng(bands)
    # Up to five channels there is a lattice from 48 x 48 pixels on; beyond them the form is exact at any size.
    height, width = (52, 50) if bands < 6 else (36, 34)
    truth = np.zeros((height, width), int)
    truth[:, 2 * width // 5 :] = 1
    spectra = rng.uniform(40, 200, (2, bands))
    image = (spectra[truth] + rng.normal(size=(height, width, bands)) * 6).clip(0, 255).astype(np.float32)
    logits = (1.5 * np.eye(3)[truth] + rng.normal(size=(height, width, 3))).astype(np.float32)
    labels = refine(image, logits, COARSE, num_iterations=3).argmax(-1)
    expected = mean_field(logits, dense_kernel(image, COARSE), num_iterations=3).argmax(-1)
    assert np.mean(labels != expected) < (0.02 if bands < 6 else 1e-3)
