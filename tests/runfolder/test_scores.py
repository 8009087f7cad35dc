"""A score is a score: the parameters of runs without validation have none, and give way to the first that has one."""

import numpy as np
import pytest

from lcrf_jax.runfolder.checkpoints import RunCheckpoints, best_miou, restore_params
from lcrf_jax.runfolder.description import CheckpointError
from lcrf_jax.runfolder.metrics import rank, score


def params(value):
    return {"w": np.full(2, value, np.float32)}


def saved(folder):
    return float(restore_params(folder)["w"][0]), best_miou(folder)


def test_without_scores_the_newest_are_kept_until_the_first_score(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.save_best(3, params(3), None) and checkpoints.save_best(6, params(6), None)
        checkpoints.wait()
        assert saved(tmp_path) == (6.0, None)
        assert checkpoints.save_best(9, params(9), 0.152)  # masks were added
        checkpoints.wait()
        assert saved(tmp_path) == (9.0, 0.152) and [path.name for path in (tmp_path / "best").iterdir()] == ["9"]
        assert not checkpoints.save_best(12, params(12), None)  # and taken away: what was scored stays
        assert not checkpoints.save_best(15, params(15), 0.1)
        assert checkpoints.save_best(18, params(18), 0.2)
    assert saved(tmp_path) == (18.0, 0.2)


def test_the_number_of_a_step_that_was_written_as_a_score_beats_none():
    """As earlier versions wrote it."""
    assert score({"miou": 6.0}) is None and score({"miou": None}) is None and score({"miou": 0.152}) == 0.152
    ordered = [{"miou": 6.0}, {"miou": None, "step": 9}, {"miou": 12.0}, {"miou": 0.0, "step": 1}, {"miou": 0.152, "step": 2}]
    assert sorted(ordered, key=rank) == ordered


def test_states_without_best_parameters_come_with_advice_that_helps(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save_last(2, {"params": params(1)})
    with pytest.raises(CheckpointError, match=r"there is one in last/, where the frozen weights are not: train on with the same"):
        restore_params(tmp_path)
