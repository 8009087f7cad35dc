"""Photographs and masks at URLs, of all file systems that fsspec knows: what `prediction_plan` does of folders on a disk.

Nothing here imports JAX: the tasks that decode photographs start at once.
"""

import contextlib
import datetime
import glob
import os
import pathlib
import secrets
import urllib.parse
import urllib.request

from lcrf_jax.data.files.finding import is_system_folder
from lcrf_jax.data.files.images import is_photograph
from lcrf_jax.data.files.mask_names import left_out, masks_among, told
from lcrf_jax.machine.progress import say

SETTINGS_FILE = "predictions.json"
_WRITTEN: dict[tuple[str, str], int] = {}  # what was told beside the names of photographs
# There a file is seen once all of it has arrived; elsewhere it is sent under another name and renamed.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"}


def is_url(path):
    """Whether a path is a URL of another file system than this machine's own."""
    return "://" in str(path) and not str(path).startswith("file://")


def place(name):
    """A path on this machine, also of file://, as pathlib.Path; a URL as UPath, which is used alike.

    Args:
      name: path or URL.

    Returns:
      pathlib.Path or upath.UPath.

    Raises:
      ValueError: if there is no such file system, or what reads it is not installed.
    """
    name = str(name)
    if name.startswith("file://"):
        return pathlib.Path(urllib.request.url2pathname(urllib.parse.urlsplit(name).path))
    if not is_url(name):
        return pathlib.Path(name)
    try:
        from upath import UPath

        path = UPath(name)
        _ = path.fs
    except ImportError as error:
        raise ValueError(f"{name} cannot be reached ({error}): pip install '.[ray]' in your clone, and the package of fsspec "
                         "for that file system, such as s3fs or gcsfs") from error
    except ValueError as error:
        raise ValueError(f"{name} cannot be reached ({error}): give a folder, or a URL such as s3://BUCKET/FOLDER") from error
    return path


def planned_at_urls(patterns, out, outputs_for, listed=()):
    """Pairs of photograph and Outputs, as `prediction_plan.planned_outputs` has them of folders.

    Args:
      patterns: URLs of one file system: files, folders (with all photographs at any depth) and patterns.
      out: place of the masks.
      outputs_for: function (out, name) -> Outputs.
      listed: URLs of photographs, which are taken to be there.

    Returns:
      List in the order of the photographs' names.

    Raises:
      FileNotFoundError: if nothing fits a pattern.
      ValueError: if two photographs would have one mask, or a mask would be written over a photograph.
    """
    found, roots = {}, []
    for pattern in map(place, patterns):
        root, names = _below(pattern, out)
        if not names:
            raise FileNotFoundError(f"--images: there is no photograph at {pattern}; give a file, a folder or a pattern")
        masks = masks_among(names) if len(names) > 1 else []
        if masks:
            say(f"{pattern}: {told(masks)}")
            gone = left_out(dict.fromkeys(names), masks)
            names = [name for name in names if name not in gone]
        roots.append(str(root))
        found |= {str(root / name): root / name for name in names}
    for photo in map(place, listed):
        roots.append(str(photo.parent))
        found[str(photo)] = photo
    above = os.path.commonprefix([f"{root.rstrip('/')}/" for root in roots]).rpartition("/")[0]
    planned, taken = [], {}
    for url, photo in sorted(found.items()):
        outputs = outputs_for(out, pathlib.PurePosixPath(url.removeprefix(f"{above}/")))
        mask = str(outputs.mask)
        if mask in found:
            raise ValueError(f"the mask of {url} would be written over the photograph {mask}: give another --out")
        if mask in taken:
            raise ValueError(f"{taken[mask]} and {url} would both be written to {mask}: predict them one pattern at a time")
        taken[mask] = url
        planned.append((photo, outputs))
    return planned


def _below(pattern, out):
    """(the folder that names are told from, names of photographs below it) of a file, a folder or a pattern."""
    files = pattern.fs
    if glob.has_magic(str(pattern)):
        paths = files.glob(pattern.path, detail=True)
        root = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    elif files.isfile(pattern.path):
        return pattern.parent, [pattern.name]
    else:
        root, paths = pattern, files.find(pattern.path, detail=True)
    _WRITTEN.update((_key(files, path), _written(about)) for path, about in paths.items())
    within = f"{root.path.rstrip('/')}/".lstrip("/")
    names = [path.lstrip("/").removeprefix(within) for path in paths]
    written = [str(pathlib.PurePosixPath(name).parent) for name in names if name.rpartition("/")[2] == SETTINGS_FILE]
    inside = str(out).removeprefix(f"{str(root).rstrip('/')}/")
    left = {folder for folder in (*written, inside if inside != str(out) else ".") if folder != "."}
    return root, sorted(name for name in names if is_photograph(name) and not _is_left(name, left))


def written(photo):
    """When a photograph at a URL was written, in nanoseconds; of one that was found in a folder without asking again."""
    known = _WRITTEN.get(_key(photo.fs, photo.path))
    return _written(photo.fs.info(photo.path)) if known is None else known


def written_below(folder):
    """When each file below a URL was written, by one listing.

    Args:
      folder: UPath.

    Returns:
      Function from a UPath to nanoseconds, 0 where the file system does not say; None for what is not there, or empty.
    """
    files = folder.fs
    files.invalidate_cache()  # others write there as well
    found = files.find(folder.path, detail=True) if files.exists(folder.path) else {}
    known = {_key(files, path): _written(about) for path, about in found.items() if about.get("size")}
    return lambda path: known.get(_key(files, path.path))


def _key(files, path):
    return (files.protocol if isinstance(files.protocol, str) else files.protocol[0], path.strip("/"))


def _written(about):
    """When a file was written, in nanoseconds, by what its file system tells of it."""
    value = next((about[name] for name in ("mtime", "LastModified", "last_modified", "updated", "timeModified", "created") if about.get(name)), 0)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # a date in another form is as good as none
            value = datetime.datetime.fromisoformat(value)
    if isinstance(value, datetime.datetime):
        value = value.timestamp()
    return round(value * 1e9) if isinstance(value, int | float) else 0


def _is_left(name, left):
    """Whether a name is hidden, of a system, or within a folder of masks."""
    path = pathlib.PurePosixPath(name)
    folders = {str(parent) for parent in path.parents}
    return path.name.startswith(".") or any(map(is_system_folder, path.parts[:-1])) or bool(folders & left)


def send(source, target):
    """Bring a file to a URL, whole or not at all, and remove it here.

    Args:
      source: path of the file.
      target: UPath.

    Raises:
      OSError: if it cannot be written there.
    """
    files, protocols = target.fs, target.fs.protocol
    whole = bool(_WHOLE & set([protocols] if isinstance(protocols, str) else protocols))
    sent = target if whole else target.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        files.makedirs(target.parent.path, exist_ok=True)
        files.put_file(str(source), sent.path)
        if not whole:
            files.mv(sent.path, target.path)
    except Exception as error:  # file systems raise errors of every kind
        raise OSError(f"{target} cannot be written ({error or type(error).__name__}); what is done is kept: run the same command "
                      "again") from error
    source.unlink()
