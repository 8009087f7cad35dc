"""What a description says of test time, checked before a network is made of it: a file may have been edited by hand."""

import contextlib
import inspect
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lcrf_jax.baselines import cam_log_probs, ilp_log_probs
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.data.files.images import MAX_PIXELS
from lcrf_jax.machine.errors import SettingError, nearest
from lcrf_jax.nets.network import Network, build_network, unfit_parameters
from lcrf_jax.numerics import check_number
from lcrf_jax.predict.outputs import OUTPUTS
from lcrf_jax.runfolder.description import CheckpointError

# name: (least, whether it is allowed itself, whether whole numbers alone are)
RANGES = {
    "max_side": (1, True, True),
    "prior_weight": (0, True, False),
    "unary_weight": (0, True, False),
    "num_iterations": (0, True, True),
}
_OF_DESCRIPTIONS = {**RANGES, "coarse_iterations": (0, True, True)}
_NEEDED = ("input_sizes", "mirror", "kernel", "num_iterations", "unary_weight")  # earlier versions had these alone
_MISSING = object()
_ORIGIN: dict[str, Any] = {
    "supervision": str, "versions": Mapping, "training.method": str, "training.data.kind": str, "training.data.root": str | None,
    "training.data.options": Mapping, "training.data.val_split": str | None,
}  # fmt: skip
_FUNCTIONS = {"ilp": ilp_log_probs, "class_maps": cam_log_probs}


def check_description(description: Mapping[str, Any], place: str | os.PathLike) -> None:
    """Refuse a description that no segmenter can be made of, or one that would label silently wrong.

    Args:
      description: with the entries of `lcrf_jax.runfolder.description.FOR_INFERENCE`.
      place: the file that it is from, for the message.

    Raises:
      CheckpointError: the message names the file and the entry, what was expected and what is there.
    """
    try:
        _check_network(description)
        _check_inference(description["inference"], build_network(description["network"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{place}: {str(error).rstrip('; ')}; correct it, or restore the file from a copy") from error


def check_parameters(description: Mapping[str, Any], params: Mapping[str, Any], place: str | os.PathLike) -> None:
    """Refuse parameters that are not those of a description.

    Args:
      description: as for `check_description`.
      params: for inference.
      place: where they are from, for the message.

    Raises:
      CheckpointError: if some are missing, or they are of another number of classes or of more taps.
    """
    num_classes = len(description["class_names"])
    for name in sorted(needed_parameters(description["inference"])):
        if name not in params:
            raise CheckpointError(f"{place} has no parameters of the {name}, which its inference.output or prior_weight needs; correct these")
        layer = {"decoder": lambda tree: tree.get("logits"), "classifier": lambda tree: tree}.get(name, lambda _: None)(params[name])
        found = None if layer is None or "bias" not in layer else len(np.asarray(layer["bias"])) + (name == "classifier")
        if found not in (None, num_classes):
            raise CheckpointError(
                f"{place}: class_names: expected {found} names, as many as its {name} has classes, got {num_classes}; correct them and "
                "network.num_classes, or restore the file from a copy"
            )
    taps = description["network"]["taps"]
    dropped = [name for name in params.get("decoder", ()) if name.startswith("merge_") and name.removeprefix("merge_") not in taps[1:]]
    if dropped and "decoder" in needed_parameters(description["inference"]):  # Flax would leave these layers out without a word
        raise CheckpointError(f"{place}: network.taps: expected {dropped[0].removeprefix('merge_')!r} among them, which its decoder has learnt to use, "
                              f"got {taps}; correct it, or restore the file from a copy")


@contextlib.contextmanager
def told_as_parameters(network: Network, params: Mapping[str, Any]) -> Iterator[None]:
    """What a network refuses because its parameters are those of another one, is told so. They are compared then alone.

    Args:
      network: Network.
      params: what it is given, see `lcrf_jax.nets.network.unfit_parameters`.

    Returns:
      A context manager.

    Raises:
      CheckpointError: in place of any error inside, if parameters do not fit the network.
    """
    try:
        yield
    except Exception as error:
        wrong = unfit_parameters(network.description, params)
        if not wrong:
            raise
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"network: the parameters are those of another network than config.json describes: {wrong[0]}{more}; correct the entry network "
            "to what was trained, or restore the file from a copy"
        ) from error


def check_origin(description: Mapping[str, Any], place: str | os.PathLike) -> None:
    """Refuse a description that does not say what a model was trained on and how, as scores and reports tell.

    Args:
      description: as for `check_description`.
      place: the file that it is from, for the message.

    Raises:
      CheckpointError: the message names the file and the entry.
    """
    for name, kinds in _ORIGIN.items():
        at: Any = description
        for part in name.split("."):
            at = at.get(part, _MISSING) if isinstance(at, Mapping) else _MISSING
        if not isinstance(at, kinds):
            got = "nothing" if at is _MISSING else _short(at)
            expected = "an object {...}" if kinds is Mapping else "a text"
            raise CheckpointError(f"{place}: {name}: expected {expected}, got {got}; correct it, or restore the file from a copy")


def needed_parameters(inference: Mapping[str, Any]) -> set[str]:
    """Which parameters settings of test time need.

    Args:
      inference: see `lcrf_jax.predict.segmenter.make_segmenter`.

    Returns:
      set of "backbone", "decoder" and "classifier".
    """
    output = inference.get("output", "softmax")
    prior = {"classifier"} if inference.get("prior_weight") else set()
    return {"backbone", "classifier" if output == "class_maps" else "decoder", *prior}


def check_kernel(name: str, kernel: Any) -> None:
    """Refuse what is no pairwise kernel.

    Args:
      name: of the setting.
      kernel: dict of fields of `KernelParams`; those that are not there have their usual values.

    Raises:
      SettingError, ValueError, TypeError: the message names the field.
    """
    if not isinstance(kernel, Mapping):
        raise SettingError(f"{name}: expected the weights and widths of a kernel, got {kernel!r}")
    for field, value in kernel.items():
        if field not in KernelParams._fields:
            raise SettingError(f"{name}.{field}: there is no such field{nearest(field, KernelParams._fields)}; expected {', '.join(KernelParams._fields)}")
        _refuse_no_number(f"{name}.{field}", value)
        check_number(f"{name}.{field}", value, minimum=0, strict=field.endswith("width"), remedy="widths are above 0, weights 0 or more")


def check_sizes(name: str, sizes: Any, *, least: int) -> None:
    """Refuse what are no sides of square inputs.

    Args:
      name: of the setting.
      sizes: tuple or list of int.
      least: how many there have to be.

    Raises:
      SettingError: the message names the setting.
    """
    if not isinstance(sizes, tuple | list) or len(sizes) < least or not all(isinstance(s, int) and s >= 1 for s in sizes):
        raise SettingError(f"{name}: expected {'one or more ' if least else ''}sizes in pixels, such as (320,), got {sizes!r}")


def check_size(name: str, size: int, network: Network) -> None:
    """Refuse a side of the input that a backbone cannot take.

    Args:
      name: of the setting.
      size: in pixels.
      network: Network.

    Raises:
      SettingError: the message names the setting.
    """
    if size * size > MAX_PIXELS:
        raise SettingError(f"{name}: expected at most {math.isqrt(MAX_PIXELS)}, the side of an image of {MAX_PIXELS // 10**6} million pixels, got {size}")
    if size < 32 or size % network.size_step:
        multiple = f"a multiple of {network.size_step}" if network.size_step > 1 else "32 or more"
        raise SettingError(f"{name}: expected {multiple}, got {size}")


def _refuse_no_number(name, value):
    """None is no number of a file, and true and false are none."""
    if value is None or isinstance(value, bool | str):
        raise SettingError(f"{name}: expected a number, got {value!r}")


def _check_network(description):
    names = description["class_names"]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
        raise SettingError(f"class_names: expected a list of names, background first, got {_short(names)}")
    if twice := [name for number, name in enumerate(names) if name in names[:number]]:
        raise SettingError(f"class_names: expected each name once, got {twice[0]!r} twice")
    network = description["network"]
    try:
        build_network(network)
    except (TypeError, KeyError, AttributeError) as error:
        raise SettingError(f"network: expected the entries of lcrf_jax.nets.network.build_network, got {_short(network)} ({error})") from error
    if network["num_classes"] != len(names):
        raise SettingError(f"class_names: expected {network['num_classes']} names, one for each of network.num_classes, got {len(names)}")


def _check_inference(inference, network):
    if not isinstance(inference, Mapping):
        raise SettingError(f"inference: expected the settings of test time, got {_short(inference)}")
    if missing := [name for name in _NEEDED if name not in inference]:
        raise SettingError(f"inference: it has no {', '.join(missing)}")
    check_sizes("inference.input_sizes", inference["input_sizes"], least=1)
    for size in inference["input_sizes"]:
        check_size("inference.input_sizes", size, network)
    if not isinstance(inference["mirror"], bool):
        raise SettingError(f"inference.mirror: expected true or false, got {inference['mirror']!r}")
    check_kernel("inference.kernel", inference["kernel"])
    if missing := [field for field in KernelParams._fields if field not in inference["kernel"]]:
        raise SettingError(f"inference.kernel: it has no {', '.join(missing)}")
    for name, (least, included, whole) in _OF_DESCRIPTIONS.items():
        if name in inference:
            value = inference[name]
            _refuse_no_number(f"inference.{name}", value)
            check_number(f"inference.{name}", value, minimum=least, strict=not included, whole=whole, remedy="")
            if whole and not isinstance(value, int):
                raise SettingError(f"inference.{name}: expected a whole number, got {value!r}")
    if inference.get("coarse_iterations", 0) > inference["num_iterations"]:
        most = inference["num_iterations"]
        raise SettingError(f"inference.coarse_iterations: expected at most num_iterations, {most}, got {inference['coarse_iterations']}")
    if "class_offsets" in inference:
        _check_offsets(inference["class_offsets"], network.description["num_classes"])
    _check_output(inference.get("output", "softmax"), inference.get("output_options", {}))


def _check_offsets(offsets, num_classes):
    if not isinstance(offsets, list | tuple) or len(offsets) != num_classes:
        raise SettingError(f"inference.class_offsets: expected a list of {num_classes} numbers, one for each class, got {_short(offsets)}")
    for value in offsets:
        _refuse_no_number("inference.class_offsets", value)
        check_number("inference.class_offsets", value, minimum=0, remedy="")


def _check_output(output, options):
    if output not in OUTPUTS:
        raise SettingError(f"inference.output: expected one of {', '.join(OUTPUTS)}, got {output!r}{nearest(output, OUTPUTS)}")
    if not isinstance(options, Mapping):
        raise SettingError(f"inference.output_options: expected the options of the output {output!r}, got {_short(options)}")
    arguments = inspect.signature(_FUNCTIONS[output]).parameters.values() if output in _FUNCTIONS else ()
    known = [argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY]
    for name, value in options.items():
        if name not in known:
            expected = ", ".join(known) or "none"
            raise SettingError(f"inference.output_options.{name}: the output {output!r} has no such option{nearest(name, known)}; expected {expected}")
        _refuse_no_number(f"inference.output_options.{name}", value)
        check_number(f"inference.output_options.{name}", value, minimum=0, strict=True, remedy="")


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
