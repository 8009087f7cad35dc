"""Scores of the parts of a split: evaluate --parts and compare --parts."""

import csv
import json
import re
import runpy
import types

import numpy as np
import pytest
from absl import flags
from programs import SMALL, TINY, assert_refused, run

from experiments import comparison_tables, reporting
from lcrf_jax.data.example import data_identity
from lcrf_jax.data.opening import open_source
from lcrf_jax.metrics import mean_iou
from lcrf_jax.predict.evaluation import Scores
from lcrf_jax.runfolder.description import save_description

HALVES = ("val[0::2]", "val[1::2]")
CLASSES = ["background", "ring", "cross"]


def matrices(seed, count=2):
    return np.random.default_rng(seed).integers(1, 100, (count, 3, 3))


def per_cent(matrix):
    return f"{100 * mean_iou(np.asarray(matrix)):.1f}"


@pytest.mark.parametrize("refined", [True, False])
def test_evaluate_tells_of_each_part(tmp_path, monkeypatch, capsys, refined):
    counts = {"plain": matrices(0)} | ({"refined": matrices(1)} if refined else {})
    counts["plain"][1] = 0  # of a part whose masks are void throughout
    totals = {name: each.sum(axis=0) for name, each in counts.items()}
    scores = Scores(totals["plain"], totals.get("refined"), None, [None] * 5, None, counts)
    data = {"kind": "textures", "root": "", "options": {}, "val_split": "val"}
    description = {"supervision": "tags", "training": {"data": data}}
    shown, given = {}, []
    monkeypatch.setattr(reporting, "load_segmenter", lambda run_dir: (types.SimpleNamespace(class_names=CLASSES), description, {}))
    monkeypatch.setattr(reporting, "write_run_report", lambda *_, **report: shown.update(report))
    monkeypatch.setattr(reporting, "picture_grid", lambda *_, **__: None)
    monkeypatch.setattr(reporting.evaluation, "evaluate", lambda _, source, **__: given.append(source) or scores)
    source = open_source("textures", "val", num_val=5)
    reporting.evaluate_run(tmp_path, source, crf=refined, num_parts=2)
    assert given[0].source is source and given[0].numbers.tolist() == [0, 1, 0, 1, 0]
    results = json.loads((tmp_path / f"results_val{'_crf' if refined else ''}.json").read_text())
    assert list(results["parts"]) == list(HALVES) and [part["images"] for part in results["parts"].values()] == [3, 2]
    for k, split in enumerate(HALVES):
        assert set(results["parts"][split]) == {"images", *counts}
        for name, each in counts.items():
            found, empty = results["parts"][split][name], not each[k].any()
            assert found["confusion"] == each[k].tolist() and set(found["iou"]) == set(CLASSES)
            assert found["miou"] is None if empty else found["miou"] == pytest.approx(mean_iou(each[k]), abs=5e-5)
    out = capsys.readouterr().out
    cells = [f"{mean_iou(each[0]):.3f}" for each in counts.values()]
    assert re.search(rf"^val\[0::2\] +3 +{' +'.join(map(re.escape, cells))}$", out, re.MULTILINE), out
    assert re.search(r"^val\[1::2\] +2 +-", out, re.MULTILINE)
    assert out.splitlines()[-1] == f"mIoU {mean_iou(totals['refined' if refined else 'plain']):.3f}"
    assert list(shown["parts"]) == list(HALVES)


def test_parts_that_cannot_be_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="^--parts: expected 1 to 5, the number of examples of val, got 6; a part needs an image"):
        reporting.evaluate_run(tmp_path / "nowhere", open_source("textures", "val", num_val=5), crf=False, num_parts=6)


def result(seed, method="ccnn", parts=True):
    plain, refined = matrices(seed), matrices(seed + 100)
    found = {"method": method, "seed": seed, "localisation": "", "class_names": CLASSES, "steps": 4, "smoothed": None,
             "plain": plain.sum(axis=0).tolist(), "refined": refined.sum(axis=0).tolist(),
             "seconds": {"wall": 60.0, "cpu": 60.0}, "step_bytes": None}  # fmt: skip
    of_parts = {split: {"images": 3 - k, "plain": plain[k].tolist(), "refined": refined[k].tolist()} for k, split in enumerate(HALVES)}
    return found | ({"parts": of_parts} if parts else {})


def rows_of(text):
    lines = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in lines}


def test_the_tables_have_the_means_of_the_parts(tmp_path):
    seeds, early = [result(seed) for seed in (0, 1)], [result(2, "em_adapt", parts=False)]
    results = {"ccnn": seeds, "em_adapt": early}
    text = comparison_tables.markdown(results, "a note")
    for kind, part_of_text in zip(("plain", "refined"), text.split("With refinement"), strict=True):
        rows = rows_of(part_of_text)
        for split in HALVES:
            means = [100 * mean_iou(np.array(each["parts"][split][kind])) for each in seeds]
            assert rows[f"mean of {split}"] == [f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}", "-"]
        assert rows["mean"][1] == per_cent(early[0][kind])
    assert text.count("**mean**") == 2 and "**mean of" not in text
    header, [ccnn, em_adapt], _ = comparison_tables.overview(results)
    assert header[4:] == ["mIoU of val[0::2]", "val[0::2], refined", "mIoU of val[1::2]", "val[1::2], refined"]
    assert len(ccnn) == len(em_adapt) == len(header) and em_adapt[4:] == ["-"] * 4
    lines = comparison_tables.latex(results).splitlines()
    assert [line.split(" & ")[0] for line in lines if line.endswith(r"\hline")] == ["", "cross", "", "cross"]
    assert sum(line.startswith("mean of val[1::2] & ") and line.endswith(r"\\") for line in lines) == 2
    comparison_tables.write_csv(results, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        found = {(row["column"], row["refined"], row["class"]): row["seed 1"] for row in csv.DictReader(file)}
    assert float(found["CCNN", "1", "mean of val[1::2]"]) == pytest.approx(
        100 * mean_iou(np.array(seeds[1]["parts"]["val[1::2]"]["refined"])), abs=1e-3)  # fmt: skip


def test_results_of_before_make_the_tables_of_before():
    text = comparison_tables.markdown({"ccnn": [result(0, parts=False)]}, "a note")
    assert "mean of" not in text and rows_of(text)["mean"] == [per_cent(result(0)["refined"])]
    assert comparison_tables.overview({"ccnn": [result(0, parts=False)]})[0] == ["method", "saliency or cues", "mIoU, %", "refined"]


@pytest.fixture(scope="module")
def program():
    """What experiments/compare.py defines, without its flags."""
    before = set(flags.FLAGS)
    defined = runpy.run_module("experiments.compare", run_name="compare")
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    return defined


def test_a_run_without_the_parts_that_are_asked_for_is_scored_again(program, tmp_path, capsys):
    source = open_source("textures", "val", num_val=4)
    trained_on, path = data_identity(open_source("textures", "val", num_val=5)), tmp_path / "comparison.json"
    save_description(tmp_path, {"training": {}, "data": {"train": trained_on}})
    for stored, asked, done in (
        (None, (), True), (None, HALVES, False), ({}, HALVES, False), (dict.fromkeys(HALVES), HALVES, True),
        (dict.fromkeys(HALVES), (), True), (dict.fromkeys(HALVES), ("val[0::3]", "val[1::3]", "val[2::3]"), False),
    ):  # fmt: skip
        path.write_text(json.dumps({**result(0, parts=False), "data": data_identity(source)} | ({} if stored is None else {"parts": stored})))
        assert program["is_done"](tmp_path, trained_on, source, asked) == done
        told = capsys.readouterr().out
        assert (f"{tmp_path} was scored without the parts {', '.join(asked)}: it is scored again" in told) == (not done)


@pytest.mark.slow
def test_a_comparison_is_scored_in_parts_later_without_training_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path / "cache"))
    arguments = (TINY, *SMALL, "--methods=ccnn,cam", f"--workdir={tmp_path / 'table'}")
    assert run("compare", *arguments).code == 0
    path = tmp_path / "table" / "ccnn" / "seed_0" / "comparison.json"
    before = json.loads(path.read_text())
    assert before["parts"] == {}
    again = run("compare", *arguments, "--parts=2")
    assert again.code == 0 and again.out.count("it is scored again") == 2, again.err
    after = json.loads(path.read_text())
    assert {**after, "parts": {}, "seconds": None} == {**before, "seconds": None}
    for kind in ("plain", "refined"):
        parts = [np.array(after["parts"][split][kind]) for split in HALVES]
        np.testing.assert_array_equal(sum(parts), np.array(before[kind]))
    rows = rows_of((tmp_path / "table" / "comparison.md").read_text().split("With refinement")[0])
    assert rows["mean of val[1::2]"][rows["mIoU, %"].index("CCNN")] == per_cent(after["parts"]["val[1::2]"]["plain"])
    assert "4 images of val (val[0::2]: 2, val[1::2]: 2)" in again.out
    written = path.stat().st_mtime_ns
    for more in ((), ("--parts=2",)):
        assert "scored again" not in run("compare", *arguments, *more).out and path.stat().st_mtime_ns == written
    shared = run("compare", *arguments, "--config.data.train_split=val[0::2]", f"--workdir={tmp_path / 'other'}")
    assert_refused(shared, r"data.val_split: val and the training split val\[0::2\] share 2 examples")
    assert_refused(run("compare", *arguments, "--parts=5"), "error: --parts: expected 1 to 4, the number of examples of val, got 5")


@pytest.mark.slow
def test_best_is_chosen_on_one_half_and_the_other_is_scored(checkpoint):
    whole = run("evaluate", f"--checkpoint={checkpoint}", "--parts=2")
    assert whole.code == 0, whole.err
    parts = json.loads((checkpoint / "results_val.json").read_text())["parts"]
    assert "mIoU of val[1::2], network" in (checkpoint / "report.html").read_text(encoding="utf-8")
    for split in HALVES:
        assert run("evaluate", f"--checkpoint={checkpoint}", f"--split={split}").code == 0
        results = json.loads((checkpoint / f"results_{split}.json").read_text())
        assert (results["images"], results["plain"]) == (2, parts[split]["plain"]) and results["split"] == split
    maps = run("evaluate", f"--checkpoint={checkpoint}", "--cam", "--tags_given", "--parts=2")
    levels = dict(re.findall(r"(0\.\d+): (0\.\d{3})", maps.out))
    level = re.search(r"level (0\.\d+), the best on val\[0::2\]", maps.out).group(1)
    assert levels[level] == max(levels.values()) and re.search(rf"^val\[0::2\] +2 +{levels[level]}$", maps.out, re.MULTILINE)


@pytest.mark.slow
def test_training_chooses_on_a_part(tmp_path, monkeypatch):
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path / "cache"))
    ended = run("train", TINY, *SMALL, f"--workdir={tmp_path / 'run'}", "--config.data.val_split=val[0::2]")
    assert ended.code == 0, ended.err
    assert "2 images of val[0::2]" in ended.out and (tmp_path / "run" / "results_val[0::2].json").exists()
    assert run("evaluate", f"--checkpoint={tmp_path / 'run'}", "--split=val[1::2]").code == 0
