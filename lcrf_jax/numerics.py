"""Small numerical helpers: float promotion, entropies that are safe at log 0, and checks of arguments.

The whole library computes in float32: half-precision and integer inputs are promoted on entry,
float64 is kept where JAX has it enabled (the tests use it).

Shapes and dtypes are always known, and always checked. Values are checked where they are known, that is, outside
jit, vmap and grad; within `checked_under_jit` they are checked there as well, while the program runs.
"""

import contextlib
import contextvars
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Number = TypeVar("Number")

ONE_SET = "flatten the pixels to one axis, classes last; for a batch use jax.vmap"
"""What to do about a shape that is not [m, K]."""
ONE_IMAGE = "pass one image as [height, width, channels]; for a batch use jax.vmap"
"""What to do about a shape that is not [H, W, C]."""

_LEAST, _MOST = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))
_UNDER_JIT: contextvars.ContextVar[bool] = contextvars.ContextVar("checked_under_jit", default=False)


def promote_float(array: ArrayLike, *, name: str | None = None) -> jax.Array:
    """The array as float32, or as float64 where it already is float64.

    float16, bfloat16, integers and booleans become float32, so that sums over thousands of pixels stay
    accurate. float64 stays float64 only if `jax_enable_x64` is on; otherwise JAX makes it float32.

    Args:
      array: any real array or number.
      name: name of the argument, for the message.
    Returns:
      A JAX array of the same shape, float32 or float64.
    Raises:
      ValueError: if the array is complex.
      TypeError: if it holds no numbers, or is a masked one of NumPy.
    """
    _check_kind(name, array)
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = array.astype(np.float32)  # JAX would keep their lower half
    with np.errstate(over="ignore"):  # what becomes infinite and must not is refused where values are checked
        array = jnp.asarray(native(array))
    _check_kind(name, array)  # of lists as well
    promoted = array.astype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)
    if array.dtype == jnp.bfloat16:
        # XLA on CPU (jaxlib 0.10) fuses this conversion wrongly into the next operation. This operation in between
        # prevents that and changes no float32.
        promoted = jax.lax.reduce_precision(promoted, exponent_bits=8, mantissa_bits=23)
    return promoted


def native(array: ArrayLike) -> ArrayLike:
    """An array of NumPy in the byte order of this machine, anything else as it is.

    Arrays of FITS files, of some HDF5 files and of `np.fromfile` may have the other order. JAX refuses them, or under jit takes
    their bytes for other numbers without a word.

    Args:
      array: anything.
    Returns:
      The same numbers.
    """
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array


def _check_kind(name, array):
    """Refuse an array that holds no real numbers. What has no dtype, such as a list, is not looked at."""
    of = "" if name is None else f"{name}: "
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{of}expected an array without a mask, got a masked one of NumPy; fill it first, .filled(0)")
    dtype = getattr(array, "dtype", None)
    kind = getattr(dtype, "kind", "f")
    if kind == "c":
        raise ValueError(f"{of}expected real numbers, got {dtype}; take their real part or their magnitude")
    if kind in "OSUmM":
        raise TypeError(f"{of}expected real numbers, got {dtype}; convert them first")


def promote_together(*arrays: ArrayLike) -> tuple[jax.Array, ...]:
    """The arrays in one type: float64 where one of them is float64, else float32.

    Args:
      arrays: real arrays or numbers; Python numbers take the type of the others.
    Returns:
      A tuple of JAX arrays.
    Raises:
      ValueError: if one of them is complex.
    """
    promoted = [promote_float(array) for array in arrays]
    typed = [new for new, array in zip(promoted, arrays) if type(array) not in (bool, int, float)] or promoted
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in typed) else jnp.float32
    return tuple(array.astype(dtype) for array in promoted)


def entropy(logits: ArrayLike) -> jax.Array:
    r"""Entropy of each categorical distribution, without a sum over the pixels.

    .. math:: H_i = -\sum_k \phi_{ik} \log \phi_{ik}, \qquad \phi_i = \mathrm{softmax}(g_i)

    0 log 0 is 0, in the value and in the gradient, so that logits of +-1e4 or -inf are safe.

    Args:
      logits: [..., K] unnormalised log-probabilities, K >= 1; -inf allowed, but not in every class at once.
    Returns:
      [...] entropies in nats, between 0 and log K.
    Raises:
      ValueError: if `logits` has no class axis.
    """
    logits = promote_float(logits)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits: expected shape [..., K] with K >= 1, got {logits.shape}; put the classes last")
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    return -jnp.sum(probs * jnp.where(probs > 0, log_probs, 0), axis=-1)


def check_shape(name: str, array: ArrayLike, expected: Sequence[int | str], remedy: str) -> tuple[int, ...]:
    """The shape of an array, after checking it against a pattern.

    Args:
      name: name of the argument, for the message.
      array: anything with a `shape`.
      expected: one entry per axis; an int has to match exactly, a letter such as 'm' stands for any size
        from 1 on.
      remedy: what the caller can do about a mismatch, for the message.
    Returns:
      The shape, a tuple of ints.
    Raises:
      ValueError: if the number of axes or a fixed size differs, an axis is empty, or the array is complex.
      TypeError: if it is no array, holds no numbers, or is a masked one of NumPy.
    """
    _check_kind(name, array)
    shape = shape_of(name, array, remedy)
    fits = len(shape) == len(expected) and all(
        got >= 1 if isinstance(want, str) else got == want for got, want in zip(shape, expected)
    )
    if not fits:
        pattern = ", ".join(str(want) for want in expected)
        raise ValueError(f"{name}: expected shape [{pattern}], got {list(shape)}; {remedy}")
    return shape


def shape_of(name: str, array: ArrayLike, remedy: str) -> tuple[int, ...]:
    """The shape of an array or of nested lists.

    Args:
      name: name of the argument, for the message.
      array: anything.
      remedy: what the caller can do, for the message.
    Returns:
      A tuple of ints.
    Raises:
      TypeError: if it has none.
    """
    try:
        return tuple(np.shape(array))  # of lists as well
    except (TypeError, ValueError):  # None, a string, rows of different lengths
        raise TypeError(f"{name}: expected an array, got {array!r:.60}; {remedy}") from None


def known_number(value: Any) -> float | None:
    """A number that is known: of Python or NumPy, or an array of JAX or NumPy without axes that is not traced.

    Args:
      value: anything.
    Returns:
      A Python number; None for a traced value and for what is no number.
    """
    if isinstance(value, numbers.Real):
        return value  # type: ignore[return-value]  # as good as a float, and prints as the caller wrote it
    if isinstance(value, (jax.Array, np.ndarray)) and not isinstance(value, jax.core.Tracer) and value.ndim == 0:
        return known_number(value.item())
    return None


def check_number(
    name: str, value: Number, *, minimum: float, remedy: str, strict: bool = False, whole: bool = False
) -> Number:
    """The value, after checking a number against a lower bound; None and traced values pass unchecked.

    Args:
      name: name of the argument, for the message.
      value: the number, of Python, NumPy or JAX.
      minimum: smallest allowed value; itself excluded if `strict`.
      remedy: what the caller can do, for the message.
      strict: whether the bound itself is refused.
      whole: whether numbers with a fraction are refused; 2.0 is allowed.
    Returns:
      The value, unchanged.
    Raises:
      ValueError: if the number is not finite in float32, below the bound, complex, or has a fraction that it must not have.
      TypeError: if it is no number.
    """
    known = known_number(value)
    if known is None:
        _check_kind(name, value)
        if value is None or (isinstance(value, jax.core.Tracer) and value.ndim == 0):
            return value
        got = f"an array of shape {list(np.shape(value))}" if hasattr(value, "shape") else repr(value)
        raise TypeError(f"{name}: expected a number, got {got}; {remedy}")
    size = known if isinstance(known, int) else float(known)
    least = _LEAST if strict and minimum == 0 else minimum  # below is what float32 takes for 0
    if not abs(size) <= _MOST or size < least or (strict and size <= minimum):  # NaN as well
        sign = ">" if strict else ">="
        raise ValueError(f"{name}: expected a finite number {sign} {minimum}, got {known}; {remedy}")
    if whole and known != math.floor(known):
        raise ValueError(f"{name}: expected a whole number, got {known}; {remedy}")
    return value


def check_count(name: str, value: Any, *, minimum: int, remedy: str) -> int:
    """A static whole number as an int, after checking it against a lower bound.

    Args:
      name: name of the argument, for the message.
      value: the number; 2.0 is allowed.
      minimum: smallest allowed value.
      remedy: what the caller can do, for the message.
    Returns:
      A Python int.
    Raises:
      ValueError: if the number is below the bound, not finite or not whole.
      TypeError: if it is traced, or no number.
    """
    if isinstance(value, jax.core.Tracer) or value is None:
        what = "None" if value is None else "a traced value"
        raise TypeError(
            f"{name}: expected a Python int, got {what}; it is static: close over it, or name it in static_argnames"
        )
    return int(check_number(name, value, minimum=minimum, whole=True, remedy=remedy))


def check_share(name: str, value: Number, remedy: str) -> Number:
    """The value, after checking that a number lies in (0, 1]; traced values pass unchecked.

    Args:
      name: name of the argument, for the message.
      value: the number, of Python, NumPy or JAX.
      remedy: what the caller can do, for the message.
    Returns:
      The value, unchanged.
    Raises:
      ValueError: if the number is not in (0, 1].
      TypeError: if it is no number.
    """
    check_number(name, value, minimum=0, strict=True, remedy=remedy)
    known = known_number(value)
    if known is not None and not known <= 1:
        raise ValueError(f"{name}: expected a number of at most 1, got {known}; {remedy}")
    return value


@contextlib.contextmanager
def checked_under_jit(on: bool = True) -> Iterator[None]:
    """Values are checked under jit, vmap and grad as they are outside: for looking for a fault.

    What is traced inside checks the values it meets when it runs, and fails with the same message, as a
    `jax.errors.JaxRuntimeError`. A program that was traced before is not traced again, so it does not check.
    Each check brings an array to the host, which takes time.

    Args:
      on: whether to check.
    Returns:
      A context manager.
    Example:
      >>> import jax, numpy as np
      >>> from lcrf_jax import checked_under_jit, mean_field
      >>> with checked_under_jit():
      ...     log_probs = jax.jit(mean_field)(np.zeros((4, 2)), np.ones((4, 4)))
      >>> log_probs.shape
      (4, 2)
    """
    token = _UNDER_JIT.set(on)
    try:
        yield
    finally:
        _UNDER_JIT.reset(token)


def check_values(name: str, array: ArrayLike, fault_of: Callable[[np.ndarray], str | None]) -> None:
    """Refuse an array whose values, where they are known, have a fault, or have one in the precision of JAX.

    Args:
      name: name of the argument, for the message.
      array: any array.
      fault_of: what is wrong with a NumPy array and what to do about it, or None; half precision comes as float32.
    Raises:
      ValueError: if there is a fault, or the array is complex.
      TypeError: if it holds no numbers, or is a masked one of NumPy.
    """
    _check_kind(name, array)

    def check(values):
        values = np.asarray(values)
        _check_kind(name, values)  # of lists as well
        if values.dtype.kind not in "biuf" or values.dtype == np.float16:
            try:  # bfloat16 and the like have a kind of their own
                values = values.astype(np.float32) if values.dtype.kind == "V" else values.astype(np.float32, casting="same_kind")
            except (TypeError, ValueError):
                raise TypeError(f"{name}: expected real numbers, got {values.dtype}; convert them first") from None
        with np.errstate(over="ignore"):
            fault = fault_of(values) or _fault_in_float32(values, fault_of)
        if fault is not None:
            raise ValueError(f"{name}: {fault}")

    if isinstance(array, jax.core.Tracer):
        if _UNDER_JIT.get():
            jax.debug.callback(check, array)
    elif not isinstance(array, jax.Array) or array.is_fully_addressable:
        check(array)


def _fault_in_float32(values, fault_of):
    """What is wrong with values of float64 that JAX makes float32: those beyond its range become infinite."""
    if values.dtype.kind != "f" or values.dtype.itemsize <= 4 or is_float64_enabled() or values.size == 0:
        return None
    if -_MOST <= values.min() and values.max() <= _MOST:
        return None
    narrow = values.astype(np.float32)
    lost = np.isinf(narrow) & np.isfinite(values)
    if not lost.any() or fault_of(narrow) is None:
        return None
    above = lost & (values > 0)
    place = first_place(above if above.any() else lost)
    return (f"expected numbers within +-{_MOST:.2g}, as float32 has them, got {values[tuple(place)]} at {place}; scale them, "
            "or switch on jax_enable_x64")


def is_float64_enabled() -> bool:
    """Whether JAX keeps float64, `jax_enable_x64`.

    Returns:
      bool.
    """
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def first_place(where: np.ndarray) -> list[int]:
    """The indices of the first true entry, as they are printed.

    Args:
      where: [...] booleans, one of them true.
    Returns:
      One index per axis.
    """
    return [int(i) for i in np.unravel_index(np.argmax(where), where.shape)]


def check_finite(
    name: str, array: ArrayLike, remedy: str, *, minimum: float = -math.inf, maximum: float = math.inf
) -> None:
    """Refuse an array with NaN, an infinity, or a value outside a range, where its values are known.

    Args:
      name: name of the argument, for the message.
      array: any real array.
      remedy: what the caller can do, for the message.
      minimum: smallest allowed value.
      maximum: largest allowed value.
    Raises:
      ValueError: if there is such a value; the message has the first one and its place.
    """

    def fault_of(values):
        if values.size == 0 or (values.min() >= max(minimum, -np.inf) and values.max() <= maximum and
                                np.isfinite(values.min()) and np.isfinite(values.max())):
            return None
        place = first_place(~np.isfinite(values) | (values < minimum) | (values > maximum))
        ranges = {(False, False): "finite numbers", (True, False): f"finite numbers >= {minimum:g}",
                  (False, True): f"finite numbers <= {maximum:g}"}
        asked = ranges.get((minimum > -math.inf, maximum < math.inf), f"numbers in {minimum:g}..{maximum:g}")
        return f"expected {asked}, got {values[tuple(place)]} at {place}; {remedy}"

    check_values(name, array, fault_of)


def _fault_of_logits(values):
    lowest, highest = (values.min(), values.max()) if values.size else (0, 0)
    if not highest < np.inf:  # NaN as well
        place = first_place(~(values < np.inf))
        return (f"expected numbers below infinity, got {values[tuple(place)]} at {place}; look for a division by zero "
                "or a training that diverged")
    if lowest == -np.inf and np.any(nowhere := (values.max(axis=-1) == -np.inf)):
        return f"expected a class that is possible, got -inf in every class at {first_place(nowhere)}; leave one"
    if lowest < 0 or values.shape[-1] == 1 or values.size == 0:
        return None
    if highest <= 1.001 and np.all(np.abs(values.sum(axis=-1) - 1) < 2e-3) and np.any(values % 1):
        return "expected logits, got probabilities: each row sums to 1; pass their logarithm"
    unsure = values.min(axis=-1).max() > 0.01  # logits such as 10 and 0 of two classes may be meant
    if unsure and np.all(np.abs(np.exp(-values.astype(np.float32)).sum(axis=-1) - 1) < 2e-3):
        return "expected logits, got energies -log p, the input of pydensecrf; pass them with the sign turned"
    return None


def check_logits(name: str, logits: ArrayLike) -> None:
    """Refuse values that are no logits, where they are known.

    Refused are NaN, infinity, -inf in every class of a pixel, probabilities (all rows sum to 1, and not one-hot),
    and energies (-log of probabilities), whose largest would be the least likely class.

    Args:
      name: name of the argument, for the message.
      logits: [..., K] unnormalised log-probabilities; a class may have -inf.
    Raises:
      ValueError: if they are none; the message has the first place.
    """
    check_values(name, logits, _fault_of_logits)


def check_probs(name: str, probs: ArrayLike) -> None:
    """Refuse values that are no probabilities, where they are known.

    Args:
      name: name of the argument, for the message.
      probs: [..., K] probabilities of K classes; rows sum to 1, up to 2e-3, or 2e-2 in half precision.
    Raises:
      ValueError: if a value is not in 0..1 or a row does not sum to 1; the message has the first place.
    """
    remedy = "take the softmax of logits"
    slack = 2e-2 if getattr(getattr(probs, "dtype", None), "itemsize", 4) == 2 else 2e-3

    def fault_of(values):
        sums = values.sum(axis=-1)
        if values.size == 0 or np.all(np.abs(sums - 1) < slack):
            return None
        place = first_place(~(np.abs(sums - 1) < slack))
        return f"expected rows that sum to 1, got {sums[tuple(place)]} at {place}; {remedy}"

    check_finite(name, probs, remedy, minimum=-1e-6, maximum=1 + slack / 2)
    check_values(name, probs, fault_of)


def squared_distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances between two sets of points, summed from the differences themselves.

    Unlike |a|^2 + |b|^2 - 2ab this stays accurate in float32 for points that are far from the origin.

    Args:
      a: [m, d] points.
      b: [n, d] points.
    Returns:
      [m, n] squared distances.
    """
    return jnp.asarray(sum(jnp.square(a[:, None, i] - b[None, :, i]) for i in range(a.shape[1])))


def varying_like(array: ArrayLike, reference: ArrayLike) -> jax.Array:
    """The array, marked as varying over the mesh axes over which the reference varies.

    Inside `jax.shard_map` a loop refuses a carry that starts as a constant and ends as something that differs
    from device to device; constants that start a loop go through here. Anywhere else it changes nothing.

    Args:
      array: any array.
      reference: an array from which the loop computes.
    Returns:
      The array, its values unchanged.
    References:
      JAX documentation, "shard_map", section on scan and varying manual axes.
    """
    # A choice between the array and itself: JAX sees that it depends on the reference, and XLA removes it.
    return jnp.where(jnp.ravel(reference)[0] == 0, array, array)
