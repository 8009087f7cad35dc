r"""Measure bias and variance of the gradient estimators of E_q log p(y|z,x) against the exact gradient.

    python -m experiments.estimators --workdir=DIR

The estimators are those of `lcrf_jax.bound.estimators.ESTIMATORS`. The exact gradient in the logits is that of the expectation in
closed form (evidence, max_pool) or of the sum over all labellings of 3 x 3 pixels (area, gwrp). mcmc has another
target, the gradient of E log q under p(z|x,y), and is measured against that one, by enumeration.

Of an estimate g and the exact gradient g*: bias |E g - g*| / |g*|, sd sqrt(E|g - E g|^2) / |g*|, rmse
sqrt(bias^2 + sd^2), and the cosine between E g and g*. The Monte Carlo error of E g is taken off the bias; see
`experiments.estimator_measurements`, which also has the cases.

Writes estimators.md, estimators.csv and estimators.png into DIR. It takes two to three minutes on two free cores, and
measures no times.
"""

import csv
import itertools
import math

import jax
import jax.numpy as jnp
from absl import flags

from lcrf_jax.bound.estimators import ESTIMATORS, expected_log_prob
from lcrf_jax.bound.likelihoods import EXPECTATIONS
from lcrf_jax.bound.sampling import block_groups
from lcrf_jax.machine.progress import say

from . import estimator_measurements as measurements
from . import measuring, reporting

LIKELIHOODS = ("evidence", "max_pool", "area", "gwrp")

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; made if it is not there.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of logits, evidence and samples.")
_REPETITIONS = flags.DEFINE_integer(
    "repetitions", 4096, "Estimates with one sample for each setting; with S samples one S-th of it.", lower_bound=64
)
_LIKELIHOODS = flags.DEFINE_multi_enum("likelihood", LIKELIHOODS, LIKELIHOODS, "May be repeated.")
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0.05", "0.1", "0.2", "0.5", "1", "2"], "Temperatures.")
_SAMPLES = flags.DEFINE_list("samples", ["1", "4", "16"], "Samples in an estimate; reinforce takes 2 at least.")
_PIXELS = flags.DEFINE_list("pixels", ["9", "100", "400", "1600"], "Numbers of pixels, squares of a side.")
_BLOCKS = flags.DEFINE_list("blocks", ["1", "2", "4"], "Sides of the blocks of pixels that share their noise.")
_SWEEPS = flags.DEFINE_list("sweeps", ["1", "2", "5", "20", "100"], "Sweeps of mcmc.")
_COUPLINGS = flags.DEFINE_list("couplings", ["1", "10", "30"], "Factors of the pairwise kernel of mcmc.")

# While one setting varies, the others are these where they are among the given ones, otherwise the first.
USUAL_PIXELS, USUAL_SAMPLES, USUAL_TEMPERATURE = 100, 4, 0.5
MOST_GROUPED_PIXELS = 400
ENUMERATED_PIXELS = 9
TEMPERED = ("gumbel_softmax", "straight_through")
MCMC_LIKELIHOODS = ("evidence", "area")

DEFINITIONS = (
    "Of estimates g and the exact gradient g* in the logits: bias |E g - g*| / |g*|, sd sqrt(E|g - E g|^2) / |g*|, "
    "rmse sqrt(bias^2 + sd^2), cosine between E g and g*. The Monte Carlo error of E g is taken off the bias; <x: not "
    "told from 0 at three standard errors, which reach to x; a dash: too noisy to tell. Summed: bias and sd of the "
    "gradient summed over the pixels, that of a constant added to the logits of a class at every pixel. Value error: "
    "mean estimate of the value less the exact one, nats per pixel."
)
FOUND = ("bias", "sd", "rmse", "cosine", "summed bias", "summed sd", "value error")
SETTINGS = ("likelihood", "estimator", "pixels", "temperature", "samples", "block", "coupling", "chain", "sweeps")


def main(argv):
    """Measure, write the tables, draw the figure."""
    reporting.no_more_arguments(argv)
    numbers = {flag.name: _numbers(flag, kind, least) for flag, kind, least in (
        (_TEMPERATURES, float, 1e-3), (_SAMPLES, int, 1), (_PIXELS, int, 4), (_BLOCKS, int, 1), (_SWEEPS, int, 1),
        (_COUPLINGS, float, 0),
    )}  # fmt: skip
    folder = reporting.run_folder(_WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    results = Results()
    results.report.say(f"Machine: {measuring.machine()}. Seed {_SEED.value}, {_REPETITIONS.value} repetitions.")
    results.report.say(DEFINITIONS)
    key = jax.random.key(_SEED.value)
    keys = (jax.random.fold_in(key, number) for number in itertools.count())
    for likelihood in _LIKELIHOODS.value:
        _estimators(results, keys, likelihood, numbers)
    for likelihood in filter(EXPECTATIONS.__contains__, _LIKELIHOODS.value):
        _shared_noise(results, keys, likelihood, numbers)
    for likelihood in filter(MCMC_LIKELIHOODS.__contains__, _LIKELIHOODS.value):
        _chains(results, keys, likelihood, numbers)
    results.write(folder)
    say(f"\ntables      {folder / 'estimators.md'}\n            {folder / 'estimators.csv'}")
    draw(results.rows, numbers, folder / "estimators.png")
    say(f"figure      {folder / 'estimators.png'}")


def _numbers(flag, kind, least):
    try:
        values = [kind(text) for text in flag.value]
    except ValueError:
        values = []
    if not values or not all(least <= value < math.inf for value in values):
        raise ValueError(f"--{flag.name}: expected numbers of at least {least:g}, got {flag.value}")
    return values


def _usual(values, preferred):
    return preferred if preferred in values else values[0]


class Results:
    """Rows, which are printed as they come and kept for the files and the figure."""

    def __init__(self):
        self.report, self.rows = measuring.Report(), []

    def table(self, title, settings):
        """Begin a table with columns for these settings."""
        self._columns = (*settings, *FOUND)
        widths = {"estimator": 16, "rmse": 6, "sd": 6, "bias": 6}
        self._table = self.report.table(title, {name: widths.get(name, 0) for name in self._columns})

    def row(self, found, **settings):
        """Add what was found at these settings."""
        row = dict(settings)
        for prefix, errors in (("", found.logits), ("summed ", found.summed)):
            row |= {prefix + name: value for name, value in errors._asdict().items()}
        row["value error"] = found.value_error
        self.rows.append(row)
        self._table.row(*(_cell(row, name) for name in self._columns))

    def write(self, folder):
        """Write estimators.md and estimators.csv."""
        self.report.write(folder / "estimators.md")
        found = ("bias", "bias_below", "sd", "rmse", "cosine")
        columns = [*SETTINGS, *found, *(f"summed {name}" for name in found), "value error"]
        with (folder / "estimators.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def _cell(row, name):
    """Settings as they are, results in two digits, a hidden bias as its bound."""
    value = row[name]
    if name in SETTINGS:
        return f"{value:g}" if isinstance(value, float) else value
    if value is None:
        return f"<{_short(max(row[f'{name}_below'], 1e-4))}" if name.endswith("bias") else None
    return f"{value:.2f}" if name == "cosine" else _short(value)


def _short(value):
    """A number in two digits, without an exponent; less than 0.0001 is 0."""
    magnitude = abs(value)
    return "0" if magnitude < 1e-4 else f"{value:.{max(0, 1 - math.floor(math.log10(magnitude)))}f}"


def _estimators(results, keys, likelihood, numbers):
    """Every estimator: at the usual size with every number of samples, at the others with the usual number."""
    closed = likelihood in EXPECTATIONS
    sizes = numbers["pixels"] if closed else [ENUMERATED_PIXELS]
    results.table(f"Estimators of E_q log p(y|z,x), likelihood {likelihood}.", SETTINGS[1:5])
    for pixels in sizes:
        case = measurements.make_case(likelihood, pixels, _SEED.value)
        exact = jax.jit(jax.value_and_grad(case.expectation))(case.logits)
        every = closed and pixels == _usual(sizes, USUAL_PIXELS)
        counts = numbers["samples"] if every else [_usual(numbers["samples"], USUAL_SAMPLES)]
        for name, estimator in sorted(ESTIMATORS.items()):
            tempered, sampled = name in TEMPERED, name != "mean"
            least = 2 if name == "reinforce" else 1
            temperatures = numbers["temperatures"] if tempered else [1.0]
            for count in sorted({max(least, count) for count in counts}) if sampled else [1]:
                estimates = measurements.likelihood_estimates(estimator, case, temperatures, count)
                found = measurements.measured(next(keys), estimates, exact, _REPETITIONS.value // count)
                for temperature, of_one in zip(temperatures, found, strict=True):
                    results.row(
                        of_one, likelihood=likelihood, estimator=name, pixels=pixels,
                        temperature=temperature if tempered else None, samples=count if sampled else None,
                    )  # fmt: skip


def _shared_noise(results, keys, likelihood, numbers):
    """gumbel_softmax with noise that is constant within blocks; the exact gradient is that of independent pixels."""
    pixels = max([size for size in numbers["pixels"] if size <= MOST_GROUPED_PIXELS] or numbers["pixels"])
    temperature = _usual(numbers["temperatures"], USUAL_TEMPERATURE)
    count = _usual(numbers["samples"], USUAL_SAMPLES)
    title = f"gumbel_softmax with noise shared within square blocks, likelihood {likelihood}. Block: side in pixels."
    results.table(title, ("pixels", "temperature", "samples", "block"))
    case = measurements.make_case(likelihood, pixels, _SEED.value)
    exact = jax.jit(jax.value_and_grad(case.expectation))(case.logits)
    for block in numbers["blocks"]:
        groups = block_groups(case.side, case.side, block)
        estimator = ESTIMATORS["gumbel_softmax"]
        estimates = measurements.likelihood_estimates(estimator, case, [temperature], count, groups)
        [found] = measurements.measured(next(keys), estimates, exact, _REPETITIONS.value // count)
        settings = {"pixels": pixels, "temperature": temperature, "samples": count, "block": block}
        results.row(found, likelihood=likelihood, estimator="gumbel_softmax", **settings)


def _chains(results, keys, likelihood, numbers):
    """mcmc, cold and persistent."""
    case = measurements.make_case(likelihood, ENUMERATED_PIXELS, _SEED.value)
    kernels = jnp.stack([measurements.crf_kernel(case.side, c, _SEED.value) for c in numbers["couplings"]])
    row_sums = ", ".join(_short(float(kernel.sum(axis=1).mean())) for kernel in kernels)
    results.table(
        f"mcmc, likelihood {likelihood}, 3 x 3 pixels; exact is the gradient of E log q under p(z|x,y). Coupling: "
        f"factor of the kernel, whose rows then sum to {row_sums}. cold: from a sample of q; persistent: after "
        f"{measurements.BURN_IN} sweeps. The mean over the sweeps is one estimate.",
        ("coupling", "chain", "sweeps"),
    )
    targets = jnp.stack([measurements.posterior_marginals(case, kernel) for kernel in kernels])
    exact = jax.vmap(jax.value_and_grad(expected_log_prob), (None, 0))(case.logits, targets)
    settings = list(itertools.product(numbers["couplings"], ("cold", "persistent"), numbers["sweeps"]))
    exact = jax.tree.map(lambda array: jnp.repeat(array, len(settings) // len(kernels), axis=0), exact)
    estimates = measurements.chain_estimates(case, kernels, numbers["sweeps"])
    found = measurements.measured(next(keys), estimates, exact, _REPETITIONS.value)
    for (coupling, chain, sweeps), of_one in zip(settings, found, strict=True):
        more = {"coupling": coupling, "chain": chain, "sweeps": sweeps}
        results.row(of_one, likelihood=likelihood, estimator="mcmc", pixels=ENUMERATED_PIXELS, **more)


LOOKS = {"gumbel_softmax": ("#1f5fa8", "o"), "straight_through": ("#c2571a", "s"), "reinforce": ("#3a3a3a", "^"),
         "mean": ("#7a7a7a", "D")}  # fmt: skip


def draw(rows, numbers, path):
    """Bias and standard deviation against temperature, samples and pixels, for the likelihoods with a closed form."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"the tables are written; the figure needs matplotlib, which is not installed ({error}): "
            "`pip install '.[figures]'` or `pip install matplotlib`"
        ) from error
    shown = [name for name in dict.fromkeys(row["likelihood"] for row in rows) if name in EXPECTATIONS]
    if not shown:
        return
    usual = {
        "temperature": _usual(numbers["temperatures"], USUAL_TEMPERATURE),
        "samples": _usual(numbers["samples"], USUAL_SAMPLES),
        "pixels": _usual(numbers["pixels"], USUAL_PIXELS),
    }
    figure = Figure(figsize=(9.6, 3.2 * len(shown) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), 3, sharey="row", squeeze=False)
    plain = [row for row in rows if row["estimator"] in LOOKS and "block" not in row]
    for likelihood, of_likelihood in zip(shown, axes, strict=True):
        for across, axis in zip(usual, of_likelihood, strict=True):
            fixed = {name: value for name, value in usual.items() if name != across}
            chosen = [row for row in plain if row["likelihood"] == likelihood and _matches(row, fixed)]
            _panel(axis, chosen, across)
            at = ", ".join(f"{name} {value:g}" for name, value in fixed.items())
            axis.set_title(f"{likelihood}: {at}", fontsize=9)
        of_likelihood[0].set_ylabel("relative to the exact gradient")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


def _matches(row, fixed):
    """Whether a row has these settings; one that it does not depend on is None."""
    return all(row[name] in (None, value) for name, value in fixed.items())


def _panel(axis, rows, across):
    """Bias dashed with open marks, standard deviation solid with filled ones; what is 0 or hidden is not drawn."""
    ticks = sorted({row[across] for row in rows} - {None})
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    for name, (colour, mark) in LOOKS.items():
        for quantity, style, face in (("bias", "--", "white"), ("sd", "-", colour)):
            points = [(row[across], row[quantity]) for row in rows if row["estimator"] == name and row[quantity]]
            if points and points[0][0] is None:  # it does not depend on what varies
                points = [(tick, points[0][1]) for tick in ticks]
            if points:
                axis.plot(
                    *zip(*points), style, marker=mark, color=colour, markerfacecolor=face, linewidth=1.2, markersize=5,
                    label=f"{name} {quantity}",
                )  # fmt: skip
    axis.set_xlabel(across)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="0.9", linewidth=0.6)


if __name__ == "__main__":
    flags.mark_flag_as_required("workdir")
    reporting.run(main)
