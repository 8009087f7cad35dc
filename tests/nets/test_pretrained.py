"""Files in the layouts of torch.save are written here by hand, so that torch is not needed."""

import collections
import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
from torch_files import MAGIC, PROTOCOL, STORAGES, Call, Global, View, legacy_bytes, pickled, zip_bytes

from lcrf_jax.nets.pretrained import read_torch_file

LAYOUTS = {"legacy": legacy_bytes, "zip": zip_bytes}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def written(tmp_path):
    """Function from bytes to the path of a file that holds them."""

    def write(content):
        path = tmp_path / "weights of mine.pth"
        path.write_bytes(content)
        return path

    return write


def refused(path, reason=""):
    """The file is refused with a message that names it."""
    message = re.escape(f"{path}: not a readable torch weight file (")
    return pytest.raises(ValueError, match=message + ".*" + reason)


@every_layout
@pytest.mark.parametrize("dtype", STORAGES)
def test_every_element_type_is_read(written, layout, dtype):
    values = np.array([1, 0, 1, 3, 2, 5]).astype(dtype)
    state = collections.OrderedDict(weight=View("0", values, (2, 3), (3, 1)))
    result = read_torch_file(written(layout(state)))
    assert list(result) == ["weight"] and result["weight"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(result["weight"], values.reshape(2, 3))


@every_layout
def test_views_offsets_and_shared_storages_are_read(written, layout):
    values = np.arange(12, dtype="<f4")
    state = {
        "plain": View("5", values, (3, 4), (4, 1)),
        "transposed": View("5", values, (4, 3), (1, 4)),
        "column": View("5", values, (3,), (4,), offset=2),
        "scalar": View("7", np.array([2.5], "<f8"), (), ()),
        "empty": View("8", np.zeros(0, "<f4"), (0, 3), (3, 1)),
        "last": View("5", values, (1,), (1,), offset=11),
    }
    result = read_torch_file(written(layout(state)))
    np.testing.assert_array_equal(result["plain"], values.reshape(3, 4))
    np.testing.assert_array_equal(result["transposed"], values.reshape(3, 4).T)
    np.testing.assert_array_equal(result["column"], [2, 6, 10])
    assert result["scalar"].shape == () and result["scalar"] == 2.5
    assert result["empty"].shape == (0, 3)
    np.testing.assert_array_equal(result["last"], [11])
    result["plain"][0, 0] = 7  # own memory, to write on
    assert result["transposed"][0, 0] == 0


@every_layout
def test_what_a_module_adds_is_read(written, layout):
    """A state dict carries its metadata as an attribute, an ordered dict of ordered dicts."""
    state = collections.OrderedDict(bias=View("0", np.ones(2, "<f4"), (2,), (1,)))
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    np.testing.assert_array_equal(read_torch_file(written(layout(state)))["bias"], [1, 1])


class Evil:
    """What pickles of this class do when they are loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@every_layout
@pytest.mark.parametrize(("evil", "name"), [
    (lambda path: Evil(os.system, f"touch '{path}'"), "system"),
    (lambda path: Evil(eval, f"open({str(path)!r}, 'w')"), "eval"),
    (lambda path: Evil(exec, f"open({str(path)!r}, 'w')"), "exec"),
    (lambda path: Evil(getattr, collections.OrderedDict, "__init__"), "getattr"),
    (lambda path: Evil(open, str(path), "w"), "open"),
    (lambda path: Call(Global("torch.hub", "load"), "x"), "torch.hub.load"),
    (lambda path: Call(Global("torch", "load"), str(path)), "torch.load"),
    (lambda path: Call(Global("torch", "nn.Module"), "x"), "torch.nn.Module"),
    (lambda path: Call(Global("torch.cuda", "FloatStorage"), 4), "torch.cuda.FloatStorage"),
    (lambda path: Call(Global("torchlike", "FloatStorage"), 4), "torchlike.FloatStorage"),
    (lambda path: Call(Global("torch._utils", "_rebuild_tensor_v2.__globals__")), "__globals__"),
    (lambda path: Call(Global("collections", "namedtuple"), "x", "y"), "collections.namedtuple"),
])
def test_a_pickle_that_would_run_code_is_refused(written, tmp_path, layout, evil, name):
    trace = tmp_path / "trace"
    state = {"weight": View("0", np.ones(2, "<f4"), (2,), (1,)), "evil": evil(trace)}
    path = written(layout(state))
    with refused(path, rf"refused .*{name}: only tensors and ordered dicts"):
        read_torch_file(path)
    assert not trace.exists()


def test_the_attack_would_work_on_an_ordinary_unpickler(tmp_path):
    """Else the test above could pass for another reason."""
    pickle.loads(pickled({"evil": Evil(eval, f"open({str(tmp_path / 'trace')!r}, 'w')")}))
    assert (tmp_path / "trace").exists()


def test_code_in_the_other_pickles_of_the_legacy_layout_is_refused(written, tmp_path):
    trace = tmp_path / "trace"
    evil = pickled(Evil(eval, f"open({str(trace)!r}, 'w')"))
    parts = [pickled(value) for value in (MAGIC, PROTOCOL, {}, {}, [])]
    for i in range(5):
        path = written(b"".join([*parts[:i], evil, *parts[i + 1 :]]))
        with refused(path, "eval: only"):
            read_torch_file(path)
    assert not trace.exists()


FOUR = np.arange(4, dtype="<f4")
BAD_VIEWS = {
    "beyond its storage": View("0", FOUR, (5,), (1,)),
    "beyond by offset": View("0", FOUR, (4,), (1,), offset=1),
    "beyond by strides": View("0", FOUR, (2, 2), (3, 1)),
    "negative strides": View("0", FOUR, (2,), (-1,), offset=1),
    "negative offset": View("0", FOUR, (2,), (1,), offset=-1),
    "negative shape": View("0", FOUR, (-2,), (1,)),
    "huge shape, no strides": View("0", FOUR, (1 << 40, 1 << 40), (0, 0)),
    "values that are repeated": View("0", FOUR, (2, 4), (0, 1)),
    "huge strides": View("0", FOUR, (2,), (1 << 70,)),
    "more strides than axes": View("0", FOUR, (2,), (1, 1)),
    "a shape of texts": View("0", FOUR, ("2",), (1,)),
    "a shape of floats": View("0", FOUR, (2.0,), (1,)),
    "no shape": View("0", FOUR, None, (1,)),
    "too many values": View("0", FOUR, (4,), (1,), count=5),
    "too few values": View("0", FOUR, (4,), (1,), count=3),
    "a negative number of values": View("0", FOUR, (4,), (1,), count=-4),
    "a part of a storage": View("0", FOUR, (4,), (1,), part=(("1", 0, 2),)),
    "complex": View("0", FOUR.astype("<c8"), (4,), (1,)),
}


@every_layout
@pytest.mark.parametrize("view", BAD_VIEWS.values(), ids=BAD_VIEWS)
def test_a_tensor_that_does_not_fit_its_storage_is_refused(written, layout, view):
    path = written(layout({"weight": view}))
    with refused(path):
        read_torch_file(path)


def test_the_sixth_entry_of_a_storage_may_be_none(written):
    path = written(legacy_bytes({"weight": View("0", FOUR, (4,), (1,), part=(None,))}))
    np.testing.assert_array_equal(read_torch_file(path)["weight"], FOUR)


@every_layout
@pytest.mark.parametrize("state", [
    [1, 2],
    {"epoch": 3},
    {"state_dict": {"weight": View("0", FOUR, (4,), (1,))}},
    "text",
    None,
], ids=["list", "number", "nested", "text", "none"])
def test_a_file_of_other_things_is_refused(written, layout, state):
    path = written(layout(state))
    with refused(path):
        read_torch_file(path)


@every_layout
def test_a_file_cut_anywhere_is_refused(written, layout):
    content = layout({"weight": View("0", np.arange(50, dtype="<f4"), (50,), (1,))})
    for end in [*range(0, len(content), 7), len(content) - 1]:
        path = written(content[:end])
        with refused(path):
            read_torch_file(path)


@pytest.mark.parametrize("content", [
    b"",
    b"\x00" * 64,
    b"<!DOCTYPE html><html><body>404</body></html>",
    "weights: siehe Beschreibung, größer als erlaubt".encode(),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    pickle.dumps({"weight": 1}),
    pickle.dumps(MAGIC),
    bytes(range(256)) * 4,
], ids=["empty", "zeros", "html", "text", "lfs", "pickle", "magic alone", "bytes"])
def test_other_files_are_refused(written, content):
    path = written(content)
    with refused(path):
        read_torch_file(path)


def test_other_archives_are_refused(written):
    state = {"weight": View("0", np.zeros(1000, "<f4"), (1000,), (1,))}
    path = written(zip_bytes(state, zipfile.ZIP_DEFLATED))
    with refused(path, "compress"):
        read_torch_file(path)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    path = written(file.getvalue())
    with refused(path):
        read_torch_file(path)


@every_layout
def test_a_storage_that_is_not_there_is_refused(written, layout):
    view = View("0", FOUR, (4,), (1,))
    content = layout({"weight": view})
    if layout is zip_bytes:
        content = content.replace(b"weights/data/0", b"weights/data/9")
    else:
        content = content.replace(pickled(["0"]), pickled([]))
    path = written(content)
    with refused(path):
        read_torch_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        read_torch_file(tmp_path / "nowhere.pth")
