"""What some of the compared methods need of every training image: saliency of two kinds, and localisation cues."""

import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.baselines import NO_CUE, localisation_cues
from lcrf_jax.baselines.saliency import barrier_saliency
from lcrf_jax.data.example import Source, about
from lcrf_jax.machine.cache import cached_arrays
from lcrf_jax.nets.inputs import cell_means
from lcrf_jax.nets.network import Network
from lcrf_jax.nets.tag_classifier import TagClassifier
from lcrf_jax.train.class_maps import ClassMaps, written_rows
from lcrf_jax.train.features import in_batches, square_batches
from lcrf_jax.train.spread import no_progress, over_devices


def image_saliency(
    source: Source,
    *,
    image_size: int,
    contrast: float,
    level: float,
    grid: int,
    directory: str | os.PathLike,
    batch_size: int = 32,
    progress: Callable[..., None] = no_progress,
) -> np.ndarray:
    """`barrier_saliency` of every image of a source, kept on disk.

    Args:
      source: images; their masks are not used.
      image_size: side in pixels of the square that it is computed on.
      contrast: see `barrier_saliency`.
      level: see `barrier_saliency`.
      grid: g, cells along a side of the result.
      directory: folder of the caches.
      batch_size: images at once on each device.
      progress: called with the number of images after each batch.

    Returns:
      [N, g, g, 1] float16 in 0..1.
    """
    maps, rows = over_devices(_barrier_maps, (), len(source), batch_size, contrast=contrast, level=level, grid=grid)

    settings = {"image_size": image_size, "contrast": contrast, "level": level, "grid": grid}
    identity = {"kind": "barrier saliency, centred", **settings, "source": _fingerprint(source)}
    with cached_arrays(directory, identity, len(source), about=about(source)) as cache:
        for count, batch in square_batches(source, image_size, rows, progress, cache.first):
            cache.write(saliency=np.asarray(maps(batch.image), np.float16)[:count])
    return cache.arrays["saliency"]


@functools.partial(jax.jit, static_argnames=("contrast", "level", "grid"))
def _barrier_maps(images, *, contrast, level, grid):
    saliency = jax.vmap(functools.partial(barrier_saliency, contrast=contrast, level=level))(images)
    return jax.image.resize(saliency, (len(saliency), grid, grid), "linear")[..., None]


def gradient_saliency(
    source: Source,
    network: Network,
    variables: Mapping[str, Any],
    classifier: TagClassifier,
    *,
    size: int,
    grid: int,
    identity: Mapping[str, Any],
    directory: str | os.PathLike,
    batch_size: int = 8,
    progress: Callable[..., None] = no_progress,
) -> np.ndarray:
    """Saliency of every image from the gradient of the tag classifier, kept on disk.

    The largest modulus over the colours of the derivative of the tagged classes' summed logits with respect to the
    image, its mean over each cell, and the median over 3 x 3 cells. An image without tags has none: all is 0.

    Args:
      source: images; their masks are not used.
      network: lcrf_jax.nets.network.Network.
      variables: of its backbone.
      classifier: TagClassifier.
      size: side in pixels of the square that it is computed on.
      grid: g, cells along a side of the result.
      identity: dict that JSON can hold: what identifies the backbone's weights and the classifier.
      directory: folder of the caches.
      batch_size: images at once on each device.
      progress: called with the number of images after each batch.

    Returns:
      [N, g, g] float32, >= 0.

    References:
      Simonyan, Vedaldi and Zisserman 2014; the median and the use as a background cue: Kolesnikov and Lampert 2016.
    """
    maps, rows = over_devices(
        _gradient_maps, (variables, classifier), len(source), batch_size, network=network, grid=grid
    )

    key = {"kind": "gradient saliency", "size": size, "grid": grid, "source": _fingerprint(source), **identity}
    with cached_arrays(directory, key, len(source), about=about(source)) as cache:
        for count, batch in square_batches(source, size, rows, progress, cache.first):
            cache.write(saliency=np.asarray(maps(batch.image, batch.tags))[:count])
    return cache.arrays["saliency"]


@functools.partial(jax.jit, static_argnames=("network", "grid"))
def _gradient_maps(variables, classifier, images, tags, *, network, grid):
    def summed_logits(images):
        pooled = network.head(variables, network.features(variables, images)).mean(axis=(1, 2))
        return jnp.sum((pooled @ classifier.weights + classifier.bias) * tags[:, 1:])

    gradient = jax.grad(summed_logits)(jnp.asarray(images, jnp.float32))
    cells = cell_means(jnp.abs(gradient).max(axis=-1, keepdims=True), (grid, grid))
    return median_3x3(cells[..., 0])


def _fingerprint(source):
    digest = hashlib.sha256(f"({source.fingerprint!r}, ".encode())
    for text in written_rows(source.tags):
        digest.update(text.encode())
    digest.update(b")")
    return digest.hexdigest()


def median_3x3(maps: jax.Array) -> jax.Array:
    """The median over each cell and its eight neighbours; the border is repeated.

    Args:
      maps: [B, h, w].

    Returns:
      [B, h, w].
    """
    padded = jnp.pad(maps, ((0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = maps.shape[1:]
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.median(jnp.stack(shifted), axis=0)


@jax.jit
def saliency_rank(saliency: jax.Array | np.ndarray) -> jax.Array:
    """The rank of each cell's saliency in its image: the share of the other cells that are less salient.

    Equal cells share the mean of their ranks, so that an image whose saliency is the same everywhere has 1/2
    everywhere.

    Args:
      saliency: [B, h, w], finite.

    Returns:
      [B, h, w] float32 in 0..1.
    """

    def one(values):
        ordered = jnp.sort(values)
        before, upto = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
        return (before + upto - 1) / (2 * max(1, len(values) - 1))

    return jax.vmap(one)(saliency.reshape(len(saliency), -1)).reshape(saliency.shape)


def classifier_cues(
    maps: ClassMaps, tags: np.ndarray, saliency: np.ndarray, *, foreground_level: float, background_share: float
) -> np.ndarray:
    """`localisation_cues` of every image.

    Args:
      maps: lcrf_jax.train.class_maps.ClassMaps.
      tags: [N, K] bool.
      saliency: [N, g, g] of `gradient_saliency`.
      foreground_level: see `localisation_cues`.
      background_share: see `localisation_cues`.

    Returns:
      [N, g, g] uint8: class indices, 255 where there is no cue.
    """
    cues = functools.partial(_cues_of_maps, foreground_level=foreground_level, background_share=background_share)
    return in_batches(cues, (maps.maps, maps.peaks, tags, saliency))


@functools.partial(jax.jit, static_argnames=("foreground_level", "background_share"))
def _cues_of_maps(rows, *, foreground_level, background_share):
    class_maps, peaks, present, quiet = rows
    shape = (*quiet.shape, class_maps.shape[-1])
    class_maps = jax.image.resize(jnp.asarray(class_maps, jnp.float32), shape, "linear")
    class_maps = class_maps.reshape(len(class_maps), -1, class_maps.shape[-1])
    one = functools.partial(localisation_cues, foreground_level=foreground_level, background_share=background_share)
    found = jax.vmap(one)(class_maps, peaks, present, quiet.reshape(len(quiet), -1))
    return found.reshape(quiet.shape).astype(jnp.uint8)


def read_cues(path: str | os.PathLike, names: Sequence[str], num_classes: int, grid: int) -> np.ndarray:
    """Cues from a file: a NumPy .npz with "ids" [M] str and "cues" [M, h, w] uint8, 255 where there is no cue.

    Args:
      path: the file. It is read without pickle.
      names: names of the N images that need cues; further ids are ignored.
      num_classes: K; the indices are those of the class list, background 0.
      grid: g, cells along a side of the result; taken by nearest neighbour.

    Returns:
      [N, g, g] uint8.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is no such file, an image has no cues in it, or an index is no class.
    """
    path = pathlib.Path(path)
    expected = 'a .npz with "ids" [M] of str and "cues" [M, h, w] of uint8'
    if not path.is_file():
        raise FileNotFoundError(f"no file of cues {path}: name {expected}, or leave baselines.cues.file empty")
    try:
        with np.load(path, allow_pickle=False) as stored:
            ids, cues = stored["ids"], stored["cues"]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected {expected}, cannot read it as one ({error})") from error
    if ids.ndim != 1 or cues.ndim != 3 or len(ids) != len(cues) or cues.dtype != np.uint8 or not cues.size:
        raise ValueError(f"{path}: expected {expected}, got {ids.dtype} {ids.shape} and {cues.dtype} {cues.shape}")
    rows = {str(name): row for row, name in enumerate(ids)}
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"{path}: no cues for {len(missing)} of {len(names)} images, the first is {missing[0]!r}")
    wrong = np.unique(cues[(cues >= num_classes) & (cues != NO_CUE)])
    if len(wrong):
        raise ValueError(f"{path}: expected indices of {num_classes} classes or {NO_CUE}, got {wrong[:5].tolist()}")
    height, width = cues.shape[1:]
    at = [((np.arange(grid) + 0.5) * cells / grid).astype(int) for cells in (height, width)]
    return cues[[rows[name] for name in names]][:, at[0]][:, :, at[1]]
