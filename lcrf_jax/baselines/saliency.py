r"""A training-free saliency: minimum barrier distance to the image's border, and contrast to the border's colours.

After the method MB+ of Zhang et al. 2015, with sweeps over whole rows and columns in place of a raster scan, so that
it runs as a few vector operations on every device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.crf.params import colours as checked_colours
from lcrf_jax.numerics import (
    ONE_IMAGE,
    check_count,
    check_finite,
    check_number,
    check_shape,
    check_share,
    known_number,
    promote_float,
    varying_like,
)

_THICKNESS = 0.1
# sRGB to CIE XYZ, over the white point D65, IEC 61966-2-1.
_RGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_WHITE = (0.9505, 1.0, 1.089)


def lab_colours(image: ArrayLike, *, colour_max: float = 255.0) -> jax.Array:
    """CIE L*a*b* of an sRGB image, white point D65.

    Args:
      image: [..., 3] RGB in 0..colour_max.
      colour_max: the value of full colour: 255, or 1.
    Returns:
      [..., 3] float32; L* in 0..100, a* and b* about -128..127.
    Raises:
      ValueError: if the last axis is not 3, or a value that is known is not in 0..colour_max, see
        `lcrf_jax.crf.params.colours`.
    References:
      CIE 15:2004; IEC 61966-2-1 for sRGB.
    """
    if np.ndim(image) < 1 or np.shape(image)[-1] != 3:
        raise ValueError(f"image: expected RGB [..., 3], got {list(np.shape(image))}; convert it first")
    shape = np.shape(image)
    _check_colours(image, colour_max)
    flat = image.reshape(1, -1, 3) if isinstance(image, jax.Array) else np.reshape(image, (1, -1, 3))
    return _lab_colours(checked_colours(flat, colour_max=colour_max).reshape(shape))


def _check_colours(image, colour_max):
    check_finite("image", image, "decode it again")
    check_number("colour_max", colour_max, minimum=0, strict=True, remedy="255 and 1 are usual")
    if known_number(colour_max) is None:
        raise TypeError(f"colour_max: expected a number, got {colour_max!r}; 255 and 1 are usual")


def _lab_colours(rgb):
    rgb = rgb / 255
    linear = jnp.where(rgb <= 0.04045, rgb / 12.92, jnp.power((jnp.maximum(rgb, 0) + 0.055) / 1.055, 2.4))
    xyz = jnp.einsum("...c,xc->...x", linear, jnp.array(_RGB_TO_XYZ, rgb.dtype), precision=jax.lax.Precision.HIGHEST)
    xyz = xyz / jnp.array(_WHITE, rgb.dtype)
    root = jnp.where(xyz > (6 / 29) ** 3, jnp.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return jnp.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def barrier_distance(values: ArrayLike, *, num_passes: int = 3) -> jax.Array:
    r"""Minimum barrier distance of every pixel to the border of the image.

    .. math:: d(t) = \min_\pi \Bigl( \max_i v(\pi_i) - \min_i v(\pi_i) \Bigr)

    over the paths of 4-neighbours from the border to t. Each pass sweeps down, up, right and left; a pixel keeps the
    best path so far with its largest and least value. The result is never below the exact distance. It may exceed
    it, since the best path to a pixel need not be part of the best path to the next one.

    Args:
      values: [H, W] real.
      num_passes: static number of passes of four sweeps.
    Returns:
      [H, W] float32, >= 0, 0 on the border.
    Raises:
      ValueError: if `values` is not [H, W] or not finite, or `num_passes` is smaller than 1 or not whole.
    References:
      Strand et al. 2013, for the distance; Zhang et al. 2015, algorithm 1, for the passes.
    """
    check_shape("values", values, ("H", "W"), "pass one channel of one image; for a batch use jax.vmap")
    num_passes = check_count("num_passes", num_passes, minimum=1, remedy="3 is usual")
    check_finite("values", values, "look for a division by zero")
    return _barrier_distance(promote_float(values), num_passes)


def _barrier_distance(values, num_passes):
    height, width = values.shape
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    border = (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)
    state = tuple(varying_like(array, values) for array in (jnp.where(border, 0, jnp.inf), values, values))

    def extended(before, row):
        """The paths of the row before taken one step further, where that is better."""
        (_, high, low), (found, value) = before, row
        high, low = jnp.maximum(high, value), jnp.minimum(low, value)
        # A pixel that no path has reached cannot extend one.
        cost = jnp.where(jnp.isinf(before[0]), jnp.inf, high - low)
        kept = tuple(jnp.where(cost < found[0], new, old) for new, old in zip((cost, high, low), found))
        return kept, kept

    def down(state, values):
        first = tuple(array[0] for array in state)
        _, rest = jax.lax.scan(extended, first, (tuple(array[1:] for array in state), values[1:]))
        return tuple(jnp.concatenate([array[None], more]) for array, more in zip(first, rest))

    def down_and_up(state, values):
        state = tuple(array[::-1] for array in down(state, values))
        return tuple(array[::-1] for array in down(state, values[::-1]))

    def one_pass(_, state):
        state = tuple(array.T for array in down_and_up(state, values))
        return tuple(array.T for array in down_and_up(state, values.T))

    return jax.lax.fori_loop(0, num_passes, one_pass, state)[0]


def border_contrast(colours: ArrayLike, *, thickness: float = _THICKNESS) -> jax.Array:
    r"""How much each pixel differs from the colours of the border: the sum over four sides without the largest.

    With mean and covariance of each side, the Mahalanobis distance of every pixel to it, divided by its maximum; the
    largest of the four is left out of the sum, as the object may touch one side.

    Args:
      colours: [H, W, C] colours, such as `lab_colours`.
      thickness: of the sides, a share of the image in (0, 1]; a static number.
    Returns:
      [H, W] float32 in 0..3.
    Raises:
      ValueError: if `colours` is not [H, W, C] or not within 1e6, or `thickness` is not in (0, 1].
      TypeError: if `thickness` is no static number.
    References:
      Zhang et al. 2015, section 4.
    """
    check_shape("colours", colours, ("H", "W", "C"), ONE_IMAGE)
    check_share("thickness", thickness, "0.1 is usual")
    share = known_number(thickness)
    if share is None:
        raise TypeError(f"thickness: expected a static number, got {thickness!r}; close over it")
    check_finite("colours", colours, "bring them to about 0..255", minimum=-1e6, maximum=1e6)
    return _border_contrast(promote_float(colours), share)


def _border_contrast(colours, thickness):
    height, width, channels = colours.shape
    rows, columns = max(1, round(thickness * height)), max(1, round(thickness * width))
    distances = []
    for side in (colours[:rows], colours[-rows:], colours[:, :columns], colours[:, -columns:]):
        pixels = side.reshape(-1, channels)
        mean = pixels.mean(axis=0)
        centred = pixels - mean
        covariance = jnp.einsum("nc,nd->cd", centred, centred, precision=jax.lax.Precision.HIGHEST) / len(pixels)
        # A side of one colour has zero covariance; adding one unit of colour keeps the distance finite.
        inverse = jnp.linalg.inv(covariance + jnp.eye(channels, dtype=colours.dtype))
        away = colours - mean
        squared = jnp.einsum("hwc,cd,hwd->hw", away, inverse, away, precision=jax.lax.Precision.HIGHEST)
        distance = jnp.sqrt(jnp.maximum(squared, 0))
        distances.append(distance / jnp.maximum(distance.max(), 1e-6))
    every = jnp.stack(distances)
    return every.sum(axis=0) - every.max(axis=0)


def barrier_saliency(
    image: ArrayLike,
    *,
    num_passes: int = 3,
    contrast: ArrayLike = 10.0,
    level: ArrayLike = 1.5,
    colour_max: float = 255.0,
) -> jax.Array:
    r"""Saliency of an image: high where the border is far in barrier distance and colour, and the centre is near.

    The barrier distances of the three L*a*b* channels are summed; this and `border_contrast` are each brought to 0..1
    and added, the sum is multiplied by 1 - r, where r is the distance to the centre as a share of that of the corners,
    and the product is brought to 0..1 as v and sharpened about a multiple l of its mean,

    .. math:: s = \frac{1}{1 + \exp(-b (v - l\,\bar v))}

    A constant image has v = 0 throughout, and s = 1/2.

    Args:
      image: [H, W, 3] RGB in 0..colour_max; about 100 pixels a side are enough.
      num_passes: see `barrier_distance`.
      contrast: b > 0.
      level: l > 0.
      colour_max: the value of full colour: 255, or 1.
    Returns:
      [H, W] float32 in 0..1.
    Raises:
      ValueError: if `image` is not [H, W, 3], a number is out of range, or a value that is known is not in
        0..colour_max, see `lcrf_jax.crf.params.colours`.
    References:
      Zhang et al. 2015 (MB+, without its morphological smoothing); the multiple of the mean in place of a fixed
      midpoint: Achanta et al. 2009.
    Example:
      >>> import jax, numpy as np
      >>> from lcrf_jax import barrier_saliency
      >>> image = np.zeros((9, 9, 3), np.uint8)
      >>> image[3:6, 3:6] = 255
      >>> (jax.jit(barrier_saliency)(image) > 0.5)[4].astype(int).tolist()
      [0, 0, 0, 1, 1, 1, 0, 0, 0]
    """
    height, width, _ = check_shape("image", image, ("H", "W", 3), ONE_IMAGE)
    num_passes = check_count("num_passes", num_passes, minimum=1, remedy="3 is usual")
    check_number("contrast", contrast, minimum=0, strict=True, remedy="10 is usual")
    check_number("level", level, minimum=0, strict=True, remedy="1.5 is usual")
    _check_colours(image, colour_max)
    lab = _lab_colours(checked_colours(image, colour_max=colour_max))
    dtype = lab.dtype
    walled = sum(_barrier_distance(lab[..., channel], num_passes) for channel in range(3))
    unlike = _border_contrast(lab, _THICKNESS)
    rows, columns = (
        jnp.abs(jnp.linspace(-1, 1, size, dtype=dtype)) if size > 1 else jnp.zeros(1, dtype) for size in (height, width)
    )
    centredness = 1 - jnp.sqrt((rows[:, None] ** 2 + columns[None, :] ** 2) / 2)

    def stretched(values):
        values = values - values.min()
        return values / jnp.maximum(values.max(), 1e-6)

    values = stretched((stretched(walled) + stretched(unlike)) * centredness)
    return jax.nn.sigmoid(jnp.asarray(contrast, dtype) * (values - jnp.asarray(level, dtype) * values.mean()))
