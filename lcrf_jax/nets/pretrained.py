"""Files of published weights, read safely.

A `.pth` file is a pickle with raw storages beside it. `read_torch_file` unpickles tensors, ordered dicts and
nothing else, so a hostile file can raise an error but cannot run code; torch is not needed.
"""

import collections
import hashlib
import io
import math
import os
import pathlib
import pickle
import zipfile
from typing import NamedTuple

import numpy as np
from safetensors.numpy import load_file

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGE_DTYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "BoolStorage": "?",
}


class _StorageType(NamedTuple):
    """Placeholder for a torch storage class: only its element type matters."""

    dtype: str


class _Storage(NamedTuple):
    """A reference to a storage of `num_values` elements, whose data are looked up by key when all is read."""

    key: str
    dtype: str
    num_values: int


class _Tensor(NamedTuple):
    """A strided view of a storage, as torch's `_rebuild_tensor_v2` is told of it."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Admits tensors and ordered dicts, refuses all else; `num_bytes` has the size of each storage seen."""

    def __init__(self, file):
        super().__init__(file)
        self.num_bytes = {}

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        raise pickle.UnpicklingError(f"refused {module}.{name}: only tensors and ordered dicts are admitted")

    def persistent_load(self, pid):
        # A sixth entry, before torch 1.6, is the part of the storage that is meant; None is all of it.
        match pid:
            case ("storage", _StorageType(dtype), key, _device, count, *part) if part in ([], [None]):
                storage = _Storage(str(key), dtype, int(count))
            case _:
                raise pickle.UnpicklingError(f"unknown reference {pid!r}")
        self.num_bytes[storage.key] = storage.num_values * np.dtype(storage.dtype).itemsize
        return storage


def _strided(tensor, data):
    """The NumPy array of `tensor`, from its storage's bytes; refuses a view that reaches beyond them."""
    if not isinstance(tensor, _Tensor) or not isinstance(tensor.storage, _Storage):
        kind = type(tensor).__name__
        raise pickle.UnpicklingError(f"expected a dict from name to tensor, found a value of type {kind}")
    storage, offset, shape, strides = tensor
    values = np.frombuffer(data[storage.key], storage.dtype)
    if len(shape) != len(strides) or any(n < 0 for n in (offset, *shape, *strides)):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} with strides {tuple(strides)}")
    if values.size != storage.num_values:
        raise pickle.UnpicklingError(f"a storage of {storage.num_values} values has {values.size}")
    # More values than the storage has would be a view that repeats some: a small file could fill the memory.
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides))
    if math.prod(shape) > values.size or (all(shape) and last >= values.size):
        raise pickle.UnpicklingError(f"a tensor of shape {tuple(shape)} in a storage of {values.size} values")
    byte_strides = [s * values.itemsize for s in strides]
    return np.array(np.lib.stride_tricks.as_strided(values[offset:], shape, byte_strides, writeable=False))


def _read_zip(file):
    """(pickled object, dict from storage key to bytes) of a file in the zip layout, torch 1.6 and later."""
    with zipfile.ZipFile(file) as archive:
        [index] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        folder = index.removesuffix("data.pkl") + "data/"
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise zipfile.BadZipFile("torch does not compress its files, this one is compressed")
        state = _TensorUnpickler(io.BytesIO(archive.read(index))).load()
        names = [name for name in archive.namelist() if name.startswith(folder)]
        return state, {name.removeprefix(folder): archive.read(name) for name in names}


def _read_legacy(file):
    """The same for the layout before torch 1.6: five pickles, then the storages, each after its count."""
    magic, _protocol, _system = (_TensorUnpickler(file).load() for _ in range(3))
    if magic != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("no torch magic number")
    unpickler = _TensorUnpickler(file)
    state, data = unpickler.load(), {}
    keys = _TensorUnpickler(file).load()
    rest = memoryview(file.read())
    for key in keys:
        end = 8 + unpickler.num_bytes[key]
        data[key], rest = rest[8:end], rest[end:]
    return state, data


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """State dict of a torch weight file, without torch and without running code from the file.

    Args:
      path: a file as `torch.save` writes it, in the zip layout or the one before torch 1.6, holding a dict
        from name to tensor.

    Returns:
      dict from name to NumPy array.

    Raises:
      ValueError: if the file is no such file, holds anything but tensors and dicts, or is damaged. The
        message names the file.
      FileNotFoundError: if there is no such file.
    """
    with open(path, "rb") as file:
        try:
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            state, data = (_read_zip if is_zip else _read_legacy)(file)
            return {str(name): _strided(tensor, data) for name, tensor in state.items()}
        except Exception as error:  # a damaged pickle can raise anything at all
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not a readable torch weight file ({reason})") from error


def file_digest(path: str | os.PathLike) -> str:
    """The sha256 of a file.

    Args:
      path: the file.

    Returns:
      Hex string.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays of a weight file, .safetensors, .pth, .pt or .bin; none can run code.

    Args:
      path: pathlib.Path of the file.

    Returns:
      dict from name to NumPy array.

    Raises:
      ValueError: if the file has another extension, or is damaged.
      FileNotFoundError: if there is no such file.
    """
    if path.suffix in (".pth", ".pt", ".bin"):
        return read_torch_file(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a weight file .safetensors, .pth or .pt, or a pytorch_model.bin")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return load_file(path)
    except Exception as error:  # its own class of errors, those of NumPy, types that NumPy does not have
        raise ValueError(f"{path}: not a readable safetensors file ({type(error).__name__}: {error})") from error
