"""Runs a notebook from its first cell to its last, and keeps what the cells show.

    .venv/bin/python docs/tools/notebook.py docs/tutorial.ipynb

A cell shows what it prints, and the value of its last line: a Pillow picture as PNG, anything else as text.
"""

import ast
import base64
import contextlib
import io
import json
import pathlib
import sys


def _shown(value) -> dict:
    if hasattr(value, "save") and hasattr(value, "convert"):
        stream = io.BytesIO()
        value.save(stream, format="PNG", optimize=True)
        data = {"image/png": base64.b64encode(stream.getvalue()).decode(), "text/plain": ["a picture"]}
    else:
        data = {"text/plain": [repr(value)]}
    return {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": None}


def run_cell(source: str, names: dict, filename: str) -> list[dict]:
    """One cell of code.

    Args:
      source: its text.
      names: the variables of the notebook; changed.
      filename: for tracebacks.

    Returns:
      Its outputs, as a notebook keeps them.
    """
    body = ast.parse(source).body
    last = ast.Expression(body.pop().value) if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body, []), filename, "exec"), names)  # noqa: S102 (our own notebook)
        value = None if last is None else eval(compile(last, filename, "eval"), names)
    outputs = [{"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}]
    return (outputs if printed.getvalue() else []) + ([] if value is None else [_shown(value)])


def run(notebook: dict, filename: str = "notebook") -> dict:
    """All cells of code in their order.

    Args:
      notebook: the JSON of the file; its outputs are replaced.
      filename: for tracebacks.

    Returns:
      The variables that the cells leave.
    """
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            cell["outputs"] = run_cell("".join(cell["source"]), names, f"{filename}, cell {number}")
    return names


def write(notebook: dict, path: pathlib.Path) -> None:
    """Writes a notebook with its outputs.

    Args:
      notebook: its JSON.
      path: of the file.
    """
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    given = pathlib.Path(sys.argv[1])
    content = json.loads(given.read_text(encoding="utf-8"))
    run(content, given.name)
    write(content, given)
