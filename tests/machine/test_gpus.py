"""Which GPUs a process takes, in the environments of launchers; no GPU is needed."""

import os

import jax
import pytest

from lcrf_jax.machine import gpus, processes
from lcrf_jax.machine.gpus import Choice, Place, chosen_gpus, num_visible_gpus, place_on_host


def slurm(local, tasks, *, node=0, number=None, total=None, **others):
    number, total = local if number is None else number, sum(gpus._expanded(tasks)) if total is None else total
    return {"SLURM_LOCALID": f"{local}", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": f"{node}", "SLURM_PROCID": f"{number}",
            "SLURM_NTASKS": f"{total}", **others}  # fmt: skip


def mpi(local, count, number, total):
    return {"OMPI_COMM_WORLD_LOCAL_RANK": f"{local}", "OMPI_COMM_WORLD_LOCAL_SIZE": f"{count}",
            "OMPI_COMM_WORLD_RANK": f"{number}", "OMPI_COMM_WORLD_SIZE": f"{total}"}  # fmt: skip


@pytest.mark.parametrize("environment, expected", [
    ({}, None),
    (slurm(3, "8"), Place(3, 8)),
    (slurm(1, "4(x2),2", node=2, number=9), Place(1, 2)),
    (slurm(3, "4(x2),2", node=1, number=7), Place(3, 4)),
    (slurm(1, "4", SLURM_GPUS_PER_TASK="1"), Place(1, 4, True)),
    (slurm(1, "4", SLURM_TRES_PER_TASK="cpu:2,gres/gpu:1"), Place(1, 4, True)),
    (slurm(1, "4", SLURM_TRES_PER_TASK="cpu:2"), Place(1, 4)),
    (slurm(1, "4", SLURM_GPU_BIND="closest"), Place(1, 4, True)),
    (slurm(1, "4", SLURM_GPU_BIND="verbose,single:1"), Place(1, 4, True)),
    (slurm(1, "4", SLURM_GPU_BIND="none"), Place(1, 4)),
    (slurm(0, "x"), None),
    (slurm(4, "4"), None),
    (slurm(0, "1", node=1), None),
    ({"SLURM_LOCALID": "0"}, None),
    (mpi(1, 2, 3, 4), Place(1, 2)),
    ({**mpi(1, 2, 3, 4), **slurm(0, "1")}, Place(1, 2)),
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2"}, Place(1, 2)),
    ({"LOCAL_RANK": "1"}, None),
    ({"MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2", "PMI_RANK": "2", "PMI_SIZE": "4"}, Place(0, 2)),
])  # fmt: skip
def test_the_place_that_launchers_tell(environment, expected):
    assert place_on_host(environment) == expected


@pytest.mark.parametrize("environment, given, expected", [
    (slurm(1, "4(x2)", node=1, number=5), (5, 8), Place(1, 4)),
    (slurm(0, "4"), (2, 4), None),  # by hand in a batch script, where all have the variables of one task
    (slurm(0, "1"), (2, 4), None),  # of an array of jobs, each with GPUs of its own
    (mpi(1, 2, 3, 4), (3, 4), Place(1, 2)),
    ({**mpi(1, 2, 3, 4), **slurm(0, "1")}, (0, 1), Place(0, 1)),
])
def test_numbers_that_were_given_by_hand_are_those_of_the_launcher_or_not(environment, given, expected):
    assert place_on_host(environment, *given) == expected


@pytest.mark.parametrize("environment, devices, expected", [
    ({}, ["null", "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], 2),
    ({}, ["null"], 0),
    ({"CUDA_VISIBLE_DEVICES": "2,3"}, ["nvidia0", "nvidia1", "nvidia2", "nvidia3"], 2),
    ({"CUDA_VISIBLE_DEVICES": "GPU-8f2a, MIG-1/2/3"}, [], 2),
    ({"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], 0),
    ({"CUDA_VISIBLE_DEVICES": "0,-1,2"}, ["nvidia0"], 1),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, [], 0),
    ({"ROCR_VISIBLE_DEVICES": "0,1,2"}, ["kfd"], 3),
])
def test_gpus_that_a_process_sees(environment, devices, expected):
    assert num_visible_gpus(environment, devices) == expected


@pytest.mark.parametrize("place, num_gpus, expected", [
    (None, 8, None),
    (Place(1, 4), 0, None),
    (Place(0, 1), 8, Choice(tuple(range(8)))),
    (Place(2, 4), 8, Choice((4, 5))),
    (Place(3, 4, True), 1, Choice((0,))),
    (Place(3, 4, True), 2, Choice((0, 1))),
    (Place(3, 4), 2, Choice((1,), 2)),
    (Place(4, 5), 2, Choice((0,), 3)),
    (Place(1, 3), 2, Choice((1,), 1)),
])
def test_the_gpus_of_a_place(place, num_gpus, expected):
    assert chosen_gpus(place, num_gpus) == expected


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("num_gpus", range(1, 9))
def test_every_gpu_is_taken_and_only_too_few_are_shared(count, num_gpus):
    taken = [gpu for number in range(count) for gpu in chosen_gpus(Place(number, count), num_gpus).gpus]
    assert sorted(set(taken)) == list(range(num_gpus)) and len(taken) == max(count, num_gpus)


@pytest.fixture
def host(monkeypatch):
    """A function that makes this a process of a host with four GPUs; it gives what JAX was told."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MPI_", "PMI_", "JAX_CUDA", "JAX_LOCAL", "XLA_", "CUDA_", "HIP_", "ROCR_")):
            monkeypatch.delenv(name)
    told = {}
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setattr(gpus.os, "listdir", lambda _: ["nvidia0", "nvidia1", "nvidia2", "nvidia3"])

    def made(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return told

    yield made
    os.environ.pop("XLA_CLIENT_MEM_FRACTION", None)


def test_jax_is_told_before_it_looks_for_devices(host):
    told = host(slurm(1, "2"))
    assert gpus.take_own_gpus(1, 2) == (2, 3) and "XLA_CLIENT_MEM_FRACTION" not in os.environ
    assert told == {"jax_cuda_visible_devices": "2,3", "jax_rocm_visible_devices": "2,3"}


def test_processes_that_share_a_gpu_share_its_memory(host, caplog):
    host(slurm(7, "8"))
    assert gpus.take_own_gpus() == (3,) and os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.375"
    assert "2 processes share a GPU" in caplog.text


@pytest.mark.parametrize("setting", ["JAX_CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS"])
def test_what_the_user_has_set_is_left(host, setting):
    told = host({**slurm(1, "2"), setting: "1"})
    assert gpus.take_own_gpus(1, 2) is None and not told


def test_processes_started_by_hand_are_told_how_to_share(host, caplog):
    told = host({})
    assert gpus.take_own_gpus(5, 8) is None and not told
    assert "takes all GPUs of its host, 4;" in caplog.text and "CUDA_VISIBLE_DEVICES=1 for this one" in caplog.text
    caplog.clear()
    host({"CUDA_VISIBLE_DEVICES": "1"})
    assert gpus.take_own_gpus(5, 8) is None and not caplog.text


def test_processes_that_join_take_their_own(host, monkeypatch):
    """JAX itself would take one of the four for the only process of a host, and none where SLURM shows one to each."""
    for environment, expected in ((slurm(0, "1"), (0, 1, 2, 3)), (slurm(3, "4", CUDA_VISIBLE_DEVICES="3", SLURM_GPUS_PER_TASK="1"), (0,))):
        host(environment)
        given = {}
        monkeypatch.setattr(jax.distributed, "initialize", lambda *_, given=given, **named: given.update(named))
        processes.join()
        assert given["local_device_ids"] == expected
