"""The documentation as a site: it builds, is whole, fetches nothing from elsewhere, and a broken link fails."""

import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

pytestmark = pytest.mark.slow
PARTS = ("Makefile", "CONTRIBUTING.md", "mkdocs.yml", "docs", "lcrf_jax", "experiments")


def make_docs(folder):
    """In the environment of this clone; it is made if it is not there, which needs a package index."""
    command = ["make", "docs", f"DOCS_VENV={ROOT / '.venv-docs'}", f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What the site is made of, in a folder of its own, and the site."""
    copy = tmp_path_factory.mktemp("clone")
    for name in PARTS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore) if (ROOT / name).is_dir() else shutil.copy2(ROOT / name, copy)
    ended = make_docs(copy)
    if "No matching distribution" in ended.stderr or "Could not find a version" in ended.stderr:
        pytest.skip(f"no package index can be reached: {ended.stderr.strip().splitlines()[-1]}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return copy


def test_the_site_has_every_page_and_its_equations_and_examples_are_drawn(clone):
    pages = {path.relative_to(clone / "site").as_posix(): path.read_text(encoding="utf-8") for path in (clone / "site").rglob("*.html")}
    assert set(pages) >= {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} | {"tutorial.html", "contributing.html"}
    bound = pages["reference/bound.html"]
    assert "<math" in bound and 'class="equation"' in bound and "class_evidence" in bound
    programs = pages["reference/programs.html"]
    assert 'id="train"' in programs and "--workdir" in programs and "The last line printed is the mIoU" in programs
    assert pages["tutorial.html"].count("<img") >= 4
    for name, text in pages.items():
        assert ".. math::" not in text or name == "contributing.html", name
        assert "&gt;&gt;&gt;" in text or "<blockquote>" not in text or not name.startswith("reference/"), name
        assert not re.search(r"<p>(Returns|Raises|Args):", text), f"{name}: a section of a docstring is no section"


def test_the_site_asks_nothing_of_other_hosts(clone):
    for path in (clone / "site").rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r'\bsrc="(?:https?:)?//[^"]*"', text), path
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(?:https?:)?//', text), path


def test_a_broken_link_fails(clone):
    with (clone / "docs/faq.md").open("a", encoding="utf-8") as page:
        page.write("\nSee [nothing](nothing.md) and [nowhere](crf.md#nowhere).\n")
    ended = make_docs(clone)
    assert ended.returncode != 0
    assert "nothing.md" in ended.stderr + ended.stdout and "#nowhere" in ended.stderr + ended.stdout
