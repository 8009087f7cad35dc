import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from lcrf_jax.nets import tag_classifier
from lcrf_jax.nets.tag_classifier import average_precision, fit_tag_classifier


def random_case(seed, num_images=300, num_channels=12, num_classes=4):
    """Positive features with different scales, and tags that follow them with noise."""
    rng = np.random.default_rng(seed)
    scales = 10 ** rng.uniform(-2, 1, num_channels)
    pooled = (3 + rng.normal(size=(num_images, num_channels))) * scales
    scores = (pooled / scales - 3) @ rng.normal(size=(num_channels, num_classes - 1))
    tags = scores + 2 * rng.normal(size=scores.shape) > 1
    return pooled.astype(np.float32), np.concatenate([np.ones((num_images, 1), bool), tags], axis=1)


def loss_and_gradient(weights, bias, pooled, tags, l2):
    """In float64, by the definition: the penalty is on the weights of features divided by their deviation."""
    pooled, targets = np.float64(pooled), np.float64(tags[:, 1:])
    scale = pooled.std(axis=0) + 1e-6
    scaled_weights = np.float64(weights) * scale[:, None]
    logits = pooled @ np.float64(weights) + np.float64(bias)
    loss = np.mean(np.logaddexp(0, logits) - targets * logits) + l2 / 2 * np.sum(scaled_weights**2)
    residuals = (1 / (1 + np.exp(-logits)) - targets) / targets.size
    inputs = (pooled - pooled.mean(axis=0)) / scale
    return loss, inputs.T @ residuals + l2 * scaled_weights, residuals.sum(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_the_gradient_vanishes_at_the_result(l2):
    pooled, tags = random_case(0)
    classifier, num_iterations, loss = fit_tag_classifier(pooled, tags, l2=l2)
    assert 0 < num_iterations < 200
    expected, *gradients = loss_and_gradient(*classifier, pooled, tags, l2)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert max(np.abs(gradient).max() for gradient in gradients) < 2e-5
    assert classifier.weights.shape == (12, 3) and classifier.bias.shape == (3,)
    assert classifier.weights.dtype == classifier.bias.dtype == jnp.float32


def test_features_that_are_read_by_parts_give_the_same_classifier(monkeypatch, tmp_path):
    pooled, tags = random_case(2)
    whole, _, loss = fit_tag_classifier(pooled, tags, l2=1e-2, tolerance=1e-7)
    np.save(tmp_path / "pooled.npy", pooled)
    monkeypatch.setattr(tag_classifier, "STREAMED_ABOVE", 1000)
    monkeypatch.setattr(tag_classifier, "_ROWS_IN_MEMORY", 64)
    mapped = np.load(tmp_path / "pooled.npy", mmap_mode="r")
    parts, num_iterations, loss_of_parts = fit_tag_classifier(mapped, tags, l2=1e-2, tolerance=1e-7)
    assert 0 < num_iterations < 200
    np.testing.assert_allclose(loss_of_parts, loss, rtol=1e-6)
    logits = [pooled @ np.asarray(each.weights) + np.asarray(each.bias) for each in (whole, parts)]
    np.testing.assert_allclose(*logits, atol=2e-3)
    assert parts.weights.dtype == parts.bias.dtype == jnp.float32
    _, most, _ = fit_tag_classifier(mapped, tags, l2=1e-2, max_iterations=3)
    assert most <= 3


def test_equals_the_optimum_found_by_scipy():
    pooled, tags = random_case(1, num_channels=5)
    classifier, _, loss = fit_tag_classifier(pooled, tags, l2=1e-2)

    def unflattened(x):
        weights = x[:15].reshape(5, 3) / (np.float64(pooled).std(axis=0) + 1e-6)[:, None]
        return weights, x[15:] - np.float64(pooled).mean(axis=0) @ weights

    result = scipy.optimize.minimize(
        lambda x: loss_and_gradient(*unflattened(x), pooled, tags, 1e-2)[0], np.zeros(18), tol=1e-12
    )
    np.testing.assert_allclose(loss, result.fun, rtol=1e-5)
    weights, bias = unflattened(result.x)
    ours = pooled @ np.asarray(classifier.weights) + np.asarray(classifier.bias)
    np.testing.assert_allclose(ours, np.float64(pooled) @ weights + bias, atol=5e-3)


def test_scale_and_offset_of_the_features_do_not_matter():
    pooled, tags = random_case(2)
    rng = np.random.default_rng(0)
    gains, offsets = 10 ** rng.uniform(-1, 2, 12), rng.uniform(-1, 1, 12)
    changed = ((pooled + pooled.std(axis=0) * 20 * offsets) * gains).astype(np.float32)
    logits = [features @ np.asarray(c.weights) + np.asarray(c.bias)
              for features in (pooled, changed) for c in [fit_tag_classifier(features, tags)[0]]]
    np.testing.assert_allclose(logits[1], logits[0], atol=0.02)


def test_classes_are_fitted_independently_and_background_not_at_all():
    pooled, tags = random_case(3)
    all_classes, _, _ = fit_tag_classifier(pooled, tags, l2=1e-2)
    without_background = tags.copy()
    without_background[:, 0] = False
    again, _, _ = fit_tag_classifier(pooled, without_background, l2=1e-2)
    np.testing.assert_array_equal(again.weights, all_classes.weights)
    # The mean over three classes divides the data term by three, not the penalty.
    alone, _, _ = fit_tag_classifier(pooled, tags[:, [0, 2]], l2=3e-2)
    np.testing.assert_allclose(alone.weights[:, 0], all_classes.weights[:, 1], rtol=0.02, atol=0.02)


def test_a_class_in_every_image_or_in_none_is_no_harm():
    pooled, tags = random_case(4)
    tags[:, 1], tags[:, 2] = True, False
    classifier, _, loss = fit_tag_classifier(pooled, tags)
    assert np.isfinite(classifier.weights).all() and np.isfinite(classifier.bias).all() and np.isfinite(loss)
    probs = 1 / (1 + np.exp(-(pooled @ np.asarray(classifier.weights) + np.asarray(classifier.bias))))
    assert probs[:, 0].min() > 0.99 and probs[:, 1].max() < 0.01
    assert np.abs(np.asarray(classifier.weights) * pooled.std(axis=0)[:, None])[:, :2].max() < 0.01
    assert average_precision(probs, tags[:, 1:])[2] > 0.5


def test_constant_channels_and_single_images_are_no_harm():
    pooled, tags = random_case(5)
    pooled[:, 3], pooled[:, 7] = 0.0, 5.7
    classifier, _, _ = fit_tag_classifier(pooled, tags)
    np.testing.assert_allclose(np.asarray(classifier.weights)[[3, 7]], 0, atol=1e-3)
    _, *gradients = loss_and_gradient(*classifier, pooled, tags, 1e-3)
    assert max(np.abs(gradient).max() for gradient in gradients) < 2e-5
    one, _, _ = fit_tag_classifier(pooled[:1], tags[:1])
    assert np.isfinite(one.weights).all() and np.isfinite(one.bias).all()


@pytest.mark.slow
def test_it_tells_unseen_images_apart():
    pooled, tags = random_case(6, num_images=600)
    classifier, _, _ = fit_tag_classifier(pooled[:400], tags[:400])
    scores = pooled[400:] @ np.asarray(classifier.weights) + np.asarray(classifier.bias)
    precision = average_precision(scores, tags[400:, 1:])
    assert (precision > tags[400:, 1:].mean(axis=0) + 0.2).all()


def test_the_penalty_shrinks_and_the_bound_on_iterations_holds():
    pooled, tags = random_case(7)
    fitted = [fit_tag_classifier(pooled, tags, l2=l2)[0] for l2 in (1e-4, 1e-2, 1.0)]
    norms = [np.linalg.norm(classifier.weights * pooled.std(axis=0)[:, None]) for classifier in fitted]
    assert norms[0] > 1.5 * norms[1] > 3 * norms[2]
    _, num_iterations, early = fit_tag_classifier(pooled, tags, max_iterations=3)
    assert num_iterations == 3 and early > fit_tag_classifier(pooled, tags)[2]


@pytest.mark.parametrize(("pooled_shape", "tags_shape"), [
    ((5, 2, 2, 3), (5, 4)), ((5, 3), (5,)), ((5, 3), (6, 4)),
    ((5, 3), (5, 1)), ((0, 3), (0, 4)), ((5, 0), (5, 4)),
])
def test_wrong_shapes_are_refused(pooled_shape, tags_shape):
    with pytest.raises(ValueError, match=r"expected pooled \[N, C\] and tags \[N, K\] .* got \("):
        fit_tag_classifier(np.zeros(pooled_shape, np.float32), np.zeros(tags_shape, bool))


def test_average_precision_by_hand():
    scores = np.array([[0.9, 0.1], [0.8, 0.9], [0.7, 0.3], [0.6, 0.2]])
    targets = np.array([[1, 1], [0, 0], [1, 0], [0, 0]])
    np.testing.assert_allclose(average_precision(scores, targets), [(1 + 2 / 3) / 2, 1 / 4])


def test_average_precision_equals_brute_force():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(40, 3)), rng.uniform(size=(40, 3)) < 0.3
    for k, value in enumerate(average_precision(scores, targets)):
        precisions = []
        for i in np.flatnonzero(targets[:, k]):
            above = scores[:, k] >= scores[i, k]
            precisions.append(targets[above, k].sum() / above.sum())
        np.testing.assert_allclose(value, np.mean(precisions), rtol=1e-12)


def test_average_precision_at_extremes():
    scores = np.array([[3], [2], [1]])
    np.testing.assert_array_equal(average_precision(scores, np.ones((3, 1), bool)), [1])
    assert np.isnan(average_precision(scores, np.zeros((3, 1), bool))).all()
    assert np.isnan(average_precision(np.zeros((0, 2)), np.zeros((0, 2), bool))).all()
    np.testing.assert_array_equal(average_precision(np.zeros((2, 1)), [[True], [False]]), [1])  # by position
    np.testing.assert_array_equal(average_precision(np.zeros((2, 1)), [[False], [True]]), [0.5])
    tied, positive = np.random.default_rng(1).integers(0, 2, (2, 300, 1))
    in_order = [positive[i, 0] for i in sorted(range(300), key=lambda i: -tied[i, 0])]
    precisions = [np.mean(in_order[: rank + 1]) for rank in range(300) if in_order[rank]]
    np.testing.assert_allclose(average_precision(tied, positive), [np.mean(precisions)])
    targets = np.array([[True], [False], [False]])
    for dtype in (np.uint8, np.float16, np.int64):
        np.testing.assert_array_equal(average_precision(scores.astype(dtype), targets), [1])
    np.testing.assert_array_equal(average_precision(np.array([[True], [False], [False]]), targets), [1])
    np.testing.assert_array_equal(average_precision(1e4 * scores, targets), [1])


def test_average_precision_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match=r"of one shape \[N, K\], got \(3, 2\) and \(3, 1\)"):
        average_precision(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3,\)"):
        average_precision(np.zeros(3), np.zeros(3))
