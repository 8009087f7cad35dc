"""The methods that can be trained and compared: what each minimises, what it is given, and what it does at test time.

`METHODS` is the only list of them: the key is `config.method`, the column of the comparison and what `--methods`
takes. docs/methods.md says how to add one.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax import baselines
from lcrf_jax.bound.objective import latent_crf_objective
from lcrf_jax.bound.record import Record
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.machine.errors import SettingError, nearest


class Method(NamedTuple):
    """One method.

    Attributes:
      title: heading of its column.
      supervision: what it has seen, for the checkpoint and the tables.
      objective: function (config, stride=, steps_per_epoch=) -> objective, a function of one image (key, logits
        [h, w, K], record, step) -> (loss, dict of terms); None if nothing is trained.
      inputs: what its records hold beside features and tags, keys of INPUTS.
      further_inputs: function from the config to what they hold on top of that.
      round_epochs: function from the config to the number of epochs of each round. A round after the first has in its
        records the "pixel_evidence" [h, w, K] that the network of the round before gives, restricted to the tags.
      own_rounds: whether `config.epochs` has a number for each of `config.rounds`; otherwise their sum is what counts.
      posterior: function from the config to the settings of `lcrf_jax.train.posteriors.posterior_evidence` between
        rounds.
      simple_rounds: in how many rounds, from the first on, only images with a single tag take part.
      output: what is made of the network's output at test time, a key of `lcrf_jax.predict.outputs.OUTPUTS`.
      smoothed_title: heading of a further column with the labels smoothed in superpixels; "" for none.
    """

    title: str
    supervision: str
    objective: Callable | None
    inputs: tuple[str, ...] = ()
    further_inputs: Callable[[Mapping[str, Any]], Sequence[str]] = lambda config: ()
    round_epochs: Callable[[Mapping[str, Any]], list[int]] = lambda config: [sum(config["epochs"])]
    own_rounds: bool = False
    posterior: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config["posterior"]
    simple_rounds: int = 0
    output: str = "softmax"
    smoothed_title: str = ""


# What tells a method where in an image a class is, beside the tags, and how the tables name it.
INPUTS = {
    "class_maps": "class maps",
    "gradient_saliency": "class maps and gradient saliency",
    "objectness": "class maps and objectness",
    "cues": "class maps and gradient saliency",
    "saliency": "image saliency",
    "masks": "masks",
}


def _cells(grid):
    """[h, w, ...] as [m, ...]."""
    return grid.reshape(-1, *grid.shape[2:])


def _check_options(function):
    """Refuse options that a loss refuses, before there are features to train on; nothing is computed."""
    jax.eval_shape(function, jnp.zeros((1, 2)), jnp.ones(2, bool))


def _by_loss(name, loss):
    """The objective builder of a loss of (key, logits [m, K], record, options): options are config.baselines.NAME."""

    def builder(config, *, stride, steps_per_epoch):
        del stride, steps_per_epoch
        options = config["baselines"][name]
        _check_options(
            lambda logits, tags: loss(
                jax.random.key(0), logits, Record(tags, saliency=logits[:, :1, None]), options
            )
        )

        def objective(key, logits, record, step):
            del step
            value = loss(key, _cells(logits), record, options)
            return value, {name: value}

        return objective

    return builder


def _mil(key, logits, record, options):
    del key
    return baselines.mil_lse_loss(logits, record.tags, **options)


def _em_adapt(key, logits, record, options):
    labels = baselines.em_adapt_labels(key, logits, record.tags, **options)
    return baselines.label_cross_entropy(logits, labels)


def _ccnn(config, *, stride, steps_per_epoch):
    del stride, steps_per_epoch
    options = config["baselines"]["ccnn"]
    _check_options(lambda logits, tags: baselines.ccnn_distribution(logits, tags, **options))

    def objective(key, logits, record, step):
        del key, step
        logits = _cells(logits)
        latent = baselines.ccnn_distribution(logits, record.tags, **options)
        loss = baselines.soft_cross_entropy(logits, jnp.exp(latent.log_probs))
        return loss, {"ccnn": loss, "residual": latent.residual}

    return objective


def _sec(config, *, stride, steps_per_epoch):
    del steps_per_epoch
    options = config["baselines"]["sec"]
    kernel_params = KernelParams(**options["kernel"]).at_stride(stride)
    decays = {name: options[name] for name in ("foreground_decay", "background_decay")}
    _check_options(
        lambda logits, tags: baselines.expand_loss(
            baselines.floored_probs(logits, min_prob=options["min_prob"]), tags, **decays
        )
    )

    def objective(key, logits, record, step):
        del key, step
        probs = baselines.floored_probs(_cells(logits), min_prob=options["min_prob"])
        kernel = jax.lax.stop_gradient(dense_kernel(record.guide, kernel_params))
        terms = {
            "seed": baselines.seed_loss(probs, _cells(record.cues)),
            "expand": baselines.expand_loss(probs, record.tags, **decays),
            "constrain": baselines.constrain_loss(probs, kernel, num_iterations=options["num_iterations"]),
        }
        return sum(terms.values()), terms

    return objective


def _stc(key, logits, record, options):
    del key, options
    if record.pixel_evidence is not None:
        labels = baselines.tagged_labels(_cells(record.pixel_evidence), record.tags)
        return baselines.label_cross_entropy(logits, labels)
    target = baselines.saliency_target(_cells(record.saliency)[:, 0], record.tags)
    return baselines.soft_cross_entropy(logits, target)


def _full_supervision(config, *, stride, steps_per_epoch):
    del config, stride, steps_per_epoch

    def objective(key, logits, record, step):
        del key, step
        rows, columns = (_centres(*sides) for sides in zip(logits.shape[:2], record.mask.shape))
        labels = record.mask[rows][:, columns]
        loss = baselines.label_cross_entropy(_cells(logits), labels.reshape(-1))
        return loss, {"cross_entropy": loss}

    return objective


def _centres(cells, pixels):
    """The pixel in the middle of each cell."""
    return ((np.arange(cells) + 0.5) * pixels / cells).astype(int)


def _thirds(config):
    """Three rounds of about equal length; what does not divide goes to the last."""
    total = sum(config["epochs"])
    return [total // 3, total // 3, total - 2 * (total // 3)]


def _unrefined(config):
    return {**config["posterior"], "unary_weight": 1.0, "evidence_weight": 0.0, "linear_weight": 0.0, "tempering": 1.0, "num_iterations": 0}


def _evidence_inputs(config):
    """What the evidence of the latent CRF needs beside class maps."""
    objective = config["objective"]
    later = config.get("posterior", {}).get("evidence_weight")  # later rounds take the maps, whatever the first one takes
    if objective["likelihood"] != "evidence" and not later:
        return ()
    evidence = objective["likelihood_options"]["evidence"]
    wanted = {
        "objectness": evidence.get("objectness_weight"),
        "gradient_saliency": evidence.get("saliency_weight"),
        "cues": objective["likelihood"] == "evidence" and objective["cue_confidence"],
    }
    return tuple(name for name, weight in wanted.items() if weight)


METHODS = {
    "mil_ilp": Method("MIL+ILP", "image tags", _by_loss("mil_ilp", _mil), output="ilp", smoothed_title="MIL+ILP-sppxl"),
    "em_adapt": Method("EM-Adapt", "image tags", _by_loss("em_adapt", _em_adapt)),
    "ccnn": Method("CCNN", "image tags", _ccnn),
    "cam": Method("CAM", "image tags", None, ("class_maps",), output="class_maps"),
    "sec": Method("SEC", "image tags", _sec, ("cues",)),
    "stc": Method(
        "STC", "image tags", _by_loss("stc", _stc), ("saliency",),
        round_epochs=_thirds, posterior=_unrefined, simple_rounds=2,
    ),
    "latent_crf": Method(
        "latent CRF", "image tags",
        lambda config, **grid: latent_crf_objective(config["objective"], **grid), ("class_maps",),
        further_inputs=_evidence_inputs,
        round_epochs=lambda config: list(config["epochs"]),
        own_rounds=True,
    ),
    "full_supervision": Method("full supervision", "masks", _full_supervision, ("masks",)),
}  # fmt: skip


def method_of(config: Mapping[str, Any]) -> Method:
    """The method of a configuration.

    Args:
      config: dict with "method".

    Returns:
      Method.

    Raises:
      ValueError: if the name is unknown.
    """
    if config["method"] not in METHODS:
        raise SettingError(
            f"method: expected one of {sorted(METHODS)}, got {config['method']!r}{nearest(config['method'], METHODS)}"
        )
    return METHODS[config["method"]]


def inputs_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the records of a configuration hold beside features and tags.

    Args:
      config: dict with "method" and what the method's inputs depend on.

    Returns:
      tuple of keys of INPUTS, and "tag_classifier" first where the prior of test time needs it.

    Raises:
      ValueError: if the method is unknown.
    """
    method = method_of(config)
    # The prior of test time needs the classifier, and no more of it.
    prior = config.get("inference", {}).get("prior_weight") and method.output != "class_maps"
    return (*(("tag_classifier",) if prior else ()), *method.inputs, *method.further_inputs(config))


def begins_with_posteriors(config: Mapping[str, Any]) -> bool:
    """Whether the first round, too, learns from posteriors, those of the class maps under the CRF.

    Args:
      config: dict with "method", "objective" and "evidence_posterior"; without that, no.

    Returns:
      bool.

    Raises:
      SettingError: if it is asked for, and the likelihood is not the evidence of class maps alone.
    """
    if not config.get("evidence_posterior") or config["method"] != "latent_crf":
        return False
    objective = config["objective"]
    others = [name for name, weight in objective["further_likelihoods"].items() if weight]
    if objective["likelihood"] != "evidence" or others or objective["cue_confidence"]:
        raise SettingError(
            "evidence_posterior: posteriors of class maps take the place of objective.likelihood='evidence' alone, without "
            "cue_confidence and further_likelihoods; set these to 0, or evidence_posterior=False"
        )
    return True


def begins_with_linear(config: Mapping[str, Any]) -> bool:
    """Whether a linear network that has learnt from the first posteriors makes those that the first round learns from.

    Args:
      config: dict as for `begins_with_posteriors`, with "linear"; without that, no.

    Returns:
      bool.

    Raises:
      SettingError: as `begins_with_posteriors`.
    """
    return begins_with_posteriors(config) and bool(config.get("linear", {}).get("num_steps"))


def localisation(config: Mapping[str, Any]) -> str:
    """What tells the method where in an image a class is, beside the tags, in words; "" for nothing.

    Args:
      config: as of `inputs_of`.

    Returns:
      str: the row "saliency or cues" of the comparison.

    Raises:
      ValueError: if the method is unknown.
    """
    inputs = [name for name in inputs_of(config) if name in INPUTS]
    cues = config["baselines"]["cues"]
    if inputs and inputs[-1] == "cues" and cues.get("background_by") == "objectness" and not cues["file"]:
        return INPUTS["objectness"]
    if {"objectness", "gradient_saliency"} <= set(inputs):
        return "class maps, objectness and gradient saliency"
    return INPUTS[inputs[-1]] if inputs else ""


def make_objective(config: Mapping[str, Any], *, stride: int, steps_per_epoch: int) -> Callable | None:
    """What a configuration minimises; the same function for the same settings, for which a step is compiled once.

    Args:
      config: dict with "method", "objective" and "baselines".
      stride: pixels of the input per cell of the logits.
      steps_per_epoch: for schedules.

    Returns:
      Function of one image (key, logits [h, w, K], record, step) -> (loss, dict of terms); None if the method trains
        nothing.

    Raises:
      ValueError: if the method is unknown, or its settings cannot be trained with.
    """
    builder = method_of(config).objective
    if builder is None:
        return None
    settings = json.dumps({name: config[name] for name in ("method", "objective", "baselines") if name in config})
    return _built(builder, settings, stride, steps_per_epoch)


@functools.lru_cache(maxsize=64)
def _built(builder, settings, stride, steps_per_epoch):
    return builder(json.loads(settings), stride=stride, steps_per_epoch=steps_per_epoch)


def check_objective(config: Mapping[str, Any], num_classes: int) -> None:
    """Refuse options that the objective refuses when it sees its first image; nothing is computed.

    Args:
      config: see `make_objective`.
      num_classes: K.

    Raises:
      ValueError, TypeError: as the function raises it that the options are of.
    """
    if method_of(config).objective is None:
        return
    # On a few cells: which form of the kernel and which blocks of noise there are does not matter here.
    objective = {**config["objective"], "pairwise_form": "", "pairwise_stride": 0, "noise_block": 1}
    settings = {name: config[name] for name in ("method", "baselines") if name in config} | {"objective": objective}
    _tried(json.dumps(settings), num_classes)


@functools.lru_cache(maxsize=256)
def _tried(settings, num_classes):
    objective = make_objective(json.loads(settings), stride=8, steps_per_epoch=1)
    cells, maps = (4, 4), num_classes - 1
    shapes = Record(
        tags=(num_classes,), guide=(*cells, 3), mask=cells, class_maps=(*cells, maps), peaks=(maps,), bias=(maps,),
        gradient_saliency=(*cells, 1), objectness=(*cells, 1), cues=cells, saliency=(*cells, 1), chain=cells,
    )  # fmt: skip
    kinds = {"tags": jnp.bool_, "mask": jnp.uint8, "cues": jnp.uint8, "chain": jnp.uint8}
    record = Record(**{
        name: None if shape is None else jax.ShapeDtypeStruct(shape, kinds.get(name, jnp.float32))
        for name, shape in shapes._asdict().items()
    })  # fmt: skip
    logits = jax.ShapeDtypeStruct((*cells, num_classes), jnp.float32)
    jax.eval_shape(objective, jax.random.key(0), logits, record, jax.ShapeDtypeStruct((), jnp.int32))
