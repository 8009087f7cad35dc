"""Views of an image: drawn from the seed, and the same for image, map and mask."""

import numpy as np
import pytest

from lcrf_jax.data.views import FULL, MIRRORED, View, apply_view, apply_view_to_mask, sample_view

CROP = View((0.2, 0.1, 0.5, 0.75), False)


def ramp(height, width):
    """[height, width, 3] with channel 0 the row position and channel 1 the column position, each in 0..1."""
    rows = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    columns = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    return np.stack([rows, columns, np.zeros((height, width))], -1)


# --- views ----------------------------------------------------------------------------------------


def test_first_views_are_the_whole_image():
    options = {"scale_range": (0.3, 0.8), "ratio_range": (0.5, 2.0)}
    assert sample_view(0, 5, 0, **options) == FULL == View((0, 0, 1, 1), False)
    assert sample_view(0, 5, 1, **options) == MIRRORED == View((0, 0, 1, 1), True)


def test_random_views_are_seeded_within_bounds_and_have_the_asked_area():
    views = [
        sample_view(3, i, number, scale_range=(0.3, 0.8), ratio_range=(0.5, 2.0))
        for i in range(100)
        for number in (2, 3)
    ]
    assert views[7] == sample_view(3, 3, 3, scale_range=(0.3, 0.8), ratio_range=(0.5, 2.0))
    assert len(set(views)) == len(views)
    assert sample_view(4, 3, 3) != sample_view(3, 3, 3)
    boxes = np.array([view.box for view in views])
    areas = boxes[:, 2] * boxes[:, 3]
    ratios = boxes[:, 3] / boxes[:, 2]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-9).all()
    assert areas.min() > 0.3 - 1e-9 and areas.max() < 0.8 + 1e-9 and areas.std() > 0.1
    assert ratios.min() > 0.5 - 1e-9 and ratios.max() < 2 + 1e-9 and ratios.std() > 0.2
    assert 0.35 < np.mean([view.flip for view in views]) < 0.65


def test_extreme_ranges_stay_inside():
    assert sample_view(0, 0, 2, scale_range=(1, 1), ratio_range=(0.1, 10)).box == pytest.approx((0, 0, 1, 1))
    box = sample_view(0, 0, 2, scale_range=(0.9, 0.9), ratio_range=(4, 4)).box
    assert box[3] == pytest.approx(1) and box[2] == pytest.approx(0.9)


@pytest.mark.parametrize("view", [FULL, MIRRORED, CROP, CROP._replace(flip=True)])
def test_image_map_and_mask_of_one_view_align(view):
    """A ramp at three resolutions shows, after the view, the positions that the view asks for, in each."""
    image = np.rint(ramp(200, 160) * 255).astype(np.uint8)
    coarse = ramp(25, 20).astype(np.float32)
    mask = (image[..., 1] // 2).astype(np.uint8)
    top, left, height, width = view.box
    wanted = ramp(40, 40) * (height, width, 1) + (top, left, 0)
    wanted = wanted[:, ::-1] if view.flip else wanted
    inner = (slice(2, -2), slice(2, -2))
    shown = apply_view(image, view, (40, 40))
    assert shown.dtype == np.uint8
    np.testing.assert_allclose(shown[inner] / 255, wanted[inner], atol=0.006)
    mapped = apply_view(coarse, view, (40, 40))
    assert mapped.dtype == np.float32
    np.testing.assert_allclose(mapped[inner], wanted[inner], atol=1e-5)
    labels = apply_view_to_mask(mask, view, (40, 40))
    np.testing.assert_allclose(labels[inner] * 2 / 255, wanted[inner][..., 1], atol=0.02)


def test_views_by_hand():
    row = np.array([[[0.0], [1.0], [2.0], [3.0]]])
    assert apply_view(row, FULL, (1, 4)).ravel().tolist() == [0, 1, 2, 3]
    assert apply_view(row, MIRRORED, (1, 4)).ravel().tolist() == [3, 2, 1, 0]
    assert apply_view(row, FULL, (1, 2)).ravel().tolist() == [0.5, 2.5]
    assert apply_view(row, FULL, (1, 8)).ravel().tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert apply_view(row, View((0, 0.5, 1, 0.5), False), (2, 2)).ravel().tolist() == [2, 3, 2, 3]
    mask = np.array([[0, 1, 2, 255]], np.uint8)
    assert apply_view_to_mask(mask, View((0, 0.5, 1, 0.5), True), (1, 4)).ravel().tolist() == [255, 255, 2, 2]


def test_the_whole_image_at_its_own_size_is_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    np.testing.assert_array_equal(apply_view(image, FULL, (9, 13)), image)
    np.testing.assert_array_equal(apply_view(image, MIRRORED, (9, 13)), image[:, ::-1])
    values = image.astype(np.float64)
    np.testing.assert_allclose(apply_view(values, FULL, (9, 13)), values, atol=1e-9)


def test_one_pixel_and_float16():
    assert (
        apply_view(np.full((1, 1, 3), 7, np.uint8), CROP, (4, 4)).tolist() == np.full((4, 4, 3), 7).tolist()
    )
    assert apply_view(np.ones((1, 1, 2), np.float16), CROP, (3, 3)).dtype == np.float16


@pytest.mark.parametrize(
    "image, view, size, message",
    [
        (np.zeros((4, 4), np.uint8), FULL, (2, 2), "one image"),
        (np.zeros((0, 4, 3), np.uint8), FULL, (2, 2), "at least one pixel"),
        (np.zeros((4, 4, 3), np.int32), FULL, (2, 2), "int32"),
        (np.zeros((4, 4, 4), np.uint8), FULL, (2, 2), r"\[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), View((0, 0, 4, 4), False), (2, 2), "in fractions"),
        (np.zeros((4, 4, 3), np.uint8), View((0.5, 0, 0.6, 1), False), (2, 2), "within 0 .. 1"),
        (np.zeros((4, 4, 3), np.uint8), FULL, (0, 2), "at least one pixel"),
    ],
)
def test_apply_view_rejections(image, view, size, message):
    with pytest.raises(ValueError, match=message):
        apply_view(image, view, size)


def test_sample_view_rejections():
    with pytest.raises(ValueError, match="scale_range"):
        sample_view(0, 0, 2, scale_range=(0.5, 1.5))
    with pytest.raises(ValueError, match="ratio_range"):
        sample_view(0, 0, 2, ratio_range=(2, 1))
    with pytest.raises(ValueError, match="0 or more"):
        sample_view(0, -1, 2)
