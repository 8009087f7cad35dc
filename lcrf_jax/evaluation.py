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
      samples: list of (image, truth, labels, refined labels); samples are refined in any case.
    """

    plain: np.ndarray
    refined: np.ndarray | None
    samples: list


def evaluate(segmenter, source, *, crf, num_samples=0, batch_size=8, use_tags=False):
    """Confusion matrices over all pixels of a source with masks, at the masks' own size.

    Args:
      segmenter: lcrf_jax.inference.Segmenter.
      source: images with masks.
      crf: whether to refine as well.
      num_samples: pictures to keep, evenly spaced over the split.
      batch_size: images that the network sees at once.
      use_tags: whether classes that are not tagged are excluded: the tags are then used at test time.

    Returns:
      Scores.
    """
    num_classes = len(segmenter.class_names)
    kept = set(np.linspace(0, len(source) - 1, num_samples).astype(int)) if num_samples else set()
    matrices, samples, batch, index = [0, 0 if crf else None], [], [], 0
    with image_progress("evaluation", len(source)) as done:
        for example in prefetched(source):
            batch.append(example)
            index += 1
            if len(batch) < batch_size and index < len(source):
                continue
            tags = [example.tags for example in batch] if use_tags else None
            images = [example.image for example in batch]
            for number, (example, result) in enumerate(
                zip(batch, segment_batch(segmenter, images, crf=crf, tags=tags, batch_size=batch_size))
            ):
                found = [result.network_labels, result.labels if crf else None]
                for which, labels in enumerate(found):
                    if labels is not None:
                        matrices[which] = matrices[which] + confusion_matrix(labels, example.mask, num_classes)
                if index - len(batch) + number in kept:
                    if not crf:
                        tagged = example.tags if use_tags else None
                        found[1] = segment(segmenter, example.image, crf=True, tags=tagged).labels
                    samples.append((example.image, example.mask, *found))
            done(len(batch))
            batch = []
    return Scores(*matrices, samples)
