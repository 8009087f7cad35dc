"""experiments.compare: a small comparison end to end, resumed and repeated; its tables and pictures."""

import csv
import json
import pathlib
import re
import runpy

import numpy as np
import pytest
from absl import flags
from PIL import Image
from programs import run_on_one_device

from experiments import comparison_tables
from lcrf_jax.data.example import data_identity
from lcrf_jax.data.opening import open_source
from lcrf_jax.metrics import iou_per_class, mean_iou
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.runfolder.description import CheckpointError, load_description, save_description
from lcrf_jax.train.methods import METHODS

ARGUMENTS = ("--config=experiments/configs/tiny.py", "--config.data.options.num_train=24", "--config.data.options.num_val=4",
             "--config.network.taps=('head', 's16')", "--config.network.widths=(16, 12)", "--config.class_maps.grid=6",
             "--config.epochs=(2, 1)")
CLASSES = ["background", "ring", "cross"]


SLOW_FIXTURES = ("compared",)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCRF_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def compare(workdir, methods, *more):
    return run_on_one_device("compare", *ARGUMENTS, f"--methods={methods}", f"--workdir={workdir}", *more)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("compare")
    return workdir, compare(workdir, "all")


@pytest.fixture
def done(compared):
    assert compared[1].code == 0, compared[1].err
    return compared[0]


def result(workdir, method, seed=0):
    return json.loads((workdir / method / f"seed_{seed}" / "comparison.json").read_text())


def table_rows(text):
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_every_method_is_trained_for_the_same_number_of_steps_and_scored(done):
    for method in METHODS:
        found = result(done, method)
        assert found["method"] == method and found["images"] == 4 and found["split"] == "val"
        assert found["steps"] == (0 if method == "cam" else 9)
        for kind in ("plain", "refined"):
            matrix = np.array(found[kind])
            assert matrix.shape == (7, 7) and matrix.sum() == np.array(result(done, "cam")["plain"]).sum()
        assert bool(found["localisation"]) == bool(METHODS[method].inputs)
        assert (found["smoothed"] is not None) == (method == "mil_ilp")
        assert (found["step_bytes"] is None) == (method == "cam") and found["seconds"]["wall"] > 0
        description = load_description(done / method / "seed_0")
        assert description["training"]["method"] == method and description["training"]["data"]["val_split"] == ""
        assert description["supervision"] == METHODS[method].supervision


def test_the_table_has_the_numbers_of_the_runs(done):
    plain, refined = (done / "comparison.md").read_text().split("With refinement")
    for text, kind in ((plain, "plain"), (refined, "refined")):
        rows = {row[0].strip("*"): [cell.strip("*") for cell in row[1:]] for row in table_rows(text)}
        for column, title in enumerate(rows["mIoU, %"]):
            [method] = [name for name, known in METHODS.items() if title in (known.title, known.smoothed_title)]
            matrix = np.array(result(done, method)["smoothed" if title == METHODS[method].smoothed_title else kind])
            assert rows["mean"][column] == f"{100 * mean_iou(matrix):.1f}"
            for name, iou in zip(result(done, method)["class_names"], iou_per_class(matrix), strict=True):
                assert rows[name][column] == ("-" if np.isnan(iou) else f"{100 * iou:.1f}")
            assert rows["saliency or cues"][column] == (result(done, method)["localisation"] or "no")
    titles = table_rows(plain)[0][1:]
    assert set(titles) == {method.title for method in METHODS.values()} | {"MIL+ILP-sppxl"}
    assert titles[-1] == "full supervision"
    groups = [bool(METHODS[name].inputs) for title in titles for name in METHODS
              if title in (METHODS[name].title, METHODS[name].smoothed_title)]
    assert groups == sorted(groups)
    assert "4 images of val, 9 steps of 8 images, seed 0;" in refined


def test_the_files_of_the_comparison(done):
    with (done / "comparison.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    [mean] = [row for row in rows if (row["column"], row["refined"], row["class"]) == ("SEC", "1", "mean")]
    np.testing.assert_allclose(float(mean["seed 0"]), 100 * mean_iou(np.array(result(done, "sec")["refined"])), atol=1e-3)
    assert len(rows) == 8 * (len(METHODS) * 2 + 1)
    text = (done / "comparison.tex").read_text()
    for tabular in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.DOTALL):
        columns = len(re.findall("[lr]", re.match(r"\\begin\{tabular\}\{([lr|]+)\}", tabular).group(1)))
        lines = [line for line in tabular.splitlines() if line.endswith((r"\\", r"\hline"))]
        assert len(lines) == 2 + 7 + 1
        assert all(line.count("&") == columns - 1 for line in lines[1:])
    for name in ("comparison.png", "comparison_refined.png"):
        with Image.open(done / name) as picture:
            assert picture.width > 150 * (len(METHODS) + 2)


def test_the_report_of_the_comparison(done):
    text = (done / "report.html").read_text(encoding="utf-8")
    for title in ("truth", *(method.title for method in METHODS.values())):
        assert text.count(f'data-layer="{title}"') == 4, title  # one for each image of val
    for kind in ("plain", "refined"):
        assert f"<td>{100 * mean_iou(np.array(result(done, 'latent_crf')[kind])):.1f}</td>" in text


def test_what_is_done_is_not_done_again(done):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*") if path.is_file() and path.parent != done}
    again = compare(done, "sec,ccnn")
    assert again.code == 0, again.err
    assert "SEC, seed" not in again.out and "train" not in again.err
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert set(table_rows((done / "comparison.md").read_text())[0][1:]) == {"CCNN", "SEC"}


def test_a_run_that_lost_its_score_is_scored_again_and_not_trained(done):
    expected, path = result(done, "ccnn"), done / "ccnn" / "seed_0" / "comparison.json"
    params = restore_params(path.parent)
    path.unlink()
    assert compare(done, "ccnn").code == 0
    assert {**result(done, "ccnn"), "seconds": None} == {**expected, "seconds": None}
    assert result(done, "ccnn")["seconds"]["wall"] >= expected["seconds"]["wall"]
    after = restore_params(path.parent)["decoder"]
    for name, layer in params["decoder"].items():
        for leaf in layer:
            np.testing.assert_array_equal(after[name][leaf], layer[leaf])


def test_another_setting_in_the_same_folder_is_refused(done):
    ended = compare(done, "ccnn", "--config.baselines.ccnn.slack=3.0")
    assert ended.code == 1 and re.search(r"ccnn/seed_0 holds a run with another setting of \['baselines'\]", ended.err)


@pytest.mark.slow_except("arguments0*", "arguments1*")
@pytest.mark.parametrize(("arguments", "message"), [
    (("sec,crf",), "--methods: expected all, or some of mil_ilp, .*, with commas between, got 'crf'"),
    (("ccnn", "--config.data.val_split="), "val_split: expected a split with masks"),
    (("ccnn", "--config.baselines.ccnn.slack=-1.0"), "slack: expected a finite number >= 0"),
    (("sec", "--config.baselines.cues.file=none.npz"), "no file of cues none.npz"),
])
def test_what_cannot_be_compared_is_refused(tmp_path, arguments, message):
    ended = compare(tmp_path, *arguments)
    assert ended.code == 1 and re.search(message, ended.err), ended
    assert "Traceback" not in ended.err


@pytest.fixture(scope="module")
def program():
    """What experiments/compare.py defines, without its flags."""
    before = set(flags.FLAGS)
    defined = runpy.run_module("experiments.compare", run_name="compare")
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
    return defined


def test_a_score_on_other_data_is_no_score_of_this(program, tmp_path):
    train, val, others = (data_identity(open_source("textures", "val", num_val=number)) for number in (5, 4, 3))
    source = open_source("textures", "val", num_val=4)
    save_description(tmp_path, {"training": {}, "data": {"train": train}})
    assert not program["is_done"](tmp_path, train, source)
    (tmp_path / "comparison.json").write_text(json.dumps({**random_result(0, "ccnn"), "data": val}))
    assert program["is_done"](tmp_path, train, source)
    with pytest.raises(CheckpointError, match="other training data"):
        program["is_done"](tmp_path, others, source)
    (tmp_path / "comparison.json").write_text(json.dumps({**random_result(0, "ccnn"), "data": others}))
    with pytest.raises(CheckpointError, match=r"was scored on other images of val \(3 then, 4 now; .*or remove \S+/comparison.json"):
        program["is_done"](tmp_path, train, source)
    (tmp_path / "comparison.json").write_text(json.dumps(random_result(0, "ccnn")))  # of an earlier version
    assert program["is_done"](tmp_path, train, source)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000], ids=["empty", "list", "cut", "deep"])
def test_what_was_noted_and_is_damaged_is_named(program, tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ValueError, match=r"comparison.json is damaged \(.+\); remove it and run the same command again: it is so"):
        program["read_noted"](tmp_path / "comparison.json", "it is so")


def random_result(seed, method):
    rng = np.random.default_rng(seed)
    plain, refined, smoothed = rng.integers(1, 100, (3, 3, 3))
    plain[2], plain[:, 2] = 0, 0
    localisation = {"latent_crf": "class maps", "full_supervision": "masks"}.get(method, "")
    return {"method": method, "seed": seed, "localisation": localisation, "class_names": CLASSES,
            "plain": plain.tolist(), "refined": refined.tolist(),
            "smoothed": smoothed.tolist() if method == "mil_ilp" else None, "steps": 4,
            "seconds": {"wall": 60.0 * seed, "cpu": 120.0 * seed}, "step_bytes": 2_000_000}


@pytest.mark.parametrize(("change", "message"), [
    (lambda result: {}, "it has no method, seed, "), (lambda result: {**result, "plain": result["plain"][:2]}, "plain is no matrix of 3 classes"),
    (lambda result: {name: result[name] for name in result if name != "steps"}, "it has no steps")])  # fmt: skip
def test_a_result_that_is_not_whole_is_named(program, tmp_path, change, message):
    (tmp_path / "comparison.json").write_text(json.dumps(change(random_result(0, "ccnn"))))
    with pytest.raises(ValueError, match=rf"comparison.json is damaged \({message}.*; remove it and run the same command again"):
        program["read_result"](tmp_path / "comparison.json")
    (tmp_path / "comparison.json").write_text(json.dumps(random_result(0, "ccnn")))
    assert program["read_result"](tmp_path / "comparison.json")["steps"] == 4


@pytest.mark.parametrize("text", ["{}", '{"wall": "x", "cpu": null}'])
def test_a_time_that_is_none_is_named_before_anything_is_trained(program, tmp_path, text):
    (tmp_path / "train_time.json").write_text(text)
    with pytest.raises(ValueError, match="train_time.json is damaged .*; remove it and run the same command again"):
        program["train"](None, tmp_path)
    assert (tmp_path / "train_time.json").read_text() == text


@pytest.mark.parametrize("content", [None, b"PK no archive"])
def test_labels_for_the_pictures_that_are_gone_are_named(program, tmp_path, content):
    if content:
        (tmp_path / "pictures.npz").write_bytes(content)
    with pytest.raises(ValueError, match="pictures.npz is missing or damaged .*; remove .*comparison.json and run the same command again"):
        program["stored_labels"](tmp_path)


def test_settings_that_one_of_the_methods_refuses_are_told_before_the_others_are_trained(tmp_path):
    ended = compare(tmp_path / "c", "all", "--config.epochs=(2,)", "--config.rounds=1")
    assert ended.code == 1 and "for stc" in ended.err and not (tmp_path / "c").exists(), ended


def test_mean_and_standard_deviation_over_seeds():
    results = {"ccnn": [random_result(seed, "ccnn") for seed in (1, 2, 3)]}
    rows = {row[0]: row[1] for row in table_rows(comparison_tables.markdown(results, "a note").split("With refinement")[0])}
    means = [100 * mean_iou(np.array(found["plain"])) for found in results["ccnn"]]
    assert rows["**mean**"] == f"**{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}**"
    assert rows["cross"] == "-"
    assert (rows["training, min"], rows["training, CPU min"], rows["step, MB"]) == ("2.0", "4.0", "2")


def test_groups_of_the_latex_table():
    results = {name: [random_result(0, name)] for name in ("latent_crf", "full_supervision", "mil_ilp", "ccnn")}
    text = comparison_tables.latex(results)
    head = "saliency or cues & \\multicolumn{3}{c}{no} & \\multicolumn{1}{c}{yes} & \\multicolumn{1}{c}{masks} \\\\"
    assert head in text and " & MIL+ILP & MIL+ILP-sppxl & CCNN & latent CRF & full supervision \\\\ \\hline" in text


def test_without_scikit_image_it_says_what_to_do_before_training(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "skimage.segmentation", None)
    ended = compare(tmp_path, "mil_ilp")
    assert ended.code == 1 and "superpixels need scikit-image" in ended.err and not any(pathlib.Path(tmp_path).iterdir())
