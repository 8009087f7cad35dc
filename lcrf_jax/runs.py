"""Training from what was prepared: rounds, checkpoints, validation, resuming."""

import pathlib

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lcrf_jax import training
from lcrf_jax.checkpoints import RunCheckpoints, save_description
from lcrf_jax.data.cache import cached_arrays
from lcrf_jax.data.pipeline import ImageSubset, device_prefetch, make_loader, stack_records
from lcrf_jax.evaluation import evaluate
from lcrf_jax.inference import make_segmenter
from lcrf_jax.methods import make_objective, method_of
from lcrf_jax.metrics import mean_iou
from lcrf_jax.objectives import empty_chains, uses_chains
from lcrf_jax.preparation import (
    guide_stride,
    images_of_round,
    inference_params,
    planned_rounds,
    posterior_evidence,
    segmenter_description,
    training_records,
    validation_features,
)
from lcrf_jax.runlog import MetricsWriter, Progress, say


def train(prepared, workdir, *, devices=None):
    """Train the decoder, round after round; a folder that holds a run continues it.

    A method that trains nothing, such as CAM, is saved as it is.

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
        if not rounds:
            checkpoints.save_best(0, inference_params(prepared, {}), 0.0)
            return workdir
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


def step_bytes(prepared):
    """Memory that the compiled train step of the first round needs: what XLA plans for arguments, results and between.

    Args:
      prepared: Prepared.

    Returns:
      int, bytes on each device; None if the method trains nothing or the platform does not tell.
    """
    rounds = planned_rounds(prepared.config, len(prepared.train))
    if not rounds:
        return None
    mesh, key = training.data_mesh(), jax.random.key(0)
    records, batch_size = training_records(prepared), prepared.config["batch_size"]
    batch = training.numeric_arrays(stack_records([records[i % len(records)] for i in range(batch_size)]))
    state = jax.eval_shape(lambda: _fresh_state(prepared, rounds[0], key, mesh))
    plan = _step_function(prepared, rounds[0], mesh).lower(state, batch, key).compile().memory_analysis()
    if plan is None:
        return None
    used = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return int(used - plan.alias_size_in_bytes)


def _step_function(prepared, this, mesh):
    config, network = prepared.config, prepared.network
    objective = make_objective(config, stride=network.stride, steps_per_epoch=this.steps_per_epoch)
    return training.make_train_step(
        network, prepared.variables, objective, _optimizer(config, this), mesh, guide_stride(config, network)
    )


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
    if this.number == 0:
        return None

    def batches():
        if done != this.first_step:
            raise ValueError(
                f"{workdir / 'posteriors'} has no posteriors that round {this.number + 1} was begun with: restore the "
                "folder and the settings of its rounds, or start again in a new one"
            )
        yield {"evidence": posterior_evidence(prepared, state.params, posterior)}

    config = prepared.config
    method = method_of(config)
    posterior = method.posterior(config)
    identity = {
        "round": this.number,
        "posterior": posterior,
        "before": list(method.round_epochs(config)[: this.number]),
        "seed": config["seed"],
    }
    return cached_arrays(workdir / "posteriors", identity, len(prepared.train), batches)["evidence"]


def _train_round(prepared, this, state, data_state, evidence, checkpoints, writer, key, mesh):
    config, round_key = prepared.config, jax.random.fold_in(key, this.number)
    step_function = _step_function(prepared, this, mesh)
    records, num_views = training_records(prepared, evidence), prepared.views.num_views
    chosen = images_of_round(method_of(config), this, prepared.train.tags)
    if chosen is not None:
        records = ImageSubset(records, chosen, num_views)
    # Fewer images come more often: a round is as many steps as with all of them.
    num_epochs = -(-this.epochs * len(prepared.train) * num_views // len(records))
    loader = make_loader(
        records, batch_size=config["batch_size"], seed=config["seed"] + this.number, num_epochs=num_epochs,
        num_threads=config["num_threads"], num_views=num_views,
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
        features = validation_features(prepared, prepared.val)
        miou = mean_iou(evaluate(segmenter, prepared.val, crf=False, features=features).plain)
        writer.write(step, {"val/miou": miou})
        bar.message(f"step {step}: mIoU {miou:.3f} on {prepared.val.split}, without refinement")
    checkpoints.save_best(step, stored, float(step) if miou is None else miou)
