"""What the pages print can be typed: commands, settings, links, names; nothing is run here but small blocks."""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex

import pytest
from pages import PAGES, ROOT, anchors, blocks, commands, links

import lcrf_jax

COMMANDS = commands()
OF_VOC = ("docs/original.md", "docs/export.md")


def flags_of(module):
    """The names of the flags that a program defines, by its sources."""
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    if "define_process_flags()" in source:
        source += (ROOT / "experiments" / "reporting.py").read_text(encoding="utf-8")
    return source


def test_there_are_commands_of_every_program_for_users():
    named = {command.module.removeprefix("experiments.") for command in COMMANDS}
    assert named >= {
        "ablation", "bench", "build_voc", "cache", "check_data", "compare", "demo", "estimators", "evaluate",
        "example_folder", "export", "export_onnx", "predict", "train", "voc_results",
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}:{c.module} {c.arguments[:40]}")
def test_a_printed_command_has_flags_and_configurations_that_exist(command):
    source = flags_of(command.module)
    arguments = command.arguments.partition(" #")[0]
    words = shlex.split(arguments.rstrip(" &)'") if arguments.count("'") % 2 else arguments.rstrip(" &"))
    for flag in re.findall(r"--(\w+)(?=[=\s]|$)", arguments):
        assert f'"{flag}"' in source or flag == "config" and "config_flags" in source, flag
    for word in words:
        if word.startswith("--config="):
            name = word.removeprefix("--config=").partition(":")[0]
            assert name == "CONFIG" or (ROOT / name).is_file() or (ROOT / f"experiments/configs/{name}.py").is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_the_settings_that_a_page_names_exist(page):
    config = importlib.import_module(f"experiments.configs.{'voc2012' if page in OF_VOC else 'folder'}").get_config()
    for dotted in set(re.findall(r"--config\.([a-z][a-z_0-9.]*[a-z0-9])(?:=|\b)", PAGES[page])) - {"baselines.size"}:
        value = config
        for part in dotted.split("."):
            value = value[part]


@pytest.mark.parametrize("page", PAGES)
def test_files_pictures_and_headings_that_a_page_links_to_exist(page):
    folder = (ROOT / page).parent
    for path, anchor in links(PAGES[page]):
        assert not path or (folder / path).is_file(), path
        if anchor:
            name = str((folder / path).resolve().relative_to(ROOT)) if path else page
            assert anchor in anchors(PAGES[name]), f"{path}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_blocks_of_a_page_are_python_and_name_what_is_there(page):
    for code in blocks(page):
        if code.startswith(">>>"):
            continue
        for node in ast.walk(ast.parse(code.replace("    ...\n", ""))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "lcrf_jax":
                assert hasattr(lcrf_jax, node.attr), node.attr
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lcrf_jax"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)


def test_every_page_with_blocks_is_run_by_a_test():
    tests = "".join((ROOT / "tests" / name).read_text(encoding="utf-8") for name in ("test_readme.py", "docs/test_running_pages.py"))
    assert {page for page in PAGES if blocks(page) and f'"{page}"' not in tests} == {"docs/methods.md"}  # below


def test_the_new_method_of_its_page_is_one():
    """The page of a method to be added: the loss, and its line in the dict."""
    import jax
    import numpy as np

    from lcrf_jax import baselines
    from lcrf_jax.train import methods

    loss, line = blocks("docs/methods.md")
    names = {**vars(methods)}
    exec(compile(loss, "methods.md", "exec"), names)  # noqa: S102 (our own page)
    tags = np.array([True, True, False])
    logits = np.zeros((4, 3), np.float32)
    np.testing.assert_allclose(names["size_loss"](logits, tags), 1 / 3, rtol=1e-6)  # the class that is not there
    names["baselines"] = argparse.Namespace(**vars(baselines), size_loss=names["size_loss"])
    exec(compile(line.replace("    ...\n", ""), "methods.md", "exec"), names)  # noqa: S102
    method = names["METHODS"]["size"]
    record = argparse.Namespace(tags=tags)
    assert method.title == "size" and method.supervision == "image tags" and method.objective is not None
    np.testing.assert_allclose(names["_size"](jax.random.key(0), logits, record, {}), 1 / 3, rtol=1e-6)


def test_every_page_is_on_the_site_and_on_the_front_page():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    for page in PAGES:
        name = page.removeprefix("docs/")
        if page.startswith("docs/"):
            assert f"- {name}\n" in nav, f"{page} is not in the nav of mkdocs.yml"
            assert f"]({page})" in PAGES["README.md"], f"the README does not link to {page}"
    for room in sorted(path.name for path in (ROOT / "lcrf_jax").iterdir() if (path / "__init__.py").is_file()):
        assert f"- reference/{room}.md\n" in nav, f"{room} is not in the nav of mkdocs.yml"


def test_the_front_page_is_short_and_begins_with_what_can_be_typed():
    lines = PAGES["README.md"].splitlines()
    assert 100 <= len(lines) <= 130
    assert "make demo" in lines[2] and "make test" in lines[3]
    assert PAGES["README.md"].count("\n| method |") == 1


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_settings_is_current_and_has_a_word_on_each():
    settings = tool("settings_page")
    page = settings.page()
    assert page == PAGES["docs/settings.md"], "write it anew: .venv/bin/python docs/tools/settings_page.py"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert not [row for row in rows if row.endswith("|  |")]
    from experiments.configs import base

    every = [name.removesuffix(".*") for name, _ in settings.flat(base.get_config())]
    for stale in settings.WORDS:
        assert any(f"{name}.".startswith(f"{stale}.") for name in every), stale


def test_the_notebook_has_its_outputs_and_is_small():
    path = ROOT / "docs" / "tutorial.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 500_000
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    pictures = [output for cell in cells for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert len(cells) >= 8 and len(pictures) >= 4
    for cell in cells:
        ast.parse("".join(cell["source"]))
