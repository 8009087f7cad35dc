"""The decoder, and the network that puts it on a frozen backbone."""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from lcrf_jax.nets.decoder import Decoder, UpConv
from lcrf_jax.nets.efficientnet_lite import EfficientNetLite, preprocess
from lcrf_jax.nets.network import SmallBackbone, backbone_variables, build_network, feature_identity
from lcrf_jax.nets.weights import PUBLISHED

SMALL = {"backbone": "small", "last_stride": 32, "taps": ["s32", "s16", "s8", "s4"],
         "widths": [20, 16, 12, 8], "dropout": 0.0, "num_classes": 5}
WITH_HEAD = {**SMALL, "taps": ["head", "s16", "s8"], "widths": [20, 16, 12]}
LITE0 = {**SMALL, "backbone": "efficientnet_lite0", "widths": [256, 128, 96, 64], "num_classes": 7}
every_backbone = pytest.mark.parametrize("description", [SMALL, LITE0], ids=["small", "efficientnet_lite0"])


@functools.cache
def variables_of(backbone):
    return backbone_variables({**SMALL, "backbone": backbone})[0]


@functools.cache
def small_features(description_name="taps", seed=0):
    """Network, variables and features of a picture for the small backbone."""
    network = build_network({"taps": SMALL, "head": WITH_HEAD}[description_name])
    variables = variables_of("small")
    return network, variables, jax.jit(network.features)(variables, images(seed, 64, 64))


def images(seed, height, width, count=1):
    return np.stack([reference.smooth_image(seed + i, height, width) for i in range(count)]).astype(np.uint8)


def random_features(seed, grids, widths=(6, 5, 4)):
    """Taps s16, s8, ... of one image, coarse to fine, on the given grids."""
    rng = np.random.default_rng(seed)
    return {tap: rng.normal(size=(1, *grid, width)).astype(np.float32)
            for tap, grid, width in zip(("s16", "s8", "s4"), grids, widths)}


def layer_norm(x, params):
    x = np.float64(x)
    deviation = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(deviation).mean(axis=-1, keepdims=True)
    return deviation / np.sqrt(variance + 1e-6) * params["scale"] + params["bias"]


def transposed_conv(x, params):
    """Every cell becomes 2 x 2 cells, each with a matrix of its own."""
    height, width, _ = x.shape
    channels = params["kernel"].shape[1] // 4
    result = np.zeros((2 * height, 2 * width, channels))
    for row, column, i, j in np.ndindex(height, width, 2, 2):
        part = slice((2 * i + j) * channels, (2 * i + j + 1) * channels)
        cell = x[row, column] @ np.float64(params["kernel"][:, part]) + params["bias"][part]
        result[2 * row + i, 2 * column + j] = cell
    return result


def decoded(params, features, taps, num_doublings):
    """The decoder on one image, in float64."""
    relu = functools.partial(np.maximum, 0)
    x = None
    for tap in taps:
        skip = layer_norm(features[tap][0], params[f"norm_{tap}"])
        if x is None:
            project = params[f"project_{tap}"]
            x = relu(skip @ np.float64(project["kernel"]) + project["bias"])
            continue
        for i in range(num_doublings[tap]):
            x = transposed_conv(x, params[f"up_{tap}_{i}"]["Dense_0"])
        x = x[: skip.shape[0], : skip.shape[1]]
        merge = params[f"merge_{tap}"]
        kernel = np.transpose(merge["kernel"], (3, 2, 0, 1))
        x = reference.conv(np.concatenate([x, skip], axis=-1), kernel) + merge["bias"]
        x = relu(layer_norm(x, params[f"post_{tap}"]))
    return x @ np.float64(params["logits"]["kernel"]) + params["logits"]["bias"]


def randomised(seed, params):
    """All parameters drawn anew, so that no bias is zero and no scale one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * 0.4).astype(np.float32), params)


@pytest.mark.parametrize(("taps", "grids", "num_doublings"), [
    (("s16", "s8", "s4"), [(2, 3), (4, 6), (8, 12)], {"s8": 1, "s4": 1}),
    (("s16", "s8", "s4"), [(2, 2), (3, 4), (5, 7)], {"s8": 1, "s4": 1}),
    (("s16", "s8"), [(3, 2), (3, 2)], {"s8": 0}),
    (("s16", "s8"), [(1, 2), (4, 7)], {"s8": 2}),
    (("s16", "s8"), [(1, 1), (1, 2)], {"s8": 1}),
    (("s16",), [(3, 4)], {}),
], ids=["halves", "odd", "same grid", "quarters", "one row", "one tap"])
def test_equals_the_definition(taps, grids, num_doublings):
    features = random_features(0, grids)
    decoder = Decoder(4, taps, (9, 8, 7)[: len(taps)])
    params = randomised(1, jax.eval_shape(decoder.init, jax.random.key(0), features)["params"])
    result = jax.jit(decoder.apply)({"params": params}, features)
    assert result.dtype == jnp.float32
    expected = decoded(params, features, taps, num_doublings)
    np.testing.assert_allclose(result[0], expected, rtol=1e-4, atol=1e-4)


def test_up_conv_by_hand():
    dense = {"kernel": jnp.array([[1.0, 10.0, 100.0, 1000.0]]), "bias": jnp.array([0.0, 0, 0, 5])}
    result = UpConv(1).apply({"params": {"Dense_0": dense}}, jnp.array([[[[1.0], [2.0]]]]))
    np.testing.assert_array_equal(result[0, :, :, 0], [[1, 10, 2, 20], [100, 1005, 200, 2005]])


@pytest.mark.slow_except("small-*")
@pytest.mark.parametrize(("backbone", "last_stride", "stride", "taps"), [
    ("efficientnet_lite0", 32, 4, ["s32", "s16", "s8", "s4"]),
    ("efficientnet_lite0", 16, 8, ["head", "s16", "s8"]),
    ("small", 32, 4, ["head", "s32", "s16", "s8", "s4"]),
    ("small", 16, 8, ["head", "s16", "s8"]),
    ("small", 16, 16, ["s32", "s16"]),
    ("small", 16, 16, ["head"]),
    ("small", 32, 32, ["head", "s32"]),
    ("small", 32, 8, ["s8"]),
])
def test_shapes_and_strides(backbone, last_stride, stride, taps):
    widths = [20, 16, 12, 8, 4][: len(taps)]
    description = {**SMALL, "backbone": backbone, "last_stride": last_stride, "taps": taps, "widths": widths}
    network, variables = build_network(description), variables_of(backbone)
    features = jax.eval_shape(network.features, variables, jnp.zeros((2, 64, 96, 3), jnp.uint8))
    assert set(features) == set(network.taps) == {*taps, "s32"} - {"head"}
    assert features["s32"].shape[1:3] == (64 // last_stride, 96 // last_stride)
    params = jax.eval_shape(network.init, jax.random.key(0), variables, features)
    logits = jax.eval_shape(network.logits, params, variables, features)
    assert network.stride == stride
    assert logits.shape == (2, 64 // stride, 96 // stride, description["num_classes"])
    assert logits.dtype == jnp.float32
    head = jax.eval_shape(network.head, variables, features)
    assert head.shape[:3] == features["s32"].shape[:3]


@pytest.mark.slow
def test_the_number_of_parameters_of_the_default_decoder():
    network = build_network(LITE0)
    variables = variables_of("efficientnet_lite0")
    features = jax.eval_shape(network.features, variables, jnp.zeros((1, 224, 224, 3)))
    params = jax.eval_shape(network.init, jax.random.key(0), variables, features)
    assert [Decoder(7).taps, Decoder(7).widths] == [tuple(LITE0["taps"]), tuple(LITE0["widths"])]
    expected = 2 * (320 + 112 + 40 + 24) + 320 * 256 + 256
    for coarse, skip, width in ((256, 112, 128), (128, 40, 96), (96, 24, 64)):
        expected += 4 * (coarse * width + width) + 9 * (width + skip) * width + width + 2 * width
    expected += 64 * 7 + 7
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


@pytest.mark.slow_except("small")
@every_backbone
def test_the_same_parameters_serve_every_image_size(description):
    network, variables = build_network(description), variables_of(description["backbone"])
    shapes = {}
    for height, width in ((64, 64), (96, 160), (224, 224), (72, 100)):
        features = jax.eval_shape(network.features, variables, jnp.zeros((1, height, width, 3)))
        shapes[height, width] = jax.eval_shape(network.init, jax.random.key(0), variables, features)
    first = shapes[64, 64]
    assert all(jax.tree.map(lambda a, b: a.shape == b.shape, first, other) for other in shapes.values())
    assert all(jax.tree.structure(other) == jax.tree.structure(first) for other in shapes.values())


@pytest.mark.slow_except("small")
@every_backbone
def test_head_is_that_of_the_module(description):
    network, variables = build_network(description), variables_of(description["backbone"])
    module = {"small": SmallBackbone, "efficientnet_lite0": EfficientNetLite}[description["backbone"]]()
    taps = jax.jit(module.apply)(variables, preprocess(images(0, 64, 64)))
    np.testing.assert_allclose(jax.jit(network.head)(variables, taps), taps["head"], rtol=1e-4, atol=1e-4)
    halves = {"s32": np.asarray(taps["s32"], np.float16)}
    assert jax.eval_shape(network.head, variables, halves).dtype == jnp.float32
    assert np.abs(taps["head"]).max() > 0.1


def test_features_are_the_taps_of_the_preprocessed_image():
    network, variables, features = small_features()
    taps = jax.jit(SmallBackbone().apply)(variables, preprocess(images(0, 64, 64)))
    for tap in network.taps:
        np.testing.assert_allclose(features[tap], taps[tap], rtol=1e-4, atol=1e-4)
        assert np.abs(taps[tap]).max() > 0.1


@pytest.mark.slow_except("taps")
@pytest.mark.parametrize("description", [SMALL, WITH_HEAD], ids=["taps", "head"])
def test_one_image_of_a_batch_does_not_see_the_others(description):
    network, variables = build_network(description), variables_of("small")
    batch = images(1, 64, 64, count=3)
    features = jax.jit(network.features)(variables, batch)
    params = randomised(0, jax.eval_shape(network.init, jax.random.key(0), variables, features))
    run = jax.jit(lambda x: network.logits(params, variables, network.features(variables, x)))
    np.testing.assert_allclose(run(batch)[1:2], run(batch[1:2]), rtol=1e-4, atol=1e-4)
    assert np.abs(run(batch)[0] - run(batch)[1]).max() > 0.1
    np.testing.assert_array_equal(run(batch.astype(np.float32)), run(batch))


def test_the_tap_head_is_the_head():
    """The decoder gets it from s32 and the backbone's weights, as the tag classifier does."""
    network, variables, features = small_features("head")
    params = randomised(0, jax.eval_shape(network.init, jax.random.key(0), variables, features))
    decoder = Decoder(5, ("head", "s16", "s8"), (20, 16, 12))
    given = {**features, "head": network.head(variables, features)}
    expected = jax.jit(decoder.apply)({"params": params}, given)
    logits = jax.jit(network.logits)(params, variables, features)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_initialisation_follows_the_key_and_starts_near_uniform():
    _, variables, features = small_features()
    network = build_network({**SMALL, "taps": ["s16", "s8"], "widths": [6, 4]})
    init = jax.jit(network.init)
    params = [init(jax.random.key(seed), variables, features) for seed in (0, 0, 1)]
    assert jax.tree.all(jax.tree.map(np.array_equal, params[0], params[1]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, params[0], params[2]))
    probs = jax.nn.softmax(jax.jit(network.logits)(params[0], variables, features))
    assert 0.5 / 5 < probs.min() and probs.max() < 2 / 5


def test_dropout_only_with_a_key():
    _, variables, features = small_features()
    network = build_network({**SMALL, "dropout": 0.5})
    params = randomised(0, jax.eval_shape(network.init, jax.random.key(0), variables, features))
    logits, without = jax.jit(network.logits), jax.jit(build_network(SMALL).logits)
    plain = without(params, variables, features)
    np.testing.assert_allclose(logits(params, variables, features), plain, rtol=1e-5, atol=1e-5)
    one, again, other = (logits(params, variables, features, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - plain).max() > 0.1 and np.abs(one - other).max() > 0.1
    keyed = without(params, variables, features, jax.random.key(1))
    np.testing.assert_allclose(keyed, plain, rtol=1e-5, atol=1e-5)


def test_dropout_takes_whole_channels_and_keeps_the_mean():
    """On a constant tap the logits are constant, and their mean over keys is that without dropout."""
    decoder = Decoder(3, ("s16",), (64,), dropout=0.3)
    features = {"s16": np.ones((1, 3, 4, 1)) * np.random.default_rng(0).normal(size=10)}
    params = decoder.init(jax.random.key(0), features)["params"]
    # A ReLU that never cuts makes the decoder linear in the dropped tap.
    params["project_s16"]["bias"] = jnp.full(64, 50.0)
    params["logits"]["kernel"] = jax.random.normal(jax.random.key(1), (64, 3))

    @jax.jit
    @jax.vmap
    def logits(key):
        return decoder.apply({"params": params}, features, train=True, rngs={"dropout": key})[0]

    drawn = np.asarray(logits(jax.random.split(jax.random.key(2), 2000)))
    np.testing.assert_allclose(drawn, np.broadcast_to(drawn[:, :1, :1], drawn.shape), rtol=1e-5)
    plain = decoder.apply({"params": params}, features)[0, 0, 0]
    deviation = np.abs(drawn[:, 0, 0].mean(axis=0) - plain)
    assert (deviation < 4 * drawn[:, 0, 0].std(axis=0) / np.sqrt(2000)).all()
    assert drawn[:, 0, 0].std(axis=0).min() > 0.1


def test_every_parameter_is_trained_and_extremes_are_finite():
    network, variables, features = small_features()
    params = randomised(3, jax.eval_shape(network.init, jax.random.key(0), variables, features))

    @jax.jit
    def gradient(params, features):
        return jax.grad(lambda p: jnp.square(network.logits(p, variables, features) - 1).sum())(params)

    for path, leaf in jax.tree.leaves_with_path(gradient(params, features)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    for scale in (0.0, 1e4):
        extreme = {tap: scale * array for tap, array in features.items()}
        assert np.isfinite(jax.jit(network.logits)(params, variables, extreme)).all()
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(params, extreme)))


@pytest.mark.slow
def test_bfloat16_is_for_products_alone():
    """Parameters, features and logits are float32, and differ from those of float32 products by its rounding."""
    exact, rough = build_network(SMALL), build_network({**SMALL, "compute_dtype": "bfloat16"})
    variables, pictures = variables_of("small"), images(0, 64, 64)
    features = [jax.jit(network.features)(variables, pictures) for network in (exact, rough)]
    params = randomised(3, jax.eval_shape(rough.init, jax.random.key(0), variables, features[0]))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, features))} == {jnp.dtype("float32")}
    outputs = [jax.jit(network.logits)(params, variables, features[0]) for network in (exact, rough)]
    for expected, found in (*zip(*map(jax.tree.leaves, features), strict=True), outputs):
        assert found.dtype == jnp.float32
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert 1e-4 < error < 2e-2
    same = build_network({**SMALL, "compute_dtype": "float32"})
    np.testing.assert_array_equal(jax.jit(same.logits)(params, variables, features[0]), outputs[0])
    assert feature_identity(exact.description) == feature_identity(same.description) != feature_identity(rough.description)


def test_the_description_is_kept_and_fits_into_json():
    network = build_network(json.loads(json.dumps(LITE0)))
    assert network.description == LITE0 and network.description is not LITE0


@pytest.mark.slow
def test_weights_are_known_by_their_hash():
    (small, first), (again, second) = backbone_variables(SMALL), backbone_variables({**SMALL, "dropout": 0.5})
    assert first == second and re.fullmatch("[0-9a-f]{64}", first)
    assert jax.tree.all(jax.tree.map(np.array_equal, small, again))
    assert backbone_variables(LITE0)[1] == PUBLISHED["efficientnet_lite0"].package.sha256 != first


@pytest.mark.parametrize(("change", "message"), [
    ({"backbone": "vgg"}, r"network.backbone: expected one of \[.*'efficientnet_lite0', .*'small', .*\], got 'vgg'"),
    ({"taps": ["s4", "s8"]}, r"network.taps: expected some of \('head', 's32', .*\), in this order, got"),
    ({"taps": ["s64"]}, r"network.taps: .* got \('s64',\)"),
    ({"taps": ["s32", "s32"]}, r"network.taps: .* got \('s32', 's32'\)"),
    ({"taps": []}, r"network.taps: .* got \(\)"),
    ({"widths": [8]}, r"network.widths: expected one for each of the taps .* got \(8,\)"),
    ({"last_stride": 8}, r"network.last_stride: expected 16 or 32, got 8"),
    ({"last_stride": 4, "backbone": "vgg16"}, r"network.last_stride: expected 8, 16 or 32, got 4"),
    ({"decoder": "unet"}, r"network.decoder: expected one of \['large_field', 'original', 'skip'\], got 'unet'"),
    ({"decoder": "original", "taps": ["s8"]}, r"network.taps: expected two taps or more for the decoder 'original'"),
    ({"decoder": "large_field"}, r"network.taps: expected one tap for the decoder 'large_field', got"),
    ({"decoder": "original"}, r"network.widths: expected 6 for the decoder 'original' and the taps .* got \(20, 16, 12, 8\)"),
    ({"dropout": 1.0}, r"network.dropout: expected a share .* got 1.0"),
    ({"dropout": -0.1}, r"network.dropout: expected a share .* got -0.1"),
    ({"num_classes": 1}, r"network.num_classes: .* got 1"),
    ({"compute_dtype": "float16"}, r"network.compute_dtype: expected one of \['bfloat16', 'float32'\], got 'float16'"),
    ({"wdiths": [8]}, r"network: expected the entries \['backbone', .*\], got \[.*'wdiths'"),
])
def test_a_wrong_description_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_network({**SMALL, **change})


def test_an_incomplete_description_is_refused():
    with pytest.raises(ValueError, match=r"network: expected the entries .*'widths'\], got"):
        build_network({key: value for key, value in SMALL.items() if key != "widths"})
    with pytest.raises(ValueError, match=r"network.backbone: expected one of"):
        backbone_variables({**SMALL, "backbone": "vgg"})
    with pytest.raises(ValueError, match=r"widths: expected one for each .* \('s8',\), got \(4, 4\)"):
        Decoder(3, ("s8",), (4, 4)).init(jax.random.key(0), {"s8": jnp.zeros((1, 2, 2, 3))})


def test_modules_are_frozen_descriptions():
    assert isinstance(SmallBackbone(), nn.Module) and hash(Decoder(3)) == hash(Decoder(3))


def test_networks_are_equal_where_their_descriptions_are():
    """Programs are kept by the network: of two that differ in no shape each must have its own."""
    one, same = build_network(SMALL), build_network(dict(reversed(SMALL.items())))
    assert one == same and hash(one) == hash(same) and one != SMALL
    for change in ({"dropout": SMALL["dropout"] + 0.1}, {"compute_dtype": "bfloat16"}):
        other = build_network({**SMALL, **change})
        assert other != one and hash(other) != hash(one)
