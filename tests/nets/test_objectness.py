"""Where an object is, by features and the border of the image."""

import numpy as np

from lcrf_jax.nets.objectness import objectness


def by_loops(features, head):
    """[h, w] of one image, cell by cell in float64."""
    height, width, _ = features.shape
    unit = np.array([[v / np.linalg.norm(v) for v in row] for row in head.astype(np.float64)])
    border = [unit[0, j] for j in range(width)] + [unit[-1, j] for j in range(width)]
    border += [unit[i, 0] for i in range(height)] + [unit[i, -1] for i in range(height)]
    mean = np.mean(border, axis=0)
    unlike = np.array([[-np.dot(v, mean) / np.linalg.norm(mean) for v in row] for row in unit])
    length = np.array([[np.linalg.norm(v) for v in row] for row in features.astype(np.float64)])
    return sum((m - m.min()) / (m.max() - m.min()) for m in (unlike, length)) / 2


def test_objectness_equals_the_loops():
    rng = np.random.default_rng(0)
    features, head = rng.normal(size=(2, 4, 5, 3)), rng.random((2, 4, 5, 6))
    found = objectness(features.astype(np.float32), head.astype(np.float32))
    assert found.shape == (2, 4, 5) and found.min() >= 0 and found.max() <= 1
    for image in range(2):
        np.testing.assert_allclose(found[image], by_loops(features[image], head[image]), atol=1e-5)


def test_an_object_in_the_middle_is_found():
    features, head = np.ones((1, 5, 5, 2), np.float32), np.zeros((1, 5, 5, 2), np.float32)
    head[..., 0] = 1
    features[:, 2, 2], head[:, 2, 2] = 3, (0, 1)
    found = np.asarray(objectness(features, head))
    assert found[0, 2, 2] == 1 and np.delete(found.reshape(-1), 12).max() == 0


def test_a_map_that_is_the_same_everywhere_counts_one_half():
    found = objectness(np.ones((1, 3, 3, 2), np.float32), np.zeros((1, 3, 3, 2), np.float32))
    np.testing.assert_array_equal(found, np.full((1, 3, 3), 0.5))
    np.testing.assert_array_equal(objectness(np.ones((1, 1, 1, 2)), np.ones((1, 1, 1, 2))), [[[0.5]]])
