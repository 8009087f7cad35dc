"""Every install that is printed, in the pages and in the messages, is one that pip takes."""

import configparser
import pathlib
import re
import shlex
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRINTED_IN = [
    path
    for pattern in ("*.md", "docs/*.md", "docs/*.ipynb", "Makefile", ".github/**/*.yml", "lcrf_jax/**/*.py", "experiments/**/*.py")
    for path in sorted(ROOT.glob(pattern))
]
OPTIONS = {"-r", "--no-deps", "--editable", "--quiet", "--disable-pip-version-check", "--no-build-isolation"}


def printed_installs():
    """(file, arguments of pip install) of every place."""
    found = []
    for path in PRINTED_IN:
        for rest in re.findall(r"\bpip install ((?:(?!&&)[^\n`])*)", path.read_text(encoding="utf-8")):
            command = re.split(r" +[(#]|; |\)\.| in your clone|[\"',]{1,2}\) from|\"$|',$", rest)[0]
            found.append((path.relative_to(ROOT), shlex.split(command)))
    return found


def extras():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return {name: text.split() for name, text in setup["options.extras_require"].items()}


def test_every_extra_is_listed_on_the_page_of_installs():
    table = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").partition("| extra |")[2]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(extras())


def test_what_tests_need_is_all_but_the_accelerators():
    own = Requirement(next(line for line in extras()["test"] if line.startswith("lcrf_jax")))
    brought = {Requirement(line).name for name in {*own.extras, "test"} for line in extras()[name]}
    others = set(extras()) - {"cuda", "tpu", "dev", "docs", "lite1", "lite2", "ray"}  # weights of other backbones are for those who use them
    assert brought >= {Requirement(line).name for name in others for line in extras()[name]}
    assert "lcrf_jax[test]" in extras()["dev"]


def requirements_of_the_project():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup["options"]["install_requires"].split() + [line for lines in extras().values() for line in lines]


def of_the_site():
    """The pins of the environment that the documentation is built in, which the tests do not have."""
    text = (ROOT / "docs/tools/requirements.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def of_ray():
    """The pins of the environment that prediction by Ray is tested in."""
    text = (ROOT / "experiments/ray_requirements.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w-]+)(?:\[data\])?==(\S+)$", text, re.MULTILINE)) | {"pyarrow": metadata.version("pyarrow")}


def test_there_are_installs_to_look_at():
    printed = printed_installs()
    assert {str(path) for path, _ in printed} >= {"README.md", "docs/photographs.md", "experiments/demo.py", "lcrf_jax/nets/weights.py"}
    assert sum(any(word.startswith(".[") for word in words) for _, words in printed) >= 18


@pytest.mark.parametrize(("path", "words"), [pytest.param(*each, id=f"{each[0]} {' '.join(each[1])}") for each in printed_installs()])
def test_every_printed_install_is_one_that_pip_takes(path, words):
    words = iter(words)
    for word in words:
        if word == "-r":
            for line in (ROOT / next(words)).read_text(encoding="utf-8").splitlines():
                if line and not line.startswith("#"):
                    Requirement(line)
        elif word.startswith("-"):
            assert word in OPTIONS
        elif local := re.fullmatch(r"\.(?:\[([a-z,]+)\])?", word):
            assert set(filter(None, (local[1] or "").split(","))) <= set(extras()), f"{path} names an extra that is not there"
        else:
            assert "@" not in word and Requirement(word)


@pytest.mark.parametrize("line", sorted(set(requirements_of_the_project())))
def test_the_pinned_versions_are_within_the_ranges_of_the_package(line):
    wanted = Requirement(line)
    if wanted.name == "lcrf_jax":
        assert wanted.extras <= set(extras())
        return
    if line in extras()["lite1"] + extras()["lite2"]:
        assert str(wanted.specifier) == "==0.1.0"  # pinned there, and not installed for the tests
        return
    pinned = of_the_site() if line in extras()["docs"] else of_ray() if line in extras()["ray"] else {}
    assert wanted.specifier.contains(pinned[wanted.name] if pinned else metadata.version(wanted.name))


@pytest.mark.slow
def test_pip_resolves_every_extra_that_is_printed(tmp_path):
    """By pip itself, for a new environment; nothing is installed. Needs a package index, as the installation did."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "new"], check=True)
    named = {name for _, words in printed_installs() for word in words for name in re.findall(r"[a-z]+", word) if word.startswith(".[")}
    local = f".[{','.join(sorted(named - {'cuda', 'tpu'}))}]"
    pip = [sys.executable, "-m", "pip", "--python", tmp_path / "new/bin/python", "--disable-pip-version-check"]
    command = [*pip, "install", "--dry-run", local]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "does not provide the extra" not in ended.stderr and "lcrf_jax-" in ended.stdout.splitlines()[-1].replace("-jax", "_jax")
