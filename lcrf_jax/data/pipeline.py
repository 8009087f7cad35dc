"""From a source to the records of its views, or to its examples in order, read ahead in threads."""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from lcrf_jax.bound.record import Record
from lcrf_jax.data.example import Example, Source
from lcrf_jax.data.views import apply_view, apply_view_to_mask, sample_view
from lcrf_jax.machine.contents import WAS_THERE

_Item = TypeVar("_Item")
_Begun = TypeVar("_Begun")


class ViewDataset:
    """The views of a source's images as records of arrays, one after the other.

    Record ``view * len(source) + index`` shows view number ``view`` of image ``index``. A record holds
    name, image, tags, index and view and, where the source has masks, the mask; see `lcrf_jax.bound.record`.

    Args:
      source: the images.
      num_views: views of each image, at least 1; number 0 is the whole image, 1 mirrored, 2 and up random
        crops.
      size: side of the square images in pixels; the aspect is not kept.
      seed: names the random crops, 0 or more.
      scale_range: see `lcrf_jax.data.views.sample_view`.
      ratio_range: see `lcrf_jax.data.views.sample_view`.
    Raises:
      ValueError: if num_views or size is below 1.
    """

    def __init__(
        self,
        source: Source,
        num_views: int,
        size: int,
        *,
        seed: int = 0,
        scale_range: tuple[float, float] = (0.4, 1.0),
        ratio_range: tuple[float, float] = (0.75, 4 / 3),
    ) -> None:
        if num_views < 1 or size < 1:
            raise ValueError(f"num_views and size must be at least 1, got {num_views} and {size}")
        self.num_views = num_views
        self._source, self._size, self._seed = source, size, seed
        self._ranges = {"scale_range": scale_range, "ratio_range": ratio_range}
        self.source = source

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `sample_view` for these views: seed and ranges."""
        return {"seed": self._seed, **self._ranges}

    @property
    def identity(self) -> dict[str, Any]:
        """What the arrays of the records depend on, for keying a cache."""
        source = hashlib.sha256(repr(self._source.fingerprint).encode()).hexdigest()
        return {"source": source, "num_views": self.num_views, "size": self._size, **self.options}

    def __len__(self) -> int:
        return self.num_views * len(self._source)

    def __getitem__(self, position: int) -> Record:
        if not 0 <= position < len(self):
            raise IndexError(f"record {position} is outside the {len(self)} views")
        number, index = divmod(int(position), len(self._source))
        try:
            example = self._source[index]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. {WAS_THERE}") from error
        view = sample_view(self._seed, index, number, **self._ranges)
        size = self._size, self._size
        return Record(
            tags=example.tags,
            name=example.name,
            index=np.int32(index),
            view=np.int32(number),
            image=apply_view(example.image, view, size),
            mask=None if example.mask is None else apply_view_to_mask(example.mask, view, size),
        )


class ImageSubset:
    """The records of some of the images, in all of their views.

    Args:
      records: random access to ``num_views`` runs of N records.
      images: [M] indices of the images to keep, in order.
      num_views: number of runs.
    Raises:
      ValueError: if no image is kept.
    """

    def __init__(self, records: Sequence[Record], images: np.ndarray, num_views: int) -> None:
        if not len(images):
            raise ValueError("expected at least one image to keep, got none")
        self._records, self._images, self._num_views = records, np.asarray(images), num_views

    def __len__(self) -> int:
        return self._num_views * len(self._images)

    def __getitem__(self, position: int) -> Record:
        view, row = divmod(int(position), len(self._images))
        return self._records[view * (len(self._records) // self._num_views) + int(self._images[row])]


def prefetched(
    source: Source, num_threads: int = 2, indices: Sequence[int] | None = None
) -> Iterator[Example]:
    """The examples of a source in order, at their own size, read ahead in threads.

    Args:
      source: the images.
      num_threads: threads that read, at least 1; at most twice as many examples wait.
      indices: which examples; None for all.
    Returns:
      A generator of examples.
    Raises:
      ValueError: if num_threads is below 1. What reading an example raises, comes up at its turn.
    """
    if num_threads < 1:
        raise ValueError(f"num_threads must be at least 1, got {num_threads}")
    return read_ahead(source.__getitem__, range(len(source)) if indices is None else indices, num_threads)


def read_ahead(function: Callable[[int], Any], indices: Sequence[int], num_threads: int = 2) -> Iterator[Any]:
    """A function of many numbers in order, ahead in threads.

    Args:
      function: of one number.
      indices: the numbers.
      num_threads: threads; at most twice as many results wait.
    Returns:
      A generator of what the function returns. What it raises, comes up at its turn.
    """
    pool = concurrent.futures.ThreadPoolExecutor(num_threads, thread_name_prefix="lcrf-read")
    waiting: collections.deque = collections.deque()
    try:
        for index in indices:
            waiting.append(pool.submit(function, index))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def one_ahead(items: Iterable[_Item], begin: Callable[[_Item], _Begun]) -> Iterator[tuple[_Item, _Begun]]:
    """Each item with what was begun for it, given out after the next one has begun.

    Args:
      items: in order.
      begin: function of an item that starts what goes on in the background.
    Returns:
      A generator of (item, result of `begin`).
    """
    waiting = None
    for item in items:
        following = item, begin(item)
        if waiting is not None:
            yield waiting
        waiting = following
    if waiting is not None:
        yield waiting
