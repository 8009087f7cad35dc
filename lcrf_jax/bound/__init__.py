"""The evidence lower bound on log p(y | x): what the latent CRF maximises.

Read `sampling` first, the draws of labels z from q; then `likelihoods`, log p(y | z, x) in several forms, which stand
on the means of `pooling` and the checks of `arguments`, and `pixel_evidence`, the evidence of a frozen classifier for
each pixel; then `estimators`, the bound and four estimators
of its gradient. `chains` samples the posterior itself. `record` is what training knows of one view of an image, and
`objective` combines all this by configuration: one function of one record.

The room imports jax, numpy, einops, `lcrf_jax.numerics` and `lcrf_jax.crf`, nothing else.
"""

from lcrf_jax.bound.chains import GibbsSamples, gibbs
from lcrf_jax.bound.estimators import (
    ElboTerms,
    elbo,
    expected_log_prob,
    gumbel_softmax_likelihood,
    mean_likelihood,
    reinforce_likelihood,
    straight_through_likelihood,
)
from lcrf_jax.bound.likelihoods import (
    area,
    evidence,
    expected_evidence,
    expected_max_pool,
    frozen_classifier,
    gwrp,
    log_mean_exp,
    max_pool,
    noisy_or,
)
from lcrf_jax.bound.pixel_evidence import class_evidence, cue_evidence, log_evidence
from lcrf_jax.bound.sampling import block_groups, categorical, gumbel_softmax, straight_through

__all__ = [
    "ElboTerms",
    "GibbsSamples",
    "area",
    "block_groups",
    "categorical",
    "class_evidence",
    "cue_evidence",
    "elbo",
    "evidence",
    "expected_evidence",
    "expected_log_prob",
    "expected_max_pool",
    "frozen_classifier",
    "gibbs",
    "gumbel_softmax",
    "gumbel_softmax_likelihood",
    "gwrp",
    "log_evidence",
    "log_mean_exp",
    "max_pool",
    "mean_likelihood",
    "noisy_or",
    "reinforce_likelihood",
    "straight_through",
    "straight_through_likelihood",
]
