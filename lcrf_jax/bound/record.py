"""What training knows of one view of one image: what the network sees and what the objective sees."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

Array = np.ndarray | np.generic | jax.Array


class Record(NamedTuple):
    """One view of one image, or with a leading axis B on every array a batch of them; what is absent is None.

    A view is a part of the image, mirrored or not, at S x S pixels; g x g are the cells of the logits.

    Attributes:
      tags: [K] bool, the image tags y; index 0 is background and always True.
      name: identifier of the image; of a batch an array of str. It stays on the host.
      index: int32, number of the image in its source.
      view: int32, number of the view.
      epoch: int32, the epoch that the loader is in.
      image: [S, S, 3] uint8, RGB; None where `features` takes its place.
      features: dict from tap of the frozen backbone to [h, w, C].
      guide: [s, s, 3], the colours that the pairwise kernel sees.
      mask: [S, S] uint8 classes, 255 for void.
      class_maps: [g, g, K - 1] maps of the tag classifier, without bias.
      peaks: [K - 1] maximum of each map over the whole image.
      bias: [K - 1] of the tag classifier.
      pixel_evidence: [g, g, K] evidence of the round before, in the place of the class maps.
      gradient_saliency: [g, g, 1] rank of that of the tag classifier.
      objectness: [g, g, 1] in 0..1, see `lcrf_jax.nets.objectness.objectness`.
      cues: [g, g] uint8 localisation cues, 255 for none.
      saliency: [g, g, 1] saliency of the image.
      chain: [g, g] uint8, where the Markov chain of the view stands.
    """

    tags: Array
    name: str | np.ndarray | None = None
    index: Array | None = None  # type: ignore[assignment]  # the method of tuples of that name is of no use here
    view: Array | None = None
    epoch: Array | None = None
    image: Array | None = None
    features: Mapping[str, Array] | None = None
    guide: Array | None = None
    mask: Array | None = None
    class_maps: Array | None = None
    peaks: Array | None = None
    bias: Array | None = None
    pixel_evidence: Array | None = None
    gradient_saliency: Array | None = None
    objectness: Array | None = None
    cues: Array | None = None
    saliency: Array | None = None
    chain: Array | None = None
