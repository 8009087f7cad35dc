"""Which GPUs of its host a process takes, where several processes share one: each its own, and none is left over.

A process that says nothing takes the memory of every GPU that it sees, and the second one on the host then has none. So
this is decided before JAX looks for devices. Launchers tell each process its place among those of its host.
"""

import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax

MEMORY_SHARE = 0.75  # of a GPU that JAX takes by default
_USER_SETTINGS = ("JAX_CUDA_VISIBLE_DEVICES", "JAX_ROCM_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS")
_MEMORY_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
_LIMITS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
# What launchers call (place on the host, processes of the host, number of the process, number of processes). A program
# that mpirun starts within a job of SLURM has SLURM's variables too, of another process.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_RANK", "PMI_SIZE"),
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"),
)
_log = logging.getLogger(__name__)


class Place(NamedTuple):
    """The place of a process among those of its host.

    Attributes:
      number: from 0 on.
      total: processes on the host.
      bound: whether the GPUs that it sees are those that the launcher has given to it.
    """

    number: int
    total: int
    bound: bool = False


class Choice(NamedTuple):
    """The GPUs of a process.

    Attributes:
      gpus: their numbers among those that the process sees.
      sharing: processes that share one of them.
    """

    gpus: tuple[int, ...]
    sharing: int = 1


def place_on_host(
    environment: Mapping[str, str], process_id: int | None = None, num_processes: int | None = None
) -> Place | None:
    """The place of this process on its host, as its launcher tells.

    Args:
      environment: variables.
      process_id: number that the process was given by hand, or None. A launcher that knows it by another number has
        not numbered these processes: many may have been started within one of its own.
      num_processes: how many there are, or None.

    Returns:
      Place, or None if no launcher tells.
    """
    given = (process_id, num_processes)
    for names in _LAUNCHERS:
        numbers = [_number(environment.get(name)) for name in names]
        if None not in numbers and given in ((None, None), tuple(numbers[2:])):
            return _fitting(Place(numbers[0], numbers[1]))  # type: ignore[arg-type]  # None was looked for
    number = _number(environment.get("SLURM_LOCALID"))
    own = tuple(_number(environment.get(name)) for name in ("SLURM_PROCID", "SLURM_NTASKS"))
    if number is None or given not in ((None, None), own):
        return None
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts = _expanded(tasks)
    node = _number(environment.get("SLURM_NODEID")) or 0
    # So that each task sees GPUs of its own, not all of the host.
    bound = "SLURM_GPUS_PER_TASK" in environment or "gpu" in environment.get("SLURM_TRES_PER_TASK", "")
    bindings = (environment.get(name, "") for name in ("SLURM_GPU_BIND_TYPE", "SLURM_GPU_BIND"))
    bound = bound or any(re.search("closest|single|map|mask|per_task", binding) for binding in bindings)
    return _fitting(Place(number, counts[node], bound)) if node < len(counts) else None


def _number(text):
    return int(text) if text is not None and re.fullmatch(r"\d+", text) else None


def _fitting(place):
    """The place, if it is one."""
    return place if place.number < place.total else None


def _expanded(text):
    """[2, 2, 2, 1] from "2(x3),1", as SLURM writes the number of tasks of each node."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return []
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def num_visible_gpus(environment: Mapping[str, str], devices: list[str]) -> int:
    """GPUs that this process sees.

    Args:
      environment: variables; those that limit what a process sees are CUDA_VISIBLE_DEVICES, HIP_VISIBLE_DEVICES and
        ROCR_VISIBLE_DEVICES.
      devices: names of the files in /dev.

    Returns:
      int; 0 if there are none, or it cannot be told without JAX.
    """
    for name in _LIMITS:
        if name in environment:
            count = 0
            for device in environment[name].split(","):
                if not re.fullmatch(r"\d+|(GPU|MIG)-\S+", device.strip()):
                    break  # the runtime ignores all from the first that is none
                count += 1
            return count
    return sum(re.fullmatch(r"nvidia\d+", device) is not None for device in devices)


def chosen_gpus(place: Place | None, num_gpus: int) -> Choice | None:
    """The GPUs that a process takes.

    Args:
      place: of the process on its host, or None.
      num_gpus: that it sees.

    Returns:
      Choice: all that a launcher has given to it; an equal share of all where processes see the same; of one GPU where
        there are fewer GPUs than processes. None if nothing is known.
    """
    if place is None or num_gpus == 0:
        return None
    if place.bound:
        return Choice(tuple(range(num_gpus)))
    if place.total > num_gpus:
        mine = place.number % num_gpus
        return Choice((mine,), len(range(mine, place.total, num_gpus)))
    first, end = (number * num_gpus // place.total for number in (place.number, place.number + 1))
    return Choice(tuple(range(first, end)))


def take_own_gpus(process_id: int | None = None, num_processes: int | None = None) -> tuple[int, ...] | None:
    """Let JAX see only the GPUs that are this process' own; to be called before anything else of JAX.

    What the user has set is left as it is.

    Args:
      process_id: number of this process, if it was given by hand.
      num_processes: how many there are, if that was given.

    Returns:
      Numbers of the GPUs, or None if JAX decides.
    """
    if any(os.environ.get(name) for name in _USER_SETTINGS):
        return None
    devices = os.listdir("/dev") if pathlib.Path("/dev").is_dir() else []
    num_gpus = num_visible_gpus(os.environ, devices)
    choice = chosen_gpus(place_on_host(os.environ, process_id, num_processes), num_gpus)
    if choice is None:
        if num_gpus and (num_processes or 1) > 1 and not any(name in os.environ for name in _LIMITS):
            _log.warning(
                "this process takes all GPUs of its host, %d; where several processes share a host, start each with its own: "
                "CUDA_VISIBLE_DEVICES=%d for this one", num_gpus, (process_id or 0) % num_gpus,
            )  # fmt: skip
        return None
    for kind in ("cuda", "rocm"):
        jax.config.update(f"jax_{kind}_visible_devices", ",".join(map(str, choice.gpus)))
    if choice.sharing > 1 and not any(name in os.environ for name in _MEMORY_SETTINGS):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = f"{MEMORY_SHARE / choice.sharing:.3f}"
        _log.warning("%d processes share a GPU, each with its part of the memory", choice.sharing)
    return choice.gpus
