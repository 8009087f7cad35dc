"""The pages of the repository, and what stands in them: blocks of code, commands, links, anchors."""

import doctest
import pathlib
import re
from typing import NamedTuple

from lcrf_jax.command import module_of

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}


class Command(NamedTuple):
    page: str
    module: str
    arguments: str


def blocks(page):
    """The text of each Python block of a page."""
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def run_block(code, names, page):
    """Runs a block in a dict of names; one that begins with a prompt gives what it shows."""
    if not code.startswith(">>>"):
        exec(compile(code, page, "exec"), names)  # noqa: S102 (our own pages)
        return
    test = doctest.DocTestParser().get_doctest(code, names, page, None, None)
    assert doctest.DocTestRunner(verbose=False).run(test, clear_globs=False).failed == 0
    names.update(test.globs)


def run_page(page, names=None):
    """Runs all blocks of a page one after the other; they share their names."""
    names = {} if names is None else names
    for code in blocks(page):
        run_block(code, names, page)
    return names


def commands():
    """Every `python -m experiments.PROGRAM ...` and `lcrf PROGRAM ...` that stands in a block of a page, continued lines joined."""
    found = []
    for page, text in PAGES.items():
        text = text.replace("\\\n", " ")
        lines = re.findall(r"^ {4,}.*?python -m (experiments\.\w+)[ ]*(.*)$", text, re.MULTILINE)
        lines += [(f"experiments.{module_of(name)}", rest) for name, rest in re.findall(r"^ {4,}lcrf ([\w-]+)[ ]*(.*)$", text, re.MULTILINE)]
        found += [Command(page, *line) for line in lines]
    return found


def anchors(text):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text):
    """(path, anchor) of the links of a page that lead to files of the repository or into the page itself."""
    return [
        (path, anchor)
        for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text))
    ]
