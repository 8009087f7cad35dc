"""Mean field whose first iterations are made on the image averaged over 2 x 2 pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from compiled import compiled

from lcrf_jax.crf.coarse import averaged, coarse_grid, enlarged
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.image_kernels import FORMS, exact_image_kernel, image_kernel
from lcrf_jax.crf.inference import mean_field, mean_field_posterior, refine, refined_posterior
from lcrf_jax.crf.params import KernelParams

averaged, enlarged = compiled(averaged), compiled(enlarged)
PARAMS = KernelParams(6.0, 4.0, 20.0, 2.0, 2.0)


def blocks_of(size):
    return [slice(start, min(start + 2, size)) for start in range(0, size, 2)]


def mean_of_blocks(values):
    height, width, _ = values.shape
    return np.array([[values[rows, columns].mean(axis=(0, 1)) for columns in blocks_of(width)] for rows in blocks_of(height)])


def between_cells(cells, height, width):
    """Each pixel's own cell counts nine parts in sixteen, those beside it three, and the one across one; inside the grid."""
    result = np.zeros((height, width, cells.shape[2]))
    for row in range(height):
        for column in range(width):
            total = 0
            for at, down in ((row // 2, 3), (row // 2 + (1 if row % 2 else -1), 1)):
                for beside, right in ((column // 2, 3), (column // 2 + (1 if column % 2 else -1), 1)):
                    if 0 <= at < cells.shape[0] and 0 <= beside < cells.shape[1]:
                        result[row, column] += down * right * cells[at, beside]
                        total += down * right
            result[row, column] /= total
    return result


def picture(height=5, width=8, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.uniform(0, 255, (height, width, 3)).astype(np.float32)
    return image, (2 * rng.normal(size=(height, width, classes))).astype(np.float32)


@pytest.mark.slow_except("3-2")
@pytest.mark.parametrize(("of_coarse", "of_fine"), [(3, 2), (2, 0)])
def test_the_iterations_are_those_of_the_loops(of_coarse, of_fine):
    image, logits = picture()
    unary = np.log(reference.softmax(logits.astype(float)))
    kernel = np.asarray(dense_kernel(image, PARAMS), float)
    coarse_kernel = np.asarray(dense_kernel(mean_of_blocks(image), PARAMS.at_stride(2)), float)
    below = mean_of_blocks(unary).reshape(-1, 3)
    probs = reference.softmax(below)
    for _ in range(of_coarse):
        message = coarse_kernel @ probs
        probs = reference.softmax(below + message)
    logits_of = unary + between_cells(message.reshape(3, 4, 3), 5, 8)
    for _ in range(of_fine):
        logits_of = unary + (kernel @ reference.softmax(logits_of).reshape(-1, 3)).reshape(5, 8, 3)
    found = refine(image, logits, PARAMS, form="exact", num_iterations=of_coarse + of_fine, coarse_iterations=of_coarse)
    np.testing.assert_allclose(np.exp(found), reference.softmax(logits_of), atol=2e-4)
    assert np.abs(np.exp(found) - reference.softmax(unary)).max() > 0.1


def test_values_between_cells_by_hand():
    cells = np.array([0.0, 4.0]).reshape(1, 2, 1)
    np.testing.assert_allclose(enlarged(cells, np.ones((2, 4)))[:, :, 0], [[0, 1, 3, 4]] * 2)
    np.testing.assert_allclose(enlarged(cells, np.ones((1, 3)))[:, :, 0], [[0, 1, 3]])
    counted = np.array([[1.0, 1.0, 0.0, 0.0]])  # the second cell has no pixel that counts
    np.testing.assert_allclose(enlarged(cells, counted)[0, :2, 0], 0)


def test_means_are_over_the_pixels_that_count():
    values = np.array([[1.0, 3.0, 10.0], [5.0, np.nan, 20.0]])[:, :, None]
    counted = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(averaged(values, counted)[:, :, 0], [[3.0, 0.0]])
    np.testing.assert_allclose(averaged(values[:1], counted[:1] * 0 + 1)[:, :, 0], [[2.0, 10.0]])


@pytest.mark.slow
def test_one_pixel_cannot_forbid_what_another_forces():
    logits = np.where(np.arange(2) == np.indices((4, 4)).sum(axis=0)[..., None] % 2, 0.0, -np.inf)
    found = refine(np.zeros((4, 4, 3), np.uint8), logits, PARAMS, num_iterations=3, coarse_iterations=2)
    np.testing.assert_array_equal(found.argmax(-1), logits.argmax(-1))
    assert not np.isnan(found).any()


@pytest.mark.slow
def test_padding_changes_nothing():
    image, logits = picture(5, 7)
    padding = ((0, 3), (0, 4), (0, 0))
    padded, valid = np.pad(image, padding, mode="edge"), np.pad(np.ones((5, 7), bool), padding[:2])
    options = {"form": "exact", "num_iterations": 4, "coarse_iterations": 3}
    expected = refine(image, logits, PARAMS, **options)
    found = refine(padded, np.pad(logits, padding, constant_values=9.0), PARAMS, valid=valid, **options)
    np.testing.assert_allclose(np.exp(found[:5, :7]), np.exp(expected), atol=1e-4)


@pytest.mark.slow
def test_no_coarse_iterations_are_the_usual_ones_and_the_number_counts_both():
    image, logits = picture()
    kernel, coarse = exact_image_kernel(image, PARAMS), coarse_grid(image, PARAMS, form="exact")
    run = compiled(mean_field_posterior)
    usual = mean_field(logits, kernel, num_iterations=3)
    np.testing.assert_array_equal(mean_field(logits, kernel, num_iterations=3, coarse=coarse), usual)
    for of_coarse in (2, 3):
        found = run(logits, kernel, num_iterations=3, coarse=coarse, coarse_iterations=of_coarse)
        assert found.num_iterations == 3 and 0 < found.change < 1 and np.isfinite(found.free_energy)
    stopped = run(logits, kernel, num_iterations=30, coarse=coarse, coarse_iterations=20, tolerance=1.0)
    assert stopped.num_iterations == 2  # one on each grid


def test_what_does_not_fit_is_refused():
    image, logits = picture()
    kernel, coarse = exact_image_kernel(image, PARAMS), coarse_grid(image, PARAMS)
    with pytest.raises(ValueError, match="coarse_iterations: expected 0 without coarse, got 2; pass coarse=coarse_grid"):
        mean_field(logits, kernel, coarse_iterations=2)
    with pytest.raises(ValueError, match="coarse_iterations: expected at most num_iterations = 3, got 4"):
        mean_field(logits, kernel, num_iterations=3, coarse=coarse, coarse_iterations=4)
    with pytest.raises(ValueError, match="at most num_iterations = 3, got 4"):
        refine(image, logits, num_iterations=3, coarse_iterations=4)
    with pytest.raises(ValueError, match="coarse_iterations"):
        refine(image, logits, coarse_iterations=-1)
    with pytest.raises(TypeError, match="coarse: expected a CoarseGrid, got ImageKernel"):
        mean_field(logits, kernel, coarse=kernel, coarse_iterations=2)
    with pytest.raises(ValueError, match=r"coarse: expected the coarse grid of 40 pixels.*got one of 35"):
        mean_field(logits, kernel, coarse=coarse_grid(image[:, :7], PARAMS), coarse_iterations=2)
    with pytest.raises(TypeError, match="coarse_iterations: expected a Python int, got a traced value"):
        jax.jit(lambda n: refine(image, logits, coarse_iterations=n))(2)
    with pytest.raises(ValueError, match="valid"):
        coarse_grid(image, PARAMS, valid=np.ones((4, 8), bool))


def in_float64(run):
    with jax.enable_x64(True):
        return run()


@pytest.mark.slow
def test_the_derivative_is_that_of_the_value():
    image, logits = picture(4, 5)
    direction = np.random.default_rng(5).normal(size=logits.shape)

    def value(logits):
        refined = refine(np.float64(image), logits, PARAMS, form="exact", num_iterations=2, coarse_iterations=1)
        return jnp.sum(jnp.exp(refined) * direction)

    def both():
        at = np.float64(logits)
        difference = (value(at + 1e-5 * direction) - value(at - 1e-5 * direction)) / 2e-5
        return float(jnp.vdot(jax.jit(jax.grad(value))(at), direction)), float(difference)

    found, difference = in_float64(both)
    assert abs(difference) > 1e-3
    np.testing.assert_allclose(found, difference, rtol=1e-6)


# One size and one set of options for the tests of dropped labels: each form of the kernel is compiled once for both.
HEIGHT, WIDTH, LABELS = 20, 24, 8
DROPPING = {"num_iterations": 4, "coarse_iterations": 2, "drop_below": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(FORMS))
def test_a_batch_is_a_loop_under_every_transformation(form):
    images, logits = (np.stack(parts) for parts in zip(*(picture(HEIGHT, WIDTH, LABELS, seed) for seed in range(2)), strict=True))

    def refined(image, logits):
        return refine(image, logits, PARAMS, form=form, **DROPPING)

    batch = jax.jit(jax.vmap(refined))(images, logits)
    for each, image, unary in zip(batch, images, logits, strict=True):
        np.testing.assert_allclose(np.exp(each), np.exp(refined(image, unary)), atol=2e-5)
    weights = np.random.default_rng(3).normal(size=logits.shape).astype(np.float32)

    def total(logits):
        return jnp.sum(jnp.exp(jax.vmap(refined)(images, logits)) * weights)

    gradient = jax.jit(jax.grad(total))(logits)
    along = jax.jit(lambda x, t: jax.jvp(total, (x,), (t,))[1])(logits, weights)
    assert abs(float(along)) > 1e-2
    np.testing.assert_allclose(jnp.vdot(gradient, weights), along, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted(FORMS))
def test_dropping_labels_changes_little_on_both_grids(form):
    image = reference.smooth_image(2, HEIGHT, WIDTH).astype(np.float32)
    probs = np.full((HEIGHT // 2, WIDTH // 2, LABELS), 5e-4)
    probs[:, :, :3] = (1 - (LABELS - 3) * 5e-4) * reference.softmax(np.random.default_rng(0).normal(size=(HEIGHT // 2, WIDTH // 2, 3)) * 2)
    logits = np.log(probs.repeat(2, axis=0).repeat(2, axis=1)).astype(np.float32)
    every = refine(image, logits, PARAMS, form=form, **{**DROPPING, "drop_below": None})
    few = refine(image, logits, PARAMS, form=form, **DROPPING)
    assert np.abs(np.exp(few) - np.exp(every)).max() < 0.02
    # Those that were dropped have had no message: all but one, which fills the number up to four.
    given = np.sort(np.asarray(few[:, :, 3:] - logits[:, :, 3:]), axis=-1)
    assert np.ptp(given[:, :, :-1], axis=-1).max() < 2e-6
    assert np.ptp(given, axis=-1).max() > 1e-4


@pytest.mark.slow
def test_where_either_lattice_overflows_the_labels_are_those_of_the_unary():
    image, logits = picture(24, 24)
    image = np.random.default_rng(0).uniform(0, 255, (24, 24, 3)).astype(np.float32)
    params = KernelParams(10.0, 3.0, 3.0, 3.0, 3.0)
    build = compiled(lambda image, capacity: [make(image, params, form="lattice", capacity=capacity) for make in (image_kernel, coarse_grid)])
    kernel, coarse = build(image, 24 * 24 * 6)
    needed = int(coarse.kernel.bilateral.num_vertices)

    @jax.jit
    def run(image, kernel):
        tight = coarse_grid(image, params, form="lattice", capacity=needed - 1)
        return mean_field_posterior(logits, kernel, num_iterations=4, coarse=tight, coarse_iterations=2)

    found = run(image, kernel)
    assert found.overflowed and found.num_iterations == 0
    np.testing.assert_allclose(found.log_probs, jax.nn.log_softmax(logits), atol=1e-5)
    grown = refined_posterior(image, logits, params, form="lattice", num_iterations=4, coarse_iterations=2)
    assert not grown.overflowed and grown.num_iterations == 4
