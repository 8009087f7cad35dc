"""The measurements of `experiments.bench device`: peaks of the device, and programs beside the roofline that they make.

A program can be no faster than its operations at the device's peak, nor than its traffic at the peak of the memory. The
share of the roofline is the longer of these two times in the time that it takes.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lcrf_jax
from lcrf_jax.crf.image_kernels import default_form, image_kernel
from lcrf_jax.train.fit import planned_bytes

from . import measuring, train_measurements
from .configs import textures
from .crf_measurements import NUM_ITERATIONS, network_like, params_at
from .device_checks import picture, prepared_quietly, tiny_config
from .device_report import Budget, Found, first_line

NUM_CLASSES, GRID_OF, REPETITIONS = 21, 321, 7
SIZES = ((41, 41), (81, 81), (161, 161), (321, 321), (375, 500))
BATCHES, ENERGY_BATCH = (1, 8, 32), 4
# A warm-up and the least repetitions, or as many as last a second and a half.
CALLS, LONGEST = 4, 1.5
_PEAKS_COST = 6.0


class Peaks(NamedTuple):
    """What the device reaches: floating-point operations a second by the type of a product, and bytes a second."""

    operations: dict[str, float]
    traffic: float


class Measured(NamedTuple):
    """What a program costs.

    Attributes:
      timing: of a call.
      compiling: seconds.
      planned: bytes that XLA plans on a device, or None.
      operations: floating-point operations of a call on a device, or None.
      traffic: bytes read and written in a call on a device, or None.
      images: of a call.
      note: what is wrong with it, or "".
    """

    timing: measuring.Timing
    compiling: float
    planned: int | None
    operations: float | None
    traffic: float | None
    images: int
    note: str = ""


class Measurement(NamedTuple):
    """A program to be measured.

    Attributes:
      name: what it is.
      family: programs of one family take about the same time for a unit of work, once the first of them is measured.
      size: its input, in words.
      images: of a call.
      units: of work, in millions of pixels.
      cost: seconds that compiling and preparing it take, as guessed for two CPU cores.
      unit_cost: seconds that a unit takes, likewise.
      run: gives a `Measured`.
    """

    name: str
    family: str
    size: str
    images: int
    units: float
    cost: float
    unit_cost: float
    run: Callable[[], Measured]


class Costs:
    """Seconds that measurements will take, from their own guesses and from what others of their family took."""

    def __init__(self, factor: float):
        self._factor, self._families = factor, {}

    def of(self, measurement: Measurement) -> float:
        """The guess for a measurement: its making, and the calls that are timed."""
        beginning, unit = self._families.get(
            measurement.family, (measurement.cost * self._factor, measurement.unit_cost * self._factor)
        )
        call = unit * measurement.units
        return beginning + max(CALLS * call, min(REPETITIONS * call, LONGEST))

    def done(self, measurement: Measurement, measured: Measured, seconds: float) -> None:
        """Learn from one that is done."""
        call = measured.timing.median / 1e3
        before = self._families.get(measurement.family, (0.0, 0.0))
        beginning = max(seconds - CALLS * call, measured.compiling, before[0])
        # Of a small call the start is the most; the larger of two kinds of guess is the safer.
        self._families[measurement.family] = (beginning, call / measurement.units)


def peaks(on_cpu: bool) -> tuple[Peaks, list[tuple[str, str, float]]]:
    """The peaks, and rows (what, how it was measured, value in GFLOP/s or GB/s)."""
    kinds = {"bfloat16": (jnp.bfloat16, "default"), "float32, all digits": (jnp.float32, "highest")}
    if not on_cpu:  # where the default of float32 is another product
        kinds["float32, default"] = (jnp.float32, "default")
    found, rows = {}, []
    for name, (dtype, precision) in kinds.items():
        side = (1024 if dtype == jnp.bfloat16 else 2048) if on_cpu else 4096
        found[name] = _matmul_peak(side, dtype, precision)
        rows.append((f"matmul {name}", f"{side} x {side}", found[name] / 1e9))
    megabytes = 64 if on_cpu else 512
    traffic = _traffic_peak(megabytes)
    rows.append(("memory, x + 1", f"{megabytes} MB", traffic / 1e9))
    return Peaks(found, traffic), rows


def _matmul_peak(side, dtype, precision):
    # Several in a row, as a single one on a fast device lasts hardly longer than its start.
    one = jnp.full((side, side), 1 / side, dtype)
    times = 1 if jax.default_backend() == "cpu" else 8
    chain = jax.jit(
        lambda x: jax.lax.fori_loop(0, times, lambda _, y: jnp.matmul(y, x, precision=precision).astype(dtype), x)
    )
    return 2 * side**3 * times / _least_seconds(lambda: jax.block_until_ready(chain(one)))


def _traffic_peak(megabytes):
    values = [jnp.ones(megabytes * 250_000, jnp.float32)]
    # In place: on a CPU the system takes longer to hand out new memory than it takes to write it.
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def call():
        values.append(jax.block_until_ready(add(values.pop())))

    return 2 * values[0].nbytes / _least_seconds(call)


def _least_seconds(call):
    call()
    [timing] = measuring.timings([call], REPETITIONS)
    return timing.least / 1e3


def roofline_share(measured: Measured, peaks: Peaks, kind: str) -> float | None:
    """The least time that the device's peaks allow in the time that was taken; None where XLA tells no costs."""
    if measured.operations is None or measured.traffic is None:
        return None
    least = max(measured.operations / peaks.operations[kind], measured.traffic / peaks.traffic)
    return least / (measured.timing.median / 1e3)


def all_measurements(folder) -> list[Measurement]:
    """Every measurement, the most telling first; a folder for what training keeps on disk."""
    count = jax.device_count()
    tiny = tiny_config("latent_crf", folder, count)
    steps = [
        _of_step("train step, small backbone", tiny, 12.0),
        _of_step("train step, EfficientNet-Lite0", _textures_config(folder, count), 60.0),
    ]
    fields = {batch: [_of_field(size, batch) for size in SIZES] for batch in BATCHES}
    energies = [_of_energies(size) for size in SIZES[:4]]
    return [
        steps[0], fields[1][0], fields[1][1], energies[0], energies[1], fields[8][0], fields[1][2], energies[2],
        fields[8][1], fields[1][4], fields[1][3], fields[32][0], fields[32][1], fields[8][2], energies[3], steps[1],
        fields[32][2], *fields[8][3:], *fields[32][3:],
    ]  # fmt: skip


def _of_step(name, config, cost):
    batch, side = config["batch_size"], config["input_size"]
    run = functools.partial(_step, config)
    return Measurement(name, name, f"{side}x{side}", batch, batch * side**2 / 1e6, cost, 2.0, run)


def _of_field(size, batch):
    form = default_form(math.prod(size))
    units = batch * math.prod(size) / 1e6
    name = f"mean field, {form}"
    return Measurement(name, name, _name(size), batch, units, 8.0, 3.0 if form == "lattice" else 12.0,
                       functools.partial(mean_field, size, batch))  # fmt: skip


def _of_energies(size):
    form = default_form(math.prod(size))
    name = f"energy and gradient, {form}"
    return Measurement(name, name, _name(size), ENERGY_BATCH, ENERGY_BATCH * math.prod(size) / 1e6, 6.0, 2.0,
                       functools.partial(energies, size))  # fmt: skip


def _name(size):
    return f"{size[1]}x{size[0]}"


def _textures_config(folder, num_devices):
    """The configuration of the embedded set with few images and random weights."""
    config = textures.get_config()
    config.batch_size = num_devices * -(-16 // num_devices)
    config.data.options.num_train, config.data.options.num_val = config.batch_size, 1
    config.weights = "random"
    config.cache.directory = str(folder)
    return config.to_dict()


def _step(config):
    found = train_measurements.step(prepared_quietly(config), REPETITIONS)
    return Measured(found.timing, found.compiling, found.planned, found.operations, found.traffic, config["batch_size"])


@functools.cache
def _batch(size, number):
    """(images [B, H, W, 3], unary logits [B, H, W, K]) of a batch; its images are turned and mirrored ones of a few."""
    image = picture(*size)
    log_probs = network_like(image.astype(np.uint8), NUM_CLASSES, "every class")
    turned = (slice(None), slice(None, None, -1))
    pairs = [(image[rows, columns], log_probs[rows, columns]) for rows in turned for columns in turned]
    return tuple(np.stack([pairs[i % 4][which] for i in range(number)]) for which in (0, 1))


def mean_field(size, batch) -> Measured:
    """Ten iterations for each image of a batch, with the build of the default form, to labels."""
    params = params_at(size, GRID_OF)

    def labels(image, unary):
        kernel = image_kernel(image, params)
        field = lcrf_jax.mean_field(unary, kernel, num_iterations=NUM_ITERATIONS)
        return field.argmax(-1).astype(jnp.uint8), kernel.overflowed()

    return _measured(jax.vmap(labels), batch, *_batch(size, batch))


def energies(size) -> Measured:
    """Pairwise energies of a batch with their gradients and the build of the default form."""
    params = params_at(size, GRID_OF)

    def energy(probs, image):
        kernel = image_kernel(image, params)
        return lcrf_jax.pairwise_energy(probs, kernel), kernel.overflowed()

    def function(images, unary):
        gradient = jax.value_and_grad(energy, has_aux=True)
        (found, overflowed), gradients = jax.vmap(gradient)(jax.nn.softmax(unary), images)
        return (found, gradients), overflowed

    return _measured(function, ENERGY_BATCH, *_batch(size, ENERGY_BATCH))


def _measured(function, images, *arguments):
    """What a function of arrays that lie on the device costs; it returns (result, whether a lattice overflowed)."""
    arguments = jax.device_put(arguments)
    started = time.perf_counter()
    traced = jax.jit(function).trace(*arguments)
    program = traced.lower().compile()
    seconds = time.perf_counter() - started
    _, overflowed = jax.block_until_ready(program(*arguments))
    [timing] = measuring.timings([lambda: jax.block_until_ready(program(*arguments))], REPETITIONS, budget=LONGEST)
    counted = zip(loop_factors(traced.jaxpr), _costs(program), strict=True)
    operations, traffic = (None if cost is None else repeats * cost for repeats, cost in counted)
    note = "a lattice overflowed" if np.any(overflowed) else ""
    return Measured(timing, seconds, planned_bytes(program), operations, traffic, images, note)


def _costs(program):
    """(operations, bytes) as XLA counts them, the body of a loop once; None where it does not tell."""
    costs = program.cost_analysis()
    costs = costs[0] if isinstance(costs, list) and costs else costs
    known = costs if isinstance(costs, dict) else {}
    return known.get("flops"), known.get("bytes accessed")


def loop_factors(jaxpr: Any) -> tuple[float, float]:
    """By how much operations and bytes of a traced program are more than with the body of each loop once.

    XLA counts each body once. Loops whose length is not known are counted so here as well.
    """
    often, once = _work(jaxpr, True), _work(jaxpr, False)
    return often[0] / max(once[0], 1), often[1] / max(once[1], 1)


def _work(jaxpr, repeated):
    """(operations, bytes) of a jaxpr, without regard to what the compiler fuses."""
    operations = traffic = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = [_work(body, repeated) for body in _bodies(equation.params)]
        if inner:
            times = equation.params["length"] if repeated and equation.primitive.name == "scan" else 1
            more = max(inner) if equation.primitive.name == "cond" else tuple(map(sum, zip(*inner)))
            operations, traffic = operations + times * more[0], traffic + times * more[1]
            continue
        shapes = [var.aval for var in (*equation.invars, *equation.outvars) if hasattr(var.aval, "dtype")]
        traffic += sum(aval.size * getattr(aval.dtype, "itemsize", 4) for aval in shapes)
        operations += _operations(equation)
    return operations, traffic


def _bodies(params) -> Iterator[Any]:
    for value in params.values():
        for entry in value if isinstance(value, list | tuple) else (value,):
            if hasattr(getattr(entry, "jaxpr", entry), "eqns"):
                yield entry


def _operations(equation):
    """Floating-point operations of an equation without a body."""
    size = sum(var.aval.size for var in equation.outvars if hasattr(var.aval, "size"))
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2 * size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return size


COLUMNS = {
    "program": 31, "size": 8, "images": 0, "ms": 22, "images/s": 9, "compile s": 0, "planned MB": 0, "GFLOP/s": 0,
    "GB/s": 0, "% of roofline": 0,
}  # fmt: skip


def measure(report: measuring.Report, measurements: list[Measurement], budget: Budget, found: Found) -> None:
    """Measure the peaks, and then what fits the time."""
    found.measurements_left[:] = ["peaks", *map(title_of, measurements)]
    if not budget.fits(_PEAKS_COST):
        return
    reached, rows = peaks(jax.default_backend() == "cpu")
    table = report.table(
        "Peaks, the best of several calls. float32, all digits: the products that the CRF asks for.",
        {"what": 28, "size": 12, "GFLOP/s, GB/s": 14},
    )
    for what, size, value in rows:
        table.row(what, size, measuring.number(value))
    found.peaks.update({what: value for what, _, value in rows})
    found.measurements_left.remove("peaks")
    measurements_table(report, measurements, budget, reached, found)


def title_of(measurement: Measurement) -> str:
    """A measurement in words."""
    return f"{measurement.name}, {measurement.size}, batch {measurement.images}"


def measurements_table(
    report: measuring.Report, measurements: list[Measurement], budget: Budget, reached: Peaks, found: Found
) -> None:
    """Measure what fits the time, row by row."""
    table = report.table(
        f"Measurements. K = {NUM_CLASSES} classes; mean field: {NUM_ITERATIONS} iterations; both with the build of the "
        "kernel, images mapped by vmap. Wall time in ms as median (least) of several calls, then CPU time of the host. "
        "Roofline: the longer of operations at the peak of float32 and bytes at the peak of the memory, in the time taken; "
        "operations and bytes as XLA counts them before and after it fuses, loops as often as they run.",
        COLUMNS,
    )
    costs, results = Costs(budget.factor()), found.measurements
    for measurement in measurements:
        title = title_of(measurement)
        if not budget.fits(costs.of(measurement), factor=1.0):
            continue
        started = budget.spent()
        try:
            measured = measurement.run()
        except Exception as error:  # noqa: BLE001 - as of a device with little memory: the others go on
            report.say(f"{title} could not be measured: {first_line(error)}")
            found.measurements_left.remove(title)
            results.append({"name": title, "error": first_line(error)})
            continue
        found.measurements_left.remove(title)
        costs.done(measurement, measured, budget.spent() - started)
        share = roofline_share(measured, reached, "float32, all digits")
        results.append({"name": title, **measured._asdict(), "roofline_share": share})
        table.row(*_cells(measurement, measured, share))
    for result in results:
        if result.get("note"):
            report.say(f"{result['name']}: {result['note']}, so that its result is that of the unary.")


def _cells(measurement, measured, share):
    seconds = measured.timing.median / 1e3
    rates = [None if value is None else value / seconds / 1e9 for value in (measured.operations, measured.traffic)]
    return [
        measurement.name,
        measurement.size,
        measured.images,
        measured.timing,
        measuring.number(measured.images / seconds),
        measuring.number(measured.compiling),
        None if measured.planned is None else measuring.number(measured.planned / measuring.MEGABYTE),
        *map(measuring.number, rates),
        measuring.per_cent(share),
    ]
