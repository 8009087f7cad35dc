"""Layers of a backbone that are trained: which they are, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from records import NETWORK, NUM_CLASSES, network_and_variables

from lcrf_jax.bound.record import Record
from lcrf_jax.nets import efficientnet_lite, resnet, vgg, vision_transformer
from lcrf_jax.nets.network import BACKBONES, SmallBackbone, build_network
from lcrf_jax.nets.trained import PART, merged, trained_layers, with_part
from lcrf_jax.nets.weights import parameter_shapes
from lcrf_jax.train.step import _gradient_of, make_optimizer

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


@pytest.mark.slow_except("small")
@pytest.mark.parametrize("name", ["small", "efficientnet_lite1", "vgg16", "resnet50", "dinov2_vits14_reg", "clip_vitb16"])
def test_every_parameter_is_of_a_layer_and_every_tap_is_complete_after_one(name):
    """A tap depends on the layers up to the one that completes it, and on no further one."""
    backbone = BACKBONES[name]
    names = [layer for layer, _ in backbone.layers]
    module = backbone.module(last_stride=backbone.last_strides[-1])
    assert len(set(names)) == len(names) and set(names) == {path.split("/")[0] for path in parameter_shapes(module)}
    taps = [tap for _, complete in backbone.layers for tap in complete]
    assert sorted(taps) == sorted(backbone.taps)
    side = 2 * (backbone.size_step if backbone.size_step > 1 else 16)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))
    program = jax.make_jaxpr(module.apply)(variables, jnp.zeros((1, side, side, 3)))
    results = jax.eval_shape(module.apply, variables, jnp.zeros((1, side, side, 3)))
    for tap, used in zip(sorted(results), _used_arguments(program.jaxpr), strict=True):
        paths = jax.tree_util.tree_flatten_with_path(variables)[0]
        found = {path[1].key for (path, _), each in zip(paths, used) if each}
        end = next(at for at, (_, complete) in enumerate(backbone.layers) if tap in complete)
        assert found == set(names[: end + 1]), tap


def _used_arguments(jaxpr):
    """For each result which arguments it depends on."""
    from jax.interpreters import partial_eval

    for at in range(len(jaxpr.outvars)):
        wanted = [other == at for other in range(len(jaxpr.outvars))]
        yield partial_eval.dce_jaxpr(jaxpr, wanted)[1]


@pytest.mark.parametrize(("name", "taps", "first", "expected"), [
    ("small", ("head", "s16"), "", ()),
    ("small", ("head", "s16"), "s32", ("s32", "head")),
    ("small", ("s16", "s8"), "s8", ("s8", "s16")),  # s32 and head have no part in it, and would only decay
    ("vgg16", ("s16", "s8"), "conv5", ("conv5_1", "conv5_2", "conv5_3")),
    ("vgg16", ("s16", "s8"), "conv5_2", ("conv5_2", "conv5_3")),
    ("resnet50", ("s32", "s16"), "stage3", ("stage3_block0", "stage3_block1", "stage3_block2")),
    ("resnet50", ("s16",), "stage2_block5", ("stage2_block5",)),
    ("efficientnet_lite0", ("head", "s16"), "stage6", ("stage6_block0", "head")),
    ("clip_vitb16", ("s32", "block9"), "block12", ("block12", "norm")),
    ("dinov2_vits14", ("block2",), "block1", ("block1", "block2")),  # and not block10 to block12
])
def test_layers_from_one_on_as_far_as_the_decoder_sees_them(name, taps, first, expected):
    assert trained_layers(BACKBONES[name].layers, first, taps) == expected
    last_stride = BACKBONES[name].last_strides[-1]
    description = {"backbone": name, "last_stride": last_stride, "taps": list(taps), "widths": [4] * len(taps),
                   "dropout": 0.0, "num_classes": 2, "trainable_from": first}
    assert build_network(description).trained == expected


def test_what_cannot_be_trained_is_refused():
    layers = BACKBONES["resnet50"].layers
    with pytest.raises(ValueError, match="network.trainable_from: expected '' for none, or one of stem, stage0, stage1, stage2, stage3, or a"):
        trained_layers(layers, "stage4", ("s32",))
    with pytest.raises(ValueError, match="no tap of the decoder depends on 'stage3'; the deepest, 's16', is complete after 'stage2_block5'"):
        trained_layers(layers, "stage3", ("s16", "s8"))


def test_without_such_layers_nothing_is_other():
    variables, params = {"params": {"a": 1, "b": 2}}, {"logits": 3}
    assert with_part(params, variables, ()) == params and merged(variables, params) is variables
    trained = with_part(params, variables, ("b",))
    assert trained == {"logits": 3, PART: {"b": 2}}
    trained[PART]["b"] = 5
    assert merged(variables, trained) == {"params": {"a": 1, "b": 5}} and variables["params"]["b"] == 2


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_network():
    """Against the derivative by all of its weights; the layers before are no part of it."""
    network, (_, variables) = build_network({**NETWORK, "dropout": 0.0, "trainable_from": "s16"}), network_and_variables()

    def objective(key, logits, record, step):
        return (jnp.sin(logits) * jnp.arange(1.0, NUM_CLASSES + 1)).sum(), {}

    def loss(params, whole):
        features = network.features(whole, IMAGES)
        return jax.vmap(lambda logits: objective(None, logits, None, 0)[0])(network.logits(params, whole, features)).mean()

    def both(key):
        params = network.init(key, variables, network.features(variables, IMAGES))
        params = {**params, PART: jax.tree.map(lambda leaf: 1.1 * leaf, params[PART])}  # they have moved
        batch = Record(tags=np.ones((2, NUM_CLASSES), bool), image=IMAGES)
        found = _gradient_of(network, objective, None)(params, variables, jax.random.split(key, 2), batch, 0)[0][0]
        return found, jax.grad(loss, argnums=(0, 1))({**params, PART: {}}, merged(variables, params))

    found, (by_decoder, by_backbone) = jax.jit(both)(jax.random.key(1))
    assert set(found[PART]) == {"s16", "s32", "head"} == set(network.trained)
    for name, leaf in found[PART].items():
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), leaf, by_backbone["params"][name])
        assert np.abs(leaf["kernel"]).max() > 1e-3
    by_decoder.pop(PART)
    decoder = {name: leaf for name, leaf in found.items() if name != PART}
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4), decoder, by_decoder)


@pytest.mark.slow
def test_the_backbone_has_a_rate_of_its_own():
    options = {"learning_rate": 0.1, "num_steps": 9, "warmup_steps": 0, "final_share": 0.1, "weight_decay": 0.5, "clip_norm": 1e9}
    params = {"logits": np.full(2, 2.0, np.float32), PART: {"s16": np.full(2, 2.0, np.float32)}}
    grads = jax.tree.map(np.ones_like, params)
    plain, slower = make_optimizer(**options), make_optimizer(**options, backbone_share=0.25)
    one, other = (each.update(grads, each.init(params), params)[0] for each in (plain, slower))
    np.testing.assert_array_equal(one["logits"], other["logits"])
    np.testing.assert_array_equal(0.25 * one[PART]["s16"], other[PART]["s16"])
    np.testing.assert_allclose(one[PART]["s16"], -0.1 * (1 + 0.5 * 2.0), rtol=1e-5)


def _narrow_modules(monkeypatch):
    """Name -> (module that keeps all, module that computes blocks again), of few channels and blocks."""
    monkeypatch.setattr(efficientnet_lite, "STAGES", tuple(stage._replace(width=8, repeats=2) for stage in efficientnet_lite.STAGES[:4]))
    monkeypatch.setattr(resnet, "STAGES", ((1, 2), (2, 3), (1, 4), (2, 5)))
    monkeypatch.setattr(vgg, "BLOCKS", ((4, 1), (4, 2), (4, 1), (4, 2), (4, 1)))
    few = vision_transformer.VARIANTS["dinov2_vits14_reg"]._replace(width=8, heads=2, patch=16, grid=2, depth=2)
    makers = {
        "small": SmallBackbone, "efficientnet_lite": functools.partial(efficientnet_lite.EfficientNetLite, 0), "resnet50": resnet.ResNet50,
        "vgg16": vgg.VGG16, "transformer": functools.partial(vision_transformer.VisionTransformer, few),
    }
    return {name: (maker(), maker(recompute=True)) for name, maker in makers.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "efficientnet_lite", "resnet50", "vgg16", "transformer"])
def test_blocks_that_are_computed_again_give_the_same_gradients(name, monkeypatch):
    """The program has as many of them as it keeps blocks; parameters have the same names."""
    keeping, again = _narrow_modules(monkeypatch)[name]
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    variables = jax.jit(keeping.init)(jax.random.key(0), image)

    def loss(variables, module):
        return sum(jnp.sin(tap).sum() for tap in module.apply(variables, image).values())

    numbers = [
        sum("remat" in equation.primitive.name for equation in jax.make_jaxpr(module.apply)(variables, image).eqns) for module in (keeping, again)
    ]
    assert numbers[0] == 0 and numbers[1] == {"small": 4, "efficientnet_lite": 8, "resnet50": 6, "vgg16": 5, "transformer": 2}[name]
    one, other = jax.jit(lambda variables: [jax.grad(loss)(variables, module) for module in (keeping, again)])(variables)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max()), one, other)
