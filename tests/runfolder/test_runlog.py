import io
import json
import math
import os
import re
import sys
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from lcrf_jax.machine.progress import Progress
from lcrf_jax.runfolder.metrics import MetricsWriter, metrics_history


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def board_scalars(run):
    """(step, name, value) in the TensorBoard files: of length, checksum, content, checksum."""
    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at:at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12:at + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 12 + length + 4
    return found


def test_each_write_is_a_line_at_once_and_a_point_on_the_board(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"train/loss": 0.5, "train/kl": jnp.float32(0.25)})
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 1
        record = json.loads(lines[0])
        assert record.pop("time") > 1e9
        assert record == {"step": 1, "train/loss": 0.5, "train/kl": 0.25}
        writer.write(jnp.asarray(2), {"val/miou": np.array([0.75])})
    assert [record["step"] for record in metrics_history(tmp_path / "run")] == [1, 2]
    assert board_scalars(tmp_path / "run") == [
        (1, "train/loss", 0.5), (1, "train/kl", 0.25), (2, "val/miou", 0.75)]


def test_without_tensorboardx_a_run_says_so_once_and_writes_its_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 0.5})
        writer.write(2, {"loss": 0.25})
    writer.close()
    assert [record["loss"] for record in metrics_history(tmp_path)] == [0.5, 0.25]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no TensorBoard files are written (")
    assert line.endswith("): pip install '.[tensorboard]' in your clone")


def test_a_board_whose_thread_has_met_a_full_disk_is_told_once_and_not_waited_for(tmp_path, capsys):
    class Dead:
        file_writer = types.SimpleNamespace(event_writer=types.SimpleNamespace(_worker=threading.Thread()))

        def add_scalar(self, *_):
            raise AssertionError("its queue would fill up")

    with MetricsWriter(tmp_path) as writer:
        writer._board.close()
        writer._board = Dead()
        for step in (1, 2):
            writer.write(step, {"loss": 0.5})
    assert capsys.readouterr().out.count("no TensorBoard files are written any more") == 1
    assert len(metrics_history(tmp_path)) == 2


def test_values_that_are_not_finite_stay_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": math.nan, "other": -math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert math.isnan(metrics_history(tmp_path)[0]["loss"])


def test_a_resumed_run_appends_and_each_step_stands_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(5):
            writer.write(step, {"loss": float(step)})
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        for step in range(3, 6):
            writer.write(step, {"loss": 10.0 + step})
    history = metrics_history(tmp_path)
    assert [(record["step"], record["loss"]) for record in history] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0)]
    with MetricsWriter(tmp_path):
        assert len(metrics_history(tmp_path)) == 6


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 1.0})
        writer.write(1, {"loss": 2.0})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [record["step"] for record in metrics_history(tmp_path)] == [0]
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 3.0})
    assert [record["loss"] for record in metrics_history(tmp_path)] == [1.0, 3.0]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_a_line_that_is_not_json_is_named_and_nothing_written_is_no_history(tmp_path):
    assert metrics_history(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnonsense\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: expected JSON with a step, got 'nonsense'"):
        metrics_history(tmp_path)


@pytest.mark.parametrize("line", [b"3", b"[]", b'{"loss": 1}', b'{"step": "2"}', b"\xff\xfe", b""])
def test_a_damaged_line_is_named_and_one_at_the_end_dropped(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 1}\n')
    for read in (metrics_history, MetricsWriter):
        with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected JSON with a step"):
            read(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + (line or b"{"))
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
    assert [record["step"] for record in metrics_history(tmp_path)] == [0, 1]


def test_refuses_what_is_no_scalar_and_taken_names(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=r"expected a scalar for 'iou', got shape \(3,\)"):
            writer.write(0, {"iou": np.zeros(3)})
        with pytest.raises(ValueError, match="another name than 'step'"):
            writer.write(0, {"step": 1.0})
    assert metrics_history(tmp_path) == []


def test_plain_lines_where_there_is_no_terminal():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, first_step=90, stream=stream, seconds_between_lines=2.0, clock=clock) as progress:
        for step in range(10):
            clock.now += 0.5
            metrics = {"kl": 0.125, "loss": 1.0 / (step + 1)} if step < 4 else None
            progress.update(num_images=8, metrics=metrics)
        progress.message("val mIoU 0.500")
    assert stream.getvalue().splitlines() == [
        "train 94/100  16.0 images/s, loss 0.25, kl 0.125",
        "train 98/100  16.0 images/s, loss 0.25, kl 0.125",
        "val mIoU 0.500",
        "train 100/100  16.0 images/s, loss 0.25, kl 0.125",
    ]
    assert "\r" not in stream.getvalue()


def test_the_last_line_is_printed_once():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1, stream=stream, clock=clock, counted="step")
    clock.now += 20
    progress.update(num_images=4)
    progress.close()
    progress.close()
    assert stream.getvalue() == "train, step 1/1  0.2 images/s\n"


def test_a_bar_on_a_terminal_shows_terms_and_speed():
    stream, clock = Terminal(), Clock()
    with Progress(4, stream=stream, clock=clock, title="fit") as progress:
        for _ in range(4):
            clock.now += 1
            progress.update(num_images=2, metrics={"loss": 0.5})
        progress.message("a line of its own")
    text = stream.getvalue()
    assert "\r" in text and "fit" in text and "4/4" in text
    assert "loss 0.5, 2.0 images/s" in text and "a line of its own\n" in text


def test_speed_and_time_left_are_those_of_the_steps_after_the_first_which_compiles():
    stream, clock = Terminal(), Clock()
    with Progress(1000, stream=stream, clock=clock) as progress:
        progress.waiting("compiling")
        clock.now += 100
        for _ in range(11):
            progress.update(num_images=4, metrics={"kl": 7.0, "loss": 0.25})
            clock.now += 2
        progress._bar.refresh()
    text = stream.getvalue()
    assert "0/1000, compiling" in text
    assert "11/1000, loss 0.25, 2.0 images/s, 32:58 left" in text and "kl" not in text


def test_at_80_columns_the_bar_is_a_bar(monkeypatch):
    stream, clock = Terminal(), Clock()
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {name: 1.25 for name in ("entropy", "gradient_norm", "log_likelihood", "pairwise_energy", "skipped_steps", "loss")}
    with Progress(875, stream=stream, clock=clock, title="round 1", counted="step") as progress:
        progress._bar.ncols, progress._bar.dynamic_ncols = 80, None
        for _ in range(400):
            clock.now += 7
            progress.update(num_images=16, metrics=metrics)
        progress._bar.refresh()
    line = stream.getvalue().rsplit("\r", 1)[-1].rstrip("\n")
    assert len(line) <= 80 and len(re.search(r"\|(.*)\|", line)[1]) >= 10
    assert line.endswith("| step 400/875, loss 1.25, 2.3 images/s, 55:25 left")


def test_ways_of_progress(monkeypatch):
    def shown(way):
        monkeypatch.setenv("LCRF_JAX_PROGRESS", way)
        stream, clock = Terminal(), Clock()
        with Progress(2, stream=stream, clock=clock) as progress:
            for _ in range(2):
                clock.now += 20
                progress.update(num_images=4, metrics={"loss": 0.5, "kl": math.nan})
            progress.message("mIoU 0.5")
        return stream.getvalue()

    assert shown("quiet") == ""
    assert shown("lines").splitlines() == ["train 1/2  0.2 images/s, loss 0.5, kl nan", "train 2/2  0.2 images/s, loss 0.5, kl nan", "mIoU 0.5"]
    lines = [json.loads(line) for line in shown("json").splitlines()]
    assert lines[1] == {"title": "train", "step": 2, "steps": 2, "images_per_second": 0.2, "seconds_left": 0.0, "loss": 0.5, "kl": None}
    assert lines[2] == {"title": "train", "message": "mIoU 0.5"}
    with pytest.raises(ValueError, match="LCRF_JAX_PROGRESS: expected one of auto, lines, json, quiet, got 'loud'"):
        shown("loud")


def test_where_there_is_nothing_to_do_nothing_is_said():
    stream = io.StringIO()
    Progress(0, stream=stream, title="predict").close()
    assert stream.getvalue() == ""
