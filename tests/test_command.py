"""The command `lcrf`, what an install has, and that the files which tell the version agree."""

import ast
import configparser
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys

import pytest

import lcrf_jax
from experiments import beginning
from lcrf_jax import command

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = {path.stem: path for path in (ROOT / "experiments").glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")}
JOBS = {"crf_measurements", "scale_measurements"}  # it answers to the processes that bench starts; of the project itself


def setup():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def test_every_program_has_a_command():
    assert {module for module, _ in command.COMMANDS.values()} == set(PROGRAMS) - JOBS


def test_the_commands_are_listed_at_once_each_in_a_line_and_without_jax():
    code = "import sys; from lcrf_jax.command import main; main([]); print(sorted({'jax', 'numpy', 'absl', 'tqdm'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, loaded = ended.stdout.splitlines()
    assert loaded == "[]" and max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[4 : 4 + len(command.COMMANDS)]] == list(command.COMMANDS)


@pytest.mark.parametrize("given", [[], ["--help"], ["-h"], ["help"]])
def test_help_in_every_way(given, capsys):
    command.main(given)
    assert "lcrf train --config=folder" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["--version", "-V", "version"])
def test_the_version(given, capsys):
    command.main([given])
    assert capsys.readouterr().out == f"lcrf_jax {lcrf_jax.__version__}\n"


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("evalute", "evaluate"), ("prediction", "predict"), ("zzz", None)])
def test_a_command_that_there_is_not(typed, meant):
    with pytest.raises(SystemExit) as ended:
        command.main([typed])
    question = f"did you mean '{meant}'? " if meant else ""
    assert ended.value.code == f"error: there is no command {typed!r}: {question}lcrf --help lists them"


@pytest.mark.parametrize(("typed", "module"), [
    ("check", "check_data"), ("check_data", "check_data"), ("check-data", "check_data"), ("build-voc", "build_voc"), ("train", "train"),
])  # fmt: skip
def test_a_command_runs_the_program_as_python_does(monkeypatch, typed, module):
    called = []
    monkeypatch.setattr(runpy, "run_module", lambda *given, **options: called.append((given, options, list(sys.argv))))
    monkeypatch.setattr(sys, "argv", ["lcrf"])
    monkeypatch.setattr(command, "_is_there", lambda package: package == "lcrf_jax.experiments")
    command.main([typed, "--config=tiny"])
    command.main(["help", typed])
    names = ((f"lcrf_jax.experiments.{module}",), {"run_name": "__main__", "alter_sys": True})
    assert called == [(*names, ["lcrf", "--config=tiny"]), (*names, ["lcrf", "--help"])]


def test_a_command_without_the_programs(monkeypatch):
    monkeypatch.setattr(command, "_is_there", lambda package: False)
    with pytest.raises(SystemExit, match=r"error: the programs are not installed beside lcrf_jax: pip install '\.\[train\]'"):
        command.main(["train"])


def test_an_install_has_every_package_and_no_top_level_experiments():
    config = setup()
    folders = {".".join(path.parent.relative_to(ROOT).parts) for folder in ("lcrf_jax", "experiments") for path in (ROOT / folder).rglob("__init__.py")}
    installed = {re.sub(r"^experiments\b", "lcrf_jax.experiments", name) for name in folders}
    assert set(config["options"]["packages"].split()) == installed
    assert config["options"]["package_dir"].split() == ["lcrf_jax.experiments", "=", "experiments"]
    assert config["options.entry_points"]["console_scripts"].split() == ["lcrf", "=", "lcrf_jax.command:main"]


def test_every_file_beside_the_programs_is_installed():
    data = {name: value.replace(",", " ").split() for name, value in setup()["options.package_data"].items()}
    for folder, package in (("lcrf_jax", "lcrf_jax"), ("experiments", "lcrf_jax.experiments")):
        there = {path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
        named = set()
        for name, patterns in data.items():
            if name.startswith(package) and (package == "lcrf_jax.experiments") == name.startswith("lcrf_jax.experiments"):
                home = ROOT / folder / name.removeprefix(package).replace(".", "/").strip("/")
                named |= {path for pattern in patterns for path in home.glob(pattern)}
        assert there == named


def test_the_programs_import_each_other_by_names_that_hold_in_a_clone_and_in_an_install():
    for path in (ROOT / "experiments").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        absolute = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        absolute |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not {name for name in absolute if name.partition(".")[0] == "experiments"}, f"{path.name}: write from . import"
        if path.parent.name == "configs":  # they are loaded as files, like those of users
            assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom)), path.name


def test_the_version_has_one_place():
    assert setup()["metadata"]["version"] == "attr: lcrf_jax.__version__"
    assert re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1] == lcrf_jax.__version__
    assert f"## [{lcrf_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_has_its_names_before_they_are_imported():
    assert set(lcrf_jax.__all__) <= set(dir(lcrf_jax))
    code = "import sys, lcrf_jax; early = 'jax' in sys.modules; lcrf_jax.crf.params; lcrf_jax.KernelParams; print(early, 'jax' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "False True\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lcrf_jax.nothing  # noqa: B018


def test_a_reader_who_has_gone_ends_the_list_without_a_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as target:
        ended = subprocess.run([sys.executable, "-m", "lcrf_jax.command"], cwd=ROOT, stdout=target, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGPIPE and ended.stderr == ""


@pytest.mark.parametrize(("called", "answers"), [("/usr/bin/lcrf", True), ("lcrf", True), ("/usr/bin/pytest", False), ("lcrf.py", False)])
def test_signals_are_answered_while_the_command_imports(monkeypatch, called, answers):
    monkeypatch.setattr(sys, "argv", [called, "train"])
    monkeypatch.setattr(sys, "orig_argv", ["python", called, "train"])
    assert beginning._is_program() == answers
