"""Confusion matrices and intersection over union.

One matrix is counted over all pixels of all images; matrices of different images, devices or processes are
merged by adding them. Every function takes NumPy arrays (counts in int64, ratios in float64, values
checked) and JAX arrays or tracers (counts in int32, ratios in float32). A sum over a data set belongs in
int64, so add the matrices of single images as NumPy arrays: ``total = total + np.asarray(confusion)``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

POISON = -(2**30)
"""Entry of a traced confusion matrix that has met a label out of range; see `confusion_matrix`."""


def confusion_matrix(
    labels: ArrayLike, truth: ArrayLike, num_classes: int, *, ignore: int = 255
) -> jax.Array | np.ndarray:
    r"""Number of pixels of each true class that were given each predicted class.

    .. math:: C_{ab} = \#\{j : t_j = a,\; \hat z_j = b,\; t_j \ne \text{ignore}\}

    Pixels whose truth is `ignore` are not counted, whatever was predicted there; a prediction is
    nevertheless a class everywhere, never `ignore`. Matrices of several images merge by ``+``. Values can
    only be checked where they are known: for arrays outside jit a bad value raises; under jit the whole
    matrix becomes -2**30, which `iou_per_class` and `format_iou_table` refuse later.

    Args:
      labels: [...] integers in 0..num_classes - 1, the prediction, any shape.
      truth: [...] integers of the same shape, in 0..num_classes - 1 or equal to `ignore`.
      num_classes: K, a static Python int, background included.
      ignore: label of the truth that leaves a pixel out (VOC's void).
    Returns:
      [K, K] counts, rows are the truth and columns the prediction; int64 for NumPy arrays, int32 for JAX
      arrays (exact up to 2**30 pixels a matrix).
    Raises:
      ValueError: if the shapes differ, num_classes is not positive or `ignore` is one of the classes, or if a
        value known outside jit is out of range.
      TypeError: if one of the arrays does not hold integers.
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
    predicted, true = xp.asarray(labels), xp.asarray(truth)
    if num_classes < 1 or 0 <= ignore < num_classes:
        raise ValueError(f"expected num_classes >= 1 and ignore outside 0..num_classes - 1, got num_classes "
                         f"{num_classes} and ignore {ignore}; choose a label that is no class")
    if predicted.shape != true.shape:
        raise ValueError(f"expected labels and truth of one shape, got {predicted.shape} and {true.shape}; "
                         "bring the prediction to the size of the mask first")
    for name, array in (("labels", predicted), ("truth", true)):
        if not xp.issubdtype(array.dtype, xp.integer):
            raise TypeError(f"expected integers in {name}, got {array.dtype}; "
                            "take the argmax of probabilities first")
    wide = xp.int64 if on_host else xp.int32
    predicted, true = predicted.reshape(-1).astype(wide), true.reshape(-1).astype(wide)
    counted = true != ignore
    bad_labels = (predicted < 0) | (predicted >= num_classes)
    bad_truth = ((true < 0) | (true >= num_classes)) & counted
    traced = isinstance(predicted, jax.core.Tracer) or isinstance(true, jax.core.Tracer)
    if not traced:
        _refuse_bad_values("labels", predicted, bad_labels, num_classes,
                           "a prediction has to be a class at every pixel")
        _refuse_bad_values("truth", true, bad_truth, num_classes,
                           f"check the class list of the masks, or mark pixels to leave out with {ignore}")
    pairs = xp.where(counted & ~bad_labels & ~bad_truth, true * num_classes + predicted, num_classes**2)
    counts: jax.Array | np.ndarray
    if on_host:
        counts = np.bincount(pairs, minlength=num_classes**2 + 1)
    else:
        counts = jnp.zeros(num_classes**2 + 1, jnp.int32).at[pairs].add(1)
        counts = jnp.where(jnp.any(bad_labels | bad_truth), POISON, counts)
    return counts[:-1].reshape(num_classes, num_classes)


def iou_per_class(confusion: ArrayLike) -> jax.Array | np.ndarray:
    r"""Intersection over union of each class.

    .. math:: \mathrm{IoU}_k = \frac{C_{kk}}{\sum_b C_{kb} + \sum_a C_{ak} - C_{kk}}

    Args:
      confusion: [K, K] counts of `confusion_matrix`, summed over all images; rows are the truth.
    Returns:
      [K] values in 0..1; NaN for a class that is in neither the truth nor the prediction. float64 for a NumPy
      array, float32 for a JAX array.
    Raises:
      ValueError: if the matrix is not square, or holds a negative count known outside jit.
    References:
      Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, section 4.
    Example:
      >>> import numpy as np
      >>> from lcrf_jax import iou_per_class
      >>> iou_per_class(np.array([[6, 2], [0, 4]])).round(2).tolist()
      [0.75, 0.67]
    """
    xp = jnp if isinstance(confusion, jax.Array) else np
    counts = xp.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"expected a confusion matrix of shape [K, K], got {counts.shape}; "
                         "sum the matrices of several images first")
    if not isinstance(counts, jax.core.Tracer) and np.asarray(counts < 0).any():
        raise ValueError("expected counts >= 0 in the confusion matrix, got a negative one: a label outside "
                         "the classes was met under jit; call confusion_matrix on NumPy arrays to see which")
    ratio_type = xp.float64 if xp is np else xp.float32
    hit = xp.diagonal(counts)
    union = counts.sum(axis=0) + counts.sum(axis=1) - hit
    ratio = hit.astype(ratio_type) / xp.maximum(union, 1).astype(ratio_type)
    return xp.where(union > 0, ratio, xp.nan)


def mean_iou(confusion: ArrayLike) -> jax.Array | np.floating:
    r"""Mean over the classes of their intersection over union (mIoU), background included.

    .. math:: \mathrm{mIoU} = \frac{1}{|P|}\sum_{k \in P}\mathrm{IoU}_k,\quad
              P = \{k : k \text{ is in the truth or in the prediction}\}

    This is a ratio of counts over all images, not a mean of the images' own values.

    Args:
      confusion: [K, K] counts of `confusion_matrix`, summed over all images; rows are the truth.
    Returns:
      Scalar in 0..1, over the classes that occur; NaN if no pixel was counted. float64 for a NumPy array,
      float32 for a JAX array.
    Raises:
      ValueError: if the matrix is not square, or holds a negative count known outside jit.
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


def format_iou_table(confusion: ArrayLike, class_names: Sequence[str], *, refined: ArrayLike | None = None) -> str:
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
      ValueError: if the number of names is not K, a matrix is not [K, K], or a matrix holds a negative count.
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


def _refuse_bad_values(name, values, bad, num_classes, advice):
    bad = np.asarray(bad)
    if bad.any():
        found = sorted({int(value) for value in np.unique(np.asarray(values)[bad])[:5]})
        raise ValueError(f"expected {name} in 0..{num_classes - 1}, got {found} at {int(bad.sum())} pixels; "
                         + advice)
