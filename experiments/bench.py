r"""Measure the library: speed, memory and accuracy, in one run.

    python -m experiments.bench crf [--against=pydensecrf2] [--large] [--out=FILE]
    python -m experiments.bench train --config=experiments/configs/textures.py [--out=FILE]
    python -m experiments.bench device [--seconds=240] [--out=FOLDER]

crf measures the dense CRF on a photograph of scikit-image, or --image=FILE: every form of the kernel at several sizes,
against the exact sum; mean field, alone and in turns with another implementation, and with more or fewer iterations on the
coarse grid; labels against exact mean field; cost against pixels. Each row is measured by a process of its own. The last line
is the speed-up of mean field at the last of --sizes. It takes five minutes or more on two cores, and other work on the machine
spoils the times.

train measures the train step of a configuration on its data, on all devices of this process: time, memory, images per
second; and what saving and the checks for losses that are not finite add to it. Features are computed if they are not
cached yet. The last line is that share.

device checks a device, of any kind, against the CPU, and measures it beside its own peaks for as long as there is time. It
needs neither network nor data. It writes device-NAME.md and device-NAME.json to FOLDER, by default the current one. The last
line is how many checks passed; the exit code is 1 if one failed. See docs/devices.md.
"""

import pathlib
import re
import shutil
import sys
import tempfile

import jax
from absl import flags
from PIL import Image

from lcrf_jax.crf.image_kernels import FORMS
from lcrf_jax.data.files.images import read_image
from lcrf_jax.machine.files import at_home
from lcrf_jax.machine.progress import say
from lcrf_jax.train.fit import num_trainable
from lcrf_jax.train.preparation import prepare

from . import (
    configuring,
    crf_measurements,
    device_checks,
    device_measurements,
    device_report,
    measuring,
    reporting,
    train_measurements,
)
from .measuring import Report, Timing, number, per_cent

_AGAINST = flags.DEFINE_enum("against", None, sorted(crf_measurements.PEERS), "Another implementation to compare with.")
_IMAGE = flags.DEFINE_string("image", None, "Photograph; by default the astronaut of scikit-image.")
_SIZES = flags.DEFINE_list("sizes", ["41", "81", "161", "321", "500x375"], "Sizes in pixels: a side or WIDTHxHEIGHT.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 21, "Number of classes.", lower_bound=2, upper_bound=255)
_GRID_OF = flags.DEFINE_integer(
    "grid_of", 321, "Smaller squares are grids of a photograph of this side; position widths shrink with them."
)
_PARITY = flags.DEFINE_string("parity", "128", "Size at which labels are compared with exact mean field.")
_PIXELS = flags.DEFINE_list("pixels", ["128", "256", "512", "1024"], "Sizes for the cost against pixels.")
_LARGE = flags.DEFINE_bool("large", False, "Add 2000x1500 to the cost against pixels.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Most repetitions of a timing.", lower_bound=1)
_FRESH = flags.DEFINE_bool(
    "fresh_processes", True, "Measure each row in a process of its own, as peak memory needs it."
)
_CONFIG = configuring.define("config", text="Of train: the configuration, a name or a file.")
_OUT = flags.DEFINE_string("out", None, "File to write the tables to, as Markdown. Of device: folder of its two files.")
_SECONDS = flags.DEFINE_float("seconds", 240.0, "Of device: time it may take; what does not fit is left out.", lower_bound=1)

UNARIES = ("every class", "3 classes")
CALLS = {
    "build": "build",
    "apply": "apply",
    "energy": "energy",
    "energy_with_build": "with build",
    "mean_field": "mean field",
}
ERRORS = [f"{form}_{what}" for form in ("raw", "symmetric") for what in ("product", "energy", "gradient")]


def main(argv):
    """Run the named benchmark."""
    names = argv[1:]
    if len(names) != 1 or names[0] not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ValueError(f"expected the name of one benchmark, of {known}; got {names or 'none'}")
    if names[0] == "device":
        device()
        return
    report = Report()
    report.say(f"Machine: {measuring.machine()}.")
    _say_cache(report)
    last = BENCHMARKS[names[0]](report)
    if _OUT.value:
        report.write(pathlib.Path(_OUT.value))
        say(f"\ntables      {_OUT.value}")
    say(f"\n{last}")


def _say_cache(report):
    cache = jax.config.jax_compilation_cache_dir
    if cache:
        report.say(f"Compile times are too short: JAX takes what it can from {cache} (JAX_COMPILATION_CACHE_DIR).")


def crf(report):
    """The dense CRF; the last line, which says how much faster than the peer it is."""
    sizes, pixels = [_size(text) for text in _SIZES.value], [_size(text) for text in _PIXELS.value]
    if _LARGE.value:
        pixels.append(_size("2000x1500"))
    parity, peer = _size(_PARITY.value), _installed(_AGAINST.value, report)
    with tempfile.TemporaryDirectory() as folder:
        photo = pathlib.Path(folder) / "photograph.png"
        Image.fromarray(_photograph()).save(photo)
        measure = _Measurer(str(photo), _NUM_CLASSES.value)
        _forms_table(report, measure, sizes, folder)
        speedup = _comparison_table(report, measure, sizes, peer)
        _coarse_table(report, measure, sizes[-1])
        _parity_table(report, measure, parity, peer)
        _pixels_table(report, measure, pixels)
        first, second = measure("recompilations", sizes[-1])
    report.say(f"Programs compiled for a first photograph of {_name(sizes[-1])}: {first}, for a second one: {second}.")
    if peer is None:
        return "no comparison was made: " + (
            f"{_AGAINST.value} is not installed" if _AGAINST.value else "see --against"
        )
    return f"speed-up against {peer}, mean field {_name(sizes[-1])}x{_NUM_CLASSES.value}: {speedup:.2f}"


def train(report):
    """The train step; the last line, which says what it costs to lose nothing."""
    if _CONFIG.value is None:
        raise ValueError("bench train needs a configuration, such as --config=textures")
    prepared = prepare(_CONFIG.value.to_dict())
    config, repetitions = prepared.config, _REPETITIONS.value
    step = train_measurements.step(prepared, repetitions)
    timing = step.timing
    checks = train_measurements.finite_checks(prepared, repetitions)
    begun, whole, size = train_measurements.saving(prepared, repetitions)
    table = report.table(
        f"Train step of {config['method']}: {config['batch_size']} images at {prepared.plan.grid} x {prepared.plan.grid} logits, "
        f"{jax.device_count()} device(s), {num_trainable(prepared):,} trainable weights, products in "
        f"{config['network']['compute_dtype']}, {config['accumulation_steps']} part(s). Wall time in ms as median (least) "
        f"of up to {repetitions} calls, then the CPU time of all threads.",
        {"what": 46, "ms": 24, "": 30},
    )
    table.row("step", timing, f"{1e3 * config['batch_size'] / timing.median:.1f} images/s")
    table.row("compiling it", f"{1e3 * step.compiling:.0f}", None)
    table.row("memory of the step on each device", None, _known(step.planned, 1e6, "MB"))
    table.row("operations of the step on each device", None, _known(step.operations, 1e9, "GFLOP"))
    table.row("memory read and written in the step", None, _known(step.traffic, 1e9, "GB"))
    table.row("choosing between old and new state, by itself", checks, None)
    table.row("saving, until training goes on", begun, f"{size:.1f} MB of state")
    table.row("saving, until it is on the disk", whole, f"each {config['save_every_steps']} steps")
    share = (checks.median + whole.median / config["save_every_steps"]) / timing.median
    return f"checks and saving, at most: {per_cent(share)} % of the step"


def device():
    """Check and measure the device within the time, write what was found, and end with code 1 if a check failed."""
    budget = device_report.Budget(_SECONDS.value, already=device_report.process_age())
    report, found = Report(), device_report.Found()
    about = device_report.description(sys.argv[1:], _SECONDS.value)
    device_report.say_description(report, about)
    _say_cache(report)
    out = at_home(_OUT.value or ".")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as kept:

        def finish(stopped=True):
            if stopped:
                shutil.rmtree(kept, ignore_errors=True)
                report.say("The time was over in the midst of one of these; it is not in the tables.")
            return _device_code(found, report, about, budget, out)

        # Guesses of costs can be wrong, and nothing else interrupts a compiler.
        with device_report.Deadline(_SECONDS.value - 2 - budget.spent(), finish):
            checks = device_checks.all_checks(kept)
            device_report.checks_table(report, checks, budget, device_checks.platform(), found)
            device_measurements.measure(report, device_measurements.all_measurements(kept), budget, found)
        code = finish(stopped=False)
    if code:
        sys.exit(code)


def _device_code(found, report, about, budget, folder):
    """Write what was found; the exit code."""
    skipped, last = found.for_json()["skipped"], found.summary()
    if skipped:
        report.say(f"Skipped, as no time was left: {'; '.join(skipped)}.")
    report.say(f"{last[0].upper()}{last[1:]}. {budget.spent():.0f} s.")
    for path in device_report.write(folder, report, about | found.for_json()):
        say(f"written     {path}")
    say(f"\n{last}")
    return int(not all(row.passed for row in found.rows))


def _known(value, unit, name):
    """A number in a unit, or that nobody knows it."""
    return "unknown" if value is None else f"{number(value / unit)} {name}"


BENCHMARKS = {"crf": crf, "train": train, "device": device}


class _Measurer:
    """Runs jobs of `crf_measurements` on a photograph."""

    def __init__(self, photo, num_classes):
        self._common = {"photo": photo, "num_classes": num_classes}

    def __call__(self, job, size, **arguments):
        arguments = {**self._common, "size": size, **arguments}
        if _FRESH.value:
            return measuring.in_fresh_process("crf_measurements", job, arguments)
        return crf_measurements.JOBS[job](**arguments)


def _size(text):
    """(height, width) of a side or WIDTHxHEIGHT."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    sides = [int(side) for side in match.groups() if side] if match else [0]
    if min(sides) < 2:
        raise ValueError(f"size: expected a side such as 321 or WIDTHxHEIGHT such as 500x375, at least 2; got {text!r}")
    return sides[-1], sides[0]


def _name(size):
    return f"{size[1]}x{size[0]}"


def _photograph():
    """[H, W, 3] uint8."""
    if _IMAGE.value:
        return read_image(_IMAGE.value)
    try:
        from skimage import data
    except ImportError as error:
        raise ValueError(
            f"the photograph comes with scikit-image, which is not installed ({error}); "
            "`pip install scikit-image`, or give one as --image=FILE"
        ) from error
    return data.astronaut()


def _installed(name, report):
    """The name if the peer is installed, otherwise None, after saying how to install it."""
    if name is None or crf_measurements.peer_module(name) is not None:
        return name
    report.say(
        f"{name} is not installed; goes on without it. To install it:\n\n    {crf_measurements.PEERS[name].installation}"
    )
    return None


def _forms_table(report, measure, sizes, folder):
    """Times, memory and errors of every form of the kernel at every size."""
    title = (
        f"Forms of the kernel, K = {_NUM_CLASSES.value}. Wall time in ms as median (least) of up to {_REPETITIONS.value} "
        "calls, then the CPU time of all threads. Energy with its gradient: batch of 4, without and with the build. "
        "Mean field: 10 iterations from uint8 image and float32 unary to labels, with the build. Compile time and peak "
        f"memory: energy with build / mean field. Square grids below {_GRID_OF.value} have the position widths of a "
        f"photograph of {_GRID_OF.value} pixels a side. Errors in % against the exact sum (float32, relative L2; self-pairs "
        "left out) over the bilateral Gaussian, as it is and symmetrically normalised"
        f"; beyond {crf_measurements.ALL_PIXELS} pixels at {crf_measurements.SAMPLE} of them."
    )
    columns = {"size": 8, "form": 7, **dict.fromkeys(CALLS.values(), 20), "compile s": 11, "peak MB": 11}
    columns |= dict.fromkeys([name.replace("_", " ").replace("symmetric", "sym.") for name in ERRORS], 0)
    table = report.table(title, columns)
    for size in sizes:
        path = str(pathlib.Path(folder) / f"exact_{_name(size)}.npz")
        measure("reference", size, grid_of=_GRID_OF.value, path=path)
        for form in FORMS:
            if size[0] * size[1] > crf_measurements.MOST_PIXELS[form]:
                continue
            more = {"grid_of": _GRID_OF.value, "repetitions": _REPETITIONS.value, "reference_path": path}
            found = measure("form", size, name=form, **more)
            table.row(
                _name(size),
                form,
                *(Timing(*found[call]) for call in CALLS),
                f"{number(found['compile_energy'])} / {number(found['compile_mean_field'])}",
                f"{found['peak_energy']:.0f} / {found['peak_mean_field']:.0f}",
                *(per_cent(found[error]) for error in ERRORS),
            )


def _comparison_table(report, measure, sizes, peer):
    """Mean field with the default form, in turns with the peer; the speed-up at the last size, first unary."""
    title = (
        "Mean field from uint8 image and float32 unary to labels, 10 iterations, widths 80 pixels, 13 colour units and 3 "
        "pixels, weights 10 and 3 at every size; both in turns in one process. Unary 'every class': all of them "
        "probable to some degree everywhere; '3 classes': all but three below 1e-4."
    )
    columns = {"size": 8, "unary": 11, "lcrf_jax ms": 22, "compile s": 0, "peak MB": 0, "labels changed %": 0}
    if peer is not None:
        columns |= {f"{peer} ms": 22, f"{peer} peak MB": 0, "labels that differ %": 0, "speed-up": 0}
    table, speedups = report.table(title, columns), []
    for size in sizes:
        results = measure("refinement", size, unaries=UNARIES, repetitions=_REPETITIONS.value, peer=peer)
        for unary in UNARIES:
            found = results["unaries"][unary]
            ours, *theirs = (Timing(*timing) for timing in found["timings"])
            cells = [_name(size), unary, ours, number(results["compile"]), f"{found['peaks'][0]:.0f}"]
            cells.append(per_cent(found["changed"]))
            if theirs:
                speedups.append(theirs[0].median / ours.median)
                cells += [theirs[0], f"{found['peaks'][1]:.0f}", per_cent(found["differing"]), f"{speedups[-1]:.2f}"]
            table.row(*cells)
    return speedups[-len(UNARIES)] if speedups else None


def _coarse_table(report, measure, size):
    """Mean field with more or fewer of its iterations on the coarse grid."""
    title = (
        f"Coarse to fine: mean field at {_name(size)}, {crf_measurements.NUM_ITERATIONS} iterations, the first ones on the image "
        "averaged over 2 x 2 pixels; all in turns in one process. Labels that differ from those without coarse iterations."
    )
    table = report.table(title, {"coarse iterations": 17, "unary": 11, "ms": 24, "labels that differ %": 0, "speed-up": 0})
    for unary in UNARIES:
        found = measure("coarse_to_fine", size, unary=unary, repetitions=_REPETITIONS.value)
        timings = [Timing(*timing) for timing in found["timings"]]
        for number_of, timing, differing in zip(crf_measurements.COARSE, timings, found["differing"], strict=True):
            table.row(str(number_of), unary, timing, per_cent(differing), f"{timings[0].median / timing.median:.2f}")


def _parity_table(report, measure, size, peer):
    """Labels against exact mean field."""
    title = (
        f"Labels at {_name(size)} that differ from exact mean field (float32), in %. Exact mean field leaves self-pairs "
        "out, as lcrf_jax does, or has them in, as pydensecrf2 does; each implementation against both."
    )
    table = report.table(title, {"unary": 11, "labels of": 34, "self-pairs out": 0, "self-pairs in": 0})
    results = measure("parity", size, unaries=UNARIES, peer=peer)
    for unary in UNARIES:
        for name, shares in results[unary].items():
            table.row(unary, name, *map(per_cent, shares))


def _pixels_table(report, measure, sizes):
    """Cost of mean field against the number of pixels."""
    title = f"Mean field against pixels, K = {_NUM_CLASSES.value}, unary 'every class', the photograph enlarged to each size."
    columns = {"size": 9, "ms": 26, "ms per megapixel": 0, "compile s": 0, "peak MB": 0, "peak MB per megapixel": 0}
    table = report.table(title, columns)
    for size in sizes:
        result = measure("refinement", size, unaries=UNARIES[:1], repetitions=_REPETITIONS.value)
        found, megapixels = result["unaries"][UNARIES[0]], size[0] * size[1] / 1e6
        timing, peak = Timing(*found["timings"][0]), found["peaks"][0]
        per_pixels = f"{timing.median / megapixels:.0f}", f"{peak / megapixels:.0f}"
        table.row(_name(size), timing, per_pixels[0], number(result["compile"]), f"{peak:.0f}", per_pixels[1])


if __name__ == "__main__":
    reporting.run(main, keep_compiled=False)  # it measures what compiling takes
