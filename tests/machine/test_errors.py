"""Which errors are told in one line, and which have a traceback."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import base
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.data.files.tags import read_text
from lcrf_jax.data.opening import open_source
from lcrf_jax.machine.errors import SettingError, UserError, for_users
from lcrf_jax.machine.processes import ProcessError
from lcrf_jax.metrics import format_iou_table
from lcrf_jax.predict.model import as_rgb
from lcrf_jax.runfolder.description import CheckpointError


def caught(function, *arguments):
    with pytest.raises(Exception) as raised:
        function(*arguments)
    return raised.value


@pytest.mark.parametrize("kind", [SettingError, CheckpointError, ProcessError, FileNotFoundError, PermissionError])
def test_errors_of_these_types_are_for_users(kind):
    assert for_users(kind("what is wrong"))


def test_narrow_errors_are_still_the_broad_ones_for_those_who_use_the_library():
    assert issubclass(SettingError, ValueError) and issubclass(CheckpointError, RuntimeError)
    assert all(issubclass(kind, UserError) for kind in (SettingError, CheckpointError, ProcessError))


def test_what_the_house_refuses_itself_at_its_edge_is_for_users(tmp_path):
    (tmp_path / "tags.csv").write_bytes(b"\xff\xfe\xff")
    for error in (caught(open_source, "coco", "train"), caught(as_rgb, np.zeros((3, 4, 4), np.uint8)),
                  caught(read_text, tmp_path / "tags.csv")):  # fmt: skip
        assert isinstance(error, ValueError) and for_users(error), error


def test_what_jax_numpy_and_python_refuse_is_a_fault():
    faults = [caught(jnp.broadcast_to, jnp.zeros(3), (2, 2)), caught(np.zeros(3).reshape, 2, 2), caught(int, "x"),
              caught(lambda: dict([(1, 2, 3)])), ValueError("never raised")]  # fmt: skip
    for error in faults:
        assert isinstance(error, ValueError) and not for_users(error), error
    assert not for_users(TypeError("x")) and not for_users(KeyError("x"))


def test_what_the_pure_rooms_refuse_is_a_fault_of_who_calls_them():
    for error in (caught(KernelParams().at_stride, -1.0), caught(format_iou_table, np.zeros((2, 2)), ["one"])):
        assert isinstance(error, ValueError) and not for_users(error), error


def test_a_fault_inside_the_house_is_no_refusal():
    """The conversion fails in a function of ours, by no raise statement."""
    error = caught(base.get_config().update, 3)
    assert not for_users(error)
    error = caught(lambda: as_rgb([[1, 2], [3]]))
    assert isinstance(error, ValueError) and not for_users(error)
