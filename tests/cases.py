"""Random images of a few pixels, small enough to enumerate their labellings."""

import numpy as np


def random_case(seed, num_pixels=6, num_classes=3):
    """Logits, a positive kernel, tags and evidence of one image."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 1, (num_pixels, num_pixels))
    tags = np.array([True, *(rng.uniform(size=num_classes - 1) < 0.5)])
    vouching = rng.dirichlet(np.ones(num_classes), num_pixels) + 0.01
    return 1.5 * rng.normal(size=(num_pixels, num_classes)), (kernel + kernel.T) / 2, tags, vouching
