"""The examples in the docstrings of the pure rooms run, and every public function there has one."""

import doctest
import importlib
import inspect

import pytest
from test_house import MODULES, PURE, module_of, room

import lcrf_jax

PURE_NAMES = sorted(module_of(path) for path in MODULES if room(path) in PURE)
EXPORTED = [getattr(lcrf_jax, name) for name in lcrf_jax.__all__]
FUNCTIONS = [found for found in EXPORTED if inspect.isfunction(found) and found.__module__ in PURE_NAMES]
# No example is asked of these.
WITHOUT = {"lcrf_jax.crf.exact", "lcrf_jax.crf.image_kernels"}


@pytest.mark.parametrize("name", PURE_NAMES)
def test_the_examples_of_a_module_give_what_they_show(name):
    failures, _ = doctest.testmod(importlib.import_module(name), globs={})
    assert failures == 0


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_an_exported_function_has_an_example(function):
    if function.__module__ not in WITHOUT:
        assert "\nExample:\n" in inspect.getdoc(function)
