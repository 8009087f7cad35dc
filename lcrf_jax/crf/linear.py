"""Linear maps with a transpose of their own, which can be differentiated any number of times and in both modes.

JAX would differentiate the loops of a lattice step by step, and cannot in reverse mode, where their length depends on
the image. But each map is linear in its values: its derivative is itself, and its transpose is known.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")
_Map = Callable[[Any, jax.Array], jax.Array]


def is_sought(tangent: Any) -> bool:
    """Whether a tangent that JAX hands over, with `symbolic_zeros`, is more than a zero by construction.

    Args:
      tangent: of one array.
    Returns:
      bool.
    """
    zero = isinstance(tangent, jax.custom_derivatives.SymbolicZero)
    return not zero and getattr(tangent, "dtype", None) != jax.dtypes.float0


def is_tree_of_arrays(tree: Any) -> bool:
    """Whether JAX can look into something: every leaf is an array or a number.

    Args:
      tree: anything; an object of a class that is no pytree is a leaf itself.
    Returns:
      bool.
    """
    return all(hasattr(leaf, "__array__") or jnp.isscalar(leaf) for leaf in jax.tree.leaves(tree))


def sought_parts(arguments: Tree, tangents: Tree) -> tuple[list[Any], list[Any], Callable[[list[Any]], Tree]]:
    """The leaves whose derivative is sought, for a rule with `symbolic_zeros`.

    Args:
      arguments: a pytree.
      tangents: their tangents, of the same structure.
    Returns:
      Those leaves, their tangents, and a function that puts such leaves into the place of their own in the arguments.
    """
    leaves, structure = jax.tree.flatten(arguments)
    all_tangents = jax.tree.leaves(tangents)
    places = [i for i, tangent in enumerate(all_tangents) if is_sought(tangent)]

    def replaced(new):
        every = list(leaves)
        for i, leaf in zip(places, new, strict=True):
            every[i] = leaf
        return jax.tree.unflatten(structure, every)

    return [leaves[i] for i in places], [all_tangents[i] for i in places], replaced


def without_derivative(arguments: Tree, message: str) -> Tree:
    """The arguments; a derivative in them is refused in words, and not taken for zero.

    Args:
      arguments: a pytree of arrays.
      message: of the error.
    Returns:
      The same.
    Raises:
      TypeError: while JAX differentiates with respect to one of them.
    """

    @jax.custom_jvp
    def same(arguments):
        return arguments

    @functools.partial(same.defjvp, symbolic_zeros=True)
    def refuse(primals, tangents):
        _refuse_derivative(tangents, message)
        return primals[0], tangents[0]

    return same(arguments)


def _refuse_derivative(tangents, message):
    if any(map(is_sought, jax.tree.leaves(tangents))):
        raise TypeError(message)


def linear_map(function: _Map, transpose: _Map, *, message: str) -> _Map:
    """A function that is linear in its second argument, with a known transpose, and its derivatives.

    A batch is done one by one: the loops of such functions are as long as each image needs.

    Args:
      function: (structure, values) -> values; linear in the values.
      transpose: (structure, values) -> values; the transposed map of the same structure.
      message: of the error where a derivative in the structure is sought.
    Returns:
      A function with the signature of `function`.
    """
    function = jax.custom_batching.sequential_vmap(function)
    transpose = jax.custom_batching.sequential_vmap(transpose)

    @jax.custom_jvp
    def mapped(structure, values):
        return function(structure, values)

    @functools.partial(mapped.defjvp, symbolic_zeros=True)
    def derivative(primals, tangents):
        structure, values = primals
        _refuse_derivative(tangents[0], message)
        tangent = jnp.zeros_like(values) if not is_sought(tangents[1]) else tangents[1]
        return mapped(structure, values), transposable(
            functools.partial(function, structure), functools.partial(transpose, structure), tangent
        )

    return mapped


def transposable(function: Callable, transpose: Callable, values: jax.Array) -> jax.Array:
    """A linear function of values, which JAX can differentiate, transpose, and batch.

    It is written as the solution x of I x = function(values), for which JAX has all of these rules. Such a solution
    has the shape of the right-hand side, so where the numbers of rows differ both have a place in one array.

    Args:
      function: linear, from [m, K] to [n, K].
      transpose: its transpose.
      values: [m, K].
    Returns:
      [n, K].
    """

    def identity(values):
        return values

    rows, mapped_rows = len(values), jax.eval_shape(function, values).shape[0]
    if rows == mapped_rows:
        return jax.lax.custom_linear_solve(
            identity, values, lambda _, given: function(given), lambda _, given: transpose(given)
        )

    def forwards(_, given):
        return jnp.pad(function(given[:rows]), ((rows, 0), (0, 0)))

    def backwards(_, given):
        return jnp.pad(transpose(given[rows:]), ((0, mapped_rows), (0, 0)))

    given = jnp.pad(values, ((0, mapped_rows), (0, 0)))
    return jax.lax.custom_linear_solve(identity, given, forwards, backwards)[rows:]
