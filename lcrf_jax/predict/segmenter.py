"""Images in, masks out: a trained run as a segmenter of images of any size."""

import collections
import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lcrf_jax.crf.params import KernelParams
from lcrf_jax.machine.processes import usable_cores
from lcrf_jax.nets.inputs import square_image
from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.trained import merged
from lcrf_jax.predict.checks import needed_parameters, told_as_parameters
from lcrf_jax.predict.outputs import EXCLUDED, OUTPUTS
from lcrf_jax.predict.refinement import MAX_VERTICES_PER_PIXEL, refined_by_lattice
from lcrf_jax.predict.resizing import (
    enlarged_grid,
    interpolation_weights,
    labels_of,
    padded_image,
    padded_to,
    working_image,
    working_size,
)

MAX_SIDE = 640
_MOST_WORKERS = 8  # each holds the arrays of an image: about 150 MB at 500x375 with 21 classes
_LARGE = MAX_SIDE**2  # pixels; more than these, where a user has raised `max_side`, are worked on one image at a time
_ONE_LARGE_IMAGE = threading.Lock()


class Segmenter(NamedTuple):
    """A trained inference network. `make_segmenter` makes one, `segment` uses it.

    Attributes:
      class_names: names of the K classes, background first.
      input_sizes: sides of the square network inputs, whose log-probabilities are averaged.
      network_features: function from images [B, S, S, 3] RGB 0..255 to the taps of the frozen backbone: a dict of
        arrays, the rows of the images first, then those of their mirror images where these are used.
      log_probs_of: function from these to log q(z | x) on the network's grid, [B, h, w, K].
      enlarge: function (grid log-probabilities, row and column weights) -> log-probabilities of the pixels.
      refine: function (log-probabilities, image, valid, capacity=None) -> log-probabilities after mean field; all
        are NaN if the kernel's lattice needs more vertices than the capacity.
      max_side: an image with a longer side, in pixels, is made smaller to this one first, and its result is enlarged.
    """

    class_names: tuple[str, ...]
    input_sizes: tuple[int, ...]
    network_features: Callable[[ArrayLike], dict[str, jax.Array]]
    log_probs_of: Callable[[Mapping[str, Any]], jax.Array]
    enlarge: Callable[[ArrayLike, ArrayLike, ArrayLike], jax.Array]
    refine: Callable[..., jax.Array]
    max_side: int = MAX_SIDE

    def network_log_probs(self, images: ArrayLike) -> jax.Array:
        """Log q(z | x) on the network's grid, [B, h, w, K], of images [B, S, S, 3] RGB 0..255."""
        return self.log_probs_of(self.network_features(images))


class Segmentation(NamedTuple):
    """The result for one image of H x W pixels.

    h x w is the size that the image was segmented at: H x W, but smaller for large images, see `Segmenter.max_side`.

    Attributes:
      size: (H, W) in pixels.
      log_probs: [h, w, K] float32, log q(z | x) of the network.
      refined_log_probs: the same after mean field on the image, or None.
    """

    size: tuple[int, int]
    log_probs: np.ndarray
    refined_log_probs: np.ndarray | None

    @property
    def best_log_probs(self) -> np.ndarray:
        """[h, w, K] float32, after refinement where there was one."""
        return self.log_probs if self.refined_log_probs is None else self.refined_log_probs

    @property
    def labels(self) -> np.ndarray:
        """[H, W] uint8, the most probable class of every pixel, after refinement where there was one."""
        return labels_of(self.best_log_probs, self.size)

    @property
    def network_labels(self) -> np.ndarray:
        """[H, W] uint8, the most probable class of every pixel before refinement."""
        return labels_of(self.log_probs, self.size)


def make_segmenter(description: Mapping[str, Any], params: Mapping[str, Any]) -> Segmenter:
    """The segmenter of a description and its parameters.

    Args:
      description: dict with "network" (see `lcrf_jax.nets.network`), "class_names" and "inference": "input_sizes",
        "mirror" (average over the mirrored image), "kernel" (fields of `KernelParams`, in pixels of the image),
        "num_iterations" and "unary_weight". It may have "coarse_iterations" (so many of these are made on the image at half
        its resolution first, see `lcrf_jax.crf.inference.refine`; 0 if left out), "output", a key of `OUTPUTS`
        ("softmax" if left out), with "output_options", "prior_weight" (of the tag classifier's word on the whole image, 0 if
        left out), "class_offsets" (K numbers that are added to the network's log-probabilities, see
        `lcrf_jax.train.plan.class_offsets`; none if left out) and "max_side" (MAX_SIDE if left out).
      params: dict with "backbone" and what the output needs: "decoder" or "classifier" variables.

    Returns:
      Segmenter.

    Raises:
      ValueError: if the network's description is not complete.
      KeyError: if parameters are missing.
    """
    network, settings = build_network(description["network"]), description["inference"]
    output, options = settings.get("output", "softmax"), settings.get("output_options", {})
    if output != "class_maps":
        options = {**options, **{name: settings[name] for name in ("prior_weight", "class_offsets") if settings.get(name)}}
        if "class_offsets" in options:
            options["class_offsets"] = tuple(options["class_offsets"])
    used = {name: params[name] for name in sorted(needed_parameters(settings))}
    if "decoder" in used:  # with layers of the backbone, where these are trained
        used["backbone"] = merged(used["backbone"], used["decoder"])
    static = {"network": network, "mirrored": settings["mirror"]}
    placed = {None: jax.device_put(used)}

    def beside(batch):
        """The weights on the devices of a batch; each device has a copy."""
        sharding = _replicated_beside(batch)
        if sharding not in placed:
            placed[sharding] = jax.device_put(used, sharding)
        return placed[sharding]

    def network_features(images):
        with told_as_parameters(network, used):
            return _network_features(beside(images)["backbone"], images, **static)

    def log_probs_of(features):
        with told_as_parameters(network, used):
            return _log_probs(beside(features), features, output=output, options=tuple(sorted(options.items())), **static)

    refine = functools.partial(
        refined_by_lattice,
        kernel_params=KernelParams(**settings["kernel"]),
        num_iterations=settings["num_iterations"],
        unary_weight=settings["unary_weight"],
        coarse_iterations=settings.get("coarse_iterations", 0),
    )
    return Segmenter(
        tuple(description["class_names"]), tuple(settings["input_sizes"]), network_features, log_probs_of, enlarged_grid,
        refine, settings.get("max_side", MAX_SIDE),
    )


def _replicated_beside(batch):
    """The sharding of the weights for a batch: a copy on each of its devices, or None for one device."""
    sharding = getattr(next(iter(jax.tree.leaves(batch))), "sharding", None)
    spread = isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1
    return NamedSharding(sharding.mesh, P()) if spread else None


# These are compiled once for all segmenters of a process: what differs between runs of one network is an argument.


@functools.partial(jax.jit, static_argnames=("network", "mirrored"))
def _network_features(variables, images, *, network, mirrored):
    inputs = jnp.concatenate([images, images[:, :, ::-1]]) if mirrored else images
    return network.features(variables, inputs)


@functools.partial(jax.jit, static_argnames=("network", "mirrored", "output", "options"))
def _log_probs(params, features, *, network, mirrored, output, options):
    return OUTPUTS[output](network, params, features, mirrored, dict(options))


def segment(
    segmenter: Segmenter, image: np.ndarray, *, crf: bool, tags: np.ndarray | None = None
) -> Segmentation:
    """Segment one image. If a side is above `segmenter.max_side`, it is made smaller first and the result enlarged.

    Args:
      segmenter: a Segmenter.
      image: [H, W, 3] uint8 RGB.
      crf: whether to refine by mean field on the image.
      tags: [K] bool, the classes that may occur, or None for all.

    Returns:
      Segmentation.

    Raises:
      ValueError: if the image is not [H, W, 3] uint8, or the network's output is not a number.
    """
    [result] = segment_batch(segmenter, [image], crf=crf, tags=None if tags is None else [tags])
    return result


def segment_batch(
    segmenter: Segmenter,
    images: Sequence[np.ndarray],
    *,
    crf: bool,
    tags: Sequence[np.ndarray] | None = None,
    batch_size: int | None = None,
    features: Sequence[Mapping[str, Any]] | None = None,
) -> list[Segmentation]:
    """Segment images of any sizes. The network sees them together; the rest is done for a few of them at once.

    All devices of this process take part. The batch is spread over them if their number divides it. After the network
    the devices take turns with the images.

    Args:
      segmenter: a Segmenter.
      images: list of [H, W, 3] uint8 RGB.
      crf: whether to refine by mean field on each image.
      tags: list of [K] bool, the classes that may occur in each image, or None for all.
      batch_size: images that the network sees at once; a shorter list is padded to it, so that nothing is compiled
        anew. By default the length of the list.
      features: for each input size the network's features of these images, if they are known already; None
        computes them.

    Returns:
      List of Segmentation; of no images an empty one.

    Raises:
      ValueError: if an image is not [H, W, 3] uint8, or the network's output is not a number.
    """
    with image_workers() as workers:
        return list(begin_batch(segmenter, images, workers, crf=crf, tags=tags, batch_size=batch_size, features=features))


@contextlib.contextmanager
def image_workers(cores: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads for `begin_batch`: two a device, or on a CPU as many as it has cores, from 2 to 8.

    What refines one image does not fill the cores of a CPU, and leaves an accelerator alone while its result is read.

    Args:
      cores: of a CPU, that this process may use; None asks the system.

    Yields:
      The pool. At the end what has not begun is given up, and what has is waited for.
    """
    devices = jax.local_devices()
    count = 2 * len(devices)
    if devices[0].platform == "cpu":
        count = min(max(2, cores or usable_cores()), _MOST_WORKERS)
    pool = ThreadPoolExecutor(count, thread_name_prefix="lcrf-segment")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def begin_batch(
    segmenter: Segmenter,
    images: Sequence[np.ndarray],
    workers: ThreadPoolExecutor,
    *,
    crf: bool,
    tags: Sequence[np.ndarray] | None = None,
    batch_size: int | None = None,
    features: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Segmentation]:
    """`segment_batch` for one batch after the other: the network runs now, and what follows in the background.

    Begin the next batch before the results of this one are read: then its network runs beside the refinement of this
    one. `lcrf_jax.data.pipeline.one_ahead` is the loop for that.

    Args:
      segmenter: a Segmenter.
      images: list of [H, W, 3] uint8 RGB.
      workers: of `image_workers`; they have to be there until the last result is read.
      crf: whether to refine by mean field on each image.
      tags: as for `segment_batch`.
      batch_size: as for `segment_batch`.
      features: as for `segment_batch`.

    Returns:
      The Segmentation of each image in order, each waited for when it is asked for.

    Raises:
      ValueError: if an image is not [H, W, 3] uint8; and, as it is read, if the network's output is not a number.
    """
    for image in images:
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            got = f"{image.shape} {image.dtype}"
            raise ValueError(f"expected an RGB image [H, W, 3] uint8, got {got}; convert it first")
    if len(images) == 0:
        return iter(())
    if features is None:
        features = network_features(segmenter, images, batch_size or len(images))
    grids = [np.asarray(segmenter.log_probs_of(_spread(taps))) for taps in features]
    if tags is not None:
        absent = np.where(np.asarray(tags, bool), 0.0, EXCLUDED).astype(np.float32)
        grids = [grid[: len(images)] + absent[:, None, None, :] for grid in grids]
    devices = jax.local_devices()

    def finished(i):
        alone = math.prod(working_size(images[i].shape[:2], segmenter.max_side)) > _LARGE
        with jax.default_device(devices[i % len(devices)]), _ONE_LARGE_IMAGE if alone else contextlib.nullcontext():
            return _on_host(segmenter, *_at_own_size(segmenter, images[i], [grid[i] for grid in grids], crf))

    # Results are dropped as they are read: those of a batch are large.
    under_way = collections.deque(workers.submit(finished, i) for i in range(len(images)))
    return (under_way.popleft().result() for _ in range(len(images)))


def _spread(batch):
    """A batch of arrays over the devices of this process, where it divides by their number."""
    devices = jax.local_devices()
    if len(devices) == 1 or any(len(rows) % len(devices) for rows in jax.tree.leaves(batch)):
        return batch
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


def network_features(
    segmenter: Segmenter, images: Sequence[np.ndarray], batch_size: int
) -> list[dict[str, jax.Array]]:
    """The frozen features of a batch at every input size.

    Args:
      segmenter: a Segmenter.
      images: list of at most `batch_size` images [H, W, 3] uint8 RGB.
      batch_size: rows of the result; the last image is repeated to fill them.

    Returns:
      List of dict from tap to array, see `Segmenter.network_features`, one for each input size.
    """
    batches = []
    for size in segmenter.input_sizes:
        squares = [square_image(image, size) for image in images]
        filled = np.stack(squares + squares[-1:] * (batch_size - len(images)))
        batches.append(segmenter.network_features(_spread(filled)))
    return batches


def _at_own_size(segmenter, image, grids, crf):
    """(size, image, log-probabilities, refined ones or None); the arrays are padded and still on the device."""
    size, image = image.shape[:2], working_image(image, segmenter.max_side)
    height, width = image.shape[:2]
    padded = (padded_to(height), padded_to(width))
    enlarged = [
        segmenter.enlarge(
            grid,
            interpolation_weights(grid.shape[0], height, padded[0]),
            interpolation_weights(grid.shape[1], width, padded[1]),
        )
        for grid in grids
    ]
    log_probs = enlarged[0] if len(enlarged) == 1 else jax.nn.log_softmax(sum(enlarged) / len(enlarged), axis=-1)
    return size, image, log_probs, segmenter.refine(log_probs, *padded_image(image)) if crf else None


def _on_host(segmenter, size, image, log_probs, refined):
    """The Segmentation, from what `_at_own_size` left on the device."""
    height, width = image.shape[:2]
    if refined is not None:
        refined = np.asarray(refined)
        if np.isnan(refined).any():  # strong noise: as many vertices as can be needed
            padded, valid = padded_image(image)
            capacity = valid.size * MAX_VERTICES_PER_PIXEL
            refined = np.asarray(segmenter.refine(log_probs, padded, valid, capacity=capacity))
        refined = refined[:height, :width]
    log_probs = np.asarray(log_probs)[:height, :width]
    if np.isnan(log_probs).any() or refined is not None and np.isnan(refined).any():
        raise ValueError("the network's output is not a number: its training has diverged; use another checkpoint")
    return Segmentation(size, log_probs, refined)
