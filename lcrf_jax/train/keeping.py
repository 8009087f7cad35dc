"""Which frozen features are kept on the disk: all, those of the tag classifier alone, or none, by the room that they would take."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lcrf_jax.machine.entries import size_text
from lcrf_jax.nets.inputs import chosen_inputs
from lcrf_jax.train.plan import Plan

DEFAULT_GB = 20.0
CLASSIFIER_TAP = "s32"
_WORTH_A_MEASUREMENT = 1e9  # bytes; of fewer nobody asks how long they take
_BATCH_SIZE = 16


class Choice(NamedTuple):
    """What is kept on the disk.

    Attributes:
      features: whether all features of all views are; otherwise the backbone runs in every step.
      classifier_tap: whether the tap that the tag classifier reads is, of one view; it is where all features are.
      line: the choice with its reason, for people.
    """

    features: bool
    classifier_tap: bool
    line: str


def chosen_to_keep(plan: Plan, num_images: int, variables: Mapping[str, Any]) -> Choice:
    """Choose by config.cache: features that would take more than "features_gb" are not kept.

    The choice depends on the settings and the number of images alone, so that a run that goes on makes the same one.

    Args:
      plan: of the run.
      num_images: in the training split.
      variables: of the backbone.

    Returns:
      Choice.
    """
    cache, num_views = plan.config["cache"], plan.config["views"]["num_views"]
    bound, each = float(cache.get("features_gb", DEFAULT_GB)) * 1e9, view_bytes(plan, variables)
    total, tap = num_images * num_views * sum(each.values()), num_images * each[CLASSIFIER_TAP]
    features = bool(cache["features"]) and total <= bound
    of_all = f"features of {num_images:,} images in {num_views} views: {size_text(total)}"
    if total > _WORTH_A_MEASUREMENT:
        seconds = seconds_an_image(plan, variables)
        of_all += f" and {clock(num_images * num_views * seconds)} of this process"
    if features:
        return Choice(True, True, f"{of_all}; kept on the disk, for they are within config.cache.features_gb={bound / 1e9:g}")
    why = f"more than config.cache.features_gb={bound / 1e9:g}" if cache["features"] else "config.cache.features=False"
    line = f"{of_all}; not kept ({why}): the backbone runs in every step"
    if total > _WORTH_A_MEASUREMENT:
        line += f", {plan.config['batch_size'] * seconds:.2g} s more each on one device like this"
    if tap > bound:
        line += f"; nor are those of the tag classifier ({size_text(tap)}): it and the class maps read every image once more"
    return Choice(False, tap <= bound, line)


def view_bytes(plan: Plan, variables: Mapping[str, Any]) -> dict[str, int]:
    """Bytes on the disk of the features of one view, nothing is computed.

    Args:
      plan: of the run.
      variables: of the backbone.

    Returns:
      dict from tap, and "guide", to the number of bytes.
    """
    size, network = plan.config["input_size"], plan.network
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
    shapes = jax.eval_shape(network.features, variables, image)
    side = -(-size // plan.guide_stride)
    return {tap: 2 * math.prod(shape.shape) for tap, shape in shapes.items()} | {"guide": 3 * side * side}


def seconds_an_image(plan: Plan, variables: Mapping[str, Any]) -> float:
    """How long the backbone takes for an image on one device, measured on a batch.

    Args:
      plan: of the run.
      variables: of the backbone.

    Returns:
      Seconds.
    """
    size = plan.config["input_size"]
    images, taken = np.zeros((_BATCH_SIZE, size, size, 3), np.uint8), []
    for _ in range(3):  # the first compiles
        start = time.perf_counter()
        found = chosen_inputs(variables, images, network=plan.network, guide_stride=plan.guide_stride, taps=plan.network.taps)
        jax.block_until_ready(found)
        taken.append(time.perf_counter() - start)
    return min(taken[1:]) / _BATCH_SIZE


def clock(seconds: float) -> str:
    """A length of time for people, such as "2.5 h"."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
