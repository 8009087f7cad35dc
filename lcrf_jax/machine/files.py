"""Files that are written whole or not at all."""

import os
import pathlib


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a text file in one move: a file that is there is whole.

    Args:
      path: pathlib.Path of the file.
      text: its content.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
