"""Runs of a few steps on the embedded set, and ways to interrupt them."""

import jax
import numpy as np
import pytest

from experiments.configs import base, tiny
from lcrf_jax.runfolder.checkpoints import RunCheckpoints
from lcrf_jax.runfolder.metrics import metrics_history
from lcrf_jax.train import fit


def small_config(directory, **changes):
    config = tiny.get_config()
    config.data.options = base.options(seed=0, size=96, num_train=24, num_val=4)
    config.network.taps, config.network.widths = ("head", "s16"), (16, 12)
    config.class_maps.grid = 6
    config.epochs, config.log_every_steps = (2, 1), 2  # epochs of three steps
    config.cache.directory = str(directory)
    config = config.to_dict()
    for path, value in changes.items():
        group, _, name = path.rpartition("__")
        (config[group] if group else config)[name] = value
    config["rounds"] = len(config["epochs"])
    return config


class Killed(BaseException):
    pass


def assert_same_trees(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def lines(workdir):
    records = metrics_history(workdir)
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def train_and_kill(prepared, workdir, monkeypatch, stop, *, before_saving=False):
    """Train until the step that is saved under the number `stop`."""
    save_last = RunCheckpoints.save_last

    def killed_around_saving(self, step, state, **kwargs):
        if step != stop or not before_saving:
            save_last(self, step, state, **kwargs)
        if step == stop:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoints, "save_last", killed_around_saving)
        with pytest.raises(Killed):
            fit.train(prepared, workdir)
