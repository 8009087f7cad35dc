"""Confusion matrices and intersection over union.

One matrix is counted over all pixels of all images; matrices of different images, devices or processes are
merged by adding them, and the sums are exact for any number of pixels. NumPy arrays give a NumPy matrix in int64. JAX
arrays and tracers give `ConfusionCounts`, as JAX has no int64 by default: a pytree that adds up as exactly, under jit,
vmap and psum, and that `np.asarray` makes an int64 matrix of.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcrf_jax.numerics import check_count, check_finite, check_shape, check_values, native

_DIGIT = 2**16
_WEIGHTS = np.array([1, 2**16, 2**32], np.int64)
_MET = "a label outside the classes was met under jit"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConfusionCounts:
    """A confusion matrix [K, K] of JAX arrays, or with leading axes a batch of them; exact up to 2**63 pixels.

    A count has three digits to the base 2**16, each in a uint32. Up to 65536 of these may be added array by array, by
    `jax.lax.psum` as well as by ``jax.tree.map``, before a digit overflows; ``+`` and `sum` carry.

    Attributes:
      digits: [..., 3, K, K] uint32, of the counts, the lowest first; rows are the truth and columns the prediction.
      bad: [..., 3] uint32, of the number of pixels whose label was no class. Where it is not 0 the counts are no score.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from lcrf_jax import confusion_matrix
      >>> one = confusion_matrix(jnp.array([0, 1, 1]), jnp.array([0, 0, 1]), num_classes=2)
      >>> np.asarray(one + one).tolist()
      [[2, 2], [0, 2]]
    """

    digits: jax.Array
    bad: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., K, K]."""
        return (*self.digits.shape[:-3], *self.digits.shape[-2:])

    def __add__(self, other: Any) -> Any:
        if isinstance(other, ConfusionCounts):
            if self.shape[-2:] != other.shape[-2:]:
                raise ValueError(f"expected matrices of the same classes, got {self.shape} and {other.shape}")
            return ConfusionCounts(_added(self.digits, other.digits, -3), _added(self.bad, other.bad, -1))
        if isinstance(other, int) and other == 0:  # where builtin sum() begins
            return self
        return np.asarray(self) + other if isinstance(other, np.ndarray) else NotImplemented

    __radd__ = __add__

    def sum(self, axis: int | tuple[int, ...]) -> "ConfusionCounts":
        """The matrices of a batch, merged.

        Args:
          axis: of the leading axes, from 0 on.
        Returns:
          `ConfusionCounts` without these axes.
        Raises:
          ValueError: if an axis is none of the leading ones.
        Example:
          >>> import jax, jax.numpy as jnp
          >>> from lcrf_jax import confusion_matrix
          >>> labels, truth = jnp.zeros((3, 4), int), jnp.zeros((3, 4), int)  # three images
          >>> each = jax.vmap(lambda a, b: confusion_matrix(a, b, num_classes=2))(labels, truth)
          >>> each.sum(axis=0).tolist()
          [[12, 0], [0, 0]]
        """
        merged, num_axes = self, len(self.shape) - 2
        for one in sorted({axis} if isinstance(axis, int) else set(axis), reverse=True):
            if not 0 <= one < num_axes:
                raise ValueError(f"axis: expected one of the {num_axes} leading axes of {self.shape}, got {one}; the "
                                 "number of pixels is np.asarray(counts).sum()")
            merged = ConfusionCounts(_summed(merged.digits, one, -3), _summed(merged.bad, one, -1))
        return merged

    def tolist(self) -> list:
        """The counts as nested lists of int, outside jit."""
        return np.asarray(self).tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """[..., K, K] int64, outside jit; a ValueError if a label was no class."""
        bad = np.asarray(self.bad).astype(np.int64) @ _WEIGHTS
        if np.any(bad):
            raise ValueError(f"expected labels that are classes, got {int(bad.sum())} pixels of others: {_MET}; call "
                             "confusion_matrix on NumPy arrays to see which")
        counts = np.tensordot(np.moveaxis(np.asarray(self.digits), -3, -1).astype(np.int64), _WEIGHTS, 1)
        return counts if dtype is None else counts.astype(dtype)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return iter(np.asarray(self))

    def __eq__(self, other: object) -> Any:
        return np.asarray(self) == other

    def __ne__(self, other: object) -> Any:
        return np.asarray(self) != other

    __hash__ = None  # type: ignore[assignment]  # as an array


def _carried(digits: jax.Array, axis: int) -> jax.Array:
    """Digits below the base, but for the highest one, which has no other to carry to."""
    low, middle, high = jnp.moveaxis(digits, axis, 0)
    middle = middle + low // _DIGIT
    high = high + middle // _DIGIT
    return jnp.moveaxis(jnp.stack([low % _DIGIT, middle % _DIGIT, high]), 0, axis)


def _added(one: jax.Array, other: jax.Array, axis: int) -> jax.Array:
    return _carried(_carried(one, axis) + _carried(other, axis), axis)


def _summed(digits: jax.Array, over: int, axis: int) -> jax.Array:
    """The sum over an axis, with a carry before a digit can overflow."""
    digits = _carried(digits, axis)
    parts = [jax.lax.slice_in_dim(digits, start, min(start + _DIGIT, digits.shape[over]), axis=over)
             for start in range(0, digits.shape[over], _DIGIT)]
    total = jnp.zeros_like(digits.sum(axis=over, dtype=digits.dtype))
    for part in parts:
        total = _carried(total + part.sum(axis=over, dtype=digits.dtype), axis)
    return total


def _digits_of(count: jax.Array, axis: int) -> jax.Array:
    """A count in uint32 as three digits along a new axis."""
    return jnp.stack([count % _DIGIT, count // _DIGIT, jnp.zeros_like(count)], axis=axis)


def confusion_matrix(
    labels: ArrayLike, truth: ArrayLike, num_classes: int, *, ignore: int = 255
) -> ConfusionCounts | np.ndarray:
    r"""Number of pixels of each true class that were given each predicted class.

    .. math:: C_{ab} = \#\{j : t_j = a,\; \hat z_j = b,\; t_j \ne \text{ignore}\}

    Pixels whose truth is `ignore` are not counted, whatever was predicted there; a prediction is
    nevertheless a class everywhere, never `ignore`. Matrices of several images merge by ``+``, by ``sum()``, and those of
    a batch made by vmap by ``.sum(axis=0)``. Values can only be checked where they are known: for arrays outside jit a
    bad value raises; under jit bad pixels are counted beside the matrix. All that is made of such counts is then refused,
    or NaN while still under jit, whatever is added to them.

    Args:
      labels: [...] integers in 0..num_classes - 1, the prediction, any shape.
      truth: [...] integers of the same shape, in 0..num_classes - 1 or equal to `ignore`.
      num_classes: K, a static Python int, background included.
      ignore: label of the truth that leaves a pixel out (VOC's void).
    Returns:
      [K, K] counts, rows are the truth and columns the prediction: an int64 array for NumPy arrays, `ConfusionCounts` for
      JAX arrays, of fewer than 2**32 pixels in one call.
    Raises:
      ValueError: if the shapes differ, num_classes is not positive or `ignore` is one of the classes, or if a
        value known outside jit is out of range.
      TypeError: if one of the arrays does not hold integers, or a number is not static.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import confusion_matrix
      >>> truth = np.array([0, 0, 1, 255])  # 255 is left out
      >>> confusion_matrix(np.array([0, 1, 1, 1]), truth, num_classes=2).tolist()
      [[1, 1], [0, 1]]
    """
    on_host = not (isinstance(labels, jax.Array) or isinstance(truth, jax.Array))
    xp = np if on_host else jnp
    num_classes = check_count("num_classes", num_classes, minimum=1, remedy="count the background as well")
    ignore = check_count("ignore", ignore, minimum=-(2**31), remedy="255 is usual")
    if 0 <= ignore < num_classes or ignore >= 2**31:
        raise ValueError(f"expected ignore outside 0..num_classes - 1 and in int32, got num_classes "
                         f"{num_classes} and ignore {ignore}; choose a label that is no class")
    if np.shape(labels) != np.shape(truth):
        raise ValueError(f"expected labels and truth of one shape, got {np.shape(labels)} and {np.shape(truth)}; "
                         "bring the prediction to the size of the mask first")
    remedy = "a prediction has to be a class at every pixel"
    predicted = _checked_classes("labels", labels, num_classes, None, remedy, xp)
    remedy = f"check the class list of the masks, or mark pixels to leave out with {ignore}"
    true = _checked_classes("truth", truth, num_classes, ignore, remedy, xp)
    counted = true != ignore
    bad = (predicted < 0) | (predicted >= num_classes) | (((true < 0) | (true >= num_classes)) & counted)
    pairs = xp.where(counted & ~bad, true * num_classes + predicted, num_classes**2)
    if on_host:
        return np.bincount(pairs, minlength=num_classes**2 + 1)[:-1].reshape(num_classes, num_classes)
    counts = jnp.zeros(num_classes**2 + 1, jnp.uint32).at[pairs].add(jnp.uint32(1))
    num_bad = jnp.sum(bad, dtype=jnp.uint32)
    return ConfusionCounts(_digits_of(counts[:-1].reshape(num_classes, num_classes), 0), _digits_of(num_bad, 0))


def _checked_classes(name, array, num_classes, ignore, remedy, xp):
    """[n] integers, after a check of their type, and of their values where they are known."""
    check_values(name, array, lambda values: None)  # whether it holds numbers
    kept = xp.asarray(native(array))
    if not xp.issubdtype(kept.dtype, xp.integer):
        raise TypeError(f"expected integers in {name}, got {kept.dtype}; take the argmax of probabilities first")

    def fault_of(values):
        bad = (values < 0) | (values >= num_classes)
        if ignore is not None:
            bad &= values != ignore
        if not bad.any():
            return None
        found = sorted({int(value) for value in np.unique(values[bad])[:5]})
        return f"expected {name} in 0..{num_classes - 1}, got {found} at {int(bad.sum())} pixels; {remedy}"

    check_values(name, array, fault_of)
    kept = kept.reshape(-1)
    if kept.dtype.itemsize < 4 or kept.dtype == np.int32:
        return kept.astype(np.int64 if xp is np else np.int32)
    # What int32 does not hold is no class, and is not `ignore` by chance.
    inside = kept <= 2**31 - 1
    if kept.dtype.kind == "i":
        inside &= kept >= -(2**31)
    no_class = num_classes if ignore != num_classes else num_classes + 1
    kept = xp.where(inside, kept, xp.full_like(kept, no_class))
    return kept.astype(np.int64 if xp is np else np.int32)


def iou_per_class(confusion: ArrayLike | ConfusionCounts) -> jax.Array | np.ndarray:
    r"""Intersection over union of each class.

    .. math:: \mathrm{IoU}_k = \frac{C_{kk}}{\sum_b C_{kb} + \sum_a C_{ak} - C_{kk}}

    Args:
      confusion: [K, K] counts of `confusion_matrix`, summed over all images; rows are the truth.
    Returns:
      [K] values in 0..1; NaN for a class that is in neither the truth nor the prediction, and for all under jit if a
      label was no class. float64 for a NumPy array and for `ConfusionCounts` outside jit, else float32.
    Raises:
      ValueError: if the matrix is not square, or, where it is known, holds a count that is negative or not finite, or a
        label was no class.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import iou_per_class
      >>> iou_per_class(np.array([[6, 2], [0, 4]])).round(2).tolist()
      [0.75, 0.67]
    """
    if isinstance(confusion, ConfusionCounts):
        if isinstance(confusion.digits, jax.core.Tracer):
            return _iou_of_digits(confusion)
        confusion = np.asarray(confusion)
    (rows, columns) = check_shape("confusion", confusion, ("K", "K"), "sum the matrices of several images first")
    if rows != columns:
        raise ValueError(f"expected a confusion matrix of shape [K, K], got [{rows}, {columns}]; count with one list "
                         "of classes")
    check_finite("confusion", confusion, "give counts", minimum=0)
    on_device = isinstance(confusion, jax.Array)
    xp = jnp if on_device else np
    # JAX's integers would wrap in the sums.
    counts = jnp.asarray(confusion).astype(jnp.float32) if on_device else np.asarray(confusion)
    if not on_device:
        counts = counts.astype(np.int64 if counts.dtype.kind in "biu" else np.float64)
    hit = xp.diagonal(counts)
    missed = xp.where(xp.eye(rows, dtype=bool), 0, counts)
    union = hit + missed.sum(axis=0) + missed.sum(axis=1)
    ratio_type = xp.float32 if on_device else xp.float64
    ratio = hit.astype(ratio_type) / xp.where(union > 0, union, 1).astype(ratio_type)
    return xp.where(union > 0, ratio, xp.nan)


def _iou_of_digits(confusion):
    """[K] float32; the sums are taken in the digits."""
    if confusion.digits.ndim != 3:
        raise ValueError(f"expected a confusion matrix of shape [K, K], got {confusion.shape}; merge the matrices of a "
                         "batch by .sum(axis=0)")
    digits = _carried(confusion.digits, -3)
    hit = jnp.diagonal(digits, axis1=1, axis2=2)
    missed = jnp.where(jnp.eye(digits.shape[-1], dtype=bool), jnp.uint32(0), digits)
    union = _carried(hit + missed.sum(axis=1, dtype=jnp.uint32) + missed.sum(axis=2, dtype=jnp.uint32), 0)
    weights = jnp.asarray(_WEIGHTS.astype(np.float32))
    hit, union = (jnp.sum(weights[:, None] * part.astype(jnp.float32), axis=0) for part in (hit, union))
    valid = (union > 0) & ~jnp.any(confusion.bad > 0)
    return jnp.where(valid, hit / jnp.where(union > 0, union, 1), jnp.nan)


def mean_iou(confusion: ArrayLike | ConfusionCounts) -> jax.Array | np.floating:
    r"""Mean over the classes of their intersection over union (mIoU), background included.

    .. math:: \mathrm{mIoU} = \frac{1}{|P|}\sum_{k \in P}\mathrm{IoU}_k,\quad
              P = \{k : k \text{ is in the truth or in the prediction}\}

    This is a ratio of counts over all images, not a mean of the images' own values.

    Args:
      confusion: [K, K] counts of `confusion_matrix`, summed over all images; rows are the truth.
    Returns:
      Scalar in 0..1, over the classes that occur; NaN if no pixel was counted, and under jit if a label was no class.
      float64 for a NumPy array and for `ConfusionCounts` outside jit, else float32.
    Raises:
      ValueError: as `iou_per_class`.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import mean_iou
      >>> round(float(mean_iou(np.array([[6, 2], [0, 4]]))), 3)
      0.708
    """
    iou = iou_per_class(confusion)
    xp = jnp if isinstance(iou, jax.Array) else np
    there = ~xp.isnan(iou)
    num_there = there.sum()
    total = xp.where(there, iou, 0.0).sum()
    return xp.where(num_there > 0, total / xp.maximum(num_there, 1).astype(total.dtype), xp.nan)[()]


def format_iou_table(
    confusion: ArrayLike | ConfusionCounts,
    class_names: Sequence[str],
    *,
    refined: ArrayLike | ConfusionCounts | None = None,
) -> str:
    """A text table of the IoU of each class, whose last line is ``mIoU 0.xxx``.

    A class that is in neither the truth nor the prediction shows a dash and is left out of the mean; a note
    under the table names it. With `refined` there are two columns, the plain mean is given on a line of its
    own and the last line is the refined mean.

    Args:
      confusion: [K, K] counts of `confusion_matrix`, of the prediction without refinement.
      class_names: K names, index 0 the background.
      refined: [K, K] counts of the same pixels after refinement, or None for a table of one column.
    Returns:
      The table, lines separated by newlines and no newline at its end.
    Raises:
      ValueError: if the number of names is not K, or a matrix is refused by `iou_per_class`.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import format_iou_table
      >>> print(format_iou_table(np.array([[6, 2], [0, 4]]), ["background", "cat"]))
      class           IoU
      -------------------
      background    0.750
      cat           0.667
      -------------------
      mean          0.708
      mIoU 0.708
    """
    for name, matrix in (("confusion", confusion), ("refined", refined)):
        if matrix is not None and not isinstance(matrix, ConfusionCounts):
            check_values(name, matrix, lambda values: None)  # whether it holds numbers, before a mask is dropped
    matrices = [np.asarray(confusion)] + ([] if refined is None else [np.asarray(refined)])
    for matrix in matrices:
        if matrix.shape != (len(class_names), len(class_names)):
            raise ValueError(f"expected confusion matrices [K, K] with a name for each of the K classes, got "
                             f"{matrix.shape} and {len(class_names)} names; use the checkpoint's class list")
    ious = [iou_per_class(matrix) for matrix in matrices]
    means = [mean_iou(matrix) for matrix in matrices]
    titles = ["IoU"] if refined is None else ["plain", "refined"]
    width = max(len(name) for name in ("class", *class_names))

    def line(name, cells):
        return "  ".join([f"{name:<{width}}"] + [f"{cell:>7}" for cell in cells])

    rule = "-" * (width + 9 * len(titles))
    lines = [line("class", titles), rule]
    for k, name in enumerate(class_names):
        lines.append(line(name, ["-" if np.isnan(iou[k]) else f"{iou[k]:.3f}" for iou in ious]))
    lines += [rule, line("mean", [f"{mean:.3f}" for mean in means])]
    for title, iou in zip(titles, ious, strict=True):
        absent = [name for name, value in zip(class_names, iou, strict=True) if np.isnan(value)]
        if absent:
            where = "" if refined is None else f" ({title})"
            lines.append(f"note{where}: in neither the truth nor the prediction, left out of the mean: "
                         + ", ".join(absent))
    if refined is not None:
        lines.append(f"mIoU {means[0]:.3f} without refinement")
    return "\n".join([*lines, f"mIoU {means[-1]:.3f}"])
