"""Images in, masks out: a trained run as a segmenter of images of any size."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from PIL import Image

from lcrf_jax.baselines import cam_log_probs, ilp_log_probs
from lcrf_jax.crf import refine as refine_by_mean_field
from lcrf_jax.features import square_image
from lcrf_jax.kernels import KernelParams
from lcrf_jax.lattice import default_capacity
from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.tag_classifier import TagClassifier

_SIZE_STEP = 64
_EXCLUDED = -1e4
MAX_SIDE = 640
_STRIP_PIXELS = 1 << 20
MAX_VERTICES_PER_PIXEL = 6  # of a lattice over two positions and three colours


class Segmenter(NamedTuple):
    """A trained inference network; see `segmenter` for how one is made and `segment` for its use.

    Attributes:
      class_names: names of the K classes, background first.
      input_sizes: sides of the square network inputs, whose log-probabilities are averaged.
      network_features: function from images [B, S, S, 3] RGB 0..255 to the taps of the frozen backbone: a dict of
        arrays, the rows of the images first, then those of their mirror images where these are used.
      log_probs_of: function from these to log q(z | x) on the network's grid, [B, h, w, K].
      enlarge: function (grid log-probabilities, row and column weights) -> log-probabilities of the pixels.
      refine: function (log-probabilities, image, valid, capacity=None) -> log-probabilities after mean field; all
        are NaN if the kernel's lattice needs more vertices than the capacity.
      max_side: larger images are worked on at this longer side, in pixels, and their result is enlarged.
    """

    class_names: tuple
    input_sizes: tuple
    network_features: object
    log_probs_of: object
    enlarge: object
    refine: object
    max_side: int = MAX_SIDE

    def network_log_probs(self, images):
        """Log q(z | x) on the network's grid, [B, h, w, K], of images [B, S, S, 3] RGB 0..255."""
        return self.log_probs_of(self.network_features(images))


class Segmentation(NamedTuple):
    """What is known of one image of H x W pixels; h x w is the size it was worked on at, H x W but for large images.

    Attributes:
      size: (H, W) in pixels.
      log_probs: [h, w, K] float32, log q(z | x) of the network.
      refined_log_probs: the same after mean field on the image, or None.
    """

    size: tuple
    log_probs: np.ndarray
    refined_log_probs: np.ndarray | None

    @property
    def best_log_probs(self):
        """[h, w, K] float32, after refinement where there was one."""
        return self.log_probs if self.refined_log_probs is None else self.refined_log_probs

    @property
    def labels(self):
        """[H, W] uint8, the most probable class of every pixel, after refinement where there was one."""
        return labels_and_confidence(self.best_log_probs, self.size)[0]

    @property
    def network_labels(self):
        """[H, W] uint8, the most probable class of every pixel before refinement."""
        return labels_and_confidence(self.log_probs, self.size)[0]


def labels_and_confidence(log_probs, size):
    """The most probable class of every pixel and its probability, in little memory for large images.

    Args:
      log_probs: [h, w, K] log-probabilities.
      size: (H, W) in pixels; where it differs from (h, w) the log-probabilities are interpolated, bilinearly.

    Returns:
      ([H, W] uint8, [H, W] float16 in 0..1).
    """
    labels, confidence = np.empty(size, np.uint8), np.empty(size, np.float16)
    columns = None if log_probs.shape[1] == size[1] else _neighbours(log_probs.shape[1], size[1])
    rows = None if log_probs.shape[0] == size[0] else _neighbours(log_probs.shape[0], size[0])
    step = max(1, _STRIP_PIXELS // size[1])
    for start in range(0, size[0], step):
        strip = slice(start, min(start + step, size[0]))
        values = log_probs[strip] if rows is None else _interpolated(log_probs, [part[strip] for part in rows], 0)
        values = values if columns is None else _interpolated(values, columns, 1)
        best = values.argmax(axis=-1)
        labels[strip] = best
        top = np.take_along_axis(values, best[..., None], axis=-1)
        confidence[strip] = 1 / np.exp(values - top).sum(axis=-1)
    return labels, confidence


def class_statistics(labels, confidence, num_classes):
    """Area and confidence of each class of an image, in little memory for large ones.

    Args:
      labels: [H, W] class indices.
      confidence: [H, W] probability of each pixel's label.
      num_classes: K.

    Returns:
      ([K] int64 number of pixels, [K] float64 sum of their confidence).
    """
    counts, sums = np.zeros(num_classes, np.int64), np.zeros(num_classes)
    step = max(1, _STRIP_PIXELS // labels.shape[1])
    for start in range(0, len(labels), step):
        strip = labels[start : start + step].ravel()
        counts += np.bincount(strip, minlength=num_classes)
        sums += np.bincount(strip, np.float64(confidence[start : start + step].ravel()), minlength=num_classes)
    return counts, sums


def interpolated_probs(log_probs, size):
    """Probabilities at another size, from log-probabilities interpolated bilinearly.

    Args:
      log_probs: [h, w, K] log-probabilities.
      size: (H, W) in pixels.

    Returns:
      [H, W, K] float32, summing to one over the classes.
    """
    log_probs = resized_map(log_probs, size)
    probs = np.exp(log_probs - log_probs.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)


def _neighbours(cells, pixels):
    """For each pixel the cell before it, the cell after it and the share of the latter."""
    centres = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    before = np.minimum(centres.astype(np.int64), max(cells - 2, 0))
    return before, np.minimum(before + 1, cells - 1), (centres - before).astype(np.float32)


def _interpolated(values, neighbours, axis):
    before, after, share = neighbours
    share = share.reshape(-1, *[1] * (values.ndim - axis - 1))
    return values.take(before, axis) * (1 - share) + values.take(after, axis) * share


def make_segmenter(description, params):
    """The segmenter of a description and its parameters.

    Args:
      description: dict with "network" (see `lcrf_jax.nets.network`), "class_names" and "inference": "input_sizes",
        "mirror" (average over the mirrored image), "kernel" (fields of `KernelParams`, in pixels of the image),
        "num_iterations", "unary_weight", and where the network's softmax is not the output "output", a key of
        `OUTPUTS`, and "output_options"; "max_side" is MAX_SIDE where it is not there.
      params: dict with "backbone" and what the output needs: "decoder" or "classifier" variables.

    Returns:
      Segmenter.

    Raises:
      ValueError: if the network's description is not complete.
      KeyError: if parameters are missing.
    """
    network, settings = build_network(description["network"]), description["inference"]
    output, options = settings.get("output", "softmax"), settings.get("output_options", {})
    wanted = "classifier" if output == "class_maps" else "decoder"
    used = {name: params[name] for name in ("backbone", wanted)}
    static = {"network": network, "mirrored": settings["mirror"]}
    placed = {None: jax.device_put(used)}

    def beside(batch):
        """The weights where a batch lies: where it is spread over devices, each has a copy."""
        sharding = _replicated_beside(batch)
        if sharding not in placed:
            placed[sharding] = jax.device_put(used, sharding)
        return placed[sharding]

    def network_features(images):
        return _network_features(beside(images)["backbone"], images, **static)

    def log_probs_of(features):
        return _log_probs(beside(features), features, output=output, options=tuple(sorted(options.items())), **static)

    refine = functools.partial(
        _refined,
        kernel_params=KernelParams(**settings["kernel"]),
        num_iterations=settings["num_iterations"],
        unary_weight=settings["unary_weight"],
    )
    return Segmenter(
        tuple(description["class_names"]), tuple(settings["input_sizes"]), network_features, log_probs_of, _enlarged,
        refine, settings.get("max_side", MAX_SIDE),
    )


def _replicated_beside(batch):
    """Where the weights for a batch lie: copied to the devices that it is spread over, or None for the default device."""
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


@jax.jit
def _enlarged(log_probs, rows, columns):
    logits = jnp.einsum("Hh,hwk,Ww->HWk", rows, log_probs, columns, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.log_softmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("kernel_params", "num_iterations", "unary_weight", "capacity"))
def _refined(log_probs, image, valid, *, kernel_params, num_iterations, unary_weight, capacity=None):
    return refine_by_mean_field(
        image, unary_weight * log_probs, kernel_params, num_iterations=num_iterations, valid=valid, capacity=capacity
    )


def adjustable_refinement(inference, changed, shape):
    """A refinement with other settings than those of the run, compiled once for many values of them.

    Args:
      inference: settings of the run, see `make_segmenter`.
      changed: dict with new values of "unary_weight", "num_iterations" and fields of the kernel. Only another number of
        iterations or `gaussian_position_width` compiles anew, or a kernel so narrow that its lattice has to be larger.
      shape: (h, w) in pixels of the image as it is worked on.

    Returns:
      Function (log-probabilities, image, valid, capacity=None), as `Segmenter.refine`.
    """
    kernel = {**inference["kernel"], **{name: value for name, value in changed.items() if name in KernelParams._fields}}
    width = kernel.pop("gaussian_position_width")
    narrow = kernel["bilateral_position_width"] * kernel["bilateral_colour_width"]
    share = min(1.0, 2.0 ** math.ceil(math.log2(320 / narrow)))
    own_capacity = default_capacity(_padded(shape[0]) * _padded(shape[1]), 5, share=share)
    numbers = {**kernel, "unary_weight": changed.get("unary_weight", inference["unary_weight"])}
    numbers = {name: np.float32(value) for name, value in numbers.items()}
    num_iterations = changed.get("num_iterations", inference["num_iterations"])

    def refine(log_probs, image, valid, capacity=None):
        return _refined_by(
            log_probs, image, valid, numbers, width=width, num_iterations=num_iterations, capacity=capacity or own_capacity
        )

    return refine


@functools.partial(jax.jit, static_argnames=("width", "num_iterations", "capacity"))
def _refined_by(log_probs, image, valid, numbers, *, width, num_iterations, capacity):
    kernel = {name: value for name, value in numbers.items() if name != "unary_weight"}
    kernel_params = KernelParams(**kernel, gaussian_position_width=width)
    unary = numbers["unary_weight"] * log_probs
    return refine_by_mean_field(
        image, unary, kernel_params, num_iterations=num_iterations, valid=valid, capacity=capacity
    )


def _mirror_mean(maps, mirrored):
    """The mean of the first half of the maps and the second half, mirrored back; or all of them if none is mirrored."""
    if not mirrored:
        return maps
    plain, other = jnp.split(maps, 2)
    return (plain + other[:, :, ::-1]) / 2


def _network_output(network, params, features, mirrored, log_probs_of_logits):
    """The network's log-probabilities, averaged over mirroring."""
    log_probs = log_probs_of_logits(network.logits(params["decoder"], params["backbone"], features))
    return jax.nn.log_softmax(_mirror_mean(log_probs, mirrored), axis=-1) if mirrored else log_probs


def _softmax(network, params, features, mirrored, options):
    del options
    return _network_output(network, params, features, mirrored, lambda logits: jax.nn.log_softmax(logits, axis=-1))


def _ilp(network, params, features, mirrored, options):
    def one(logits):
        return ilp_log_probs(logits.reshape(-1, logits.shape[-1]), **options).reshape(logits.shape)

    return _network_output(network, params, features, mirrored, jax.vmap(one))


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


def superpixels(image, *, scale=100.0, sigma=0.8, min_size=50):
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


def interpolation_weights(cells, pixels, padded):
    """Bilinear weights that bring a row of cells to a row of pixels, both spanning the image.

    Args:
      cells: number of cells.
      pixels: number of pixels of the image.
      padded: rows of the result, at least `pixels`; the rest repeats the last pixel.

    Returns:
      [padded, cells] float32, rows sum to one.
    """
    centres = (np.minimum(np.arange(padded), pixels - 1) + 0.5) * cells / pixels - 0.5
    centres = np.clip(centres, 0, cells - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(cells)[None, :])).astype(np.float32)


def _padded(size):
    """The next multiple of _SIZE_STEP: images of similar size share one compilation."""
    return max(1, math.ceil(size / _SIZE_STEP)) * _SIZE_STEP


def resized_map(values, size):
    """A map over an image at another resolution, bilinear.

    Args:
      values: [h, w, C] float.
      size: (height, width) in pixels.

    Returns:
      [height, width, C] float32 NumPy array.
    """
    values = np.asarray(values, np.float32)
    for axis in (0, 1):
        if values.shape[axis] != size[axis]:
            values = _interpolated(values, _neighbours(values.shape[axis], size[axis]), axis)
    return values


def segment(segmenter, image, *, crf, tags=None):
    """Segment one image; one with a side above `segmenter.max_side` is worked on at a smaller size.

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


def segment_batch(segmenter, images, *, crf, tags=None, batch_size=None, features=None):
    """Segment images of any sizes; the network sees them together, the rest is done one by one.

    All devices of this process take part: the batch is spread over them if it divides by their number, and they take
    turns with the images after that.

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
      List of Segmentation.

    Raises:
      ValueError: if an image is not [H, W, 3] uint8, or the network's output is not a number.
    """
    for image in images:
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            got = f"{image.shape} {image.dtype}"
            raise ValueError(f"expected an RGB image [H, W, 3] uint8, got {got}; convert it first")
    if features is None:
        features = network_features(segmenter, images, batch_size or len(images))
    grids = [np.asarray(segmenter.log_probs_of(_spread(taps))) for taps in features]
    if tags is not None:
        absent = np.where(np.asarray(tags, bool), 0.0, _EXCLUDED).astype(np.float32)
        grids = [grid[: len(images)] + absent[:, None, None, :] for grid in grids]
    devices, results = jax.local_devices(), []
    for start in range(0, len(images), len(devices)):
        under_way = []
        for device, i in zip(devices, range(start, len(images))):
            with jax.default_device(device):
                under_way.append(_at_own_size(segmenter, images[i], [grid[i] for grid in grids], crf))
        results += [_on_host(segmenter, *each) for each in under_way]
    return results


def _spread(batch):
    """A batch of arrays over the devices of this process, where it divides by their number."""
    devices = jax.local_devices()
    if len(devices) == 1 or any(len(rows) % len(devices) for rows in jax.tree.leaves(batch)):
        return batch
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return jax.device_put(batch, NamedSharding(mesh, P("data")))


def network_features(segmenter, images, batch_size):
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
    """(size, image, log-probabilities, refined ones or None) on the way: padded, on the device."""
    size, image = image.shape[:2], _working_image(image, segmenter.max_side)
    height, width = image.shape[:2]
    padded = (_padded(height), _padded(width))
    enlarged = [
        segmenter.enlarge(
            grid,
            interpolation_weights(grid.shape[0], height, padded[0]),
            interpolation_weights(grid.shape[1], width, padded[1]),
        )
        for grid in grids
    ]
    log_probs = enlarged[0] if len(enlarged) == 1 else jax.nn.log_softmax(sum(enlarged) / len(enlarged), axis=-1)
    return size, image, log_probs, segmenter.refine(log_probs, *_padded_image(image)) if crf else None


def _working_image(image, max_side):
    """The image at the size that it is worked on."""
    size = working_size(image.shape[:2], max_side)
    if size == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=3.0))


def working_size(size, max_side):
    """The size at which an image is worked on.

    Args:
      size: (H, W) in pixels.
      max_side: largest side in pixels.

    Returns:
      (h, w) in pixels, of the same aspect; (H, W) if no side is larger than `max_side`.
    """
    scale = min(max_side / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _padded_image(image):
    """The image at its padded size, and which of its pixels are true ones."""
    height, width = image.shape[:2]
    pad = [(0, _padded(height) - height), (0, _padded(width) - width)]
    return np.pad(image, [*pad, (0, 0)], mode="edge"), np.pad(np.ones((height, width), bool), pad)


def _on_host(segmenter, size, image, log_probs, refined):
    """The Segmentation, once the device has done it."""
    height, width = image.shape[:2]
    if refined is not None:
        refined = np.asarray(refined)
        if np.isnan(refined).any():  # strong noise: as many vertices as can be needed
            padded, valid = _padded_image(image)
            capacity = valid.size * MAX_VERTICES_PER_PIXEL
            refined = np.asarray(segmenter.refine(log_probs, padded, valid, capacity=capacity))
        refined = refined[:height, :width]
    log_probs = np.asarray(log_probs)[:height, :width]
    if np.isnan(log_probs).any() or refined is not None and np.isnan(refined).any():
        raise ValueError("the network's output is not a number: its training has diverged; use another checkpoint")
    return Segmentation(size, log_probs, refined)


def restored_classifier(params):
    """The tag classifier of a run's parameters.

    Args:
      params: dict with "classifier": "weights" and "bias".

    Returns:
      TagClassifier.
    """
    return TagClassifier(params["classifier"]["weights"], params["classifier"]["bias"])
