"""Writes photographs and tags of any source into shards; see `lcrf_jax.data.files.shard_files` for the files.

A shard is written under a hidden name and renamed when it is whole, and then noted in ``unfinished.json``, by which a run that
was killed goes on. The index comes last.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import hashlib
import io
import json
import os
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from lcrf_jax.data.example import Source, data_identity
from lcrf_jax.data.files.shard_files import (
    FORMAT,
    INDEX,
    UNFINISHED,
    VERSION,
    ShardRecord,
    mask_bytes,
    packed,
    read_index,
    table_bytes,
    there,
)
from lcrf_jax.data.files.tags import some
from lcrf_jax.data.pipeline import read_ahead
from lcrf_jax.machine.files import ROOM, at_home, naming, parsed_json, write_whole
from lcrf_jax.machine.locks import locked

_OPTIONS = "group_size:1,uncompressed"  # any record by itself; photographs are compressed already
_LOCK = ".shards.lock"
_READ_AHEAD = 4


def write_shards(
    sources: Mapping[str, Source], out: str | os.PathLike, *, shard_bytes: int, progress: Callable[..., None] | None = None
) -> dict[str, Any]:
    """Write splits into a folder of shards; where a part is there already, the rest.

    A photograph's own file is kept as it is; of a source that makes its pictures, PNG files are made, which lose nothing.

    Args:
      sources: dict from the names of the splits to their sources, of one list of classes; with masks they are kept.
      out: the folder; made if it is not there.
      shard_bytes: a shard is closed when its records have so many bytes, 1 or more.
      progress: called with the number of photographs after each shard.
    Returns:
      The index: "format", "version", "classes", "shard_bytes" and, for each of "splits", "photographs", "masks", "counts" by class,
      "identity" of names and tags, "table" with its "table_sha256", "shards" ("file", "records", "bytes", "sha256") and "sha256".
    Raises:
      ValueError: if the folder holds something else, or photographs that have changed since; if one cannot be read.
      lcrf_jax.machine.locks.Locked: if another process writes them.
      OSError: if the disk is full.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes: expected 1 or more, got {shard_bytes}")
    out = at_home(out)
    wanted = _wanted(sources, shard_bytes)
    _refuse_others(out, wanted)
    with naming(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / _LOCK):
        if (out / INDEX).is_file():
            index = _finished(out, sources, wanted, progress)
        else:
            index = _written_index(out, sources, wanted, shard_bytes, progress)
    (out / _LOCK).unlink(missing_ok=True)
    return index


def photograph_bytes(source: Source, index: int) -> bytes:
    """The file of a photograph: its own where there is one, otherwise a PNG of its pixels.

    Args:
      source: the source.
      index: of the photograph.
    Returns:
      bytes.
    Raises:
      OSError, ValueError: if it cannot be read.
    """
    paths = getattr(source, "paths", None)
    if paths is not None:
        return paths[index].read_bytes()
    if hasattr(source, "encoded"):
        return source.encoded(index)
    file = io.BytesIO()
    Image.fromarray(source[index].image).save(file, "PNG")
    return file.getvalue()


def _written_index(out, sources, wanted, shard_bytes, progress):
    """Write what is missing, and the index last."""
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)
    done = _unfinished(out).get("done", {})
    index = {"format": FORMAT, "version": VERSION, **copy.deepcopy(wanted)}
    for split, source in sources.items():
        shards = done.setdefault(split, [])
        _refuse_changed(source, shards, out)
        note = functools.partial(_note, out, wanted, done)
        _write_split(source, out, _stem(split), shards, shard_bytes, note, progress)
        index["splits"][split] |= _described(source, out, _stem(split), shards)
    write_whole(out / INDEX, json.dumps(index, ensure_ascii=False, indent=1))
    (out / UNFINISHED).unlink(missing_ok=True)
    return index


def _wanted(sources, shard_bytes):
    """What the index says before a photograph is read: two folders that agree in it are to hold the same."""
    classes = {source.class_names for source in sources.values()}
    if len(classes) != 1:
        raise ValueError(f"expected one or more splits of one list of classes, got {sorted(classes)}")
    splits = {split: {"photographs": len(source), "masks": source.masks, "identity": data_identity(source)["sha256"]}
              for split, source in sources.items()}  # fmt: skip
    return {"classes": list(classes.pop()), "shard_bytes": shard_bytes, "splits": splits}


def _unfinished(out):
    """What a run that was interrupted has noted."""
    try:
        return parsed_json((out / UNFINISHED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{out / UNFINISHED} cannot be read ({error}); remove {out} and write the shards anew") from error


def _refuse_others(out, wanted):
    """Refuse a folder that holds something else."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder")
    if not out.is_dir():
        return
    before = read_index(out) if (out / INDEX).is_file() else _unfinished(out).get("wanted")
    if before is None:
        others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if others:
            raise ValueError(f"{out} holds no shards, but {some(others)}; give an empty folder, or one that is not there")
        return
    differ = [name for name in ("classes", "shard_bytes") if before.get(name) != wanted[name]]
    for split in sorted({*before["splits"], *wanted["splits"]}):
        old, new = before["splits"].get(split), wanted["splits"].get(split)
        if old is None or new is None or any(old.get(name) != value for name, value in new.items()):
            differ.append(f"the split {split} ({_in_words(old)} then, {_in_words(new)} now)")
    if differ:
        raise ValueError(
            f"{out} holds shards of other contents: {', '.join(differ)} differ; give another folder, or the same data and settings"
        )


def _in_words(split):
    return "none" if split is None else f"{split['photographs']} photographs {'with' if split['masks'] else 'without'} masks"


def _refuse_changed(source, shards, out):
    """Refuse to go on where photographs were changed after their shard was written."""
    paths, first, changed = getattr(source, "paths", None), 0, []
    for shard in shards if paths is not None else ():
        written = there(out / shard["file"], shard["bytes"]).stat().st_mtime
        changed += [source.names[row] for row in range(first, first + shard["records"]) if paths[row].stat().st_mtime > written]
        first += shard["records"]
    if changed:
        raise ValueError(f"{out}: {len(changed)} photographs were changed after their shards were written ({some(changed)}); give another folder")


def _finished(out, sources, wanted, progress):
    """The index of a folder that is whole."""
    index = read_index(out)
    for split, source in sources.items():
        _refuse_changed(source, index["splits"][split]["shards"], out)
    if progress is not None:
        progress(sum(each["photographs"] for each in wanted["splits"].values()), earlier=True)
    return index


def _note(out, wanted, done):
    write_whole(out / UNFINISHED, json.dumps({"wanted": wanted, "done": done}, ensure_ascii=False))


def _write_split(source, out, stem, shards, shard_bytes, note, progress):
    """The shards of a split that are missing; each is noted when it is there."""
    first = sum(shard["records"] for shard in shards)
    if first and progress is not None:
        progress(first, earlier=True)
    note()
    contents = read_ahead(functools.partial(_content, source, source.tags), range(first, len(source)), _READ_AHEAD)
    with contextlib.closing(contents):
        while first < len(source):
            shards.append(_written(out, f"{stem}-{len(shards):05}.array_record", contents, len(source) - first, shard_bytes))
            note()
            first += shards[-1]["records"]
            if progress is not None:
                progress(shards[-1]["records"])


def _content(source, tags, index):
    """The bytes of a record of a source."""
    example = source[index] if source.masks else None
    names = tuple(name for name, is_there in zip(source.class_names[1:], tags[index, 1:], strict=True) if is_there)
    mask = b"" if example is None else mask_bytes(example.mask)
    return packed(ShardRecord(source.names[index], names, photograph_bytes(source, index), mask))


def _written(out, name, contents, most, shard_bytes):
    """Write one shard from an iterator of records; what the index says of it."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    unfinished, digest, count, size = out / f".{name}.tmp", hashlib.sha256(), 0, 0
    try:
        writer = ArrayRecordWriter(str(unfinished), _OPTIONS)
        with contextlib.closing(writer):
            while count < most and size < shard_bytes:
                content = next(contents)
                writer.write(content)
                digest.update(len(content).to_bytes(8, "little") + content)
                count, size = count + 1, size + len(content)
        reader = ArrayRecordReader(str(unfinished))
        with contextlib.closing(reader):
            if reader.num_records() != count:
                raise RuntimeError("not all of it came to the disk")
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, out / name)
    except RuntimeError as error:  # of array_record, which has no other
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"the shard cannot be written ({error}); {ROOM}", str(out / name)) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return {"file": name, "records": count, "bytes": os.path.getsize(out / name), "sha256": digest.hexdigest()}


def _described(source, out, stem, shards):
    """What the index says of a split that is written, and its table."""
    table, path = table_bytes(source.names, source.tags), out / f"{stem}.npz"
    unfinished = path.with_name(f".{path.name}.tmp")
    with open(unfinished, "wb") as file:
        file.write(table)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    counts = np.asarray(source.tags, bool)[:, 1:].sum(axis=0).tolist()
    whole = hashlib.sha256(json.dumps([list(source.class_names), [shard["sha256"] for shard in shards]]).encode())
    return {
        "counts": dict(zip(source.class_names[1:], counts, strict=True)), "table": path.name,
        "table_sha256": hashlib.sha256(table).hexdigest(), "shards": list(shards), "sha256": whole.hexdigest(),
    }  # fmt: skip


def _stem(split):
    """A file name of a split, another one for each."""
    return urllib.parse.quote(split, safe="")
