"""config.json: what was trained from which step on, what another start may change, and what it may not."""

import copy
import json

import pytest

import lcrf_jax
from lcrf_jax.runfolder.checkpoints import RunCheckpoints, best_miou, restore_params
from lcrf_jax.runfolder.description import (
    FOR_INFERENCE,
    CheckpointError,
    check_data,
    check_description,
    check_settings_of_run,
    effective_changes,
    has_parameters,
    load_description,
    newest_step,
    save_description,
)
from lcrf_jax.runfolder.segments import settings_until, versions_until, with_segment
from lcrf_jax.train.beginning import check_folder

SETTINGS = {"method": "cam", "seed": 0, "num_threads": 2, "data": {"kind": "voc", "root": "here", "options": {"val_share": 0.2}},
            "network": {"widths": [8]}, "inference": {"mirror": True}, "classifier": {"l2": 0.01}}  # fmt: skip
DATA = {"train": {"images": 24, "sha256": "0f"}}


def description(versions=None, data=DATA, **settings):
    return {"class_names": ["background", "cat"], "training": copy.deepcopy(SETTINGS) | settings, "data": data,
            "versions": versions or {"jax": "1"}}  # fmt: skip


def begun(folder, *, saved=(), **changes):
    """A run folder with a description and empty folders of saves."""
    save_description(folder, description(**changes))
    for save in saved:
        (folder / save).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("saved", ["last/3", "best/0", "replaced/last-3"])
def test_the_guard_covers_every_run_that_has_saved_anything(tmp_path, saved):
    """A method that trains nothing has no states in last/."""
    begun(tmp_path, saved=[saved])
    before = (tmp_path / "config.json").read_bytes()
    assert has_parameters(tmp_path)
    for refused in (description(method="sec"), description(seed=1), description(data={"train": {"images": 25, "sha256": "1"}})):
        with pytest.raises(CheckpointError, match="holds a run o"):
            check_description(tmp_path, refused)
        with pytest.raises(CheckpointError, match="holds a run o"):
            save_description(tmp_path, refused)
    assert check_description(tmp_path, description(num_threads=4)) == [
        "other setting than before: config.num_threads was 2, is 4"]
    assert (tmp_path / "config.json").read_bytes() == before


def test_settings_that_the_version_before_did_not_have_make_no_other_model(tmp_path):
    def with_inference(**settings):
        return description() | {"inference": {"mirror": True} | settings}

    save_description(tmp_path, with_inference())
    (tmp_path / "last" / "3").mkdir(parents=True)
    check_description(tmp_path, with_inference(prior_weight=0.0))
    for other in ({"prior_weight": 1.0}, {"mirror": False}):
        with pytest.raises(CheckpointError, match="another model: inference differ"):
            check_description(tmp_path, with_inference(**other))


def test_masks_may_be_confirmed_later_and_no_more(tmp_path):
    begun(tmp_path, saved=["last/3"])
    confirmed = description(data=DATA)
    confirmed["training"]["data"]["options"]["untagged_in_masks"] = "accept"
    assert "untagged_in_masks was None, is 'accept'" in save_description(tmp_path, confirmed)[0]
    assert "untagged_in_masks was 'accept', is None" in check_description(tmp_path, description())[0]
    confirmed["training"]["data"]["options"]["val_share"] = 0.5
    with pytest.raises(CheckpointError, match="val_share was 0.2, is 0.5"):
        check_description(tmp_path, confirmed)


def test_parameters_without_a_description_are_nobodys(tmp_path):
    begun(tmp_path, saved=["last/3"])
    (tmp_path / "config.json").unlink()
    for check in (lambda: check_description(tmp_path, description()), lambda: check_settings_of_run(tmp_path, SETTINGS),
                  lambda: save_description(tmp_path, description())):  # fmt: skip
        with pytest.raises(CheckpointError, match="holds saved parameters and no config.json that says what they are"):
            check()


def test_a_folder_in_which_nothing_was_saved_is_anybodys(tmp_path):
    begun(tmp_path, saved=["last", "best"])
    assert not has_parameters(tmp_path) and newest_step(tmp_path) == 0
    assert check_description(tmp_path, description()) == check_description(tmp_path, description(num_threads=4)) == []
    assert check_settings_of_run(tmp_path, description(seed=1)["training"]) == []
    other = description(seed=1, network={"widths": [9]}) | {"class_names": ["background", "dog"]}
    before = (tmp_path / "config.json").read_bytes()
    [line] = check_description(tmp_path, other)
    assert line.startswith(f"{tmp_path} holds no trained state: what an earlier start was to train is forgotten (config.network.widths was [8]")
    assert "config.seed was 0, is 1; class_names differs)" in line and (tmp_path / "config.json").read_bytes() == before
    assert save_description(tmp_path, with_segment(load_description(tmp_path), other, 0)) == [line]
    now = load_description(tmp_path)
    assert now["training"]["network"] == {"widths": [9]} and now["class_names"][1] == "dog"
    assert [(segment["first_step"], segment["changed"]) for segment in now["segments"]] == [(1, {})]


def test_settings_alone_tell_what_would_be_refused_later(tmp_path):
    begun(tmp_path, saved=["last/3"])
    for changes, message in (
        ({"network": {"widths": [9]}}, r"another model: network or inference differ \(config.network.widths was \[8\], is \[9\]\)"),
        ({"inference": {"mirror": False}}, "another model: network or inference"),
        ({"seed": 1}, r"a run of other settings \(config.seed was 0, is 1\)"),
        ({"data": {"kind": "voc", "root": "here", "options": {"val_share": 0.5}}}, "options.val_share was 0.2, is 0.5"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_settings_of_run(tmp_path, SETTINGS | changes)
    assert check_settings_of_run(tmp_path, SETTINGS | {"classifier": {"l2": 1.0}}) == [
        "other setting than before: config.classifier.l2 was 0.01, is 1.0"]
    assert check_settings_of_run(tmp_path / "new", SETTINGS) == []


def test_where_things_lie_makes_no_other_run(tmp_path):
    begun(tmp_path, saved=["last/3"])
    moved = SETTINGS | {"data": {**SETTINGS["data"], "root": "/there"}, "num_threads": 8, "rounds": 2, "weights": "w"}
    assert effective_changes(tmp_path, moved) == []
    assert effective_changes(tmp_path, moved | {"classifier": {"l2": 1.0}}) == ["config.classifier.l2 was 0.01, is 1.0"]


def test_settings_that_an_earlier_version_did_not_know_are_told(tmp_path):
    begun(tmp_path, saved=["last/3"])
    newer = SETTINGS | {"data": {**SETTINGS["data"], "options": {"val_share": 0.2, "new": "tell"}}}
    assert effective_changes(tmp_path, newer) == []
    assert check_settings_of_run(tmp_path, newer) == ["other setting than before: config.data.options.new was None, is 'tell'"]


def test_other_data_is_refused_wherever_it_lies(tmp_path):
    begun(tmp_path / "run")
    check_data(tmp_path / "run", DATA)
    with pytest.raises(CheckpointError, match=r"other training data \(24 images then, 30 now; their names, tags or classes differ\)"):
        check_data(tmp_path / "run", {"train": {"images": 30, "sha256": "1"}})
    begun(tmp_path / "old", data={})  # of an earlier version
    check_data(tmp_path / "old", {"train": {"images": 30, "sha256": "1"}})


def test_each_start_that_trains_has_a_segment():
    first = with_segment(None, description(rate=0.1), 0)
    assert [(each["first_step"], each["changed"]) for each in first["segments"]] == [(1, {})]
    assert {"date", "machine", "versions"} < set(first["segments"][0])
    second = with_segment(first, description({"jax": "2"}, rate=0.2, new=1), 6)
    assert [each["first_step"] for each in second["segments"]] == [1, 7]
    assert second["segments"][1]["changed"] == {"rate": {"was": 0.1, "is": 0.2}, "new": {"is": 1}}
    assert second["training"]["rate"] == 0.2 and second["segments"][0] == first["segments"][0]
    assert settings_until(second, 6)["rate"] == 0.1 and "new" not in settings_until(second, 6)
    assert settings_until(second, 7)["rate"] == 0.2
    assert versions_until(second, 6) == {"jax": "1"} and versions_until(second, 9) == {"jax": "2"}


def test_a_start_that_was_killed_before_it_saved_anything_leaves_no_segment():
    first = with_segment(None, description(rate=0.1), 0)
    killed = with_segment(first, description(rate=0.2), 6)
    third = with_segment(killed, description(rate=0.3), 6)
    assert [each["first_step"] for each in third["segments"]] == [1, 7]
    assert third["segments"][1]["changed"] == {"rate": {"was": 0.1, "is": 0.3}}
    again = with_segment(third, description(rate=0.1), 0)
    assert [each["first_step"] for each in again["segments"]] == [1] and again["segments"][0]["changed"] == {}


def test_changes_are_told_against_what_the_newest_state_was_trained_with(tmp_path):
    """Not against the settings of a start that was killed before it saved anything."""
    killed = with_segment(with_segment(None, description(rate=0.1), 0), description(rate=0.2), 6)
    (tmp_path / "last" / "6").mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(killed))
    assert check_description(tmp_path, description(rate=0.1)) == []
    assert check_description(tmp_path, description(rate=0.2)) == ["other setting than before: config.rate was 0.1, is 0.2"]


def test_a_run_of_an_earlier_version_has_begun_with_what_it_says(tmp_path):
    old = {key: value for key, value in description(rate=0.1).items() if key != "data"}
    now = with_segment(old, description({"jax": "2"}, rate=0.2), 6)
    assert [(each["first_step"], each["versions"]["jax"]) for each in now["segments"]] == [(1, "1"), (7, "2")]
    save_description(tmp_path, now)
    assert load_description(tmp_path) == now


def test_a_description_that_lacks_what_is_needed_is_named(tmp_path):
    save_description(tmp_path, {"class_names": ["background"], "network": {}})
    with pytest.raises(CheckpointError, match="config.json does not describe a run: it has no inference, supervision, training; restore"):
        load_description(tmp_path, needed=FOR_INFERENCE)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"seed": ' + "9" * 5000 + "}", "{"], ids=["deep", "long", "cut"])
def test_a_description_that_is_no_json_is_damaged(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json is damaged \(.{10,80}\); restore it from a copy"):
        load_description(tmp_path)


def test_a_byte_order_mark_is_no_damage(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(description()), encoding="utf-8-sig")
    assert load_description(tmp_path) == description()


def test_a_run_that_is_a_link_in_a_circle_is_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for call in (load_description, has_parameters, best_miou, restore_params, RunCheckpoints, check_folder, lcrf_jax.load):
        with pytest.raises(CheckpointError, match=f"^{loop}: a link that leads back to itself"):
            call(loop)
