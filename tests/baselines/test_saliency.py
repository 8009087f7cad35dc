"""The training-free saliency: barrier distance against an exhaustive search, colours against known ones, pictures by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled_functions

from lcrf_jax.baselines import saliency

saliency = compiled_functions(saliency)


def exact_barrier_distance(values):
    """The least hi - lo such that pixels with values in lo..hi connect the pixel with the border."""
    height, width = values.shape
    best = np.full(values.shape, np.inf)
    for low in np.unique(values):
        for high in np.unique(values[values >= low]):
            open_pixels = (values >= low) & (values <= high)
            reached = np.zeros(values.shape, bool)
            queue = [(r, c) for r, c in np.ndindex(height, width)
                     if open_pixels[r, c] and (r in (0, height - 1) or c in (0, width - 1))]
            while queue:
                r, c = queue.pop()
                if reached[r, c]:
                    continue
                reached[r, c] = True
                queue += [(a, b) for a, b in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1))
                          if 0 <= a < height and 0 <= b < width and open_pixels[a, b]]
            best = np.where(reached, np.minimum(best, high - low), best)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_sweeps_are_never_below_the_exact_distance_and_seldom_above(seed):
    values = np.random.default_rng(seed).uniform(size=(7, 8)).astype(np.float32)
    exact, found = exact_barrier_distance(values), np.asarray(jax.jit(saliency.barrier_distance)(values))
    assert (found >= exact - 1e-6).all()
    assert np.mean(found > exact + 1e-6) <= 0.25 and found.mean() <= 1.1 * exact.mean()


def test_barrier_distance_by_hand():
    """A wall of 5 with a hole of 2 around a courtyard of 1: the way in leads through the hole."""
    values = np.zeros((5, 6), np.float32)
    values[1:4, 1:5] = 5
    values[2, 2:4], values[1, 2] = 1, 2
    expected = np.zeros((5, 6))
    expected[1:4, 1:5] = 5
    expected[1, 2], expected[2, 2:4] = 2, 2
    np.testing.assert_array_equal(saliency.barrier_distance(values), expected)
    np.testing.assert_array_equal(saliency.barrier_distance(-values), expected)


def test_turning_the_image_turns_the_distance():
    rows, columns = np.mgrid[:9, :11]
    values = np.float32(np.abs(rows - 4) * 3 + np.abs(columns - 3) ** 2)
    found = np.asarray(saliency.barrier_distance(values))
    assert found[4, 3] == exact_barrier_distance(values)[4, 3] > 0
    for turned in (np.rot90, np.flipud, np.transpose):
        np.testing.assert_array_equal(saliency.barrier_distance(turned(values)), turned(found))


@pytest.mark.parametrize(("rgb", "lab"), [
    ((255, 255, 255), (100, 0, 0)), ((0, 0, 0), (0, 0, 0)), ((255, 0, 0), (53.24, 80.09, 67.2)),
    ((0, 255, 0), (87.73, -86.18, 83.18)), ((0, 0, 255), (32.3, 79.19, -107.86)), ((119, 119, 119), (50.03, 0, 0)),
])
def test_colours_are_those_of_the_standard(rgb, lab):
    np.testing.assert_allclose(saliency.lab_colours(jnp.array(rgb, jnp.uint8)), lab, atol=0.05)


def test_contrast_to_the_border_by_hand():
    """Grey sides and one white pixel in the middle: it is the furthest from all four, and three count."""
    colours = np.zeros((9, 9, 3), np.float32)
    colours[4, 4] = 100
    expected = np.zeros((9, 9))
    expected[4, 4] = 3
    np.testing.assert_allclose(saliency.border_contrast(colours), expected, atol=1e-5)
    # A side that the object fills is forgiven: the largest of the four is left out.
    colours[:, -1:] = 100
    assert saliency.border_contrast(colours)[4, 0] < 1 < saliency.border_contrast(colours)[4, 4]


def disc(size=40):
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    inside = rows**2 + columns**2 < (size / 5) ** 2
    noise = np.random.default_rng(0).normal(0, 4, (size, size, 3))
    return np.clip(np.where(inside[..., None], (200, 60, 40), (90, 120, 90)) + noise, 0, 255), inside


@pytest.mark.slow
def test_what_is_walled_off_is_salient():
    image, inside = disc()
    found = np.asarray(jax.jit(saliency.barrier_saliency)(image))
    assert found.dtype == np.float32 and 0 <= found.min() and found.max() <= 1
    assert found[inside].mean() > 0.9 and found[~inside].mean() < 0.2
    sharper = np.asarray(saliency.barrier_saliency(image, contrast=30.0))
    assert np.ptp(sharper) >= np.ptp(found)
    assert (saliency.barrier_saliency(image, level=3.0) <= found + 1e-6).all()


@pytest.mark.slow
def test_a_batch_is_the_images_one_by_one():
    images = np.stack([disc()[0], disc()[0][::-1] // 2, np.full((40, 40, 3), 7.0)])
    together = jax.vmap(saliency.barrier_saliency)(images)
    for image, found in zip(images, together):
        np.testing.assert_allclose(saliency.barrier_saliency(image), found, atol=2e-5)


@pytest.mark.slow_except("255-shape1")
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 3), (2, 2, 3), (5, 5, 3)])
@pytest.mark.parametrize("value", [0, 255])
def test_constant_and_tiny_images_are_finite(shape, value):
    np.testing.assert_allclose(saliency.barrier_saliency(np.full(shape, value, np.uint8)), 0.5, atol=1e-3)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: saliency.barrier_saliency(np.zeros((4, 4))), "use jax.vmap"),
    (lambda: saliency.barrier_saliency(np.zeros((4, 4, 3)), contrast=0), "contrast: expected a finite number > 0"),
    (lambda: saliency.barrier_saliency(np.zeros((4, 4, 3)), level=0), "level: expected a finite number > 0"),
    (lambda: saliency.barrier_distance(np.zeros((4, 4, 3))), "use jax.vmap"),
    (lambda: saliency.barrier_distance(np.zeros((4, 4)), num_passes=0), "num_passes"),
    (lambda: saliency.lab_colours(np.zeros((4, 4))), "expected RGB"),
    (lambda: saliency.border_contrast(np.zeros((4, 4, 3)), thickness=0), "thickness"),
])
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
