"""Files of image tags: CSV, JSON and JSON lines, as text is found in the wild.

::

    image,tags                                     tags.csv: a header, then one image a line, tags separated by ;
    barn/7.jpg,horse;person                        the header may say filename, file or path, and tag, label or class, in
                                                   any order; other columns are not read, see `columns_not_read`

    image;tags                                     as spreadsheets write it in much of Europe, or with tabs; tags then
    barn/7.jpg;horse,person                        separated by , or | or a quoted ;

    {"barn/7.jpg": ["horse", "person"]}            tags.json: or a list of objects like those of the next form

    {"image": "barn/7.jpg", "tags": ["horse"]}     tags.jsonl: one object a line

``background`` as a tag changes nothing, and no tags means background only. Every error names the file, the line
where there is one, and the remedy.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from lcrf_jax.data.example import BACKGROUND, VOID
from lcrf_jax.data.files.finding import meant_path
from lcrf_jax.machine.files import parsed_json

TAG_FILES = ("tags.csv", "tags.json", "tags.jsonl", "tags.tsv")
# How tags are separated within a cell, by what separates the cells.
_IMAGE = ("image", "images", "filename", "file_name", "file", "filepath", "path", "img", "photo", "photograph")
_TAGS = ("tags", "tag", "labels", "label", "classes", "class")
_INDEX = re.compile(r"|unnamed: \d+")  # how tables number their rows
_LOOKED_AT = 1 << 16  # bytes of a file, for whether it is text
_WITHIN = {",": ";", ";": "[;,|]", "\t": "[;,|]"}


class TagRow(NamedTuple):
    """What a tag file says of one image.

    Attributes:
      tags: names of the classes, as they are written, each once; without background.
      where: the file, and the line where there is one, for messages.
    """

    tags: tuple[str, ...]
    where: str


def read_tag_file(path: str | os.PathLike) -> dict[str, TagRow]:
    """The tags of every image of a tag file, in the order of the file.

    A row that repeats an earlier one is accepted, one that contradicts it is not.

    Args:
      path: the file; its extension ``.csv``, ``.tsv``, ``.json`` or ``.jsonl`` says which form it has.
    Returns:
      dict from the image as it is written, with ``/`` between folders, to its TagRow.
    Raises:
      ValueError: if the file is not of its form, or a row is wrong or contradicts another; the message names the line.
    """
    path = Path(path)
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path}: expected a tag file .csv, .tsv, .json or .jsonl; rename it by its form, or export it as CSV")
    rows: dict[str, TagRow] = {}
    for image, names, where in _READERS[path.suffix.lower()](path):
        image = image.strip().replace("\\", "/").removeprefix("./")
        row = TagRow(_tags(names, where), where)
        if not image:
            raise ValueError(f"{where}: no image name; write the file name of the photograph")
        if image in rows and set(rows[image].tags) != set(row.tags):
            before, both = rows[image].where.removeprefix(f"{path}, "), joined(rows[image], row)
            raise ValueError(f"{where}: {image!r} has other tags than on {before}; join them in one row: {both}")
        rows.setdefault(image, row)
    if not rows:
        raise ValueError(f"{path} names no photograph; write one row or entry a photograph, with its tags")
    return rows


def joined(one: TagRow, other: TagRow) -> str:
    """The tags of two rows of one photograph, as one row has them.

    Args:
      one, other: the rows.
    Returns:
      As ``ring;star``.
    """
    return ";".join(dict.fromkeys((*one.tags, *other.tags)))


def looks_like_tags(path: str | os.PathLike) -> bool:
    """Whether a file that is no tag file by its name may be meant as one: labels.csv, tags (1).csv, or a table of tags.

    Args:
      path: the file, which need not be there in full.
    Returns:
      True or False.
    """
    name = Path(path).name.casefold().removesuffix(".icloud").removesuffix(".txt").removesuffix(".download")
    if not name.endswith((*_READERS, ".ndjson", ".parquet", ".csv.gz", ".csv.zip", ".csv.bak")):
        return False
    if re.search(r"(^|[^a-z])(image)?(tags?|labels?|metadata|annotations?|annot)([^a-z]|$)", name):
        return True
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.readline(2000)
    except (OSError, UnicodeDecodeError):
        return False
    return name.endswith((".csv", ".tsv")) and any(_columns(text.strip().split(delimiter)) for delimiter in _WITHIN)


def columns_not_read(path: str | os.PathLike) -> str:
    """One line on the columns of a tag file that are not read.

    Args:
      path: the file.
    Returns:
      The line, or an empty string; columns that number the rows are not worth a word.
    """
    others = _csv_others(path) if _READERS.get(Path(path).suffix.lower()) is _csv_rows else _json_others(path)
    return f"{Path(path).name}: columns that are not read: {some(others, 6)}" if others else ""


def _csv_others(path):
    text = re.sub(r"^sep=.\n", "", read_text(path))
    header = next(csv.reader([_header(text)], delimiter=_delimiter(text)), [])
    image, tags = _columns(header) or (0, 1)
    return [cell.strip() for at, cell in enumerate(header) if at not in (image, tags) and not _INDEX.fullmatch(cell.strip().lower())]


def _json_others(path):
    """Names in the first object of a list or of JSON lines beside image and tags."""
    text = read_text(path)
    content = _parsed(_header(text) if Path(path).suffix.lower() == ".jsonl" else text, str(path))
    first = content[0] if isinstance(content, list) and not isinstance(content, _Pairs) and content else content
    return [name for name, _ in first if name not in ("image", "tags")] if _is_record(first) else []


def read_classes(path: str | os.PathLike) -> tuple[str, ...]:
    """The class names of ``classes.txt``, background first.

    Args:
      path: the file, one class a line.
    Returns:
      The K names; index 0 is ``background``.
    Raises:
      ValueError: if background is not the first, a name occurs twice or is empty, or there are not 2 to
        255 names.
    """
    names = [line.strip() for line in read_text(path).splitlines()]
    while names and not names[-1]:
        names.pop()
    if len(names) > VOID:
        raise ValueError(f"{path}: expected 2 to {VOID} classes with background, got {len(names)}; the index {VOID} means void")
    seen: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise ValueError(
                f"{path}, line {line}: empty; the line number is the index in the masks, so remove it "
                "or name the class"
            )
        if re.match(r"#\s|#$|//", name):
            raise ValueError(
                f"{path}, line {line}: {name!r} looks like a comment; the line number is the index in the masks, so remove it"
            )
        if ";" in name or "," in name:
            raise ValueError(f"{path}, line {line}: {name!r} has a comma or semicolon; write one class a line")
        name = BACKGROUND if name.casefold() == BACKGROUND else name
        if name in seen:
            raise ValueError(f"{path}, line {line}: the class {name!r} occurs twice, first on line {seen[name]}; keep one")
        seen[name] = line
    if not names or names[0].casefold() != BACKGROUND:
        raise ValueError(
            f"{path}, line 1: expected {BACKGROUND!r}, got {names[0] if names else 'an empty file'!r}; "
            "index 0 of the masks is the background"
        )
    if len(names) < 2:
        raise ValueError(f"{path}: expected 2 to {VOID} classes with background, got {len(names)}; add the names of classes")
    return (BACKGROUND, *names[1:])


def read_text(path: str | os.PathLike) -> str:
    """Text in UTF-8, with or without a byte-order mark, with any line ends.

    Args:
      path: the file.
    Returns:
      The text, lines ended by a newline character.
    Raises:
      FileNotFoundError: if there is no such file; the message names what is near.
      ValueError: if it is not UTF-8; the message names the line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} {'is no file' if Path(path).exists() else 'does not exist'}{meant_path(path)}")
    data = Path(path).read_bytes()
    if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise ValueError(f"{path} is a spreadsheet or an archive, whatever its name; export it as text, as CSV in UTF-8")
    if b"\0" in data[:_LOOKED_AT]:
        raise ValueError(f"{path} is text in UTF-16, or no text; save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def some(names: list[str], most: int = 3) -> str:
    """A few names and how many more there are."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _tags(names: list[str], where: str) -> tuple[str, ...]:
    """Names without empty ones, repetitions and background."""
    found = []
    for name in (name.strip() for name in names):
        if "," in name:
            raise ValueError(f"{where}: {name!r} has a comma; separate tags by semicolons")
        if name and name.casefold() != BACKGROUND and name not in found:
            found.append(name)
    return tuple(found)


def _csv_rows(path):
    text, before = read_text(path), 0
    if re.match(r"sep=.\n", text):  # how spreadsheets note their delimiter
        text, before = text[6:], 1
    delimiter = _delimiter(text)
    rows, header = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True), None
    columns = (0, 1)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num + before}"
            row = [cell.strip() for cell in row]
            while len(row) > len(header or "12") and not row[-1]:  # spreadsheets fill up with empty cells
                row.pop()
            if not any(row):
                continue
            if len(row) == 1 and _columns(row[0].split(delimiter)) or header is not None and _in_quotes(row, delimiter):
                raise ValueError(f"{where}: the whole line stands in quotes ({row[0]!r}); remove them, or put quotes around single cells alone")
            if header is None:
                header, columns = row, _columns(row) or _no_columns(row, where)
                continue
            if len(row) != len(header):
                raise ValueError(_wrong_columns(header, row, delimiter, where))
            yield row[columns[0]], _within(row[columns[1]], delimiter, where), where
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num + before}: not comma-separated text ({error})") from error
    if header is None:
        raise ValueError(f"{path} is empty; expected the header 'image,tags' and one row an image")


def _in_quotes(row, delimiter):
    """Whether a row is one cell that holds a line: an image, a delimiter and what follows."""
    return not any(row[1:]) and re.fullmatch(rf".*\.\w{{2,4}}\s*{re.escape(delimiter)}.*", row[0]) is not None


def _within(cell, delimiter, where):
    """The tags of a cell."""
    if "," in _WITHIN[delimiter] and re.search(r"[^\W\d_][\s:=_(]+(0,\d+|1,0+)\b", cell):
        raise ValueError(f"{where}: {cell!r} looks like tags with scores; write names alone, separated by commas")
    return re.split(_WITHIN[delimiter], cell)


def _columns(header):
    """(column of the image, column of the tags) of a header, None where it does not say them once each."""
    cells = [cell.strip().lower() for cell in header]
    found = []
    for words in (_IMAGE, _TAGS):
        named = [at for at, cell in enumerate(cells) if cell in words]
        exact = [at for at in named if cells[at] == words[0]]
        if len(exact) != 1 and len(named) != 1:
            return None
        found.append((exact if len(exact) == 1 else named)[0])
    return tuple(found)


def _no_columns(header, where):
    raise ValueError(
        f"{where}: expected the header 'image,tags', got {','.join(header)!r}; write it, and separate the image by a comma and "
        "the tags by semicolons"
    )


def _wrong_columns(header, row, delimiter, where):
    comma = delimiter == ","
    expected = ("image,tag;tag" if comma else "two columns, image and tags") if len(header) == 2 else f"the {len(header)} columns of the header"
    return (
        f"{where}: expected {expected!r}, got {len(row)} column(s): {delimiter.join(row)!r}; separate the image by a "
        f"{'comma' if comma else repr(delimiter)} and the tags by {'semicolons' if comma else 'commas'}"
    )


def _header(text):
    return next((line for line in text.split("\n") if line.strip()), "")


def _delimiter(text):
    """What separates the columns of the header, a comma where it is none of these."""
    for delimiter in _WITHIN:
        if _columns([cell.strip().strip('"') for cell in _header(text).split(delimiter)]):
            return delimiter
    return ","


def _json_rows(path):
    content = _parsed(read_text(path), str(path))
    one = _is_record(content)
    if isinstance(content, _Pairs) and not one:
        for image, names in content:
            yield image, _names(names, f"{path}, {image!r}"), f"{path}, {image!r}"
    else:
        for number, record in enumerate(content if isinstance(content, list) and not one else [content], 1):
            yield *_record(record, f"{path}, entry {number}"), f"{path}, entry {number}"


def _json_line_rows(path):
    for number, line in enumerate(read_text(path).split("\n"), 1):  # names may hold other line separators
        if line.strip():
            where = f"{path}, line {number}"
            yield *_record(_parsed(line, where), where), where


class _Pairs(list):
    """The (name, value) pairs of a JSON object: in a dict the last of two equal names would win unseen."""


def _parsed(text, where):
    try:
        return parsed_json(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        place = f", line {error.lineno}" if "line" not in where and isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{where}{place}: not JSON ({error}); correct it") from error


def _is_record(content):
    """Whether an object tells of one photograph, and is not one of photographs of which one is called image."""
    return isinstance(content, _Pairs) and {"image", "tags"} <= {name for name, _ in content} and isinstance(dict(content)["image"], str)


def _record(record, where):
    """(image, names) of an object with "image" and "tags"."""
    fields = dict(record) if isinstance(record, _Pairs) else {}
    if not isinstance(fields.get("image"), str) or "tags" not in fields:
        raise ValueError(f'{where}: expected {{"image": "name", "tags": ["tag", ...]}}; correct it')
    return fields["image"], _names(fields["tags"], where)


def _names(names, where):
    """A list of tags, or a string of tags separated by semicolons."""
    if isinstance(names, str):
        return names.split(";")
    if not isinstance(names, list) or isinstance(names, _Pairs) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'{where}: expected tags as ["tag", ...]; write a list of class names, [] for background only')
    return names


_READERS = {".csv": _csv_rows, ".tsv": _csv_rows, ".json": _json_rows, ".jsonl": _json_line_rows}
