"""Scores of a segmenter on images with masks."""

from typing import NamedTuple

import numpy as np

from lcrf_jax.data.pipeline import prefetched
from lcrf_jax.inference import segment, segment_batch
from lcrf_jax.metrics import confusion_matrix
from lcrf_jax.runlog import image_progress


class Scores(NamedTuple):
    """Confusion matrices of a split and a few of its images.

    Attributes:
      plain: [K, K] counts of the network's own labels.
      refined: [K, K] counts after mean field on the image, or None.
      smoothed: [K, K] counts after smoothing, or None.
      samples: list of (image, truth, labels, refined labels); samples are refined in any case.
    """

    plain: np.ndarray
    refined: np.ndarray | None
    smoothed: np.ndarray | None
    samples: list


def sample_positions(length, num_samples):
    """Which images of a split are kept as samples.

    Args:
      length: images of the split.
      num_samples: how many to keep.

    Returns:
      Increasing list of indices, evenly spaced; fewer if the split has fewer.
    """
    return sorted({int(at) for at in np.linspace(0, length - 1, num_samples)}) if num_samples else []


def evaluate(
    segmenter, source, *, crf, num_samples=0, batch_size=8, use_tags=False, features=None, smooth=None
):
    """Confusion matrices over all pixels of a source with masks, at the masks' own size.

    Args:
      segmenter: lcrf_jax.inference.Segmenter.
      source: images with masks.
      crf: whether to refine as well.
      num_samples: pictures to keep, evenly spaced over the split.
      batch_size: images that the network sees at once.
      use_tags: whether classes that are not tagged are excluded: the tags are then used at test time.
      features: for each input size the features of the source, see `lcrf_jax.features.test_time_features`; None
        computes them.
      smooth: function (image, labels of the network) -> labels, or None.

    Returns:
      Scores.
    """
    num_classes = len(segmenter.class_names)
    kept = set(sample_positions(len(source), num_samples))
    matrices = [0, 0 if crf else None, None if smooth is None else 0]
    samples, batch, index = [], [], 0
    with image_progress("evaluation", len(source)) as done:
        for example in prefetched(source):
            batch.append(example)
            index += 1
            if len(batch) < batch_size and index < len(source):
                continue
            tags = [example.tags for example in batch] if use_tags else None
            images = [example.image for example in batch]
            rows = slice(index - len(batch), index)
            known = None if features is None else [_batch_of(taps, rows, batch_size) for taps in features]
            results = segment_batch(
                segmenter, images, crf=crf, tags=tags, batch_size=batch_size, features=known
            )
            for number, (example, result) in enumerate(zip(batch, results)):
                labels = result.network_labels
                found = [labels, result.labels if crf else None]
                found.append(None if smooth is None else smooth(example.image, labels))
                for which, labels in enumerate(found):
                    if labels is not None:
                        matrices[which] = matrices[which] + confusion_matrix(labels, example.mask, num_classes)
                if index - len(batch) + number in kept:
                    if not crf:
                        tagged = example.tags if use_tags else None
                        found[1] = segment(segmenter, example.image, crf=True, tags=tagged).labels
                    samples.append((example.image, example.mask, *found[:2]))
            done(len(batch))
            batch = []
    return Scores(*matrices, samples)


def _batch_of(taps, rows, batch_size):
    """Rows of test-time features as the segmenter takes them: images, then mirrored ones, the last repeated to fill."""

    def laid_out(array):
        part = array[rows]
        part = np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), axis=0)])
        return part.swapaxes(0, 1).reshape(-1, *part.shape[2:])

    return {tap: laid_out(array) for tap, array in taps.items()}
