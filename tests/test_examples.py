"""The examples in the docstrings of the pure rooms run, and every public function there has one."""

import doctest
import importlib
import inspect
import warnings

import pytest
from test_house import MODULES, PURE, module_of, room

import lcrf_jax

PURE_NAMES = sorted(module_of(path) for path in MODULES if room(path) in PURE)
EXPORTED = [getattr(lcrf_jax, name) for name in lcrf_jax.__all__]
FUNCTIONS = [found for found in EXPORTED if inspect.isfunction(found) or inspect.isclass(found)]


@pytest.mark.slow_except("*numerics", "*metrics", "*params", "*energy", "*sampling", "*likelihoods", "*pixel_evidence", "*labels", "*mil")
@pytest.mark.parametrize("name", PURE_NAMES)
def test_the_examples_of_a_module_give_what_they_show(name):
    failures, _ = doctest.testmod(importlib.import_module(name), globs={})
    assert failures == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_an_exported_function_has_an_example(function):
    assert "\nExample:\n" in inspect.getdoc(function)


@pytest.mark.parametrize("name", sorted(lcrf_jax._MOVED))
def test_names_that_have_moved_work_and_say_so_once(name):
    vars(lcrf_jax).pop(name, None)
    with pytest.warns(DeprecationWarning, match=rf"lcrf_jax\.{name} has moved: write \S+"):
        first = getattr(lcrf_jax, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(lcrf_jax, name) is first
    if name != "scaled":
        assert first is getattr(lcrf_jax.likelihoods, name)
    vars(lcrf_jax).pop(name)


def test_a_name_that_never_was_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'lattices'"):
        lcrf_jax.lattices  # noqa: B018
