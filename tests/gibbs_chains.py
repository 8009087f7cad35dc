"""Chains of the Gibbs sampler on five pixels and three classes, and their posterior by enumeration."""

import functools

import jax
import numpy as np
import pytest
import reference

from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.likelihoods import area, max_pool

NUM_PIXELS, NUM_CLASSES = 5, 3
# Where one sweep is enough, and where it takes many.
MANY_CHAINS, SOME_CHAINS = 40_000, 6_000
TAGS = np.array([True, True, False])
LIKELIHOODS = {
    "none": None,
    "area": lambda z: area(z, TAGS, beta=4.0),
    "max_pool": lambda z: max_pool(z, TAGS, flip_probability=0.1),
}
EVERY = reference.labellings(NUM_PIXELS, NUM_CLASSES)
ONE_HOT = np.eye(NUM_CLASSES)[EVERY]
with_and_without = pytest.mark.parametrize("name", ["none", "area"])


def random_case(seed, num_pixels, num_classes):
    """A kernel and a unary, float32; the kernel's diagonal is zero."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 0.8, (num_pixels, num_pixels))
    unary = 0.6 * rng.normal(size=(num_pixels, num_classes))
    return np.float32((kernel + kernel.T) / 2 * (1 - np.eye(num_pixels))), np.float32(unary)


KERNEL, UNARY = random_case(0, NUM_PIXELS, NUM_CLASSES)


@functools.partial(jax.jit, static_argnames=("name", "num_sweeps", "num_blocks"))
def chains(keys, labels, kernel, unary, name="none", num_sweeps=1, num_blocks=2):
    """A chain for each key and each row of labels."""
    return jax.vmap(
        lambda key, start: gibbs(key, start, kernel, unary, log_likelihood=LIKELIHOODS[name],
                                 num_sweeps=num_sweeps, num_blocks=num_blocks)
    )(keys, labels)


def keys_of(seed, number=MANY_CHAINS):
    return jax.random.split(jax.random.key(seed), number)


@functools.cache
def log_likelihoods(name):
    """l of every labelling, by the loops of the reference."""
    options = {"area": {"beta": 4.0}, "max_pool": {}, "none": {}}[name]
    if name == "max_pool":
        # pi is 0.1 or 0.9, which is beyond what the bounds of the reference are for.
        right = np.where(TAGS, ONE_HOT.max(axis=1), 1 - ONE_HOT.max(axis=1))
        return np.log(0.1 + 0.8 * right).sum(axis=1)
    if name == "none":
        return np.zeros(len(EVERY))
    return np.array([reference.tag_log_likelihood(name, z, TAGS, **options) for z in ONE_HOT])


def posterior(name="none", kernel=KERNEL, unary=UNARY):
    """[K^m] the probability of every labelling."""
    scores = np.float64(unary)[np.arange(NUM_PIXELS), EVERY].sum(axis=1) + log_likelihoods(name)
    return reference.softmax(scores - reference.labelling_energies(kernel, NUM_CLASSES))


def exact_samples(seed, probs, number=MANY_CHAINS):
    return EVERY[np.random.default_rng(seed).choice(len(EVERY), number, p=probs)]
