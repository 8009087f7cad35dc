"""The table of derivatives in docs/engine.md, cell by cell, against differences in float64."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lcrf_jax.crf.energy import kl_to_prior, pairwise_energy
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.image_kernels import image_kernel
from lcrf_jax.crf.inference import mean_field, mean_field_posterior, refine
from lcrf_jax.crf.loss import dense_crf_loss
from lcrf_jax.crf.params import KernelParams

HEIGHT, WIDTH, CLASSES = 5, 6, 8
PARAMS = KernelParams(2.0, 3.0, 30.0, 1.5, 1.5)
FORMS = ("dense", "exact", "anchors", "lattice")
IMAGE = reference.smooth_image(1, HEIGHT, WIDTH).astype(np.float64)
STEP = 1e-5


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def kernel_of(form, image=IMAGE, params=PARAMS):
    return dense_kernel(image, params) if form == "dense" else image_kernel(image, params, form=form)


@functools.cache
def kernel_of_picture(form):
    return jax.jit(functools.partial(kernel_of, form))(IMAGE)


def weighted(kernel, weight):
    return weight * kernel if isinstance(kernel, jax.Array) else kernel._replace(bilateral_weight=weight)


def draws(seed):
    """Logits in which two of the classes are improbable everywhere, and a direction."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(HEIGHT * WIDTH, CLASSES)) - np.array([0, 0, 0, 0, 12, 12, 12, 12])
    return logits, rng.normal(size=logits.shape)


def check_every_mode(function, at, along, *arguments, second=True, atol=1e-7):
    """Reverse mode, forward mode, under jit and vmap, and products with the second derivative both ways.

    `at` may be several arrays: the derivative is then in all of them. All modes are one program: compiling is what these
    tests cost. A kernel is an argument of it, or the compiler would compute with its constants.
    """
    at, rebuilt = jax.flatten_util.ravel_pytree(at)
    along = jax.flatten_util.ravel_pytree(along)[0]

    @jax.jit
    def program(x, arguments):
        def of_vector(x):
            return function(rebuilt(x), *arguments)

        found = {}
        found["value"], found["forwards"] = jax.jvp(of_vector, (x,), (along,))
        both = jnp.stack([x, x + along])
        found["batch"] = jax.vmap(jax.grad(of_vector))(both)
        found["of batch"] = jax.grad(lambda both: jax.vmap(of_vector)(both).sum())(both)
        if second:
            found["gradient"], found["product"] = jax.jvp(jax.grad(of_vector), (x,), (along,))
            found["transposed product"] = jax.grad(lambda x: jnp.vdot(jax.grad(of_vector)(x), along))(x)
        else:
            found["gradient"] = jax.grad(of_vector)(x)
        return found

    points = at, at + STEP * along, at - STEP * along, at + along
    found, above, below, beside = (program(point, arguments) for point in points)
    expected = jax.tree.map(lambda a, b: (a - b) / (2 * STEP), above, below)
    np.testing.assert_allclose(jnp.vdot(found["gradient"], along), expected["value"], rtol=1e-5, atol=atol)
    np.testing.assert_allclose(found["forwards"], expected["value"], rtol=1e-5, atol=atol)
    one_by_one = jnp.stack([found["gradient"], beside["gradient"]])
    np.testing.assert_allclose(found["batch"], one_by_one, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["of batch"], one_by_one, rtol=1e-6, atol=1e-9)
    if second:
        np.testing.assert_allclose(found["product"], expected["gradient"], rtol=1e-4, atol=atol)
        np.testing.assert_allclose(found["transposed product"], expected["gradient"], rtol=1e-4, atol=atol)


@pytest.mark.slow_except("dense")
@pytest.mark.parametrize("form", FORMS)
def test_energy_in_the_probabilities(form):
    logits, along = draws(0)
    check_every_mode(pairwise_energy, jax.nn.softmax(logits), along, kernel_of_picture(form))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_kl_in_the_logits(form):
    logits, along = draws(1)
    check_every_mode(kl_to_prior, jnp.asarray(logits), along, kernel_of_picture(form))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_energy_in_the_weight_and_the_compatibility(form):
    probs, kernel = jax.nn.softmax(draws(2)[0]), kernel_of_picture(form)
    along = np.random.default_rng(3).normal(size=(CLASSES, CLASSES))

    def function(at, kernel):
        weight, costs = at
        return pairwise_energy(probs, weighted(kernel, weight), compatibility=costs)

    check_every_mode(function, (2.0, 1 - np.eye(CLASSES)), (1.0, along + along.T), kernel)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "exact", "anchors"])
def test_energy_in_the_image_and_the_colour_width(form):
    probs = jax.nn.softmax(draws(4)[0])
    along = np.random.default_rng(4).normal(size=IMAGE.shape)

    def function(at):
        image, width = at
        return pairwise_energy(probs, kernel_of(form, image, PARAMS._replace(bilateral_colour_width=width)))

    # Smooth but for the choice of the anchors, which a small step does not change.
    check_every_mode(function, (IMAGE, 30.0), (along, 1.0), second=form != "anchors")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), [
    ("dense", "bilateral_position_width"), ("dense", "gaussian_position_width"), ("exact", "bilateral_position_width"),
])
def test_energy_in_a_position_width(form, name):
    probs = jax.nn.softmax(draws(14)[0])
    check_every_mode(
        lambda width: pairwise_energy(probs, kernel_of(form, params=PARAMS._replace(**{name: width}))),
        jnp.array(getattr(PARAMS, name)), jnp.array(1.0),
    )


OPTIONS = {
    "plain": {},
    "tolerance": {"tolerance": 1e-3},
    "dropping": {"drop_below": 1e-3},
    "both": {"drop_below": 1e-3, "tolerance": 1e-3},
}


@pytest.mark.slow_except("dense-both")
@pytest.mark.parametrize(("form", "options"), [
    *((form, "plain") for form in FORMS), ("dense", "tolerance"), ("dense", "both"), ("lattice", "both"),
])
def test_mean_field_in_the_logits(form, options):
    logits, along = draws(5)
    kernel, cotangent = kernel_of_picture(form), np.random.default_rng(6).normal(size=logits.shape)

    def function(logits, kernel):
        return jnp.vdot(jnp.exp(mean_field(logits, kernel, num_iterations=3, **OPTIONS[options])), cotangent)

    check_every_mode(function, jnp.asarray(logits), along, kernel, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_mean_field_that_drops_labels_in_the_logits_and_the_weight(form):
    logits, along = draws(5)
    kernel, cotangent = kernel_of_picture(form), np.random.default_rng(6).normal(size=logits.shape)

    def function(at, kernel):
        logits, weight = at
        result = mean_field(logits, weighted(kernel, weight), num_iterations=3, **OPTIONS["dropping"])
        return jnp.vdot(jnp.exp(result), cotangent)

    check_every_mode(function, (logits, 2.0), (along, 1.0), kernel, atol=1e-6)


@pytest.mark.slow
def test_mean_field_in_the_compatibility():
    logits, cotangent = draws(8)
    kernel, along = kernel_of_picture("exact"), np.random.default_rng(9).normal(size=(CLASSES, CLASSES))

    def function(costs):
        return jnp.vdot(jnp.exp(mean_field(logits, kernel, num_iterations=3, compatibility=costs)), cotangent)

    check_every_mode(function, jnp.asarray(1 - np.eye(CLASSES)), along + along.T, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["exact", "lattice"])
def test_refine_with_its_defaults(form):
    logits, along = draws(10)
    shape = (HEIGHT, WIDTH, CLASSES)

    def function(at):
        logits, weight = at
        log_probs = refine(IMAGE, logits.reshape(shape), PARAMS._replace(bilateral_weight=weight), form=form)
        return jnp.vdot(jnp.exp(log_probs), along.reshape(shape))

    check_every_mode(function, (logits, 2.0), (along, 1.0), atol=1e-6)


@pytest.mark.slow
def test_the_loss_of_a_network():
    rng = np.random.default_rng(11)
    image, logits = reference.smooth_image(2, 20, 24).astype(np.float64), jnp.asarray(rng.normal(size=(5, 6, 3)))
    check_every_mode(lambda logits: dense_crf_loss(image, logits), logits, rng.normal(size=logits.shape))
    gradient = jax.jit(jax.grad(lambda weight: dense_crf_loss(image, logits, KernelParams(bilateral_weight=weight))))(10.0)
    assert gradient > 0
    assert not np.any(jax.jit(jax.grad(lambda image: dense_crf_loss(image, logits)))(image))


@pytest.mark.slow
@pytest.mark.parametrize("differentiate", [jax.grad, jax.jacfwd])
def test_what_a_lattice_cannot_is_said(differentiate):
    probs = jax.nn.softmax(draws(12)[0])
    widths = PARAMS.bilateral_colour_width

    def of_image(image):
        return pairwise_energy(probs, kernel_of("lattice", image))

    def of_width(width):
        return pairwise_energy(probs, kernel_of("lattice", params=PARAMS._replace(bilateral_colour_width=width)))

    def of_array(weights):
        kernel = kernel_of_picture("lattice")
        return pairwise_energy(probs, kernel._replace(bilateral=kernel.bilateral._replace(weights=weights)))

    for function, at in ((of_image, IMAGE), (of_width, widths), (of_array, kernel_of_picture("lattice").bilateral.weights)):
        with pytest.raises(TypeError, match="a lattice has no derivative in the image, the widths .* form='exact'"):
            jax.eval_shape(differentiate(function), at)
    stopped = jax.grad(lambda image: of_image(jax.lax.stop_gradient(image)))(IMAGE)
    assert not np.any(stopped)


def test_a_kernel_that_jax_cannot_look_into_works_as_well():
    """Four methods, and no pytree."""

    class Smooth:
        def splat(self, values):
            return values

        def blur(self, values):
            return values.sum(axis=0) - values

        def slice(self, values):
            return values

        def apply(self, values, *, backwards=False):
            return values.sum(axis=0) - values

    logits, _ = draws(13)
    matrix = np.ones((len(logits), len(logits)))
    probs = jax.nn.softmax(logits)
    for run in (jax.jit, lambda function: function):
        energy = run(lambda probs: pairwise_energy(probs, Smooth()))
        np.testing.assert_allclose(energy(probs), pairwise_energy(probs, matrix), rtol=1e-9)
        np.testing.assert_allclose(
            run(jax.grad(energy))(probs), jax.grad(lambda p: pairwise_energy(p, matrix))(probs), rtol=1e-9
        )
        posterior = run(lambda logits: mean_field_posterior(logits, Smooth(), tolerance=1e-3, drop_below=1e-3))(logits)
        expected = mean_field_posterior(logits, matrix, tolerance=1e-3)
        np.testing.assert_allclose(posterior.log_probs, expected.log_probs, rtol=1e-6)
