"""Run folders tell the truth: what programs write, refuse to write, and say when they cannot."""

import datetime
import json
import re
import shutil
import sys

import pytest
from programs import SMALL, TINY, assert_refused, run

from experiments import reporting, run_report
from lcrf_jax.runfolder.description import load_description, save_description

OWN = {"kind": "voc", "root": "photos", "options": {}, "val_split": "val"}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize(("changes", "message"), [
    (("--config.seed=1",), "a run of other settings .*config.seed was 0, is 1"),
    (("--config.network.dropout=0.5",), "belongs to another model: network"),
    (("--config.optimizer.learning_rate=0.1",), r"finished run of other settings \(config.optimizer.learning_rate was 0.001, is 0.1\)"),
    (("--config.data.options.num_val=5",), "config.data.options.num_val was 4, is 5"),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_a_refused_start_is_told_at_once_and_changes_nothing(checkpoint, changes, message):
    before = files(checkpoint)
    ended = run("train", TINY, *SMALL, f"--workdir={checkpoint}", *changes)
    assert_refused(ended, f"^error: .*{message}")
    assert ended.out == ""  # before the data is read or a weight is loaded
    assert files(checkpoint) == before


@pytest.mark.parametrize(("changes", "message"), [
    (("--config.epochs=3,3",), r"epochs: expected 1 number\(s\), .*write --config.epochs=3, or --config.rounds=2"),
    (("--config.log_every_steps=0",), "log_every_steps: expected"),
    (("--config.data.on_bad_image=skipp",), "did you mean 'skip'"),
    (("--on_bad_image=skip",), "the source 'textures' has no files of single photographs"),
    (("--config.data.val_split=vall",), "textures have the splits train, val, got 'vall'"),
    (("--config.method=latent_crff",), r"method: expected one of .*did you mean 'latent_crf'"),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_settings_that_nothing_would_use_are_refused(tmp_path, changes, message):
    ended = run("train", TINY, *SMALL, f"--workdir={tmp_path / 'new'}", *changes)
    assert_refused(ended, f"^error: .*{message}")
    assert not (tmp_path / "new").exists()


def test_one_number_of_epochs_is_not_two_rounds(tmp_path):
    ended = run("train", TINY, "--config.epochs=3", f"--workdir={tmp_path / 'new'}")
    assert_refused(ended, r"^error: epochs: expected 2 number\(s\), .* got \(3,\); write --config.epochs=3,3, or --config.rounds=1 if")


def test_a_misspelt_name_in_a_file_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from experiments.configs import tiny\n\n\ndef get_config():\n    config = tiny.get_config()\n"
        "    config.save_every_step = 3\n    return config\n")
    ended = run("train", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
    assert_refused(ended, r"config.save_every_step: there is no such setting; did you mean 'save_every_steps'\?")


def test_a_fault_of_the_house_keeps_its_traceback(checkpoint, monkeypatch):
    monkeypatch.setattr(reporting.evaluation, "evaluate", lambda *_, **__: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        run("evaluate", f"--checkpoint={checkpoint}")


def test_a_folder_for_results_that_is_a_link_in_a_circle(checkpoint, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert_refused(run("evaluate", f"--checkpoint={checkpoint}", f"--out={loop}"), f"^error: --out={loop} is a link that leads nowhere; give a folder")
    assert_refused(run("evaluate", f"--checkpoint={loop}"), f"^error: .*{loop}")
    assert_refused(run("train", TINY, *SMALL, f"--workdir={loop}"), f"^error: {loop}: a link that leads back to itself")


@pytest.mark.slow
def test_scores_are_printed_before_files_are_written(tiny_run, tmp_path):
    """What cannot be written is named, and the others are there."""
    folder = shutil.copytree(tiny_run[0], tmp_path / "run")
    (folder / "results_val.json").unlink()
    (folder / "results_val.json").mkdir()
    ended = run("evaluate", f"--checkpoint={folder}")
    assert ended.code == 1 and re.search(r"error: \S+/results_val.json could not be written \(.+\)\. The scores stand above", ended.err)
    assert ended.last_line == tiny_run[1].last_line and "Traceback" not in ended.err
    assert (folder / "report.html").stat().st_mtime > (tiny_run[0] / "report.html").stat().st_mtime


def test_results_and_reports_name_their_data(tiny_run):
    folder, _ = tiny_run
    assert json.loads((folder / "results_val.json").read_text())["data"]["kind"] == "textures"
    page = (folder / "report.html").read_text()
    assert "Data: textures (num_train=24, num_val=4, seed=0, size=96)." in page and "Trained on other data" not in page


def test_other_data_has_files_of_its_own(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "b" / "photos").mkdir(parents=True)
    own = {**OWN, "root": str(tmp_path / "photos")}
    assert reporting.place_in_names({**OWN, "root": f"{tmp_path}/photos/../photos/"}, own) == ""
    places = [reporting.place_in_names({**own, "root": str(tmp_path / name)}, own) for name in ("b/photos", "cat's & dogs")]
    assert re.fullmatch(r"_photos-[0-9a-f]{6}", places[0]) and re.fullmatch(r"_cat-s-dogs-[0-9a-f]{6}", places[1])
    described = [reporting._files_of_scores(tmp_path, "val", {**own, "root": root}, own, crf=False, tags_given=False)
                 for root in (own["root"], str(tmp_path / "b" / "photos"))]  # fmt: skip
    assert described[0].page.name == "report.html" and described[0].results.name == "results_val.json"
    assert not set(described[0]) & set(described[1])
    assert described[1].page.name == f"report_val{places[0]}.html" and described[1].refined.name == f"results_val{places[0]}_crf.json"


def test_a_comparison_goes_on_where_its_data_has_moved(tmp_path):
    config = {"method": "sec", "data": OWN, "optimizer": {"learning_rate": 0.1}, "seed": 0}
    save_description(tmp_path, {"training": config})
    reporting.check_same_settings(tmp_path, {**config, "optimizer": {"learning_rate": 0.2}})  # nothing was saved
    (tmp_path / "last" / "3").mkdir(parents=True)
    reporting.check_same_settings(tmp_path, {**config, "data": {**OWN, "root": "/moved"}})
    with pytest.raises(ValueError, match=r"another setting of \['optimizer'\] \(config.optimizer.learning_rate was 0.1, is 0.2\)"):
        reporting.check_same_settings(tmp_path, {**config, "optimizer": {"learning_rate": 0.2}})
    with pytest.raises(ValueError, match=r"another setting of \['data'\] \(config.data.val_split was 'val', is 'test'\)"):
        reporting.check_same_settings(tmp_path, {**config, "data": {**OWN, "val_split": "test"}})
    reporting.check_same_settings(tmp_path / "new", config)


def test_the_report_has_the_parts_of_a_training_that_was_taken_up_again():
    first = {"first_step": 1, "date": "then", "machine": "here", "versions": {"jax": "1"}, "changed": {}}
    second = {"first_step": 7, "date": "now", "machine": "there", "versions": {"jax": "2"},
              "changed": {"seed": {"was": 0, "is": 1}}}  # fmt: skip
    assert run_report._segments([first]) == "" and run_report._segments(()) == ""
    text = run_report._segments([first, second])
    assert "there" in text and "seed 0 → 1, jax 1 → 2" in text


def test_the_settings_of_a_comparison_are_those_that_its_runs_were_trained_with():
    runs = {("sec", 0): {"method": "sec", "seed": 0, "rate": 0.1, "data": {"root": "a"}},
            ("sec", 1): {"method": "sec", "seed": 1, "rate": 0.1, "data": {"root": "b"}}}  # fmt: skip
    assert run_report.common_settings(runs) == {"rate": 0.1, "data.root (sec, seed 0)": "a", "data.root (sec, seed 1)": "b"}


@pytest.mark.slow
def test_evaluating_on_other_data_leaves_the_files_of_the_run(checkpoint, tmp_path):
    from test_experiments import photos

    other = photos.__wrapped__(type("Factory", (), {"mktemp": staticmethod(lambda name: tmp_path)}))
    before = files(checkpoint)
    ended = run("evaluate", f"--checkpoint={checkpoint}", f"--data={other}")
    assert ended.code == 0 and f"3 images of val, folder {other}" in ended.out
    after = files(checkpoint)
    assert {name: after[name] for name in before} == before
    new = sorted(str(name) for name in after.keys() - before.keys())
    assert [re.sub("-[0-9a-f]{6}", "", name) for name in new] == [
        f"{kind}_val_{other.name}.{ending}" for kind, ending in (("pictures", "png"), ("report", "html"), ("results", "json"))]
    page = (checkpoint / new[1]).read_text()
    assert f"Data: folder {other}." in page and "Trained on other data: textures" in page
    assert load_description(checkpoint)["training"]["data"]["kind"] == "textures"


def test_weights_that_a_finished_run_does_not_read_are_told(tmp_path, monkeypatch):
    def no_data(config):
        raise OSError("no data")

    monkeypatch.setattr("lcrf_jax.train.beginning.check_start", lambda workdir, config: 6)
    monkeypatch.setattr("lcrf_jax.train.splits.open_data", no_data)
    ended = run("train", TINY, f"--workdir={tmp_path}", "--config.weights=/nowhere.safetensors")
    assert "config.weights=/nowhere.safetensors is not read: the run holds the weights it was trained with" in ended.out
    assert "is not read" not in run("train", TINY, f"--workdir={tmp_path}").out


def test_the_report_says_when_and_how_long_was_trained_and_what_wrote_it(monkeypatch):
    began = datetime.datetime(2026, 11, 28, 9, 30, tzinfo=datetime.UTC)
    segments = [{"first_step": 1, "date": began.isoformat(), "machine": "one: 1 x cpu"},
                {"first_step": 5, "date": (began + datetime.timedelta(hours=5)).isoformat(), "machine": "two: 1 x gpu"}]  # fmt: skip
    history = [{"step": step, "time": began.timestamp() + 10 * step + (5 * 3600 if step > 4 else 0)} for step in range(1, 9)]
    monkeypatch.setattr(sys, "argv", ["/there/experiments/evaluate.py", "--checkpoint=a b", "--crf"])
    text = run_report.when_and_how({"segments": segments}, history)
    assert "Trained from 2026-11-28 09:30 UTC on two: 1 x gpu, 0:02:00 hours:minutes:seconds of steps." in text
    assert text.endswith(" UTC by: python -m experiments.evaluate '--checkpoint=a b' --crf")
    assert run_report.when_and_how({}, history).startswith(" Written ")  # a run of an earlier version


@pytest.mark.parametrize("method, epochs, ends", [("latent_crf", (2, 4, 4), [20, 60]), ("latent_crf", (10,), []), ("sec", (2, 8), [])])
def test_rounds_are_marked_where_they_ended(method, epochs, ends):
    training = {"method": method, "epochs": epochs}
    assert run_report.round_ends(training, [{"step": 90}, {"step": 100}]) == ends and run_report.round_ends(training, []) == []
