"""The decoders of published networks on VGG16, against convolutions written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.original import LargeField, OriginalDecoder
from lcrf_jax.nets.vgg import VGG16
from lcrf_jax.train.step import count_parameters

ORIGINAL = {"backbone": "vgg16", "last_stride": 16, "taps": ["s16", "s8", "s4"], "decoder": "original",
            "widths": [512, 512, 256, 512], "dropout": 0.0, "num_classes": 21}
LARGE_FIELD = {**ORIGINAL, "last_stride": 8, "taps": ["s16"], "decoder": "large_field", "widths": [1024, 1024]}


def taps(seed, grids, channels=(6, 5, 4)):
    rng = np.random.default_rng(seed)
    return {tap: np.float32(rng.normal(size=(2, *grid, width)) * 3 + 1)
            for tap, grid, width in zip(("s16", "s8", "s4"), grids, channels)}


def standardised(x):
    x = np.float64(x)
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)


def convolved(x, layer, dilation=1):
    return np.maximum(reference.conv(x, np.transpose(layer["kernel"], (3, 2, 0, 1)), dilation=dilation) + layer["bias"], 0)


def doubled(x, layer):
    """Every cell adds its 3 x 3 outputs around twice its position, of which those outside are dropped."""
    height, width, _ = x.shape
    kernel = np.float64(layer["kernel"])
    out = np.zeros((2 * height + 2, 2 * width + 2, kernel.shape[-1]))
    for row, column in np.ndindex(height, width):
        for i, j in np.ndindex(3, 3):
            out[2 * row + 2 - i, 2 * column + 2 - j] += x[row, column] @ kernel[i, j]
    return np.maximum(out[: 2 * height, : 2 * width] + layer["bias"], 0)


def original_decoder(params, features):
    x = standardised(features["s16"])
    for tap in ("s8", "s4"):
        skip, doublings = standardised(features[tap]), 0
        while x.shape[0] < skip.shape[0] or x.shape[1] < skip.shape[1]:
            x, doublings = doubled(x, params[f"up_{tap}_{doublings}"]), doublings + 1
        x = convolved(np.concatenate([x[: skip.shape[0], : skip.shape[1]], skip], axis=-1), params[f"merge_{tap}"])
    return x @ np.float64(params["logits"]["kernel"]) + params["logits"]["bias"]


def large_field(params, features):
    x = convolved(convolved(standardised(features["s16"]), params["fc6"], dilation=12), params["fc7"])
    return x @ np.float64(params["logits"]["kernel"]) + params["logits"]["bias"]


def with_random_biases(params):
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(9)
    return jax.tree.unflatten(tree, [leaf + np.float32(rng.normal(size=leaf.shape) * 0.05) for leaf in leaves])


@pytest.mark.slow
@pytest.mark.parametrize("grids", [[(3, 3), (6, 6), (12, 12)], [(2, 3), (3, 5), (6, 10)]], ids=["halves", "odd"])
def test_the_original_decoder_is_what_it_says(grids):
    module, features = OriginalDecoder(4, widths=(7, 6, 5, 8)), taps(0, grids)
    params = with_random_biases(jax.jit(module.init)(jax.random.key(0), features)["params"])
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {
        "up_s8_0": (3, 3, 6, 7), "merge_s8": (3, 3, 12, 6), "up_s4_0": (3, 3, 6, 5), "merge_s4": (3, 3, 9, 8), "logits": (8, 4),
    }  # fmt: skip
    logits = jax.jit(module.apply)({"params": params}, features)
    assert logits.shape == (2, *grids[-1], 4) and logits.dtype == jnp.float32
    for at in range(2):
        expected = original_decoder(params, {tap: array[at] for tap, array in features.items()})
        np.testing.assert_allclose(logits[at], expected, atol=1e-5 * np.abs(expected).max())


def test_the_large_field_is_what_it_says():
    module, features = LargeField(4, widths=(7, 5)), taps(1, [(15, 14), (1, 1), (1, 1)])
    params = with_random_biases(jax.jit(module.init)(jax.random.key(0), features)["params"])
    logits = jax.jit(module.apply)({"params": params}, features)
    for at in range(2):
        expected = large_field(params, {tap: array[at] for tap, array in features.items()})
        np.testing.assert_allclose(logits[at], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("description", "size", "grid", "weights"), [
    (ORIGINAL, 224, 56, 10_629_397),
    (LARGE_FIELD, 321, 41, 5_790_741),
], ids=["original", "large_field"])  # fmt: skip
def test_sizes_as_published(description, size, grid, weights):
    """224 x 224 to 56 x 56 with about 10.6 million trainable weights; 321 x 321 to 41 x 41."""
    network = build_network(description)
    module = VGG16(last_stride=description["last_stride"])
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert count_parameters(variables) == 14_714_688

    def run(variables, images):
        features = network.features(variables, images)
        params = network.init(jax.random.key(0), variables, features)
        return params, network.logits(params, variables, features, jax.random.key(1)), network.head(variables, features)

    params, logits, head = jax.eval_shape(run, variables, jnp.zeros((2, size, size, 3)))
    assert count_parameters(params) == weights
    assert logits.shape == (2, grid, grid, 21) and network.grid(size) == grid
    assert head.shape == (2, -(-size // (8 if grid == 41 else 16)), head.shape[1], 512)


@pytest.mark.slow
@pytest.mark.parametrize("module", [OriginalDecoder(3, widths=(4, 4, 4, 4)), LargeField(3, widths=(4, 4))],
                         ids=["original", "large_field"])  # fmt: skip
def test_every_weight_learns_and_dropout_is_for_training_alone(module):
    features = taps(2, [(4, 4), (8, 8), (16, 16)])
    params = jax.jit(module.init)(jax.random.key(0), features)["params"]

    def loss(params, features):
        return jnp.square(module.apply({"params": params}, features)).mean()

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(params, features)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    dropping, plain = module.clone(dropout=0.5), jax.jit(module.apply)
    calm = jax.jit(dropping.apply)({"params": params}, features)
    np.testing.assert_array_equal(calm, plain({"params": params}, features))
    noise = jax.jit(lambda key: dropping.apply({"params": params}, features, train=True, rngs={"dropout": key}))
    noisy = [noise(jax.random.key(key)) for key in (0, 1, 0)]
    np.testing.assert_array_equal(noisy[0], noisy[2])
    assert not np.array_equal(noisy[0], noisy[1]) and not np.array_equal(noisy[0], calm)


def test_a_blank_tap_is_finite():
    """Cells of zeros, as black images give, are standardised to zeros."""
    module, features = OriginalDecoder(3, widths=(4, 4, 4, 4)), taps(3, [(2, 2), (4, 4), (8, 8)])
    features = {tap: np.zeros_like(array) for tap, array in features.items()}
    params = jax.jit(module.init)(jax.random.key(0), features)["params"]
    gradient = jax.jit(jax.grad(lambda features: module.apply({"params": params}, features).sum()))(features)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_bfloat16_products_leave_logits_in_float32():
    features = taps(4, [(2, 2), (4, 4), (8, 8)])
    exact, rough = (OriginalDecoder(3, widths=(8, 8, 8, 8), dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = jax.jit(exact.init)(jax.random.key(0), features)["params"]
    params = {**params, "logits": {**params["logits"], "kernel": 50 * params["logits"]["kernel"]}}
    one, other = (jax.jit(each.apply)({"params": params}, features) for each in (exact, rough))
    assert other.dtype == jnp.float32
    assert 1e-4 < np.linalg.norm(one - other) / np.linalg.norm(one) < 3e-2
