"""Pages that are made and not written: the reference of each room, the notebook, and CONTRIBUTING.md."""

import ast
import base64
import json
import pathlib
import re

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Rooms whose __init__ exports what is public. Of the others every module is shown.
EXPORTED = ("crf", "bound", "baselines")
ROOMS = ("numerics", "crf", "bound", "metrics", "baselines", "machine", "nets", "data", "runfolder", "pictures", "predict", "train")
OUTPUT_LINES = 30


def reference_of(room: str) -> str:
    """The page of a room.

    Args:
      room: its name below lcrf_jax.

    Returns:
      Markdown with the directives of mkdocstrings.
    """
    path = ROOT / "lcrf_jax" / room
    if not path.is_dir():
        return f"# {room}\n\n::: lcrf_jax.{room}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    head = f"# {room}\n\n::: lcrf_jax.{room}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
    if room in EXPORTED:
        names = re.search(r"__all__ = \[(.*?)\]", (path / "__init__.py").read_text(encoding="utf-8"), re.DOTALL)[1]
        members = "".join(f"        - {name}\n" for name in re.findall(r'"(\w+)"', names))
        return f"{head}      show_docstring_attributes: false\n      members:\n{members}"
    modules = sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in path.rglob("*.py") if file.name != "__init__.py"
    )
    return f"{head}      members: false\n" + "".join(
        f"\n## {module.removeprefix(f'lcrf_jax.{room}.')}\n\n::: {module}\n    options:\n      show_root_heading: false\n      heading_level: 3\n"
        for module in modules
    )


def flags_of(source: str) -> list[tuple[str, str]]:
    """The flags that a program defines.

    Args:
      source: its text.

    Returns:
      (name, what it is for) of each, in their order.
    """
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and "DEFINE_" in ast.unparse(node.func)]
    texts = [[part.value for part in (*call.args, *(k.value for k in call.keywords)) if isinstance(part, ast.Constant)] for call in calls]
    named = [[text for text in found if isinstance(text, str)] for found in texts]
    return [(found[0], max(found[1:], key=len, default="")) for found in named if found]


def programs() -> str:
    """The page of the programs: what each says of itself, and its flags.

    Returns:
      Markdown.
    """
    head = "`python -m experiments.NAME`, in your clone. `--help` shows the flags with their defaults; "
    parts = [f"# Programs\n\n{head}`--config.NAME=VALUE` are the [settings](../settings.md).\n"]
    for path in sorted((ROOT / "experiments").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if f"python -m experiments.{path.stem} " not in source:  # parts of other programs
            continue
        described = (ast.get_docstring(ast.parse(source)) or "").splitlines()
        lines = [line if line.startswith("    ") else re.sub(r"([\[*_<])", r"\\\1", line) for line in described]
        rows = "".join(f"| `--{name}` | {text.replace('|', chr(92) + '|')} |\n" for name, text in flags_of(source))
        parts.append(f"## {path.stem}\n\n" + "\n".join(lines) + "\n" + (f"\n| flag | |\n|---|---|\n{rows}" if rows else ""))
    return "\n".join(parts)


def _output(output: dict, name: str, assets: dict[str, bytes]) -> str:
    data = output.get("data", {})
    for kind, extension in (("image/png", "png"), ("image/jpeg", "jpg")):
        if kind in data:
            assets[name := f"{name}.{extension}"] = base64.b64decode("".join(data[kind]))
            return f"![output of the cell above]({name})\n"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```\n" if text.strip() else ""


def notebook_as_markdown(notebook: dict, assets: dict[str, bytes]) -> str:
    """A page of a notebook with the outputs that it was saved with.

    Args:
      notebook: the JSON of an .ipynb file.
      assets: takes the pictures, by file name.

    Returns:
      Markdown.
    """
    parts = []
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source + "\n")
            continue
        parts.append(f"```python\n{source}\n```\n")
        parts += [_output(output, f"tutorial-{number}-{place}", assets) for place, output in enumerate(cell["outputs"])]
    return "\n".join(part for part in parts if part)


def on_files(files: Files, config) -> Files:
    """Adds the pages that are made.

    Args:
      files: of the site.
      config: of MkDocs.

    Returns:
      The files.
    """
    made: dict[str, str | bytes] = {f"reference/{room}.md": reference_of(room) for room in ROOMS}
    made["reference/index.md"] = "# The API\n\n::: lcrf_jax\n    options:\n      show_root_heading: false\n      members: [load]\n"
    made["reference/programs.md"] = programs()
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made["contributing.md"] = contributing.replace("](docs/", "](")
    pictures: dict[str, bytes] = {}
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
    made["tutorial.md"] = notebook_as_markdown(notebook, pictures)
    for name, content in {**made, **pictures}.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links out of docs/, which are right on a page of the repository, as links within the site.

    Args:
      markdown: of the page.
      page: of MkDocs.
      config: of MkDocs.
      files: of the site.

    Returns:
      The text with these links changed.
    """
    markdown = markdown.replace("](tutorial.ipynb)", "](tutorial.md)")
    return markdown.replace("](../CONTRIBUTING.md)", "](contributing.md)").replace("](../README.md)", "](index.md)")
