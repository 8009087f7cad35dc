"""New environments of Python, and copies of the clone to install there."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest
from programs import ROOT


def pip(python, *arguments, **options):
    """What `pip ARGUMENTS` came to in the environment of a Python."""
    command = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def new_environment(folder):
    """The Python of a new environment in a folder; skips the test where there is no package index."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "new"], check=True)
    python = folder / "new/bin/python"
    reached = pip(python, "download", "--quiet", "--no-deps", "--retries=1", f"--dest={folder / 'probe'}", "setuptools")
    if reached.returncode:
        pytest.skip(f"no package index can be reached: {reached.stderr.strip().splitlines()[-1]}")
    return python


def on_top(folder, requirements):
    """The Python of a new environment that has the packages of this one and those of a file; skips the test where they cannot be had."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "on_top"], check=True)
    python = folder / "on_top/bin/python"
    own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True)
    pathlib.Path(own.stdout.strip(), "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    installed = pip(python, "install", "--quiet", "--no-compile", "-r", requirements)
    if installed.returncode:
        pytest.skip(f"the packages of {requirements.name} cannot be installed: {installed.stderr.strip()[-300:]}")
    return python


def copied_clone(folder):
    """A copy of what is installed from the clone: pip writes into the folder that it builds."""
    copy = folder / "clone"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("lcrf_jax", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy
