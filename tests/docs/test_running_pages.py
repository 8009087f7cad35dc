"""Every Python block of the pages, and the notebook, from the first line to the last."""

import json
import pathlib
import shutil

import numpy as np
import programs
import pytest
from pages import ROOT, blocks, run_block, run_page
from PIL import Image
from test_pages import tool

pytestmark = pytest.mark.slow


@pytest.fixture
def photograph(tmp_path, monkeypatch):
    """The current folder, with the photograph of a cat."""
    data = pytest.importorskip("skimage.data")
    Image.fromarray(data.chelsea()).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    return data.chelsea()


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_example_runs_as_printed(page, photograph, capsys):
    names = {}
    run_block(blocks(page)[0], names, page)
    found = names["found"]
    assert found.labels.shape == found.confidence.shape == photograph.shape[:2]
    assert (found.labels == found.class_names.index("cat")).mean() > 0.5
    if page == "README.md":
        assert "cat " in capsys.readouterr().out and pathlib.Path("overlay.jpg").is_file()
        with Image.open("mask.png") as mask:
            np.testing.assert_array_equal(np.asarray(mask), found.labels)
            assert mask.mode == "P"


def test_the_page_of_the_dense_crf():
    names = run_page("docs/crf.md")
    bright = names["image"][:, :, 0] == 200
    assert ((names["probs"].argmax(-1) == 1) != bright).mean() > 0.25
    np.testing.assert_array_equal(names["labels"], bright)
    assert names["weaker"].shape == (40, 56, 2)
    assert int(names["posterior"].num_iterations) == 5 and not names["posterior"].overflowed
    np.testing.assert_array_equal(names["refined"].argmax(-1), bright)
    assert names["energy"] > 0 and np.isfinite(names["slope"]).all()
    assert np.isfinite(names["gradient"]) and names["gradient"] != 0


def test_the_page_for_those_who_come_from_pydensecrf():
    names = run_page("docs/pydensecrf.md")
    np.testing.assert_array_equal(names["labels"], names["image"][:, :, 0] == 200)


def test_the_page_of_losses_trains_with_each_of_them():
    names = run_page("docs/losses.md")
    assert len(names["right"]) == 9
    assert {name: share for name, share in names["right"].items() if share < 0.85} == {}
    chance = (names["truth"] == 0).mean()
    assert chance < 0.85


def test_the_page_of_choices():
    names = run_page("docs/choosing.md")
    assert names["by_area"] < 0 and names["by_rank"] < 0
    for terms in (names["terms"], names["relaxed"], names["certain"]):
        assert np.isfinite(terms.bound) and terms.pairwise_energy == 0


def test_the_page_of_the_engine():
    names = run_page("docs/engine.md")
    np.testing.assert_array_equal(names["log_probs"].argmax(-1), names["scan"][..., 0] > 50)


def test_the_pages_of_photographs_and_export(tiny_run, tmp_path, monkeypatch):
    assert tiny_run[1].code == 0, tiny_run[1].err
    for name in ("photos", "demo"):
        shutil.copytree(tiny_run[0], tmp_path / "runs" / name)
    pathlib.Path(tmp_path / "photos/images").mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    for name in ("photos/images/0000.jpg", "photo.jpg"):
        Image.fromarray(picture).save(tmp_path / name)
    exported = programs.run("export", f"--checkpoint={tmp_path / 'runs/demo'}", f"--out={tmp_path / 'model.stablehlo'}")
    assert exported.code == 0, exported.err
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/photographs.md")
    assert names["result"].labels.shape == (48, 64)
    names = run_page("docs/export.md")
    assert names["labels"].shape == (48, 64)


def test_the_notebook_runs():
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    names = tool("notebook").run(notebook, "tutorial.ipynb")
    assert (names["after"]).mean() > 0.5
    import lcrf_jax

    assert lcrf_jax.mean_iou(names["counts"]) > 0.6
    saved = [cell["outputs"] for cell in json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"] if "outputs" in cell]
    again = [cell["outputs"] for cell in notebook["cells"] if "outputs" in cell]
    kinds = [[sorted(output.get("data", {})) for output in outputs] for outputs in again]
    assert kinds == [[sorted(output.get("data", {})) for output in outputs] for outputs in saved]
