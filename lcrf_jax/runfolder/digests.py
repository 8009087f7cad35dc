"""Names and digests of the arrays of a checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def params_digest(params: Any) -> str:
    """sha256 of a pytree of arrays: names, shapes, dtypes and values.

    Args:
      params: pytree of arrays, on host or devices.
    Returns:
      64 hexadecimal digits; equal for equal trees, whatever the order of their dicts.
    """
    digests = digests_of(named_leaves(params))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree by name, as copies on the host.

    Args:
      tree: pytree of arrays; random keys are taken as their data.
    Returns:
      dict from dotted name to array.
    Raises:
      TypeError: if a leaf is no array, or an empty one.
      ValueError: if two leaves have one name.
    """
    leaves: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(f"expected arrays in the state, got {type(leaf).__name__} at {name!r}; keep "
                            "counters as jnp arrays")
        if leaf.size == 0:
            raise TypeError(f"expected arrays with values in the state, got the empty one {name!r} of shape "
                            f"{leaf.shape}, which cannot be saved; leave it out of the state")
        if isinstance(leaf, jax.Array):
            leaf = jax.random.key_data(leaf) if is_key(leaf) else leaf
            leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else leaf
        if name in leaves:
            raise ValueError(f"expected a name for each leaf, got {name!r} twice; avoid dots in keys")
        leaves[name] = np.array(leaf)
    return leaves


def split_leaves(leaves: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The parameters of a state, and the rest of it.

    Args:
      leaves: of the state, see `named_leaves`.
    Returns:
      (the leaves below `params`, all others), by their full names.
    Raises:
      ValueError: if there are no parameters.
    """
    params = {name: leaf for name, leaf in leaves.items() if name.split(".")[0] == "params"}
    if not params:
        raise ValueError(f"expected a state with params at its top, got {sorted(leaves)[:5]}")
    return params, {name: leaf for name, leaf in leaves.items() if name not in params}


def nested(leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A tree of nested dicts.

    Args:
      leaves: dict from dotted name to array.
    Returns:
      Nested dicts, one level for each part of a name.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def digests_of(leaves: Mapping[str, np.ndarray]) -> dict[str, str]:
    """A digest of each array.

    Args:
      leaves: dict from name to array.
    Returns:
      dict from name to the sha256 of dtype, shape and bytes, in hexadecimal digits.
    """
    digests = {}
    for name, leaf in sorted(leaves.items()):
        digest = hashlib.sha256(f"{leaf.dtype.name} {leaf.shape} ".encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        digests[name] = digest.hexdigest()
    return digests


def is_key(leaf: Any) -> bool:
    """Whether an array holds random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
