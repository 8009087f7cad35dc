"""Every public function of the room of the CRF, with arguments that it takes, for tests of all."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import reference

from lcrf_jax import crf
from lcrf_jax.crf import KernelParams


class Size(NamedTuple):
    """A picture and its classes, and the widths over positions, which are static."""

    height: int
    width: int
    channels: int
    classes: int
    dtype: str
    position_widths: tuple


SIZES = (Size(1, 1, 1, 1, "float32", (80, 3)), Size(2, 3, 40, 40, "float16", (5, 3)), Size(8, 8, 3, 2, "uint8", (80, 3)),
         Size(64, 1, 4, 5, "bfloat16", (0.3, 0.2)), Size(9, 14, 2, 3, "float32", (1e3, 1e3)))
FORMS = ("dense", "exact", "anchors", "lattice")
SCALES = (0.0, 1.0, 30.0, 1e4, 1e30)
PICTURES = ("smooth", "constant", "noise", "two colours")
NUMBERS = ((10.0, 13.0, 3.0), (4.0, 0.3, 2.0), (40.0, 1e3, 40.0), (0.0, 3.0, 0.0))  # weights, and the colour width between


class Call(NamedTuple):
    """A function of the arrays it names, for one form and set of widths, and whether the form matters to it."""

    function: object
    arrays: tuple
    of_forms: bool = True


def of_kernel(function):
    """A function of values and a kernel, as one of values and the image from which the kernel is made."""
    def applied(image, values, form, params):
        if form == "dense":
            return function(values, crf.dense_kernel(image, params))
        return function(values, crf.image_kernel(image, params, form=form))

    return applied


def refined(function):
    return lambda image, logits, form, params: function(image, logits, params, form="exact" if form == "dense" else form)


def of_image(function):
    return lambda image, form, params: function(image, params)


def exact_filter(image, values, form, params):
    features = crf.guide_features(image, position_width=params.bilateral_position_width, colour_width=params.bilateral_colour_width)
    return crf.filter_exact(values.reshape(-1, values.shape[-1]), features)


def volume(image, values, form, params):
    features = crf.volume_features(image[None], position_widths=(3.0, 3.0, 2.0), channel_width=params.bilateral_colour_width)
    kernel = crf.feature_kernel(features, weights=3.0, form="lattice" if form == "lattice" else "exact")
    return crf.mean_field(values, kernel, num_iterations=2)


def coarse_to_fine(image, logits, form, params):
    form = "exact" if form == "dense" else form
    kernel, coarse = crf.image_kernel(image, params, form=form), crf.coarse_grid(image, params, form=form)
    return crf.mean_field(logits, kernel, num_iterations=3, coarse=coarse, coarse_iterations=2)


EVERY = {
    "anchor_image_kernel": Call(of_image(crf.anchor_image_kernel), ("image",), False),
    "dense_crf_loss": Call(
        lambda image, logits, form, params: crf.dense_crf_loss(image, logits, params), ("image", "logits"), False),
    "dense_kernel": Call(of_image(crf.dense_kernel), ("image",), False),
    "exact_image_kernel": Call(of_image(crf.exact_image_kernel), ("image",), False),
    "feature_kernel": Call(volume, ("image", "logits")),
    "filter_exact": Call(exact_filter, ("image", "values"), False),
    "filter_symmetric": Call(of_kernel(lambda v, k: crf.filter_symmetric(k, v.reshape(-1, v.shape[-1]))), ("image", "values")),
    "filter_with": Call(of_kernel(lambda v, k: crf.filter_with(k, v.reshape(-1, v.shape[-1]))), ("image", "values")),
    "gaussian_kernel": Call(
        lambda image, form, params: crf.gaussian_kernel(crf.guide_features(image, position_width=3.0, colour_width=params.bilateral_colour_width)),
        ("image",), False),
    "kl_to_prior": Call(of_kernel(crf.kl_to_prior), ("image", "logits")),
    "lattice_image_kernel": Call(of_image(crf.lattice_image_kernel), ("image",), False),
    "mean_field": Call(
        of_kernel(lambda u, k: crf.mean_field(u, k, num_iterations=3, tolerance=1e-3, drop_below=1e-3)), ("image", "logits")),
    "mean_field_posterior": Call(of_kernel(lambda u, k: crf.mean_field_posterior(u, k, num_iterations=3)), ("image", "logits")),
    "pairwise_energy": Call(of_kernel(crf.pairwise_energy), ("image", "probs")),
    "coarse_grid": Call(coarse_to_fine, ("image", "logits")),
    "refine": Call(refined(crf.refine), ("image", "logits")),
    "refined_posterior": Call(refined(crf.refined_posterior), ("image", "logits")),
}
# Covered by those above: made by them, or one of their steps.
PARTS = {"CoarseGrid", "DenseKernel", "ImageKernel", "KernelParams", "KernelSum", "MeanFieldPosterior", "guide_features", "image_kernel",
         "volume_features"}


def arrays_of(size, picture, scale, seed):
    """The arrays that a function of `EVERY` takes."""
    height, width, channels, classes, dtype, _ = size
    rng = np.random.default_rng(seed)
    images = {
        "smooth": lambda: np.resize(reference.smooth_image(seed, height, width), (height, width, channels)),
        "constant": lambda: np.full((height, width, channels), 90.0),
        "noise": lambda: rng.integers(0, 256, (height, width, channels)),
        "two colours": lambda: np.where(rng.random((height, width, 1)) < 0.5, 0.0, 255.0) * np.ones(channels),
    }
    logits = scale * rng.normal(size=(height, width, classes))
    if dtype == "float16":
        logits = logits.clip(-6e4, 6e4)
    floats = "float32" if dtype == "uint8" else dtype
    arrays = {"image": images[picture](), "logits": logits, "values": logits, "probs": reference.softmax(logits)}
    # In NumPy: what is known is checked, also while something is traced.
    return {name: array.astype(jnp.dtype(dtype if name == "image" else floats)) for name, array in arrays.items()}


def params_of(size, numbers):
    weight, colour_width, gaussian_weight = numbers
    return KernelParams(weight, size.position_widths[0], colour_width, gaussian_weight, size.position_widths[1])
