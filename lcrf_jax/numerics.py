"""Small numerical helpers: float promotion, entropies that survive log 0, and checks of static facts.

Every floor of the library computes in float32: half-precision and integer inputs are promoted on entry,
float64 is kept where JAX has it enabled (the tests use it).
"""

import math
import numbers

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def promote_float(array: ArrayLike) -> jax.Array:
    """The array as float32, or as float64 where it already is float64.

    float16, bfloat16, integers and booleans become float32, so that sums over thousands of pixels keep their
    digits. float64 stays float64 only if `jax_enable_x64` is on; otherwise JAX makes it float32.

    Args:
      array: any real array or number.
    Returns:
      A JAX array of the same shape, float32 or float64.
    Raises:
      ValueError: if the array is complex.
    References:
      None.
    """
    array = jnp.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"expected a real array, got dtype {array.dtype}; take its real part or its magnitude")
    promoted = array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
    if array.dtype == jnp.bfloat16:
        # XLA on CPU (jaxlib 0.10) fuses this conversion wrongly into what follows; an operation in between, which changes
        # no float32, prevents it.
        promoted = jax.lax.reduce_precision(promoted, exponent_bits=8, mantissa_bits=23)
    return promoted


def entropy(logits):
    r"""Entropy of each categorical distribution, summed over nothing but the classes.

    .. math:: H_i = -\sum_k \phi_{ik} \log \phi_{ik}, \qquad \phi_i = \mathrm{softmax}(g_i)

    0 log 0 is 0, in the value and in the gradient, so that logits of +-1e4 or -inf are safe.

    Args:
      logits: [..., K] unnormalised log-probabilities, K >= 1; -inf allowed, but not in every class at once.
    Returns:
      [...] entropies in nats, between 0 and log K.
    Raises:
      ValueError: if `logits` has no class axis.
    References:
      None.
    """
    logits = promote_float(logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., K] with K >= 1, got {logits.shape}; put the classes last")
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    return -jnp.sum(probs * jnp.where(probs > 0, log_probs, 0), axis=-1)


def check_shape(name, array, expected, remedy):
    """The shape of an array, after checking it against a pattern.

    Args:
      name: name of the argument, for the message.
      array: anything with a `shape`.
      expected: one entry per axis; an int has to be met exactly, a letter such as 'm' stands for any size
        from 1 on.
      remedy: what the caller can do about a mismatch, for the message.
    Returns:
      The shape, a tuple of ints.
    Raises:
      ValueError: if the number of axes or a fixed size differs, or an axis is empty.
    References:
      None.
    """
    shape = tuple(jnp.shape(array))
    fits = len(shape) == len(expected) and all(
        got >= 1 if isinstance(want, str) else got == want for got, want in zip(shape, expected)
    )
    if not fits:
        pattern = ", ".join(str(want) for want in expected)
        raise ValueError(f"{name}: expected shape [{pattern}], got {list(shape)}; {remedy}")
    return shape


def check_number(name, value, *, minimum, remedy, strict=False, whole=False):
    """The value, after checking a Python or NumPy number against a lower bound; traced values pass unchecked.

    Args:
      name: name of the argument, for the message.
      value: the number.
      minimum: smallest allowed value; itself excluded if `strict`.
      remedy: what the caller can do, for the message.
      strict: whether the bound itself is refused.
      whole: whether numbers with a fraction are refused; 2.0 is allowed.
    Returns:
      The value, unchanged.
    Raises:
      ValueError: if the number is not finite, below the bound, or has a fraction that it must not have.
    References:
      None.
    """
    if isinstance(value, numbers.Real):
        too_small = value <= minimum if strict else value < minimum
        if not math.isfinite(value) or too_small:
            sign = ">" if strict else ">="
            raise ValueError(f"{name}: expected a finite number {sign} {minimum}, got {value}; {remedy}")
        if whole and value != int(value):
            raise ValueError(f"{name}: expected a whole number, got {value}; {remedy}")
    return value


def check_share(name, value, remedy):
    """The value, after checking that a Python or NumPy number lies in (0, 1]; traced values pass unchecked.

    Args:
      name: name of the argument, for the message.
      value: the number.
      remedy: what the caller can do, for the message.
    Returns:
      The value, unchanged.
    Raises:
      ValueError: if the number is not in (0, 1].
    References:
      None.
    """
    check_number(name, value, minimum=0, strict=True, remedy=remedy)
    if isinstance(value, numbers.Real) and value > 1:
        raise ValueError(f"{name}: expected a number of at most 1, got {value}; {remedy}")
    return value


def squared_distances(a, b):
    """Squared distances between two sets of points, summed from the differences themselves.

    Other than with |a|^2 + |b|^2 - 2ab, float32 keeps its digits however far the points lie from the origin.

    Args:
      a: [m, d] points.
      b: [n, d] points.
    Returns:
      [m, n] squared distances.
    Raises:
      None.
    References:
      None.
    """
    return sum(jnp.square(a[:, None, i] - b[None, :, i]) for i in range(a.shape[1]))


def varying_like(array, reference):
    """The array, marked as varying over the mesh axes over which the reference varies.

    Inside `jax.shard_map` a loop refuses a carry that starts as a constant and ends as something that differs
    from device to device; constants that start a loop go through here. Anywhere else it changes nothing.

    Args:
      array: any array.
      reference: an array from which the loop computes.
    Returns:
      The array, its values unchanged.
    Raises:
      None.
    References:
      JAX documentation, "shard_map", section on scan and varying manual axes.
    """
    # A choice between the array and itself: JAX sees that it depends on the reference, and XLA removes it.
    return jnp.where(jnp.ravel(reference)[0] == 0, array, array)
