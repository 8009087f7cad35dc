"""What a start is told before anything is computed: whose folder it is, and whether there is anything left to train."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lcrf_jax.machine.files import at_home
from lcrf_jax.machine.locks import locked
from lcrf_jax.machine.processes import first_decides
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.damage import Damaged
from lcrf_jax.runfolder.description import (
    DESCRIPTION_FILE,
    CheckpointError,
    check_settings_of_run,
    effective_changes,
    folder_of_run,
    has_parameters,
    load_description,
    newest_step,
)
from lcrf_jax.train.plan import Round, planned_rounds


def check_start(workdir: str | os.PathLike, config: Mapping[str, Any]) -> int | None:
    """Refuse a start that could only be refused later, and tell whether the run is finished; takes no time.

    Args:
      workdir: folder of the run, which need not be there.
      config: the configuration, see `experiments/configs`.

    Returns:
      The number of its steps if the run is finished and can be read; None if there is something to train.

    Raises:
      lcrf_jax.machine.locks.Locked: if another run is at work in the folder.
      CheckpointError: if the folder holds a run of another model or other settings, or a damaged config.json, or cannot
        be written to.
    """
    return first_decides(lambda: _check_start(at_home(workdir), config))


def check_folder(workdir: str | os.PathLike) -> None:
    """Refuse a folder for runs that could not be written, before hours of work; it is not made.

    Args:
      workdir: the folder, which need not be there.

    Raises:
      CheckpointError: if it, or what stands where it would be made, is no folder that can be written to.
    """
    first_decides(lambda: _check_folder(folder_of_run(workdir)))


def _check_folder(workdir):
    there = next(path for path in (workdir, *workdir.parents) if path.exists())
    if not there.is_dir():
        raise CheckpointError(f"--workdir={workdir}: {there} is a file; give a folder, which is made if it is not there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"--workdir={workdir}: {there} cannot be written to; give another folder. experiments.evaluate scores a run that is there"
        )


def _check_start(workdir, config):
    _check_folder(folder_of_run(workdir))
    if (workdir / "lock").exists():
        with locked(workdir / "lock"):  # whether it is free: the run takes it when it begins
            pass
    check_settings_of_run(workdir, config)
    if not (workdir / DESCRIPTION_FILE).exists():
        return None
    images = _num_images(load_description(workdir))
    if images is None:  # a run of an earlier version: what it has is known when the data is open
        return None
    rounds = planned_rounds(config, images)
    _refuse_moved_rounds(workdir, rounds)
    steps = rounds[-1].last_step if rounds else 0
    if newest_step(workdir) < steps or not _is_saved(workdir, "last" if rounds else "best"):
        return None
    _refuse_changes(workdir, config)
    return steps


def _num_images(description):
    return description.get("data", {}).get("train", {}).get("images")


def refuse_moved_rounds(workdir: str | os.PathLike, rounds: Sequence[Round]) -> None:
    """Refuse rounds that would begin after other steps than those of a run which it has begun already.

    Args:
      workdir: folder of the run, which need not be there.
      rounds: those of the configuration.

    Raises:
      CheckpointError: if they do; the round that is under way may be made longer or shorter.
    """
    first_decides(lambda: _refuse_moved_rounds(workdir, rounds))


def _refuse_moved_rounds(workdir, rounds):
    done = newest_step(workdir)
    if not done:
        return
    before = load_description(workdir)
    images = _num_images(before)
    if images is None:
        return
    begun = [this.first_step for this in planned_rounds(before["training"], images) if this.first_step < done]
    now = [this.first_step for this in rounds[: len(begun)]]
    if now != begun:
        raise CheckpointError(
            f"{workdir} has begun round {len(begun)} after step {begun[-1]}; with config.epochs=({','.join(str(this.epochs) for this in rounds)}) rounds "
            f"begin after {', '.join(map(str, now))}: leave the epochs of earlier rounds as they were "
            f"({tuple(before['training']['epochs'])}), or use a new folder"
        )


def is_saved(workdir: str | os.PathLike, which: str = "best") -> bool:
    """Whether a run has parameters that can be read.

    Args:
      workdir: folder of the run.
      which: see `lcrf_jax.runfolder.checkpoints.restore_params`.

    Returns:
      bool.
    """
    return first_decides(lambda: _is_saved(workdir, which))


def _is_saved(workdir, which):
    if not has_parameters(workdir, which):
        return False
    try:
        restore_params(workdir, which)
    except Damaged:  # training goes on from an earlier state, or begins anew
        return False
    return True


def refuse_changes(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Refuse settings that a finished run was not trained with: they would change nothing, and be told nowhere.

    Args:
      workdir: folder of a finished run.
      config: the configuration.

    Raises:
      CheckpointError: if settings differ that something would come of.
    """
    first_decides(lambda: _refuse_changes(workdir, config))


def _refuse_changes(workdir, config):
    changes = effective_changes(workdir, config)
    if changes:
        raise CheckpointError(
            f"{workdir} holds a finished run of other settings ({'; '.join(changes)}): nothing would be trained with these; "
            "use a new folder, or the settings this run was trained with"
        )


def description_before(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """What config.json says of a run so far, or None for a run that begins.

    Args:
      workdir: folder of the run.

    Returns:
      dict, or None.
    """
    return first_decides(lambda: load_description(workdir) if (pathlib.Path(workdir) / DESCRIPTION_FILE).exists() else None)
