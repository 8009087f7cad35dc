"""The dense-CRF loss as one call, for the training of any network."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lcrf_jax.crf.energy import pairwise_energy
from lcrf_jax.crf.image_kernels import image_kernel
from lcrf_jax.crf.params import KernelParams, check_image_shape, checked_params, colours
from lcrf_jax.numerics import check_logits, check_number, check_shape, promote_float


def dense_crf_loss(
    image: ArrayLike,
    logits: ArrayLike,
    params: KernelParams = KernelParams(),  # noqa: B008 - a tuple of numbers
    *,
    stride: float | None = None,
    form: str | None = None,
    normalisation: str = "symmetric",
    valid: ArrayLike | None = None,
    colour_max: float | None = 255.0,
) -> jax.Array:
    r"""The pairwise energy of a network's output on an image, per pixel of the output: a regulariser of its training.

    .. math:: \frac{1}{hw} \sum_{i<j} k_{ij}\,\phi_i^\top \mu\,\phi_j, \qquad \phi = \mathrm{softmax}(g)

    with Potts costs. The image is averaged down to the grid of the logits, and the position widths with it. Add it to
    your own loss with a weight of your own; `jax.vmap` makes the batch. Derivatives in the logits and in the weights
    of `params`: all modes and orders; the image is data, and no derivative is taken in it.

    Args:
      image: [H, W, C] colours, see `lcrf_jax.crf.params.colours`.
      logits: [h, w, K] the network's output for this image, at a stride or at its size.
      params: `KernelParams` in pixels of the image; the default is the usual one.
      stride: pixels of the image per cell of the logits, > 0; None is sqrt(H W / h w).
      form: of the kernel, see `image_kernel`; None chooses.
      normalisation: of the kernel, see `image_kernel`.
      valid: [h, w] booleans, the cells that count, see `image_kernel`; None is all.
      colour_max: the value of full colour in `image`: 255, or 1.
    Returns:
      Scalar, >= 0 but for the rounding of anchors, divided by h w.
    Raises:
      ValueError: if the shapes do not fit, or a number or a value that is known is out of range.
    References:
      Tang et al. 2018, On Regularized Losses for Weakly-supervised CNN Segmentation.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import dense_crf_loss
      >>> image, logits = np.zeros((32, 48, 3), np.uint8), np.zeros((4, 6, 2))
      >>> round(float(dense_crf_loss(image, logits, stride=8)), 2)  # unsure everywhere, in one colour
      2.45
    """
    height, width, _ = check_image_shape(image)
    remedy = "give the network's output for this image, height first, classes last; for a batch use jax.vmap"
    rows, columns, num_classes = check_shape("logits", logits, ("h", "w", "K"), remedy)
    if rows > height or columns > width or (rows < columns) != (height < width) and height != width and rows != columns:
        raise ValueError(f"logits: expected a grid of the image {height}x{width}, got {rows}x{columns}; {remedy}")
    check_logits("logits", logits)
    check_number("stride", stride, minimum=0, strict=True, remedy="None takes it from the sizes")
    checked_params(params)
    stride = (height * width / (rows * columns)) ** 0.5 if stride is None else stride
    guide = jax.lax.stop_gradient(colours(image, colour_max=colour_max))
    if (rows, columns) != (height, width):
        guide = jax.image.resize(guide, (rows, columns, guide.shape[-1]), "linear")
        if colour_max is not None:
            guide = jnp.clip(guide, 0, 255)
    kernel = image_kernel(
        guide,
        params.at_stride(stride),
        form=form,
        normalisation=normalisation,
        valid=valid,
        colour_max=None if colour_max is None else 255.0,
    )
    probs = jax.nn.softmax(promote_float(logits).reshape(-1, num_classes), axis=-1)
    return pairwise_energy(probs, kernel) / (rows * columns)
