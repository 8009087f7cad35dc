"""What the README says can be typed, can be typed."""

import importlib
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCALING, FAULTS, PHOTOGRAPHS, ORIGINAL, EXPORT, CARD = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("scaling", "faults", "photographs", "original", "export", "model_card")
)


@pytest.mark.slow
def test_the_first_example_runs_as_printed(tmp_path, monkeypatch):
    data = pytest.importorskip("skimage.data")
    Image.fromarray(data.chelsea()).save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    code, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (our own README)
    found = names["found"]
    assert found.labels.shape == found.confidence.shape == data.chelsea().shape[:2]
    assert (found.labels == found.class_names.index("cat")).mean() > 0.5


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_the_library_example_runs():
    *_, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (our own README)
    assert names["gradient"].shape == (576, 4) and jnp.isfinite(names["gradient"]).all()
    # Background and class 2 are tagged: raising their logits must lower the loss, raising the others must not.
    descent = -names["gradient"].sum(axis=0)
    assert descent[0] > 0 and descent[2] > 0 and descent[1] < 0 and descent[3] < 0
    assert names["labels"].shape == (576,)


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_the_example_of_the_dense_crf_runs_as_printed():
    _, code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (our own README)
    bright = names["image"][:, :, 0] == 200
    assert bright.sum() == 1200 and ((names["probs"].argmax(-1) == 1) != bright).mean() > 0.25
    np.testing.assert_array_equal(names["labels"], bright)


def test_every_flag_and_config_of_the_commands_exists():
    text = (README + SCALING + PHOTOGRAPHS + ORIGINAL + EXPORT).replace("\\\n", " ")
    commands = re.findall(r"^ {4}.*?python -m (experiments\.\w+) +(.*)$", text, re.MULTILINE)
    assert {module for module, _ in commands} >= {"experiments.train", "experiments.evaluate", "experiments.predict"}
    for module, arguments in commands:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        if "define_process_flags()" in source:
            source += (ROOT / "experiments" / "reporting.py").read_text(encoding="utf-8")
        for flag in re.findall(r"--(\w+)(?=[=\s]|$)", arguments):
            assert f'"{flag}"' in source, (module, flag)
        for config in re.findall(r"--config=(\S+)", arguments):
            assert config == "CONFIG" or (ROOT / config).is_file()


def test_settings_named_in_the_readme_exist():
    for name, text in (("folder", README + SCALING + PHOTOGRAPHS), ("voc2012", ORIGINAL + EXPORT)):
        config = importlib.import_module(f"experiments.configs.{name}").get_config()
        for dotted in set(re.findall(r"--config\.([a-z_.]+)=", text)):
            value = config
            for part in dotted.split("."):
                value = value[part]


def test_files_and_pictures_of_the_readme_exist():
    for folder, text in ((ROOT, README), (ROOT / "docs", PHOTOGRAPHS + SCALING + FAULTS + ORIGINAL + EXPORT + CARD)):
        for path in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
            assert (folder / path).is_file(), path


def test_every_fault_of_the_page_has_a_test():
    defined = {name for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}  # fmt: skip
    faults = FAULTS[: FAULTS.index("\n## What it costs")]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= defined, row
