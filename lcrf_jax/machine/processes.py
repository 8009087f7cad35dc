"""The processes of a run, one or several: who is first, who does what, what all agree on.

Several processes, one on each host or more, run the same program and meet in the collectives of JAX. Everything here
works, and costs nothing, with one process too.
"""

import contextlib
import contextvars
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from lcrf_jax.machine.errors import UserError
from lcrf_jax.machine.gpus import take_own_gpus

_Answer = TypeVar("_Answer")

_log = logging.getLogger(__name__)
_deciding = contextvars.ContextVar("_deciding", default=False)


class NestedDecision(RuntimeError):
    """A fault of the house: what the first process decides alone asks the others, who are not there and would never answer."""


class ProcessError(UserError, RuntimeError):
    """The processes of a run do not find each other, or one of them has met an error; the message says which."""


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Make this process one of several; to be called before anything else of JAX.

    Without arguments JAX finds the others by itself on SLURM, TPU pods, Open MPI and other clusters that it knows. The
    processes of a host share its GPUs, see `lcrf_jax.machine.gpus`.

    Args:
      coordinator: host:port of process 0.
      num_processes: how many there are.
      process_id: number of this one, from 0 on.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: if only some of the three are given, or they do not fit together.
      ProcessError: if process 0 does not answer, or there is no cluster that JAX knows.
    """
    given = (coordinator, num_processes, process_id)
    if any(value is not None for value in given):
        _check(*given)
        if process_id:
            _wait_for(coordinator, timeout)
        elif num_processes is not None and num_processes > 1:
            # JAX ends the interpreter, with a message of its own, if they do not come.
            _log.warning("waiting for %d more processes at %s, at most %d s", num_processes - 1, coordinator, timeout)
    own = take_own_gpus(process_id, num_processes)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, local_device_ids=own, initialization_timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes could not be joined ({error}); outside a cluster that JAX knows give coordinator address, "
            "number of processes and process id"
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes logs and pictures.

    Returns:
      bool; a process that has joined no others is the first, and to know that starts no device.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_alone() -> bool:
    """Whether there is no other process.

    Returns:
      bool; as with `is_first`, a process that has joined no others starts no device.
    """
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def share(length: int) -> range:
    """Which items of a list this process has to do; all processes have the whole list.

    Args:
      length: number of items.

    Returns:
      range of every n-th index, n processes.
    """
    return range(jax.process_index(), length, jax.process_count())


def usable_cores() -> int:
    """The cores of the machine's CPU that the system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total(counts: np.ndarray) -> np.ndarray:
    """The sum of integer arrays over the processes, exact.

    Args:
      counts: integer array of one shape in all processes.

    Returns:
      int64 array of that shape, the same in all processes.
    """
    _refuse_nested("total")
    counts = np.ascontiguousarray(counts, np.int64)
    if jax.process_count() == 1:
        return counts
    # JAX would make 32 bits of them.
    every = np.asarray(multihost_utils.process_allgather(counts.reshape(-1).view(np.uint32)))
    return every.view(np.int64).reshape(-1, *counts.shape).sum(axis=0)


def largest(number: int) -> int:
    """The largest of an integer over the processes.

    Args:
      number: an integer below 2**31.

    Returns:
      int, the same in all processes.
    """
    _refuse_nested("largest")
    if jax.process_count() == 1:
        return int(number)
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def first_decides(function: Callable[[], _Answer]) -> _Answer:
    """Call a function in the first process alone, and give its result, or its error, to all processes.

    Args:
      function: takes no arguments and returns what JSON can hold. It decides nothing with the other processes.

    Returns:
      What the function returned.

    Raises:
      Exception: in the first process, what the function raised.
      ProcessError: in the others, if the function raised.
      NestedDecision: within such a function, with one process too: several would wait for ever.
    """
    _refuse_nested("first_decides")
    if jax.process_count() == 1:
        with _alone():
            return function()
    error: Exception | None = None
    answer: dict[str, Any] = {}
    if is_first():
        try:
            with _alone():
                answer = {"value": function()}
        except Exception as raised:  # noqa: BLE001 - told to the others, then raised
            error, answer = raised, {"error": str(raised)}
    answer = _from_first(answer)
    if error is not None:
        raise error
    if "error" in answer:
        raise ProcessError(f"stopped with the first process: {answer['error']}")
    return answer["value"]


def _refuse_nested(what: str) -> None:
    """Refuse to ask the other processes within what the first one decides alone."""
    if _deciding.get():
        raise NestedDecision(
            f"{what} was called within what the first process decides alone: the others are not there and would be waited for "
            "for ever; call it before or after"
        )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    token = _deciding.set(True)
    try:
        yield
    finally:
        _deciding.reset(token)


def from_first(arrays: Any) -> Any:
    """Arrays as the first process has them.

    Args:
      arrays: pytree of arrays, of the same structure, shapes and dtypes in all processes.

    Returns:
      The pytree with NumPy arrays.
    """
    _refuse_nested("from_first")
    if jax.process_count() == 1:
        return arrays
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays))


def _from_first(answer):
    """A value that JSON can hold, as the first process has it."""
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(length, np.uint8)
    if is_first():
        padded[:] = text
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded), np.uint8).tobytes())


def _check(coordinator, num_processes, process_id):
    """Refuse what JAX would end the interpreter for."""
    if coordinator is None or num_processes is None or process_id is None:
        raise ValueError(
            "coordinator address, number of processes and process id go together; got "
            f"{coordinator!r}, {num_processes!r} and {process_id!r}"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator address: expected host:port, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"process id: expected 0 to {num_processes - 1} for {num_processes} processes, got {process_id}"
        )


def _wait_for(coordinator, timeout):
    """Wait until process 0 listens: JAX ends the interpreter, without a word of ours, if it does not."""
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise ProcessError(
                    f"no answer from process 0 at {coordinator} within {timeout} s ({error}): start it first, and "
                    "check the address and the firewall"
                ) from error
        time.sleep(0.2)
