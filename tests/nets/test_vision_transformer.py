import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbone_references import random_state, vision_transformer
from safetensors.numpy import save_file

from lcrf_jax.nets import tables, weights
from lcrf_jax.nets.naming import best_table, converted
from lcrf_jax.nets.network import build_network
from lcrf_jax.nets.vision_transformer import VARIANTS, Variant, VisionTransformer, preprocess, resampling, taps_of
from lcrf_jax.nets.weights import PUBLISHED, naming_of, parameter_shapes

TINY = {
    "dinov2": Variant(8, 2, 4, 3, depth=3, layer_scale=True),
    "dinov2_reg": Variant(8, 2, 4, 3, depth=2, layer_scale=True, registers=3),
    "clip": Variant(8, 4, 4, 3, depth=2, normalised_first=True, quick_gelu=True, epsilon=1e-5),
    "augreg": Variant(8, 2, 4, 3, depth=2),
}
NAMES = [("dinov2", tables.DINOV2_NAMES), ("dinov2_reg", tables.DINOV2_NAMES), ("clip", tables.CLIP_NAMES),
         ("clip", tables.CLIP_TOWER_NAMES)]  # fmt: skip


def tiny_state(name, seed=0):
    """(parts in the names of the hub, their shapes, random arrays)."""
    parts, shapes = tables.transformer_parts(TINY[name], tables.HUB_NAMES), parameter_shapes(VisionTransformer(TINY[name]))
    return parts, shapes, random_state(parts, shapes, seed)


@pytest.mark.slow_except("dinov2_reg")
@pytest.mark.parametrize("name", TINY)
def test_the_network_equals_the_one_in_float64(name):
    """On a grid of its own, and on others, with positions between the published ones."""
    variant, (parts, shapes, state) = TINY[name], tiny_state(name)
    variables = converted(state, parts, shapes)
    for sides in ((20, 8),) if name == "dinov2_reg" else ((12, 12), (20, 8)):
        x = np.random.default_rng(1).normal(size=(2, *sides, 3)).astype(np.float32)
        ours = jax.jit(VisionTransformer(variant).apply)(variables, x)
        assert set(ours) == set(taps_of(variant))
        for number, image in enumerate(x):
            for tap, expected in vision_transformer(state, image, variant).items():
                assert expected.shape == (sides[0] // 4, sides[1] // 4, 8)
                np.testing.assert_allclose(ours[tap][number], expected, atol=1e-4 * np.abs(expected).max(), err_msg=tap)
        np.testing.assert_array_equal(ours["head"], ours["s32"])


def renamed(state, names, variant):
    """Arrays in the names of the hub, renamed and split by hand to those of transformers."""
    width, found = variant.width, {}
    for name, array in state.items():
        if name in ("cls_token", "pos_embed", "register_tokens"):
            theirs = {"cls_token": names.class_token, "pos_embed": names.positions, "register_tokens": names.registers}[name]
            clip = names.leading == 0
            found[theirs] = array.reshape(-1) if clip and name == "cls_token" else array[0] if clip else array
            continue
        field = name.rpartition(".")[2]
        if not name.startswith("blocks."):
            stem = {"patch_embed.proj": names.patches, "norm": names.last, "norm_pre": names.first}[name.rpartition(".")[0]]
            found[f"{stem}.{field}"] = array
            continue
        _, number, rest = name.split(".", 2)
        block = names.block.format(number)
        if rest.startswith("attn.qkv"):
            for at, theirs in enumerate(names.qkv):
                found[f"{block}{theirs}.{field}"] = array[at * width : (at + 1) * width]
        elif field == "gamma":
            found[block + {"ls1": names.scale1, "ls2": names.scale2}[rest[:3]]] = array
        else:
            stems = {"attn.proj": names.out, "norm1": names.norm1, "norm2": names.norm2, "mlp.fc1": names.up, "mlp.fc2": names.down}
            found[f"{block}{stems[rest.rpartition('.')[0]]}.{field}"] = array
    return found


@pytest.mark.parametrize(("name", "names"), NAMES)
def test_every_naming_gives_the_same_parameters(name, names):
    parts, shapes, state = tiny_state(name)
    others = tables.transformer_parts(TINY[name], names)
    theirs = renamed(state, names, TINY[name])
    assert best_table([parts, others], state) is parts and best_table([parts, others], theirs) is others
    one, other = converted(state, parts, shapes), converted(theirs, others, shapes)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
    assert set(jax.tree.leaves(jax.tree.map(lambda leaf: leaf.dtype, one))) == {np.dtype(np.float32)}


def test_names_of_timm_with_registers_have_the_class_token_with_its_position():
    parts, shapes, state = tiny_state("dinov2_reg")
    others = tables.transformer_parts(TINY["dinov2_reg"], tables.TIMM_REGISTER_NAMES)
    theirs = {name: array for name, array in state.items() if name != "register_tokens"} | {
        "reg_token": state["register_tokens"], "cls_token": state["cls_token"] + state["pos_embed"][:, :1], "pos_embed": state["pos_embed"][:, 1:]
    }
    assert best_table([parts, others], theirs) is others and best_table([parts, others], state) is parts
    one, other = (converted(*each, shapes)["params"] for each in ((state, parts), (theirs, others)))
    np.testing.assert_array_equal(one["class_token"] + one["positions"][0], other["class_token"] + other["positions"][0])
    np.testing.assert_array_equal(one["positions"][1:], other["positions"][1:])
    rest = [{name: leaf for name, leaf in each.items() if name not in ("class_token", "positions")} for each in (one, other)]
    assert jax.tree.all(jax.tree.map(np.array_equal, *rest))
    with pytest.raises(ValueError, match=r"pos_embed is \[1, 10, 8\] and not \[1, 9, 8\]"):
        converted({**theirs, "pos_embed": state["pos_embed"]}, others, shapes)


@pytest.mark.parametrize(("backbone", "names"), [
    ("dinov2_vits14", {"cls_token": (1, 1, 384), "pos_embed": (1, 1370, 384), "blocks.11.ls2.gamma": (384,),
                       "patch_embed.proj.weight": (384, 3, 14, 14), "blocks.0.attn.qkv.weight": (1152, 384)}),
    ("dinov2_vitb14_reg", {"embeddings.register_tokens": (1, 4, 768), "embeddings.position_embeddings": (1, 1370, 768),
                           "encoder.layer.11.attention.attention.query.weight": (768, 768),
                           "encoder.layer.0.layer_scale1.lambda1": (768,), "layernorm.bias": (768,)}),
    ("dinov2_vits14_reg", {"reg_token": (1, 4, 384), "pos_embed": (1, 1369, 384), "cls_token": (1, 1, 384)}),
    ("clip_vitb16", {"vision_model.embeddings.class_embedding": (768,), "vision_model.pre_layrnorm.weight": (768,),
                     "vision_model.embeddings.position_embedding.weight": (197, 768),
                     "vision_model.encoder.layers.11.self_attn.k_proj.bias": (768,),
                     "vision_model.embeddings.patch_embedding.weight": (768, 3, 16, 16)}),
    ("augreg_vits16", {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "blocks.11.mlp.fc1.weight": (1536, 384)}),
])  # fmt: skip
def test_names_and_shapes_are_the_published_ones(backbone, names):
    """A few of them, written out."""
    variant = VARIANTS[backbone]
    parts = naming_of(backbone, dict.fromkeys(names))
    shapes = parameter_shapes(VisionTransformer(variant._replace(depth=1)))
    shapes |= {path.replace("block1/", f"block{at}/"): shape for path, shape in shapes.items() for at in range(2, 13)}
    found = {name: shape for part in parts for name, shape in part.published_shapes(shapes).items()}
    assert {name: found[name] for name in names} == names
    kernel = 3 * variant.patch**2 * variant.width
    blocks = 12 * (12 * variant.width**2 + 13 * variant.width + 2 * variant.width * variant.layer_scale)
    rest = (variant.grid**2 + 4 + variant.registers + 2 * variant.normalised_first - variant.normalised_first) * variant.width
    rest -= variant.width * ("reg_token" in names)  # timm has no position of the class token
    assert sum(int(np.prod(shape)) for shape in found.values()) == kernel + blocks + rest + variant.width


def test_missing_and_wrong_arrays_are_listed_in_one_error(monkeypatch, tmp_path):
    parts, _, state = tiny_state("dinov2")
    monkeypatch.setitem(PUBLISHED, "tiny", PUBLISHED["dinov2_vits14"]._replace(namings=(lambda: parts,)))
    del state["blocks.1.ls1.gamma"], state["norm.bias"]
    state["pos_embed"], state["blocks.0.attn.qkv.weight"] = np.zeros((1, 17, 8)), np.zeros((16, 8))
    path = tmp_path / "other.safetensors"
    save_file(state, path)
    message = (rf"{path} does not hold the weights of tiny: 2 of \d+ names are missing: norm.bias, blocks.1.ls1.gamma; 2 of \d+ "
               r"arrays have another shape: pos_embed is \[1, 17, 8\] and not \[1, 10, 8\]; .*qkv.weight is \[16, 8\] and not \[24, 8\]")
    with pytest.raises(ValueError, match=message):
        weights.load_weights("tiny", VisionTransformer(TINY["dinov2"]), str(path))


@pytest.mark.parametrize(("antialias", "wanted", "expected"), [
    (False, 3, [0.148148, 4.0, -1.537037]),
    (False, 8, [-0.092834, 0.187561, 1.19574, 3.394836, 3.99939, 2.313599, -1.012451, -3.464172]),
    (True, 3, [0.384615, 3.176744, -0.892308]),
    (True, 8, [-0.071956, 0.243749, 1.141724, 3.364624, 3.844971, 2.216553, -1.126727, -3.359779]),
])
def test_positions_are_interpolated_as_pytorch_does(antialias, wanted, expected):
    """What torch.nn.functional.interpolate gave for five values, in float64."""
    matrix = resampling(5, wanted, antialias)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(matrix @ [0, 1, 4, 2, -3], expected, atol=1e-6)


def test_each_source_has_its_way_of_interpolating():
    """transformers interpolates DINOv2 and CLIP without antialiasing, DINOv2 with registers with it, as timm does."""
    with_it = {name for name, variant in VARIANTS.items() if variant.antialias}
    assert with_it == {"dinov2_vits14_reg", "dinov2_vitb14_reg", "augreg_vits16", "augreg_vitb16"}


def test_the_input_of_each_network_by_hand():
    image = np.full((1, 1, 3), 255, np.uint8)
    np.testing.assert_allclose(preprocess(VARIANTS["augreg_vitb16"], image), [[[1, 1, 1]]], rtol=1e-6)
    np.testing.assert_allclose(preprocess(VARIANTS["dinov2_vits14"], image)[0, 0, 0], (1 - 0.485) / 0.229, rtol=1e-6)
    np.testing.assert_allclose(preprocess(VARIANTS["clip_vitb16"], image)[0, 0, 2], (1 - 0.40821073) / 0.27577711, rtol=1e-6)


@pytest.mark.slow
def test_bfloat16_is_near_and_comes_out():
    parts, shapes, state = tiny_state("dinov2_reg")
    variables = converted(state, parts, shapes)
    x = np.random.default_rng(2).normal(size=(1, 12, 12, 3)).astype(np.float32)
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), variables)
    module = VisionTransformer(TINY["dinov2_reg"])
    exact, rough = (jax.jit(module.apply)(*given) for given in ((variables, x), (half, jnp.asarray(x, jnp.bfloat16))))
    for tap, values in rough.items():
        assert values.dtype == jnp.bfloat16
        assert np.abs(np.float32(values) - exact[tap]).max() < 0.1 * np.abs(exact[tap]).max()


def test_what_a_transformer_refuses():
    module = VisionTransformer(TINY["dinov2"])
    with pytest.raises(ValueError, match=r"expected sides that are multiples of 4, got an image of \(12, 10\)"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 12, 10, 3)))
    with pytest.raises(ValueError, match="last_stride: expected 4, the side of a patch, got 16"):
        jax.eval_shape(VisionTransformer(TINY["dinov2"], 16).init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))


DESCRIPTION = {"backbone": "dinov2_vits14", "last_stride": 14, "taps": ["s32", "block9", "block6"], "widths": [8, 6, 4],
               "dropout": 0.0, "num_classes": 3}  # fmt: skip


def test_a_network_of_taps_of_one_stride():
    network = build_network(DESCRIPTION)
    assert network.stride == network.size_step == 14 and network.taps == ("s32", "block9", "block6")
    assert network.grid(518) == 37
    features = {tap: jnp.zeros((1, 5, 3, 384)) for tap in network.taps}
    params = jax.eval_shape(network.init, jax.random.key(0), {}, features)
    assert set(params) == {"norm_s32", "norm_block9", "norm_block6", "project_s32", "merge_block9", "merge_block6",
                           "post_block9", "post_block6", "logits"}  # fmt: skip
    assert jax.eval_shape(network.logits, params, {}, features).shape == (1, 5, 3, 3)


@pytest.mark.parametrize(("change", "message"), [
    ({"last_stride": 16}, "network.last_stride: expected 14, got 16"),
    ({"taps": ["s32", "s16", "s8"]}, r"network.taps: expected some of \('head', 's32', 'block11', .*'block1'\), in this order"),
    ({"taps": ["s32", "block6", "block9"]}, "network.taps: expected some of"),
])
def test_a_wrong_description_of_a_transformer_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_network({**DESCRIPTION, **change})
