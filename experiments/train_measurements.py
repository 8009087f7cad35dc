"""What `experiments.bench train` measures: the train step, and what it costs to lose nothing."""

import functools
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcrf_jax.runfolder.checkpoints import RunCheckpoints
from lcrf_jax.train import fit

from . import measuring


class Step(NamedTuple):
    """What a train step costs.

    Attributes:
      timing: of a step.
      compiling: seconds.
      planned: bytes that XLA plans on each device, or None.
      operations: floating-point operations of one device as XLA counts them before it optimises, or None.
      traffic: bytes that the compiled program reads and writes on each device, as XLA counts them, or None.
    """

    timing: measuring.Timing
    compiling: float
    planned: int | None
    operations: float | None
    traffic: float | None


def step(prepared, repetitions):
    """The Step of the first round."""
    function, state, *arguments = fit.first_step(prepared)
    started = time.perf_counter()
    lowered = function.lower(state, *arguments)
    program = lowered.compile()
    seconds, box = time.perf_counter() - started, [state]

    def call():
        box[0], metrics = program(box[0], *arguments)
        jax.block_until_ready((box[0], metrics))

    call()
    [timing] = measuring.timings([call], repetitions, budget=30.0)
    operations = _entry(lowered.cost_analysis(), "flops")
    traffic = _entry(program.cost_analysis(), "bytes accessed")
    return Step(timing, seconds, fit.planned_bytes(program), operations, traffic)


def _entry(costs, name):
    """One number of XLA's analysis, which some platforms give as a list, or not at all."""
    costs = costs[0] if isinstance(costs, list) and costs else costs
    return costs.get(name) if isinstance(costs, dict) else None


def finite_checks(prepared, repetitions):
    """Timing of the choice between the old and the new state by itself: within a step XLA fuses it with the update."""
    _, state, *_ = fit.first_step(prepared)

    @jax.jit
    def check(old, new, loss, norm):
        usable = jnp.isfinite(loss) & jnp.isfinite(norm)
        return jax.tree.map(functools.partial(jnp.where, usable), new, old)

    new = jax.tree.map(lambda leaf: leaf + 0, state)
    arguments = state, new, jnp.float32(0), jnp.float32(0)
    jax.block_until_ready(check(*arguments))
    [timing] = measuring.timings([lambda: jax.block_until_ready(check(*arguments))], repetitions)
    return timing


def saving(prepared, repetitions):
    """(Timing of a save until training goes on, Timing of a save until it is on the disk, megabytes of the state)."""
    _, state, *_ = fit.first_step(prepared)
    numbers = iter(range(10**6))
    with tempfile.TemporaryDirectory() as folder, RunCheckpoints(folder) as checkpoints:

        def save():
            checkpoints.save_last(next(numbers), state, data_state={"batches": 0})

        def save_and_wait():
            save()
            checkpoints.wait()

        save_and_wait()
        begun, whole = [], []
        for _ in range(repetitions):
            begun += measuring.timings([save], 1)
            checkpoints.wait()
            whole += measuring.timings([save_and_wait], 1)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / measuring.MEGABYTE
    return _median(begun), _median(whole), size


def _median(found):
    return sorted(found, key=lambda timing: timing.median)[len(found) // 2]
