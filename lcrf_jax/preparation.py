"""From a configuration to what training starts from: data, frozen features, classifier, evidence."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcrf_jax.checkpoints import params_digest
from lcrf_jax.crf import mean_field
from lcrf_jax.cues import classifier_cues, gradient_saliency, image_saliency, read_cues, saliency_rank
from lcrf_jax.data.cache import default_directory
from lcrf_jax.data.pipeline import ViewDataset
from lcrf_jax.descriptions import library_versions
from lcrf_jax.features import (
    CachedViews,
    MappedViews,
    class_maps,
    fitted_classifier,
    guide_image,
    network_inputs,
    test_time_features,
)
from lcrf_jax.kernels import KernelParams, dense_kernel, scaled
from lcrf_jax.methods import inputs_of, make_objective, method_of
from lcrf_jax.nets.network import Network, backbone_variables, build_network, feature_identity, preprocessing
from lcrf_jax.nets.tag_classifier import TagClassifier, average_precision
from lcrf_jax.objectives import uses_chains
from lcrf_jax.processes import from_first
from lcrf_jax.runlog import image_progress, say
from lcrf_jax.splits import open_data, without_masks
from lcrf_jax.training import check_batch_size, count_parameters


class Prepared(NamedTuple):
    """What training starts from: everything that does not change in it.

    Attributes:
      config: the configuration, a plain dict.
      train, val: sources; `val` has masks, or is None where there are none.
      network: the inference network.
      variables: of its frozen backbone.
      digest: sha256 of the backbone's weights.
      views: records of the training images: cached features or images.
      classifier: the frozen tag classifier, or None where the method needs none.
      maps: ClassMaps of the training images, or None.
      cues: [N, g, g] uint8 localisation cues of the training images, or None.
      saliency: [N, g, g, 1] saliency of the training images, or None.
      gradient_saliency: [N, g, g, 1] float16, `saliency_rank` of that of the tag classifier's gradient, or None.
    """

    config: dict
    train: Any
    val: Any
    network: Network
    variables: Any
    digest: str
    views: Any
    classifier: TagClassifier | None
    maps: Any
    cues: Any = None
    saliency: Any = None
    gradient_saliency: Any = None

    @property
    def grid(self):
        """Cells along a side of the logits."""
        return self.network.grid(self.config["input_size"])


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


def planned_rounds(config, num_images):
    """The rounds of a configuration, with their steps.

    Args:
      config: dict with "epochs", "method", which makes rounds of them (see `lcrf_jax.methods`), "batch_size" and, if it is
        not 0, "least_steps" of a round: where the images do not make so many, an epoch is several passes over them.
      num_images: images in the training split.

    Returns:
      List of Round; empty for a method that trains nothing.

    Raises:
      ValueError: if the images do not fill one batch, or a round has no epochs.
    """
    steps_per_pass = num_images // config["batch_size"]
    if not steps_per_pass:
        size = config["batch_size"]
        raise ValueError(f"batch_size: {num_images} training images do not fill one batch of {size}; lower it")
    method = method_of(config)
    if method.objective is None:
        return []
    epochs = method.round_epochs(config)
    if not epochs or min(epochs) < 1:
        raise ValueError(
            f"epochs: expected one or more rounds of at least one epoch, got {config['epochs']}, which makes rounds of "
            f"{epochs} for {config['method']}"
        )
    rounds, step = [], 0
    for number, length in enumerate(epochs):
        passes = max(1, math.ceil(config.get("least_steps", 0) / (length * steps_per_pass)))
        end = step + length * passes * steps_per_pass
        rounds.append(Round(number, step, end, passes * steps_per_pass, length, passes))
        step = end
    return rounds


def prepare(config):
    """Open the data, load the backbone, cache its features, fit the tag classifier and compute the class maps.

    Args:
      config: dict, see `experiments/configs`.

    Returns:
      Prepared.

    Raises:
      FileNotFoundError, ValueError: if data or weights are missing or unfit; the message says which and what to do.
    """
    train, val = open_data(config)
    description = {**config["network"], "num_classes": len(train.class_names)}
    network = build_network(description)
    method = method_of(config)
    size, directory = config["input_size"], config["cache"]["directory"] or default_directory()
    if size < 32 or size % network.size_step:
        multiple = f"a multiple of {network.size_step}" if network.size_step > 1 else "32 or more"
        raise ValueError(f"input_size: expected {multiple}, got {size}")
    variables, digest = backbone_variables(description, config.get("weights", ""))
    say(f"backbone {description['backbone']}, weights sha256 {digest}")
    rounds = planned_rounds(config, len(train))
    check_batch_size(config["batch_size"], jax.device_count(), config["accumulation_steps"])
    # Made only to refuse wrong settings now, and not after the features.
    make_objective(
        config, stride=network.stride, steps_per_epoch=rounds[0].steps_per_epoch if rounds else 1
    )
    if uses_chains(config) and config["views"]["num_views"] < 2:
        # With one view an image can be in a batch twice where two epochs meet.
        raise ValueError("objective.estimator: 'mcmc' needs views.num_views of at least 2, one chain for each view")
    several = len(rounds) > 1
    if several and config["views"]["num_views"] < 2 and config["cache"]["features"]:
        raise ValueError("rounds on posteriors need views.num_views of at least 2, or cache.features=False")
    for this in rounds:
        images_of_round(method, this, train.tags)
    views = ViewDataset(train, size=size, **config["views"])
    whole = ViewDataset(without_masks(config, train), size=size, **config["views"])
    if not config["cache"]["features"]:
        whole = ViewDataset(whole.source, 1, size)
    with image_progress("features", len(whole)) as done:
        stride = guide_stride(config, network)
        cached = CachedViews(
            whole, network, variables, digest, directory=directory, guide_stride=stride, progress=done,
            masks=views if train.masks and config["cache"]["features"] else None,
            taps=None if config["cache"]["features"] else ("s32",),
        )
    views = cached if config["cache"]["features"] else views
    prepared = Prepared(config, train, val, network, variables, digest, views, None, None)
    inputs = inputs_of(config)
    if {"class_maps", "gradient_saliency", "cues"} & set(inputs):
        prepared = _with_class_maps(prepared, cached, whole.identity, directory)
    if "saliency" in inputs:
        with image_progress("saliency", len(train)) as done:
            saliency = image_saliency(
                train, **config["baselines"]["saliency"], grid=prepared.grid, directory=directory, progress=done
            )
        prepared = prepared._replace(saliency=saliency)
    if "gradient_saliency" in inputs:
        ranks = saliency_rank(_gradient_saliency(prepared, directory))
        prepared = prepared._replace(gradient_saliency=np.asarray(ranks, np.float16)[..., None])
    return prepared._replace(cues=_cues(prepared, directory)) if "cues" in inputs else prepared


def _with_class_maps(prepared, cached, views_identity, directory):
    """With the tag classifier and its maps."""
    config, train, network, variables = prepared.config, prepared.train, prepared.network, prepared.variables
    # Hosts of different kinds would differ in the last bits.
    classifier, scores = from_first(
        fitted_classifier(network, variables, cached.tap("s32"), train.tags, l2=config["classifier"]["l2"])
    )
    say(precision_line("training", train, scores))
    identity = {**_classifier_identity(prepared, classifier), "views": views_identity}
    with image_progress("class maps", len(train) * len(config["class_maps"]["extra_sizes"])) as done:
        maps = class_maps(
            train, cached, network, variables, classifier.weights, **config["class_maps"], identity=identity,
            directory=directory, progress=done,
        )
    return prepared._replace(classifier=classifier, maps=maps)


def _classifier_identity(prepared, classifier):
    """What the maps and gradients of a classifier depend on, beside the images."""
    return {
        "weights": prepared.digest,
        "network": feature_identity(prepared.network.description),
        "classifier": params_digest(classifier._asdict()),
    }


def _cues(prepared, directory):
    """Localisation cues: from a file, or of the tag classifier's maps and gradients."""
    train, settings = prepared.train, prepared.config["baselines"]["cues"]
    if settings["file"]:
        return read_cues(settings["file"], train.names, len(train.class_names), prepared.grid)
    levels = {name: settings[name] for name in ("foreground_level", "background_share")}
    return classifier_cues(prepared.maps, train.tags, _gradient_saliency(prepared, directory), **levels)


def _gradient_saliency(prepared, directory):
    """[N, g, g] of the tag classifier on the training images."""
    train, size = prepared.train, prepared.config["input_size"]
    with image_progress("gradient saliency", len(train)) as done:
        return gradient_saliency(
            train, prepared.network, prepared.variables, prepared.classifier, size=size, grid=prepared.grid,
            identity=_classifier_identity(prepared, prepared.classifier), directory=directory, progress=done,
        )


def images_of_round(method, this, tags):
    """The images that take part in a round.

    Args:
      method: lcrf_jax.methods.Method.
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
            f"method: {method.title} begins with images of a single tag, and none of the {len(tags)} training images is "
            "one; add some, or choose another method"
        )
    return simple


def num_trainable(prepared):
    """Number of weights that training changes.

    Args:
      prepared: Prepared.

    Returns:
      int; 0 for a method that trains nothing.
    """
    if method_of(prepared.config).objective is None:
        return 0
    network, size = prepared.network, prepared.config["input_size"]

    def params(images):
        return network.init(jax.random.key(0), prepared.variables, network.features(prepared.variables, images))

    return count_parameters(jax.eval_shape(params, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)))


def precision_line(split, source, scores):
    """The tag classifier's average precision in one line.

    Args:
      split: name of the split, for the line.
      source: images; only their tags are used.
      scores: [N, K - 1] logits of the classifier.

    Returns:
      str.
    """
    values = average_precision(scores, source.tags[:, 1:])
    each = ", ".join(f"{name} {value:.3f}" for name, value in zip(source.class_names[1:], values))
    return f"tag classifier, average precision on {split} tags: mean {np.nanmean(values):.3f} ({each})"


def training_records(prepared, evidence=None):
    """The records of a round: views with the maps that its likelihood needs.

    Args:
      prepared: Prepared.
      evidence: [N, g, g, K] per-pixel evidence of an earlier round, or None for the class maps.

    Returns:
      Random access to records.
    """
    inputs, maps, constants = inputs_of(prepared.config), {}, {}
    if evidence is not None:
        maps = {"pixel_evidence": evidence}
    else:
        if "class_maps" in inputs:
            bias = np.asarray(prepared.classifier.bias, np.float32)
            maps["class_maps"] = prepared.maps.maps
            constants = {"peaks": prepared.maps.peaks, "bias": np.broadcast_to(bias, prepared.maps.peaks.shape)}
        maps |= {name: getattr(prepared, name) for name in ("gradient_saliency", "cues", "saliency") if name in inputs}
    if not maps:
        return prepared.views
    options = {key: value for key, value in prepared.config["views"].items() if key != "num_views"}
    return MappedViews(prepared.views, maps=maps, constants=constants, grid=prepared.grid, view_options=options)


def guide_stride(config, network):
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


def posterior_evidence(prepared, params, settings):
    """Mean-field posteriors of the training images under a trained network, given their tags.

    The network's log-probabilities of the whole image and of its mirror image are averaged, classes that are not tagged
    are excluded, and mean field runs on the grid of the logits.

    Args:
      prepared: Prepared; with cached features of at least the views 0 and 1, or with images.
      params: decoder parameters.
      settings: dict with "kernel" (fields of `KernelParams`, in pixels of the input), "num_iterations",
        "unary_weight" and "tempering": the log-posterior is multiplied by it.

    Returns:
      [N, g, g, K] float16, positive, summing to one over the classes.
    """
    network, views, tags = prepared.network, prepared.views, prepared.train.tags
    stride, variables = guide_stride(prepared.config, network), jax.device_put(prepared.variables)
    posterior = functools.partial(
        _posteriors, network=network, guide_ratio=network.stride // stride,
        kernel_params=scaled(KernelParams(**settings["kernel"]), network.stride),
        **{name: settings[name] for name in ("unary_weight", "num_iterations", "tempering")},
    )

    def inputs(part):
        if prepared.config["cache"]["features"]:
            taps = [{tap: views.tap(tap, view)[part] for tap in network.taps} for view in (0, 1)]
            return *taps, views.tap("guide")[part]
        records = [views[row] for row in range(part.start, min(part.stop, len(tags)))]  # view 0 comes first
        images = np.stack([record["image"] for record in records])
        return _inputs_of_images(variables, images, network=network, guide_stride=stride)

    params = jax.device_put(jax.tree.map(np.asarray, params))  # of all devices and processes; the rest is done by this one
    rows = []
    with image_progress("posteriors", len(tags)) as done:
        for start in range(0, len(tags), 32):
            part = slice(start, start + 32)
            rows.append(np.asarray(posterior(params, variables, *inputs(part), tags[part]), np.float16))
            done(len(rows[-1]))
    return np.concatenate(rows)


@functools.partial(
    jax.jit, static_argnames=("network", "guide_ratio", "kernel_params", "unary_weight", "num_iterations", "tempering")
)
def _posteriors(
    params, variables, plain, mirrored, guide, present, *, network, guide_ratio, kernel_params, unary_weight,
    num_iterations, tempering,
):
    """[B, g, g, K] posteriors of the features of images and of their mirror images, given their tags [B, K]."""

    def one(plain, mirrored, guide, present):
        log_probs = (jax.nn.log_softmax(plain) + jax.nn.log_softmax(mirrored)[:, ::-1]) / 2
        unary = jnp.where(present, unary_weight * log_probs, -1e4).reshape(-1, log_probs.shape[-1])
        posterior = mean_field(unary, dense_kernel(guide, kernel_params), num_iterations=num_iterations)
        return jax.nn.softmax(tempering * posterior).reshape(log_probs.shape)

    both = [network.logits(params, variables, features) for features in (plain, mirrored)]
    return jax.lax.map(lambda row: one(*row), (*both, guide_image(guide, guide_ratio), present))


@functools.partial(jax.jit, static_argnames=("network", "guide_stride"))
def _inputs_of_images(variables, images, *, network, guide_stride):
    """(features of images, features of their mirror images, guide)."""
    plain = network_inputs(network, variables, images, guide_stride)
    guide = plain.pop("guide")
    return plain, network.features(variables, images[:, :, ::-1]), guide


def validation_features(prepared, source):
    """The frozen features of a source at test time, for scoring many networks on it; None where they are not cached.

    Args:
      prepared: Prepared.
      source: images.

    Returns:
      List of dict from tap to array, one for each input size, see `lcrf_jax.features.test_time_features`; or None.
    """
    config = prepared.config
    if not config["cache"]["features"]:
        return None
    inference = {**config["inference"], **_output(config, method_of(config))}
    sizes, directory = inference["input_sizes"], config["cache"]["directory"] or default_directory()
    with image_progress(f"features of {source.split}", len(source) * len(sizes)) as done:
        return [
            test_time_features(
                source, prepared.network, prepared.variables, prepared.digest, size=size, mirror=inference["mirror"],
                directory=directory, progress=done,
            )
            for size in sizes
        ]


def segmenter_description(config, class_names, digest):
    """What inference has to know beside the parameters; it is stored as config.json.

    Args:
      config: the configuration of the run.
      class_names: names of the K classes, background first.
      digest: sha256 of the backbone's weights.

    Returns:
      dict that JSON can hold.
    """
    method = method_of(config)
    return {
        "class_names": list(class_names),
        "network": {**config["network"], "num_classes": len(class_names)},
        "preprocessing": preprocessing(config["network"]),
        "inference": {**config["inference"], **_output(config, method)},
        "backbone_sha256": digest,
        "supervision": method.supervision,
        "training": config,
        "versions": library_versions(),
    }


def _output(config, method):
    """What a method makes of its network's output at test time, and the settings of that; nothing for a softmax."""
    if method.output == "softmax":
        return {}
    settings = {"output": method.output, "output_options": dict(config["baselines"][config["method"]])}
    if method.objective is None:
        # Class maps are averaged over input sizes, as they are in training.
        sizes = (*config["inference"]["input_sizes"], *config["class_maps"]["extra_sizes"])
        return {**settings, "input_sizes": list(sizes)}
    return settings


def inference_params(prepared, params):
    """All that a checkpoint for inference holds.

    Args:
      prepared: Prepared.
      params: decoder parameters.

    Returns:
      dict of NumPy arrays: "backbone", "decoder" and, where there is one, "classifier".
    """
    stored = {"backbone": prepared.variables, "decoder": params}
    if prepared.classifier is not None:
        stored["classifier"] = prepared.classifier._asdict()
    return jax.tree.map(np.asarray, stored)
