"""What `pip install .` brings, jax, numpy and einops, is enough for the pure rooms; the rest names its extra."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from environments import copied_clone, new_environment, pip
from test_house import CORE, PURE_MODULES, module_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
OF_JAX = {"jaxlib", "ml_dtypes", "opt_einsum", "scipy"}
HEAVY = {"absl-py", "flax", "grain", "ml_collections", "optax", "orbax-checkpoint", "pillow", "tensorboardx", "tqdm"}

USE = f"""
    import importlib
    import numpy as np
    import lcrf_jax

    for name in {sorted(map(module_of, PURE_MODULES))!r}:
        importlib.import_module(name)
    for name in lcrf_jax.__all__:
        getattr(lcrf_jax, name)

    image = np.full((12, 16, 3), 40, np.uint8)
    image[3:9, 4:12] = 200
    probs = np.where((image[..., 0] > 99)[..., None], (0.2, 0.8), (0.8, 0.2))
    probs[5, 7] = (0.8, 0.2)
    labels = lcrf_jax.refine(image, np.log(probs), lcrf_jax.KernelParams()).argmax(-1)
    assert (labels == (image[..., 0] > 99)).all(), labels

    try:
        lcrf_jax.load("run")
    except ImportError as error:
        print(error)
"""
REFUSE = f"""
    import sys
    from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

    class Light:
        @staticmethod
        def find_spec(name, path=None, target=None):
            root = name.partition(".")[0]
            known = root in {sorted(CORE | OF_JAX | {"lcrf_jax", "experiments"})!r} or root.startswith("_sysconfigdata")
            return PathFinder.find_spec(name, path, target) if known or root in sys.stdlib_module_names else None

    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Light]
"""


def python(executable, code, folder, **environment):
    return subprocess.run([executable, "-c", textwrap.dedent(code)], cwd=folder, env=os.environ | environment,
                          capture_output=True, text=True, check=False)  # fmt: skip


def says_what_is_missing(ended):
    assert ended.returncode == 0, ended.stderr
    (line,) = ended.stdout.splitlines()
    assert line.startswith("lcrf_jax.load needs what training needs (No module named ")
    assert line.endswith("): pip install '.[train]' in your clone")


def test_the_pure_rooms_work_where_nothing_else_can_be_imported(tmp_path):
    code = textwrap.dedent(REFUSE) + textwrap.dedent(USE)
    says_what_is_missing(python(sys.executable, code, tmp_path, PYTHONPATH=str(ROOT)))


def test_a_program_says_what_is_missing(tmp_path):
    code = textwrap.dedent(REFUSE) + "import runpy\nrunpy.run_module('experiments.train', run_name='__main__')"
    ended = python(sys.executable, code, tmp_path, PYTHONPATH=str(ROOT))
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: the programs need absl, array_record, flax, ")
    assert ended.stderr.endswith(": pip install '.[train]' in your clone\n") and ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_pip_installs_the_core_without_the_rest(tmp_path):
    """In a new environment, from a copy of the clone."""
    new, copy = new_environment(tmp_path), copied_clone(tmp_path)
    installed = pip(new, "install", "--quiet", "--no-compile", ".", cwd=copy)
    assert installed.returncode == 0, installed.stderr
    listing = pip(new, "list", "--format=freeze")
    assert listing.returncode == 0, listing.stderr
    listed = listing.stdout
    there = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert there >= {"lcrf-jax", "jax", "numpy", "einops"}
    assert not there & {name.replace("_", "-") for name in HEAVY}
    assert there <= {"lcrf-jax", *CORE, *(name.replace("_", "-") for name in OF_JAX)}
    says_what_is_missing(python(new, USE, tmp_path, PYTHONPATH=""))
    program = [new, "-m", "experiments.train", "--help"]
    ended = subprocess.run(program, cwd=copy, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert ended.stderr.endswith("pip install '.[train]' in your clone\n")
    ended = subprocess.run([tmp_path / "new/bin/lcrf", "train"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.startswith("error: the programs need absl, ") and ended.stderr.count("\n") == 1
    listed = subprocess.run([tmp_path / "new/bin/lcrf"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert listed.returncode == 0 and "lcrf COMMAND" in listed.stdout and listed.stderr == ""
