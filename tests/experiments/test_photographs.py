"""The page "Your own photographs": every command of its first block, on the small network, and the example in Python."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image
from programs import SMALL_FOLDER, run

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "photographs.md").read_text(encoding="utf-8")


SLOW_FIXTURES = ("ended",)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """How each program of the page ended, in its order; the network of the training is a small one."""
    folder = tmp_path_factory.mktemp("own")
    block = TEXT.split("## The folder")[0]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LCRF_JAX_CACHE", str(folder / "cache"))
        for program, line in re.findall(r"^ {4}python -m experiments\.(\w+) (.*)$", block, re.MULTILINE):
            arguments = [re.sub(r"=(photos|masks|runs/photos)\b", rf"={folder}/\1", part) for part in shlex.split(line)]
            if program == "train":
                arguments += SMALL_FOLDER[1:]
            if program != "demo":
                found[program] = run(program, *arguments)
    return folder, found


def test_every_command_of_the_page_works_as_it_is_printed(ended):
    _, found = ended
    assert list(found) == ["example_folder", "check_data", "train", "evaluate", "predict"]
    for program, end in found.items():
        assert end.code == 0, (program, end.err)
    table = re.search(r"    split  photographs.*?no problems: training can begin", TEXT, re.DOTALL).group()
    for line in table.replace("    ...\n", "").splitlines():
        assert line.strip() == "" or line[4:] in found["check_data"].out, line
    assert "48 training images with tags of 6 classes" in found["train"].out
    assert re.fullmatch(r"mIoU 0\.\d{3}", found["evaluate"].last_line)
    assert "60 masks in" in found["predict"].out and "images/s" in found["predict"].out


def test_masks_overlays_and_lines_of_all_60(ended):
    folder, _ = ended
    masks = sorted((folder / "masks").glob("*.png"))
    assert len(masks) == 60 == len(list((folder / "masks" / "overlays").glob("*.jpg")))
    lines = [json.loads(line) for line in (folder / "masks" / "predictions.jsonl").read_text().splitlines()]
    assert [line["mask"] for line in lines] == [path.name for path in masks]
    assert all(Image.open(path).size == (112, 112) for path in masks)


def test_the_report_has_both_scores_and_all_that_the_page_says(ended):
    folder, found = ended
    text = (folder / "runs" / "photos" / "report.html").read_text(encoding="utf-8")
    for part in ("Worst", "Best", "truth", ">refined<", "Intersection over union", "Confusion", "loss", "settings",
                 "image tags for training, no tags at test time", "mIoU, network", "mIoU, refined"):  # fmt: skip
        assert part in text, part
    shown = f"{100 * float(found['evaluate'].last_line.split()[1]):.1f} %"
    assert shown in text


def test_the_example_in_python(ended, monkeypatch):
    folder, _ = ended
    monkeypatch.chdir(folder)
    [code] = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names = {}
    exec(compile(code, "photographs.md", "exec"), names)  # noqa: S102 (our own page)
    assert names["result"].labels.shape == (112, 112)
    np.testing.assert_array_equal(names["result"].labels, np.asarray(Image.open(folder / "masks" / "0000.png")))
