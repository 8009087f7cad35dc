"""The programs, end to end: train and evaluate, on one short run that all tests share, and the ablation."""

import csv
import itertools
import json
import pathlib
import re
import runpy
import shutil

import numpy as np
import pytest
from absl import flags
from PIL import Image
from programs import CLASSES, ROOT, SHORT, SMALL, TINY, assert_refused, run

from experiments import class_map_scores
from experiments.configs import base, textures, tiny, voc_animals
from lcrf_jax.bound.objective import latent_crf_objective
from lcrf_jax.data.opening import open_source
from lcrf_jax.runfolder.description import load_description
from lcrf_jax.runfolder.metrics import metrics_history


def score(line):
    """The number of a line `mIoU 0.xxx`."""
    match = re.fullmatch(r"mIoU ([01]\.\d{3})", line)
    assert match, line
    return float(match.group(1))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCRF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder in VOC layout made of the embedded images: 24 to train on without masks, 3 with masks."""
    folder = tmp_path_factory.mktemp("photos")
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    rows = ["image,tags"]
    for split, count in (("train", 24), ("val", 3)):
        source = open_source("textures", split, masks=split == "val", seed=1, size=96, num_train=24, num_val=3)
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(source.names) + "\n")
        for example in (source[i] for i in range(count)):
            size = slice(0, 80 if split == "val" else 96)
            Image.fromarray(example.image[size]).save(folder / "JPEGImages" / f"{example.name}.png")
            if example.mask is not None:
                Image.fromarray(example.mask[size]).save(folder / "SegmentationClass" / f"{example.name}.png")
            present = [name for name, tag in zip(CLASSES[1:], example.tags[1:], strict=True) if tag]
            rows.append(f"{example.name},{';'.join(present)}")
    (folder / "tags.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_train_prints_the_table_and_ends_with_the_score(tiny_run):
    workdir, ended = tiny_run
    assert ended.code == 0, ended.err
    value = score(ended.last_line)
    for name in CLASSES:
        assert re.search(rf"^{name} +(\d\.\d{{3}}|-)$", ended.out, re.MULTILINE), name
    assert "24 training images with tags of 6 classes; logits 6 x 6" in ended.out
    assert "average precision on training tags, no score of masks: mean" in ended.out
    assert "image tags for training, no tags at test time" in ended.out
    for label, path in (("pictures", "pictures_val.png"), ("results", "results_val.json"), ("checkpoint", "")):
        shown = re.search(rf"^{label} +(.+)$", ended.out, re.MULTILINE).group(1)
        assert pathlib.Path(shown) == workdir / path and (workdir / path).exists()
    results = json.loads((workdir / "results_val.json").read_text())
    assert results["plain"]["miou"] == pytest.approx(value, abs=6e-4) and "refined" not in results
    assert results["images"] == 4 and np.sum(results["plain"]["confusion"]) == 4 * 96 * 96
    assert {path.name for path in workdir.iterdir()} >= {"config.json", "metrics.jsonl", "tensorboard", "last", "best"}
    assert load_description(workdir)["class_names"] == list(CLASSES)
    assert re.search(r"images/s", ended.err)


@pytest.mark.slow
def test_training_again_in_the_same_folder_only_prints_the_score(tiny_run, checkpoint):
    again = run("train", TINY, *SMALL, f"--workdir={checkpoint}")
    assert again.code == 0 and "is finished: all 6 steps are done; nothing is trained" in again.out
    assert "to train on, make the last round longer: the last number of --config.epochs=" in again.out
    assert "weights sha256" not in again.out and "features" not in again.err
    assert again.last_line == tiny_run[1].last_line
    other = run("train", TINY, *SMALL, f"--workdir={checkpoint}", "--config.network.dropout=0.5")
    assert_refused(other, "error: .*belongs to another model: network")


@pytest.mark.slow
def test_a_finished_run_trains_on_where_its_last_round_is_made_longer(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    longer = run("train", TINY, *SMALL, f"--workdir={tmp_path / 'run'}", "--config.epochs=3")
    assert longer.code == 0 and "continuing after step 6" in longer.out and "epochs was [2], is [3]" in longer.out, longer.err
    assert [line["step"] for line in metrics_history(tmp_path / "run") if "val/miou" in line][-1] == 9


def test_evaluate_gives_the_score_of_training(tiny_run, checkpoint):
    ended = run("evaluate", f"--checkpoint={checkpoint}")
    assert ended.code == 0, ended.err
    assert ended.last_line == tiny_run[1].last_line
    assert "4 images of val" in ended.out


@pytest.mark.slow
def test_evaluate_with_refinement_ends_with_the_refined_score(tiny_run, checkpoint):
    ended = run("evaluate", f"--checkpoint={checkpoint}", "--split=val", "--crf")
    assert ended.code == 0, ended.err
    assert re.search(r"^class +plain +refined$", ended.out, re.MULTILINE)
    results = json.loads((checkpoint / "results_val_crf.json").read_text())
    assert score(ended.last_line) == pytest.approx(results["refined"]["miou"], abs=6e-4)
    assert f"{tiny_run[1].last_line} without refinement" in ended.out
    assert (checkpoint / "pictures_val_crf.png").exists()


@pytest.mark.slow
def test_a_checkpoint_may_be_moved(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "moved to" / "here")
    ended = run("evaluate", f"--checkpoint={tmp_path / 'moved to' / 'here'}", "--tags_given")
    assert ended.code == 0, ended.err
    score(ended.last_line)
    assert "tags at test time" in ended.out and "no tags at test time" not in ended.out
    assert (tmp_path / "moved to" / "here" / "results_val_tags_given.json").exists()


def test_class_maps_are_scored_with_tags_given(checkpoint):
    ended = run("evaluate", f"--checkpoint={checkpoint}", "--cam", "--tags_given")
    assert ended.code == 0, ended.err
    levels = dict(re.findall(r"(0\.\d+): (0\.\d{3})", ended.out))
    assert len(levels) == len(class_map_scores.CAM_LEVELS) and score(ended.last_line) == max(map(float, levels.values()))
    assert_refused(run("evaluate", f"--checkpoint={checkpoint}", "--cam"), "--cam needs --tags_given")
    both = run("evaluate", f"--checkpoint={checkpoint}", "--cam", "--tags_given", "--crf")
    assert_refused(both, "--cam and --crf")


@pytest.mark.slow
def test_photographs_in_a_folder(photos, checkpoint, tmp_path):
    """Trained from tags alone: the training split has no masks at all."""
    config = tmp_path / "mine.py"
    config.write_text(
        "from experiments.configs import base, tiny\n\n\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        "    config.data.kind = 'folder'\n"
        "    config.data.options = base.options()\n"
        "    return config\n")
    workdir = tmp_path / "run"
    ended = run("train", f"--config={config}", *SHORT, f"--config.data.root={photos}", f"--workdir={workdir}")
    assert ended.code == 0, ended.err
    value = score(ended.last_line)
    evaluated = run("evaluate", f"--checkpoint={workdir}", f"--data={photos}", "--split=val")
    assert evaluated.code == 0 and score(evaluated.last_line) == value
    other = run("evaluate", f"--checkpoint={checkpoint}", f"--data={photos}")
    assert other.code == 0 and "3 images of val" in other.out, other.err
    before = sorted(workdir.iterdir())
    elsewhere = run("evaluate", f"--checkpoint={workdir}", f"--data={photos}", "--split=val", f"--out={tmp_path / 'new/results'}")
    assert elsewhere.code == 0 and score(elsewhere.last_line) == value and sorted(workdir.iterdir()) == before
    assert sorted(path.name for path in (tmp_path / "new/results").iterdir()) == ["pictures_val.png", "report.html", "results_val.json"]
    assert_refused(run("evaluate", f"--checkpoint={workdir}", f"--data={photos}", "--split=test"), "has no test.txt")
    assert_refused(run("evaluate", f"--checkpoint={workdir}", f"--data={photos}", "--split=train"), "has no mask for")


@pytest.mark.slow
def test_a_model_in_a_file_is_scored_as_the_run_that_it_is_of(photos, checkpoint, tmp_path):
    assert run("export", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'model.npz'}", "--compact").code == 0
    results = []
    for given in (checkpoint, tmp_path / "model.npz"):
        out = tmp_path / f"scores of {given.stem}"
        ended = run("evaluate", f"--checkpoint={given}", f"--data={photos}", f"--out={out}")
        assert ended.code == 0 and "3 images of val" in ended.out, ended.err
        (path,) = out.glob("results_val_*.json")
        results.append(np.array(json.loads(path.read_text())["plain"]["confusion"]))
    (tmp_path / "other").mkdir()
    other = run("evaluate", f"--checkpoint={tmp_path / 'model.npz'}", f"--data={photos}", f"--out={tmp_path / 'scores of tiny'}")
    assert_refused(other, r"results_val_photos.*json is of another model; give another --out, or remove it")
    shutil.copy(checkpoint / "config.json", tmp_path / "other")
    other = run("evaluate", f"--checkpoint={checkpoint}", f"--data={photos}", f"--out={tmp_path / 'other'}")
    assert_refused(other, "is the folder of another run; give one of its own")
    assert run("shards", f"--data={photos}", f"--out={tmp_path / 'shards'}").code == 0
    of_shards = run("evaluate", f"--checkpoint={checkpoint}", f"--data={tmp_path / 'shards'}", f"--out={tmp_path / 'scores of shards'}")
    (path,) = (tmp_path / "scores of shards").glob("results_val_*.json")
    assert of_shards.code == 0 and json.loads(path.read_text())["plain"]["confusion"] == results[0].tolist()
    assert np.abs(results[0] - results[1]).sum() < 0.05 * results[0].sum() and results[0].sum() == results[1].sum()


def test_data_with_other_classes_is_refused(photos, checkpoint, tmp_path):
    shutil.copytree(photos, tmp_path / "other")
    classes = ("background", "cross", "ring", *CLASSES[3:])
    (tmp_path / "other" / "classes.txt").write_text("\n".join(classes) + "\n")
    ended = run("evaluate", f"--checkpoint={checkpoint}", f"--data={tmp_path / 'other'}")
    assert_refused(ended, "the run knows the classes .*same class list in the same order")


@pytest.mark.slow
def test_ablation_trains_every_variation_once_and_compares_them(tmp_path):
    command = ("ablation", TINY, *SMALL, f"--workdir={tmp_path}", "--variations=temperature 0.2,mean")
    first = run(*command)
    assert first.code == 0, first.err
    folders = {"mean": tmp_path / "mean" / "seed_0", "temperature 0.2": tmp_path / "temperature_0.2" / "seed_0"}
    with (tmp_path / "ablation.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["variation", "settings", "seed 0"]
    flag = "--config.objective."
    sampled = f"{flag}estimator=gumbel_softmax {flag}temperature=0.2"
    assert [row[:2] for row in rows] == [["mean", f"{flag}estimator=mean"], ["temperature 0.2", sampled]]
    table = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    for name, settings, value in rows:
        scores = [line["val/miou"] for line in metrics_history(folders[name]) if "val/miou" in line]
        assert len(scores) == 2 and float(value) == scores[-1]
        assert f"| {name} | `{settings}` | {scores[-1]:.3f} |".replace("| 0.", "| .") in table
    assert "4 images of val" in table and table.split("\n\n")[0] in first.out
    given = [load_description(folder)["training"]["objective"] for folder in folders.values()]
    assert [(each["estimator"], each["temperature"]) for each in given] == [("mean", 1.0), ("gumbel_softmax", 0.2)]
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in folders.values()]
    again = run(*command)
    assert again.code == 0, again.err
    assert again.out.count("is finished: all 6 steps are done") == 2
    assert [(folder / "metrics.jsonl").read_bytes() for folder in folders.values()] == logs
    assert (tmp_path / "ablation.md").read_text(encoding="utf-8") == table
    assert_refused(run(*command, "--config.optimizer.learning_rate=0.1"), r"holds a run with another setting of \['optimizer'\]")
    assert [(folder / "metrics.jsonl").read_bytes() for folder in folders.values()] == logs


@pytest.fixture(scope="module")
def ablation():
    """What experiments/ablation.py defines, without its flags."""
    before = set(flags.FLAGS)
    defined = runpy.run_module("experiments.ablation", run_name="ablation")
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    return defined


def test_every_variation_can_be_trained(ablation):
    groups, chosen = ablation["VARIATIONS"], ablation["chosen_variations"]
    every = chosen(["all"])
    assert len(every) == sum(len(group) for group in groups.values())  # no name in two groups
    assert chosen(["mean", "terms"]) == {**groups["terms"], "mean": groups["estimators"]["mean"]}
    assert not set(every) & {"all", *groups}
    for (name, settings), module in itertools.product(every.items(), (base, textures, tiny, voc_animals)):
        config = module.get_config().lock()
        for key, value in settings.items():
            assert key in config.objective, name
            config.objective[key] = value
        assert callable(latent_crf_objective(config.objective.to_dict(), stride=8, steps_per_epoch=10)), name


def test_scores_of_several_seeds_are_a_mean_and_a_standard_deviation(ablation):
    assert ablation["mean_and_deviation"]([0.5]) == ".500"
    assert ablation["mean_and_deviation"]([0.5, 0.6, 0.58]) == ".560 ± .053"


@pytest.mark.parametrize(("command", "message"), [
    (["train", "--workdir=x"], r"error: --config is missing, which is: .*; give --config=\.\.\."),
    (["train", TINY], r"error: --workdir is missing, which is: .*; give --workdir=\.\.\."),
    (["train", TINY, "--workdir=x", "--cnofig.seed=1"], "Unknown command line flag 'cnofig.seed'"),
    (["train", TINY, "--workdir=x", "seed=1"], r"error: unknown arguments \['seed=1'\]"),
    (["train", TINY, "--workdir=x", "--config.epoch=1"], r"error: config.epoch: there is no such setting; did you mean 'epochs'\?"),
    (["train", TINY, "--workdir=x", "--config.batch_size=abc"], "config.batch_size=abc: invalid literal"),
    (["train", "--config=nothing.py", "--workdir=x"], r"error: --config=nothing\.py: there is no such file, and no configuration of this name among base, "),
    (["train", TINY, "--workdir=x", "--config.method=crf"], "error: method: expected one of"),
    (["train", TINY, "--workdir=x", "--config.data.kind=folder"], "error: "),
    (["train", TINY, "--workdir=x", "--config.data.root=nowhere"], "error: textures .*no folder"),
    (["train", TINY, *SMALL, "--workdir=x", "--config.batch_size=32"], "error: batch_size: 24 training images"),
    (["ablation", TINY, "--workdir=x", "--variations=mean,meen"],
     r"error: --variations: \['meen'\] not known; expected some of \['terms', .*'mcmc', .*'all'\]"),
    (["ablation", TINY, *SMALL, "--workdir=x", "--config.data.val_split="], "error: there are no masks"),
    (["evaluate", "--checkpoint=nowhere"], "error: nowhere: there is no such folder or file, and no model of this name"),
    (["evaluate", "--checkpoint=nowhere/x"], "error: expected a run folder with config.json, got .*; give the --workdir of a training run"),
    (["evaluate"], "error: --checkpoint is missing, which is: Folder of a run, a file of a model, .*; give"),
    (["evaluate", "--checkpoint=animals"], "error: --checkpoint=animals is a model, .*: give --data=FOLDER and --out=FOLDER"),
    (["evaluate", "--checkpoint=animals", "--data=x"], "error: --checkpoint=animals is a model, .*: give --out=FOLDER"),
    (["evaluate", "--checkpoint=animal", "--data=x"], "error: animal: there is no such folder or file, .*did you mean 'animals'"),
    (["evaluate", "--checkpoint=animals", "--data=x", "--out=setup.cfg"], "error: --out=setup.cfg is a file; give a folder"),
    (["evaluate", "--checkpoint=x", "--cam", "--tags_given", "--out=y"], "error: --cam prints its scores and writes nothing: leave out --out"),
    (["evaluate", "--checkpoint=x", "--split="], "error: --split: expected the name of a split, such as val, got an empty one"),
    (["shards", "--data=x", "--out="], "error: --out: expected a folder, got an empty name"),
    (["predict", "--images=x", "--out=y"], "error: --checkpoint is missing, which is: Folder of a run, "),
], ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, list) else "")
def test_wrong_flags_end_with_one_clear_line(command, message):
    assert_refused(run(*command), message)
    assert not (ROOT / "x").exists() and not (ROOT / "y").exists()
