"""Every public function of arrays is lowered for GPUs and TPUs, with its derivative: a kernel that only a CPU has would be refused.

Lowering takes no such device. What is lowered is checked no further here: `bench device` compares numbers on a device.
"""

import inspect

import crf_functions
import every_function
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import device_checks
from lcrf_jax import crf, metrics
from lcrf_jax.nets.network import BACKBONES
from lcrf_jax.predict.refinement import refined_by_lattice
from lcrf_jax.predict.resizing import enlarged_grid
from lcrf_jax.train import fit
from lcrf_jax.train.methods import METHODS

pytestmark = pytest.mark.slow
PLATFORMS = ("cuda", "tpu")
SIZE = crf_functions.Size(9, 14, 3, 5, "float32", (5, 3))
LARGE = crf_functions.Size(112, 100, 3, 21, "uint8", (40, 3))  # labels are dropped, and the spatial Gaussian goes by pairs of rows
CASES = [(name, form) for name, call in crf_functions.EVERY.items() for form in (crf_functions.FORMS if call.of_forms else ("exact",))]


def check_lowered(function, *arguments):
    """It is lowered for each platform, and calls nothing that JAX has for the CPU alone."""
    check_text(jax.jit(function).trace(*arguments).lower(lowering_platforms=PLATFORMS).as_text())


def check_text(text):
    """It is a program, without calls of a CPU's library or of Python."""
    assert "func.func public @main" in text
    assert "lapack" not in text and "callback" not in text


def total(result):
    """The sum of all numbers with a point in a result."""
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.floating))


def check_with_gradient(function, position, *arguments):
    """The function and its gradient in one of its arguments, in one program: much of both is the same."""
    gradient = jax.grad(lambda *values: total(function(*values)), argnums=position)
    check_lowered(lambda *values: (function(*values), gradient(*values)), *arguments)


def test_what_a_cpu_alone_has_is_refused():
    with pytest.raises(NotImplementedError, match="schur.*not found for platform"):
        check_lowered(jax.scipy.linalg.schur, jnp.eye(3))


@pytest.mark.parametrize("name", sorted(set(every_function.EVERY) - {"majority_labels"}))  # that one is of NumPy
def test_functions_of_the_bound_and_the_baselines(name):
    function = every_function.EVERY[name].function
    arguments = [jnp.asarray(array) for array in every_function.of_call(name, every_function.arguments_of(12, 4))]
    floats = [at for at, array in enumerate(arguments) if jnp.issubdtype(array.dtype, jnp.floating)]
    result = jax.tree.leaves(jax.eval_shape(function, *arguments))
    if floats and any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in result) and name not in {"gibbs", "gibbs, likelihood"}:
        check_with_gradient(function, floats[0], *arguments)
    else:
        check_lowered(function, *arguments)


def of_form(name, form, size):
    call, params = crf_functions.EVERY[name], crf_functions.params_of(size, (4.0, 13.0, 2.0))
    arrays = crf_functions.arrays_of(size, "smooth", 1.0, 0)
    arguments = [jnp.asarray(arrays[array]) for array in call.arrays]
    return lambda *values: call.function(*values, form, params), arguments


@pytest.mark.parametrize(("name", "form"), CASES)
def test_functions_of_the_crf_in_each_form(name, form):
    function, arguments = of_form(name, form, SIZE)
    if len(arguments) == 2:
        check_with_gradient(function, 1, *arguments)
    else:
        check_lowered(function, *arguments)


@pytest.mark.parametrize("form", ["anchors", "lattice"])
@pytest.mark.parametrize("name", ["mean_field", "coarse_grid", "refine", "pairwise_energy"])
def test_functions_of_the_crf_at_a_size_where_labels_are_dropped_and_rows_paired(name, form):
    function, arguments = of_form(name, form, LARGE)
    check_with_gradient(function, 1, *arguments)


@pytest.mark.parametrize("form", crf_functions.FORMS)
def test_batches(form):
    """Under vmap, with labels dropped: what goes image by image on a CPU."""
    function, arguments = of_form("refine", form, SIZE)
    batch = [jnp.stack([array, array]) for array in arguments]
    check_with_gradient(jax.vmap(function), 1, *batch)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_networks(name):
    module = BACKBONES[name].module()
    side = 28 if name.startswith("dinov2") else 32
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    check_lowered(module.apply, variables, image)


def test_what_predicts():
    grid, weights = np.zeros((6, 5, 4), np.float32), np.zeros((128, 6), np.float32)
    check_lowered(enlarged_grid, grid, weights, np.zeros((64, 5), np.float32))
    image, valid = np.zeros((128, 64, 3), np.uint8), np.ones((128, 64), bool)
    check_lowered(
        lambda *values: refined_by_lattice(*values, kernel_params=crf.KernelParams(), num_iterations=10, unary_weight=1.0),
        np.zeros((128, 64, 4), np.float32), image, valid,
    )  # fmt: skip


def test_metrics():
    labels = np.zeros((4, 5), np.int32)
    assert {"confusion_matrix", "mean_iou", "iou_per_class"} <= {name for name, _ in inspect.getmembers(metrics, inspect.isfunction)}
    check_lowered(lambda a, b: metrics.confusion_matrix(a, b, 3), labels, labels)


@pytest.fixture(scope="module")
def prepared_in(tmp_path_factory):
    """A folder that keeps the features for all methods."""
    return tmp_path_factory.mktemp("features")


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.objective])
def test_train_steps_on_all_devices(method, prepared_in):
    config = device_checks.tiny_config(method, prepared_in, jax.device_count())
    step, *arguments = fit.first_step(device_checks.prepared_quietly(config))
    check_text(step.trace(*arguments).lower(lowering_platforms=PLATFORMS).as_text())
