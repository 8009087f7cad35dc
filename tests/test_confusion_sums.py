"""Sums of confusion matrices under jit, vmap and over devices: exact beyond 32 bits, and a bad label stays one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from lcrf_jax.metrics import ConfusionCounts, confusion_matrix, format_iou_table, iou_per_class, mean_iou

counted = jax.jit(confusion_matrix, static_argnums=2)
added = jax.jit(lambda a, b: a + b)
over_images = jax.jit(lambda counts: counts.sum(axis=0))
LABELS, TRUTH = np.array([0, 1, 1, 1]), np.array([0, 0, 1, 255])
BY_HAND = [[1, 1], [0, 1]]
BAD = np.array([0, 1, 2, 1])


def counts(labels=LABELS, truth=TRUTH):
    return counted(jnp.asarray(labels), jnp.asarray(truth), 2)


def of_numbers(matrix, bad=0):
    """`ConfusionCounts` with any numbers, by hand."""
    matrix, bad = np.asarray(matrix, np.int64), np.int64(bad)
    digits = [np.stack([array % 2**16, array // 2**16 % 2**16, array // 2**32]) for array in (matrix, bad)]
    return ConfusionCounts(*(jnp.asarray(array.astype(np.uint32)) for array in digits))


def test_images_add_up_beyond_31_and_32_bits():
    total = of_numbers([[2**31 - 1, 2**32 - 1], [2**40, 0]])
    for merged in (total + counts(), counts() + total, added(total, counts()), sum([counts(), total])):
        np.testing.assert_array_equal(merged, [[2**31, 2**32], [2**40, 1]])
    doubled = counts()
    for _ in range(50):
        doubled = added(doubled, doubled)
    np.testing.assert_array_equal(doubled, np.array(BY_HAND) * 2**50)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**55), min_size=4, max_size=4), min_size=1, max_size=6))
def test_sums_are_those_of_python(matrices):
    matrices = [np.array(matrix, np.int64).reshape(2, 2) for matrix in (*matrices, *[[0] * 4] * (6 - len(matrices)))]
    parts = [of_numbers(matrix) for matrix in matrices]
    np.testing.assert_array_equal(functools.reduce(added, parts), sum(matrices))
    batch = jax.tree.map(lambda *arrays: np.stack(arrays), *parts)
    np.testing.assert_array_equal(batch, matrices)
    np.testing.assert_array_equal(over_images(batch), sum(matrices))


def test_four_images_with_a_bad_label_are_bad_together_and_whatever_is_added():
    """Four times -2**30 is 0 in 32 bits."""
    merged = sum([counts(BAD)] * 4 + [counts()] * 3)
    for bad in (merged, added(merged, counts()), counts() + counts(BAD), counts(BAD) + counts(), of_numbers(BY_HAND, bad=2**32), of_numbers(BY_HAND, bad=2**16)):
        for function in (np.asarray, mean_iou, iou_per_class, lambda c: format_iou_table(c, ("a", "b")), list):
            with pytest.raises(ValueError, match="pixels of others: a label outside the classes was met under jit"):
                function(bad)
        assert np.isnan(jax.jit(iou_per_class)(bad)).all() and np.isnan(jax.jit(mean_iou)(bad))
    many = jax.tree.map(lambda array: jnp.broadcast_to(array, (2**16, *array.shape)), counts(BAD))
    with pytest.raises(ValueError, match="got 65536 pixels of others"):
        np.asarray(many.sum(axis=0))


@pytest.mark.slow
def test_a_batch_made_by_vmap_is_merged_over_its_axis():
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 3, (2, 5, 11)), rng.integers(0, 3, (2, 5, 11))
    each = jax.vmap(jax.vmap(lambda a, b: confusion_matrix(a, b, 3)))(jnp.asarray(labels), jnp.asarray(truth))
    assert each.shape == (2, 5, 3, 3)
    expected = np.array([[counted(a, b, 3) for a, b in zip(*pair)] for pair in zip(labels, truth)])
    np.testing.assert_array_equal(each, expected)
    for axis in (0, 1, (0, 1), (1, 0)):
        np.testing.assert_array_equal(jax.jit(lambda c: c.sum(axis))(each), expected.sum(axis=axis))  # noqa: B023
    first = ConfusionCounts(each.digits[0], each.bad[0])
    parts = [ConfusionCounts(*pair) for pair in zip(first.digits, first.bad)]
    np.testing.assert_array_equal(sum(parts), expected[0].sum(axis=0))
    for axis in (2, -1, (0, 3)):
        with pytest.raises(ValueError, match=r"expected one of the 2 leading axes .*np.asarray\(counts\).sum\(\)"):
            each.sum(axis)
    with pytest.raises(ValueError, match=r"shape \[K, K\], got \(2, 5, 3, 3\); merge"):
        jax.jit(iou_per_class)(each)


def test_a_long_axis_is_summed_without_an_overflow():
    one = of_numbers([[2**16 - 1, 2**32 - 1], [1, 0]])
    long = jax.tree.map(lambda array: jnp.broadcast_to(array, (70_001, *array.shape)), one)
    np.testing.assert_array_equal(jax.jit(lambda c: c.sum(0))(long), np.asarray(one) * 70_001)


def test_devices_add_their_counts():
    """As psum adds array by array, digits are not carried: there is room for that."""
    mesh = jax.make_mesh((4,), ("image",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(1)
    labels, truth = rng.integers(0, 3, (4, 300)), rng.integers(0, 3, (4, 300))

    def over_devices(labels, truth):
        return jax.lax.psum(confusion_matrix(labels, truth, 3), "image")

    sharded = jax.jit(jax.shard_map(over_devices, mesh=mesh, in_specs=PartitionSpec("image"), out_specs=PartitionSpec()))
    np.testing.assert_array_equal(sharded(labels, truth), confusion_matrix(labels, truth, 3))
    nearly_full = of_numbers([[2**32 - 1, 2**16 - 1], [0, 0]])
    together = jax.tree.map(lambda array: array * 4, nearly_full)
    np.testing.assert_array_equal(together, np.asarray(nearly_full) * 4)
    np.testing.assert_array_equal(together + counts(), np.asarray(nearly_full) * 4 + BY_HAND)


def test_scores_under_jit_are_those_outside():
    matrix = np.array([[2**40, 12345, 0], [2**33, 2**35, 0], [0, 0, 0]])
    for function in (iou_per_class, mean_iou):
        np.testing.assert_allclose(jax.jit(function)(of_numbers(matrix)), function(matrix), rtol=1e-6)
        np.testing.assert_array_equal(function(of_numbers(matrix)), function(matrix))
    assert format_iou_table(of_numbers(matrix), "abc") == format_iou_table(matrix, "abc")
    # A matrix of JAX integers whose row has a sum beyond int32.
    wide = np.array([[2**30, 2**30], [2**30, 2**30]], np.int32)
    np.testing.assert_allclose(iou_per_class(jnp.asarray(wide)), [1 / 3, 1 / 3], rtol=1e-6)


def test_counts_mix_with_numpy():
    found = counts()
    assert found.tolist() == BY_HAND and found[0, 1] == 1 and len(found) == 2 and (found == np.array(BY_HAND)).all()
    assert [row.tolist() for row in found] == BY_HAND and not (found != np.array(BY_HAND)).any()
    total = np.zeros((2, 2), np.int64)
    total += found
    for merged in (total, np.zeros((2, 2), np.int64) + found, found + np.zeros((2, 2), np.int64), 0 + found):
        np.testing.assert_array_equal(merged, BY_HAND)
    assert np.asarray(found, np.float32).dtype == np.float32
    with pytest.raises(TypeError):
        found + 1.5
    with pytest.raises(TypeError):
        hash(found)
    with pytest.raises(ValueError, match="matrices of the same classes"):
        found + counted(jnp.zeros(3, int), jnp.zeros(3, int), 3)


@pytest.mark.parametrize("value", [2**32, 2**32 + 1, -(2**32), 2**31])
def test_labels_that_int32_does_not_hold_are_no_class(value):
    labels, truth = np.array([0, value]), np.array([0, 1])
    with pytest.raises(ValueError, match="expected labels in 0"):
        confusion_matrix(labels, truth, 2)
    with jax.enable_x64(True):
        with pytest.raises(ValueError, match="expected truth in 0"):
            confusion_matrix(jnp.asarray(truth), jnp.asarray(labels), 2)
        with pytest.raises(ValueError, match="1 pixels of others"):
            np.asarray(counted(jnp.asarray(labels), jnp.asarray(truth), 2))


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"num_classes": 2.5}, ValueError, "num_classes: expected a whole number, got 2.5"),
    ({"num_classes": None}, TypeError, "num_classes: expected a Python int, got None"),
    ({"num_classes": "2"}, TypeError, "num_classes: expected a number, got '2'"),
    ({"num_classes": 0}, ValueError, "num_classes: expected a finite number >= 1"),
    ({"ignore": float("nan")}, ValueError, "ignore"),
    ({"ignore": 2**31}, ValueError, "ignore outside 0..num_classes - 1 and in int32"),
    ({"labels": np.array([True, False, True, True])}, TypeError, "integers in labels, got bool"),
    ({"labels": LABELS * 1.0}, TypeError, "integers in labels, got float64; take the argmax"),
    ({"truth": [0.0, 0.0, 1.0, 255.0]}, TypeError, "integers in truth, got float64"),
])
def test_what_cannot_be_counted_is_told(changes, error, message):
    arguments = {"labels": LABELS, "truth": TRUTH, "num_classes": 2, **changes}
    with pytest.raises(error, match=message):
        confusion_matrix(**arguments)


@pytest.mark.parametrize(("matrix", "message"), [
    (np.array([[1.0, np.nan], [0, 1]]), r"confusion: expected finite numbers >= 0, got nan at \[0, 1\]"),
    (np.array([[1, -2], [0, 1]]), r"confusion: expected finite numbers >= 0, got -2 at \[0, 1\]"),
    (np.zeros((2, 2, 2), int), "sum the matrices of several images first"),
    (np.zeros(4, int), r"shape \[K, K\], got \[4\]"),
])
def test_matrices_that_are_none_are_told(matrix, message):
    for function in (iou_per_class, mean_iou):
        for convert in (np.asarray, jnp.asarray):
            with pytest.raises(ValueError, match=message.replace("-2 at", r"-2(\.0)? at")):
                function(convert(matrix))
