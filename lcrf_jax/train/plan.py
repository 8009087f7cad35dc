"""What a configuration means, before anything is computed."""

import math
from typing import NamedTuple

import numpy as np

from lcrf_jax.nets.network import preprocessing
from lcrf_jax.runfolder.description import library_versions
from lcrf_jax.train.methods import method_of


class Round(NamedTuple):
    """One round of training: steps first_step to last_step of the run, with a fresh optimiser.

    Attributes:
      number: 0 for the class maps of the tag classifier, 1 and up for the posteriors of the round before.
      first_step, last_step: steps done before and after it.
      steps_per_epoch: whole batches in an epoch.
      epochs: length.
      passes: over the images in an epoch; more than one if there are few.
    """

    number: int
    first_step: int
    last_step: int
    steps_per_epoch: int
    epochs: int
    passes: int = 1


def planned_rounds(config, num_images):
    """The rounds of a configuration, with their steps.

    Args:
      config: dict with "epochs", "method", which makes rounds of them (see `lcrf_jax.train.methods`), "batch_size" and, if it is
        not 0, "least_steps" of a round: where the images do not make so many, an epoch is several passes over them.
      num_images: images in the training split.

    Returns:
      List of Round; empty for a method that trains nothing.

    Raises:
      ValueError: if the images do not fill one batch, or a round has no epochs.
    """
    steps_per_pass = num_images // config["batch_size"]
    if not steps_per_pass:
        size = config["batch_size"]
        raise ValueError(f"batch_size: {num_images} training images do not fill one batch of {size}; lower it")
    method = method_of(config)
    if method.objective is None:
        return []
    epochs = method.round_epochs(config)
    if not epochs or min(epochs) < 1:
        raise ValueError(
            f"epochs: expected one or more rounds of at least one epoch, got {config['epochs']}, which makes rounds of "
            f"{epochs} for {config['method']}"
        )
    rounds, step = [], 0
    for number, length in enumerate(epochs):
        passes = max(1, math.ceil(config.get("least_steps", 0) / (length * steps_per_pass)))
        end = step + length * passes * steps_per_pass
        rounds.append(Round(number, step, end, passes * steps_per_pass, length, passes))
        step = end
    return rounds


def images_of_round(method, this, tags):
    """The images that take part in a round.

    Args:
      method: lcrf_jax.train.methods.Method.
      this: Round.
      tags: [N, K] bool.

    Returns:
      [M] indices in order, or None for all.

    Raises:
      ValueError: if no image takes part.
    """
    if this.number >= method.simple_rounds:
        return None
    simple = np.flatnonzero(np.asarray(tags)[:, 1:].sum(axis=1) == 1)
    if not len(simple):
        raise ValueError(
            f"method: {method.title} begins with images of a single tag, and none of the {len(tags)} training images is "
            "one; add some, or choose another method"
        )
    return simple


def guide_stride(config, network):
    """Pixels of the input per cell of the image that the pairwise term sees.

    Args:
      config: the configuration of the run.
      network: lcrf_jax.nets.network.Network.

    Returns:
      int: objective.pairwise_stride, or the stride of the logits where that is 0.

    Raises:
      ValueError: if it does not divide the stride of the logits.
    """
    stride = config["objective"]["pairwise_stride"] or network.stride
    if stride < 1 or network.stride % stride:
        raise ValueError(
            f"objective.pairwise_stride: expected a divisor of {network.stride}, the stride of the logits, or 0, got "
            f"{stride}; 1 is full resolution"
        )
    return stride


def segmenter_description(config, class_names, digest):
    """What inference has to know beside the parameters; it is stored as config.json.

    Args:
      config: the configuration of the run.
      class_names: names of the K classes, background first.
      digest: sha256 of the backbone's weights.

    Returns:
      dict that JSON can hold.
    """
    method = method_of(config)
    return {
        "class_names": list(class_names),
        "network": {**config["network"], "num_classes": len(class_names)},
        "preprocessing": preprocessing(config["network"]),
        "inference": {**config["inference"], **output_settings(config, method)},
        "backbone_sha256": digest,
        "supervision": method.supervision,
        "training": config,
        "versions": library_versions(),
    }


def output_settings(config, method):
    """What a method makes of its network's output at test time, and the settings of that; nothing for a softmax."""
    if method.output == "softmax":
        return {}
    settings = {"output": method.output, "output_options": dict(config["baselines"][config["method"]])}
    if method.objective is None:
        # Class maps are averaged over input sizes, as they are in training.
        sizes = (*config["inference"]["input_sizes"], *config["class_maps"]["extra_sizes"])
        return {**settings, "input_sizes": list(sizes)}
    return settings
