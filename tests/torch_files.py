"""Weight files in the layouts of torch.save, written by hand, so that torch is not needed."""

import collections
import io
import pickle
import struct
import typing
import zipfile

import numpy as np

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


def views_of(state):
    """Arrays as tensors, each with a storage of its own."""
    arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
    return {
        name: View(str(at), array.ravel(), array.shape, tuple(stride // array.itemsize for stride in array.strides))
        for at, (name, array) in enumerate(arrays.items())
    }
