"""Weakly supervised semantic segmentation with latent conditional random fields, in JAX.

The library is built in floors; a file imports from lower floors only, and floors 0 to 5 are pure functions of one
image that need nothing but jax, numpy and einops: `jax.vmap` makes the batch.

    0   numerics                              float promotion, entropies, checks
    1   kernels, anchors, hashing,            Gaussian filters; numbering distinct keys;
        sampling, metrics, saliency           relaxed samples; IoU; minimum barrier saliency
    2   lattice, observation                  the permutohedral lattice; log p(y | z, x)
    3   filters                               the pairwise kernel of an image, in three forms
    4   crf, gibbs                            pairwise energy, KL to the prior, mean field; samples of the posterior
    5   elbo, baselines                       the bound and the estimators of its gradient; the compared methods
    6   locks, processes, signals             what runs have to do with the machine
    7   nets, data, objectives, descriptions  Flax networks, sources and batches, what training minimises
    8   methods, features, checkpoints,       what each method minimises; frozen features of a source;
        report, runlog                        run folders, pictures, metrics
    9   training, cues, inference             the train step over a mesh of devices; cues; images in, masks out
    10  preparation, evaluation,              what training starts from; scores; large pictures in tiles;
        tiling, trained                       a trained run as one object, `load`
    11  runs                                  training with checkpoints, validation and resuming

Symbols, the same in code, docstrings and tests:

    x      [H, W, 3]          image, RGB, 0..255
    y      [K] bool           image tags; index 0 is background and always present
    z      [m, K]             pixel labels, the latent variables: m pixels, K classes, one-hot or relaxed
    g      [m, K]             logits of the inference network
    phi    [m, K]             q(z | x) = softmax(g): factorised, needs no tags
    k_ij   [m, m]             pairwise kernel of the dense CRF, k_ii = 0
    mu     [K, K]             label compatibility; Potts: mu(a, b) = [a != b]
"""

from lcrf_jax.baselines import (
    ccnn_distribution,
    ccnn_loss,
    em_adapt_labels,
    ilp_log_probs,
    label_cross_entropy,
    localisation_cues,
    mil_lse_loss,
    saliency_target,
    sec_loss,
    soft_cross_entropy,
)
from lcrf_jax.crf import kl_to_prior, mean_field, pairwise_energy, refine
from lcrf_jax.elbo import (
    ElboTerms,
    expected_log_prob,
    gumbel_softmax_likelihood,
    mean_likelihood,
    reinforce_likelihood,
    straight_through_likelihood,
)
from lcrf_jax.filters import anchor_image_kernel, exact_image_kernel, image_kernel, lattice_image_kernel
from lcrf_jax.kernels import KernelParams, dense_kernel, filter_exact, gaussian_kernel, guide_features, scaled
from lcrf_jax.metrics import confusion_matrix, format_iou_table, iou_per_class, mean_iou
from lcrf_jax.observation import (
    area,
    class_evidence,
    cue_evidence,
    evidence,
    expected_evidence,
    expected_max_pool,
    frozen_classifier,
    gwrp,
    log_evidence,
    log_mean_exp,
    max_pool,
    noisy_or,
)
from lcrf_jax.saliency import barrier_saliency
from lcrf_jax.sampling import block_groups, categorical, gumbel_softmax, straight_through


def load(checkpoint, *, which="best"):
    """A trained model from the folder of a run: ``load(RUN).segment("photo.jpg").labels``.

    Args:
      checkpoint: the --workdir of a training run.
      which: ``best`` by the validation score, or ``last``.

    Returns:
      `lcrf_jax.trained.Model`.

    Raises:
      lcrf_jax.descriptions.CheckpointError: if the folder holds no run, or its files are damaged.
    """
    from lcrf_jax.trained import load as load_model  # it needs orbax and Flax, the pure functions do not

    return load_model(checkpoint, which=which)


__all__ = [
    "ElboTerms",
    "KernelParams",
    "anchor_image_kernel",
    "area",
    "barrier_saliency",
    "block_groups",
    "categorical",
    "ccnn_distribution",
    "ccnn_loss",
    "class_evidence",
    "confusion_matrix",
    "cue_evidence",
    "dense_kernel",
    "em_adapt_labels",
    "evidence",
    "exact_image_kernel",
    "expected_evidence",
    "expected_log_prob",
    "expected_max_pool",
    "filter_exact",
    "format_iou_table",
    "frozen_classifier",
    "gaussian_kernel",
    "guide_features",
    "gumbel_softmax",
    "gumbel_softmax_likelihood",
    "gwrp",
    "ilp_log_probs",
    "image_kernel",
    "iou_per_class",
    "kl_to_prior",
    "label_cross_entropy",
    "lattice_image_kernel",
    "load",
    "localisation_cues",
    "log_evidence",
    "log_mean_exp",
    "max_pool",
    "mean_field",
    "mean_iou",
    "mean_likelihood",
    "mil_lse_loss",
    "noisy_or",
    "pairwise_energy",
    "refine",
    "reinforce_likelihood",
    "saliency_target",
    "scaled",
    "sec_loss",
    "soft_cross_entropy",
    "straight_through",
    "straight_through_likelihood",
]
__version__ = "0.1.0"
