"""Which features are kept on the disk, and that what is computed without them is the same."""

import json

import numpy as np
import pytest
from small_runs import assert_same_trees, lines, small_config, train_and_kill

from lcrf_jax.data.opening import open_source
from lcrf_jax.data.sharding import write_shards
from lcrf_jax.machine.errors import SettingError
from lcrf_jax.nets.network import backbone_variables
from lcrf_jax.runfolder.checkpoints import restore_params
from lcrf_jax.train import class_maps, fit, keeping, preparation
from lcrf_jax.train.plan import resolved_plan
from lcrf_jax.train.settings import check_settings


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def choice(config, num_images):
    tags = np.ones((24, 7), bool)
    plan = resolved_plan(config, ("background", *"abcdef"), tags)
    variables, _ = backbone_variables(plan.network.description)
    return keeping.chosen_to_keep(plan, num_images, variables), keeping.view_bytes(plan, variables)


@pytest.mark.slow
def test_what_is_kept_follows_from_the_bytes_and_the_line_says_why(cache, monkeypatch):
    monkeypatch.setattr(keeping, "seconds_an_image", lambda plan, variables: 0.09)
    config = small_config(cache)
    kept, each = choice(config, 24)
    total, tap = 24 * 2 * sum(each.values()), 24 * each["s32"]
    assert kept[:2] == (True, True) and "kept on the disk, for they are within config.cache.features_gb=20" in kept.line
    assert f"24 images in 2 views: {total / 1e3:.1f} kB" in kept.line
    for features_gb, expected in ((total, (True, True)), (total - 1, (False, True)), (tap, (False, True)), (tap - 1, (False, False))):
        config["cache"]["features_gb"] = features_gb / 1e9
        assert choice(config, 24)[0][:2] == expected
    assert "nor are those of the tag classifier" in choice(config, 24)[0].line
    config["cache"] |= {"features": False, "features_gb": 20.0}
    off, _ = choice(config, 24)
    assert off[:2] == (False, True) and "not kept (config.cache.features=False): the backbone runs in every step" in off.line
    config["cache"] |= {"features": True, "features_gb": 5.0}
    large, _ = choice(config, 1_000_000)
    assert "and 2.1 days of this process; not kept (more than" in large.line and "1,000,000" in large.line
    assert f"{config['batch_size'] * 0.09:.2g} s more each" in large.line
    with pytest.raises(SettingError, match=r"cache\.features_gb: expected .* >= 0"):
        check_settings({**config, "cache": {**config["cache"], "features_gb": -1}})


@pytest.mark.slow
def test_the_bytes_are_those_that_the_cache_has(cache):
    given = preparation.prepare(small_config(cache))
    record = given.views[0]
    each = keeping.view_bytes(given.plan, given.variables)
    assert each == {**{tap: array.nbytes for tap, array in record.features.items()}, "guide": record.guide.nbytes}


def test_rows_are_written_as_their_list():
    tags = np.random.default_rng(0).random((1100, 3)) < 0.5
    for rows in (tags, tags[:512], tags[:1], tags[:0]):
        assert "".join(class_maps.written_rows(rows)) == repr(rows.tolist())


def test_times_for_people():
    assert [keeping.clock(seconds) for seconds in (3, 90, 7200, 200_000)] == ["3 s", "1.5 min", "2.0 h", "2.3 days"]


@pytest.mark.slow
def test_nothing_on_the_disk_gives_the_same_classifier_and_maps_as_the_tap_on_it(cache, tmp_path, monkeypatch):
    kept, without = (
        preparation.prepare(small_config(tmp_path / str(gb), cache__features_gb=gb, class_maps__extra_sizes=(96,))) for gb in (1e-4, 0.0)
    )
    assert not kept.config["cache"]["features"] and not without.config["cache"]["features"]
    assert_same_trees(kept.classifier, without.classifier)
    assert_same_trees(kept.maps, without.maps)
    kinds = {json.loads(path.read_text())["identity"]["kind"] for path in (tmp_path / "0.0").glob("*/identity.json")}
    assert kinds == {"tag classifier", "class maps and objectness"}
    monkeypatch.setattr(class_maps, "ROWS_IN_MEMORY", 8)
    by_parts = preparation.prepare(small_config(tmp_path / "parts", cache__features_gb=0.0, class_maps__extra_sizes=(96,)))
    assert_same_trees(kept.maps, by_parts.maps)
    assert without.with_config(small_config(tmp_path / "0.0")).config["cache"]["features"] is False


@pytest.mark.slow
@pytest.mark.parametrize("features_gb", [20.0, 0.0])
def test_a_run_on_shards_is_the_run_on_its_source_and_resumes_to_the_same_bits(cache, tmp_path, monkeypatch, features_gb):
    config = small_config(cache, cache__features_gb=features_gb, save_every_steps=1)
    of_textures = {split: open_source("textures", split, masks=split == "val", **config["data"]["options"]) for split in ("train", "val")}
    write_shards(of_textures, tmp_path / "shards", shard_bytes=100_000)
    of_shards = {**config, "data": {**config["data"], "kind": "shards", "root": str(tmp_path / "shards"), "options": {}}}
    fit.train(preparation.prepare(config), tmp_path / "source")
    fit.train(preparation.prepare(of_shards), tmp_path / "whole")
    given = preparation.prepare(of_shards)
    for stop in (2, 7):
        train_and_kill(given, tmp_path / "killed", monkeypatch, stop)
    fit.train(given, tmp_path / "killed")
    runs = [restore_params(tmp_path / name, "last") for name in ("source", "whole", "killed")]
    for other in runs[1:]:
        assert_same_trees(runs[0], other)
    assert lines(tmp_path / "source") == lines(tmp_path / "whole") == lines(tmp_path / "killed")
