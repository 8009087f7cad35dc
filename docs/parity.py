"""Every backbone against PyTorch's own, on random numbers under the published names.

    python -m venv torch_env && torch_env/bin/pip install torch torchvision timm transformers safetensors
    torch_env/bin/python docs/parity.py write FOLDER     # makes weight files, and what PyTorch finds with them
    PYTHONPATH=. .venv/bin/python docs/parity.py compare FOLDER     # loads them here, and prints the table of docs/backbones.md

PyTorch is needed for the first step alone, in an environment of its own.
"""

import pathlib
import sys

import numpy as np

# Sides of the image in pixels: no published grid, so that positions are interpolated, and odd grids for convolutions.
SMALL_14, SMALL_16, ODD = (224, 196), (208, 160), (96, 130)


def randomised(model, seed=0):
    """The model with numbers of moderate size everywhere, so that every array counts."""
    import torch

    rng = np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = rng.normal(size=tuple(tensor.shape))
        if name.endswith("running_var"):
            values = 0.5 + np.abs(noise)
        elif tensor.ndim > 1 and "token" not in name and "pos" not in name:
            values = noise * np.sqrt(1.5 / np.prod(tensor.shape[1:]))
        elif name.endswith((".weight", "gamma", "lambda1")) and tensor.ndim == 1 and "embedding" not in name:
            values = 1 + 0.2 * noise
        else:
            values = 0.3 * noise
        tensor.copy_(torch.as_tensor(values))
    return model.eval()


def of_stages(features, taps):
    """Taps from a list of feature maps [1, C, h, w]."""
    return {tap: map_[0].permute(1, 2, 0).numpy() for tap, map_ in zip(taps, features, strict=True)}


def of_tokens(hidden, last, shape, front):
    """Taps from the tokens after each block, and those after the last layer norm."""
    grids = {f"block{at}": tokens for at, tokens in enumerate(hidden) if at in (1, 6, 11)} | {"s32": last}
    return {tap: tokens[0, front:].reshape(*shape, -1).numpy() for tap, tokens in grids.items()}


def timm_transformer(name, front, **options):
    """(model, function to taps) of a vision transformer of timm."""
    import timm

    model = randomised(timm.create_model(name, num_classes=0, dynamic_img_size=True, **options))

    def taps(x):
        hidden = model.forward_intermediates(x, norm=False, intermediates_only=True, output_fmt="NLC")
        shape = [side // model.patch_embed.patch_size[0] for side in x.shape[2:]]
        tokens = {f"block{at}": hidden[at - 1] for at in (1, 6, 11)} | {"s32": model.forward_features(x)[:, front:]}
        return {tap: found[0].reshape(*shape, -1).numpy() for tap, found in tokens.items()}

    return model, taps


def huggingface(model, patch, front, norm, **options):
    """(model, function to taps) of a vision transformer of transformers; `norm` finds its last layer norm."""
    model = randomised(model)

    def taps(x):
        shape = [side // patch for side in x.shape[2:]]
        found = model(pixel_values=x, output_hidden_states=True, **options)
        return of_tokens(found.hidden_states, norm(model)(found.hidden_states[-1]), shape, front)

    return model, taps


def dinov2(width, heads, registers=0):
    """DINOv2 of transformers."""
    import transformers

    sizes = {"hidden_size": width, "num_attention_heads": heads, "image_size": 518, "patch_size": 14}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        model = transformers.Dinov2WithRegistersModel(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    return huggingface(model, 14, 1 + registers, lambda model: model.layernorm)


def clip():
    """The image tower of CLIP ViT-B/16 of transformers."""
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))

    def norm(model):
        return getattr(model, "vision_model", model).post_layernorm

    return huggingface(model, 16, 1, norm, interpolate_pos_encoding=True)


def clip_with_projection():
    """The same with the projection to texts, and patch tokens that went through it."""
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224, "patch_size": 16}
    model = randomised(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes, projection_dim=512)))

    def taps(x):
        tower = getattr(model.vision_model, "vision_model", model.vision_model)
        last = tower.post_layernorm(model(pixel_values=x, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1])
        return of_tokens({}, last, [side // 16 for side in x.shape[2:]], 1) | {
            "projected": model.visual_projection(last)[0, 1:].reshape(x.shape[2] // 16, x.shape[3] // 16, -1).numpy()
        }

    return model, taps


def timm_stages(name, taps, **options):
    """(model, function to taps) of a convolutional network of timm."""
    import timm

    model = randomised(timm.create_model(name, num_classes=10))
    stages = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), **options)
    # The names of features_only are the model's own; only its classifier is missing.
    stages.load_state_dict(model.state_dict(), strict=False)
    return model, lambda x: of_stages(stages.eval()(x), taps)


def torchvision_resnet(last_stride):
    """(model, function to taps) of ResNet-50 of torchvision."""
    import torchvision
    from torchvision.models._utils import IntermediateLayerGetter

    dilated = [False, last_stride < 16, last_stride < 32]
    model = randomised(torchvision.models.resnet50(replace_stride_with_dilation=dilated))
    getter = IntermediateLayerGetter(model, {f"layer{at + 1}": tap for at, tap in enumerate(STAGES)})
    return model, lambda x: of_stages(getter(x).values(), STAGES)


def torchvision_vgg():
    """(model, function to taps) of VGG16 of torchvision."""
    import torchvision

    model = randomised(torchvision.models.vgg16(num_classes=10))
    places = {"s4": 15, "s8": 22, "s16": 29, "s32": 30}
    return model, lambda x: of_stages([model.features[: place + 1](x) for place in places.values()], places)


STAGES = ("s4", "s8", "s16", "s32")
CASES = {  # name of the case: (backbone, last_stride, sides, where it is from, function to (model, function to taps))
    **{
        f"dinov2_{name}": (f"dinov2_{name}", 14, SMALL_14, "transformers", lambda sizes=sizes: dinov2(*sizes))
        for name, sizes in {"vits14": (384, 6), "vitb14": (768, 12), "vits14_reg": (384, 6, 4), "vitb14_reg": (768, 12, 4)}.items()
    },
    "dinov2_vits14_timm": (
        "dinov2_vits14", 14, (518, 518), "timm", lambda: timm_transformer("vit_small_patch14_dinov2", 1, init_values=1.0)
    ),
    "dinov2_vits14_reg_timm": (
        "dinov2_vits14_reg", 14, (518, 518), "timm", lambda: timm_transformer("vit_small_patch14_reg4_dinov2", 5, init_values=1.0)
    ),
    "clip_vitb16": ("clip_vitb16", 16, SMALL_16, "transformers", clip),
    "clip_vitb16_projected": ("clip_vitb16", 16, SMALL_16, "transformers, with its projection", clip_with_projection),
    "clip_vitb16_timm": (
        "clip_vitb16", 16, (224, 224), "timm", lambda: timm_transformer("vit_base_patch16_clip_quickgelu_224", 1)
    ),
    "augreg_vits16": ("augreg_vits16", 16, SMALL_16, "timm", lambda: timm_transformer("vit_small_patch16_224", 1)),
    "augreg_vitb16": ("augreg_vitb16", 16, SMALL_16, "timm", lambda: timm_transformer("vit_base_patch16_224", 1)),
    **{
        f"resnet50_{stride}": ("resnet50", stride, ODD, "torchvision", lambda stride=stride: torchvision_resnet(stride))
        for stride in (8, 16, 32)
    },
    "resnet50_timm": ("resnet50", 16, ODD, "timm", lambda: timm_stages("resnet50", STAGES, output_stride=16)),
    "vgg16": ("vgg16", 32, (96, 128), "torchvision", torchvision_vgg),
    **{
        f"efficientnet_lite{size}": (
            f"efficientnet_lite{size}", 32, ODD, "timm",
            lambda size=size: timm_stages(f"tf_efficientnet_lite{size}", STAGES),
        )
        for size in range(5)
    },
}  # fmt: skip


def write(folder, only=""):
    """Weight files, images as the network takes them, and PyTorch's taps."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with torch.no_grad():
        for case, (_, _, sides, _, build) in CASES.items():
            if only not in case:
                continue
            model, taps = build()
            x = torch.randn(1, 3, *sides)
            if hasattr(model, "save_pretrained"):
                model.save_pretrained(folder / case)  # as files of the hub are written
                (folder / case / "model.safetensors").rename(folder / f"{case}.safetensors")
            else:
                state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
                save_file(state, folder / f"{case}.safetensors")
            np.savez(folder / f"{case}.npz", x=x[0].permute(1, 2, 0).numpy(), **taps(x))
            print(case, flush=True)


def compare(folder, only=""):
    """The table."""
    import jax

    from lcrf_jax.nets.network import BACKBONES
    from lcrf_jax.nets.weights import image_projection, load_weights

    print("| backbone | last stride | against | image | largest difference |\n|---|---|---|---|---|")
    worst = 0.0
    for case, (name, last_stride, (height, width), source, _) in CASES.items():
        if only not in case or not (folder / f"{case}.npz").exists():
            continue
        module = BACKBONES[name].module(last_stride=last_stride)
        variables, _ = load_weights(name, module, str(folder / f"{case}.safetensors"))
        with np.load(folder / f"{case}.npz") as expected:
            ours = jax.jit(module.apply)(variables, expected["x"][None])
            if "projected" in expected:
                ours["projected"] = ours["s32"] @ image_projection(name, str(folder / f"{case}.safetensors"))
            errors = {
                tap: np.abs(ours[tap][0] - expected[tap]).max() / np.abs(expected[tap]).max()
                for tap in expected.files if tap != "x"
            }  # fmt: skip
        worst = max(worst, *errors.values())
        print(f"| `{name}` | {last_stride} | {source} | {height} x {width} | {max(errors.values()):.1e} |", flush=True)
    if not worst < 1e-4:
        sys.exit(f"error: expected at most 1e-4 of the largest value of each tap, got {worst:.1e}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ("write", "compare"):
        sys.exit("error: expected write FOLDER or compare FOLDER, and perhaps a part of a name")
    FOLDER = pathlib.Path(sys.argv[2])
    FOLDER.mkdir(parents=True, exist_ok=True)
    {"write": write, "compare": compare}[sys.argv[1]](FOLDER, *sys.argv[3:])
