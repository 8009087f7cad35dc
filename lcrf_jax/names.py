"""The public names of the pure rooms, imported when the first of them is used: JAX takes seconds to import.

`import lcrf_jax` alone, and what only asks for its version or its commands, do not wait for it.
"""

# ruff: noqa: F401 - `lcrf_jax.__all__` has these names
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
from lcrf_jax.baselines.saliency import barrier_saliency
from lcrf_jax.bound import likelihoods
from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.estimators import (
    ElboTerms,
    elbo,
    expected_log_prob,
    gumbel_softmax_likelihood,
    mean_likelihood,
    reinforce_likelihood,
    straight_through_likelihood,
)
from lcrf_jax.bound.pixel_evidence import class_evidence, cue_evidence, log_evidence
from lcrf_jax.bound.sampling import block_groups, categorical, gumbel_softmax, straight_through
from lcrf_jax.crf.coarse import CoarseGrid, coarse_grid
from lcrf_jax.crf.energy import kl_to_prior, pairwise_energy
from lcrf_jax.crf.exact import dense_kernel, filter_exact, gaussian_kernel
from lcrf_jax.crf.feature_kernels import feature_kernel, volume_features
from lcrf_jax.crf.image_kernels import anchor_image_kernel, exact_image_kernel, image_kernel, lattice_image_kernel
from lcrf_jax.crf.inference import MeanFieldPosterior, mean_field, mean_field_posterior, refine, refined_posterior
from lcrf_jax.crf.loss import dense_crf_loss
from lcrf_jax.crf.params import KernelParams, guide_features
from lcrf_jax.metrics import ConfusionCounts, confusion_matrix, format_iou_table, iou_per_class, mean_iou
from lcrf_jax.numerics import checked_under_jit
