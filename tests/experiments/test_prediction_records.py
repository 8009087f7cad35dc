"""What `predict` knows to be done, and its records: interrupted, of two processes, of photographs that change, damaged."""

import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from experiments import predictions
from experiments.prediction_photographs import moment
from experiments.prediction_plan import outputs_for, planned_outputs
from lcrf_jax.machine.locks import Locked

SETTINGS, NAMES = {"crf": False}, np.array(["background", "ring"])


@pytest.fixture
def todo(tmp_path):
    """Three photographs and their outputs; the settings of the masks are written."""
    pairs = []
    for name in "abc":
        Image.new("RGB", (20, 10), "red").save(tmp_path / f"{name}.png")
        pairs.append((tmp_path / f"{name}.png", outputs_for(tmp_path / "out", pathlib.Path(f"{name}.png"), overlays=False, probabilities=False)))
    assert remaining(pairs) == pairs
    return pairs


def remaining(pairs, overwrite=False):
    return predictions.remaining(pairs, pairs[0][1].mask.parent, SETTINGS, overwrite)


def labelled(records, pairs, value=1, read=None):
    """Label photographs: the line, then the mask."""
    for _, outputs in pairs:
        records.write({"mask": outputs.mask.name, "value": value})
        labels = np.full((10, 20), value, np.uint8)
        read_at = read if read is not None else predictions.settings_since(outputs.mask.parent) + value
        assert predictions.write_outputs(outputs, records.path.parent, np.zeros((10, 20, 3), np.uint8), labels, None, NAMES, read_at) is None


def lines(out, name="predictions.jsonl"):
    found = [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
    return {line["mask"]: line["value"] for line in found}, len(found)


def test_a_second_process_in_a_folder_is_refused_and_the_first_keeps_its_records(todo, tmp_path):
    out = tmp_path / "out"
    with predictions.Records(out, (0, 1), todo) as records:
        labelled(records, todo[:1])
        with pytest.raises(Locked, match="is in use by .*: wait for its end or stop it, or choose another folder"):
            predictions.Records(out, (0, 1), todo)
        with predictions.Records(out, (1, 3), []):  # a share of its own
            pass
        labelled(records, todo[1:])
    assert lines(out) == ({"a.png": 1, "b.png": 1, "c.png": 1}, 3)
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "c.png", "predictions.1-of-3.jsonl", "predictions.json", "predictions.jsonl"]


@pytest.mark.parametrize("killed", [False, True])
def test_masks_that_are_made_anew_keep_their_lines_until_then(todo, tmp_path, killed):
    out = tmp_path / "out"
    with predictions.Records(out, (0, 1), todo) as records:
        labelled(records, todo)
    records = predictions.Records(out, (0, 1), remaining(todo, overwrite=True))
    labelled(records, todo[:2], value=2)
    assert lines(out) == ({"a.png": 2, "b.png": 2, "c.png": 1}, 5)
    records._open.close() if killed else records.__exit__()
    with predictions.Records(out, (0, 1), remaining(todo)):  # nothing is left to be done
        pass
    assert remaining(todo) == [] and lines(out) == ({"a.png": 2, "b.png": 2, "c.png": 1}, 3)


def test_lines_without_masks_and_damaged_ones_go(todo, tmp_path):
    out = tmp_path / "out"
    with predictions.Records(out, (0, 1), todo) as records:
        labelled(records, todo)
    with (out / "predictions.jsonl").open("ab") as file:
        file.write(b'\xff\n[1]\n{"mask": 3}\n' + b"[" * 100_000 + b'\n{"mask": "cut')
    todo[0][1].mask.unlink()
    with predictions.Records(out, (0, 1), remaining(todo)):
        assert lines(out) == ({"b.png": 1, "c.png": 1}, 2)
    (out / "predictions.jsonl").unlink()
    (out / "predictions.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"predictions.jsonl is a folder, .*; move it away"):
        predictions.Records(out, (0, 1), todo)


def test_another_number_of_processes_leaves_one_line_a_mask(todo, tmp_path):
    out = tmp_path / "out"
    with predictions.Records(out, (0, 1), todo) as records:
        labelled(records, todo)
    for _, outputs in todo[:2]:
        outputs.mask.unlink()
    for number in (0, 1):
        share = remaining(todo[number::2])
        with predictions.Records(out, (number, 2), share) as records:
            labelled(records, share, value=3)
    assert [lines(out, f"predictions{part}.jsonl") for part in ("", ".0-of-2", ".1-of-2")] == [({"c.png": 1}, 1), ({"a.png": 3}, 1), ({"b.png": 3}, 1)]


def test_a_photograph_that_is_replaced_while_it_is_worked_on_is_done_again(todo, tmp_path):
    out = tmp_path / "out"
    with predictions.Records(out, (0, 1), todo) as records:
        for batch in predictions.batches(todo, 2, predictions.settings_since(out)):
            for photo, outputs in batch.outputs.items():
                if photo.stem == "b":
                    os.utime(photo, ns=(batch.read[photo] + 10**6,) * 2)
                labelled(records, [(photo, outputs)], read=batch.read[photo])
    assert [photo.stem for photo, _ in remaining(todo)] == ["b"]


def test_a_photograph_from_the_future_is_done_once(todo, tmp_path):
    later = moment(todo[0][0]) + 3600 * 10**9
    os.utime(todo[0][0], ns=(later, later))
    assert moment(todo[0][0]) == later
    with predictions.Records(tmp_path / "out", (0, 1), todo) as records:
        labelled(records, todo[:1], read=moment(todo[0][0], predictions.settings_since(tmp_path / "out")))
    assert remaining(todo) == todo[1:]


def test_what_is_no_mask_and_a_photograph_that_is_gone_are_not_done(todo, tmp_path):
    with predictions.Records(tmp_path / "out", (0, 1), todo) as records:
        labelled(records, todo)
    todo[0][1].mask.write_bytes(b"")
    todo[1][1].mask.unlink()
    todo[1][1].mask.mkdir()
    todo[2][0].unlink()
    assert remaining(todo) == todo
    (batch,) = predictions.batches(todo[2:], 2)
    assert batch.images == {} and batch.failures == {todo[2][0]: f"{todo[2][0]} does not exist"}


@pytest.mark.parametrize("text", ["[1]", "1", "null", "{", "[" * 100_000])
def test_damaged_settings_are_named(todo, tmp_path, text):
    (tmp_path / "out" / "predictions.json").write_text(text)
    with pytest.raises(ValueError, match=r"predictions.json is damaged \(.*\); remove it and use --overwrite"):
        remaining(todo)


def test_links_in_a_circle_are_problems_of_single_photographs(todo, tmp_path):
    del todo
    (tmp_path / "x.jpg").symlink_to(tmp_path / "y.jpg")
    (tmp_path / "y.jpg").symlink_to(tmp_path / "x.jpg")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.png").symlink_to(tmp_path / "masks" / "a.png")
    found = planned_outputs([str(tmp_path / "*.*")], tmp_path / "masks", overlays=False, probabilities=False)
    assert [photo.name for photo, _ in found] == ["a.png", "b.png", "c.png"]
    found = planned_outputs([str(tmp_path)], tmp_path / "masks", overlays=False, probabilities=False)
    (batch,) = predictions.batches(found, 8)
    assert [path.name for path in batch.failures] == ["x.jpg", "y.jpg"] and len(batch.images) >= 3
