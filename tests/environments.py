"""New environments of Python, and copies of the clone to install there."""

import shutil
import subprocess
import sys

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


def copied_clone(folder):
    """A copy of what is installed from the clone: pip writes into the folder that it builds."""
    copy = folder / "clone"
    copy.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("lcrf_jax", "experiments"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy
