"""What a method makes of its network's output at test time."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.baselines import cam_log_probs, ilp_log_probs
from lcrf_jax.nets.tag_classifier import TagClassifier

EXCLUDED = -1e4


def _mirror_mean(maps, mirrored):
    """The mean of the first half of the maps and the second half mirrored back; if none is mirrored, all maps."""
    if not mirrored:
        return maps
    plain, other = jnp.split(maps, 2)
    return (plain + other[:, :, ::-1]) / 2


def _network_output(network, params, features, mirrored, log_probs_of_logits, prior_weight=0.0, class_offsets=()):
    """The network's log-probabilities, averaged over mirroring, with the offsets of the classes, times the prior of the image."""
    log_probs = log_probs_of_logits(network.logits(params["decoder"], params["backbone"], features))
    if mirrored:
        log_probs = jax.nn.log_softmax(_mirror_mean(log_probs, mirrored), axis=-1)
    if class_offsets:
        log_probs = jax.nn.log_softmax(log_probs + jnp.asarray(class_offsets, log_probs.dtype), axis=-1)
    if not prior_weight:
        return log_probs
    prior = prior_weight * _log_prior(network, params, features, mirrored)
    return jax.nn.log_softmax(log_probs + prior[:, None, None], axis=-1)


def _log_prior(network, params, features, mirrored):
    """[B, K] log p_k - max_k log p_k of the tag classifier, 0 for the background.

    So nothing is said of how likely an object is at all, only of which class it has.
    """
    classifier = restored_classifier(params)
    pooled = network.head(params["backbone"], features).mean(axis=(1, 2))
    log_probs = jax.nn.log_sigmoid(pooled @ classifier.weights + classifier.bias)
    relative = jnp.pad(log_probs - log_probs.max(axis=-1, keepdims=True), ((0, 0), (1, 0)))
    return sum(jnp.split(relative, 2)) / 2 if mirrored else relative  # as the mean of the two images' results


def _softmax(network, params, features, mirrored, options):
    return _network_output(network, params, features, mirrored, lambda logits: jax.nn.log_softmax(logits, axis=-1), **options)


def _ilp(network, params, features, mirrored, options):
    options = dict(options)
    beside = {name: options.pop(name) for name in ("prior_weight", "class_offsets") if name in options}

    def one(logits):
        return ilp_log_probs(logits.reshape(-1, logits.shape[-1]), **options).reshape(logits.shape)

    return _network_output(network, params, features, mirrored, jax.vmap(one), **beside)


def _class_maps(network, params, features, mirrored, options):
    """The class maps of the tag classifier in place of the network's logits, averaged over mirroring."""
    classifier = restored_classifier(params)

    def one(maps):
        cells = maps.reshape(-1, maps.shape[-1])
        # The classifier is linear: its logit is the mean of its map, plus the bias.
        log_probs = cam_log_probs(cells, cells.mean(axis=0) + classifier.bias, **options)
        return log_probs.reshape(*maps.shape[:2], -1)

    maps = network.head(params["backbone"], features) @ classifier.weights
    return jax.vmap(one)(_mirror_mean(maps, mirrored))


# What is made of the features at test time: (network, params, features, whether mirrored, options) -> log-probabilities.
OUTPUTS = {"softmax": _softmax, "ilp": _ilp, "class_maps": _class_maps}


def superpixels(image: np.ndarray, *, scale: float = 100.0, sigma: float = 0.8, min_size: int = 50) -> np.ndarray:
    """Superpixels of an image by the graph-based method of Felzenszwalb and Huttenlocher.

    Args:
      image: [H, W, 3] uint8 RGB.
      scale: larger makes larger superpixels.
      sigma: width in pixels of the Gaussian that the image is smoothed with.
      min_size: least size in pixels.

    Returns:
      [H, W] integers from 0 on.

    Raises:
      ValueError: if scikit-image is not installed.

    References:
      Felzenszwalb and Huttenlocher 2004, as scikit-image has it.
    """
    try:
        from skimage.segmentation import felzenszwalb
    except ImportError as error:
        raise ValueError(
            f"superpixels need scikit-image, which is not installed ({error}); pip install '.[superpixels]' in your clone"
        ) from error
    return felzenszwalb(image, scale=scale, sigma=sigma, min_size=min_size)


def restored_classifier(params: Mapping[str, Any]) -> TagClassifier:
    """The tag classifier of a run's parameters.

    Args:
      params: dict with "classifier": "weights" and "bias".

    Returns:
      TagClassifier.
    """
    return TagClassifier(params["classifier"]["weights"], params["classifier"]["bias"])
