"""Settings that have to be made before jax is imported, and the photographs that some tests need."""

import fnmatch
import gc
import os
import pathlib
import shutil
from importlib import metadata

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
# Four virtual devices. For the rest: the tests compile much and compute little, and without the optimisations of the
# compiler's back end they take half the time. `make test-default-flags` runs them with those that users have.
FLAGS = {
    "--xla_force_host_platform_device_count": "4",
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    "--xla_cpu_parallel_codegen_split_count": "1",
}
if metadata.version("jaxlib").startswith("0.10."):  # a later one does not start with a flag that it no longer knows
    FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
DEFAULT_FLAGS = "LCRF_TEST_DEFAULT_FLAGS"
# The rooms of pure functions. In their tests no type is promoted without a word, and a warning is an error.
PURE = ("crf", "bound", "baselines", "test_numerics.py", "test_metrics.py", "test_confusion_sums.py")


def merged_flags(own, wanted):
    """Flags of XLA as one string: a developer's own, and of those wanted the ones that these do not set."""
    given = own.split()
    named = {flag.partition("=")[0] for flag in given}
    return " ".join([*given, *(f"{name}={value}" for name, value in wanted.items() if name not in named)])


def wanted_flags(environment):
    """The flags of the tests, or only the number of devices where the environment asks for the rest as users have it."""
    if environment.get(DEFAULT_FLAGS, "0") == "0":
        return FLAGS
    return {name: value for name, value in FLAGS.items() if name.endswith("device_count")}


# Virtual devices exist on the CPU alone, and the tolerances of the tests are those of the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = merged_flags(os.environ.get("XLA_FLAGS", ""), wanted_flags(os.environ))
# Compiled functions outlive the test run: the second one takes a fraction of the first.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Where in the sources each operation is from makes a program's text longer, and a tenth of the time goes into it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Tracing makes objects by the million, nearly all of which last: the collector is to look at them more rarely.
gc.set_threshold(10_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption("--voc-animals", metavar="FOLDER", default=os.environ.get("LCRF_VOC_ANIMALS"),
                     help="folder of photographs in VOC layout, for the tests marked `photographs`; "
                          "the environment variable LCRF_VOC_ANIMALS does the same")


# The files that take longest, in front: no process is left alone with one of them at the end.
FIRST = ("process_faults", "derivatives", "kills", "methods", "every_function_of_crf", "faults", "voc2012", "compare", "export", "energy",
         "mean_field", "running_pages", "runs", "training", "experiments", "predict_program", "gibbs", "objectives", "objective_estimators")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What is slow beside the tests that say so themselves, and what is pure.

    `slow_except("a", "b*")` leaves the cases with these ids to `make test`. A file's SLOW_FIXTURES take long to make: the
    tests that need one of them are slow.
    """
    items.sort(key=lambda item: FIRST.index(name) if (name := item.path.stem.removeprefix("test_")) in FIRST else len(FIRST))
    for item in items:
        if set(item.fixturenames) & set(getattr(item.module, "SLOW_FIXTURES", ())):
            item.add_marker(pytest.mark.slow)
        for marker in item.iter_markers("slow_except"):
            if not any(fnmatch.fnmatch(item.callspec.id, pattern) for pattern in marker.args):
                item.add_marker(pytest.mark.slow)
        if item.path.relative_to(TESTS).parts[0] in PURE:
            item.add_marker(pytest.mark.pure)
            item.add_marker(pytest.mark.filterwarnings("error"))
            # What the garbage collector meets here may be of another test.
            item.add_marker(pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"))


@pytest.fixture(autouse=True)
def strict_promotion(request):
    """In the tests of pure functions types are not promoted, but for those that say why: `promotes("why")`."""
    if request.node.get_closest_marker("pure") is None or request.node.get_closest_marker("promotes"):
        yield
        return
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def voc_animals(request):
    """Folder of photographs in VOC layout; the test is skipped where none was given."""
    given = request.config.getoption("--voc-animals")
    if not given:
        pytest.skip("needs photographs: give their folder with --voc-animals=FOLDER or LCRF_VOC_ANIMALS")
    folder = pathlib.Path(given).expanduser().resolve()
    missing = [name for name in ("JPEGImages", "classes.txt", "tags.csv") if not (folder / name).exists()]
    if missing:
        pytest.fail(f"expected a folder in VOC layout, got {folder} without {', '.join(missing)}; "
                    "correct --voc-animals or LCRF_VOC_ANIMALS")
    return folder


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(folder, how the program ended) of one finished run; not to be written to."""
    from programs import finished_run

    base = tmp_path_factory.getbasetemp()
    return finished_run(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="module")
def checkpoint(tiny_run, tmp_path_factory):
    """A copy of the finished run, which the tests may write to."""
    assert tiny_run[1].code == 0, tiny_run[1].err
    return shutil.copytree(tiny_run[0], tmp_path_factory.mktemp("runs") / "tiny")


def _maps_of_memory():
    """(number of this process, most that there may be); none where the system does not tell."""
    try:
        own = pathlib.Path("/proc/self/maps").read_bytes().count(b"\n")
        return own, int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return 1, 0


@pytest.fixture(scope="module", autouse=True)
def room_for_compiled_functions():
    """Every compiled function maps memory until it is dropped, and a process may have 65 530 such maps on Linux."""
    yield
    own, most = _maps_of_memory()
    if own > most / 3:
        import jax

        jax.clear_caches()
