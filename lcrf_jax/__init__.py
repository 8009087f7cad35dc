"""Weakly supervised semantic segmentation with latent conditional random fields, in JAX.

The library is built in floors; a file imports from lower floors only, and floors 0 to 5 are pure functions of one
image that need nothing but jax, numpy and einops: `jax.vmap` makes the batch.

    0   numerics                              float promotion, entropies, checks
    1   kernels, anchors, hashing,            Gaussian filters; numbering distinct keys;
        sampling, metrics                     relaxed samples; IoU
    2   lattice, observation                  the permutohedral lattice; log p(y | z, x)
    3   filters                               the pairwise kernel of an image, in three forms
    4   crf, gibbs                            pairwise energy, KL to the prior, mean field; samples of the posterior
    5   elbo                                  the bound and the estimators of its gradient
    6   nets, data, objectives                Flax networks, sources and batches, what training minimises
    7   features, checkpoints, report, runlog frozen features of a source; run folders, pictures, metrics
    8   training, inference                   the train step over a mesh of devices; images in, masks out
    9   preparation, evaluation               what training starts from; scores
    10  runs                                  training with checkpoints, validation and resuming

Symbols, the same in code, docstrings and tests:

    x      [H, W, 3]          image, RGB, 0..255
    y      [K] bool           image tags; index 0 is background and always present
    z      [m, K]             pixel labels, the latent variables: m pixels, K classes, one-hot or relaxed
    g      [m, K]             logits of the inference network
    phi    [m, K]             q(z | x) = softmax(g): factorised, needs no tags
    k_ij   [m, m]             pairwise kernel of the dense CRF, k_ii = 0
    mu     [K, K]             label compatibility; Potts: mu(a, b) = [a != b]
"""

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
from lcrf_jax.sampling import block_groups, categorical, gumbel_softmax, straight_through

__all__ = [
    "ElboTerms",
    "KernelParams",
    "anchor_image_kernel",
    "area",
    "block_groups",
    "categorical",
    "class_evidence",
    "confusion_matrix",
    "dense_kernel",
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
    "image_kernel",
    "iou_per_class",
    "kl_to_prior",
    "lattice_image_kernel",
    "log_evidence",
    "log_mean_exp",
    "max_pool",
    "mean_field",
    "mean_iou",
    "mean_likelihood",
    "noisy_or",
    "pairwise_energy",
    "refine",
    "reinforce_likelihood",
    "scaled",
    "straight_through",
    "straight_through_likelihood",
]
__version__ = "0.1.0"
