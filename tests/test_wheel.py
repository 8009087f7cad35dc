"""A wheel, built by pip from a copy of the clone and installed beside nothing else of ours: the command works from any folder."""

import os
import pathlib
import subprocess
import sysconfig
import zipfile

import pytest
from environments import copied_clone, new_environment, pip
from programs import SHORT

ROOT = pathlib.Path(__file__).resolve().parent.parent
MINE = """
from lcrf_jax.experiments.configs import base, tiny

def get_config():
    config = tiny.get_config()
    config.data.options = base.options(seed=0, size=96, num_train=24, num_val=4)
    return config
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(wheel, folder of the programs of an environment that has it)."""
    folder = tmp_path_factory.mktemp("wheel")
    new, copy = new_environment(folder), copied_clone(folder)
    built = pip(new, "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", ".", cwd=copy)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    assert pip(new, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", wheel).returncode == 0
    own = sysconfig.get_path("purelib", vars={"base": str(folder / "new")})
    pathlib.Path(own, "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return wheel, folder / "new/bin"


def lcrf(bin_folder, away, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"LCRF_JAX_CACHE": str(away / "cache")}
    return subprocess.run([bin_folder / "lcrf", *arguments], cwd=away, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_wheel_has_one_package_and_every_file(installed):
    names = zipfile.ZipFile(installed[0]).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"lcrf_jax"}
    there = {path.relative_to(ROOT).as_posix() for folder in ("lcrf_jax", "experiments") for path in (ROOT / folder).rglob("*")
             if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert {name for name in names if ".dist-info" not in name} == {
        f"lcrf_jax/{name}" if name.startswith("experiments/") else name for name in there
    }


@pytest.mark.slow
def test_the_command_trains_and_scores_from_another_folder_with_a_configuration_of_ones_own(installed, tmp_path):
    bin_folder = installed[1]
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    trained = lcrf(bin_folder, tmp_path, "train", "--config=mine.py", *SHORT, "--config.epochs=1", "--workdir=run", "--progress=json")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.splitlines()[-1].startswith("mIoU 0.") and "lcrf cache list tells" in trained.stdout
    assert '"title": "train", "step": 3, "steps": 3, "images_per_second"' in trained.stderr
    scored = lcrf(bin_folder, tmp_path, "evaluate", "--checkpoint=run", "--progress=quiet")
    assert scored.returncode == 0 and scored.stderr == "" and scored.stdout.splitlines()[-1] == trained.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_command_knows_its_configurations_and_speaks_of_itself(installed, tmp_path):
    bin_folder = installed[1]
    assert lcrf(bin_folder, tmp_path, "--version").stdout.startswith("lcrf_jax ")
    printed = lcrf(bin_folder, tmp_path, "train", "--config=tiny", "--print_config")
    assert printed.returncode == 0 and "--config.input_size=96" in printed.stdout
    told = lcrf(bin_folder, tmp_path, "train", "--help").stdout
    assert "lcrf train --config=textures --workdir=runs/textures" in told and "python -m" not in told
    wrong = lcrf(bin_folder, tmp_path, "trian")
    assert (wrong.returncode, wrong.stdout) == (1, "") and "did you mean 'train'?" in wrong.stderr
    python = [bin_folder / "python", "-c", "import importlib.util as u; print(u.find_spec('experiments'), u.find_spec('tests'))"]
    assert subprocess.run(python, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "None None\n"
