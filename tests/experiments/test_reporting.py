"""What evaluation tells when its folder cannot be written, and which of several flags counts."""

import errno
import sys
import types

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from programs import ROOT

from experiments import reporting
from lcrf_jax.machine.errors import UserError


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_scores_are_printed_though_their_folder_cannot_be_written(tmp_path, monkeypatch, capsys, number):
    def refused(*_, **__):
        raise OSError(number, "no", "pictures_val.png")

    segmenter = types.SimpleNamespace(class_names=["background", "cat"])
    scores = types.SimpleNamespace(plain=np.array([[6, 2], [0, 4]]), refined=None, samples=[None] * 3, image_scores=None)
    data = {"kind": "voc", "root": "photos", "options": {}, "val_split": "val"}
    description = {"supervision": "tags", "training": {"data": data}}
    monkeypatch.setattr(reporting, "load_segmenter", lambda run_dir: (segmenter, description, {}))
    monkeypatch.setattr(reporting, "write_run_report", lambda *_, **__: None)
    monkeypatch.setattr(reporting.evaluation, "evaluate", lambda *_, **__: scores)
    monkeypatch.setattr(reporting, "picture_grid", refused)
    source = type("Source", (), {"split": "val", "__len__": lambda self: 3})()
    with pytest.raises(UserError, match=r"pictures_val.png could not be written \(no\)\. The scores stand above"):
        reporting.evaluate_run(tmp_path, source, crf=False)
    shown = capsys.readouterr().out
    assert "3 images of val" in shown and "mIoU 0.708" in shown and "pictures  " not in shown
    assert (tmp_path / "results_val.json").exists()


@pytest.mark.parametrize("arguments", [
    ["--config.epochs=(1,1)", "--config.seed=1", "--config.epochs=(2,2)", "--config.seed=3"],
    ["--config.epochs", "(1,1)", "-config.epochs=(9,)", "--config.seed=3", "--config.epochs", "(2,2)"],
    ["--config.epochs=(2,2)", "--config.seed=3"],
])  # fmt: skip
def test_the_last_of_a_setting_counts_as_of_any_flag(arguments, monkeypatch):
    """ml_collections joins the tuples."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    argv = ["train", f"--config={ROOT}/experiments/configs/tiny.py", *arguments]
    monkeypatch.setattr(sys, "argv", argv)
    values(reporting.last_of_each(argv))
    assert (values.config.epochs, values.config.seed) == ((2, 2), 3)


def test_other_arguments_stay_as_they_are():
    argv = ["train", "--config=a", "--config=b", "--config.cache.features", "--nooverlays", "--data=x", "--data=y", "--",
            "--config.seed=1", "--config.seed=1"]  # fmt: skip
    assert reporting.last_of_each(argv) == argv
