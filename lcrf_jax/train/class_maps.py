"""Class maps of the frozen tag classifier for every image of a source."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.bound.record import Record
from lcrf_jax.data.example import Source, about
from lcrf_jax.data.pipeline import ViewDataset
from lcrf_jax.data.views import apply_view, apply_view_to_mask, sample_view
from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.nets.network import Network
from lcrf_jax.nets.objectness import objectness
from lcrf_jax.nets.tag_classifier import STREAMED_ABOVE, TagClassifier, fit_tag_classifier
from lcrf_jax.train.features import CachedViews, in_batches, of_squares
from lcrf_jax.train.spread import no_progress, over_devices

ROWS_IN_MEMORY = 512  # maps of so many images are held at once; what is made of them does not depend on it


@functools.partial(jax.jit, static_argnames="network")
def _pooled(variables, s32, *, network):
    return network.head(variables, {"s32": s32}).mean(axis=(1, 2))


@functools.partial(jax.jit, static_argnames=("network", "grid"))
def _maps_of_tap(variables, weights, s32, *, network, grid):
    """[B, g, g, K]: the class maps, and the objectness last."""
    head = network.head(variables, {"s32": s32})
    maps = jnp.concatenate([head @ weights, objectness(s32, head)[..., None]], axis=-1)
    return jax.image.resize(maps, (len(maps), grid, grid, maps.shape[-1]), "linear")


@functools.partial(jax.jit, static_argnames=("network", "grid"))
def _maps_of_images(variables, weights, images, *, network, grid):
    return _maps_of_tap(variables, weights, network.features(variables, images)["s32"], network=network, grid=grid)


class ClassMaps(NamedTuple):
    """Maps of the frozen tag classifier for every image of a source.

    Attributes:
      maps: [N, g, g, K - 1] float16, averaged over scales and mirroring, without bias.
      peaks: [N, K - 1] float32, the maximum of each map.
      objectness: [N, g, g] float16 in 0..1, averaged in the same way, see `lcrf_jax.nets.objectness.objectness`.
    """

    maps: np.ndarray
    peaks: np.ndarray
    objectness: np.ndarray


def pooled_head(network: Network, variables: Mapping[str, Any], s32: np.ndarray, batch_size: int = 64) -> np.ndarray:
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


def map_functions(
    network: Network, variables: Mapping[str, Any], weights: ArrayLike, grid: int
) -> tuple[Callable[[ArrayLike], jax.Array], Callable[[ArrayLike], jax.Array]]:
    """Jitted functions to class maps and objectness on a g x g grid: from a tap, and from images of any one size.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      weights: [C, K - 1] of the tag classifier.
      grid: g, cells along a side of the result.

    Returns:
      (function from the tap "s32" [B, h, w, C], function from images [B, S, S, 3] RGB 0..255), both to
      [B, g, g, K] float32: the class maps without bias, and `lcrf_jax.nets.objectness.objectness` last.
    """
    given = jax.device_put((variables, weights))
    kinds = (_maps_of_tap, _maps_of_images)
    of_tap, of_images = (functools.partial(maps, *given, network=network, grid=grid) for maps in kinds)
    return of_tap, of_images


def mean_map(plain: np.ndarray, mirrored: np.ndarray | None, others: Sequence[np.ndarray]) -> np.ndarray:
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


def class_maps(
    source: Source,
    views: CachedViews,
    network: Network,
    variables: Mapping[str, Any],
    weights: ArrayLike,
    *,
    extra_sizes: Sequence[int],
    grid: int,
    identity: Mapping[str, Any],
    directory: str | os.PathLike,
    batch_size: int = 8,
    progress: Callable[..., None] = no_progress,
) -> ClassMaps:
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
      batch_size: images at once on each device.
      progress: called with the number of images after each batch, once for each extra size.

    Returns:
      ClassMaps.
    """
    from_tap, _ = map_functions(network, variables, weights, grid)
    from_images, rows = over_devices(
        _maps_of_images, (variables, weights), len(source), batch_size, network=network, grid=grid
    )

    key = {"kind": "class maps and objectness", "extra_sizes": list(extra_sizes), "grid": grid, "views": views.num_views, **identity}
    with cached_arrays(directory, key, len(source), about=about(source)) as cache:
        for start in range(cache.first, len(source), ROWS_IN_MEMORY):
            part = slice(start, min(start + ROWS_IN_MEMORY, len(source)))
            plain = in_batches(from_tap, views.tap("s32", 0)[part])
            mirrored = in_batches(from_tap, views.tap("s32", 1)[part]) if views.num_views > 1 else None
            every = mean_map(plain, mirrored, [of_squares(from_images, source, part, size, rows, progress) for size in extra_sizes]).astype(np.float16)
            cache.write(maps=every[..., :-1], objectness=every[..., -1])
    stored = cache.arrays["maps"]
    return ClassMaps(stored, in_batches(_peaks, stored, ROWS_IN_MEMORY), cache.arrays["objectness"])


def _peaks(maps):
    return np.asarray(maps, np.float32).max(axis=(1, 2))


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

    def __init__(
        self,
        records: CachedViews | ViewDataset,
        *,
        maps: Mapping[str, np.ndarray],
        constants: Mapping[str, np.ndarray],
        grid: int,
        view_options: Mapping[str, Any],
    ) -> None:
        self._records, self._maps, self._constants, self._grid = records, maps, constants, grid
        self._view_options = dict(view_options)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, position: int) -> Record:
        record = self._records[position]
        # The records of views have both of them.
        index, number = int(record.index), int(record.view)  # type: ignore[arg-type]
        view = sample_view(index=index, view_number=number, **self._view_options)
        size = (self._grid, self._grid)
        fields: dict[str, Any] = {
            name: apply_view_to_mask(maps[index], view, size)
            if maps.dtype == np.uint8
            else apply_view(np.asarray(maps[index], np.float32), view, size)
            for name, maps in self._maps.items()
        }
        fields |= {name: values[index] for name, values in self._constants.items()}
        return record._replace(**fields)


def fitted_classifier(
    network: Network,
    variables: Mapping[str, Any],
    s32: np.ndarray,
    tags: np.ndarray,
    *,
    l2: float,
    identity: Mapping[str, Any],
    directory: str | os.PathLike,
) -> tuple[TagClassifier, np.ndarray]:
    """The tag classifier fitted on the pooled head of the training images, kept on disk.

    Args:
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      s32: [N, h, w, C] array of the tap "s32" of the whole images; it is read only where there is no classifier yet.
      tags: [N, K] bool.
      l2: see `fit_tag_classifier`.
      identity: dict that JSON can hold: what identifies the images and the backbone's weights.
      directory: folder of the caches.

    Returns:
      (TagClassifier, [N, K - 1] float32 logits on the training images), of NumPy arrays.
    """
    tagged, digest = np.asarray(tags, bool), hashlib.sha256()
    for text in written_rows(tagged):
        digest.update(text.encode())
    key = {"kind": "tag classifier", "l2": l2, "tags": digest.hexdigest(), **identity}
    with cached_arrays(directory, key, 1, about=f"{len(tagged)} images with {tagged.shape[1] - 1} tags") as cache:
        if not cache.first:
            pooled = _pooled_rows(network, variables, s32, identity, directory)
            classifier, _, _ = fit_tag_classifier(pooled, tags, l2=l2)
            scores = pooled @ np.asarray(classifier.weights) + np.asarray(classifier.bias)
            made = {**classifier._asdict(), "scores": scores}
            cache.write(**{name: np.asarray(array)[None] for name, array in made.items()})
    kept: dict[str, Any] = {name: np.array(rows[0]) for name, rows in cache.arrays.items()}
    return TagClassifier(kept["weights"], kept["bias"]), kept["scores"]


def _pooled_rows(network, variables, s32, identity, directory):
    """The pooled head of all images: in memory, or on the disk where it is large."""
    if not len(s32) or len(s32) * pooled_head(network, variables, s32[:1]).nbytes <= STREAMED_ABOVE:
        return pooled_head(network, variables, s32)
    with cached_arrays(directory, {"kind": "pooled head", **identity}, len(s32), about=f"{len(s32)} images") as cache:
        for start in range(cache.first, len(s32), ROWS_IN_MEMORY):
            cache.write(pooled=pooled_head(network, variables, s32[start : start + ROWS_IN_MEMORY]))
    return cache.arrays["pooled"]


def written_rows(rows: np.ndarray) -> Iterator[str]:
    """``repr(rows.tolist())`` piece by piece, for a digest: of a million rows the whole is a list of objects and a text.

    Args:
      rows: [N, K].

    Returns:
      Iterator over the pieces.
    """
    yield "["
    for start in range(0, len(rows), ROWS_IN_MEMORY):
        yield (", " if start else "") + repr(rows[start : start + ROWS_IN_MEMORY].tolist())[1:-1]
    yield "]"
