r"""Train the variations of an objective, each with the same features, budget and seeds, and compare them on val.

    python -m experiments.ablation --config=experiments/configs/voc_animals.py --config.data.root=FOLDER \
        --config.epochs="(2,)" --config.rounds=1 --config.inference.mirror=False --workdir=DIR --variations=terms,likelihoods --seeds=1

Every variation differs from the configuration in the settings of `VARIATIONS` only, and is the run of
`experiments.train` with these settings. What is done is not done again: the same command goes on where it was
interrupted. DIR gets a folder for each run, ablation.md and ablation.csv.
"""

import csv
import statistics

from absl import flags

from lcrf_jax.bound.objective import latent_crf_objective
from lcrf_jax.machine.progress import say
from lcrf_jax.runfolder.metrics import metrics_history
from lcrf_jax.train import fit, preparation
from lcrf_jax.train.beginning import check_folder
from lcrf_jax.train.methods import begins_with_posteriors

from . import configuring, measuring, reporting

_CONFIG = configuring.define("config")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs; made if it is not there.")
_VARIATIONS = flags.DEFINE_list("variations", ["terms"], "Groups or names of variations, or all.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds, from 0 on.", lower_bound=1)

# Settings below config.objective. A likelihood that is a sum over classes needs a weight to be heard beside the KL, a sum
# over cells; 400 was not searched for.
VARIATIONS = {
    "terms": {
        "as configured": {},
        "no pairwise term": {"pairwise_weight": 0.0},
        "no entropy": {"entropy_weight": 0.0},
        "all weights 1: the bound": {"likelihood_weight": 1.0},
    },
    "estimators": {
        "mean": {"estimator": "mean"},
        "straight_through": {"estimator": "straight_through"},
        "reinforce": {"estimator": "reinforce", "num_samples": 8},
        "exact": {"estimator": "exact"},
        "mcmc": {"estimator": "mcmc"},
    },
    "likelihoods": {
        name: {"likelihood": name, "likelihood_weight": 400.0}
        for name in ("frozen_classifier", "area", "gwrp", "log_mean_exp", "max_pool", "noisy_or")
    },
    "sampling": {
        "temperature 0.2": {"estimator": "gumbel_softmax", "temperature": 0.2},
        "temperature 1 to 0.2": {"estimator": "gumbel_softmax", "final_temperature": 0.2, "anneal_epochs": 2.0},
        "4 samples": {"estimator": "gumbel_softmax", "num_samples": 4},
        "noise in blocks of 4x4": {"estimator": "gumbel_softmax", "noise_block": 4},
    },
}


def chosen_variations(names):
    """The variations of the given groups and names, in the order of the table."""
    every = {name: settings for group in VARIATIONS.values() for name, settings in group.items()}
    unknown = set(names) - set(every) - set(VARIATIONS) - {"all"}
    if unknown:
        known = [*VARIATIONS, *every, "all"]
        raise ValueError(f"--variations: {sorted(unknown)} not known; expected some of {known}")
    groups = [name for name in VARIATIONS if name in names or "all" in names]
    wanted = {*names, *(name for group in groups for name in VARIATIONS[group])}
    return {name: settings for name, settings in every.items() if name in wanted}


def varied(config, settings, seed):
    """The configuration of one run, a plain dict."""
    changed = config.copy_and_resolve_references()
    changed.seed = seed
    for name, value in settings.items():
        changed.objective[name] = value
    if changed.objective.likelihood != "evidence":
        changed.evidence_posterior = False  # there is nothing for the CRF to smooth before there is a network
    return changed.to_dict()


def run_folder(workdir, name, seed):
    """The folder of the run of a variation."""
    return workdir / name.replace(" ", "_").replace(":", "") / f"seed_{seed}"


def trained_score(prepared, folder):
    """mIoU on val after the last step of the run in a folder, which is trained if it is not there."""
    fit.train(prepared, folder)
    return [record["val/miou"] for record in metrics_history(folder) if "val/miou" in record][-1]


def mean_and_deviation(scores):
    """'.512 ± .004', or the score alone where there is one."""
    mean = f"{statistics.mean(scores):.3f}".lstrip("0")
    return mean if len(scores) == 1 else f"{mean} ± {statistics.stdev(scores):.3f}".replace("± 0", "± ")


def main(argv):
    """Train what is asked for and not there yet, and write the table after every run."""
    reporting.no_more_arguments(argv)
    config, workdir = _CONFIG.value, reporting.run_folder(_WORKDIR.value)
    chosen = chosen_variations(_VARIATIONS.value)
    reporting.plain_settings(config)
    check_folder(workdir)
    for name, settings in chosen.items():
        for seed in range(_SEEDS.value):
            reporting.check_same_settings(run_folder(workdir, name, seed), varied(config, settings, seed))
    if preparation.open_data(config.to_dict())[1] is None:
        raise ValueError("there are no masks of a validation split to compare on; see config.data.val_split")
    for settings in chosen.values():
        one = varied(config, settings, 0)
        latent_crf_objective(one["objective"], stride=1, steps_per_epoch=1)
        begins_with_posteriors(one)  # both refuse what does not go together, before anything is trained
    prepared = preparation.prepare(config.to_dict())
    rows = []
    for name, settings in chosen.items():
        scores = []
        for seed in range(_SEEDS.value):
            say(f"\n{name}, seed {seed}")
            scores.append(trained_score(prepared.with_config(varied(config, settings, seed)), run_folder(workdir, name, seed)))
        flag = " ".join(f"--config.objective.{key}={value}" for key, value in settings.items())
        rows.append((name, flag, *scores))
        write_table(workdir, rows, prepared.val)


def write_table(workdir, rows, source):
    """Write the table as Markdown and CSV, and print it."""
    lines = ["| variation | settings | mIoU |", "|---|---|---:|"]
    lines += [f"| {name} | `{flag}` | {mean_and_deviation(scores)} |" for name, flag, *scores in rows]
    note = f"{len(source)} images of {source.split}, without refinement; {measuring.machine()}"
    text = "\n".join(lines).replace("``", "")
    (workdir / "ablation.md").write_text(f"{text}\n\n{note}\n", encoding="utf-8")
    with (workdir / "ablation.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variation", "settings", *(f"seed {seed}" for seed in range(_SEEDS.value))])
        writer.writerows(rows)
    say(f"\n{text}\n\n{note}\n{workdir / 'ablation.csv'}")


if __name__ == "__main__":
    configuring.require("workdir")
    reporting.run(main)
