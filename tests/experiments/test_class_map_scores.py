"""Scores of class maps, and of what the first round is trained on."""

import re

import pytest
from small_runs import small_config

from experiments.class_map_scores import CAM_LEVELS, evaluate_cam
from lcrf_jax.train import fit, preparation
from lcrf_jax.train.splits import checked_split


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [30, 0, None], ids=["linear", "posteriors", "maps"])
def test_what_the_first_round_learns_from_is_scored_beside_the_maps(tmp_path, capsys, num_steps):
    first, linear = num_steps is not None, bool(num_steps)
    config = small_config(tmp_path / "cache", evidence_posterior=first, epochs=(1,))
    config["linear"] = {**config["linear"], "num_steps": num_steps or 0}
    evidence = {**config["objective"]["likelihood_options"]["evidence"], "objectness_weight": float(first)}
    config["objective"]["likelihood_options"] = {**config["objective"]["likelihood_options"], "evidence": evidence}
    fit.train(preparation.prepare(config), tmp_path / "run")
    capsys.readouterr()
    evaluate_cam(tmp_path / "run", checked_split(config, "val", masks=True), tags_given=True, num_parts=2)
    shown = capsys.readouterr().out
    assert len(re.findall(r"0\.\d+: 0\.\d{3}", shown)) == len(CAM_LEVELS)
    assert ("posteriors of the class maps under the CRF, which the " in shown) == first
    assert ("posteriors of the linear network under the CRF, which the first round learns from" in shown) == linear
    assert ("maps of the linear network by themselves, without class maps and CRF" in shown) == linear
    assert shown.count("val[1::2]") == 1 + first + 2 * linear
    scores = [float(value) for value in re.findall(r"^mIoU +(0\.\d{3})", shown, re.MULTILINE)]
    assert len(scores) == 2 + first + 2 * linear and all(0 < score < 1 for score in scores)
