r"""Train every method with the same features, network and budget, score each on val, and write the tables.

    python -m experiments.compare --config=experiments/configs/textures.py --methods=all --seeds=3 --workdir=DIR

Methods are those of `lcrf_jax.train.methods.METHODS`, or a list such as --methods=sec,latent_crf. All of them have the network,
the optimiser and the number of steps of the configuration, and differ in `config.method` alone; what each may set for
itself stands in `config.baselines`. The parameters after the last step are scored, so nothing is chosen on val here,
without tags, and both without and with refinement. What is done is not done again: the same command goes on where it was
interrupted. A method that needs masks is left out where the training split has none.
--parts=2 gives the means on val[0::2] and val[1::2] as well, in one pass: settings that were chosen on the first are reported on
the second. A run that was scored without these parts is scored again, and not trained.

DIR gets DIR/METHOD/seed_N/ (each a run that `experiments.evaluate` and `experiments.predict` take), comparison.md,
comparison.csv, comparison.tex, comparison.png, comparison_refined.png and report.html.
"""

import json
import os
import time
import zipfile
import zlib

import numpy as np
from absl import flags

from lcrf_jax.baselines import majority_labels
from lcrf_jax.data.example import data_identity
from lcrf_jax.machine.errors import nearest
from lcrf_jax.machine.files import parsed_json
from lcrf_jax.machine.locks import own_folder
from lcrf_jax.machine.progress import say
from lcrf_jax.pictures.palette import picture_table
from lcrf_jax.pictures.report import Sample
from lcrf_jax.predict import evaluation
from lcrf_jax.predict.outputs import superpixels
from lcrf_jax.predict.segmenter import make_segmenter
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.description import CheckpointError, check_data, load_description
from lcrf_jax.train import fit, preparation
from lcrf_jax.train.beginning import check_folder
from lcrf_jax.train.methods import METHODS, localisation
from lcrf_jax.train.plan import planned_rounds
from lcrf_jax.train.splits import checked_split, open_data, refuse_shared

from . import comparison_tables, configuring, measuring, reporting
from .run_report import common_settings, data_in_words, write_comparison_report

_CONFIG = configuring.define("config")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the runs and tables; made if it is not there.")
_METHODS = flags.DEFINE_list("methods", ["all"], f"Methods, or all: {', '.join(METHODS)}.")
_PARTS = flags.DEFINE_integer("parts", 1, "Score the parts SPLIT[0::N], SPLIT[1::N], ... of val by themselves as well.", lower_bound=1)
_SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds, from 0 on.", lower_bound=1)

RESULT_FILE = "comparison.json"
TIME_FILE = "train_time.json"
PICTURES_FILE = "pictures.npz"
# What a result has to say.
NEEDED = ("method", "seed", "localisation", "class_names", "steps", "plain", "refined", "smoothed", "seconds", "step_bytes")
NUM_PICTURES = 6


def chosen_methods(names):
    """Names of methods in the order of the table; refuses unknown ones."""
    unknown = set(names) - set(METHODS) - {"all"}
    if unknown or not names:
        name = min(unknown, default="")
        raise ValueError(f"--methods: expected all, or some of {', '.join(METHODS)}, with commas between, got {name!r}{nearest(name.lower(), METHODS)}")
    return [name for name in METHODS if name in names or "all" in names]


def run_config(config, method, seed):
    """The configuration of one run, a plain dict: no validation while training, so nothing is chosen on val."""
    changed = config.copy_and_resolve_references()
    changed.method, changed.seed, changed.data.val_split = method, seed, ""
    return changed.to_dict()


class Preparations:
    """What each method starts from, made when it is first asked for."""

    def __init__(self, config, val):
        self._config, self._val, self._made, self._trained_on = config, val, {}, {}

    def __getitem__(self, key):
        method, seed = key
        if method not in self._made:
            self._made[method] = preparation.prepare(run_config(self._config, method, seed))
        return self._made[method].with_config(run_config(self._config, method, seed))

    def training_data(self, method):
        """What the training split of a method has, without computing anything from it."""
        masks = "masks" in METHODS[method].inputs
        if masks not in self._trained_on:
            train, _ = open_data(run_config(self._config, method, 0))
            refuse_shared(train, self._val)
            self._trained_on[masks] = data_identity(train)
        return self._trained_on[masks]


def read_noted(path, what_then):
    """What an earlier start has noted in a file of a run."""
    try:
        return dict(parsed_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise _damaged(path, error, what_then) from error


def _damaged(path, what, what_then):
    return ValueError(f"{path} is damaged ({what}); remove it and run the same command again: {what_then}")


def read_time(path):
    """The seconds that a run has taken so far."""
    then = "the time is counted from here on"
    found = read_noted(path, then)
    if not all(isinstance(found.get(name), int | float) for name in ("wall", "cpu")):
        raise _damaged(path, "it has no seconds of wall and cpu", then)
    return found


def read_result(path):
    """The result of a run that was scored."""
    then = "the run is scored anew"
    found = read_noted(path, then)
    if missing := [name for name in NEEDED if name not in found]:
        raise _damaged(path, f"it has no {', '.join(missing)}", then)
    count = len(found["class_names"])
    for name in ("plain", "refined", "smoothed"):
        if found[name] is not None and np.shape(found[name]) != (count, count):
            raise _damaged(path, f"{name} is no matrix of {count} classes", then)
    return found


def train(prepared, folder):
    """Train the run of a folder to its end and add up the time, over interruptions."""
    path = folder / TIME_FILE
    before = read_time(path) if path.exists() else {"wall": 0.0, "cpu": 0.0}
    wall, cpu = time.monotonic(), time.process_time()
    try:
        fit.train(prepared, folder)
    finally:
        spent = {"wall": before["wall"] + time.monotonic() - wall, "cpu": before["cpu"] + time.process_time() - cpu}
        if folder.is_dir():
            reporting.write_whole(path, json.dumps(spent) + "\n")


def score(prepared, folder, val, scored):
    """Score the run of a folder on val, as a whole or in parts, and write comparison.json and the labels of the pictures."""
    method = METHODS[prepared.config["method"]]
    description = prepared.plan.description(prepared.digest)
    segmenter = make_segmenter(description, restore_params(folder))
    smooth = None
    if method.smoothed_title:
        options = prepared.config["baselines"]["superpixels"]

        def smooth(image, labels):
            return majority_labels(labels, superpixels(image, **options))

    features = preparation.validation_features(prepared, val)
    scores = evaluation.evaluate(
        segmenter, scored, crf=True, num_samples=NUM_PICTURES, features=features, smooth=smooth
    )
    rounds = prepared.plan.rounds
    matrices = {"plain": scores.plain, "refined": scores.refined, "smoothed": scores.smoothed}
    result = {
        "method": prepared.config["method"],
        "seed": prepared.config["seed"],
        "localisation": localisation(prepared.config),
        "class_names": list(val.class_names),
        "split": val.split,
        "images": len(val),
        "data": data_identity(val),
        "steps": rounds[-1].last_step if rounds else 0,
        **{name: None if matrix is None else np.asarray(matrix).tolist() for name, matrix in matrices.items()},
        "parts": {
            split: {name: value if name == "images" else value.tolist() for name, value in part.items()}
            for split, part in reporting.part_counts(scored, scores.parts).items()
        },
        "seconds": read_time(folder / TIME_FILE),
        "step_bytes": None if prepared.config["seed"] else fit.step_bytes(prepared),  # of one seed: they are the same
    }
    labels = {f"{kind}_{number}": sample[at] for kind, at in (("plain", 2), ("refined", 3))
              for number, sample in enumerate(scores.samples)}  # fmt: skip
    with own_folder(folder, ".unfinished-") as unfinished:
        np.savez_compressed(unfinished / PICTURES_FILE, **labels)
        os.replace(unfinished / PICTURES_FILE, folder / PICTURES_FILE)
    reporting.write_whole(folder / RESULT_FILE, json.dumps(result) + "\n")  # last: what has it is done


def is_done(folder, training_data, val, splits=()):
    """Whether a run is trained and scored, in these parts too; refuses one of other data, wherever that lay."""
    path = folder / RESULT_FILE
    if not path.exists():
        return False
    check_data(folder, {"train": training_data})
    before = read_result(path)
    scored_on = before.get("data")
    if scored_on is not None and scored_on != data_identity(val):
        raise CheckpointError(f"{folder} was scored on other images of {val.split} ({scored_on['images']} then, {len(val)} now; their "
                              f"names, tags or classes differ); use them again, or remove {path} to score it anew")  # fmt: skip
    if splits and list(before.get("parts") or ()) != list(splits):
        say(f"{folder} was scored without the parts {', '.join(splits)}: it is scored again")
        return False
    return True


def stored_results(workdir, names, num_seeds):
    """dict from method to the results of its seeds, of what is done."""
    results = {}
    for name in names:
        paths = [workdir / name / f"seed_{seed}" / RESULT_FILE for seed in range(num_seeds)]
        found = [read_result(path) for path in paths if path.exists()]
        if found:
            results[name] = found
    return results


def stored_labels(folder):
    """dict of the labels that a run's pictures show."""
    path = folder / PICTURES_FILE
    try:
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); remove {folder / RESULT_FILE} and run the same command again: "
                         "the run is scored anew") from error  # fmt: skip


def draw(workdir, results, val, note):
    """Image, truth and the labels of each method, seed 0, as two pictures and as the gallery of the report."""
    names = [name for name in results if results[name][0]["seed"] == 0]
    positions = evaluation.sample_positions(len(val), NUM_PICTURES)
    examples = [val[int(at)] for at in positions]
    stored = {name: stored_labels(workdir / name / "seed_0") for name in names}
    for kind, suffix in (("plain", ""), ("refined", "_refined")):
        rows = [
            (example.image, example.mask, *(stored[name][f"{kind}_{number}"] for name in names))
            for number, example in enumerate(examples)
        ]
        titles = ["image", "truth", *(METHODS[name].title for name in names)]
        picture_table(rows, workdir / f"comparison{suffix}.png", titles=titles, class_names=val.class_names, cell=150)
    samples = [
        Sample(example.name, example.image, {"truth": example.mask} | {
            METHODS[name].title: stored[name][f"refined_{number}"] for name in names})
        for number, example in enumerate(examples)
    ]  # fmt: skip
    note = f"{note}. The photographs show the refined labels of seed 0."
    runs = {(name, found["seed"]): load_description(workdir / name / f"seed_{found['seed']}")["training"]
            for name in results for found in results[name]}  # fmt: skip
    write_comparison_report(
        workdir / "report.html", "Comparison of methods", comparison_tables.overview(results), samples, val.class_names,
        note=note, settings=common_settings(runs),
    )


def write(workdir, names, val):
    """Write tables, pictures and report of all that is done."""
    results = stored_results(workdir, names, _SEEDS.value)
    note = _notes(results, val)
    text = comparison_tables.markdown(results, note)
    (workdir / "comparison.md").write_text(text, encoding="utf-8")
    comparison_tables.write_csv(results, workdir / "comparison.csv")
    (workdir / "comparison.tex").write_text(comparison_tables.latex(results), encoding="utf-8")
    draw(workdir, results, val, note)
    return text


def _notes(results, val):
    config = _CONFIG.value
    seeds = max(len(found) for found in results.values())
    steps = max(found[0]["steps"] for found in results.values())
    parts = comparison_tables.parts_of(results)
    parted = f" ({', '.join(f'{split}: {number}' for split, number in parts.items())})" if parts else ""
    return (
        f"{data_in_words(config.data)}: {len(val)} images of {val.split}{parted}, {steps} steps of {config.batch_size} images, "
        f"{'seed 0' if seeds == 1 else f'seeds 0 to {seeds - 1}: mean ± standard deviation'}; {measuring.machine()}"
    )


def main(argv):
    """Train and score what is not done yet, seed by seed, and write the tables after each run."""
    reporting.no_more_arguments(argv)
    config, workdir, names = _CONFIG.value, reporting.run_folder(_WORKDIR.value), chosen_methods(_METHODS.value)
    reporting.plain_settings(config)
    check_folder(workdir)
    if not config.data.val_split:
        raise ValueError("config.data.val_split: expected a split with masks to compare on, got none")
    if any(METHODS[name].smoothed_title for name in names):
        superpixels(np.zeros((8, 8, 3), np.uint8))  # whether scikit-image is there, before hours of training
    for name in names:  # what one of them refuses is told before the others are trained
        planned_rounds(run_config(config, name, 0), config.batch_size)
    for seed in range(_SEEDS.value):
        for name in names:
            reporting.check_same_settings(workdir / name / f"seed_{seed}", run_config(config, name, seed))
    val = checked_split(config.to_dict(), config.data.val_split, masks=True)
    scored = reporting.whole_or_parts(val, _PARTS.value)
    splits = () if scored is val else scored.splits
    preparations = Preparations(config, val)
    for seed in range(_SEEDS.value):
        for name in list(names):
            folder = workdir / name / f"seed_{seed}"
            try:
                if is_done(folder, preparations.training_data(name), val, splits):
                    continue
                prepared = preparations[name, seed]
            except FileNotFoundError as error:
                if "masks" not in METHODS[name].inputs or "all" not in _METHODS.value:
                    raise
                say(f"{name} is left out: {error}")
                names.remove(name)
                continue
            say(f"\n{METHODS[name].title}, seed {seed}")
            train(prepared, folder)
            score(prepared, folder, val, scored)
            write(workdir, names, val)
    say(f"\n{write(workdir, names, val)}\ntables      {workdir / 'comparison.md'}, .csv, .tex")
    say(f"pictures    {workdir / 'comparison.png'}, {workdir / 'comparison_refined.png'}, {workdir / 'report.html'}")


if __name__ == "__main__":
    configuring.require("workdir")
    reporting.run(main)
