"""What stands in deploy/: the scripts for SLURM are run with what SLURM would set, the container file and the job are read."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from environments import copied_clone, new_environment, pip
from PIL import Image
from programs import ROOT, SMALL, TINY
from test_pages import flags_of

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
# One task after the other, as srun would start them side by side; of several the highest exit code.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
code=0
for ((SLURM_PROCID = 0; SLURM_PROCID < SLURM_NTASKS; SLURM_PROCID++)); do
  export SLURM_PROCID SLURM_LOCALID=$SLURM_PROCID
  "$@" || { last=$?; code=$((last > code ? last : code)); }
done
exit "$code"
"""
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'


def script(folder, name, *arguments, tasks=1, **variables):
    """How a script ends where `srun` and `scontrol` are ours."""
    (folder / "bin").mkdir(exist_ok=True)
    for tool, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / tool).write_text(text)
        (folder / "bin" / tool).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": str(tasks), "SLURM_JOB_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost",
             "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}  # fmt: skip
    environment = os.environ | slurm | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"} | {name: str(value) for name, value in variables.items()}
    return subprocess.run([DEPLOY / name, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["slurm_predict.sh", "slurm_train.sh"])
def test_a_script_says_what_it_needs_and_is_bash(name, tmp_path):
    assert subprocess.run(["bash", "-n", DEPLOY / name], check=False).returncode == 0
    ended = script(tmp_path, name)
    assert ended.returncode != 0 and "RUN: the folder" in ended.stderr and ended.stdout == ""
    asked = re.findall(r"^#SBATCH --([\w-]+)=?\S*$", (DEPLOY / name).read_text(), re.MULTILINE)
    assert {"nodes", "ntasks-per-node", "time", "signal", "requeue"} <= set(asked)


@pytest.mark.parametrize(("name", "command"), [("slurm_predict.sh", "predict"), ("slurm_train.sh", "train")])
def test_a_script_starts_the_command_and_is_queued_again_when_its_time_is_over(name, command, tmp_path):
    lcrf = tmp_path / "lcrf.sh"
    lcrf.write_text('#!/bin/bash\nprintf "<%s>" "$@"; echo; exit "${CODE:-0}"\n')
    lcrf.chmod(0o755)
    variables = {"LCRF": f"bash {lcrf}", "RUN": "/a run", "PHOTOS": "/photos", "MASKS": "/masks"}
    ended = script(tmp_path, name, "--more=1 2", tasks=2, **variables)
    assert ended.returncode == 0 and len(ended.stdout.splitlines()) == 2, ended.stderr
    for number, line in enumerate(ended.stdout.splitlines()):
        assert line.startswith(f"<{command}>") and line.endswith("<--more=1 2>") and "=/a run>" in line
        assert command == "train" or f"<--num_processes=2><--process_id={number}>" in line
        assert all(f'"{flag}"' in flags_of(f"experiments.{command}") for flag in re.findall(r"<--(\w+)", line) if flag != "more")
    over = script(tmp_path, name, CODE=143, **variables)
    assert over.returncode == 143 and over.stdout.endswith("scontrol requeue 77\n")
    failed = script(tmp_path, name, CODE=1, **variables)
    assert failed.returncode == 1 and "scontrol" not in failed.stdout


@pytest.mark.slow
def test_the_scripts_for_slurm_train_and_predict(checkpoint, tmp_path):
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    for name in "abc":
        Image.new("RGB", (40, 30), "red").save(photos / f"{name}.jpg")
    (tmp_path / "lcrf").write_text(f'#!/bin/bash\nexec {sys.executable} -m "experiments.$1" "${{@:2}}"\n')
    lcrf = f"bash {tmp_path / 'lcrf'}"
    ended = script(tmp_path, "slurm_predict.sh", "--nooverlays", tasks=2, LCRF=lcrf, RUN=checkpoint, PHOTOS=photos, MASKS=masks)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in masks.glob("*.png")) == ["a.png", "b.png", "c.png"]
    trained = script(tmp_path, "slurm_train.sh", TINY, *SMALL, LCRF=lcrf, RUN=tmp_path / "run")
    assert trained.returncode == 0 and "mIoU" in trained.stdout, trained.stderr


def test_the_container_has_what_its_file_copies_and_no_more_rights_than_it_needs():
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").split()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists() and f"!{name.partition('/')[0]}" in ignored, name
    assert DOCKERFILE.index("\nUSER lcrf") < DOCKERFILE.index("\nENTRYPOINT") and "--no-cache-dir" in DOCKERFILE
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "/root" not in last and "pip install" not in last and not re.search(r"^ADD|curl", last, re.MULTILINE)
    printed = re.findall(r"--build-arg (\w+)=", (ROOT / "docs/jobs.md").read_text(encoding="utf-8"))
    assert set(printed) <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def test_the_job_of_ray_has_flags_that_exist_and_the_keys_of_its_kind():
    yaml = pytest.importorskip("yaml")
    job = yaml.safe_load((DEPLOY / "ray_job.yaml").read_text(encoding="utf-8"))
    words = shlex.split(job["spec"]["entrypoint"])
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and words[:2] == ["lcrf", "predict"]
    assert all(f'"{word[2:].partition("=")[0]}"' in flags_of("experiments.predict") for word in words[2:])
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        [container] = group["template"]["spec"]["containers"]
        assert container["volumeMounts"][0]["name"] == group["template"]["spec"]["volumes"][0]["name"]
    assert groups[1]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.slow
def test_pip_resolves_what_the_container_installs(tmp_path):
    new, copy = new_environment(tmp_path), copied_clone(tmp_path)
    [line] = re.findall(r"pip install (.*)", DOCKERFILE)
    words = shlex.split(line.replace("${EXTRAS}", "train").replace("${PACKAGES}", ""))
    for name in ("requirements.txt", "experiments/ray_requirements.txt"):
        (copy / name.rpartition("/")[2]).write_text((ROOT / name).read_text(encoding="utf-8"))
    ended = pip(new, "install", "--dry-run", "--quiet", "--report=-", *words[1:], cwd=copy)
    assert ended.returncode == 0 and all(f'"name": "{name}"' in ended.stdout for name in ("ray", "jax", "flax")), ended.stderr
