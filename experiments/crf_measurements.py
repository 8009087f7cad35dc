"""Measurements of the dense CRF for `experiments.bench`: the jobs, each of which one process runs.

A job takes a photograph and a size (height, width), and returns numbers that JSON can hold.
"""

import functools
import importlib
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

import lcrf_jax
from lcrf_jax.crf.exact import filter_exact, gaussian_kernel
from lcrf_jax.crf.image_kernels import FORMS
from lcrf_jax.crf.params import guide_features

from . import measuring

# Pixels up to which a form is measured: the time of the exact one is quadratic.
MOST_PIXELS = {"exact": 100 * 100, "anchors": 500 * 375, "lattice": math.inf}
PARAMS = lcrf_jax.KernelParams()
NUM_ITERATIONS = 10
BATCH = 4
CELL = 8
FAILED = 255
# Iterations on the coarse grid, of those of mean field, that are compared with each other.
COARSE = (0, 5, 6, 7)
# Up to this many pixels the exact sum is taken at every one of them, beyond at a sample.
ALL_PIXELS = 161 * 161
SAMPLE = 4096


def refined_labels(image, log_probs, coarse_iterations=0):
    """[H, W] uint8, the labels after refinement, by default as the library does it; 255 where it gave NaN."""
    refined = lcrf_jax.refined_posterior(
        image, log_probs, PARAMS, num_iterations=NUM_ITERATIONS, coarse_iterations=coarse_iterations
    )
    return jnp.where(refined.overflowed, FAILED, refined.log_probs.argmax(-1)).astype(jnp.uint8)


def photograph(path, height, width):
    """[height, width, 3] uint8, the photograph cropped to these proportions and resized."""
    with Image.open(path) as image:
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        return np.asarray(fitted)


def network_like(image, num_classes, unary):
    """[H, W, K] float32 log-probabilities as a network gives them: smooth, from cells of 8 pixels, enlarged.

    Each class has a place and the colour found there; the nearer a cell is to both, the more probable the class.
    'every class' leaves each class at least .1 / K everywhere; '3 classes' leaves all but three below 1e-4.
    """
    height, width, _ = image.shape
    rows, columns = (max(2, math.ceil(size / CELL)) for size in (height, width))
    colours = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BOX), np.float32)
    rng = np.random.default_rng(0)
    places = rng.uniform(0.05, 0.95, (num_classes, 2)) * (rows, columns)
    own = colours[tuple(places.astype(int).T)]
    grid = np.stack(np.mgrid[:rows, :columns], axis=-1)[:, :, None] + 0.5
    far = np.square((grid - places) / (0.15 * rows, 0.15 * columns)).sum(-1)
    unlike = np.square((colours[:, :, None] - own) / 35).sum(-1)
    logits = -(np.minimum(far + unlike, 40) / 2).astype(np.float32)
    enlarged = [
        Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR) for plane in np.moveaxis(logits, 2, 0)
    ]
    probs = np.exp(np.stack(enlarged, axis=-1))
    if unary == "3 classes":
        probs[:, :, 3:] = 0
    probs /= probs.sum(axis=-1, keepdims=True)
    least = {"every class": 0.1 / num_classes, "3 classes": 1e-5}[unary]
    return np.log((probs + least) / (1 + least * num_classes))


def inputs(photo, size, num_classes, unary="every class"):
    """(image, log-probabilities) of a photograph at a size (height, width)."""
    image = photograph(photo, *size)
    return image, network_like(image, num_classes, unary)


def params_at(size, grid_of):
    """The kernel on a square grid of a photograph of `grid_of` pixels a side; that of the pixels for other shapes."""
    height, width = size
    return PARAMS.at_stride(grid_of / width) if height == width < grid_of else PARAMS


def peer_module(name):
    """The module of an installed peer, or None."""
    try:
        return importlib.import_module(PEERS[name].module)
    except ImportError:
        return None


class Peer(NamedTuple):
    """Another implementation: its module, how it is installed, and labels(module, image, energies)."""

    module: str
    installation: str
    labels: object


def _densecrf_labels(module, image, energies):
    """Mean field of Krahenbuhl's code; energies [K, H * W] float32."""
    height, width, _ = image.shape
    crf = module.DenseCRF2D(width, height, len(energies))
    crf.setUnaryEnergy(energies)
    crf.addPairwiseGaussian(sxy=PARAMS.gaussian_position_width, compat=PARAMS.gaussian_weight)
    crf.addPairwiseBilateral(
        sxy=PARAMS.bilateral_position_width,
        srgb=PARAMS.bilateral_colour_width,
        rgbim=image,
        compat=PARAMS.bilateral_weight,
    )
    return np.argmax(crf.inference(NUM_ITERATIONS), axis=0).reshape(height, width)


PEERS = {
    "pydensecrf2": Peer(
        "pydensecrf.densecrf",
        'pip install "Cython<3" setuptools wheel && pip install --no-build-isolation pydensecrf2   (needs a C++ compiler)',
        _densecrf_labels,
    )
}


def peer_function(name, image, log_probs):
    """A function without arguments that gives the peer's labels; the layout it wants is made before."""
    module, labels = peer_module(name), PEERS[name].labels
    energies = np.ascontiguousarray(-log_probs.reshape(-1, log_probs.shape[-1]).T)
    image = np.array(image)  # writable and contiguous
    return lambda: labels(module, image, energies)


def _sums_at(chosen, features, values):
    """The rows of `filter_exact` for chosen features."""

    def row(feature):
        return jnp.matmul(gaussian_kernel(feature[None], features)[0], values, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(row, chosen, batch_size=16)


def reference(photo, size, num_classes, grid_of, path):
    """Save the exact sums over the bilateral Gaussian, raw and symmetric, self-pairs left out; seconds it took."""
    started = time.perf_counter()
    image, log_probs = inputs(photo, size, num_classes)
    params, probs = params_at(size, grid_of), jnp.exp(log_probs).reshape(-1, num_classes)
    features = guide_features(
        image, position_width=params.bilateral_position_width, colour_width=params.bilateral_colour_width
    )
    num_pixels = len(features)
    row_sums = jax.jit(filter_exact)(features, jnp.ones((num_pixels, 1)))
    values = jnp.concatenate([probs, probs / jnp.sqrt(row_sums)], axis=1)
    if num_pixels <= ALL_PIXELS:
        rows = np.arange(num_pixels)
        sums = jax.jit(filter_exact)(features, values)
    else:
        rows = np.sort(np.random.default_rng(1).choice(num_pixels, SAMPLE, replace=False))
        sums = jax.jit(_sums_at)(features[rows], features, values)
    raw = sums[:, :num_classes] - probs[rows]
    symmetric = sums[:, num_classes:] / jnp.sqrt(row_sums[rows]) - probs[rows] / row_sums[rows]
    np.savez(path, rows=rows, raw=raw, symmetric=symmetric)
    return time.perf_counter() - started


def _summed_energies(probs, kernels):
    """Sum over a batch of the energies, which all take part in, so that the gradient is that of each."""
    return jax.vmap(lcrf_jax.pairwise_energy)(probs, kernels).sum()


def form(photo, size, num_classes, grid_of, name, repetitions, reference_path):
    """Times, compile times, peak memory and errors of a form of the kernel at a size."""
    image, log_probs = inputs(photo, size, num_classes)
    params, unary = params_at(size, grid_of), log_probs.reshape(-1, num_classes)
    probs = np.exp(unary)
    turned = (slice(None), slice(None, None, -1))
    images = np.stack([image[rows, columns] for rows in turned for columns in turned])
    grids = np.exp(np.stack([log_probs[rows, columns] for rows in turned for columns in turned]))
    batch = grids.reshape(BATCH, -1, num_classes)
    jax.block_until_ready(jnp.ones(1) + 1)

    def built(image):
        return FORMS[name](image, params)

    def labels(image, unary):
        return lcrf_jax.mean_field(unary, built(image), num_iterations=NUM_ITERATIONS).argmax(-1).astype(jnp.uint8)

    def energies_of_images(probs, images):
        return jax.value_and_grad(_summed_energies)(probs, jax.vmap(built)(images))

    infer, compile_labels = measuring.compiled(labels, image, unary)
    _, peak_labels = measuring.with_peak(lambda: np.asarray(infer(image, unary)))
    energies, compile_energies = measuring.compiled(energies_of_images, batch, images)
    _, peak_energies = measuring.with_peak(lambda: jax.block_until_ready(energies(batch, images)))
    build_one, _ = measuring.compiled(built, image)
    kernel = jax.block_until_ready(build_one(image))
    kernels = jax.tree.map(lambda *parts: jnp.stack(parts), *map(build_one, images))
    energies_only = jax.jit(jax.value_and_grad(_summed_energies))
    apply = jax.jit(lambda kernel, values: kernel.apply(values))
    # Values that a network has computed lie on the device; images and the unary of the mean field come from the host.
    on_device, of_batch = jnp.asarray(probs), jnp.asarray(batch)
    calls = {
        "build": lambda: jax.block_until_ready(build_one(image)),
        "apply": lambda: jax.block_until_ready(apply(kernel, on_device)),
        "energy": lambda: jax.block_until_ready(energies_only(of_batch, kernels)),
        "energy_with_build": lambda: jax.block_until_ready(energies(of_batch, images)),
        "mean_field": lambda: np.asarray(infer(image, unary)),
    }
    measured = {}
    for what, call in calls.items():
        call()
        [measured[what]] = measuring.timings([call], repetitions)
    return {
        **measured,
        "compile_mean_field": compile_labels,
        "compile_energy": compile_energies,
        "peak_mean_field": peak_labels,
        "peak_energy": peak_energies,
        **_errors(FORMS[name], image, params, on_device, np.load(reference_path)),
    }


def _errors(builder, image, params, probs, exact):
    """Relative errors of product, energy and gradient of the bilateral Gaussian, raw and symmetrically normalised."""
    params = params._replace(bilateral_weight=1.0, gaussian_weight=0)
    rows, errors = exact["rows"], {}
    of_rows = probs[rows]
    for name, normalisation in (("raw", "none"), ("symmetric", "symmetric")):

        def product_and_energy(image, normalisation=normalisation):
            kernel = builder(image, params, normalisation=normalisation)
            return kernel.apply(probs), jax.value_and_grad(lcrf_jax.pairwise_energy)(probs, kernel)

        product, (energy, gradient) = jax.jit(product_and_energy)(image)
        if not jnp.isfinite(energy):
            raise ValueError("the energy is not finite: has the lattice overflowed?")
        exact_gradient = exact[name].sum(axis=-1, keepdims=True) - exact[name]
        # Of a sample of pixels: the exact energy by the ratio of the two at these, which hardly depends on the sample.
        ratio = jnp.sum(of_rows * gradient[rows]) / jnp.sum(of_rows * exact_gradient)
        exact_energy = jnp.sum(probs * gradient) / 2 / ratio
        errors[f"{name}_product"] = _distance(product[rows], exact[name])
        errors[f"{name}_energy"] = float(abs(energy / exact_energy - 1))
        errors[f"{name}_gradient"] = _distance(gradient[rows], exact_gradient)
    return errors


def _distance(approximate, exact):
    """Relative distance in L2."""
    return float(jnp.linalg.norm(approximate - exact) / jnp.linalg.norm(exact))


def refinement(photo, size, num_classes, unaries, repetitions, peer=None):
    """Compile time, and by unary mean field as the library does it by default, and the peer's in turns with it."""
    jax.block_until_ready(jnp.ones(1) + 1)
    program, compile_seconds = measuring.compiled(refined_labels, *inputs(photo, size, num_classes))
    results = {}
    for unary in unaries:
        image, log_probs = inputs(photo, size, num_classes, unary)
        calls = [lambda image=image, log_probs=log_probs: np.asarray(program(image, log_probs))]
        if peer is not None:
            calls.append(peer_function(peer, image, log_probs))
        found, peaks = zip(*(measuring.with_peak(call) for call in calls), strict=True)
        if np.any(found[0] == FAILED):
            raise ValueError("refinement gave NaN: has the lattice overflowed?")
        results[unary] = {
            "timings": measuring.timings(calls, repetitions, budget=3.0),
            "peaks": peaks,
            "changed": float(np.mean(found[0] != log_probs.argmax(-1))),
            "differing": None if peer is None else float(np.mean(found[0] != found[1])),
        }
    return {"compile": compile_seconds, "unaries": results}


def coarse_to_fine(photo, size, num_classes, unary, repetitions):
    """By iterations on the coarse grid: timings, all in turns, and labels that differ from those without any."""
    jax.block_until_ready(jnp.ones(1) + 1)
    image, log_probs = inputs(photo, size, num_classes, unary)
    programs = [jax.jit(functools.partial(refined_labels, coarse_iterations=number)) for number in COARSE]
    calls = [lambda program=program: np.asarray(program(image, log_probs)) for program in programs]
    found = [call() for call in calls]
    if np.any(np.equal(found, FAILED)):
        raise ValueError("refinement gave NaN: has the lattice overflowed?")
    differing = [float(np.mean(labels != found[0])) for labels in found]
    return {"timings": measuring.timings(calls, repetitions, budget=3.0), "differing": differing}


def recompilations(photo, size, num_classes):
    """Programs that JAX compiles for a first and for a second photograph of the same size."""
    labels, count, counts = jax.jit(refined_labels), measuring.CompilationCount(), []
    image, log_probs = inputs(photo, size, num_classes)
    second = np.ascontiguousarray(255 - image[::-1])
    for picture, unary in ((image, log_probs), (second, network_like(second, num_classes, "3 classes"))):
        before = count.number
        np.asarray(labels(picture, unary))
        counts.append(count.number - before)
    return counts


def parity(photo, size, num_classes, unaries, peer=None):
    """By unary and implementation: shares of labels that differ from exact mean field without and with self-pairs."""
    pairs = [inputs(photo, size, num_classes, unary) for unary in unaries]
    image, grids = pairs[0][0], np.stack([log_probs for _, log_probs in pairs])
    kernel = jax.jit(functools.partial(FORMS["exact"], params=PARAMS))(image)
    # What the kernel takes away at each pixel: the self-pairs, or, to have them in, less what it left out elsewhere.
    gaussian_pairs = jnp.square(kernel.gaussian.scale).reshape(-1)
    diagonal = -PARAMS.gaussian_weight / PARAMS.bilateral_weight * gaussian_pairs
    diagonals = jnp.stack([kernel.bilateral_diagonal, diagonal.reshape(kernel.bilateral_diagonal.shape)])

    def exact(unary, diagonal):
        every = kernel._replace(bilateral_diagonal=diagonal)
        return lcrf_jax.mean_field(unary, every, num_iterations=NUM_ITERATIONS).argmax(-1)

    # One product of the kernel for both conventions and all unaries.
    both = jax.vmap(jax.vmap(exact, (None, 0)), (0, None))
    truths = np.asarray(jax.jit(both)(grids.reshape(len(unaries), -1, num_classes), diagonals)).reshape(-1, 2, *size)
    labels, results = jax.jit(refined_labels, static_argnames="coarse_iterations"), {}
    for unary, log_probs, (without, including) in zip(unaries, grids, truths, strict=True):
        found = {"lcrf_jax": np.asarray(labels(image, log_probs))}
        for number in COARSE[1:]:
            found[f"lcrf_jax, {number} coarse iterations"] = np.asarray(labels(image, log_probs, coarse_iterations=number))
        if peer is not None:
            found[peer] = peer_function(peer, image, log_probs)()
        found["exact mean field with self-pairs"] = including
        results[unary] = {
            name: [float(np.mean(given != truth)) for truth in (without, including)] for name, given in found.items()
        }
    return results


JOBS = {
    "reference": reference,
    "form": form,
    "refinement": refinement,
    "coarse_to_fine": coarse_to_fine,
    "recompilations": recompilations,
    "parity": parity,
}

if __name__ == "__main__":
    measuring.serve(JOBS)
