"""Settings that have to be made before jax is imported, and the photographs that some tests need."""

import os
import pathlib

import pytest

NUM_DEVICES = 4
ROOT = pathlib.Path(__file__).resolve().parent.parent

# Virtual devices exist on the CPU alone, and the tolerances of the tests are those of the CPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    # The tests compile much and compute little: without the optimisations of the backend they take half the time.
    flags = [f"--xla_force_host_platform_device_count={NUM_DEVICES}", "--xla_backend_optimization_level=0",
             "--xla_llvm_disable_expensive_passes=true"]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
# Compiled functions outlive the test run: the second one takes a fraction of the first.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def pytest_addoption(parser):
    parser.addoption("--voc-animals", metavar="FOLDER", default=os.environ.get("LCRF_VOC_ANIMALS"),
                     help="folder of photographs in VOC layout, for the tests marked `photographs`; "
                          "the environment variable LCRF_VOC_ANIMALS does the same")


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


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_of_one_module():
    """Every compiled function maps memory until it is dropped; a process may have 65 530 such maps on Linux."""
    yield
    import jax

    jax.clear_caches()
