"""Labels of the training images under a trained network: the evidence of the next round."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.machine.progress import image_progress
from lcrf_jax.nets.inputs import guide_image, network_inputs
from lcrf_jax.train.preparation import Prepared
from lcrf_jax.train.spread import over_devices, padded_rows, reading_threads

BATCH_SIZE = 32  # on each device


def posterior_evidence(prepared: Prepared, params: Any, settings: Mapping[str, Any]) -> np.ndarray:
    """Mean-field posteriors of the training images under a trained network, given their tags.

    The network's log-probabilities of the whole image and of its mirror image are averaged, classes that are not tagged
    are excluded, and mean field runs on the grid of the logits.

    Args:
      prepared: Prepared; with cached features of at least the views 0 and 1, or with images.
      params: decoder parameters.
      settings: dict with "kernel" (fields of `KernelParams`, in pixels of the input), "num_iterations",
        "unary_weight" and "tempering": the log-posterior is multiplied by it.

    Returns:
      [N, g, g, K] float16, positive, summing to one over the classes.
    """
    network, views, tags = prepared.network, prepared.views, prepared.train.tags
    stride, variables = prepared.plan.guide_stride, prepared.variables
    # The parameters are of all devices and processes; the rest is done by those of this one.
    params = jax.tree.map(np.asarray, params)
    posterior, num_rows = over_devices(
        _posteriors, (params, variables), len(tags), BATCH_SIZE, network=network, guide_ratio=network.stride // stride,
        kernel_params=KernelParams(**settings["kernel"]).at_stride(network.stride),
        **{name: settings[name] for name in ("unary_weight", "num_iterations", "tempering")},
    )
    of_images, _ = over_devices(
        _inputs_of_images, (variables,), len(tags), BATCH_SIZE, network=network, guide_stride=stride
    )

    def whole(arrays):  # so that the devices have equal parts; a single one takes what there is
        return arrays if num_rows == BATCH_SIZE else padded_rows(arrays, num_rows)

    def inputs(part):
        if prepared.config["cache"]["features"]:
            taps = [{tap: views.tap(tap, view)[part] for tap in network.taps} for view in (0, 1)]
            return whole((*taps, views.guide()[part]))
        with reading_threads() as pool:
            records = list(pool.map(views.__getitem__, range(part.start, min(part.stop, len(tags)))))  # view 0 comes first
        return of_images(whole(np.stack([record.image for record in records])))

    rows = []
    with image_progress("posteriors", len(tags)) as done:
        for start in range(0, len(tags), num_rows):
            part = slice(start, start + num_rows)
            found = np.asarray(posterior(*inputs(part), whole(tags[part])), np.float16)
            rows.append(found[: len(tags[part])])
            done(len(rows[-1]))
    return np.concatenate(rows)


@functools.partial(
    jax.jit, static_argnames=("network", "guide_ratio", "kernel_params", "unary_weight", "num_iterations", "tempering")
)
def _posteriors(
    params, variables, plain, mirrored, guide, present, *, network, guide_ratio, kernel_params, unary_weight,
    num_iterations, tempering,
):
    """[B, g, g, K] posteriors of the features of images and of their mirror images, given their tags [B, K]."""

    def one(plain, mirrored, guide, present):
        log_probs = (jax.nn.log_softmax(plain) + jax.nn.log_softmax(mirrored)[:, ::-1]) / 2
        unary = jnp.where(present, unary_weight * log_probs, -1e4).reshape(-1, log_probs.shape[-1])
        posterior = mean_field(unary, dense_kernel(guide, kernel_params), num_iterations=num_iterations)
        return jax.nn.softmax(tempering * posterior).reshape(log_probs.shape)

    both = [network.logits(params, variables, features) for features in (plain, mirrored)]
    return jax.lax.map(lambda row: one(*row), (*both, guide_image(guide, guide_ratio), present))


@functools.partial(jax.jit, static_argnames=("network", "guide_stride"))
def _inputs_of_images(variables, images, *, network, guide_stride):
    """(features of images, features of their mirror images, guide)."""
    plain, guide = network_inputs(network, variables, images, guide_stride)
    return plain, network.features(variables, images[:, :, ::-1]), guide
