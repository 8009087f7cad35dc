"""Which layers of a backbone are trained, and where their weights are.

A backbone is frozen but for the layers from `trainable_from` on. Weights of these stand beside those of the decoder, under the name
"backbone" of one tree of parameters; the source's own stay where they are, for the tag classifier, which is fitted on them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

PART = "backbone"

# The layers of a backbone from the input on, each with the taps that are complete after it.
Layers = Sequence[tuple[str, tuple[str, ...]]]


def trained_layers(layers: Layers, first: str, taps: Sequence[str]) -> tuple[str, ...]:
    """The layers that are trained: from one on, as far as the taps of the decoder depend on them.

    Args:
      layers: of the backbone.
      first: name of a layer, such as "stage3_block1", or of a stage or block with all of its layers, such as "stage3"; ""
        is none.
      taps: of the decoder, the deepest first.

    Returns:
      Names of the layers; empty if `first` is "".

    Raises:
      ValueError: if there is no such layer, or no tap depends on it.
    """
    if not first:
        return ()
    names = [name for name, _ in layers]
    start = next((at for at, name in enumerate(names) if name == first or name.startswith(f"{first}_")), None)
    if start is None:
        stages = ", ".join(dict.fromkeys(re.sub(r"_(block)?\d+$", "", name) for name in names))
        raise ValueError(f"network.trainable_from: expected '' for none, or one of {stages}, or a layer of it, got {first!r}")
    end = next(at for at, (_, complete) in enumerate(layers) if taps[0] in complete)
    if start > end:
        raise ValueError(
            f"network.trainable_from: no tap of the decoder depends on {first!r}; the deepest, {taps[0]!r}, is complete after {names[end]!r}"
        )
    return tuple(names[start : end + 1])


def with_part(params: Mapping[str, Any], variables: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Parameters of a decoder with the layers of the backbone that are trained.

    Args:
      params: of the decoder.
      variables: of the backbone.
      names: of the layers, see `trained_layers`.

    Returns:
      dict; the parameters alone where no layer is trained.
    """
    return {**params, PART: {name: variables["params"][name] for name in names}} if names else dict(params)


def merged(variables: Mapping[str, Any], params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Variables of the backbone with the layers that were trained.

    Args:
      variables: of the backbone, from its source.
      params: what is trained: of the decoder and, under "backbone", of layers.

    Returns:
      The variables; `variables` itself where no layer is trained.
    """
    if not params.get(PART):
        return variables
    return {**variables, "params": {**variables["params"], **params[PART]}}
