"""RUN/config.json: what a run is, beside its parameters."""

import json
import os
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from lcrf_jax.machine.errors import UserError
from lcrf_jax.machine.files import at_home, write_whole
from lcrf_jax.machine.processes import first_decides
from lcrf_jax.runfolder.segments import changed_settings, flat_settings, settings_until, versions_until

DESCRIPTION_FILE = "config.json"
FOR_INFERENCE = ("class_names", "network", "inference", "supervision", "training")
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "lcrf_jax")
# Settings that decide which image comes when. If one changes, the steps done and the steps to come are not one run. Of all
# settings, those that the run did not have are told and not refused: a later version may have more of them.
FIXED_SETTINGS = (
    "method", "seed", "batch_size", "input_size", "views", "data.kind", "data.train_split", "data.options",
)  # fmt: skip
# Among them: what only confirms that masks are meant as they are. It changes no image.
CONFIRMATIONS = ("data.options.untagged_in_masks",)
# Settings that make the network or what is done with it: another model if one changes.
MODEL_SETTINGS = ("network", "inference")
# Settings that say where things lie or how the work is done. Nothing that is trained depends on them: what the data and the
# weights are is told by checksums, and the rounds by their epochs.
PLACES = (
    "data.root", "data.on_bad_image", "weights", "cache", "num_threads", "accumulation_steps", "recompute_backbone",
    "log_every_steps", "save_every_steps", "rounds",
)  # fmt: skip


class CheckpointError(UserError, RuntimeError):
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
      List of lines, see `check_description`.
    Raises:
      CheckpointError: as `check_description`.
      TypeError: if JSON cannot hold the description.
    """
    return first_decides(lambda: _save_description(run_dir, description, may_differ))


def _save_description(run_dir, description, may_differ):
    changes = _check_description(run_dir, description, may_differ)
    path = _path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, _as_json(description))
    return changes


def check_description(
    run_dir: str | os.PathLike,
    description: Mapping[str, Any],
    *,
    may_differ: Collection[str] = ("training", "versions"),
) -> list[str]:
    """Refuse to go on with a run of another model, other data or settings that make another run; nothing is written.

    Args:
      run_dir: folder of the run, which need not be there.
      description: dict that JSON can hold, see `save_description`.
      may_differ: keys of the dict in which a run that is taken up again may differ from what was written
        before.
    Returns:
      List of lines that tell in which settings and versions the run differs from before; empty for a new one. Where nothing was
      saved yet any settings will do.
    Raises:
      CheckpointError: if the folder holds parameters of another model, or of a run whose seed, data, batch size or method
        were others.
      TypeError: if JSON cannot hold the description.
    """
    return first_decides(lambda: _check_description(run_dir, description, may_differ))


def _check_description(run_dir, description, may_differ):
    path, new = _path(run_dir), json.loads(_as_json(description))
    if not _is_there(path):
        return []
    old = load_description(run_dir)
    ignored = {*may_differ, "data", "segments"}
    changed = sorted(key for key in old.keys() | new.keys() if key not in ignored and _differ(old.get(key), new.get(key)))
    if not has_parameters(run_dir):
        return _replaced(path.parent, old, new, changed)
    if changed:
        raise CheckpointError(f"{path} belongs to another model: {', '.join(changed)} differ from this "
                              "one; use a new folder, or the settings this run was started with")
    check_data(run_dir, new.get("data", {}))
    return _setting_changes(path.parent, old, new["training"]) + _version_changes(path.parent, old, new)


def _differ(old, new):
    """Whether two entries differ by more than settings that the version before did not have, and that are off."""
    if isinstance(old, dict) and isinstance(new, dict):
        new = {name: value for name, value in new.items() if name in old or value}
    return old != new


def check_data(run_dir: str | os.PathLike, data: Mapping[str, Any]) -> None:
    """Refuse other training images or tags than those of a run, wherever they lie.

    Args:
      run_dir: folder of a run. One of an earlier version does not say what it had.
      data: dict with "train", see `lcrf_jax.data.example.data_identity`.
    Raises:
      CheckpointError: if they differ.
    """
    before, now = load_description(run_dir).get("data", {}).get("train"), data.get("train")
    if before and now and before["sha256"] != now["sha256"]:
        raise CheckpointError(
            f"{run_dir} holds a run on other training data ({before['images']} images then, {now['images']} now; their "
            "names, tags or classes differ); use the same data again, or a new folder")


def check_settings_of_run(run_dir: str | os.PathLike, settings: Mapping[str, Any]) -> list[str]:
    """Refuse, as far as settings alone can tell, to go on with a run of others: before data is read.

    Args:
      run_dir: folder of the run, which need not be there.
      settings: the configuration, see `experiments/configs`.
    Returns:
      List of lines that tell which settings differ from before; empty for a new run.
    Raises:
      CheckpointError: if they make another model or another run, or config.json is damaged.
    """
    path = _path(run_dir)
    if not _is_there(path) or not has_parameters(run_dir):
        return []
    old, new = load_description(run_dir), json.loads(_as_json(settings))
    before = flat_settings(old.get("training", {}))
    changed = changed_settings(before, flat_settings(new))
    other = [text for name, text in changed.items() if name in before and _among(name, MODEL_SETTINGS)]
    if other:
        raise CheckpointError(f"{path} belongs to another model: network or inference differ ({'; '.join(other)}); "
                              "use a new folder, or the settings this run was started with")
    return _setting_changes(path.parent, old, new)


def effective_changes(run_dir: str | os.PathLike, settings: Mapping[str, Any]) -> list[str]:
    """How settings differ from those that a run was trained with, those left out that change nothing in it.

    Args:
      run_dir: folder of a run.
      settings: the configuration.
    Returns:
      List of texts such as "config.seed was 0, is 1".
    Raises:
      CheckpointError: if the folder has no description, or a damaged one.
    """
    old, new = load_description(run_dir), json.loads(_as_json(settings))
    before = settings_until(old, newest_step(run_dir))
    changed = changed_settings(before, flat_settings(new))
    return [text for name, text in changed.items() if name in before and not _among(name, PLACES)]


def newest_step(run_dir: str | os.PathLike) -> int:
    """Number of the newest training state, as its folder says.

    Args:
      run_dir: folder of a run.
    Returns:
      int; 0 if there is none.
    """
    return max(_steps(run_dir, "last"), default=0)


def has_parameters(run_dir: str | os.PathLike, *which: str) -> bool:
    """Whether a run has saved anything; a method that trains nothing has parameters in RUN/best alone.

    Args:
      run_dir: folder of a run.
      *which: "last" or "best"; without one either will do.
    Returns:
      bool.
    """
    return any(_steps(run_dir, each) for each in which or ("last", "best"))


def _steps(run_dir, which):
    """Numbers of the finished saves, those among them that a save of the same step was to replace."""
    folder = _path(run_dir).parent
    names = [path.name for path in folder.glob(f"{which}/*")]
    names += [path.name.rpartition("-")[2] for path in folder.glob(f"replaced/{which}-*")]
    return [int(name) for name in names if name.isdigit()]


def load_description(run_dir: str | os.PathLike, *, needed: Collection[str] = ()) -> dict[str, Any]:
    """Read RUN/config.json.

    Args:
      run_dir: folder of the run.
      needed: keys that it must have, such as `FOR_INFERENCE`.
    Returns:
      The dict given to `save_description`; tuples have become lists.
    Raises:
      CheckpointError: if the file is missing, is not a JSON object or lacks a key.
    """
    path = _path(run_dir)
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a run folder with {DESCRIPTION_FILE}, got {path.parent} without it; "
                              "give the --workdir of a training run") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it from a copy") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"expected a JSON object in {path}, got {type(description).__name__}")
    if missing := [key for key in needed if key not in description]:
        raise CheckpointError(f"{path} does not describe a run: it has no {', '.join(missing)}; restore it from a copy")
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


def _path(run_dir):
    return at_home(run_dir).resolve() / DESCRIPTION_FILE


def _is_there(path):
    """Whether there is a description; without it nobody knows what saved parameters are of."""
    if path.exists():
        return True
    if has_parameters(path.parent):
        raise CheckpointError(f"{path.parent} holds saved parameters and no {DESCRIPTION_FILE} that says what they are; restore it "
                              "from a copy, or use a new folder")
    return False


def _as_json(description):
    try:
        return json.dumps(description, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected a description of strings, finite numbers, lists and dicts, got one that "
                        f"JSON cannot hold ({error}); convert configurations with .to_dict() and arrays "
                        "with .tolist()") from error


def _among(name, settings):
    """Whether a setting is one of these, or below one of them."""
    return any(f"{name}.".startswith(f"{part}.") for part in settings)


def _replaced(run_dir, old, new, changed):
    """A line that tells of other settings in a folder where a start that has saved nothing left its own; none if they are the same."""
    settings = changed_settings(flat_settings(old.get("training", {})), flat_settings(new.get("training", {})))
    names = [text for name, text in settings.items() if not _among(name, PLACES)]
    names += [f"{key} differs" for key in changed if not any(name.startswith(f"{key}.") for name in settings)]
    return [f"{run_dir} holds no trained state: what an earlier start was to train is forgotten ({'; '.join(names)})"] if names else []


def _setting_changes(run_dir, old, settings):
    """Lines that tell in which settings a run differs from before; refuses those of FIXED_SETTINGS."""
    before = settings_until(old, newest_step(run_dir))
    changed = changed_settings(before, flat_settings(settings))
    fixed = [text for name, text in changed.items() if name in before and _among(name, FIXED_SETTINGS) and name not in CONFIRMATIONS]
    if fixed:
        raise CheckpointError(
            f"{run_dir} holds a run of other settings ({'; '.join(fixed)}); use them again, or a new folder")
    return [f"other setting than before: {text}" for text in changed.values()]


def _version_changes(run_dir, old, new):
    versions, current = versions_until(old, newest_step(run_dir)), new.get("versions", {})
    return [
        f"other version than before: {name} was {versions[name]}, is {current[name]}; the run goes on, "
        "but not to the same bits"
        for name in sorted(versions.keys() & current.keys()) if versions[name] != current[name]
    ]  # fmt: skip
