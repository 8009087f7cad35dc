"""Labels of the training images given their tags: of class maps alone, or of a trained network, for the round after."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.bound.pixel_evidence import class_evidence, log_evidence
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.inference import mean_field
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.machine.progress import image_progress
from lcrf_jax.nets.inputs import guide_image, network_inputs
from lcrf_jax.nets.trained import merged
from lcrf_jax.numerics import promote_float
from lcrf_jax.train.preparation import Prepared
from lcrf_jax.train.spread import over_devices, padded_rows, reading_threads

BATCH_SIZE = 32  # on each device


def posterior_evidence(prepared: Prepared, params: Any, settings: Mapping[str, Any]) -> np.ndarray:
    """All of `parts_of_posterior_evidence`, in memory.

    Args:
      prepared, params, settings: see there.

    Returns:
      [N, g, g, K] float16, >= 0, summing to one over the classes.
    """
    return np.concatenate(list(parts_of_posterior_evidence(prepared, params, settings)))


def parts_of_posterior_evidence(
    prepared: Prepared, params: Any, settings: Mapping[str, Any], first: int = 0, linear: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Mean-field posteriors of the training images under a trained network, given their tags.

    The network's log-probabilities of the whole image and of its mirror image are averaged, and those of rare classes raised
    (`lcrf_jax.train.plan.class_offsets`); the logarithm of the class maps' evidence and the linear network's log-probabilities
    are added with their weights, classes that are not tagged are excluded, and mean field runs on the grid of the logits.

    Args:
      prepared: Prepared; with cached features of at least the views 0 and 1, or with images.
      params: decoder parameters.
      settings: dict with "kernel" (fields of `KernelParams`, in pixels of the input), "num_iterations",
        "unary_weight", "tempering" (the log-posterior is multiplied by it) and, if they are not 0, "evidence_weight" and
        "linear_weight".
      first: image to begin with.
      linear: [N, g, g, K] log-probabilities of a linear network, see `lcrf_jax.train.linear_round.log_probs_of`; not looked at
        where it has no weight.

    Returns:
      Iterator over arrays [n, g, g, K] float16, >= 0, summing to one over the classes.
    """
    network, tags = prepared.network, prepared.train.tags
    # The parameters are of all devices and processes; the rest is done by those of this one.
    params = jax.tree.map(np.asarray, params)
    variables = merged(prepared.variables, params)
    posterior, _ = over_devices(
        _posteriors, (params, variables), len(tags), BATCH_SIZE, network=network, unary_weight=settings["unary_weight"],
        offsets=tuple(prepared.plan.inference.get("class_offsets", ())), **_static_settings(prepared, settings),
    )  # fmt: skip
    inputs, num_rows = _inputs_of_parts(prepared, variables)

    def found(part):
        return posterior(*inputs(part), *_whole((tags[part], _beside(prepared, settings, linear, part)), num_rows))

    return _in_parts(found, len(tags), num_rows, "posteriors", first)


def features_of_parts(prepared: Prepared) -> tuple[Callable[[slice], tuple[dict[str, Any], dict[str, Any]]], int]:
    """The frozen features of the whole training images and of their mirror images, part by part.

    Args:
      prepared: Prepared.

    Returns:
      (function from a slice of the images to two dicts from tap to [n, h, w, C], images of a slice). Where features are not
      kept they are computed; on several devices the last slice has rows more than it has images.
    """
    inputs, num_rows = _inputs_of_parts(prepared, prepared.variables)
    return lambda part: inputs(part)[:2], num_rows


def _inputs_of_parts(prepared, variables):
    """(function of a slice of the images to (features, those of the mirror images, guide), images of a slice)."""
    network, views, stride = prepared.network, prepared.views, prepared.plan.guide_stride
    of_images, num_rows = over_devices(
        _inputs_of_images, (variables,), len(prepared.train), BATCH_SIZE, network=network, guide_stride=stride
    )

    def inputs(part):
        if prepared.config["cache"]["features"]:
            taps = [{tap: views.tap(tap, view)[part] for tap in network.taps} for view in (0, 1)]
            return _whole((*taps, views.guide()[part]), num_rows)
        with reading_threads() as pool:
            records = list(pool.map(views.__getitem__, range(part.start, min(part.stop, len(prepared.train)))))  # view 0 comes first
        return of_images(_whole(np.stack([record.image for record in records]), num_rows))

    return inputs, num_rows


def _whole(arrays, num_rows):
    """So that the devices have equal parts; a single one takes what there is."""
    return arrays if num_rows == BATCH_SIZE else padded_rows(arrays, num_rows)


def posterior_of_maps(prepared: Prepared) -> np.ndarray:
    """All of `parts_of_posterior_of_maps`, in memory.

    Args:
      prepared: see there.

    Returns:
      [N, g, g, K] float16, >= 0, summing to one over the classes.
    """
    return np.concatenate(list(parts_of_posterior_of_maps(prepared)))


def parts_of_posterior_of_maps(prepared: Prepared, first: int = 0) -> Iterator[np.ndarray]:
    """Mean-field posteriors p(z | x, y) of the training images by class maps and the CRF, before there is a network.

    The settings are those of `posterior_evidence`, with the logarithm of `class_evidence` alone, by "maps_weight".

    Args:
      prepared: Prepared, with class maps.
      first: image to begin with.

    Returns:
      Iterator over arrays [n, g, g, K] float16, >= 0, summing to one over the classes.
    """
    return parts_without_network(prepared, settings_of_maps(prepared.config), None, first)


def parts_without_network(
    prepared: Prepared, settings: Mapping[str, Any], linear: np.ndarray | None, first: int = 0
) -> Iterator[np.ndarray]:
    """Mean-field posteriors of the training images by class maps, a linear network's word, or both, and the CRF.

    Args:
      prepared: Prepared, with class maps.
      settings: as for `parts_of_posterior_evidence`; "unary_weight" is not looked at.
      linear: see there.
      first: image to begin with.

    Returns:
      Iterator over arrays [n, g, g, K] float16, >= 0, summing to one over the classes.
    """
    tags, title = prepared.train.tags, "posteriors" if settings.get("linear_weight") else "posteriors of class maps"
    posterior, num_rows = over_devices(
        _posteriors_without_network, (), len(tags), BATCH_SIZE, **_static_settings(prepared, settings)
    )

    def found(part):
        return posterior(*_whole((_guides(prepared, part), tags[part], _beside(prepared, settings, linear, part)), num_rows))

    return _in_parts(found, len(tags), num_rows, title, first)


def settings_of_maps(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the posteriors of class maps alone.

    Args:
      config: the configuration of a run.

    Returns:
      dict, as `parts_without_network` takes it.
    """
    posterior = config["posterior"]
    return {**posterior, "evidence_weight": posterior.get("maps_weight", 1.0), "linear_weight": 0.0}


def posteriors_of_images(
    config: Mapping[str, Any], settings: Mapping[str, Any], stride: int, images: np.ndarray, tags: ArrayLike,
    evidence: Mapping[str, ArrayLike], linear: ArrayLike | None = None,
) -> jax.Array:  # fmt: skip
    """What `parts_without_network` makes of any images, for scoring it where there are masks.

    Args:
      config: the configuration of a run.
      settings: see there.
      stride: pixels of the input per cell of the logits.
      images: [B, S, S, 3] RGB 0..255, as the network sees them.
      tags: [B, K] bool.
      evidence: "class_maps" [B, g, g, K - 1], "peaks" [B, K - 1] and, where the configuration gives them a weight,
        "objectness" and "saliency" [B, g, g]; what it gives none is not looked at.
      linear: [B, g, g, K] log-probabilities of a linear network; not looked at where it has no weight.

    Returns:
      [B, g, g, K] float32.
    """
    options = _evidence_options(config)
    beside = _of_weight(settings, evidence=lambda: {name: evidence[name] for name in _evidence_names(options)}, linear=lambda: linear)
    return _posteriors_without_network(
        guide_image(images, stride), tags, beside, options=options, **_weights(settings),
        **_mean_field_settings(settings, stride, stride),
    )  # fmt: skip


def _in_parts(found, count, num_rows, title, first):
    """Arrays [n, ...] float16 of a function of a slice of the images, one after the other."""
    with image_progress(title, count) as done:
        if first:
            done(first, earlier=True)
        for start in range(first, count, num_rows):
            stop = min(start + num_rows, count)
            yield np.asarray(found(slice(start, stop)), np.float16)[: stop - start]
            done(stop - start)


def _static_settings(prepared, settings):
    """What programs of the training images are compiled for."""
    return {
        "options": _evidence_options(prepared.config),
        **_weights(settings),
        **_mean_field_settings(settings, prepared.network.stride, prepared.plan.guide_stride),
    }


def _weights(settings):
    """Of what is added to the network's log-probabilities; runs of before may not name them all."""
    return {name: settings.get(name, 0.0) for name in ("evidence_weight", "linear_weight")}


def _mean_field_settings(settings, stride, guide_stride):
    """The settings of mean field on the grid of the logits."""
    return {
        "guide_ratio": stride // guide_stride,
        "kernel_params": KernelParams(**settings["kernel"]).at_stride(stride),
        **{name: settings[name] for name in ("num_iterations", "tempering")},
    }


def _beside(prepared, settings, linear, part):
    """What is added to the network's log-probabilities of some of the images, of what has a weight."""
    return _of_weight(settings, evidence=lambda: _evidence_arrays(prepared, part), linear=lambda: linear[part])


def _of_weight(settings, **made):
    """What is made by functions, of what has a weight."""
    weights = _weights(settings)
    return {name: array() for name, array in made.items() if weights[f"{name}_weight"]}


def _evidence_options(config):
    """The keyword arguments of `class_evidence`, as a program is compiled for them."""
    return tuple(sorted(config["objective"]["likelihood_options"]["evidence"].items()))


def _evidence_names(options):
    """The arrays that `class_evidence` is given with these options: what has no weight is not made."""
    weights = dict(options)
    return ("class_maps", "peaks", *(name for name in ("objectness", "saliency") if weights.get(f"{name}_weight")))


def _evidence_arrays(prepared, part):
    """What `class_evidence` takes of some of the images: maps, peaks and what stands beside them."""
    maps = prepared.maps
    made = {
        "class_maps": lambda: maps.maps[part],
        "peaks": lambda: maps.peaks[part],
        "objectness": lambda: maps.objectness[part],
        "saliency": lambda: prepared.gradient_saliency[part][..., 0],
    }
    return {name: made[name]() for name in _evidence_names(_evidence_options(prepared.config))}


def _guides(prepared, part):
    """The guides of the whole images of a part."""
    views = prepared.views
    if prepared.config["cache"]["features"]:
        return views.guide()[part]
    with reading_threads() as pool:
        records = list(pool.map(views.__getitem__, range(part.start, part.stop)))
    return np.asarray(guide_image(np.stack([record.image for record in records]), prepared.plan.guide_stride))


_STATIC = ("guide_ratio", "kernel_params", "num_iterations", "tempering", "options", "evidence_weight", "linear_weight")


@functools.partial(jax.jit, static_argnames=("network", "unary_weight", "offsets", *_STATIC))
def _posteriors(params, variables, plain, mirrored, guide, present, beside, *, network, unary_weight, offsets, guide_ratio, **static):
    """[B, g, g, K] posteriors of the features of images and of their mirror images, given their tags [B, K]."""
    both = [network.logits(params, variables, features) for features in (plain, mirrored)]
    own = mean_log_probs(*both)
    own = unary_weight * (own + jnp.asarray(offsets, own.dtype) if offsets else own)
    return jax.lax.map(lambda row: _posterior(*row, **static), (own, guide_image(guide, guide_ratio), present, beside))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _posteriors_without_network(guide, present, beside, *, guide_ratio, **static):
    """[B, g, g, K] posteriors of what is there before there is a network, given the tags [B, K]."""
    guide = guide_image(guide, guide_ratio)
    none = jnp.zeros((*guide.shape[:3], present.shape[-1]))
    return jax.lax.map(lambda row: _posterior(*row, **static), (none, guide, present, beside))


def mean_log_probs(plain: ArrayLike, mirrored: ArrayLike) -> jax.Array:
    """Log-probabilities of images from the logits of these and of their mirror images.

    Args:
      plain: [B, g, g, K] logits.
      mirrored: [B, g, g, K] those of the mirror images, not mirrored back.

    Returns:
      [B, g, g, K] mean of the two log-probabilities; their exponentials do not sum to one exactly.
    """
    return (jax.nn.log_softmax(plain) + jax.nn.log_softmax(mirrored)[:, :, ::-1]) / 2


def _posterior(own, guide, present, beside, *, options, evidence_weight, linear_weight, tempering, **mean_field_settings):
    """[g, g, K] of an image: mean field on the weighted sum of the log-probabilities."""
    unary = own.reshape(-1, own.shape[-1])
    if evidence_weight:
        unary += evidence_weight * _log_evidence(beside["evidence"], present, options, guide.shape[:2])
    if linear_weight:
        unary += linear_weight * promote_float(beside["linear"]).reshape(unary.shape)
    return jax.nn.softmax(tempering * _mean_field(unary, guide, present, **mean_field_settings)).reshape(own.shape)


def _log_evidence(evidence, present, options, grid):
    """[m, K] of the class maps of an image at the cells of a grid, given its tags."""

    def cells(values):  # sampled as the views of records sample them
        values = values.reshape(*values.shape[:2], -1).astype(jnp.float32)
        if values.shape[:2] != tuple(grid):
            values = jax.image.resize(values, (*grid, values.shape[-1]), "linear", antialias=False)
        return values.reshape(-1, values.shape[-1])

    beside = {name: cells(values)[:, 0] for name, values in evidence.items() if name not in ("class_maps", "peaks")}
    return log_evidence(class_evidence(cells(evidence["class_maps"]), evidence["peaks"], present, **beside, **dict(options)))


def _mean_field(unary, guide, present, *, kernel_params, num_iterations):
    """[m, K] log-posteriors of the classes that are there."""
    return mean_field(jnp.where(present, unary, -1e4), dense_kernel(guide, kernel_params), num_iterations=num_iterations)


@functools.partial(jax.jit, static_argnames=("network", "guide_stride"))
def _inputs_of_images(variables, images, *, network, guide_stride):
    """(features of images, features of their mirror images, guide)."""
    plain, guide = network_inputs(network, variables, images, guide_stride)
    return plain, network.features(variables, images[:, :, ::-1]), guide
