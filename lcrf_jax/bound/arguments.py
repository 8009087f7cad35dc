"""Checks of what many functions take: labels, tags, and class indices. Values are checked where they are known."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from lcrf_jax.numerics import (
    ONE_SET,
    check_finite,
    check_logits,
    check_probs,
    check_shape,
    check_values,
    first_place,
    native,
    promote_float,
)


def checked_tags(tags: ArrayLike, num_classes: int | str) -> jax.Array:
    """The tags as booleans, after a check of their shape and values.

    Args:
      tags: [K] booleans, or zeros and ones of any type.
      num_classes: K, or a letter for any number.
    Returns:
      [K] bool.
    Raises:
      ValueError: if the shape does not fit or a value is neither 0 nor 1.
    """
    check_shape("tags", tags, (num_classes,), "one tag per class, background first; the classes are the last axis")

    def fault_of(values):
        if values.dtype == bool or np.all((values == 0) | (values == 1)):
            return None
        place = first_place((values != 0) & (values != 1))
        return f"expected a boolean for each class, got {values[tuple(place)]} at {place}; mark the classes with 0 and 1"

    check_values("tags", tags, fault_of)
    return jnp.asarray(native(tags)).astype(bool)


def checked_indices(name: str, indices: ArrayLike) -> jax.Array:
    """Class indices as int32, after a check of their type; what int32 does not hold becomes its largest number.

    Args:
      name: name of the argument, for the message.
      indices: integers.
    Returns:
      int32 of the same shape.
    Raises:
      TypeError: if the array does not hold integers.
    """
    xp = jnp if isinstance(indices, jax.Array) else np
    array = xp.asarray(indices)
    if not xp.issubdtype(array.dtype, xp.integer):
        raise TypeError(f"{name}: expected integers, got {array.dtype}; give class indices, such as an argmax")
    most = np.iinfo(np.int32).max
    if array.dtype.itemsize == 8 or array.dtype == np.uint32:
        array = xp.where((array >= 0) & (array <= most), array, xp.full_like(array, most))
    return jnp.asarray(array.astype(np.int32))


def check_indices(name: str, indices: ArrayLike, below: int, remedy: str) -> None:
    """Refuse indices out of range, where they are known.

    Args:
      name: name of the argument, for the message.
      indices: integers.
      below: how many there are to choose from.
      remedy: what the caller can do, for the message.
    Raises:
      ValueError: if one is not in 0..below - 1.
      TypeError: if the array does not hold integers.
    """
    checked_indices(name, indices)
    check_finite(name, indices, remedy, minimum=0, maximum=below - 1)


def checked_labels(labels: ArrayLike, tags: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Labels z and tags y as they are computed with, after a check of both.

    Args:
      labels: [m, K] one-hot or relaxed labels.
      tags: [K] booleans.
    Returns:
      [m, K] float32 and [K] bool.
    Raises:
      ValueError: if the shapes do not fit, or a row of labels that is known is not on the simplex.
    """
    _, num_classes = check_shape("labels", labels, ("m", "K"), ONE_SET)
    tags = checked_tags(tags, num_classes)
    check_probs("labels", labels)
    return promote_float(labels), tags


def checked_logits(logits: ArrayLike, tags: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Logits g and tags y as they are computed with, after a check of both.

    Args:
      logits: [m, K] unnormalised log-probabilities; a class may have -inf.
      tags: [K] booleans.
    Returns:
      [m, K] float32 and [K] bool.
    Raises:
      ValueError: if the shapes do not fit, or `logits` are none where they are known.
    """
    _, num_classes = check_shape("logits", logits, ("m", "K"), ONE_SET)
    tags = checked_tags(tags, num_classes)
    check_logits("logits", logits)
    return promote_float(logits), tags


def class_axis(name: str, array: ArrayLike) -> int:
    """The number of classes of an array of any number of axes, the last of which is that of the classes.

    Args:
      name: name of the argument, for the message.
      array: [..., K].
    Returns:
      K.
    Raises:
      ValueError: if there is no such axis, or it is empty.
    """
    shape = np.shape(array)
    if not shape or shape[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., K] with K >= 1, got {list(shape)}; put the classes last")
    return shape[-1]


def check_scores(logits: ArrayLike) -> tuple[int, int]:
    """The shape of logits g as a network gives them, after a check of it and of their values.

    Args:
      logits: [m, K] finite logits.
    Returns:
      (m, K).
    Raises:
      ValueError: if they are not [m, K], not finite, or no logits.
    """
    num_pixels, num_classes = check_shape("logits", logits, ("m", "K"), ONE_SET)
    check_finite("logits", logits, "look for a training that diverged; for an impossible class use a number such as -1e4")
    check_logits("logits", logits)
    return num_pixels, num_classes


def check_possible(log_probs: jax.Array, wanted: jax.Array) -> None:
    """Refuse a target for a class that has no probability, where it is known: the cross-entropy would be infinite.

    Args:
      log_probs: [m, K] log phi.
      wanted: [m, K] bool, where there is a target.
    Raises:
      ValueError: if a class with a target has log-probability -inf.
    """

    def fault_of(values):
        if not np.any(values):
            return None
        place = first_place(values)
        return f"expected a finite number where the target is not 0, got -inf at {place}; give no target to such a class"

    check_values("logits", wanted & (log_probs == -jnp.inf), fault_of)


def by_class(num_classes: int, *, background: ArrayLike, foreground: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """A number for the background and another for all other classes.

    Args:
      num_classes: K.
      background: scalar.
      foreground: scalar.
      dtype: of the result.
    Returns:
      [K].
    """
    return jnp.where(jnp.arange(num_classes) == 0, jnp.asarray(background, dtype), jnp.asarray(foreground, dtype))
