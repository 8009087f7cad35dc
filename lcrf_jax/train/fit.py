"""Training from what was prepared: rounds, checkpoints, validation, resuming."""

import collections
import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lcrf_jax.bound.objective import empty_chains, uses_chains
from lcrf_jax.bound.record import Record
from lcrf_jax.data.loader import device_prefetch, make_loader
from lcrf_jax.data.pipeline import ImageSubset
from lcrf_jax.machine.files import at_home
from lcrf_jax.machine.locks import locked
from lcrf_jax.machine.processes import first_decides, largest
from lcrf_jax.machine.progress import Progress, say
from lcrf_jax.machine.signals import Interrupted, StopRequest
from lcrf_jax.metrics import mean_iou
from lcrf_jax.predict.evaluation import evaluate
from lcrf_jax.predict.segmenter import make_segmenter
from lcrf_jax.runfolder.checkpoints import RunCheckpoints
from lcrf_jax.runfolder.description import check_description, save_description
from lcrf_jax.runfolder.metrics import MetricsWriter
from lcrf_jax.runfolder.segments import with_segment
from lcrf_jax.train.beginning import description_before, is_saved, refuse_changes, refuse_moved_rounds
from lcrf_jax.train.evidence import evidence_of
from lcrf_jax.train.linear_round import POSTERIORS
from lcrf_jax.train.preparation import Prepared, inference_params, training_records, validation_features
from lcrf_jax.train.step import (
    TrainState,
    check_batch_size,
    count_parameters,
    data_mesh,
    initial_state,
    make_train_step,
    replicated,
)


def train(
    prepared: Prepared, workdir: str | os.PathLike, *, devices: Sequence[jax.Device] | None = None
) -> pathlib.Path:
    """Train the decoder, round after round; a folder that holds a run continues it.

    A method that trains nothing, such as CAM, is saved as it is. A run that is finished is left as it is. SIGTERM and Ctrl-C save the state after the step that
    is under way (with several processes after the next one that is logged or saved) and end the run. Of several
    processes (see `lcrf_jax.machine.processes`) all call this with the same
    arguments.

    Writes checkpoints (last/ and best/), config.json and the metrics to the folder. config.json says what is trained: it is
    written when nothing has been refused and the newest state is there, with a segment for each start that trains.

    Args:
      prepared: Prepared.
      workdir: folder of the run; with several processes on a file system that all share.
      devices: devices to spread the batch over; by default all.

    Returns:
      Path of the folder.

    Raises:
      Interrupted: after the state was saved, if SIGTERM or Ctrl-C asked for it.
      lcrf_jax.machine.locks.Locked: if another run is at work in the folder.
      CheckpointError: if the disk is full, or the folder holds another run, a finished one of other settings, or none
        that can be read.
      ValueError: if too many losses in a row were not finite; the message names the images.
    """
    workdir, config = at_home(workdir), prepared.config
    rounds = prepared.plan.rounds
    key, mesh = jax.random.key(config["seed"]), data_mesh(devices)
    check_batch_size(config["batch_size"], mesh.size, config["accumulation_steps"])
    description = prepared.description()
    with contextlib.ExitStack() as stack:
        first_decides(lambda: stack.enter_context(locked(workdir / "lock")))
        for line in check_description(workdir, description):
            say(line)
        refuse_moved_rounds(workdir, rounds)
        checkpoints = stack.enter_context(RunCheckpoints(workdir))
        if not rounds:
            _save_untrained(prepared, workdir, checkpoints, description)
            return workdir
        state, data_state, done = _newest_state(prepared, checkpoints, rounds, key, mesh)
        if done >= rounds[-1].last_step:
            refuse_changes(workdir, config)
            say(f"{workdir} is finished: all {rounds[-1].last_step} steps are done")
            return workdir
        if done:
            say(f"continuing after step {done}")
        save_description(workdir, with_segment(description_before(workdir), description, done))
        if not done:
            first_decides(lambda: shutil.rmtree(workdir / POSTERIORS, ignore_errors=True))
        writer = stack.enter_context(MetricsWriter(workdir, resume_step=done + 1))
        stop = stack.enter_context(StopRequest())
        for this in rounds:
            if done >= this.last_step:
                continue
            evidence = evidence_of(prepared, workdir, this, state, done)
            if this.number and done == this.first_step:
                state = _fresh_state(prepared, this, key, mesh)._replace(params=state.params)
                data_state = None
            state = _train_round(
                prepared, this, state, data_state, evidence, _Outputs(checkpoints, writer, stop), key, mesh
            )
            done = this.last_step
    return workdir


def _save_untrained(prepared, workdir, checkpoints, description):
    """Save a run of a method that trains nothing, or leave the one that is there as it is."""
    if is_saved(workdir):
        refuse_changes(workdir, prepared.config)
        say(f"{workdir} is finished: this method trains nothing")
        return
    save_description(workdir, with_segment(None, description, 0))
    checkpoints.save_best(0, inference_params(prepared, {}), None)


class _Outputs(NamedTuple):
    """Where a round leaves what it makes, and who may ask it to end."""

    checkpoints: RunCheckpoints
    writer: MetricsWriter
    stop: StopRequest


def first_step(
    prepared: Prepared, devices: Sequence[jax.Device] | None = None
) -> tuple[Callable[..., Any], TrainState, Any, Record, jax.Array]:
    """The train step of the first round and what it takes, for measurements.

    Args:
      prepared: Prepared, of a method that trains.
      devices: devices to spread the batch over; by default all.

    Returns:
      (jitted step, state that begins, frozen weights, batch on the devices, key), see
        `lcrf_jax.train.step.make_train_step`.
    """
    this, mesh, key = _beginning(prepared, devices)
    step, state = _step_function(prepared, this, mesh), _fresh_state(prepared, this, key, mesh)
    return step, state, replicated(prepared.variables, mesh), _first_batch(prepared, this, mesh), key


def _beginning(prepared, devices=None):
    """(first round, mesh of the devices, key of the run)."""
    return prepared.plan.rounds[0], data_mesh(devices), jax.random.key(prepared.config["seed"])


def _first_batch(prepared, this, mesh):
    return next(_round_batches(prepared, this, None, mesh))._replace(name=None)


def num_trainable(prepared: Prepared) -> int:
    """Number of weights that training changes; nothing is computed.

    Args:
      prepared: Prepared.

    Returns:
      int; 0 for a method that trains nothing.
    """
    if not prepared.plan.rounds:
        return 0
    this, mesh, key = _beginning(prepared)
    return count_parameters(_state_shapes(prepared, this, key, mesh).params)


def step_bytes(prepared: Prepared) -> int | None:
    """Memory that the compiled train step of the first round needs: what XLA plans for arguments, results and between.

    Args:
      prepared: Prepared.

    Returns:
      int, bytes on each device; None if the method trains nothing or the platform does not tell.
    """
    if not prepared.plan.rounds:
        return None
    this, mesh, key = _beginning(prepared)
    state = _state_shapes(prepared, this, key, mesh)
    variables, batch = replicated(prepared.variables, mesh), _first_batch(prepared, this, mesh)
    return planned_bytes(_step_function(prepared, this, mesh).lower(state, variables, batch, key).compile())


def planned_bytes(program: jax.stages.Compiled) -> int | None:
    """Memory that XLA plans for a compiled program, donated arguments once.

    Args:
      program: compiled function.

    Returns:
      int, bytes on each device; None if the platform does not tell.
    """
    plan = program.memory_analysis()
    if plan is None:
        return None
    used = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return int(used - plan.alias_size_in_bytes)


def _step_function(prepared, this, mesh):
    config, plan = prepared.config, prepared.plan
    return make_train_step(
        plan.network, plan.objective(this), plan.optimizer(this), mesh, plan.guide_stride,
        accumulation_steps=config["accumulation_steps"], max_skipped=config["max_skipped_in_a_row"],
    )


def _fresh_state(prepared, this, key, mesh):
    optimizer = prepared.plan.optimizer(this)
    config, round_key = prepared.config, jax.random.fold_in(key, this.number)
    chains = None
    if uses_chains(config):
        chains = empty_chains(prepared.views.num_views, len(prepared.train), prepared.plan.grid)
    return initial_state(
        round_key, prepared.network, prepared.variables, optimizer, config["input_size"], mesh, chains
    )


def _state_shapes(prepared, this, key, mesh):
    """The state of a round that begins, of shapes that know where they lie; nothing is computed."""
    shapes = jax.eval_shape(lambda: _fresh_state(prepared, this, key, mesh))
    everywhere = NamedSharding(mesh, P())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes)


def _newest_state(prepared, checkpoints, rounds, key, mesh):
    """(state, state of the data, steps done) of the run in the folder, or of a run that begins."""
    restored = checkpoints.restore_last(_state_shapes(prepared, rounds[0], key, mesh))
    if restored is None:
        return _fresh_state(prepared, rounds[0], key, mesh), None, 0
    return restored.state, restored.data_state, restored.step


def _train_round(prepared, this, state, data_state, evidence, outputs, key, mesh):
    config, round_key = prepared.config, jax.random.fold_in(key, this.number)
    step_function, variables = _step_function(prepared, this, mesh), replicated(prepared.variables, mesh)
    batches = _round_batches(prepared, this, evidence, mesh)
    if data_state is not None:
        batches.set_state(data_state)
    first = this.first_step + int(state.step)
    title = f"round {this.number + 1}" if len(prepared.plan.rounds) > 1 else "train"
    # The names of the images of the last steps, for a message.
    recent = collections.deque(maxlen=config["log_every_steps"] + config["max_skipped_in_a_row"])
    metrics = {}
    finished = first
    with Progress(this.last_step, first_step=first, title=title, counted="step") as bar:
        bar.waiting("compiling")
        for step in range(first + 1, this.last_step + 1):
            batch = next(batches)
            recent.append((step, batch.name))
            before, (state, metrics) = metrics, step_function(state, variables, batch._replace(name=None), round_key)
            jax.block_until_ready(before)  # one step ahead of the devices, not more: who asks to stop waits for all of them
            epoch, rest = divmod(step - this.first_step, this.steps_per_epoch)
            scoring = step == this.last_step or rest == 0 and epoch % config["eval_every_epochs"] == 0
            saving = scoring or step % config["save_every_steps"] == 0
            shown = None
            if saving or step % config["log_every_steps"] == 0:
                shown = {name: float(value) for name, value in metrics.items()}
                _check_skipped(state, step, recent, config["max_skipped_in_a_row"])
                outputs.writer.write(step, {f"train/{name}": value for name, value in shown.items()})
            now_finished = step - 1 if shown is None else step  # this one may still be under way
            if now_finished > finished:
                newly = now_finished - finished
                bar.update(num_images=newly * config["batch_size"], metrics=shown, num_steps=newly)
                finished = now_finished
            if scoring:
                _validate(prepared, state.params, step, outputs, bar)
            signum = _asked_to_stop(outputs.stop, shown is not None)
            if saving or signum:
                outputs.checkpoints.save_last(step, state, data_state=batches.get_state())
            if signum:
                outputs.checkpoints.wait()
                raise Interrupted(f"saved after step {step}; the same command continues from there", signum)
    return state


def _round_batches(prepared, this, evidence, mesh):
    """The batches of a round, on the devices ahead of time."""
    config, num_views = prepared.config, prepared.views.num_views
    records = training_records(prepared, evidence)
    chosen = prepared.plan.images[this.number]
    if chosen is not None:
        records = ImageSubset(records, chosen, num_views)
    # Fewer images come more often: a round is as many steps as with all of them.
    num_epochs = -(-this.epochs * this.passes * len(prepared.train) * num_views // len(records))
    loader = make_loader(
        records, batch_size=config["batch_size"], seed=config["seed"] + this.number, num_epochs=num_epochs,
        num_threads=config["num_threads"], num_views=num_views,
    )
    return device_prefetch(loader, NamedSharding(mesh, P("data")))


def _asked_to_stop(stop, synchronised):
    """Number of the signal that asks for the end, or 0; several processes agree on it where they wait anyway."""
    if jax.process_count() == 1:
        return stop.signum
    return largest(stop.signum) if synchronised else 0


def _check_skipped(state, step, recent, most):
    """End a run that has diverged, before it is saved over a good one."""
    in_a_row = int(state.skipped[1])
    if in_a_row < most:
        return
    start = step - in_a_row + 1
    batches = "\n".join(
        f"  step {number}: {', '.join(map(str, names))}" for number, names in recent if start <= number < start + most
    )
    raise ValueError(
        f"the losses or gradients of {most} steps in a row, from step {start} on, were not finite; these steps changed "
        f"nothing, and what was saved before is kept. Look at the images, or lower optimizer.learning_rate, and run "
        f"the same command again. The batches were:\n{batches}"
    )


def _validate(prepared, params, step, outputs, bar):
    """Score the parameters on the validation masks and keep the best so far; without masks the newest, with no score."""
    stored, miou = inference_params(prepared, params), None
    if prepared.val is not None:
        segmenter = make_segmenter(prepared.plan.description(prepared.digest), stored)
        features = validation_features(prepared, prepared.val)
        miou = mean_iou(evaluate(segmenter, prepared.val, crf=False, features=features).plain)
        outputs.writer.write(step, {"val/miou": miou})
        bar.message(f"step {step}: mIoU {miou:.3f} on {prepared.val.split}, without refinement")
    outputs.checkpoints.save_best(step, stored, miou)
