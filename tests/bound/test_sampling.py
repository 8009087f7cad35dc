import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads
from scipy import stats

from lcrf_jax.bound.sampling import block_groups, categorical, gumbel_softmax, straight_through

LOGITS = np.array([0.3, -1.2, 1.5, 0.0, -0.4])
SAMPLERS = {
    "gumbel_softmax": jax.jit(functools.partial(gumbel_softmax, temperature=0.7)),
    "straight_through": jax.jit(functools.partial(straight_through, temperature=0.7)),
    "categorical": jax.jit(categorical),
}
relaxed_at = jax.jit(lambda key, logits, temperature: gumbel_softmax(key, logits, temperature=temperature))
every_sampler = pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
GROUPED = {name: sample for name, sample in SAMPLERS.items() if name != "categorical"}
every_grouped_sampler = pytest.mark.parametrize("sample", GROUPED.values(), ids=GROUPED)


@every_sampler
def test_the_largest_entries_are_distributed_as_the_softmax(sample):
    # Chi-square at a significance of 1e-3; the seed is fixed, so the test passes always or never.
    num_samples = 100_000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (num_samples, len(LOGITS)))
    counts = np.bincount(sample(jax.random.key(0), logits).argmax(axis=-1), minlength=len(LOGITS))
    assert stats.chisquare(counts, num_samples * reference.softmax(LOGITS)).pvalue > 1e-3
    # The same numbers of samples are told apart from a distribution one percent of probability away.
    shifted = reference.softmax(LOGITS) + [0.01, 0, -0.01, 0, 0]
    assert stats.chisquare(counts, num_samples * shifted).pvalue < 1e-3


def test_relaxed_samples_have_the_marginals_of_their_definition():
    """Two classes: z_1 = sigmoid((g_1 - g_2 + L) / tau) with a logistic L, whose distribution is known."""
    temperature, difference = 0.6, 0.8
    logits = jnp.broadcast_to(jnp.array([difference, 0.0]), (20_000, 2))
    samples = np.asarray(relaxed_at(jax.random.key(1), logits, temperature), np.float64)
    logistic = temperature * np.log(samples[:, 0] / samples[:, 1]) - difference
    assert stats.kstest(logistic, "logistic").pvalue > 1e-3
    assert stats.kstest(1.1 * logistic, "logistic").pvalue < 1e-3, "enough samples to see another temperature"


def test_the_temperature_divides():
    """With the same noise tau (log z_a - log z_b) is g_a - g_b and the noise, whatever tau is."""
    key, logits = jax.random.key(9), jnp.asarray(np.random.default_rng(5).normal(size=(50, 3)))
    with jax.enable_x64(True):
        logits = jnp.asarray(logits, jnp.float64)
        differences = [
            temperature * np.diff(np.log(relaxed_at(key, logits, temperature)))
            for temperature in (1.0, 0.5, 3.0)
        ]
        noise = differences[0] - np.diff(logits)
        shifted = np.diff(np.log(relaxed_at(key, 2 * logits, 1.0)))
    np.testing.assert_allclose(differences[1:], [differences[0]] * 2, rtol=1e-9)
    np.testing.assert_allclose(shifted, 2 * np.diff(logits) + noise, rtol=1e-9)


def test_temperature_limits():
    key, logits = jax.random.key(2), jnp.asarray(np.random.default_rng(0).normal(size=(200, 4)))
    exact = SAMPLERS["categorical"](key, logits)
    for temperature in (1e-4, 1e-30, np.float32(1e-4)):
        np.testing.assert_allclose(relaxed_at(key, logits, temperature), exact, atol=1e-6)
    np.testing.assert_allclose(relaxed_at(key, logits, 1e9), 1 / 4, atol=1e-6)
    # Where the relaxed sample is flat the exact one still follows the logits.
    hot = jax.jit(functools.partial(straight_through, temperature=1e9))
    np.testing.assert_array_equal(hot(key, logits), exact)


def test_straight_through_is_exact_with_the_gradient_of_the_relaxed_sample():
    key, logits = jax.random.key(3), jnp.asarray(np.random.default_rng(1).normal(size=(30, 4)))
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(30, 4)))

    def sample_and_gradient(name):
        sample, pull = jax.vjp(lambda x: SAMPLERS[name](key, x), logits)
        return sample, pull(weights.astype(sample.dtype))[0]

    relaxed, expected = sample_and_gradient("gumbel_softmax")
    hard, gradient = sample_and_gradient("straight_through")
    np.testing.assert_array_equal(hard, np.eye(4)[relaxed.argmax(axis=-1)])
    np.testing.assert_array_equal(hard, SAMPLERS["categorical"](key, logits))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(gradient).max() > 0.1


def test_gradients_of_the_relaxed_sample():
    key, logits = jax.random.key(4), np.random.default_rng(3).normal(size=(5, 3))
    with jax.enable_x64(True):
        check_grads(jax.jit(lambda x, t: gumbel_softmax(key, x, temperature=t)), (logits, 0.8), order=1)
    gradient = jax.jit(jax.grad(lambda x: categorical(key, x)[:, 0].sum()))(jnp.asarray(logits))
    np.testing.assert_array_equal(gradient, 0)


@every_sampler
def test_samples_lie_on_the_simplex_also_at_extremes(sample):
    inf = jnp.inf
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [0.0, -inf, -inf], [1e4, 1e4, -inf]])
    samples = np.stack([sample(jax.random.key(seed), logits) for seed in range(20)])
    np.testing.assert_allclose(samples.sum(axis=-1), 1, rtol=1e-6)
    assert samples.min() >= 0
    np.testing.assert_array_equal(samples[:, [0, 2]], np.broadcast_to([1.0, 0, 0], (20, 2, 3)))
    assert set(samples[:, 1].argmax(axis=-1)) == {0, 1, 2}
    assert set(samples[:, 3].argmax(axis=-1)) == {0, 1}
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(sample(jax.random.key(0), x)[..., 0])))(logits)
    assert np.isfinite(gradient).all()


@every_sampler
def test_one_class_is_certain(sample):
    np.testing.assert_array_equal(sample(jax.random.key(0), jnp.array([[-7.0], [3.0]])), 1)


@pytest.mark.slow_except("*bfloat16*")
@every_sampler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_short_types_are_sampled_in_float32(sample, dtype):
    logits = jnp.asarray([[0.5, -3.0, 2.0], [4.0, 4.0, 4.0]], dtype)
    result = sample(jax.random.key(5), logits)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, sample(jax.random.key(5), logits.astype(jnp.float32)))


@every_sampler
def test_float64_is_kept(sample):
    with jax.enable_x64(True):
        for dtype in ("float64", "float32"):
            logits = jax.ShapeDtypeStruct((2, 3), dtype)
            assert jax.eval_shape(sample, jax.random.key(5), logits).dtype == dtype


@every_sampler
def test_the_key_alone_decides(sample):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (50, 5))
    first = sample(jax.random.key(6), logits)
    np.testing.assert_array_equal(sample(jax.random.key(6), logits), first)
    np.testing.assert_array_equal(sample(jax.random.PRNGKey(6), logits), first)
    assert (sample(jax.random.key(7), logits) != first).any()
    assert len({tuple(row) for row in np.asarray(first).tolist()}) > 1, "every row has noise of its own"


@every_sampler
def test_vmap_equals_a_loop(sample):
    keys = jax.random.split(jax.random.key(8), 3)
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(3, 6, 4)), jnp.float32)
    loop = np.stack([sample(key, rows) for key, rows in zip(keys, logits)])
    np.testing.assert_allclose(jax.jit(jax.vmap(sample))(keys, logits), loop, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, float("nan"), float("inf"), np.float32(0)])
@pytest.mark.parametrize("sampler", [gumbel_softmax, straight_through])
def test_a_temperature_that_is_not_positive_is_refused(sampler, temperature):
    with pytest.raises(ValueError, match=r"temperature: expected a finite number > 0, got .*categorical"):
        sampler(jax.random.key(0), jnp.zeros((2, 3)), temperature=temperature)


@every_sampler
@pytest.mark.parametrize("logits", [1.0, np.zeros((2, 0))])
def test_logits_without_classes_are_refused(sample, logits):
    with pytest.raises(ValueError, match=r"logits: expected shape \[..., K\]"):
        sample(jax.random.key(0), logits)


def test_groups_of_blocks_by_hand():
    # Two rows of three blocks; those at the border are cut off.
    expected = [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    groups = block_groups(3, 5, 2)
    assert groups.dtype == jnp.int32
    np.testing.assert_array_equal(groups, np.ravel(expected))
    np.testing.assert_array_equal(block_groups(3, 5, 1), np.arange(15))
    np.testing.assert_array_equal(block_groups(3, 5, 3), [0, 0, 0, 1, 1] * 3)
    np.testing.assert_array_equal(block_groups(3, 5, 7), np.zeros(15))
    np.testing.assert_array_equal(block_groups(5, 3, 2), np.ravel([[0, 0, 1]] * 2 + [[2, 2, 3]] * 2 + [[4, 4, 5]]))


def test_pixels_of_a_group_share_their_noise_and_others_do_not():
    logits, groups = np.random.default_rng(6).normal(size=(15, 4)), block_groups(3, 5, 2)
    with jax.enable_x64(True):
        samples = SAMPLERS["gumbel_softmax"](jax.random.key(10), jnp.asarray(logits), groups=groups)
        # Differences between classes, since a sample does not tell what is added to all of them.
        noise = 0.7 * np.diff(np.log(samples)) - np.diff(logits)
    same_group = np.equal.outer(groups, groups)
    distances = np.abs(noise[:, None] - noise).max(axis=-1)
    assert distances[same_group].max() < 1e-9
    assert distances[~same_group].min() > 1e-2


@every_grouped_sampler
def test_a_group_for_each_pixel_is_independent_noise(sample):
    logits = jnp.asarray(np.random.default_rng(7).normal(size=(15, 4)), jnp.float32)
    independent = sample(jax.random.key(11), logits)
    np.testing.assert_array_equal(sample(jax.random.key(11), logits, groups=jnp.arange(15)), independent)
    assert (sample(jax.random.key(11), logits, groups=block_groups(3, 5, 2)) != independent).any()


@every_grouped_sampler
def test_groups_leave_the_distribution_of_each_pixel_as_it_is(sample):
    # Chi-square at a significance of 1e-3 for each of six pixels, in a block of four and one of two.
    logits = np.random.default_rng(8).normal(size=(6, 3))
    keys, groups = jax.random.split(jax.random.key(12), 20_000), block_groups(2, 3, 2)
    labels = jax.jit(jax.vmap(lambda key: sample(key, logits, groups=groups).argmax(axis=-1)))(keys)
    for column, probs in zip(np.asarray(labels).T, reference.softmax(logits)):
        counts = np.bincount(column, minlength=3)
        assert stats.chisquare(counts, len(keys) * probs).pvalue > 1e-3
        assert stats.chisquare(counts, len(keys) * (probs + [0.03, 0, -0.03])).pvalue < 1e-3
    # Jointly they are not what they were: with equal logits the labels of a block are equal.
    assert len(np.unique(sample(keys[0], np.zeros((6, 3)), groups=np.zeros(6, int)).argmax(axis=-1))) == 1


def test_straight_through_in_groups_has_the_gradient_of_the_relaxed_sample():
    logits = jnp.asarray(np.random.default_rng(9).normal(size=(15, 4)), jnp.float32)
    weights = np.random.default_rng(10).normal(size=(15, 4))
    key, groups = jax.random.key(13), block_groups(3, 5, 2)
    relaxed, hard = (
        jax.jit(jax.value_and_grad(lambda x, sample=sample: jnp.sum(sample(key, x, groups=groups) * weights)))(logits)
        for sample in GROUPED.values()
    )
    np.testing.assert_allclose(hard[1], relaxed[1], rtol=1e-5, atol=1e-6)
    labels = SAMPLERS["gumbel_softmax"](key, logits, groups=groups).argmax(axis=-1)
    np.testing.assert_array_equal(SAMPLERS["straight_through"](key, logits, groups=groups), np.eye(4)[labels])


@every_grouped_sampler
def test_groups_that_do_not_fit_are_refused(sample):
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"groups: expected shape \[4\], got \[3\]; .*each pixel"):
        sample(key, jnp.zeros((4, 3)), groups=jnp.arange(3))
    with pytest.raises(ValueError, match=r"groups: expected shape \[4\], got \[2, 2\]"):
        sample(key, jnp.zeros((4, 3)), groups=jnp.zeros((2, 2), int))
    for shape in ((3,), (2, 4, 3)):
        with pytest.raises(ValueError, match=r"logits: expected shape \[m, K\], .*one image.*vmap"):
            sample(key, jnp.zeros(shape), groups=jnp.arange(4))
    for sizes in ((0, 5, 2), (3, 0, 2), (3, 5, 0)):
        with pytest.raises(ValueError, match=r"(height|width|block): expected a finite number >= 1, got 0"):
            block_groups(*sizes)
