"""Run folders: what is saved, where, and how it comes back; the only file that knows orbax.

    RUN/config.json     the description: network, class names, input, preprocessing, training configuration
    RUN/last/STEP/      newest training states, two of them: params, rest (optimiser, keys, counters), record
    RUN/best/STEP/      parameters with the best validation mIoU, one of them: params, record
    RUN/damaged/        states that were found damaged when the run was taken up again
    RUN/replaced/       the save before one of the same step, until that one is whole

Arrays are saved as copies on the host under dotted names (`params.decoder.kernel`) with the sha256 of each in
the record, and every restore checks them: a byte that changed on the disk is an error, not a slightly different
mask. They come back as NumPy arrays and are then put where the new state lies: the number of devices may change.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from lcrf_jax.machine.files import at_home
from lcrf_jax.machine.processes import first_decides
from lcrf_jax.runfolder.damage import Damaged, read_or_judged
from lcrf_jax.runfolder.description import CheckpointError
from lcrf_jax.runfolder.digests import digests_of, named_leaves, nested, split_leaves
from lcrf_jax.runfolder.metrics import rank, score
from lcrf_jax.runfolder.placing import check_like, decoded_data_state, encoded_data_state, placed_like

_log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """What `restore_last` found: number of the step, state on the devices, state of the data iterator."""

    step: int
    state: Any
    data_state: Any


class RunCheckpoints:
    """Saves and restores the training states of one run folder, in the background of training.

    A state is any pytree of arrays (typed keys included) with `params` at its top, as a field or a key.
    Saving copies it to the host first, so that its buffers may be donated to the next step. An interrupted
    save leaves the ones before it untouched. Of several processes all make the same calls; what is on the disk is
    read and judged by the first, and the folder must be on a file system that all of them share.

    Args:
      run_dir: folder of the run; made if it is not there.
    """

    def __init__(self, run_dir: str | os.PathLike) -> None:
        self.run_dir = at_home(run_dir).resolve()
        self._replaced: set[str] = set()
        logging.getLogger("absl").addFilter(_told_here)
        first_decides(lambda: self._put_back("*"))
        self._last = self._manager("last", max_to_keep=2)
        self._best = self._manager("best", max_to_keep=1, best_fn=rank, best_mode="max")

    def _manager(self, name, **options):
        # The processes of a run meet at barriers of these names, the two managers each at their own.
        processes = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=name)
        return ocp.CheckpointManager(self.run_dir / name, options=ocp.CheckpointManagerOptions(
            create=True, cleanup_tmp_directories=True, multiprocessing_options=processes, **options))

    def save_last(self, step: int, state: Any, *, data_state: Any = None) -> None:
        """Save a training state; the two newest are kept.

        Args:
          step: number of steps done, >= 0; a state saved before under the same number is replaced.
          state: pytree of arrays with `params` at its top.
          data_state: state of the data iterator, bytes or anything JSON can hold.
        Raises:
          TypeError: if a leaf of the state is no array or an empty one, or data_state is neither bytes nor
            JSON.
          ValueError: if the state has no `params`.
          CheckpointError: if the disk is full, or the save before this one failed.
        """
        params, rest = split_leaves(named_leaves(state))
        record = {"data_state": encoded_data_state(data_state)}
        self._save(self._last, int(step), {"params": params, "rest": rest}, record)

    def save_best(self, step: int, params: Mapping[str, Any], miou: float | None) -> bool:
        """Save parameters if they are the best so far.

        Args:
          step: number of steps done, >= 0.
          params: pytree of arrays: nested dicts with string keys.
          miou: validation mIoU in 0..1, larger is better; None without validation: the newest such are kept until a score.
        Returns:
          True if they were saved, False if an earlier mIoU is at least as good.
        Raises:
          ValueError: if miou is not finite.
          CheckpointError: if the disk is full, or the save before this one failed.
        """
        step, miou = int(step), None if miou is None else float(miou)
        if miou is not None and not math.isfinite(miou):
            raise ValueError(f"expected a finite mIoU at step {step}, got {miou}; check that the validation "
                             "split has masks with pixels that are not void")
        self._finish(self._best)
        before = first_decides(lambda: best_miou(self.run_dir))
        if before is not None and (miou is None or miou <= before):
            return False
        items = {"params": named_leaves({"params": params})}
        self._save(self._best, step, items, {"miou": miou}, {"miou": miou, "step": step})
        return True

    def restore_last(self, like: Any) -> Restored | None:
        """The newest training state that can be read, on the devices of `like`.

        A damaged newer state is moved to RUN/damaged/ with a warning, so that training goes on from the one
        before.

        Args:
          like: state of the same structure, shapes and dtypes, placed where the restored one shall be. Its
            values are not used: shapes with a sharding will do (`jax.ShapeDtypeStruct`). The devices may be others than
            those of the saved run.
        Returns:
          Restored, or None if the run has saved no state yet.
        Raises:
          CheckpointError: if states are there and none can be read, or they belong to another model.
        """
        self.wait()
        step = first_decides(lambda: self._newest_good_step(like))
        self._last.reload()
        if step is None:
            return None
        folder = _saved(self.run_dir, "last")[step]
        arrays, data_state = _read_state(folder)
        return Restored(step, placed_like(like, arrays, folder), data_state)

    def _newest_good_step(self, like):
        """Number of the newest state that can be read, None if there are none; damaged newer ones are moved away."""
        damaged = {}
        for step, folder in sorted(_saved(self.run_dir, "last").items(), reverse=True):
            try:
                arrays, _ = _read_state(folder)
            except Damaged as error:
                damaged[folder] = error
                continue
            check_like(like, arrays, folder)
            self._move_aside(damaged)
            return step
        if damaged:
            reasons = "\n  ".join(str(error) for error in damaged.values())
            raise CheckpointError(f"no training state in {self.run_dir / 'last'} can be read; restore the "
                                  f"folder from a copy, or start again in a new one:\n  {reasons}")
        return None

    def wait(self) -> None:
        """Return when everything is on the disk; a CheckpointError says what is not."""
        self._finish(self._last)
        self._finish(self._best)

    def close(self) -> None:
        """Finish saving and free the background threads."""
        try:
            self.wait()
        finally:
            for manager in (self._last, self._best):
                with contextlib.suppress(Exception):  # of a save that failed, which was told above
                    manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(CheckpointError):  # what ended the block is told, not what came of it
            self.close()

    def _finish(self, manager):
        """Wait for the save that is under way."""
        try:
            manager.wait_until_finished()
        except Exception as error:  # whatever orbax meets on a bad disk, of any type
            raise self._failed(manager.directory, error) from error
        which = manager.directory.name
        if which in self._replaced:
            first_decides(lambda: self._put_back(which))
            self._replaced.remove(which)

    def _save(self, manager, step, items, record, metrics=None):
        """Hand arrays and record to orbax; a step of the same number makes way."""
        record = {"step": step, "sha256": {item: digests_of(leaves) for item, leaves in items.items()}, **record}
        record["sha256_of_record"] = _record_digest(record)
        self._finish(manager)
        first_decides(lambda: self._check_space(items))
        arguments = {item: ocp.args.PyTreeSave(leaves) for item, leaves in items.items() if leaves}
        arguments["record"] = ocp.args.JsonSave(record)
        try:
            if step in manager.all_steps():
                self._replaced.add(manager.directory.name)
                first_decides(lambda: self._set_aside(manager.directory.name, step))
                manager.reload()
            manager.save(step, args=ocp.args.Composite(**arguments), metrics=metrics, force=True)
        except Exception as error:  # as above
            raise self._failed(manager.directory, error) from error

    def _check_space(self, items):
        """Refuse before writing what the disk cannot hold."""
        needed = sum(leaf.nbytes for leaves in items.values() for leaf in leaves.values())
        free = shutil.disk_usage(self.run_dir).free
        if 1.1 * needed > free:
            raise CheckpointError(f"the disk of {self.run_dir} is full: saving needs {needed / 1e6:.1f} MB, "
                                  f"{free / 1e6:.1f} MB are left; {self._kept()}")

    def _set_aside(self, which, step):
        """Move a save out of the way of one of the same step; it is there until that one is whole."""
        aside = self.run_dir / "replaced" / f"{which}-{step}"
        aside.parent.mkdir(exist_ok=True)
        os.rename(self.run_dir / which / str(step), aside)

    def _put_back(self, which):
        """Drop what was replaced, but for a save that never came: then what was there before is put back."""
        for aside in sorted((self.run_dir / "replaced").glob(f"{which}-*")):
            name, _, step = aside.name.rpartition("-")
            place = self.run_dir / name / step
            if place.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.rename(aside, place)
        with contextlib.suppress(OSError):
            (self.run_dir / "replaced").rmdir()

    def _failed(self, directory, error):
        text = (str(error).strip().splitlines() or [""])[0]
        if "No space left on device" in text or "Disk quota exceeded" in text:
            return CheckpointError(f"saving to {directory} failed: the disk is full; {self._kept()}")
        reason = f"{type(error).__name__}: {text[:200]}"
        return CheckpointError(f"saving to {directory} failed ({reason}): is the disk full? {self._kept()}")

    def _kept(self):
        steps = _saved(self.run_dir, "last")
        kept = f"the state of step {max(steps)} is kept" if steps else "no state was saved before"
        return f"{kept}; make room and run the same command again"

    def _move_aside(self, damaged):
        for folder, error in damaged.items():
            target = self.run_dir / "damaged" / f"last-{folder.name}-{time.time_ns()}"
            _log.warning("%s; moved to %s, training goes on from the state before it", error, target)
            target.parent.mkdir(exist_ok=True)
            os.replace(folder, target)


def _told_here(record):
    """Whether a line of the log is none of the tracebacks that orbax writes of errors that are told in one line here."""
    return not (record.levelno >= logging.ERROR and f"{os.sep}orbax{os.sep}" in record.pathname)


def restore_params(run_dir: str | os.PathLike, which: str = "best") -> dict[str, Any]:
    """The parameters of a run, for inference: nothing else of the training state is read.

    Args:
      run_dir: folder of the run.
      which: "best" for the best validation mIoU, "last" for the newest training state.
    Returns:
      Nested dicts of NumPy arrays, as saved.
    Raises:
      CheckpointError: if there are none, or they are damaged.
      ValueError: if `which` is another word.
    """
    if which not in ("best", "last"):
        raise ValueError(f"expected which to be 'best' or 'last', got {which!r}")
    run_dir = at_home(run_dir).resolve()
    saved = _saved(run_dir, which)
    if not saved:
        hint = "give the --workdir of a run that has saved one"
        if which == "last" and _saved(run_dir, "best"):
            hint = "there is one in best/, ask for which='best'"
        elif _saved(run_dir, "last"):
            hint = "there is one in last/, where the frozen weights are not: train on with the same command until it is scored"
        raise CheckpointError(f"expected a checkpoint RUN/{which}/STEP/ in {run_dir}, got none; {hint}")
    folder = saved[max(saved)] if which == "last" or len(saved) == 1 else _best_folder(saved)
    arrays, _ = _read(folder, ("params",))
    return nested(arrays["params"]).get("params", {})


def best_miou(run_dir: str | os.PathLike) -> float | None:
    """Validation mIoU of the best parameters saved so far.

    Args:
      run_dir: folder of the run.
    Returns:
      A number in 0..1, or None if there are none, or only damaged ones, or they have no score.
    Raises:
      CheckpointError: if they could not be read just now.
    """
    scores = []
    for folder in _saved(at_home(run_dir).resolve(), "best").values():
        with contextlib.suppress(Damaged, TypeError, ValueError):
            scores.append(score(_read_record(folder)))
    return max((each for each in scores if each is not None), default=None)


def _record_digest(record):
    content = {key: value for key, value in record.items() if key != "sha256_of_record"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _saved(run_dir, which):
    """Step -> folder of the finished saves; half-written ones have other names.

    Where a save was to be replaced and the new one never came, it is the one before.
    """
    found = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for aside in (run_dir / "replaced").glob(f"{which}-*"):
            found[int(aside.name.rpartition("-")[2])] = aside
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in (run_dir / which).iterdir():
            if path.name.isdigit() and path.is_dir():
                found[int(path.name)] = path
    return found


def _best_folder(saved):
    """That of the highest mIoU. If a run was killed before the worse one was deleted, a whole one is among them."""
    scores, damage = [], []
    for step, folder in saved.items():
        try:
            record = _read_record(folder)
            missing = [item for item in record["sha256"] if not (folder / item).is_dir()]
            scores.append((bool(not missing), rank(record), step))
        except Damaged as error:
            damage.append(error)
    if not scores:
        raise damage[0]
    return saved[max(scores)[2]]


def _reader(handler):
    """An orbax checkpointer that reads for this process alone: the others need not read at the same time."""
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process_{own}")
    return ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)


def _read_record(folder):
    """The record of one step, checked."""
    advice = f"restore it from a copy or remove {folder}"
    if not (folder / "record").is_dir():
        raise Damaged(f"{folder} is incomplete: it has no record; {advice}")

    def checked():
        record = _reader(ocp.JsonCheckpointHandler).restore(folder / "record")
        step = folder.name.rpartition("-")[2]
        return record, record["sha256_of_record"] == _record_digest(record) and str(record["step"]) == step

    record, intact = read_or_judged(checked, folder / "record", advice)
    if not intact:
        raise Damaged(f"{folder / 'record'} is damaged: its content does not match its checksum or "
                      f"the number of its step; {advice}")
    return record


def _read(folder, items):
    """(arrays of each item, record) of one step, all of them checked."""
    record = _read_record(folder)
    arrays = {item: _read_arrays(folder / item, record["sha256"].get(item, {})) for item in items}
    return arrays, record


def _read_arrays(folder, digests):
    """Name -> NumPy array of one item, compared with its checksums."""
    if not digests:
        return {}
    advice = f"restore it from a copy or remove {folder.parent}"
    if not folder.is_dir():
        raise Damaged(f"{folder.parent} is incomplete: it has no {folder.name}; {advice}")
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in digests}

    def checked():
        leaves = _reader(ocp.PyTreeCheckpointHandler).restore(
            folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        return leaves, digests_of({name: np.asarray(leaf) for name, leaf in leaves.items()})

    leaves, found = read_or_judged(checked, folder, advice)
    wrong = sorted(name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name))
    if wrong:
        raise Damaged(f"{folder} is damaged: {len(wrong)} of {len(digests)} arrays do not match "
                      f"their sha256, the first is {wrong[0]!r}; {advice}")
    return leaves


def _read_state(folder):
    """(name -> array, state of the data iterator) of one training state, checked."""
    arrays, record = _read(folder, ("params", "rest"))
    return arrays["params"] | arrays["rest"], decoded_data_state(record.get("data_state"), folder)
