"""Functions as one program each: called plainly they are one for each operation and shape, and compiling is what tests cost."""

import functools
import inspect
import types

import jax
import numpy as np


def compiled(function):
    """The function under jit, whatever its arguments: arrays are traced, and all else is static."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs))
        traced = tuple(isinstance(leaf, np.ndarray | np.generic | jax.Array) for leaf in leaves)
        static = tuple(None if is_traced else leaf for leaf, is_traced in zip(leaves, traced))
        types = tuple(type(leaf) for leaf in static)  # 1, 1.0 and True are equal
        program = _program(function, tree, traced, static, types)
        return program(*(leaf for leaf, is_traced in zip(leaves, traced) if is_traced))

    return call


@functools.lru_cache(maxsize=256)
def _program(function, tree, traced, static, types):
    def run(*arrays):
        arrays = iter(arrays)
        leaves = [next(arrays) if is_traced else leaf for leaf, is_traced in zip(static, traced)]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return function(*args, **kwargs)

    return jax.jit(run)


def compiled_functions(module):
    """The names of a module, its public functions compiled."""
    names = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own = {name for name, value in names.items() if inspect.isfunction(value) and value.__module__.startswith("lcrf_jax")}
    return types.SimpleNamespace(**{name: compiled(value) if name in own else value for name, value in names.items()})
