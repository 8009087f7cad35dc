"""What the README says can be typed, can be typed."""

import importlib
import pathlib
import re

import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_library_example_runs():
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (our own README)
    assert names["gradient"].shape == (576, 4) and jnp.isfinite(names["gradient"]).all()
    # Background and class 2 are tagged: raising their logits must lower the loss, raising the others must not.
    descent = -names["gradient"].sum(axis=0)
    assert descent[0] > 0 and descent[2] > 0 and descent[1] < 0 and descent[3] < 0
    assert names["labels"].shape == (576,)


def test_every_flag_and_config_of_the_commands_exists():
    commands = re.findall(r"^ {4}python -m (experiments\.\w+) +(.*)$", README, re.MULTILINE)
    assert {module for module, _ in commands} >= {"experiments.train", "experiments.evaluate", "experiments.predict"}
    for module, arguments in commands:
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        for flag in re.findall(r"--(\w+)(?=[=\s]|$)", arguments):
            assert f'"{flag}"' in source, (module, flag)
        for config in re.findall(r"--config=(\S+)", arguments):
            assert (ROOT / config).is_file()


def test_settings_named_in_the_readme_exist():
    config = importlib.import_module("experiments.configs.base").get_config()
    for dotted in set(re.findall(r"--config\.([a-z_.]+)=", README)):
        value = config
        for name in dotted.split("."):
            value = value[name]


def test_files_and_pictures_of_the_readme_exist():
    for path in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / path).is_file(), path
