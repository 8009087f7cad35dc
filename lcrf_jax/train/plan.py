"""What a configuration means: resolved once, refused here if it cannot be trained with, and handed on."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lcrf_jax.bound.objective import uses_chains
from lcrf_jax.machine.cache import default_directory
from lcrf_jax.machine.errors import SettingError
from lcrf_jax.machine.files import at_home
from lcrf_jax.nets.network import Network, build_network, preprocessing
from lcrf_jax.nets.weights import check_projection, hub_commit
from lcrf_jax.predict.checks import check_size
from lcrf_jax.runfolder.description import library_versions
from lcrf_jax.train.methods import Method, begins_with_posteriors, check_objective, inputs_of, make_objective, method_of
from lcrf_jax.train.settings import MOST_STEPS, check_settings, told_as_settings
from lcrf_jax.train.step import check_batch_size, make_optimizer

_MOST_WRITTEN = 12  # epochs in a message
_MOST_TIMES = 10  # as frequent as others, in `class_offsets`
_IMAGES_AT_ONCE = 16  # that pass the backbone for features


class Round(NamedTuple):
    """One round of training: steps first_step to last_step of the run, with a fresh optimiser.

    Attributes:
      number: 0 for the class maps of the tag classifier, 1 and up for the posteriors of the round before.
      first_step, last_step: steps done before and after it.
      steps_per_epoch: whole batches in an epoch.
      epochs: length.
      passes: over the images in an epoch; more than one if there are few.
    """

    number: int
    first_step: int
    last_step: int
    steps_per_epoch: int
    epochs: int
    passes: int = 1


class Plan(NamedTuple):
    """What a configuration means for a data set.

    Attributes:
      config: the configuration, a plain dict.
      class_names: names of the K classes, background first.
      method: what is trained, see `lcrf_jax.train.methods`.
      inputs: what its records hold beside features and tags, keys of `lcrf_jax.train.methods.INPUTS`.
      network: the inference network.
      grid: g, cells along a side of the logits.
      guide_stride: pixels of the input per cell of the image that the pairwise term sees.
      rounds: tuple of Round; empty for a method that trains nothing.
      images: for each round the numbers of the images that take part, in order, or None for all.
      inference: settings of test time, with what the method makes of its network's output.
    """

    config: dict
    class_names: tuple[str, ...]
    method: Method
    inputs: tuple[str, ...]
    network: Network
    grid: int
    guide_stride: int
    rounds: tuple[Round, ...]
    images: tuple[np.ndarray | None, ...]
    inference: dict

    @property
    def cache_directory(self) -> str | pathlib.Path:
        """The folder of the caches: that of the configuration, or `lcrf_jax.machine.cache.default_directory`."""
        directory = self.config["cache"]["directory"]
        return at_home(directory) if directory else default_directory()

    @property
    def texts_file(self) -> str:
        """The file of the class names' vectors that the tag classifier is made of; "" if it is fitted."""
        return self.config.get("classifier", {}).get("text_embeddings", "")

    def objective(self, this: Round) -> Callable:
        """What a round minimises, see `lcrf_jax.train.methods.make_objective`."""
        objective = make_objective(self.config, stride=self.network.stride, steps_per_epoch=this.steps_per_epoch)
        return objective  # type: ignore[return-value]  # a method with rounds has one

    def optimizer(self, this: Round) -> optax.GradientTransformation:
        """The optimiser of a round."""
        settings = dict(self.config["optimizer"])
        share = settings.pop("backbone_share", 1.0)
        if self.network.trained:
            settings["backbone_share"] = share
        return make_optimizer(num_steps=this.last_step - this.first_step, **settings)

    def description(self, digest: str) -> dict:
        """What inference has to know beside the parameters; it is stored as config.json.

        Args:
          digest: sha256 of the backbone's weights.

        Returns:
          dict that JSON can hold.
        """
        return {
            "class_names": list(self.class_names),
            "network": {**self.config["network"], "num_classes": len(self.class_names)},
            "preprocessing": preprocessing(self.config["network"]),
            "inference": self.inference,
            "backbone_sha256": digest,
            "supervision": self.method.supervision,
            "training": self.config,
            "versions": library_versions() | hub_commit(self.config.get("weights", "")),
        }


def resolved_plan(config: dict, class_names: Sequence[str], tags: np.ndarray) -> Plan:
    """What a configuration means for the images of a training split; nothing is computed.

    Args:
      config: the configuration, see `experiments/configs`.
      class_names: names of the K classes, background first.
      tags: [N, K] bool, of the training images.

    Returns:
      Plan.

    Raises:
      ValueError: if it cannot be trained with; the message names the setting.
    """
    method, size = method_of(config), config["input_size"]
    begins_with_posteriors(config)  # it refuses what does not go together
    recompute = {"recompute": True} if config.get("recompute_backbone") else {}
    network = build_network({**config["network"], **recompute, "num_classes": len(class_names)})
    _check_input_sizes(config, network)
    _check_trained_backbone(config, network, method)
    if config.get("classifier", {}).get("text_embeddings"):
        check_projection(network.description["backbone"])
    _check_memory(config, network, len(class_names))
    rounds = planned_rounds(config, len(tags))
    check_batch_size(config["batch_size"], jax.device_count(), config["accumulation_steps"])
    num_views = config["views"]["num_views"]
    if uses_chains(config) and num_views < 2:
        # With one view an image can be in a batch twice where two epochs meet.
        raise ValueError("objective.estimator: 'mcmc' needs views.num_views of at least 2, one chain for each view")
    if len(rounds) > 1 and num_views < 2 and config["cache"]["features"]:
        raise ValueError("rounds on posteriors need views.num_views of at least 2, or cache.features=False")
    plan = Plan(
        config=config,
        class_names=tuple(class_names),
        method=method,
        inputs=inputs_of(config),
        network=network,
        grid=network.grid(size),
        guide_stride=guide_stride(config, network),
        rounds=tuple(rounds),
        images=tuple(images_of_round(method, this, tags) for this in rounds),
        inference={**config["inference"], **_output_settings(config, method), **_offset_settings(config, method, tags)},
    )
    with told_as_settings():
        for this in rounds:
            plan.objective(this)  # it refuses settings that do not go together
        check_objective(config, len(class_names))
    return plan


def check_without_data(config: dict) -> None:
    """Refuse what no data would make right, before any is read: the plan of a made-up split is resolved.

    Args:
      config: the configuration, see `experiments/configs`.

    Raises:
      ValueError: if it cannot be trained with; the message names the setting.
    """
    check_settings(config)
    resolved_plan(config, ("background", "a class"), np.broadcast_to(True, (config["batch_size"], 2)))


def planned_rounds(config: Mapping[str, Any], num_images: int) -> list[Round]:
    """The rounds of a configuration, with their steps.

    Args:
      config: dict with "epochs", "rounds" if their number is to be checked, "method", which makes rounds of them (see `lcrf_jax.train.methods`), "batch_size" and,
        if it is not 0, "least_steps" of a round: where the images do not make so many, an epoch is several passes over
        them.
      num_images: images in the training split.

    Returns:
      List of Round; empty for a method that trains nothing.

    Raises:
      ValueError: if the images do not fill one batch, or a round has no epochs.
    """
    steps_per_pass = num_images // max(config["batch_size"], 1)
    if not steps_per_pass:
        size = config["batch_size"]
        raise ValueError(f"batch_size: {num_images} training images do not fill one batch of {size}; lower it")
    method = method_of(config)
    if method.objective is None:
        return []
    epochs = _checked_epochs(config, method)
    rounds, step = [], 0
    for number, length in enumerate(epochs):
        passes = max(1, -(-int(config.get("least_steps", 0)) // (length * steps_per_pass)))
        end = step + length * passes * steps_per_pass
        rounds.append(Round(number, step, end, passes * steps_per_pass, length, passes))
        step = end
    if step > MOST_STEPS:
        raise SettingError(f"epochs, least_steps: expected at most {MOST_STEPS} steps, which are what is counted; they make more of the {num_images} images")
    return rounds


def _checked_epochs(config, method):
    """The epochs of each round."""
    given, rounds = config["epochs"], config.get("rounds") and int(config["rounds"])
    if not isinstance(given, tuple | list) or not all(isinstance(length, int) for length in given):
        raise SettingError(f"epochs: expected a tuple of whole numbers, one for each round, such as (4, 4), got {given!r}")
    epochs = method.round_epochs(config)
    if not epochs or min(epochs) < 1:
        raise SettingError(
            f"epochs: expected one or more rounds of at least one epoch, got {config['epochs']}, which makes rounds of "
            f"{epochs} for {config['method']}"
        )
    if method.own_rounds and rounds not in (None, len(given)):
        wanted = ",".join(map(str, [*given, *given[-1:] * min(rounds, _MOST_WRITTEN)][:rounds])) + (",..." if rounds > _MOST_WRITTEN else "")
        raise SettingError(
            f"epochs: expected {rounds} number(s), one for each round of {config['method']}, got {given!r}; write "
            f"--config.epochs={wanted}, or --config.rounds={len(given)} if that is meant: a later round is trained on the "
            "labels of the one before"
        )
    return epochs


def images_of_round(method: Method, this: Round, tags: np.ndarray) -> np.ndarray | None:
    """The images that take part in a round.

    Args:
      method: lcrf_jax.train.methods.Method.
      this: Round.
      tags: [N, K] bool.

    Returns:
      [M] indices in order, or None for all.

    Raises:
      ValueError: if no image takes part.
    """
    if this.number >= method.simple_rounds:
        return None
    simple = np.flatnonzero(np.asarray(tags)[:, 1:].sum(axis=1) == 1)
    if not len(simple):
        raise ValueError(
            f"method: {method.title} begins with images of a single tag, and none of the {len(tags)} training images "
            "is one; add some, or choose another method"
        )
    return simple


def guide_stride(config: Mapping[str, Any], network: Network) -> int:
    """Pixels of the input per cell of the image that the pairwise term sees.

    Args:
      config: the configuration of the run.
      network: lcrf_jax.nets.network.Network.

    Returns:
      int: objective.pairwise_stride, or the stride of the logits where that is 0.

    Raises:
      ValueError: if it does not divide the stride of the logits.
    """
    stride = config["objective"]["pairwise_stride"] or network.stride
    if stride < 1 or network.stride % stride:
        raise ValueError(
            f"objective.pairwise_stride: expected a divisor of {network.stride}, the stride of the logits, or 0, got "
            f"{stride}; 1 is full resolution"
        )
    return stride


def _check_memory(config, network, num_classes):
    """Refuse arrays that do not fit into the memory, before it is gone: each is the least that its settings ask for."""
    size, batch, samples = (config["input_size"], config["batch_size"], config["objective"]["num_samples"])
    grid = network.grid(size)
    if config["class_maps"]["grid"] > size:
        raise SettingError(f"class_maps.grid: expected at most input_size, {size}, a cell for each of its pixels, got {config['class_maps']['grid']}")
    cells = {
        "batch_size, with input_size": max(batch * grid**2 * num_classes, min(batch, _IMAGES_AT_ONCE) * 3 * size**2),
        "num_threads": 3 * grid**2 * config["num_threads"],  # four guides of bytes are read ahead by each
    }
    if config["method"] == "latent_crf":
        cells["objective.num_samples, with batch_size and input_size"] = batch * grid**2 * num_classes * samples
    cells["network.widths, with batch_size"] = batch * max(size // 32, 1) ** 2 * max(network.description["widths"])
    there = _memory()
    for name, count in cells.items():
        if 4 * count > there:
            raise SettingError(f"{name}: an array of {4 * count / 2**30:.4g} GiB would be made, and there are {there / 2**30:.4g} GiB of memory; lower them")


def _memory():
    """Bytes that this machine and its devices have, times the number of processes."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return jax.process_count() * max(host, sum(each.get("bytes_limit", 0) for each in stats))


def _check_input_sizes(config, network):
    """Refuse sides of the input that the backbone cannot take."""
    for name, sizes in (
        ("input_size", [config["input_size"]]),
        ("inference.input_sizes", config["inference"]["input_sizes"]),
        ("class_maps.extra_sizes", config["class_maps"]["extra_sizes"]),
    ):
        for size in sizes:
            check_size(name, size, network)


def _check_trained_backbone(config, network, method):
    """Refuse what takes the backbone to be frozen, where layers of it are trained."""
    if config.get("recompute_backbone") and not network.trained:
        raise SettingError(
            "recompute_backbone: a frozen backbone has no gradients that it would save memory of; set network.trainable_from, or leave it False"
        )
    if not network.trained or method.objective is None:
        return
    name = f"network.trainable_from={network.description['trainable_from']!r}"
    if config["cache"]["features"]:
        raise SettingError(f"{name}: features of a backbone that is trained change in every step and cannot be kept; set cache.features=False")
    if config["inference"].get("prior_weight"):
        raise SettingError(
            f"{name}: the tag classifier is fitted on the features before training and cannot be asked at test time; set "
            "inference.prior_weight=0"
        )


def class_offsets(tags: np.ndarray, weight: float) -> tuple[float, ...]:
    """What is added to a network's log-probabilities, so that classes with few images are not taken for those with many.

    For class k, with n_k training images that are tagged with it, weight log(max n / n_k), and 0 for the background. No class
    counts as less than a tenth of the most frequent one.

    Args:
      tags: [N, K] bool, of the training images.
      weight: 0 or more; 1 would take the frequency of the classes out of calibrated probabilities.

    Returns:
      K numbers >= 0.

    References:
      Menon et al. 2021, "Long-tail learning via logit adjustment"; counting images by their tags, and the limit, are ours.
    """
    counts = np.asarray(tags, bool)[:, 1:].sum(axis=0)
    most = counts.max(initial=0)
    least = max(1, most) / _MOST_TIMES
    return (0.0, *(weight * np.log(max(most, least) / np.maximum(counts, least))).tolist())


def _offset_settings(config, method, tags):
    weight = config.get("balance_weight", 0.0)
    return {"class_offsets": list(class_offsets(tags, weight))} if weight and method.output != "class_maps" else {}


def _output_settings(config, method):
    """What a method makes of its network's output at test time, and the settings of that; nothing for a softmax."""
    if method.output == "softmax":
        return {}
    settings = {"output": method.output, "output_options": dict(config["baselines"][config["method"]])}
    if method.objective is None:
        # Class maps are averaged over input sizes, as they are in training.
        sizes = (*config["inference"]["input_sizes"], *config["class_maps"]["extra_sizes"])
        return {**settings, "input_sizes": list(sizes)}
    return settings
