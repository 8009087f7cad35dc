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


def is_traced(tree: Any) -> bool:
    """Whether JAX traces a part of something, so that its values are not known.

    Args:
      tree: anything.
    Returns:
      bool.
    """
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


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
    def same(structure, values):
        del structure
        return values

    @functools.partial(same.defjvp, symbolic_zeros=True)
    def refuse(primals, tangents):
        _refuse_derivative(tangents[0], message)
        return primals[1], tangents[1]

    return functools.partial(_mapped, function, transpose, same)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _mapped(function, transpose, same, structure, values):
    return solved(
        functools.partial(function, structure), functools.partial(transpose, structure), values,
        beside=jax.tree.leaves(structure)[0], system=functools.partial(same, structure), symmetric=True,
    )  # fmt: skip


def solved(
    function: Callable, transpose: Callable, values: jax.Array, *, beside: jax.Array, system: Callable,
    symmetric: bool = False,
) -> jax.Array:
    """A linear function of values, which JAX can differentiate, transpose, and batch.

    It is y in the solution (x, y) of x = values, y - function(x) = 0: for a linear system JAX has all of these rules. They
    stay in a loop, where those of `jax.custom_jvp` are lost as soon as its derivative is differentiated. JAX wants both
    parts in one array; the compiler takes them apart again.

    Args:
      function: linear, from [m, K] to [n, K].
      transpose: its transpose.
      values: [m, K].
      beside: one of the arrays that the function is made of.
      system: the left sides [m + n, K] of the system for (x, y) [m + n, K]. JAX differentiates it in what it has closed
        over, and never runs it where nobody asks for that. The identity will do where it has closed over nothing, or
        refuses.
      symmetric: whether `system` is its own transpose.
    Returns:
      [n, K].
    """
    # Inside `jax.shard_map` JAX has to see that the solution differs from device to device where the function does.
    values = values + jnp.ravel(beside)[:0].sum().astype(values.dtype)
    rows, mapped_rows = len(values), jax.eval_shape(function, values).shape[0]

    def forwards(_, given):
        return jnp.concatenate([given[:rows], given[rows:] + function(given[:rows])])

    def backwards(_, given):
        return jnp.concatenate([given[:rows] + transpose(given[rows:]), given[rows:]])

    given = jnp.pad(values, ((0, mapped_rows), (0, 0)))
    return jax.lax.custom_linear_solve(system, given, forwards, backwards, symmetric=symmetric)[rows:]
