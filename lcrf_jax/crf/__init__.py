"""The dense conditional random field over the pixels of one image: its kernel, its energy, and mean field.

Read `params` first: the numbers of a CRF and what its Gaussians see of an image. `exact` and `spatial` are the two
Gaussians by their definition. Two forms of the bilateral one are faster: `lattice`, which `lattice_building` builds with
the help of `hashing`, and `anchors`, which `anchor_building` builds. `forms` says what all have in common, `kernel` and
`assembly` put them together, `image_kernels` makes a kernel for an image, `feature_kernels` one for a volume. On it stand
`energy`, the pairwise energy and the KL to the prior, `inference`, mean field with its `iterations`, and `loss`; the first
iterations may be made on the `coarse` grid of an image. `linear` has what makes all of it differentiable.

The room imports jax, numpy, einops and `lcrf_jax.numerics`, nothing else.
"""

from lcrf_jax.crf.coarse import CoarseGrid, coarse_grid
from lcrf_jax.crf.energy import kl_to_prior, pairwise_energy
from lcrf_jax.crf.exact import dense_kernel, filter_exact, gaussian_kernel
from lcrf_jax.crf.feature_kernels import KernelSum, feature_kernel, volume_features
from lcrf_jax.crf.image_kernels import anchor_image_kernel, exact_image_kernel, image_kernel, lattice_image_kernel
from lcrf_jax.crf.inference import MeanFieldPosterior, mean_field, mean_field_posterior, refine, refined_posterior
from lcrf_jax.crf.kernel import DenseKernel, ImageKernel, filter_symmetric, filter_with
from lcrf_jax.crf.loss import dense_crf_loss
from lcrf_jax.crf.params import KernelParams, guide_features

__all__ = [
    "CoarseGrid",
    "DenseKernel",
    "ImageKernel",
    "KernelParams",
    "KernelSum",
    "MeanFieldPosterior",
    "anchor_image_kernel",
    "coarse_grid",
    "dense_crf_loss",
    "dense_kernel",
    "exact_image_kernel",
    "feature_kernel",
    "filter_exact",
    "filter_symmetric",
    "filter_with",
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
]
