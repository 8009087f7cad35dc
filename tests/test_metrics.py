import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcrf_jax.metrics import confusion_matrix, format_iou_table, iou_per_class, mean_iou


def loop_confusion(labels, truth, num_classes, ignore=255):
    """The definition, pixel by pixel."""
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for a, b in zip(np.ravel(truth).tolist(), np.ravel(labels).tolist(), strict=True):
        if a != ignore:
            matrix[a, b] += 1
    return matrix


def random_masks(seed, shape=(13, 17), num_classes=5):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, shape).astype(np.uint8)
    truth[rng.random(shape) < 0.2] = 255
    return rng.integers(0, num_classes, shape).astype(np.uint8), truth


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loop_with_and_without_jit(seed):
    labels, truth = random_masks(seed)
    expected = loop_confusion(labels, truth, 5)
    on_host = confusion_matrix(labels, truth, 5)
    assert on_host.dtype == np.int64
    np.testing.assert_array_equal(on_host, expected)
    jitted = jax.jit(confusion_matrix, static_argnums=2)(jnp.asarray(labels), jnp.asarray(truth), 5)
    assert jitted.shape == (5, 5) and np.asarray(jitted).dtype == np.int64
    np.testing.assert_array_equal(jitted, expected)
    np.testing.assert_array_equal(confusion_matrix(jnp.asarray(labels), truth, 5), expected)


def test_case_by_hand():
    truth = np.array([[0, 0, 1], [1, 2, 255]])
    labels = np.array([[0, 1, 1], [1, 0, 0]])
    confusion = confusion_matrix(labels, truth, 4)
    np.testing.assert_array_equal(confusion, [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(iou_per_class(confusion), [1 / 3, 2 / 3, 0, np.nan])
    assert mean_iou(confusion) == pytest.approx(1 / 3)
    jitted = jax.jit(lambda c: (iou_per_class(c), mean_iou(c)))(jnp.asarray(confusion, jnp.int32))
    np.testing.assert_allclose(jitted[0], [1 / 3, 2 / 3, 0, np.nan], rtol=1e-6)
    np.testing.assert_allclose(jitted[1], 1 / 3, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(2, 30), st.integers(1, 3))
def test_merging_images_equals_counting_their_pixels_together(seed, num_pixels, num_classes, num_images):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, (num_images, num_pixels))
    labels = rng.integers(0, num_classes, (num_images, num_pixels))
    truth[rng.random(truth.shape) < 0.3] = 255
    merged = sum(confusion_matrix(a, b, num_classes) for a, b in zip(labels, truth, strict=True))
    np.testing.assert_array_equal(merged, confusion_matrix(labels, truth, num_classes))
    assert merged.sum() == (truth != 255).sum()
    swapped = confusion_matrix(truth[truth != 255], labels[truth != 255], num_classes)
    np.testing.assert_array_equal(merged.T, swapped)


def test_renaming_the_classes_permutes_the_matrix():
    labels, truth = random_masks(7)
    order = np.array([3, 1, 4, 0, 2])
    renamed = confusion_matrix(order[labels], np.where(truth == 255, 255, order[truth % 5]), 5)
    confusion = confusion_matrix(labels, truth, 5)
    np.testing.assert_array_equal(renamed[np.ix_(order, order)], confusion)
    assert mean_iou(renamed) == pytest.approx(mean_iou(confusion))


def test_vmap_equals_a_loop():
    pairs = [random_masks(seed) for seed in range(4)]
    labels, truth = (jnp.stack(arrays) for arrays in zip(*pairs, strict=True))
    batch = jax.vmap(lambda a, b: confusion_matrix(a, b, 5))(labels, truth)
    for one, (a, b) in zip(batch, pairs, strict=True):
        np.testing.assert_array_equal(one, loop_confusion(a, b, 5))


def test_uint8_labels_do_not_wrap_with_many_classes():
    labels = np.full((4, 4), 200, np.uint8)
    for convert in (np.asarray, jnp.asarray):
        confusion = confusion_matrix(convert(labels), convert(labels), 250)
        assert confusion[200, 200] == 16 and np.asarray(confusion).sum() == 16


def test_one_pixel_one_class_and_nothing_counted():
    assert mean_iou(confusion_matrix(np.array([[0]]), np.array([[0]]), 1)) == 1.0
    nothing = confusion_matrix(np.array([0, 1]), np.array([255, 255]), 2)
    assert nothing.sum() == 0 and np.isnan(iou_per_class(nothing)).all() and np.isnan(mean_iou(nothing))
    assert confusion_matrix(np.zeros((0,), int), np.zeros((0,), int), 3).shape == (3, 3)


def test_perfect_and_disjoint_predictions():
    truth = np.array([0, 0, 1, 1])
    assert mean_iou(confusion_matrix(truth, truth, 2)) == 1.0
    assert mean_iou(confusion_matrix(1 - truth, truth, 2)) == 0.0


def test_counts_beyond_int32_stay_exact():
    confusion = np.array([[2**40, 1], [0, 2**40]])
    assert iou_per_class(confusion)[0] == 2**40 / (2**40 + 1)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("value", [255, 5, -1])
def test_refuses_a_prediction_that_is_no_class(convert, value):
    labels, truth = random_masks(1)
    labels = labels.astype(np.int32)
    labels[2, 3] = value
    with pytest.raises(ValueError, match=rf"expected labels in 0\.\.4, got \[{value}\] at 1 pixels"):
        confusion_matrix(convert(labels), convert(truth), 5)


def test_refuses_a_truth_that_is_neither_class_nor_ignored():
    labels, truth = random_masks(2)
    truth[0, 0] = 9
    with pytest.raises(ValueError, match=r"expected truth in 0\.\.4, got \[9\] at 1 pixels; check"):
        confusion_matrix(labels, truth, 5)


def test_a_bad_value_under_jit_cannot_become_a_score():
    labels, truth = random_masks(3)
    labels[0, 0] = 255
    confusion = jax.jit(confusion_matrix, static_argnums=2)(jnp.asarray(labels), jnp.asarray(truth), 5)
    with pytest.raises(ValueError, match="1 pixels of others: a label outside the classes was met under jit"):
        np.asarray(confusion)
    with pytest.raises(ValueError, match="a label outside the classes was met under jit"):
        mean_iou(confusion)


def test_refuses_other_shapes_types_and_settings():
    labels, truth = random_masks(5)
    with pytest.raises(ValueError, match=r"one shape, got \(17, 13\) and \(13, 17\)"):
        confusion_matrix(labels.T, truth, 5)
    with pytest.raises(TypeError, match="expected integers in labels, got float32"):
        confusion_matrix(labels.astype(np.float32), truth, 5)
    with pytest.raises(ValueError, match="ignore outside 0..num_classes - 1"):
        confusion_matrix(labels, truth, 5, ignore=0)
    with pytest.raises(ValueError, match=r"shape \[K, K\], got \[2, 3\]"):
        iou_per_class(np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="3 names"):
        format_iou_table(np.eye(2, dtype=int), ("background", "cat", "dog"))


def test_table_of_one_column():
    confusion = np.array([[80, 5, 0], [10, 60, 0], [0, 0, 0]])
    assert format_iou_table(confusion, ("background", "cat", "giraffe")).splitlines() == [
        "class           IoU",
        "-------------------",
        "background    0.842",
        "cat           0.800",
        "giraffe           -",
        "-------------------",
        "mean          0.821",
        "note: in neither the truth nor the prediction, left out of the mean: giraffe",
        "mIoU 0.821",
    ]


def test_table_with_refinement_ends_with_the_refined_mean():
    plain, refined = np.array([[80, 5], [10, 60]]), np.array([[90, 0], [0, 70]])
    lines = format_iou_table(plain, ("background", "cat"), refined=refined).splitlines()
    assert lines[0].split() == ["class", "plain", "refined"]
    assert lines[2].split() == ["background", "0.842", "1.000"]
    assert lines[-2:] == ["mIoU 0.821 without refinement", "mIoU 1.000"]
    assert len({len(line) for line in lines[:-2]}) == 1


def test_counts_with_a_mask_and_labels_of_the_other_byte_order():
    labels, truth = np.array([0, 1, 1], ">i4"), np.array([0, 1, 0], ">i2")
    expected = [[1, 1], [0, 1]]
    assert confusion_matrix(labels, truth, 2).tolist() == confusion_matrix(jnp.asarray([0, 1, 1]), truth, 2).tolist() == expected
    masked = np.ma.masked_array(np.eye(2, dtype=int), [[True, False], [False, False]])
    with pytest.raises(TypeError, match="confusion: expected an array without a mask"):
        format_iou_table(masked, ["background", "cat"])
    for odd in (np.ma.masked_array(truth), truth.astype(object), truth.astype(str)):
        with pytest.raises(TypeError, match="^truth: expected"):
            confusion_matrix(jnp.asarray([0, 1, 1]), odd, 2)
