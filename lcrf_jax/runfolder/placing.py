"""A saved state becomes a state on devices again: of the same structure as a new one, wherever that lies."""

import base64
import binascii
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.runfolder.damage import Damaged
from lcrf_jax.runfolder.description import CheckpointError
from lcrf_jax.runfolder.digests import is_key


def check_like(like: Any, arrays: Mapping[str, np.ndarray], folder: pathlib.Path) -> dict[str, Any]:
    """Refuse arrays of another structure, shape or dtype than those of `like`.

    Args:
      like: state of the structure, shapes and dtypes that are wanted.
      arrays: what was saved, by name.
      folder: where, for the message.
    Returns:
      The leaves of `like` by name.
    Raises:
      CheckpointError: if they do not fit.
    """
    wanted = {jax.tree_util.keystr(path, simple=True, separator="."): leaf
              for path, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
    advice = "resume with the configuration this run was started with, or use a new folder"
    if wanted.keys() != arrays.keys():
        missing, extra = sorted(wanted.keys() - arrays.keys()), sorted(arrays.keys() - wanted.keys())
        raise CheckpointError(f"{folder} belongs to another model or optimiser: it lacks {missing[:3]} and "
                              f"has {extra[:3]} besides; {advice}")
    for name, leaf in wanted.items():
        target = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
        array = arrays[name]
        if (array.shape, array.dtype) != (target.shape, target.dtype):
            raise CheckpointError(f"{folder} belongs to another model: expected {name!r} of shape "
                                  f"{target.shape} and dtype {target.dtype}, got {array.shape} "
                                  f"and {array.dtype}; {advice}")
    return wanted


def placed_like(like: Any, arrays: Mapping[str, np.ndarray], folder: pathlib.Path) -> Any:
    """The saved arrays in the structure and on the devices of `like`.

    Args:
      like: state of the same structure, shapes and dtypes, placed where the saved one shall be.
      arrays: what was saved, by name.
      folder: where, for the message.
    Returns:
      Pytree of arrays.
    Raises:
      CheckpointError: if they do not fit.
    """
    wanted = check_like(like, arrays, folder)
    placed = [_on_devices(leaf, arrays[name], is_key(leaf)) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), placed)


def _on_devices(leaf, array, is_key):
    if is_key:
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf))
        return jax.device_put(key, leaf.sharding)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])
    return array


def encoded_data_state(data_state: Any) -> dict[str, Any]:
    """The state of a data iterator as JSON can hold it: bytes as base64, anything else as it is.

    Args:
      data_state: bytes, or anything JSON can hold.
    Returns:
      dict that says which of both it was.
    Raises:
      TypeError: if it is neither.
    """
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode()}
    try:
        return {"json": json.loads(json.dumps(data_state, allow_nan=False))}
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected bytes or JSON as data_state, got "
                        f"{type(data_state).__name__} ({error})") from error


def decoded_data_state(stored: Any, folder: pathlib.Path) -> Any:
    """What `encoded_data_state` was given.

    Args:
      stored: its result.
      folder: where it stood, for the message.
    Returns:
      The state of the data iterator.
    Raises:
      Damaged: if it is no result of `encoded_data_state`.
    """
    try:
        return base64.b64decode(stored["base64"], validate=True) if "base64" in stored else stored["json"]
    except (KeyError, TypeError, binascii.Error) as error:
        raise Damaged(f"{folder / 'record'} holds no readable state of the data iterator") from error
