"""Random weights of VGG16 in their published names and layouts."""

import numpy as np

VGG_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
HEAD = {"pre_logits.fc1.weight": (4, 512, 7, 7), "pre_logits.fc1.bias": (4,), "head.fc.weight": (10, 4), "head.fc.bias": (10,)}


def vgg16_state(seed=0):
    """Random weights as timm names those of VGG16, with layers that are not used here."""
    rng, state = np.random.default_rng(seed), {}
    for place, before, after in zip(VGG_PLACES, VGG_CHANNELS, VGG_CHANNELS[1:]):
        state[f"features.{place}.weight"] = rng.normal(size=(after, before, 3, 3)) * np.sqrt(2 / (9 * before))
        state[f"features.{place}.bias"] = rng.normal(size=after) / 10
    state |= {name: rng.normal(size=shape) for name, shape in HEAD.items()}
    return {name: np.float32(array) for name, array in state.items()}
