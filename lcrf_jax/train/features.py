"""Frozen features of a whole source: views for the decoder, class maps of the tag classifier."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.bound.record import Record
from lcrf_jax.data.example import PartOfSource, Source, about
from lcrf_jax.data.pipeline import ImageSubset, ViewDataset
from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.nets.inputs import chosen_inputs, square_image
from lcrf_jax.nets.network import Network, feature_identity
from lcrf_jax.train.spread import batched, no_progress, over_devices


@functools.partial(jax.jit, static_argnames=("network", "mirror"))
def _test_time_taps(variables, images, *, network, mirror):
    views = (images, images[:, :, ::-1]) if mirror else (images,)
    taps = [network.features(variables, view) for view in views]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *taps)


class CachedViews:
    """The records of a `ViewDataset` with frozen features in place of images, kept on disk.

    Records and their order are those of the views; instead of the image they hold the features (float16) and the guide
    (uint8), and the mask where masks are given.

    Args:
      views: lcrf_jax.data.pipeline.ViewDataset of a source with a `fingerprint`; its masks, if it has some, are not
        used.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      weights_digest: sha256 of the backbone's weights.
      directory: folder of the caches.
      guide_stride: pixels of the view per cell of the guide; None is the grid of the logits.
      batch_size: images that pass the backbone at once on each device.
      progress: called with the number of images after each batch.
      masks: the same views of a source with masks, or None. They are kept by themselves, so that methods with and
        without them share the features.
      taps: names of the taps to keep; None for all that the network takes.
    """

    def __init__(
        self,
        views: ViewDataset,
        network: Network,
        variables: Mapping[str, Any],
        weights_digest: str,
        *,
        directory: str | os.PathLike,
        guide_stride: int | None = None,
        batch_size: int = 16,
        progress: Callable[..., None] = no_progress,
        masks: ViewDataset | None = None,
        taps: Sequence[str] | None = None,
    ) -> None:
        self.num_views, self._length = views.num_views, len(views)
        kept = network.taps if taps is None else tuple(taps)
        named = network.description["taps"] if taps is None else list(taps)
        description = {**feature_identity(network.description), "taps": named}
        identity: dict[str, Any] = {
            "kind": "views", "weights": weights_digest, "network": description, "views": views.identity
        }  # fmt: skip
        if guide_stride not in (None, network.stride):
            identity["guide_stride"] = guide_stride

        run, rows = over_devices(
            chosen_inputs, (variables,), len(views), batch_size, network=network, guide_stride=guide_stride, taps=kept
        )

        with cached_arrays(directory, identity, len(views), about=about(views.source)) as cache:
            for count, batch in batched(views, rows, progress, cache.first):
                features, guide = run(batch.image)
                halved = {tap: np.asarray(features[tap])[:count].astype(np.float16) for tap in kept}
                cache.write(guide=np.round(np.asarray(guide)[:count]).astype(np.uint8), **halved)
        arrays = cache.arrays
        self._guide, self._features = arrays.pop("guide"), arrays
        self._masks = None if masks is None else _cached_masks(masks, directory, batch_size)
        self._names, self._tags = views.source.names, views.source.tags

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> Record:
        view, index = divmod(int(position), len(self._names))
        return Record(
            tags=self._tags[index],
            name=self._names[index],
            index=np.int32(index),
            view=np.int32(view),
            features={tap: array[position] for tap, array in self._features.items()},
            guide=self._guide[position],
            mask=None if self._masks is None else self._masks[position],
        )

    def tap(self, name: str, view: int = 0) -> np.ndarray:
        """[N, h, w, C] features of one tap of all images in the given view, memory-mapped."""
        return self._features[name][self._rows(view)]

    def guide(self, view: int = 0) -> np.ndarray:
        """[N, s, s, 3] uint8 guides of all images in the given view, memory-mapped."""
        return self._guide[self._rows(view)]

    def _rows(self, view):
        count = len(self) // self.num_views
        return slice(view * count, (view + 1) * count)


class ComputedViews:
    """Taps of views that are computed whenever they are read, part by part: what `CachedViews` gives, without a disk.

    Args:
      views: as for `CachedViews`.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      guide_stride: as for `CachedViews`.
      batch_size: images that pass the backbone at once on each device.
      taps: names of the taps that may be read.
    """

    def __init__(
        self, views: ViewDataset, network: Network, variables: Mapping[str, Any], *, guide_stride: int | None = None,
        batch_size: int = 16, taps: Sequence[str],
    ) -> None:  # fmt: skip
        self.num_views, self._views = views.num_views, views
        self._run, self._rows = over_devices(
            chosen_inputs, (variables,), len(views), batch_size, network=network, guide_stride=guide_stride, taps=tuple(taps)
        )

    def tap(self, name: str, view: int = 0) -> "ComputedRows":
        """Features of one tap of all images in the given view, which are computed by slices."""
        count = len(self._views) // self.num_views
        return ComputedRows(functools.partial(self._computed, name, view * count), count)

    def _computed(self, name, first, rows):
        images = ImageSubset(self._views, np.arange(first + rows.start, first + rows.stop), 1)
        parts = [np.asarray(self._run(batch.image)[0][name])[:count].astype(np.float16) for count, batch in batched(images, self._rows)]
        return np.concatenate(parts)


class ComputedRows:
    """The rows of an array that are computed when a slice of them is read.

    Args:
      function: from a slice with a start and an end to an array of so many rows.
      count: rows in all.
    """

    def __init__(self, function: Callable[[slice], np.ndarray], count: int) -> None:
        self._function, self._count = function, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._function(slice(*rows.indices(self._count)[:2]))


def _cached_masks(views, directory, batch_size):
    """The masks of views, kept on disk."""
    identity = {"kind": "masks", "views": views.identity}
    with cached_arrays(directory, identity, len(views), about=about(views.source)) as cache:
        for start in range(cache.first, len(views), batch_size):
            stop = min(start + batch_size, len(views))
            cache.write(mask=np.stack([views[i].mask for i in range(start, stop)]))
    return cache.arrays["mask"]


def in_batches(
    function: Callable[[Any], ArrayLike], rows: np.ndarray | tuple[np.ndarray, ...], batch_size: int = 64
) -> np.ndarray:
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


class _Squares:
    """Records of the images of a source at one square size."""

    def __init__(self, source, size):
        self._source, self._size = source, size

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        example = self._source[index]
        return Record(example.tags, image=square_image(example.image, self._size))


def square_batches(
    source: Source, size: int, batch_size: int, progress: Callable[..., None] = no_progress, first: int = 0
) -> Iterator[tuple[int, Record]]:
    """The images of a source in order, each as a square, in batches of one size.

    Args:
      source: images; masks are not used.
      size: side of the squares in pixels.
      batch_size: images in a batch; the last one is padded with its last image.
      progress: called with the number of images after each batch was used.
      first: image to begin with; those before it are told to `progress` at once.

    Returns:
      Iterator over (number of true rows, Record with images [B, size, size, 3] uint8 and tags [B, K] bool).
    """
    return batched(_Squares(source, size), batch_size, progress, first)


def of_squares(
    function: Callable[[Any], ArrayLike], source: Source, part: slice, size: int, batch_size: int,
    progress: Callable[..., None] = no_progress,
) -> np.ndarray:  # fmt: skip
    """A function of square images applied to a part of a source.

    Args:
      function: from images [B, size, size, 3] uint8 to an array with the same leading axis.
      source: images; masks are not used.
      part: of its images, with a start and a stop.
      size: side of the squares in pixels.
      batch_size: images at once.
      progress: called with the number of images after each batch.

    Returns:
      NumPy array with a row for each image of the part.
    """
    batches = square_batches(PartOfSource(source, range(part.start, part.stop)), size, batch_size, progress)
    return np.concatenate([np.asarray(function(batch.image))[:count] for count, batch in batches])


def test_time_features(
    source: Source,
    network: Network,
    variables: Mapping[str, Any],
    weights_digest: str,
    *,
    size: int,
    mirror: bool,
    directory: str | os.PathLike,
    batch_size: int = 8,
    progress: Callable[..., None] = no_progress,
) -> dict[str, np.ndarray]:
    """Frozen features of every image as `lcrf_jax.predict.segmenter` needs them at one input size, kept on disk.

    Args:
      source: images; masks are not used.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      weights_digest: sha256 of the backbone's weights.
      size: side of the square input in pixels.
      mirror: whether the features of the mirrored images are wanted as well.
      directory: folder of the caches.
      batch_size: images at once on each device.
      progress: called with the number of images after each batch.

    Returns:
      dict from tap to [N, 1 or 2, h, w, C] float32, memory-mapped; the mirrored image second.
    """
    features, rows = over_devices(
        _test_time_taps, (variables,), len(source), batch_size, network=network, mirror=mirror
    )

    description = {**feature_identity(network.description), "taps": list(network.taps)}
    identity = {
        "kind": "test time", "weights": weights_digest, "network": description,
        "size": size, "mirror": mirror, "source": hashlib.sha256(repr(source.fingerprint).encode()).hexdigest(),
    }
    with cached_arrays(directory, identity, len(source), about=about(source)) as cache:
        for count, batch in square_batches(source, size, rows, progress, cache.first):
            cache.write(**{tap: np.asarray(array)[:count] for tap, array in features(batch.image).items()})
    return cache.arrays
