"""The rules of the house: floors, docstrings, declared dependencies, and an import that does nothing."""

import ast
import configparser
import pathlib
import re
import subprocess
import sys
import textwrap
from importlib import metadata

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lcrf_jax"

# A package stands for all of its files. A new file gets its line here.
FLOORS = {
    "numerics": 0,
    "kernels": 1, "hashing": 1, "anchors": 1, "sampling": 1, "metrics": 1, "saliency": 1,
    "lattice": 2, "observation": 2,
    "filters": 3,
    "crf": 4, "gibbs": 4,
    "elbo": 5, "baselines": 5,
    "locks": 6, "processes": 6, "signals": 6,
    "nets": 7, "data": 7, "objectives": 7, "descriptions": 7,
    "methods": 8, "features": 8, "checkpoints": 8, "report": 8, "runlog": 8, "html_report": 9,
    "cues": 9, "training": 9, "inference": 9, "splits": 9, "compilation": 9,
    "preparation": 10, "evaluation": 10, "export": 10, "tiling": 10, "trained": 10, "runs": 11,
}
LOW_IMPORTS = {"jax", "numpy", "einops"}
FORBIDDEN = {"tensorflow", "torch", "torchvision", "keras"}


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


MODULES = [path for path in python_files("lcrf_jax") if path != PACKAGE / "__init__.py"]


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def imported(path, root=ROOT):
    """Dotted names of all that a file imports, at any depth of it; relative imports made absolute."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def unit(path):
    """First name below lcrf_jax: 'crf' for crf.py, 'nets' for every file of nets/."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_units(path):
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "lcrf_jax":
            yield parts[1] if len(parts) > 1 else ""


LOW_MODULES = [path for path in MODULES if FLOORS.get(unit(path), 99) <= 5]


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_a_file_imports_only_from_lower_floors(path):
    assert unit(path) in FLOORS, f"{path.name} has no floor: give it one in FLOORS"
    for other in set(imported_units(path)):
        assert other in FLOORS, f"{path.name} imports lcrf_jax.{other}, which has no floor"
        within_a_package = other == unit(path) and path.parent != PACKAGE
        assert within_a_package or FLOORS[other] < FLOORS[unit(path)], \
            f"{path.name} (floor {FLOORS[unit(path)]}) imports {other} (floor {FLOORS[other]})"


@pytest.mark.parametrize("path", LOW_MODULES, ids=names(LOW_MODULES))
def test_floors_0_to_5_import_only_jax_numpy_einops(path):
    outside = {name.split(".")[0] for name in imported(path)} - {"lcrf_jax"} - set(sys.stdlib_module_names)
    assert outside <= LOW_IMPORTS


def test_orbax_is_imported_in_one_file_and_no_second_framework_anywhere():
    users = set()
    for path in python_files("lcrf_jax", "experiments", "tests"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & FORBIDDEN, f"{path} imports {roots & FORBIDDEN}"
        if "orbax" in roots:
            users.add(path.relative_to(ROOT).as_posix())
    assert users == {"lcrf_jax/checkpoints.py"}


def test_nothing_in_the_library_imports_experiments_or_tests():
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & {"experiments", "tests"}, path


def test_every_import_of_the_library_is_a_declared_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = (config["options"]["install_requires"] + extras["tfds"] + extras["superpixels"] + extras["hub"] + extras["sbd"]).split()
    declared = {re.match(r"[\w-]+", line).group().lower().replace("_", "-") for line in lines}
    owners = metadata.packages_distributions()
    for path in MODULES:
        roots = {name.split(".")[0] for name in imported(path)}
        for root in roots - {"lcrf_jax"} - set(sys.stdlib_module_names):
            found = {owner.lower().replace("_", "-") for owner in owners.get(root, [])}
            assert found & declared, f"{path.name} imports {root}, which setup.cfg does not declare"


def test_every_declared_dependency_is_pinned():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    lines = (config["options"]["install_requires"] + extras["tfds"] + extras["test"]).split()
    pinned = {match.group(1).lower().replace("_", "-")
              for match in re.finditer(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)}
    missing = {re.match(r"[\w-]+", line).group().lower().replace("_", "-") for line in lines} - pinned
    assert not missing, f"requirements.txt has no pin for {missing}"


@pytest.mark.parametrize("path", LOW_MODULES, ids=names(LOW_MODULES))
def test_public_functions_of_floors_0_to_5_are_documented(path):
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        documentation = ast.get_docstring(node) or ""
        assert re.match(r"\S.*\.$", documentation.split("\n")[0]), f"{node.name}: first line is no sentence"
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if every:
            assert "\nArgs:\n" in documentation, f"{node.name} has no Args"
        for argument in every:
            assert re.search(rf"^  [\w, ]*\b{argument.arg}\b[\w, ]*:", documentation, re.MULTILINE), \
                f"{node.name}: argument {argument.arg} is not described"
        assert "\nReturns:\n" in documentation, f"{node.name} has no Returns"


@pytest.mark.parametrize("path", LOW_MODULES, ids=names(LOW_MODULES))
def test_named_tuples_are_the_only_classes_of_floors_0_to_5(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert [ast.unparse(base).split(".")[-1] for base in node.bases] == ["NamedTuple"], node.name


@pytest.mark.parametrize("path", LOW_MODULES, ids=names(LOW_MODULES))
def test_public_functions_of_floors_0_to_5_are_not_jitted_and_have_no_reduction(path):
    """A private function may be, as a whole: it is then traced once for all of its calls in a program."""
    tree = ast.parse(path.read_text())
    private = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")]
    allowed = {id(node) for function in private for mark in function.decorator_list for node in ast.walk(mark)}
    calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in allowed}
    assert not calls & {"jax.jit", "jax.pmap"}
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert "reduction" not in arguments


def in_a_fresh_interpreter(code, folder):
    return subprocess.run([sys.executable, "-B", "-W", "error::DeprecationWarning:lcrf_jax", "-c",
                           textwrap.dedent(code)], cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""},
                          capture_output=True, text=True, timeout=120, check=False)


def test_importing_the_package_prints_nothing_and_starts_no_device(tmp_path):
    result = in_a_fresh_interpreter("""
        import lcrf_jax
        import sys
        if "jax" in sys.modules:
            from jax._src import xla_bridge
            assert not xla_bridge.backends_are_initialized()
    """, tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_importing_every_module_has_no_side_effects(tmp_path):
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES
               if path.name != "__init__.py"]
    result = in_a_fresh_interpreter(f"""
        import importlib, os, random, sys
        import jax, numpy
        import optax, flax.linen, PIL.Image, tqdm, tensorboardX, orbax.checkpoint, grain

        def watch(event, args):
            if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
                raise RuntimeError(f"importing wrote {{args[0]}}")
            if event in ("os.mkdir", "os.remove", "os.rename", "socket.connect", "subprocess.Popen"):
                raise RuntimeError(f"importing did {{event}} {{args}}")

        def state():
            return (dict(os.environ), dict(jax.config.values), numpy.random.get_state()[1].tolist(),
                    random.getstate())

        before = state()
        sys.addaudithook(watch)
        for name in {modules!r}:
            importlib.import_module(name)
            from jax._src import xla_bridge
            assert not xla_bridge.backends_are_initialized(), f"importing {{name}} starts a device"
        assert state() == before
    """, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
