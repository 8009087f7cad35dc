"""The kernels of one picture, in every form and normalisation, built once for all tests."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import reference

from lcrf_jax.crf.image_kernels import image_kernel
from lcrf_jax.crf.kernel import ImageKernel, filter_symmetric, filter_with
from lcrf_jax.crf.params import KernelParams

COARSE = KernelParams(10.0, 20.0, 13.0, 3.0, 0.75)
HEIGHT, WIDTH = 20, 24
PIXELS = HEIGHT * WIDTH

matrices = jax.jit(lambda kernel, values: (filter_with(kernel, values), filter_symmetric(kernel, values)))


class Case(NamedTuple):
    form: str
    normalisation: str
    kernel: ImageKernel
    matrix: np.ndarray
    symmetric: np.ndarray
    dense: np.ndarray


@functools.cache
def picture():
    return reference.smooth_image(1, HEIGHT, WIDTH).astype(np.float32)


@functools.cache
def builder(form, normalisation):
    """A function from a picture to its kernel, compiled once."""
    return jax.jit(functools.partial(image_kernel, params=COARSE, form=form, normalisation=normalisation))


@functools.cache
def case_of(form, normalisation):
    """The kernel of the picture, what it and its symmetric part are as matrices, and what it should be."""
    kernel = builder(form, normalisation)(picture())
    matrix, symmetric = matrices(kernel, np.eye(PIXELS))
    dense = reference.dense_kernel(picture(), COARSE, normalisation)
    return Case(form, normalisation, kernel, np.float64(matrix), np.float64(symmetric), dense)


def soft_labels(num_pixels=PIXELS, num_classes=4):
    return reference.softmax(np.random.default_rng(0).normal(size=(num_pixels, num_classes)) * 2)


def relative(got, expected):
    return np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)
