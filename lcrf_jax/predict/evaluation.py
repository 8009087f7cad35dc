"""Scores of a segmenter on images with masks."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lcrf_jax.data.example import Source
from lcrf_jax.data.parts import InParts
from lcrf_jax.data.pipeline import one_ahead, prefetched
from lcrf_jax.machine.errors import UserError, for_users
from lcrf_jax.machine.processes import is_first, share, total
from lcrf_jax.machine.progress import image_progress
from lcrf_jax.metrics import confusion_matrix, mean_iou
from lcrf_jax.predict.segmenter import Segmenter, begin_batch, image_workers, segment_batch

_STEPS = 1_000_000_000  # of a score, so that processes can add it up as a whole number


class Scores(NamedTuple):
    """Confusion matrices of a split and a few of its images.

    Attributes:
      plain: [K, K] counts of the network's own labels.
      refined: [K, K] counts after mean field on the image, or None.
      smoothed: [K, K] counts after smoothing, or None.
      samples: list of (image, truth, labels, refined labels); samples are refined in any case.
      parts: dict from "plain", and "refined" and "smoothed" where they are there, to the [P, K, K] counts of each part of the
        split; they add up to those of the split, which is one part where it was not given in several.
      image_scores: [N] mean IoU of each image by itself, over the classes in its mask or its labels, after refinement
        where there was one; NaN where its mask is void throughout.
    """

    plain: np.ndarray
    refined: np.ndarray | None
    smoothed: np.ndarray | None
    samples: list[tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]]
    image_scores: np.ndarray
    parts: Mapping[str, np.ndarray]


def sample_positions(length: int, num_samples: int) -> list[int]:
    """Which images of a split are kept as samples.

    Args:
      length: images of the split.
      num_samples: how many to keep.

    Returns:
      Increasing list of indices, evenly spaced; fewer if the split has fewer.
    """
    return sorted({int(at) for at in np.linspace(0, length - 1, num_samples)}) if num_samples else []


def evaluate(
    segmenter: Segmenter,
    source: Source | InParts,
    *,
    crf: bool,
    num_samples: int = 0,
    batch_size: int = 8,
    use_tags: bool = False,
    features: Sequence[Mapping[str, np.ndarray]] | None = None,
    smooth: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Scores:
    """Confusion matrices over all pixels of a source with masks, at the masks' own size.

    Each of several processes scores its share of the images. The counts are added up exactly, and all processes get
    them. Only the first process has samples.

    Args:
      segmenter: lcrf_jax.predict.segmenter.Segmenter.
      source: images with masks, in parts or as a whole.
      crf: whether to refine as well.
      num_samples: pictures to keep, evenly spaced over the split.
      batch_size: images that the network sees at once.
      use_tags: whether the tags are used at test time: classes that an image is not tagged with are excluded.
      features: for each input size the features of the source, see `lcrf_jax.train.features.test_time_features`; None
        computes them.
      smooth: function (image, labels of the network) -> labels, or None.

    Returns:
      Scores.

    Raises:
      UserError: if an image cannot be read any more; no part is scored.
    """
    given = source if isinstance(source, InParts) else InParts(source, np.zeros(len(source), np.int64), ("",))
    (images, part_of, splits), num_classes = given, len(segmenter.class_names)
    names = ("plain", *(("refined",) if crf else ()), *(() if smooth is None else ("smoothed",)))
    matrices = {name: np.zeros((len(splits), num_classes, num_classes), np.int64) for name in names}
    indices, steps = share(len(images)), np.zeros(len(images), np.int64)
    with image_progress("evaluation", len(indices)) as done, image_workers() as workers:

        def begin(batch):
            rows, examples = batch
            return begin_batch(
                segmenter, [example.image for example in examples], workers, crf=crf, batch_size=batch_size,
                features=None if features is None else [_batch_of(taps, rows, batch_size) for taps in features],
                tags=[example.tags for example in examples] if use_tags else None,
            )

        for (rows, examples), results in one_ahead(_batches(images, indices, batch_size), begin):
            for row, example, result in zip(rows, examples, results, strict=True):
                counts = {name: _counts(name, example, result, smooth, num_classes) for name in names}
                for name in names:
                    matrices[name][part_of[row]] += counts[name]
                steps[row] = _as_integer(mean_iou(counts["refined" if crf else "plain"]))
            done(len(examples))
    parts, image_scores = {name: total(matrix) for name, matrix in matrices.items()}, total(steps) / _STEPS
    totals = {name: matrix.sum(axis=0) for name, matrix in parts.items()}
    positions = sample_positions(len(images), num_samples)
    samples = []
    if is_first():
        with _no_part_is_scored(images):
            samples = labelled_samples(
                segmenter, images, positions, batch_size=batch_size, use_tags=use_tags, features=features
            )
    return Scores(
        totals["plain"], totals.get("refined"), totals.get("smoothed"), samples,
        np.where(image_scores < 0, np.nan, image_scores), parts,
    )


def _counts(name, example, result, smooth, num_classes):
    """[K, K] counts of one image."""
    labels = result.labels if name == "refined" else result.network_labels
    labels = smooth(example.image, labels) if name == "smoothed" else labels
    return confusion_matrix(labels, example.mask, num_classes)


def _as_integer(score):
    """A score as a whole number of steps, which processes can add up exactly; negative for none."""
    return -1 if np.isnan(score) else round(float(score) * _STEPS)


def _batches(source, indices, batch_size):
    """(indices, examples) of each batch, the last one as long as it is."""
    examples = prefetched(source, indices=indices)
    for start in range(0, len(indices), batch_size):
        rows = list(indices[start : start + batch_size])
        with _no_part_is_scored(source):
            batch = [next(examples) for _ in rows]
        yield rows, batch


@contextlib.contextmanager
def _no_part_is_scored(source):
    """What cannot be read any more ends the scoring, with a remedy: the files were looked at before it began."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not for_users(error):
            raise
        raise UserError(
            f"{error}. Nothing is scored, since a part of {source.split} would have another score. Bring the file back, or take it out of the "
            "split, and run the same command again"
        ) from error


def labelled_samples(
    segmenter: Segmenter,
    source: Source,
    positions: Sequence[int],
    *,
    batch_size: int = 1,
    use_tags: bool = False,
    features: Sequence[Mapping[str, np.ndarray]] | None = None,
) -> list[tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]]:
    """Images of a source with their masks and labels.

    Args:
      segmenter: lcrf_jax.predict.segmenter.Segmenter.
      source: images, with or without masks.
      positions: indices of the images.
      batch_size, use_tags, features: see `evaluate`.

    Returns:
      List of (image, truth or None, labels of the network, refined labels).
    """
    samples = []
    for position in positions:
        example = source[position]
        known = None if features is None else [_batch_of(taps, [position], batch_size) for taps in features]
        [result] = segment_batch(
            segmenter, [example.image], crf=True, batch_size=batch_size, features=known,
            tags=[example.tags] if use_tags else None,
        )
        samples.append((example.image, example.mask, result.network_labels, result.labels))
    return samples


def _batch_of(taps, rows, batch_size):
    """Rows of test-time features as the segmenter takes them: images, then mirrored ones, the last repeated to fill."""

    def laid_out(array):
        part = array[rows]
        part = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
        return part.swapaxes(0, 1).reshape(-1, *part.shape[2:])

    return {tap: laid_out(array) for tap, array in taps.items()}
