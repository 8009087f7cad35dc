import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_references import random_state, resnet50

from lcrf_jax.nets import resnet, tables
from lcrf_jax.nets.naming import converted
from lcrf_jax.nets.resnet import ResNet50
from lcrf_jax.nets.weights import parameter_shapes


@pytest.fixture
def narrow(monkeypatch):
    """The network with fewer blocks and channels; which of them are dilated is the same."""
    counts = ((1, 2), (2, 3), (2, 4), (2, 5))
    monkeypatch.setattr(resnet, "STAGES", counts)
    monkeypatch.setattr(tables, "RESNET_STAGES", counts)
    return [count for count, _ in counts]


@pytest.mark.slow_except("16")
@pytest.mark.parametrize("last_stride", [8, 16, 32])
def test_the_network_equals_the_one_with_batch_norm_in_float64(narrow, last_stride):
    parts, module = tables.resnet50_layers(), ResNet50(last_stride)
    shapes = parameter_shapes(module)
    state = random_state(parts, shapes)
    x = np.random.default_rng(1).normal(size=(1, 45, 34, 3)).astype(np.float32)
    ours = jax.jit(module.apply)(converted(state, parts, shapes), x)
    for tap, expected in resnet50(state, x[0], last_stride, narrow).items():
        assert ours[tap].shape[1:] == expected.shape and np.abs(expected).max() > 0.1
        np.testing.assert_allclose(ours[tap][0], expected, atol=1e-4 * np.abs(expected).max(), err_msg=tap)
    np.testing.assert_array_equal(ours["head"], ours["s32"])


def test_names_and_shapes_are_the_published_ones():
    """Some of them written out, and the number of weights without the classifier."""
    parts, shapes = tables.resnet50_layers(), parameter_shapes(ResNet50())
    found = {name: shape for part in parts for name, shape in part.published_shapes(shapes).items()}
    assert found["conv1.weight"] == (64, 3, 7, 7) and found["bn1.running_var"] == (64,)
    assert found["layer1.0.downsample.0.weight"] == (256, 64, 1, 1) and found["layer4.2.bn3.bias"] == (2048,)
    assert found["layer3.5.conv2.weight"] == (256, 256, 3, 3) and "layer1.1.downsample.0.weight" not in found
    learnt = {name: shape for name, shape in found.items() if "running" not in name}
    assert sum(int(np.prod(shape)) for shape in learnt.values()) == 25_557_032 - 2048 * 1000 - 1000


@pytest.mark.slow
def test_grids_of_every_stride():
    for last_stride, expected in ((32, (16, 8, 4, 2)), (16, (16, 8, 4, 4)), (8, (16, 8, 8, 8))):
        taps = jax.eval_shape(
            lambda x, last_stride=last_stride: ResNet50(last_stride).init_with_output(jax.random.key(0), x)[0],
            jnp.zeros((1, 64, 64, 3)),
        )
        assert tuple(taps[tap].shape[1] for tap in ("s4", "s8", "s16", "s32")) == expected


def test_another_stride_is_refused():
    with pytest.raises(ValueError, match="last_stride: expected 8, 16 or 32, got 4"):
        jax.eval_shape(ResNet50(4).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
