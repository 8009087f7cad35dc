"""The compared methods as pure functions of one image: losses, targets and their use at test time.

    mil        MIL + ILP          mil_lse_loss, ilp_log_probs, majority_labels
    em_adapt   EM-Adapt           em_adapt_labels, then label_cross_entropy
    ccnn       CCNN               ccnn_distribution, ccnn_loss
    sec        SEC                localisation_cues; seed_loss, expand_loss, constrain_loss, sec_loss
    stc        STC                saliency_target, then soft_cross_entropy; tagged_labels, then label_cross_entropy
    cam        CAM                cam_log_probs
    labels                        label_cross_entropy (full supervision, too), soft_cross_entropy

`saliency` is a saliency that needs no training. `lcrf_jax.train.methods` says how each method is trained. The room
imports jax, numpy, einops, `lcrf_jax.numerics`, `lcrf_jax.crf` and `lcrf_jax.bound`, nothing else.
"""

from lcrf_jax.baselines.cam import cam_log_probs
from lcrf_jax.baselines.ccnn import ConstrainedDistribution, ccnn_distribution, ccnn_loss
from lcrf_jax.baselines.em_adapt import em_adapt_labels
from lcrf_jax.baselines.labels import label_cross_entropy, soft_cross_entropy
from lcrf_jax.baselines.mil import ilp_log_probs, majority_labels, mil_lse_loss, mil_lse_scores
from lcrf_jax.baselines.sec import (
    NO_CUE,
    constrain_loss,
    expand_loss,
    floored_probs,
    localisation_cues,
    sec_loss,
    seed_loss,
)
from lcrf_jax.baselines.stc import saliency_target, tagged_labels

__all__ = [
    "NO_CUE",
    "ConstrainedDistribution",
    "cam_log_probs",
    "ccnn_distribution",
    "ccnn_loss",
    "constrain_loss",
    "em_adapt_labels",
    "expand_loss",
    "floored_probs",
    "ilp_log_probs",
    "label_cross_entropy",
    "localisation_cues",
    "majority_labels",
    "mil_lse_loss",
    "mil_lse_scores",
    "saliency_target",
    "sec_loss",
    "seed_loss",
    "soft_cross_entropy",
    "tagged_labels",
]
