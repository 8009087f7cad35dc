"""Published names and layouts of arrays, and how they become ours.

A network is a list of parts, each of which says what its arrays are called in published files, and makes our parameters of
them. Layouts are the same in all of them: convolutions are [O, I, k, k] there and [k, k, I, O] here, depthwise ones
[C, 1, k, k] and [k, k, C], dense layers [O, I] and [I, O]. Batch norm is folded into the convolution before it.
`lcrf_jax.nets.tables` has the lists.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from flax.traverse_util import unflatten_dict

_NORM_FIELDS = ("weight", "bias", "running_mean", "running_var")

Shapes = Mapping[str, tuple[int, ...]]
State = Mapping[str, np.ndarray]


class Part(Protocol):
    """Some of our parameters and where they stand in published files."""

    @property
    def names(self) -> list[str]:
        """Names of the published arrays that it is made of."""

    def published_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes of these arrays, from those of our parameters by path."""

    def parameters(self, state: State, shapes: Shapes) -> dict[str, np.ndarray]:
        """Our parameters by path, float32, from the arrays of a file."""


class Layer(NamedTuple):
    """A convolution, with the batch norm after it folded in.

    Attributes:
      ours: its path, such as "stage1_block0/expand".
      convolution: prefix of ".weight" and, where no batch norm follows, ".bias".
      norm: prefix of the batch norm, or None.
      depthwise: whether each channel has a kernel of its own.
      epsilon: what the batch norm adds to the variance.
      biased: whether a convolution without a batch norm has a bias.
    """

    ours: str
    convolution: str
    norm: str | None = None
    depthwise: bool = False
    epsilon: float = 1e-3
    biased: bool = True

    @property
    def names(self) -> list[str]:
        """Names of the arrays that it is made of."""
        if self.norm is not None:
            return [f"{self.convolution}.weight", *(f"{self.norm}.{field}" for field in _NORM_FIELDS)]
        return [f"{self.convolution}.weight", *([f"{self.convolution}.bias"] if self.biased else [])]

    def published_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """See `Part`."""
        ours = shapes[f"{self.ours}/kernel"]
        kernel = (ours[2], 1, *ours[:2]) if self.depthwise else (ours[3], ours[2], *ours[:2])
        return {name: kernel if name == f"{self.convolution}.weight" else kernel[:1] for name in self.names}

    def parameters(self, state: State, shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Part`."""
        kernel, *rest = (np.asarray(state[name], np.float64) for name in self.names)
        if self.norm is None:
            [bias] = rest or [np.zeros(len(kernel))]
        else:
            scale, shift, mean, variance = rest
            gain = scale / np.sqrt(variance + self.epsilon)
            kernel, bias = kernel * gain[:, None, None, None], shift - mean * gain
        kernel = kernel[:, 0].transpose(1, 2, 0) if self.depthwise else kernel.transpose(2, 3, 1, 0)
        found = {f"{self.ours}/kernel": kernel.astype(np.float32)}
        return {**found, f"{self.ours}/bias": bias.astype(np.float32)} if self.biased else found


class Dense(NamedTuple):
    """A dense layer.

    Attributes:
      ours: its path.
      theirs: prefixes of ".weight" and ".bias"; of more than one, the outputs are joined in this order.
    """

    ours: str
    theirs: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """Names of the arrays that it is made of."""
        return [f"{prefix}.{field}" for prefix in self.theirs for field in ("weight", "bias")]

    def published_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """See `Part`."""
        inputs, outputs = shapes[f"{self.ours}/kernel"]
        outputs //= len(self.theirs)
        return {name: (outputs, inputs) if name.endswith(".weight") else (outputs,) for name in self.names}

    def parameters(self, state: State, shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Part`."""
        kernel, bias = (
            np.concatenate([np.asarray(state[f"{prefix}.{field}"], np.float32) for prefix in self.theirs])
            for field in ("weight", "bias")
        )
        return {f"{self.ours}/kernel": np.ascontiguousarray(kernel.T), f"{self.ours}/bias": bias}


class Array(NamedTuple):
    """One array that is taken as it is.

    Attributes:
      ours: its path.
      theirs: its name.
      leading: axes of length 1 that it has in front there.
    """

    ours: str
    theirs: str
    leading: int = 0

    @property
    def names(self) -> list[str]:
        """Its name, in a list."""
        return [self.theirs]

    def published_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """See `Part`."""
        return {self.theirs: (1,) * self.leading + tuple(shapes[self.ours])}

    def parameters(self, state: State, shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Part`."""
        return {self.ours: np.asarray(state[self.theirs], np.float32).reshape(shapes[self.ours])}


class PatchPositions(NamedTuple):
    """Positions of the patches alone, where the class token has its own added already: that is 0 here.

    Attributes:
      ours: its path; the class token's row comes first.
      theirs: its name, of an array [1, N, C].
    """

    ours: str
    theirs: str

    @property
    def names(self) -> list[str]:
        """Its name, in a list."""
        return [self.theirs]

    def published_shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """See `Part`."""
        count, width = shapes[self.ours]
        return {self.theirs: (1, count - 1, width)}

    def parameters(self, state: State, shapes: Shapes) -> dict[str, np.ndarray]:
        """See `Part`."""
        patches = np.asarray(state[self.theirs], np.float32)[0]
        return {self.ours: np.concatenate([np.zeros_like(patches[:1]), patches])}


def best_table(tables: Sequence[Sequence[Part]], state: State) -> Sequence[Part]:
    """The naming of a file.

    Args:
      tables: lists of parts, one for each naming.
      state: dict from published name to array.

    Returns:
      The list of which the largest share of names is in the file; of equal ones the first.
    """

    def share(parts):
        found = [name in state for part in parts for name in part.names]
        return sum(found) / len(found)

    return max(tables, key=share)


def converted(state: State, parts: Sequence[Part], shapes: Shapes) -> dict[str, Any]:
    """Our parameters from a published state dict.

    Args:
      state: dict from published name to array.
      parts: list of parts.
      shapes: dict from a path such as "stem/kernel" to the shape that the network wants.

    Returns:
      Nested dict {"params": {layer: {"kernel", "bias"}}}, float32.

    Raises:
      ValueError: listing every name that is missing and every array of another shape, or every parameter that is not finite.
    """
    wanted = {name: shape for part in parts for name, shape in part.published_shapes(shapes).items()}
    missing = [name for name in wanted if name not in state]
    wrong = [
        f"{name} is {list(state[name].shape)} and not {list(shape)}"
        for name, shape in wanted.items()
        if name in state and state[name].shape != shape
    ]
    faults = [f"{len(missing)} of {len(wanted)} names are missing: {', '.join(missing)}"] if missing else []
    faults += [f"{len(wrong)} of {len(wanted)} arrays have another shape: {'; '.join(wrong)}"] if wrong else []
    if faults:
        raise ValueError("; ".join(faults))
    flat = {path: array for part in parts for path, array in part.parameters(state, shapes).items()}
    broken = [path for path, array in flat.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"not all numbers are finite in {', '.join(broken)}")
    return {"params": unflatten_dict(flat, sep="/")}
