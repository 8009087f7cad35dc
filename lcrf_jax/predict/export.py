"""A trained run as one function of images, and as a file that needs JAX alone: StableHLO, by `jax.export`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from lcrf_jax.predict.refinement import MAX_VERTICES_PER_PIXEL
from lcrf_jax.predict.segmenter import make_segmenter

PLATFORMS = ("cpu", "cuda", "tpu")


def image_function(
    description: Mapping[str, Any], params: Mapping[str, Any], *, crf: bool
) -> Callable[[jax.Array], jax.Array]:
    """Segmentation of a batch of images of one size as a pure function.

    It does what `lcrf_jax.predict.segmenter.segment` does, in JAX from end to end. Images become squares, bicubic as in
    Pillow but not rounded to whole numbers. The network's log-probabilities are averaged over sizes and mirroring, and
    enlarged to the size of the images. They are refined by mean field there, if that is wanted. Images are never made
    smaller, whatever their size.

    Args:
      description: of the run, see `lcrf_jax.runfolder.description`.
      params: its parameters for inference.
      crf: whether to refine. The images' height and width are then static.

    Returns:
      Function from [B, H, W, 3] uint8 RGB to probabilities [B, H, W, K] float32.
    """
    segmenter = make_segmenter(description, params)

    def function(images):
        height, width = images.shape[1:3]
        total = 0.0
        for size in segmenter.input_sizes:
            grid = segmenter.network_log_probs(squares(images, size))
            rows, columns = (_weights(*each) for each in zip(grid.shape[1:3], (height, width)))
            logits = jnp.einsum("Hh,bhwk,Ww->bHWk", rows, grid, columns, precision=jax.lax.Precision.HIGHEST)
            total += jax.nn.log_softmax(logits, axis=-1)
        log_probs = jax.nn.log_softmax(total / len(segmenter.input_sizes), axis=-1)
        if crf:
            log_probs = jax.lax.map(lambda each: _refined(segmenter, *each), (log_probs, images))
        return jnp.exp(log_probs)

    return function


def squares(images: jax.Array, size: int) -> jax.Array:
    """Images as the network sees them.

    Args:
      images: [B, H, W, 3] uint8 RGB.
      size: side in pixels.

    Returns:
      [B, size, size, 3] float32 in 0..255; bicubic and antialiased.
    """
    resized = jax.image.resize(
        images.astype(jnp.float32), (images.shape[0], size, size, 3), "cubic", precision=jax.lax.Precision.HIGHEST
    )
    return jnp.clip(resized, 0, 255)


def _weights(cells, pixels):
    """[pixels, cells] bilinear weights, as `lcrf_jax.predict.resizing.interpolation_weights`, of a size that may be symbolic."""
    centres = (jnp.arange(pixels) + 0.5) * cells / pixels - 0.5
    centres = jnp.clip(centres, 0, cells - 1)
    return jnp.maximum(0, 1 - jnp.abs(centres[:, None] - jnp.arange(cells)[None, :]))


def _refined(segmenter, log_probs, image):
    """Log-probabilities after mean field, with the largest number of lattice vertices if the usual one is too small."""
    valid = jnp.ones(image.shape[:2], bool)
    refined = segmenter.refine(log_probs, image, valid)
    again = functools.partial(segmenter.refine, capacity=valid.size * MAX_VERTICES_PER_PIXEL)
    return jax.lax.cond(jnp.isnan(refined).any(), lambda: again(log_probs, image, valid), lambda: refined)


def exported(
    function: Callable[[jax.Array], jax.Array],
    *,
    size: tuple[int, int] | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> jax_export.Exported:
    """A function of images as a program of `jax.export`, for batches of any number of images.

    Args:
      function: see `image_function`.
      size: (H, W) in pixels of the images; None for images of any size.
      platforms: some of PLATFORMS.

    Returns:
      jax.export.Exported; ``serialize()`` gives the bytes of the file.

    Raises:
      ValueError: if a platform is not known.
    """
    unknown = set(platforms) - set(PLATFORMS)
    if unknown or not platforms:
        raise ValueError(f"platforms: expected some of {', '.join(PLATFORMS)}, got {', '.join(platforms) or 'none'}")
    height, width = ("height", "width") if size is None else size
    constraints = () if size is not None else ("height >= 1", "width >= 1")
    shape = jax_export.symbolic_shape(f"batch, {height}, {width}, 3", constraints=constraints)
    return jax_export.export(jax.jit(function), platforms=platforms)(jax.ShapeDtypeStruct(shape, np.uint8))
