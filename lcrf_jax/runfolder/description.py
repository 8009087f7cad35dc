"""RUN/config.json: what a run is, beside its parameters."""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from lcrf_jax.machine.processes import first_decides

DESCRIPTION_FILE = "config.json"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "lcrf_jax")
# Settings that decide which image comes when. If one changes, the steps done and the steps to come are not one run.
FIXED_SETTINGS = (
    "method", "seed", "batch_size", "input_size", "views", "data.kind", "data.train_split", "data.options",
)  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint or description that is missing, damaged or of another model; the message says where."""


def save_description(
    run_dir: str | os.PathLike,
    description: Mapping[str, Any],
    *,
    may_differ: Collection[str] = ("training", "versions"),
) -> list[str]:
    """Write RUN/config.json: all that inference has to know beside the parameters.

    Args:
      run_dir: folder of the run; made if it is not there.
      description: dict that JSON can hold, with network, class names, input size, preprocessing, sha256 of the
        pretrained weights, library versions, training configuration.
      may_differ: keys of the dict in which a run that is taken up again may differ from what was written
        before.
    Returns:
      List of lines that tell in which settings and versions the run differs from before; empty for a new one.
    Raises:
      CheckpointError: if the folder holds another model's description, or states of a run whose seed, data, batch
        size or method were others.
      TypeError: if JSON cannot hold the description.
    """
    return first_decides(lambda: _save_description(run_dir, description, may_differ))


def _save_description(run_dir, description, may_differ):
    path = pathlib.Path(run_dir).expanduser().resolve() / DESCRIPTION_FILE
    try:
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected a description of strings, finite numbers, lists and dicts, got one that "
                        f"JSON cannot hold ({error}); convert configurations with .to_dict() and arrays "
                        "with .tolist()") from error
    changes = []
    if path.exists():
        old, new = load_description(run_dir), json.loads(text)
        changed = sorted(key for key in old.keys() | new.keys()
                         if key not in may_differ and old.get(key) != new.get(key))
        if changed:
            raise CheckpointError(f"{path} belongs to another model: {', '.join(changed)} differ from this "
                                  "one; use a new folder, or the settings this run was started with")
        if any((path.parent / "last").glob("[0-9]*")):
            changes = _changes(path.parent, old, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return changes


def load_description(run_dir: str | os.PathLike) -> dict[str, Any]:
    """Read RUN/config.json.

    Args:
      run_dir: folder of the run.
    Returns:
      The dict given to `save_description`; tuples have become lists.
    Raises:
      CheckpointError: if the file is missing or is not a JSON object.
    """
    path = pathlib.Path(run_dir).expanduser().resolve() / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a run folder with {DESCRIPTION_FILE}, got {path.parent} without it; "
                              "give the --workdir of a training run") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"expected a JSON object in {path}, got {type(description).__name__}")
    return description


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a run's numbers.

    Returns:
      Dict from distribution name to version; those that are not installed are left out.
    """
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _changes(run_dir, old, new):
    """Lines that tell in which settings and versions two descriptions differ; refuses those of FIXED_SETTINGS."""
    before, now = flat_settings(old.get("training", {})), flat_settings(new.get("training", {}))
    changed = {name: f"config.{name} was {before.get(name)!r}, is {now.get(name)!r}"
               for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)}  # fmt: skip
    fixed = [text for name, text in changed.items() if any(f"{name}.".startswith(f"{part}.") for part in FIXED_SETTINGS)]
    if fixed:
        raise CheckpointError(
            f"{run_dir} holds a run of other settings ({'; '.join(fixed)}); use them again, or a new folder")
    lines = [f"other setting than before: {text}" for text in changed.values()]
    versions, current = old.get("versions", {}), new.get("versions", {})
    for name in sorted(versions.keys() & current.keys()):
        if versions[name] != current[name]:
            lines.append(f"other version than before: {name} was {versions[name]}, is {current[name]}; the run goes on, "
                         "but not to the same bits")
    return lines


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names, as they are written on the command line.

    Args:
      settings: nested dicts.
      prefix: of the names, ending with a dot.

    Returns:
      dict.
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
