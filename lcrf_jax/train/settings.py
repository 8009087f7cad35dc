"""Settings of a configuration that cannot be, told before data is read: their ranges, and names that nothing knows."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lcrf_jax.data.check import MODES
from lcrf_jax.data.files.images import MAX_PIXELS
from lcrf_jax.machine.errors import SettingError, nearest
from lcrf_jax.numerics import check_number
from lcrf_jax.predict.checks import RANGES, check_kernel, check_sizes
from lcrf_jax.runfolder.segments import flat_settings

# name: (least, whether it is allowed itself, whether whole numbers alone are). Ranges that the functions check which
# take the numbers, before features are computed, are not repeated here.
_RANGES = {
    "seed": (0, True, True),
    "batch_size": (1, True, True),
    "accumulation_steps": (1, True, True),
    "max_skipped_in_a_row": (1, True, True),
    "num_threads": (0, True, True),
    "log_every_steps": (1, True, True),
    "eval_every_epochs": (1, True, True),
    "save_every_steps": (1, True, True),
    "least_steps": (0, True, True),
    "rounds": (1, True, True),
    "cache.features_gb": (0, True, False),
    "views.num_views": (1, True, True),
    "views.seed": (0, True, True),
    "classifier.l2": (0, True, False),
    "class_maps.grid": (1, True, True),
    "objective.likelihood_weight": (0, True, False),
    "objective.entropy_weight": (0, True, False),
    "objective.pairwise_weight": (0, True, False),
    "baselines.cam.background_level": (0, False, False),
    "baselines.cam.sharpness": (0, False, False),
    "baselines.cam.floor": (0, False, False),
    "baselines.cues.foreground_level": (0, True, False),
    "baselines.cues.background_share": (0, True, False),
    "baselines.saliency.image_size": (2, True, True),
    "baselines.saliency.contrast": (0, True, False),
    "baselines.saliency.level": (0, True, False),
    "linear.num_steps": (0, True, True),
    "linear.learning_rate": (0, False, False),
    "linear.weight_decay": (0, True, False),
    "linear.unary_weight": (0, False, False),
    "linear.evidence_weight": (0, True, False),
    "posterior.unary_weight": (0, True, False),
    "posterior.evidence_weight": (0, True, False),
    "posterior.linear_weight": (0, True, False),
    "posterior.maps_weight": (0, False, False),
    "posterior.tempering": (0, False, False),
    "posterior.num_iterations": (0, True, True),
    "optimizer.learning_rate": (0, False, False),
    "optimizer.warmup_steps": (0, True, True),
    "optimizer.final_share": (0, True, False),
    "optimizer.weight_decay": (0, True, False),
    "optimizer.clip_norm": (0, False, False),
    "optimizer.backbone_share": (0, False, False),
    "balance_weight": (0, True, False),
    **{f"inference.{name}": limits for name, limits in RANGES.items()},
}
_KERNELS = ("objective.kernel", "posterior.kernel", "inference.kernel", "baselines.sec.kernel")
MOST_STEPS = 2**31 - 1  # what programs count in 32 bits
_MOST = {"seed": 2**32 - 1, "baselines.saliency.image_size": math.isqrt(MAX_PIXELS)}
# (least, greatest): areas are shares of the image.
_PAIRS = {"views.scale_range": 1.0, "views.ratio_range": math.inf}
_WORDS = {"data.on_bad_image": MODES, "baselines.cues.background_by": ("gradient", "objectness")}
_SIZES = ("inference.input_sizes", "class_maps.extra_sizes")
# Their entries depend on other settings, and are looked at where these are known.
_FREE = ("data.options",)


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuse numbers and words that cannot be trained with; settings that are not there are not looked at.

    Args:
      config: the configuration, see `experiments/configs`.

    Raises:
      SettingError: the message names the setting, what was expected and what came.
    """
    flat = flat_settings(dict(config))
    with told_as_settings():
        for name, (least, included, whole) in _RANGES.items():
            if name in flat:
                check_number(
                    name, flat[name], minimum=least, strict=not included, whole=whole,
                    remedy="--print_config says what it means",
                )  # fmt: skip
                if whole and flat[name] is not None and flat[name] > _MOST.get(name, MOST_STEPS):
                    raise SettingError(f"{name}: expected at most {_MOST.get(name, MOST_STEPS)}, got {flat[name]}")
        for name in _KERNELS:
            if (kernel := _at(config, name)) is not None:
                check_kernel(name, kernel)
        for name in _SIZES:
            if (sizes := _at(config, name)) is not None:
                check_sizes(name, sizes, least=1 if name == "inference.input_sizes" else 0)
    for name, most in _PAIRS.items():
        _check_pair(name, _at(config, name), most)
    for name, value in flat.items():
        if isinstance(value, float) and math.isnan(value):
            raise SettingError(f"{name}: expected a number, got nan")
    if flat.get("data.val_split") and flat["data.val_split"] == flat.get("data.train_split"):
        raise SettingError(
            f"data.val_split: expected another split than {flat['data.train_split']!r}, which is trained on: best/ would be chosen by "
            "its masks; experiments.evaluate --split scores it when the run is finished"
        )
    for name, words in _WORDS.items():
        if name in flat and flat[name] not in words:
            expected = ", ".join(words)
            raise SettingError(f"{name}: expected one of {expected}, got {flat[name]!r}{nearest(flat[name], words)}")


def check_names(config: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse settings that nothing knows: a name that is misspelt in a file would be dropped without a word.

    Args:
      config: the configuration.
      known: one with every setting.

    Raises:
      SettingError: the message names the setting, and the nearest that there is.
    """
    names = flat_settings(dict(known))
    for name in flat_settings(dict(config)):
        if name not in names and not any(name.startswith(f"{free}.") for free in _FREE):
            raise SettingError(f"config.{name}: there is no such setting{nearest(name, names) or '; --print_config prints all'}")


@contextlib.contextmanager
def told_as_settings() -> Iterator[None]:
    """What functions of the pure rooms refuse while settings are tried on them, is refused as a setting.

    Returns:
      A context manager.

    Raises:
      SettingError: for a ValueError or TypeError inside.
    """
    try:
        yield
    except SettingError:
        raise
    except (ValueError, TypeError) as error:
        raise SettingError(str(error)) from error


def _check_pair(name, pair, most):
    if pair is None:
        return
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most:
        limit = "" if most == math.inf else f" <= {most:g}"
        raise SettingError(f"{name}: expected two numbers, 0 < least <= greatest{limit}, got {pair!r}")


def _at(config, name):
    """The setting of a dotted name, or None."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
