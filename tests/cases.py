"""Random images of a few pixels, small enough to enumerate their labellings."""

import numpy as np
import reference

from lcrf_jax.bound.likelihoods import TAG_LIKELIHOODS, evidence, frozen_classifier, max_pool


def random_case(seed, num_pixels=6, num_classes=3):
    """Logits, a positive kernel, tags and evidence of one image."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 1, (num_pixels, num_pixels))
    tags = np.array([True, *(rng.uniform(size=num_classes - 1) < 0.5)])
    vouching = rng.dirichlet(np.ones(num_classes), num_pixels) + 0.01
    return 1.5 * rng.normal(size=(num_pixels, num_classes)), (kernel + kernel.T) / 2, tags, vouching


def logits_and_kernel(seed, num_pixels=7, num_classes=3, symmetric=True):
    """Logits and a positive kernel with something on its diagonal."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 0.6, (num_pixels, num_pixels))
    kernel = (kernel + kernel.T) / 2 if symmetric else kernel
    return rng.normal(size=(num_pixels, num_classes)) * 1.5, kernel


def likelihood(name, tags, vouching):
    """log p(y|z,x) as a function of the labels; with its closed form a hard or is flipped with probability 0.1."""
    if name == "evidence":
        return lambda z: evidence(z, tags, vouching)
    if name == "frozen_classifier":
        return lambda z: frozen_classifier(z, tags, 4 * vouching[:, 1:] - 2, bias=0.5)
    if name == "max_pool":
        return lambda z: max_pool(z, tags, flip_probability=0.1)
    return lambda z: TAG_LIKELIHOODS[name](z, tags)


def relaxed_case(seed, num_pixels=12, num_classes=4):
    """Relaxed labels, tags, class maps, and evidence of one image."""
    rng = np.random.default_rng(seed)
    labels = reference.softmax(2 * rng.normal(size=(num_pixels, num_classes)))
    tags = np.array([True, *(rng.uniform(size=num_classes - 1) < 0.5)])
    maps = 3 * rng.normal(size=(num_pixels, num_classes - 1))
    vouching = reference.softmax(rng.normal(size=(num_pixels, num_classes)))
    return labels, tags, maps, vouching
