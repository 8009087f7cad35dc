"""Training from what was prepared: rounds, checkpoints, validation, resuming."""

import pathlib

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lcrf_jax import training
from lcrf_jax.checkpoints import RunCheckpoints, save_description
from lcrf_jax.data.cache import cached_arrays
from lcrf_jax.data.pipeline import device_prefetch, make_loader
from lcrf_jax.evaluation import evaluate
from lcrf_jax.inference import make_segmenter
from lcrf_jax.metrics import mean_iou
from lcrf_jax.objectives import OBJECTIVES, empty_chains, uses_chains
from lcrf_jax.preparation import (
    guide_stride,
    inference_params,
    planned_rounds,
    posterior_evidence,
    segmenter_description,
    training_records,
)
from lcrf_jax.runlog import MetricsWriter, Progress, say


def train(prepared, workdir, *, devices=None):
    """Train the decoder, round after round; a folder that holds a run continues it.

    Writes checkpoints (last/ and best/), config.json and the metrics to the folder.

    Args:
      prepared: Prepared.
      workdir: folder of the run.
      devices: devices to spread the batch over; by default all.

    Returns:
      Path of the folder.
    """
    workdir, config = pathlib.Path(workdir), prepared.config
    rounds = planned_rounds(config, len(prepared.train))
    key, mesh = jax.random.key(config["seed"]), training.data_mesh(devices)
    description = segmenter_description(config, prepared.train.class_names, prepared.digest)
    save_description(workdir, description)
    with RunCheckpoints(workdir) as checkpoints:
        state, data_state, done = _newest_state(prepared, checkpoints, rounds, key, mesh)
        with MetricsWriter(workdir, resume_step=done + 1) as writer:
            for this in rounds:
                if done >= this.last_step:
                    continue
                evidence = _evidence_of(prepared, workdir, this, state, done)
                if this.number and done == this.first_step:
                    state = _fresh_state(prepared, this, key, mesh)._replace(params=state.params)
                    data_state = None
                state = _train_round(prepared, this, state, data_state, evidence, checkpoints, writer, key, mesh)
                done = this.last_step
    return workdir


def _optimizer(config, this):
    return training.make_optimizer(num_steps=this.last_step - this.first_step, **config["optimizer"])


def _fresh_state(prepared, this, key, mesh):
    optimizer = _optimizer(prepared.config, this)
    config, round_key = prepared.config, jax.random.fold_in(key, this.number)
    chains = None
    if uses_chains(config):
        chains = empty_chains(prepared.views.num_views, len(prepared.train), prepared.grid)
    return training.initial_state(
        round_key, prepared.network, prepared.variables, optimizer, config["input_size"], mesh, chains
    )


def _newest_state(prepared, checkpoints, rounds, key, mesh):
    """(state, state of the data, steps done) of the run in the folder, or of a run that begins."""
    state = _fresh_state(prepared, rounds[0], key, mesh)
    restored = checkpoints.restore_last(state)
    if restored is None:
        return state, None, 0
    say(f"continuing after step {restored.step}")
    return restored.state, restored.data_state, restored.step


def _evidence_of(prepared, workdir, this, state, done):
    """The evidence of a round after the first, from the state that the one before ended with; kept on disk."""
    if this.number == 0 or prepared.maps is None:
        return None

    def batches():
        if done != this.first_step:
            raise ValueError(
                f"{workdir / 'posteriors'} has no posteriors that round {this.number + 1} was begun with: restore the "
                "folder and the settings of its rounds, or start again in a new one"
            )
        yield {"evidence": posterior_evidence(prepared, state.params, prepared.config["posterior"])}

    config = prepared.config
    identity = {
        "round": this.number,
        "posterior": prepared.config["posterior"],
        "before": list(config["epochs"][: this.number]),
        "seed": config["seed"],
    }
    return cached_arrays(workdir / "posteriors", identity, len(prepared.train), batches)["evidence"]


def _train_round(prepared, this, state, data_state, evidence, checkpoints, writer, key, mesh):
    config, network = prepared.config, prepared.network
    round_key = jax.random.fold_in(key, this.number)
    objective = OBJECTIVES[config["method"]](
        config["objective"], stride=network.stride, steps_per_epoch=this.steps_per_epoch
    )
    step_function = training.make_train_step(
        network, prepared.variables, objective, _optimizer(config, this), mesh, guide_stride(config, network)
    )
    loader = make_loader(
        training_records(prepared, evidence), batch_size=config["batch_size"], seed=config["seed"] + this.number,
        num_epochs=this.epochs, num_threads=config["num_threads"], num_views=prepared.views.num_views,
    )
    if data_state is not None:
        loader.set_state(data_state)
    batches = device_prefetch(loader, NamedSharding(mesh, P("data")))
    first = this.first_step + int(state.step)
    several = len(planned_rounds(config, len(prepared.train))) > 1
    title = f"round {this.number + 1}" if several else "train"
    with Progress(this.last_step, first_step=first, title=title) as bar:
        for step in range(first + 1, this.last_step + 1):
            batch = training.numeric_arrays(next(batches))
            state, metrics = step_function(state, batch, round_key)
            epoch, rest = divmod(step - this.first_step, this.steps_per_epoch)
            saving = step == this.last_step or rest == 0 and epoch % config["eval_every_epochs"] == 0
            reported = saving or step % config["log_every_steps"] == 0
            shown = {name: float(value) for name, value in metrics.items()} if reported else None
            if reported:
                _check_finite(step, shown)
                writer.write(step, {f"train/{name}": value for name, value in shown.items()})
            bar.update(num_images=config["batch_size"], metrics=shown)
            if saving:
                _validate(prepared, state.params, step, checkpoints, writer, bar)
                checkpoints.save_last(step, state, data_state=batches.get_state())
    return state


def _check_finite(step, metrics):
    """End a run that has diverged before it is saved over a good one."""
    wrong = [name for name, value in metrics.items() if not np.isfinite(value)]
    if wrong:
        raise ValueError(
            f"step {step}: {', '.join(wrong)} not finite, training has diverged; what was saved before is kept. "
            "Lower optimizer.learning_rate and continue"
        )


def _validate(prepared, params, step, checkpoints, writer, bar):
    """Score the parameters on the validation masks, where there are some, and keep the best so far."""
    stored, miou = inference_params(prepared, params), None
    if prepared.val is not None:
        description = segmenter_description(prepared.config, prepared.train.class_names, prepared.digest)
        segmenter = make_segmenter(description, stored)
        miou = mean_iou(evaluate(segmenter, prepared.val, crf=False).plain)
        writer.write(step, {"val/miou": miou})
        bar.message(f"step {step}: mIoU {miou:.3f} on {prepared.val.split}, without refinement")
    checkpoints.save_best(step, stored, float(step) if miou is None else miou)
