"""Frozen features of a whole source: views for the decoder, class maps of the tag classifier."""

import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from PIL import Image

from lcrf_jax.data.cache import cached_arrays
from lcrf_jax.data.pipeline import stack_records
from lcrf_jax.data.views import apply_view, apply_view_to_mask, sample_view
from lcrf_jax.nets.network import feature_identity
from lcrf_jax.nets.tag_classifier import fit_tag_classifier


def cell_means(values, shape):
    """The mean over every cell of a grid that covers an image.

    Args:
      values: [B, H, W, C].
      shape: (h, w) of the grid. Cells that do not hold a whole number of pixels share those on their borders.

    Returns:
      [B, h, w, C], dtype of `values`.
    """
    batch, height, width, channels = values.shape
    if height % shape[0] or width % shape[1]:
        return jax.image.resize(values, (batch, *shape, channels), "linear", antialias=True)
    return reduce(values, "b (h i) (w j) c -> b h w c", "mean", h=shape[0], w=shape[1])


def guide_image(images, stride):
    """The colours that the pairwise kernel sees: every cell's mean.

    Args:
      images: [B, H, W, 3] RGB 0..255.
      stride: pixels per cell; where it does not divide H or W, cells are a little smaller.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), 3] float32, 0..255.
    """
    shape = [-(-side // stride) for side in images.shape[1:3]]
    return cell_means(jnp.asarray(images, jnp.float32), shape)


def network_inputs(network, variables, images, guide_stride=None):
    """All that training takes from the images: the taps of the frozen backbone and the guide of the kernel.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      images: [B, S, S, 3] RGB 0..255.
      guide_stride: pixels per cell of the guide; None is the grid of the logits.

    Returns:
      dict from tap to [B, h, w, C] float32, and "guide" [B, S / guide_stride, S / guide_stride, 3], see `guide_image`.
    """
    guide = guide_image(images, guide_stride or network.stride)
    return {**network.features(variables, images), "guide": guide}


# The programs of this file take the weights as arguments and the network as a static one: a second run, or a second source
# of the same sizes, compiles nothing.


@functools.partial(jax.jit, static_argnames=("network", "guide_stride", "names"))
def _named_inputs(variables, images, *, network, guide_stride, names):
    inputs = network_inputs(network, variables, images, guide_stride)
    return {name: inputs[name] for name in names}


@functools.partial(jax.jit, static_argnames="network")
def _pooled(variables, s32, *, network):
    return network.head(variables, {"s32": s32}).mean(axis=(1, 2))


@functools.partial(jax.jit, static_argnames=("network", "grid"))
def _maps_of_tap(variables, weights, s32, *, network, grid):
    maps = network.head(variables, {"s32": s32}) @ weights
    return jax.image.resize(maps, (len(maps), grid, grid, maps.shape[-1]), "linear")


@functools.partial(jax.jit, static_argnames=("network", "grid"))
def _maps_of_images(variables, weights, images, *, network, grid):
    return _maps_of_tap(variables, weights, network.features(variables, images)["s32"], network=network, grid=grid)


@functools.partial(jax.jit, static_argnames=("network", "mirror"))
def _test_time_taps(variables, images, *, network, mirror):
    views = (images, images[:, :, ::-1]) if mirror else (images,)
    taps = [network.features(variables, view) for view in views]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *taps)


def no_progress(count, *, earlier=False):
    """Says nothing of the images that are done.

    Args:
      count: images.
      earlier: whether an earlier run had done them.
    """
    del count, earlier


def _batched(records, batch_size, progress, first=0):
    """Batches of records from the first on, all of the same size (the last one padded), with the number of true rows."""
    if first:
        progress(first, earlier=True)
    for start in range(first, len(records), batch_size):
        rows = [records[i] for i in range(start, min(start + batch_size, len(records)))]
        count = len(rows)
        yield count, stack_records(rows + rows[-1:] * (batch_size - count))
        progress(count)


class CachedViews:
    """The records of a `ViewDataset` with frozen features in place of images, kept on disk.

    Records and their order are those of the views; instead of "image" they hold the taps (float16) and "guide"
    (uint8), and "mask" where masks are given.

    Args:
      views: lcrf_jax.data.pipeline.ViewDataset of a source with a `fingerprint`; its masks, if it has some, are not used.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      weights_digest: sha256 of the backbone's weights.
      directory: folder of the caches.
      guide_stride: pixels of the view per cell of the guide; None is the grid of the logits.
      batch_size: images that pass the backbone at once.
      progress: called with the number of images after each batch.
      masks: the same views of a source with masks, or None. They are kept by themselves, so that methods with and without
        them share the features.
      taps: names of the taps to keep; None for all that the network takes.
    """

    def __init__(
        self,
        views,
        network,
        variables,
        weights_digest,
        *,
        directory,
        guide_stride=None,
        batch_size=16,
        progress=no_progress,
        masks=None,
        taps=None,
    ):
        self.num_views, self._length = views.num_views, len(views)
        kept = network.taps if taps is None else tuple(taps)
        named = network.description["taps"] if taps is None else list(taps)
        description = {**feature_identity(network.description), "taps": named}
        identity = {"kind": "views", "weights": weights_digest, "network": description, "views": views.identity}
        if guide_stride not in (None, network.stride):
            identity["guide_stride"] = guide_stride

        variables, wanted = jax.device_put(variables), (*kept, "guide")

        run = functools.partial(_named_inputs, network=network, guide_stride=guide_stride, names=wanted)

        def batches(first):
            for count, batch in _batched(views, batch_size, progress, first):
                inputs = {name: np.asarray(array)[:count] for name, array in run(variables, batch["image"]).items()}
                rows = {"guide": np.round(inputs.pop("guide")).astype(np.uint8)}
                yield rows | {tap: inputs[tap].astype(np.float16) for tap in kept}

        self._arrays = cached_arrays(directory, identity, len(views), batches)
        if masks is not None:
            self._arrays |= _cached_masks(masks, directory, batch_size)
        self._names, self._tags = views.source.names, views.source.tags

    def __len__(self):
        return self._length

    def __getitem__(self, position):
        view, index = divmod(int(position), len(self._names))
        annotation = {"name": self._names[index], "tags": self._tags[index]}
        annotation |= {"index": np.int32(index), "view": np.int32(view)}
        return annotation | {name: array[position] for name, array in self._arrays.items()}

    def tap(self, name, view=0):
        """[N, h, w, C] features of one tap of all images in the given view, memory-mapped."""
        count = len(self) // self.num_views
        return self._arrays[name][view * count : (view + 1) * count]


def _cached_masks(views, directory, batch_size):
    """The masks of views, kept on disk."""

    def batches(first):
        for start in range(first, len(views), batch_size):
            stop = min(start + batch_size, len(views))
            yield {"mask": np.stack([views[i]["mask"] for i in range(start, stop)])}

    return cached_arrays(directory, {"kind": "masks", "views": views.identity}, len(views), batches)


class ClassMaps(NamedTuple):
    """Maps of the frozen tag classifier for every image of a source.

    Attributes:
      maps: [N, g, g, K - 1] float16, averaged over scales and mirroring, without bias.
      peaks: [N, K - 1] float32, the maximum of each map.
    """

    maps: np.ndarray
    peaks: np.ndarray


def pooled_head(network, variables, s32, batch_size=64):
    """Spatial mean of the head's features.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      s32: [N, h, w, C] array of the tap "s32".
      batch_size: images at once.

    Returns:
      [N, C'] float32 NumPy array.
    """
    pool = functools.partial(_pooled, jax.device_put(variables), network=network)
    return in_batches(pool, s32, batch_size)


def in_batches(function, rows, batch_size=64):
    """A function of a batch applied to many rows, part by part.

    Args:
      function: from a batch of rows to an array with the same leading axis.
      rows: array [N, ...], or tuple of such arrays.
      batch_size: rows at once.

    Returns:
      NumPy array [N, ...].
    """
    count = len(rows[0]) if isinstance(rows, tuple) else len(rows)
    slices = (slice(start, start + batch_size) for start in range(0, count, batch_size))
    parts = (tuple(array[part] for array in rows) if isinstance(rows, tuple) else rows[part] for part in slices)
    return np.concatenate([np.asarray(function(part)) for part in parts])


def map_functions(network, variables, weights, grid):
    """Jitted functions to class maps on a g x g grid: from a tap, and from images of any one size.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      weights: [C, K - 1] of the tag classifier.
      grid: g, cells along a side of the result.

    Returns:
      (function from the tap "s32" [B, h, w, C], function from images [B, S, S, 3] RGB 0..255), both to
      [B, g, g, K - 1] float32, without bias.
    """
    given = jax.device_put((variables, weights))
    return tuple(functools.partial(maps, *given, network=network, grid=grid) for maps in (_maps_of_tap, _maps_of_images))


def mean_map(plain, mirrored, others):
    """One map from those of several inputs: the mean over sizes, the size with a mirror image counting once.

    Args:
      plain: [..., g, g, K - 1] maps of the image at the main size.
      mirrored: maps of the mirrored image at the main size, not mirrored back; or None.
      others: list of maps at other sizes.

    Returns:
      [..., g, g, K - 1].
    """
    main = plain if mirrored is None else (plain + mirrored[..., ::-1, :]) / 2
    return sum(others, main) / (1 + len(others))


def square_image(image, size):
    """The whole image at size x size, as the network sees it.

    Args:
      image: [H, W, 3] uint8.
      size: side in pixels.

    Returns:
      [size, size, 3] uint8, bicubic and antialiased.
    """
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


class _Squares:
    """Records of the images of a source at one square size."""

    def __init__(self, source, size):
        self._source, self._size = source, size

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        example = self._source[index]
        return {"image": square_image(example.image, self._size), "tags": example.tags}


def square_batches(source, size, batch_size, progress=no_progress, first=0):
    """The images of a source in order, each as a square, in batches of one size.

    Args:
      source: images; masks are not used.
      size: side of the squares in pixels.
      batch_size: images in a batch; the last one is padded with its last image.
      progress: called with the number of images after each batch was used.
      first: image to begin with; those before it are told to `progress` at once.

    Returns:
      Iterator over (number of true rows, dict with "image" [B, size, size, 3] uint8 and "tags" [B, K] bool).
    """
    return _batched(_Squares(source, size), batch_size, progress, first)


def class_maps(
    source,
    views,
    network,
    variables,
    weights,
    *,
    extra_sizes,
    grid,
    identity,
    directory,
    batch_size=8,
    progress=no_progress,
):
    """Class maps of every image of a source, averaged over input sizes, and over mirroring at the main size.

    Args:
      source: images; its masks are not used.
      views: `CachedViews` of it: view 0 and, where there is one, view 1 (mirrored) give the maps at the main size.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      weights: [C, K - 1] of the tag classifier.
      extra_sizes: sides of further square inputs in pixels; these go through the backbone once more.
      grid: cells along a side of the maps.
      identity: dict that JSON can hold: what identifies the images, the backbone's weights and the classifier.
      directory: folder of the caches.
      batch_size: images at once.
      progress: called with the number of images after each batch, once for each extra size.

    Returns:
      ClassMaps.
    """
    from_tap, from_images = map_functions(network, variables, weights, grid)

    def at_size(size):
        records = square_batches(source, size, batch_size, progress)
        return np.concatenate([np.asarray(from_images(batch["image"]))[:count] for count, batch in records])

    def batches(first):
        del first  # all at once
        plain = in_batches(from_tap, views.tap("s32", 0))
        mirrored = in_batches(from_tap, views.tap("s32", 1)) if views.num_views > 1 else None
        maps = mean_map(plain, mirrored, [at_size(size) for size in extra_sizes])
        yield {"maps": maps.astype(np.float16)}

    key = {"kind": "class maps", "extra_sizes": list(extra_sizes), "grid": grid, "views": views.num_views, **identity}
    stored = cached_arrays(directory, key, len(source), batches)["maps"]
    return ClassMaps(stored, np.asarray(stored, np.float32).max(axis=(1, 2)))


class MappedViews:
    """Records of views with the class maps of their images, cut out by the same view.

    Args:
      records: `CachedViews` or a `ViewDataset`: records with "index" and "view".
      maps: dict from name to an array of maps over the whole image: [N, g, g, C] of floats, or [N, g, g] of uint8
        labels, which are cut out by nearest neighbour.
      constants: dict from name to [N, ...] array that does not depend on the view.
      grid: cells along a side of the cut-out maps.
      view_options: seed, scale_range and ratio_range of the views.
    """

    def __init__(self, records, *, maps, constants, grid, view_options):
        self._records, self._maps, self._constants, self._grid = records, maps, constants, grid
        self._view_options = dict(view_options)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, position):
        record = self._records[position]
        index = int(record["index"])
        view = sample_view(index=index, view_number=int(record["view"]), **self._view_options)
        size = (self._grid, self._grid)
        cut = {
            name: apply_view_to_mask(maps[index], view, size)
            if maps.dtype == np.uint8
            else apply_view(np.asarray(maps[index], np.float32), view, size)
            for name, maps in self._maps.items()
        }
        return {**record, **cut, **{name: values[index] for name, values in self._constants.items()}}


def test_time_features(source, network, variables, weights_digest, *, size, mirror, directory, batch_size=8,
                       progress=no_progress):
    """Frozen features of every image as `lcrf_jax.inference` needs them at one input size, kept on disk.

    Args:
      source: images; masks are not used.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      weights_digest: sha256 of the backbone's weights.
      size: side of the square input in pixels.
      mirror: whether the features of the mirrored images are wanted as well.
      directory: folder of the caches.
      batch_size: images at once.
      progress: called with the number of images after each batch.

    Returns:
      dict from tap to [N, 1 or 2, h, w, C] float32, memory-mapped; the mirrored image second.
    """
    features = functools.partial(_test_time_taps, jax.device_put(variables), network=network, mirror=mirror)

    def batches(first):
        for count, batch in square_batches(source, size, batch_size, progress, first):
            yield {tap: np.asarray(array)[:count] for tap, array in features(batch["image"]).items()}

    description = {**feature_identity(network.description), "taps": list(network.taps)}
    identity = {
        "kind": "test time", "weights": weights_digest, "network": description,
        "size": size, "mirror": mirror, "source": hashlib.sha256(repr(source.fingerprint).encode()).hexdigest(),
    }
    return cached_arrays(directory, identity, len(source), batches)


def fitted_classifier(network, variables, s32, tags, *, l2):
    """The tag classifier fitted on the pooled head of the training images.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      s32: [N, h, w, C] array of the tap "s32" of the whole images.
      tags: [N, K] bool.
      l2: see `fit_tag_classifier`.

    Returns:
      (TagClassifier, [N, K - 1] float32 logits on the training images).
    """
    pooled = pooled_head(network, variables, s32)
    classifier, _, _ = fit_tag_classifier(pooled, tags, l2=l2)
    return classifier, pooled @ np.asarray(classifier.weights) + np.asarray(classifier.bias)
