"""Photographs to predict: files of their own, at URLs, and within shards of `experiments.shards` and tables in Parquet.

A photograph within a larger file is called by a path, SHARDS/train/barn/7.jpg or photos.parquet/barn/7.jpg. Nothing here imports JAX.
"""

import contextlib
import glob
import os
import pathlib
import tempfile
import threading
import time

import numpy as np

from lcrf_jax.data.files.finding import files_below
from lcrf_jax.data.files.images import image_size, read_turned_image
from lcrf_jax.data.files.shard_files import INDEX, has_shards, read_index
from lcrf_jax.data.sources.shards import ShardsSource

from .prediction_urls import is_url, place, written

SUFFIX = ".parquet"
COLUMNS = ("image", "path", "file", "file_name", "filename", "photo", "url")


class _Shards:
    """The photographs of a folder of shards, those of all splits."""

    paths = None

    def __init__(self, folder):
        sources = {split: ShardsSource(folder, split) for split in read_index(folder)["splits"]}
        self.changed = os.stat(folder / INDEX).st_mtime_ns
        self._rows = {f"{split}/{name}": (source, row) for split, source in sources.items() for row, name in enumerate(source.names)}
        self.names = list(self._rows)

    def content(self, name):
        source, row = self._rows[name]
        return source.encoded(row)


class _Table:
    """A table in Parquet with a column of photographs: of their bytes, or of their paths or URLs.

    Attributes:
      changed: when the file was written.
      paths: the column as it is written; None where it holds bytes.
      names: what the photographs are called where the column holds bytes: as the table says, or by their rows.
    """

    def __init__(self, path):
        parquet, self._path, self._lock = _parquet(), path, threading.Lock()
        self.changed = os.stat(path).st_mtime_ns
        try:
            self._file = parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no table in Parquet ({_first_line(error)}); write it again") from error
        self._column, holds_bytes, named = _columns(path, self._file.schema_arrow)
        groups = range(self._file.num_row_groups)
        self._firsts = np.cumsum([0, *(self._file.metadata.row_group(group).num_rows for group in groups)])
        self._group = (-1, None)  # number and rows of the one that was read last
        texts = self._texts(named)
        self.paths = None if holds_bytes else self._checked(texts)
        self.names = _names(texts) or [f"{row:08}" for row in range(int(self._firsts[-1]))]
        self._rows = {name: row for row, name in enumerate(self.names)}

    def content(self, name):
        row = self._rows[name]
        group = int(np.searchsorted(self._firsts, row, side="right")) - 1
        with self._lock:
            if self._group[0] != group:
                self._group = (group, self._read(lambda: self._file.read_row_group(group, columns=[self._column])))
            content = self._group[1][row - int(self._firsts[group])].as_py()
        content = content["bytes"] if isinstance(content, dict) else content
        if not content:
            raise ValueError(f"{self._path / name} has no bytes in row {row} of the table; write it again")
        return content

    def _texts(self, column):
        if column is None:
            return []
        rows = self._read(lambda: self._file.read(columns=[column])).to_pylist()
        return [row["path"] if isinstance(row, dict) else row for row in rows]

    def _read(self, read):
        try:
            return read().column(0)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._path} is damaged or cut short ({_first_line(error)}); copy it again") from error

    def _checked(self, texts):
        empty = next((row for row, text in enumerate(texts) if not text or "\0" in text), None)
        if empty is not None:
            raise ValueError(f"{self._path}: the column {self._column!r} has no path in row {empty}; leave the row out, or give one")
        return texts


def _parquet():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"--images: a table in Parquet needs pyarrow ({error}): pip install '.[ray]' in your clone, or pip install pyarrow") from error
    return pyarrow.parquet


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def _columns(path, schema):
    """(column of photographs, whether it holds bytes, column of their names or paths or None)."""
    import pyarrow.types as kinds

    def among(*tests):
        def is_one(kind):
            kind = kind.value_type if kinds.is_dictionary(kind) else kind
            return any(test(kind) for test in tests)

        return is_one

    is_text = among(kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    is_bytes = among(kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view)

    found = {field.name: field.type for field in schema}
    ordered = [name for name in COLUMNS if name in found]
    for name in ordered:
        kind = found[name]
        inner = {field.name: field.type for field in kind} if kinds.is_struct(kind) else {}
        if "bytes" in inner and is_bytes(inner["bytes"]):
            return name, True, f"{name}.path" if "path" in inner and is_text(inner["path"]) else None
        if is_bytes(kind):
            return name, True, next((other for other in ordered if is_text(found[other])), None)
    for name in ordered:
        if is_text(found[name]):
            return name, False, name
    if ordered:
        raise ValueError(f"{path}: expected paths as text or bytes of photographs in the column {ordered[0]!r}, got {found[ordered[0]]}; write it anew")
    raise ValueError(f"{path}: expected a column of paths or bytes of photographs, named one of {', '.join(COLUMNS)}; it has {', '.join(found)}: rename it")


def _names(texts):
    """Texts as paths within a folder; none where they cannot be the names of so many masks."""
    paths = [pathlib.PurePosixPath(text or "/") for text in texts]
    names = list(map(str, paths))
    wrong = any(path.is_absolute() or ".." in path.parts or not path.name or "\0" in str(path) for path in paths)
    return [] if wrong or len(set(names)) < len(names) else names


_OPEN: dict[pathlib.Path, _Shards | _Table] = {}  # what was opened stays so: it can be read though its name is gone


def _opened(path):
    if path not in _OPEN:
        _OPEN[path] = _Table(path) if path.suffix.lower() == SUFFIX else _Shards(path)
    return _OPEN[path]


def is_container(pattern):
    """Whether --images names a folder of shards or a table."""
    path = pathlib.Path(pattern)
    return has_shards(path) or path.suffix.lower() == SUFFIX and path.is_file()


def containers_below(folder):
    """What to give in the place of a folder without photographs that holds shards or tables.

    Args:
      folder: path.

    Returns:
      A line, or an empty string where it holds none.
    """
    found = [os.path.join(folder, name) for name in files_below(folder).files]
    tables = [name for name in found if name.lower().endswith(SUFFIX)]
    indices = [os.path.dirname(name) for name in found if os.path.basename(name) == INDEX]
    if indices:
        return f"it holds shards: give --images={indices[0]}"
    if tables:
        pattern = os.path.join(os.path.dirname(tables[0]), f"*{os.path.splitext(tables[0])[1]}")
        given = tables[0] if len(tables) == 1 else f"'{pattern}'"
        return f"it holds {len(tables)} table{'s' if len(tables) > 1 else ''} in Parquet: give --images={given}"
    if any(name.endswith(".array_record") for name in found):
        return f"it holds array_record files without {INDEX}: give the folder of shards that experiments.shards has written; of a data set of " \
               "TensorFlow Datasets write shards first, with its configuration"
    return ""


def expanded(patterns):
    """Values of --images, with the tables that a pattern fits in its place.

    Args:
      patterns: as they were given.

    Returns:
      List of str.
    """
    found = []
    for pattern in patterns:
        fitting = [] if is_url(pattern) or not glob.has_magic(pattern) or os.path.exists(pattern) else sorted(glob.glob(os.path.expanduser(pattern)))
        found += fitting if fitting and all(map(is_container, fitting)) else [pattern]
    return found


def urls_in(pattern):
    """The URLs that a table lists; none of what is no table of URLs.

    Args:
      pattern: a value of --images.

    Returns:
      List of str.

    Raises:
      ValueError: if some of a table are URLs and some are not, or it cannot be read.
    """
    pattern = os.path.expanduser(pattern)
    listed = _opened(pathlib.Path(pattern)).paths if is_container(pattern) else None
    urls = list(filter(is_url, listed or ()))
    if urls and len(urls) < len(listed):
        other = next(text for text in listed if not is_url(text))
        raise ValueError(f"{pattern} lists URLs and paths of this machine, {urls[0]} and {other}: predict them one after the other")
    return urls


def photographs_in(pattern):
    """The photographs of a folder of shards or a table.

    Args:
      pattern: path for which `is_container` is true, and `urls_in` empty.

    Returns:
      (folder that their names are told from, list of pathlib.Path). Paths in a table are told from the table's folder.

    Raises:
      FileNotFoundError, ValueError: if it is not finished, damaged, or another kind of table.
    """
    path = pathlib.Path(pattern)
    held = _opened(path)
    if held.paths is None:
        return path.absolute(), [path / name for name in held.names]
    photographs = [pathlib.Path(os.path.normpath(path.parent / place(text))) for text in held.paths]
    folders = {photo.absolute().parent for photo in photographs}
    beside = path.absolute().parent
    root = beside if all(folder.is_relative_to(beside) for folder in folders) else pathlib.Path(os.path.commonpath(folders))
    return root, photographs


def _holder(photo):
    """(what holds a photograph, its name within) or None for a file of its own."""
    if is_url(photo) or os.path.lexists(photo):
        return None
    photo = pathlib.Path(photo)
    above = next(filter(_OPEN.__contains__, photo.parents), None) or next(filter(os.path.exists, photo.parents), None)
    if above is None or above not in _OPEN and not is_container(above):
        return None
    return _opened(above), photo.relative_to(above).as_posix()


def content_of(photo):
    """The bytes of a photograph within a larger file.

    Args:
      photo: path.

    Returns:
      bytes, or None for a file of its own, whether or not it is there.

    Raises:
      FileNotFoundError, ValueError: if it is not there or damaged.
    """
    found = _holder(photo)
    if found is None:
        return None
    held, name = found
    try:
        return held.content(name)
    except KeyError:
        raise FileNotFoundError(f"{photo} does not exist") from None


def size_of(photo):
    """Height and width of a photograph, in a larger file or not, see `lcrf_jax.data.files.images.image_size`."""
    return image_size(photo, content_of(photo))


def changed(photo):
    """When a photograph, or the file that it is in, was written, in nanoseconds."""
    if is_url(photo):
        return written(photo)
    found = _holder(photo)
    return found[0].changed if found else photo.stat().st_mtime_ns


def moment(photo, since=0):
    """Now, in nanoseconds, and no time before `since`, or before the photograph was written by the clock of its disk."""
    with contextlib.suppress(OSError):
        since = since if is_url(photo) else max(since, changed(pathlib.Path(photo)))
    return max(since, time.time_ns())


def read_photograph(name):
    """A photograph, wherever it is.

    Args:
      name: path or URL.

    Returns:
      [H, W, 3] uint8, or a text that says why it cannot be read.
    """
    try:
        with _on_disk(name) as path:
            try:
                return read_turned_image(path, content_of(path))[0]
            except (ValueError, OSError) as error:
                return str(error).replace(str(path), str(name))
    except (ValueError, OSError) as error:
        text = str(error)
        return text if str(name) in text else f"{name} cannot be read ({text or type(error).__name__})"
    except MemoryError:
        return "there is not enough memory for it; scale it down or cut it into pieces"


@contextlib.contextmanager
def _on_disk(name):
    """A file as a path of this machine, for a `with` block."""
    path = place(name)
    if isinstance(path, pathlib.Path) and not is_url(name):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lcrf_jax-") as folder:
        copy = pathlib.Path(folder, path.name)
        try:
            path.fs.get_file(path.path, str(copy))
        except Exception as error:  # file systems raise errors of every kind
            raise OSError(f"{name} cannot be read ({error or type(error).__name__})") from error
        yield copy
