"""Weakly supervised semantic segmentation with latent conditional random fields, in JAX.

The house has rooms. A room imports from those above it in this list, and the pure rooms, numerics to baselines, are
functions of one image that need nothing but jax, numpy and einops: `jax.vmap` makes the batch. The others need the
extra `train`.

    numerics      float promotion, entropies, checks of what is known before anything is computed
    crf           the dense CRF: its kernel in three forms, pairwise energy, KL to the prior, mean field
    bound         log p(y | x) from below: samples, likelihoods of the tags, the bound and the estimators of its gradient
    metrics       confusion matrix, intersection over union
    baselines     the compared methods' losses and targets, and a saliency
    machine       processes, signals, locks, caches on disk, progress
    nets          frozen backbones, trainable decoders, the tag classifier
    data          files, sources, views, batches
    runfolder     what a run leaves on disk: checkpoints, config.json, metrics
    pictures      colours and overlays, the report
    predict       images in, masks out; scores; `load`; export
    train         methods, what training starts from, the step, the loop

Each room begins with a paragraph that says in what order to read it.

Symbols, the same in code, docstrings and tests:

    x      [H, W, 3]          image, RGB, 0..255
    y      [K] bool           image tags; index 0 is background and always present
    z      [m, K]             pixel labels, the latent variables: m pixels, K classes, one-hot or relaxed
    g      [m, K]             logits of the inference network
    phi    [m, K]             q(z | x) = softmax(g): factorised, needs no tags
    k_ij   [m, m]             pairwise kernel of the dense CRF, k_ii = 0
    mu     [K, K]             label compatibility; Potts: mu(a, b) = [a != b]
"""

import importlib
import os
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lcrf_jax.names import *
    from lcrf_jax.predict.model import Model

# Names that said too little at the top level: (where they are now, what to write). They work for one release more.
_LIKELIHOODS = (
    "area", "evidence", "expected_evidence", "expected_max_pool", "frozen_classifier", "gwrp", "log_mean_exp", "max_pool",
    "noisy_or",
)  # fmt: skip
_MOVED = {name: ("lcrf_jax.bound.likelihoods", f"lcrf_jax.likelihoods.{name}") for name in _LIKELIHOODS}
_MOVED["scaled"] = ("lcrf_jax.crf.params", "params.at_stride(stride)")
_ROOMS = ("numerics", "crf", "bound", "metrics", "baselines")


def __getattr__(name: str) -> Any:
    """Public names and pure rooms, imported at their first use; names that have moved are found, with a word once."""
    if name in _ROOMS:
        return importlib.import_module(f"lcrf_jax.{name}")
    if name in __all__:
        found = globals()[name] = getattr(importlib.import_module("lcrf_jax.names"), name)
        return found
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, better = _MOVED[name]
    warnings.warn(f"lcrf_jax.{name} has moved: write {better}", DeprecationWarning, stacklevel=2)
    found = globals()[name] = getattr(importlib.import_module(module), name)
    return found


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__, *_ROOMS})


def load(checkpoint: str | os.PathLike, *, which: str = "best") -> "Model":
    """A trained model from the folder of a run: ``load(RUN).segment("photo.jpg").labels``.

    Args:
      checkpoint: the --workdir of a training run.
      which: ``best`` by the validation score, or ``last``.

    Returns:
      `lcrf_jax.predict.model.Model`.

    Raises:
      lcrf_jax.runfolder.description.CheckpointError: if the folder holds no run, or its files are damaged.
      ImportError: if the extra `train` is not installed.

    Example:
      >>> lcrf_jax.load("runs/demo").segment("photo.jpg").labels  # doctest: +SKIP
    """
    try:
        from lcrf_jax.predict.model import load as load_model
    except ModuleNotFoundError as error:
        raise ImportError(
            f"lcrf_jax.load needs what training needs ({error}): pip install '.[train]' in your clone"
        ) from error

    return load_model(checkpoint, which=which)

__all__ = [  # noqa: RUF022 - by room
    # numerics
    "checked_under_jit",
    # crf
    "CoarseGrid",
    "KernelParams",
    "MeanFieldPosterior",
    "anchor_image_kernel",
    "coarse_grid",
    "dense_crf_loss",
    "dense_kernel",
    "exact_image_kernel",
    "feature_kernel",
    "filter_exact",
    "gaussian_kernel",
    "guide_features",
    "image_kernel",
    "kl_to_prior",
    "lattice_image_kernel",
    "mean_field",
    "mean_field_posterior",
    "pairwise_energy",
    "refine",
    "refined_posterior",
    "volume_features",
    # bound
    "ElboTerms",
    "block_groups",
    "categorical",
    "class_evidence",
    "cue_evidence",
    "elbo",
    "expected_log_prob",
    "gibbs",
    "gumbel_softmax",
    "gumbel_softmax_likelihood",
    "likelihoods",
    "log_evidence",
    "mean_likelihood",
    "reinforce_likelihood",
    "straight_through",
    "straight_through_likelihood",
    # metrics
    "ConfusionCounts",
    "confusion_matrix",
    "format_iou_table",
    "iou_per_class",
    "mean_iou",
    # baselines
    "barrier_saliency",
    "ccnn_distribution",
    "ccnn_loss",
    "em_adapt_labels",
    "ilp_log_probs",
    "label_cross_entropy",
    "localisation_cues",
    "mil_lse_loss",
    "saliency_target",
    "sec_loss",
    "soft_cross_entropy",
    # predict
    "load",
]
__version__ = "0.1.0"
