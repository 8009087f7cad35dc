import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import PartitionSpec
from scipy import stats

from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.estimators import expected_log_prob
from lcrf_jax.bound.likelihoods import area, max_pool

NUM_PIXELS, NUM_CLASSES = 5, 3
# Where one sweep is enough, and where it takes many.
MANY_CHAINS, SOME_CHAINS = 40_000, 6_000
TAGS = np.array([True, True, False])
LIKELIHOODS = {
    "none": None,
    "area": lambda z: area(z, TAGS, beta=4.0),
    "max_pool": lambda z: max_pool(z, TAGS, flip_probability=0.1),
}
EVERY = reference.labellings(NUM_PIXELS, NUM_CLASSES)
ONE_HOT = np.eye(NUM_CLASSES)[EVERY]
every_likelihood = pytest.mark.parametrize("name", LIKELIHOODS)
with_and_without = pytest.mark.parametrize("name", ["none", "area"])
# 2 and 3 do not divide the number of pixels: their last blocks are filled up.
every_number_of_blocks = pytest.mark.parametrize("num_blocks", [1, 2, 3, NUM_PIXELS])


def random_case(seed, num_pixels, num_classes):
    """A kernel and a unary, float32; the kernel's diagonal is zero."""
    rng = np.random.default_rng(seed)
    kernel = rng.uniform(0, 0.8, (num_pixels, num_pixels))
    unary = 0.6 * rng.normal(size=(num_pixels, num_classes))
    return np.float32((kernel + kernel.T) / 2 * (1 - np.eye(num_pixels))), np.float32(unary)


KERNEL, UNARY = random_case(0, NUM_PIXELS, NUM_CLASSES)


@functools.partial(jax.jit, static_argnames=("name", "num_sweeps", "num_blocks"))
def chains(keys, labels, kernel, unary, name="none", num_sweeps=1, num_blocks=2):
    """A chain for each key and each row of labels."""
    return jax.vmap(
        lambda key, start: gibbs(key, start, kernel, unary, log_likelihood=LIKELIHOODS[name],
                                 num_sweeps=num_sweeps, num_blocks=num_blocks)
    )(keys, labels)


def keys_of(seed, number=MANY_CHAINS):
    return jax.random.split(jax.random.key(seed), number)


@functools.cache
def log_likelihoods(name):
    """l of every labelling, by the loops of the reference."""
    options = {"area": {"beta": 4.0}, "max_pool": {}, "none": {}}[name]
    if name == "max_pool":
        # pi is 0.1 or 0.9, which is beyond what the bounds of the reference are for.
        right = np.where(TAGS, ONE_HOT.max(axis=1), 1 - ONE_HOT.max(axis=1))
        return np.log(0.1 + 0.8 * right).sum(axis=1)
    if name == "none":
        return np.zeros(len(EVERY))
    return np.array([reference.tag_log_likelihood(name, z, TAGS, **options) for z in ONE_HOT])


def posterior(name="none", kernel=KERNEL, unary=UNARY):
    """[K^m] the probability of every labelling."""
    scores = np.float64(unary)[np.arange(NUM_PIXELS), EVERY].sum(axis=1) + log_likelihoods(name)
    return reference.softmax(scores - reference.labelling_energies(kernel, NUM_CLASSES))


def marginals_of(probs):
    return np.einsum("z,zjk->jk", probs, ONE_HOT)


def exact_samples(seed, probs, number=MANY_CHAINS):
    return EVERY[np.random.default_rng(seed).choice(len(EVERY), number, p=probs)]


def p_value(labels, probs):
    """Of the chi-square test of the joint distribution of all pixels."""
    labels = np.asarray(labels)
    numbers = labels @ NUM_CLASSES ** np.arange(labels.shape[1])[::-1]
    counts, expected = np.bincount(numbers, minlength=len(probs)), len(labels) * probs
    # The test is an approximation for at least five samples of everything: the rare labellings are counted together.
    rare = expected < 8
    counts, expected = (np.append(numbers[~rare], numbers[rare].sum()) for numbers in (counts, expected))
    return stats.chisquare(*(numbers[expected > 0] for numbers in (counts, expected))).pvalue


def standard_errors_off(samples, expected):
    """How many standard errors the means over the chains lie from what is expected, at most."""
    samples = np.asarray(samples, np.float64)
    return np.max(np.abs(samples.mean(axis=0) - expected) / (samples.std(axis=0) / np.sqrt(len(samples))))


def statistics_of(labels):
    """[n, 2 m + m (m - 1) / 2] indicators of two of the classes, and of equal labels of two pixels."""
    first, second = np.triu_indices(NUM_PIXELS, 1)
    return np.concatenate([labels == 0, labels == 1, labels[:, first] == labels[:, second]], axis=1)


def with_self_pairs(weight, kernel=KERNEL, unary=UNARY):
    """[K^m] what single-site updates lead to if a label sees itself: the stationary distribution of such a sweep."""
    sweep = np.eye(len(EVERY))
    for i in range(NUM_PIXELS):
        weights = np.float64(kernel[i]) + weight * np.eye(NUM_PIXELS)[i]
        probs = reference.softmax(unary[i] + np.einsum("j,zjk->zk", weights, ONE_HOT))
        same_others = (np.delete(EVERY, i, 1)[:, None] == np.delete(EVERY, i, 1)).all(axis=-1)
        sweep = sweep @ (same_others * probs[:, EVERY[:, i]])
    return np.linalg.matrix_power(sweep, 200)[0]


@functools.cache
def from_the_posterior(num_blocks, name):
    """Chains that start from exact samples of the posterior, after a sweep: no question of burn-in."""
    start = exact_samples(31, posterior(name))
    return jax.tree.map(np.asarray, chains(keys_of(32), start, KERNEL, UNARY, name, 1, num_blocks))


@pytest.mark.slow_except("2-none", "3-area", "5-max_pool")
@every_likelihood
@every_number_of_blocks
def test_a_sweep_leaves_the_posterior_as_it_is(num_blocks, name):
    # Chi-square at a significance of 1e-3; the seed is fixed, so the test passes always or never.
    labels = from_the_posterior(num_blocks, name).labels
    assert p_value(labels, posterior(name)) > 1e-3
    moved = np.mean(labels != exact_samples(31, posterior(name)))
    assert moved > 0.1, "a chain that stands still would pass too"


@pytest.mark.slow
@every_number_of_blocks
def test_a_sweep_of_another_chain_does_not(num_blocks):
    """What the test above can see: the same samples after one sweep with something wrong."""
    def after_a_sweep(name, kernel, unary):
        return chains(keys_of(32), exact_samples(31, posterior(name)), kernel, unary, "none", 1, num_blocks).labels

    one_pair = KERNEL * (KERNEL == KERNEL.max())
    wrong = {
        "twice the kernel": after_a_sweep("none", 2 * KERNEL, UNARY),
        "a pair left out": after_a_sweep("none", KERNEL - one_pair, UNARY),
        "another unary": after_a_sweep("none", KERNEL, 0.8 * UNARY),
        "area left out": after_a_sweep("area", KERNEL, UNARY),
        "max_pool left out": after_a_sweep("max_pool", KERNEL, UNARY),
    }
    for what, labels in wrong.items():
        name = what.split()[0]
        assert p_value(labels, posterior(name if name in LIKELIHOODS else "none")) < 1e-3, what


@pytest.mark.slow
@with_and_without
@every_number_of_blocks
def test_chains_from_a_fixed_start_reach_the_posterior(num_blocks, name):
    """Means within 4 standard errors; wrong distributions lie further away."""
    start = jnp.zeros((SOME_CHAINS, NUM_PIXELS), jnp.int32)
    labels = np.asarray(chains(keys_of(3, SOME_CHAINS), start, KERNEL, UNARY, name, 20, num_blocks).labels)

    def off(probs):
        return standard_errors_off(statistics_of(labels), probs @ statistics_of(EVERY))

    assert off(posterior(name)) < 4
    wrong = {
        "twice the kernel": posterior(name, kernel=2 * KERNEL),
        "half the kernel": posterior(name, kernel=KERNEL / 2),
        "no kernel": posterior(name, kernel=0 * KERNEL),
        "no unary": posterior(name, unary=0 * UNARY),
        "another likelihood": posterior("area" if name == "none" else "none"),
    }
    if name == "none":
        wrong["a label that sees itself"] = with_self_pairs(1.0)
    for what, probs in wrong.items():
        assert off(probs) > 8, what


def test_the_reference_of_self_pairs_without_any_is_the_posterior():
    np.testing.assert_allclose(with_self_pairs(0.0), posterior(), rtol=1e-5)


@pytest.mark.slow_except("2-none", "3-area", "5-max_pool")
@every_likelihood
@every_number_of_blocks
def test_marginals_are_unbiased_at_stationarity(num_blocks, name):
    marginals = from_the_posterior(num_blocks, name).marginals
    assert standard_errors_off(marginals, marginals_of(posterior(name))) < 4
    for wrong in (posterior(name, kernel=2 * KERNEL), posterior("area" if name == "none" else "none")):
        assert standard_errors_off(marginals, marginals_of(wrong)) > 8


@pytest.mark.slow_except("2")
@every_number_of_blocks
def test_conditional_distributions_vary_less_than_labels(num_blocks):
    """The theorem of Rao and Blackwell: the marginals of one sweep have the labels' mean and a smaller variance."""
    samples = from_the_posterior(num_blocks, "none")
    one_hot = np.eye(NUM_CLASSES)[samples.labels]
    assert (samples.marginals.var(axis=0) < 0.7 * one_hot.var(axis=0)).all()
    # And the labels are drawn from them: given the marginals nothing of the labels' mean is left over.
    assert standard_errors_off(one_hot - samples.marginals, 0) < 4
    assert standard_errors_off((one_hot - samples.marginals) * samples.marginals, 0) < 4


@pytest.mark.parametrize("name", ["area", "max_pool"])
def test_with_a_likelihood_the_marginals_of_a_sweep_are_its_labels(name):
    samples = from_the_posterior(3, name)
    np.testing.assert_array_equal(samples.marginals, np.eye(NUM_CLASSES)[samples.labels])


@pytest.mark.slow
@with_and_without
def test_marginals_are_the_mean_over_the_sweeps(name):
    start = exact_samples(4, posterior(name))
    marginals = np.asarray(chains(keys_of(5), start, KERNEL, UNARY, name, 3, 2).marginals)
    assert standard_errors_off(marginals, marginals_of(posterior(name))) < 4
    if name == "area":
        np.testing.assert_allclose(3 * marginals, np.round(3 * marginals), atol=1e-5)
    # More than a third of the variance, as sweeps are not independent; less than all of it, as in the last one alone.
    ratio = marginals.var(axis=0) / from_the_posterior(2, name).marginals.var(axis=0)
    assert ratio.min() > 0.3 and ratio.max() < 0.85


@pytest.mark.slow_except("2")
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_two_pixels_agree_as_often_as_by_hand(num_blocks):
    """Two pixels, three classes, no unary: P(z_1 = z_2) is e^k / (e^k + 2)."""
    start = jnp.zeros((SOME_CHAINS, 2), jnp.int32)
    kernel = np.float32([[0, 0.9], [0.9, 0]])
    unary = np.zeros((2, 3), np.float32)
    labels = np.asarray(chains(keys_of(6, SOME_CHAINS), start, kernel, unary, "none", 20, num_blocks).labels)
    agree = labels[:, :1] == labels[:, 1:]
    assert standard_errors_off(agree, np.exp(0.9) / (np.exp(0.9) + 2)) < 4
    assert standard_errors_off(labels == 0, 1 / 3) < 4


@pytest.mark.slow_except("3")
@pytest.mark.parametrize("num_blocks", [1, 3, NUM_PIXELS])
def test_without_a_kernel_one_sweep_gives_independent_labels(num_blocks):
    """From any start. The field of a pixel is N(d z_k, d) with d = 1e-3: little is left of it in the softmax."""
    start = jnp.zeros((MANY_CHAINS, NUM_PIXELS), jnp.int32)
    samples = chains(keys_of(7), start, np.zeros_like(KERNEL), UNARY, "none", 1, num_blocks)
    expected = reference.softmax(UNARY)
    assert p_value(samples.labels, np.exp(reference.factorised_log_probs(expected))) > 1e-3
    # A difference of logits has a standard deviation of sqrt(2 d); the slope of a probability is at most 1 / 4.
    np.testing.assert_allclose(samples.marginals, np.broadcast_to(expected, samples.marginals.shape),
                               atol=6 * np.sqrt(2e-3) / 4)
    np.testing.assert_allclose(np.mean(samples.marginals, axis=0), expected, atol=1e-3)


@pytest.mark.slow_except("area")
@with_and_without
def test_the_diagonal_of_the_kernel_is_ignored(name):
    start = exact_samples(8, posterior(name), 50)
    diagonal = np.diag(np.float32([3, -2, 0.5, 1e6, 7]))
    expected = chains(keys_of(9, 50), start, KERNEL, UNARY, name, 3, 2)
    samples = chains(keys_of(9, 50), start, KERNEL + diagonal, UNARY, name, 3, 2)
    np.testing.assert_array_equal(samples.labels, expected.labels)
    np.testing.assert_array_equal(samples.marginals, expected.marginals)


def test_the_symmetric_part_of_the_kernel_counts_and_a_diagonal_may_be_infinite():
    skew = np.triu(np.float32(np.random.default_rng(0).normal(size=KERNEL.shape)), 1)
    odd = KERNEL + skew - skew.T + np.diag(np.float32([np.inf] * NUM_PIXELS))
    start = exact_samples(8, posterior("none"), 50)
    expected = chains(keys_of(9, 50), start, (KERNEL + KERNEL.T) / 2, UNARY, "none", 3, 2)
    samples = chains(keys_of(9, 50), start, odd, UNARY, "none", 3, 2)
    np.testing.assert_array_equal(samples.labels, expected.labels)
    np.testing.assert_allclose(samples.marginals, expected.marginals, atol=1e-5)


@pytest.mark.slow
@with_and_without
def test_labels_passed_on_go_on_with_the_chain(name):
    """One sweep from a fixed start is not the posterior yet; call after call of one sweep it is."""
    expected = posterior(name) @ statistics_of(EVERY)
    labels, off = jnp.zeros((SOME_CHAINS, NUM_PIXELS), jnp.int32), []
    for call in range(20):
        labels = chains(keys_of(100 + call, SOME_CHAINS), labels, KERNEL, UNARY, name, 1, 1).labels
        off.append(standard_errors_off(statistics_of(np.asarray(labels)), expected))
    assert off[0] > 8 and off[-1] < 4


@with_and_without
def test_the_gradient_of_q_is_unbiased(name):
    """Maximum likelihood on the chain's marginals: within 4 standard errors of the gradient on the posterior's."""
    logits = jnp.asarray(np.random.default_rng(10).normal(size=UNARY.shape), jnp.float32)
    gradient = jax.jit(jax.vmap(jax.grad(expected_log_prob), in_axes=(None, 0)))
    gradients = gradient(logits, from_the_posterior(2, name).marginals)

    def by_definition(probs):
        # A pixel's gradient is target - softmax.
        return marginals_of(probs) - reference.softmax(logits)

    assert standard_errors_off(gradients, by_definition(posterior(name))) < 4
    assert standard_errors_off(gradients, by_definition(posterior("area" if name == "none" else "none"))) > 8


@pytest.mark.slow
@with_and_without
def test_persistent_chains_bring_q_to_the_marginals_of_the_posterior(name):
    # The steps fall as 1 / t, so that the noise of the chains averages out.
    num_chains, num_steps = 500, 200

    @jax.jit
    def fitted(key):
        def step(carry, inputs):
            logits, labels = carry
            step_key, number = inputs
            samples = chains(jax.random.split(step_key, num_chains), labels, KERNEL, UNARY, name, 1, 2)
            loss = jax.grad(lambda x: jax.vmap(expected_log_prob, (None, 0))(x, samples.marginals).mean())
            return (logits + 16 / (number + 4) * loss(logits), samples.labels), None

        start = jnp.zeros_like(UNARY), jnp.zeros((num_chains, NUM_PIXELS), jnp.int32)
        (logits, _), _ = jax.lax.scan(step, start, (jax.random.split(key, num_steps), jnp.arange(num_steps)))
        return jax.nn.softmax(logits)

    got = fitted(jax.random.key(11))
    np.testing.assert_allclose(got, marginals_of(posterior(name)), atol=0.015)
    for wrong in (reference.softmax(UNARY), marginals_of(posterior("area" if name == "none" else "none"))):
        assert np.abs(got - wrong).max() > 0.03


def check_valid(samples, num_pixels, num_classes):
    assert samples.labels.shape == (num_pixels,) and samples.labels.dtype == jnp.int32
    assert samples.marginals.shape == (num_pixels, num_classes) and samples.marginals.dtype == jnp.float32
    assert set(np.unique(samples.labels)) <= set(range(num_classes))
    assert np.min(samples.marginals) >= 0
    np.testing.assert_allclose(samples.marginals.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.slow
@with_and_without
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_large_unaries_decide(num_blocks, name):
    unary = np.float32([[1e4, -1e4, 0], [-1e4, -1e4, -1e4], [0, -np.inf, -np.inf], [1e4, 1e4, -np.inf], [-1e4, 0, 1e4]])
    samples = chains(keys_of(12, 200), jnp.ones((200, NUM_PIXELS), jnp.int32), KERNEL, unary, name, 20, num_blocks)
    for labels, marginals in zip(samples.labels, samples.marginals):
        check_valid(type(samples)(labels, marginals), NUM_PIXELS, NUM_CLASSES)
    np.testing.assert_array_equal(samples.labels[:, [0, 2, 4]], np.broadcast_to([0, 0, 2], (200, 3)))
    assert set(np.unique(samples.labels[:, 1])) == {0, 1, 2}
    assert set(np.unique(samples.labels[:, 3])) == {0, 1}


@pytest.mark.slow_except("8")
@pytest.mark.parametrize("num_blocks", [1, 8, 60])
def test_a_strong_kernel_keeps_labels_equal_or_apart(num_blocks):
    """Row sums of 1e3: what agrees stays so, whatever the unary says. Where they repel, no class has all pixels."""
    kernel = np.full((60, 60), 1e3 / 59, np.float32)
    unary = np.random.default_rng(13).normal(size=(60, 3)).astype(np.float32)
    run = jax.jit(functools.partial(gibbs, jax.random.key(14), num_sweeps=20, num_blocks=num_blocks))
    for label in range(3):
        samples = run(np.full(60, label), kernel, unary)
        check_valid(samples, 60, 3)
        np.testing.assert_array_equal(samples.labels, label)
    samples = run(np.zeros(60, int), -kernel, unary)
    check_valid(samples, 60, 3)
    assert np.bincount(samples.labels).max() <= (21 if num_blocks == 60 else 40)


@pytest.mark.slow
@pytest.mark.parametrize("num_pixels, num_classes", [(1, 3), (1, 1), (NUM_PIXELS, 1)])
@with_and_without
def test_one_pixel_and_one_class(num_pixels, num_classes, name):
    kernel, unary = random_case(16, num_pixels, num_classes)
    likelihood = None if name == "none" else lambda z: area(z, TAGS[:num_classes])
    start = np.zeros(num_pixels, int)
    samples = gibbs(jax.random.key(17), start, kernel, unary, log_likelihood=likelihood, num_sweeps=2)
    check_valid(samples, num_pixels, num_classes)
    if num_classes == 1:
        np.testing.assert_array_equal(samples.marginals, 1)
    elif name == "none":
        np.testing.assert_allclose(samples.marginals, reference.softmax(unary), atol=0.06)


@pytest.mark.slow
def test_a_state_that_the_likelihood_excludes_is_left_and_never_entered():
    """Minus infinity: all pixels of one class is impossible."""
    def likelihood(z):
        return jnp.where(z.mean(axis=0).max() == 1, -jnp.inf, 0.0)

    run = jax.jit(jax.vmap(lambda key: gibbs(key, jnp.zeros(3, int), 0.5 - 0.5 * jnp.eye(3), jnp.zeros((3, 2)),
                                             log_likelihood=likelihood, num_sweeps=30, num_blocks=2)))
    labels = np.asarray(run(keys_of(18, 2000)).labels)
    assert set(labels.sum(axis=1)) == {1, 2}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_short_types_are_sampled_in_float32(dtype):
    kernel, unary = jnp.asarray(4 * KERNEL, dtype), jnp.asarray(4 * UNARY, dtype)
    start = np.zeros(NUM_PIXELS, np.uint8)
    samples = gibbs(jax.random.key(19), start, kernel, unary)
    check_valid(samples, NUM_PIXELS, NUM_CLASSES)
    expected = gibbs(jax.random.key(19), start, kernel.astype(jnp.float32), unary.astype(jnp.float32))
    np.testing.assert_array_equal(samples.labels, expected.labels)
    np.testing.assert_allclose(samples.marginals, expected.marginals, rtol=1e-5)


def test_float64_is_kept():
    with jax.enable_x64(True):
        arguments = [jax.ShapeDtypeStruct(array.shape, jnp.float64) for array in (KERNEL, UNARY)]
        start = jax.ShapeDtypeStruct((NUM_PIXELS,), jnp.int32)
        samples = jax.eval_shape(gibbs, jax.random.key(0), start, *arguments)
    assert samples.marginals.dtype == jnp.float64 and samples.labels.dtype == jnp.int32


@pytest.mark.slow_except("40")
@pytest.mark.parametrize("num_pixels", [40, 400])
def test_the_field_of_a_kernel_with_many_pixels_is_finite(num_pixels):
    """Smooth kernels are next to singular, and one whose rows differ a lot is scaled badly: one block of either."""
    features = np.linspace(0, 3, num_pixels)[:, None]
    smooth = reference.gaussian_kernel(features)
    scales = np.logspace(-4, 4, num_pixels)
    run = jax.jit(functools.partial(gibbs, jax.random.key(20), num_blocks=1))
    for kernel in (smooth, -smooth, np.sqrt(np.outer(scales, scales)) * smooth):
        start = np.zeros(num_pixels, int)
        samples = run(start, np.float32(kernel), np.zeros((num_pixels, 2), np.float32))
        check_valid(samples, num_pixels, 2)


@pytest.mark.slow_except("area")
@with_and_without
def test_vmap_equals_a_loop(name):
    cases = [random_case(seed, NUM_PIXELS, NUM_CLASSES) for seed in range(3)]
    kernels, unaries = (np.stack(arrays) for arrays in zip(*cases))
    labels, keys = exact_samples(21, posterior(name), 3), keys_of(22, 3)
    one = jax.jit(functools.partial(gibbs, log_likelihood=LIKELIHOODS[name], num_sweeps=3, num_blocks=2))
    many = jax.jit(jax.vmap(one))(keys, labels, kernels, unaries)
    for number, case in enumerate(zip(keys, labels, kernels, unaries)):
        expected = one(*case)
        np.testing.assert_array_equal(many.labels[number], expected.labels)
        np.testing.assert_allclose(many.marginals[number], expected.marginals, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@with_and_without
@pytest.mark.parametrize("shared", [(), ("kernel", "unary"), ("labels", "kernel", "unary")],
                         ids=["nothing", "image", "all but the keys"])
def test_four_devices_equal_one(shared, name):
    """A batch of images, or chains of one image, or images with the same start, spread over the devices."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    cases = [random_case(seed, NUM_PIXELS, NUM_CLASSES) for seed in range(8)]
    kernels, unaries = (np.stack(arrays) for arrays in zip(*cases))
    arguments = {"labels": exact_samples(23, posterior(name), 8), "kernel": kernels, "unary": unaries}
    arrays = [keys_of(24, 8), *(array[0] if what in shared else array for what, array in arguments.items())]
    axes = (0, *(None if what in shared else 0 for what in arguments))
    one = functools.partial(gibbs, log_likelihood=LIKELIHOODS[name], num_sweeps=2, num_blocks=2)
    many = jax.vmap(one, in_axes=axes)
    mesh, data = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",)), PartitionSpec("data")
    specs = tuple(PartitionSpec() if axis is None else data for axis in axes)
    got = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=specs, out_specs=data))(*arrays)
    expected = jax.jit(many)(*arrays)
    np.testing.assert_array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.marginals, expected.marginals, rtol=1e-4, atol=1e-6)


@with_and_without
def test_the_key_alone_decides(name):
    start = exact_samples(25, posterior(name), 50)
    first = chains(keys_of(26, 50), start, KERNEL, UNARY, name, 3, 2)
    again = chains(keys_of(26, 50), start, KERNEL, UNARY, name, 3, 2)
    np.testing.assert_array_equal(again.labels, first.labels)
    np.testing.assert_array_equal(again.marginals, first.marginals)
    assert (chains(keys_of(27, 50), start, KERNEL, UNARY, name, 3, 2).labels != first.labels).any()


@with_and_without
def test_no_gradient_flows_through(name):
    def total(kernel, unary, scale):
        likelihood = None if name == "none" else lambda z: scale * LIKELIHOODS[name](z)
        samples = gibbs(jax.random.key(28), np.zeros(NUM_PIXELS, int), kernel, unary, log_likelihood=likelihood)
        return jnp.sum(samples.marginals * UNARY)

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1, 2)))(KERNEL, UNARY, 1.0):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("changes, message", [
    ({"unary_logits": np.zeros((2, 5, 3))}, r"unary_logits: expected shape \[m, K\], got \[2, 5, 3\]; .*flatten"),
    ({"unary_logits": np.zeros((5, 0))}, r"unary_logits: expected shape \[m, K\], got \[5, 0\]"),
    ({"labels": np.zeros((5, 3))}, r"labels: expected shape \[5\], got \[5, 3\]; .*number of a class"),
    ({"labels": np.zeros(4, int)}, r"labels: expected shape \[5\], got \[4\]"),
    ({"kernel": np.zeros((5, 4))}, r"kernel: expected shape \[5, 5\], got \[5, 4\]; .*dense"),
    ({"num_sweeps": 0}, r"num_sweeps: expected a finite number >= 1, got 0"),
    ({"num_blocks": 0}, r"num_blocks: expected a finite number >= 1, got 0"),
    ({"num_blocks": -2}, r"num_blocks: expected a finite number >= 1, got -2"),
    ({"num_blocks": 2.5}, r"num_blocks: expected a whole number, got 2.5"),
    ({"num_sweeps": 1.5}, r"num_sweeps: expected a whole number, got 1.5"),
    ({"log_likelihood": lambda z: z.sum(axis=0)}, r"log_likelihood: expected shape \[\], got \[3\]"),
])
def test_what_does_not_fit_is_refused(changes, message):
    arguments = {"labels": np.zeros(NUM_PIXELS, int), "kernel": KERNEL, "unary_logits": UNARY}
    with pytest.raises(ValueError, match=message):
        gibbs(jax.random.key(0), **{**arguments, **changes})
