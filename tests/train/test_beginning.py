"""What a start is told before anything is computed: refusals, and that a run is finished."""

import json

import numpy as np
import pytest
from PIL import Image
from programs import with_entry

from experiments.configs import tiny
from lcrf_jax.data.example import data_identity
from lcrf_jax.data.opening import open_source
from lcrf_jax.machine.errors import SettingError
from lcrf_jax.machine.locks import Locked, locked
from lcrf_jax.runfolder.checkpoints import RunCheckpoints
from lcrf_jax.runfolder.description import CheckpointError, load_description, save_description
from lcrf_jax.runfolder.segments import with_segment
from lcrf_jax.train.beginning import check_start
from lcrf_jax.train.splits import checked_split, open_data

CONFIG = tiny.get_config().to_dict()  # 64 images in batches of 8, two rounds of one epoch: 16 steps


def run_of(folder, *, last=None, best=None, images=64, config=CONFIG):
    """A run folder with states of a parameter."""
    state = {"params": {"w": np.ones(2, np.float32)}}
    save_description(folder, with_segment(None, {
        "training": config, "versions": {}, "data": {"train": {"images": images, "sha256": "0"}}}, 0))  # fmt: skip
    with RunCheckpoints(folder) as checkpoints:
        if last is not None:
            checkpoints.save_last(last, state)
        if best is not None:
            checkpoints.save_best(best, state["params"], None)
    return folder


def changed(path, value):
    return with_entry(CONFIG, path, value)


def test_a_new_run_and_one_that_is_not_finished_begin(tmp_path):
    assert check_start(tmp_path / "new", CONFIG) is None and not (tmp_path / "new").exists()
    assert check_start(run_of(tmp_path / "half", last=8), CONFIG) is None
    assert check_start(run_of(tmp_path / "none"), CONFIG) is None


def test_a_finished_run_says_so_and_refuses_what_would_change_nothing(tmp_path):
    run = run_of(tmp_path, last=16)
    before = (run / "config.json").read_bytes()
    assert check_start(run, CONFIG) == 16
    assert check_start(run, changed("data.root", "moved")) == 16
    assert check_start(run, changed("num_threads", 7)) == 16
    with pytest.raises(CheckpointError, match=r"finished run of other settings \(config.optimizer.learning_rate was 0.001, is 0.1\)"):
        check_start(run, changed("optimizer.learning_rate", 0.1))
    assert check_start(run, changed("epochs", (1, 2))) is None  # there is more to train
    assert (run / "config.json").read_bytes() == before


def test_a_run_of_a_method_that_trains_nothing_is_finished_when_it_is_saved(tmp_path):
    cam = changed("method", "cam")
    assert check_start(run_of(tmp_path / "begun", config=cam), cam) is None
    run = run_of(tmp_path / "saved", best=0, config=cam)
    assert check_start(run, cam) == 0
    with pytest.raises(CheckpointError, match="config.classifier.l2 was 0.01, is 1.0"):
        check_start(run, cam | {"classifier": {"l2": 1.0}})
    with pytest.raises(CheckpointError, match="config.method was 'cam', is 'latent_crf'"):
        check_start(run, CONFIG)


def test_a_finished_run_whose_newest_state_is_damaged_goes_on_from_the_one_before(tmp_path):
    run = run_of(tmp_path, last=16)
    for path in (run / "last" / "16" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert check_start(run, CONFIG) is None


def test_what_would_be_refused_later_is_refused_at_once(tmp_path):
    run = run_of(tmp_path, last=8)
    for path, value, message in (
        ("seed", 1, "config.seed was 0, is 1"), ("batch_size", 4, "config.batch_size"),
        ("network.widths", (8, 8, 8), "another model: network"), ("data.options.seed", 3, "config.data.options.seed"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            check_start(run, changed(path, value))
    with locked(run / "lock"), pytest.raises(Locked, match="is in use by process"):
        check_start(run, CONFIG)
    assert check_start(run, CONFIG) is None


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in ("file", "file/run"):
        with pytest.raises(CheckpointError, match=r"--workdir=\S+: \S+/file is a file; give a folder"):
            check_start(tmp_path / folder, CONFIG)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=f"--workdir={tmp_path}/new/run: {tmp_path} cannot be written to; give another"):
        check_start(tmp_path / "new" / "run", CONFIG)
    assert not (tmp_path / "new").exists()


def test_a_run_of_an_earlier_version_does_not_say_how_long_it_is(tmp_path):
    run = run_of(tmp_path, last=16)
    old = {key: value for key, value in load_description(run).items() if key not in ("data", "segments")}
    (run / "config.json").write_text(json.dumps(old))
    assert check_start(run, CONFIG) is None


def test_data_is_known_by_names_tags_and_classes():
    one, same, other = (data_identity(open_source("textures", "train", num_train=8, seed=seed)) for seed in (0, 0, 1))
    assert one == same and one["images"] == 8 and one["sha256"] != other["sha256"]


@pytest.fixture
def folder(tmp_path):
    """A folder in VOC layout without masks."""
    for part in ("JPEGImages", "ImageSets/Segmentation"):
        (tmp_path / part).mkdir(parents=True)
    Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages" / "one.jpg")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    (tmp_path / "tags.csv").write_text("image,tags\none,cat\n")
    for split in ("train", "test"):
        (tmp_path / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("one\n")
    return {"method": "latent_crf", "data": {
        "kind": "folder", "root": str(tmp_path), "train_split": "train", "val_split": "val", "options": {}}}  # fmt: skip


def test_a_split_that_was_named_and_is_not_there_is_refused(folder):
    assert open_data(folder)[1] is None
    with pytest.raises(SettingError, match=r"data.val_split=vall: .* has no vall.txt: the splits there are test, train\. Without"):
        open_data({**folder, "data": {**folder["data"], "val_split": "vall"}})
    with pytest.raises(SettingError, match=r"data.val_split=test: .*has no mask for one.*Without validation: --config.data.val_split="):
        open_data({**folder, "data": {**folder["data"], "val_split": "test"}})


def test_skipping_bad_files_where_there_are_no_files_is_refused(folder):
    data = {"kind": "textures", "root": "", "options": {"num_train": 4}, "on_bad_image": "skip"}
    with pytest.raises(SettingError, match="data.on_bad_image: 'skip' leaves out files .* the source 'textures' has no files"):
        checked_split({"data": data}, "train", masks=False)
    assert len(checked_split({"data": {**folder["data"], "on_bad_image": "skip"}}, "train", masks=False)) == 1


def test_rounds_that_have_begun_stay_where_they_began(tmp_path):
    """8 steps an epoch; in round 2 the length of round 1 is what it was, and that of round 2 is free."""
    folder = run_of(tmp_path / "run", last=9)
    assert check_start(folder, changed("epochs", (1, 5))) is None
    with pytest.raises(CheckpointError, match=r"has begun round 2 after step 8; with config.epochs=\(3,1\) rounds begin after 0, 24"):
        check_start(folder, changed("epochs", (3, 1)))
    with pytest.raises(CheckpointError, match="has begun round 2 after step 8"):
        check_start(folder, changed("least_steps", 20))
    assert check_start(run_of(tmp_path / "first", last=7), changed("epochs", (3, 1))) is None
