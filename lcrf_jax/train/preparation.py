"""From a configuration to what training starts from: data, frozen features, classifier, evidence."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np

from lcrf_jax.data.example import Source, data_identity
from lcrf_jax.data.pipeline import ViewDataset
from lcrf_jax.machine.processes import from_first
from lcrf_jax.machine.progress import image_progress, say
from lcrf_jax.nets.network import Network, backbone_variables, feature_identity
from lcrf_jax.nets.tag_classifier import TagClassifier, average_precision
from lcrf_jax.nets.text_classifier import read_texts, text_classifier
from lcrf_jax.nets.weights import hub_commit, image_projection
from lcrf_jax.runfolder.digests import params_digest
from lcrf_jax.train.class_maps import ClassMaps, MappedViews, class_maps, fitted_classifier, pooled_head
from lcrf_jax.train.cues import classifier_cues, gradient_saliency, image_saliency, read_cues, saliency_rank
from lcrf_jax.train.features import CachedViews, ComputedViews, test_time_features
from lcrf_jax.train.keeping import CLASSIFIER_TAP, chosen_to_keep
from lcrf_jax.train.plan import Plan, check_without_data, resolved_plan
from lcrf_jax.train.settings import check_settings
from lcrf_jax.train.splits import open_data, without_masks


class Prepared(NamedTuple):
    """What training starts from: everything that does not change in it.

    Attributes:
      plan: what the configuration means.
      train, val: sources; `val` has masks, or is None where there are none.
      variables: of the network's frozen backbone.
      digest: sha256 of the backbone's weights.
      views: records of the training images: cached features or images.
      classifier: the frozen tag classifier, or None where the method needs none.
      maps: ClassMaps of the training images, or None.
      cues: [N, g, g] uint8 localisation cues of the training images, or None.
      saliency: [N, g, g, 1] saliency of the training images, or None.
      gradient_saliency: [N, g, g, 1] float16, `saliency_rank` of that of the tag classifier's gradient, or None.
    """

    plan: Plan
    train: Source
    val: Source | None
    variables: Mapping[str, Any]
    digest: str
    views: CachedViews | ViewDataset
    classifier: TagClassifier | None
    maps: ClassMaps | None
    cues: np.ndarray | None = None
    saliency: np.ndarray | None = None
    gradient_saliency: np.ndarray | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, a plain dict."""
        return self.plan.config

    @property
    def network(self) -> Network:
        """The inference network."""
        return self.plan.network

    def description(self) -> dict[str, Any]:
        """What config.json says of the run: see `lcrf_jax.train.plan.Plan.description`, and what the data is."""
        return self.plan.description(self.digest) | {"data": {"train": data_identity(self.train)}}

    def with_config(self, config: dict[str, Any]) -> Self:
        """The same data and features with other settings, of those that do not change them."""
        check_settings(config)
        config = with_features(config, self.config["cache"]["features"])
        return self._replace(plan=resolved_plan(config, self.train.class_names, self.train.tags))


def prepare(config: dict[str, Any], *, check: Callable[[dict[str, Any]], object] | None = None) -> Prepared:
    """Open the data, load the backbone, cache its features, fit the tag classifier and compute the class maps.

    Args:
      config: dict, see `experiments/configs`.
      check: called with the description of the run before anything is computed, to refuse it, see
        `lcrf_jax.runfolder.description.check_description`.

    Returns:
      Prepared.

    Raises:
      FileNotFoundError, ValueError: if data or weights are missing or unfit; the message says which and what to do.
    """
    check_without_data(config)
    train, val = open_data(config)
    plan = resolved_plan(config, train.class_names, train.tags)
    network, size = plan.network, config["input_size"]
    variables, digest = backbone_variables(network.description, config.get("weights", ""))
    say(f"backbone {network.description['backbone']}, weights sha256 {digest[:12]}")
    for name, commit in hub_commit(config.get("weights", "")).items():
        say(f"weights of {name} at {commit}; --config.weights={name}@{commit} keeps to them")
    of_images = ViewDataset(train, size=size, **config["views"])
    prepared = Prepared(plan, train, val, variables, digest, of_images, None, None)
    if check is not None:
        check(prepared.description())
    if "cues" in plan.inputs and config["baselines"]["cues"]["file"]:
        _cues(prepared)  # a file that cannot be used is told before anything is computed
    texts = _texts(prepared) if plan.texts_file else None
    whole = ViewDataset(without_masks(config, train), size=size, **config["views"])
    kept = chosen_to_keep(plan, len(train), variables)
    say(kept.line)
    config, inputs = with_features(config, kept.features), plan.inputs
    prepared = prepared._replace(plan=plan._replace(config=config))
    whole = whole if kept.features else ViewDataset(whole.source, 1, size)
    of_classifier = {"class_maps", "tag_classifier", "gradient_saliency", "cues"} & set(inputs)
    if kept.features or of_classifier:
        cached = _features(prepared, whole, of_images, kept)
    if kept.features:
        prepared = prepared._replace(views=cached)
    if of_classifier:
        prepared = _with_class_maps(prepared, cached, whole.identity, texts)
    if "saliency" in inputs:
        with image_progress("saliency", len(train)) as done:
            saliency = image_saliency(
                train, **config["baselines"]["saliency"], grid=plan.grid, directory=plan.cache_directory, progress=done
            )
        prepared = prepared._replace(saliency=saliency)
    if "gradient_saliency" in inputs:
        ranks = saliency_rank(_gradient_saliency(prepared))
        prepared = prepared._replace(gradient_saliency=np.asarray(ranks, np.float16)[..., None])
    return prepared._replace(cues=_cues(prepared)) if "cues" in inputs else prepared


def with_features(config: Mapping[str, Any], kept: bool) -> dict[str, Any]:
    """A configuration that says whether features are kept.

    Args:
      config: dict, see `experiments/configs`.
      kept: what "cache.features" is to be.

    Returns:
      dict.
    """
    return {**config, "cache": {**config["cache"], "features": kept}}


def _features(prepared, whole, of_images, kept):
    """The features of the views, kept on the disk as far as was chosen."""
    plan, network, variables = prepared.plan, prepared.network, prepared.variables
    if not kept.classifier_tap:
        return ComputedViews(whole, network, variables, guide_stride=plan.guide_stride, taps=(CLASSIFIER_TAP,))
    with image_progress("features", len(whole)) as done:
        return CachedViews(
            whole, network, variables, prepared.digest, directory=plan.cache_directory, guide_stride=plan.guide_stride,
            progress=done, masks=of_images if prepared.train.masks and kept.features else None,
            taps=None if kept.features else (CLASSIFIER_TAP,),
        )


def _with_class_maps(prepared, cached, views_identity, texts):
    """With the tag classifier, of texts or fitted, and with its maps where they are needed."""
    config, train, network, variables = prepared.config, prepared.train, prepared.network, prepared.variables
    features = {**_backbone_identity(prepared), "views": views_identity}
    # Hosts of different kinds would differ in the last bits.
    if texts is not None:
        made = _classifier_of_texts(prepared, cached.tap("s32"), *texts)
    else:
        made = fitted_classifier(
            network, variables, cached.tap("s32"), train.tags, l2=config["classifier"]["l2"], identity=features,
            directory=prepared.plan.cache_directory,
        )
    classifier, scores = from_first(made)
    say(precision_line("training", train, scores))
    if not {"class_maps", "gradient_saliency", "cues"} & set(prepared.plan.inputs):
        return prepared._replace(classifier=classifier)
    identity = {**_classifier_identity(prepared, classifier), "views": views_identity}
    with image_progress("class maps", len(train) * len(config["class_maps"]["extra_sizes"])) as done:
        maps = class_maps(
            train, cached, network, variables, classifier.weights, **config["class_maps"], identity=identity,
            directory=prepared.plan.cache_directory, progress=done,
        )
    return prepared._replace(classifier=classifier, maps=maps)


def _texts(prepared):
    """The vectors of the class names, and the projection of the features to them; refused if they do not fit each other."""
    texts = read_texts(prepared.plan.texts_file, prepared.train.class_names)
    projection = image_projection(prepared.network.description["backbone"], prepared.config.get("weights", ""))
    text_classifier(projection, texts, np.ones((1, len(projection))))
    return texts, projection


def _classifier_of_texts(prepared, s32, texts, projection):
    """The tag classifier of the class names' texts, and its logits on the training images."""
    pooled = pooled_head(prepared.network, prepared.variables, s32)
    classifier = text_classifier(projection, texts, pooled)
    further = f"; further texts: {', '.join(texts.other_names)}" if texts.other_names else ""
    say(f"tag classifier of the texts of {prepared.plan.texts_file}, nothing is fitted{further}")
    return classifier, pooled @ np.asarray(classifier.weights) + np.asarray(classifier.bias)


def _classifier_identity(prepared, classifier):
    """What the maps and gradients of a classifier depend on, beside the images."""
    return {**_backbone_identity(prepared), "classifier": params_digest(classifier._asdict())}


def _backbone_identity(prepared):
    return {"weights": prepared.digest, "network": feature_identity(prepared.network.description)}


def _cues(prepared):
    """Localisation cues: from a file, or of the tag classifier's maps and gradients."""
    train, settings = prepared.train, prepared.config["baselines"]["cues"]
    if settings["file"]:
        return read_cues(settings["file"], train.names, len(train.class_names), prepared.plan.grid)
    levels = {name: settings[name] for name in ("foreground_level", "background_share")}
    by_objectness = settings.get("background_by") == "objectness"
    saliency = prepared.maps.objectness if by_objectness else _gradient_saliency(prepared)
    return classifier_cues(prepared.maps, train.tags, saliency, **levels)


def _gradient_saliency(prepared):
    """[N, g, g] of the tag classifier on the training images."""
    train, size = prepared.train, prepared.config["input_size"]
    with image_progress("gradient saliency", len(train)) as done:
        return gradient_saliency(
            train, prepared.network, prepared.variables, prepared.classifier, size=size, grid=prepared.plan.grid,
            identity=_classifier_identity(prepared, prepared.classifier), directory=prepared.plan.cache_directory,
            progress=done,
        )


def precision_line(split: str, source: Source, scores: np.ndarray) -> str:
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
    return f"tag classifier, average precision on {split} tags, no score of masks: mean {np.nanmean(values):.3f} ({each})"


def training_records(
    prepared: Prepared, evidence: np.ndarray | None = None
) -> CachedViews | ViewDataset | MappedViews:
    """The records of a round: views with the maps that its likelihood needs.

    Args:
      prepared: Prepared.
      evidence: [N, g, g, K] per-pixel evidence of an earlier round, or None for the class maps.

    Returns:
      Random access to records.
    """
    inputs = prepared.plan.inputs
    maps: dict[str, np.ndarray] = {}
    constants: dict[str, np.ndarray] = {}
    if evidence is not None:
        maps = {"pixel_evidence": evidence}
    else:
        if "class_maps" in inputs:
            assert prepared.classifier is not None and prepared.maps is not None
            bias = np.asarray(prepared.classifier.bias, np.float32)
            maps["class_maps"] = prepared.maps.maps
            constants = {"peaks": prepared.maps.peaks, "bias": np.broadcast_to(bias, prepared.maps.peaks.shape)}
        maps |= {name: getattr(prepared, name) for name in ("gradient_saliency", "cues", "saliency") if name in inputs}
        if "objectness" in inputs:
            assert prepared.maps is not None
            maps["objectness"] = prepared.maps.objectness[..., None]
    if not maps:
        return prepared.views
    options = {key: value for key, value in prepared.config["views"].items() if key != "num_views"}
    return MappedViews(prepared.views, maps=maps, constants=constants, grid=prepared.plan.grid, view_options=options)


def validation_features(prepared: Prepared, source: Source) -> list[dict[str, np.ndarray]] | None:
    """The frozen features of a source at test time, for scoring many networks on it; None where they are not cached.

    Args:
      prepared: Prepared.
      source: images.

    Returns:
      List of dict from tap to array, one for each input size, see `lcrf_jax.train.features.test_time_features`; or
        None.
    """
    if not prepared.config["cache"]["features"]:
        return None
    inference = prepared.plan.inference
    sizes = inference["input_sizes"]
    with image_progress(f"features of {source.split}", len(source) * len(sizes)) as done:
        return [
            test_time_features(
                source, prepared.network, prepared.variables, prepared.digest, size=size, mirror=inference["mirror"],
                directory=prepared.plan.cache_directory, progress=done,
            )
            for size in sizes
        ]


def inference_params(prepared: Prepared, params: Any) -> dict[str, Any]:
    """All that a checkpoint for inference holds.

    Args:
      prepared: Prepared.
      params: decoder parameters.

    Returns:
      dict of NumPy arrays: "backbone", "decoder" and, where there is one, "classifier".
    """
    stored: dict[str, Any] = {"backbone": prepared.variables, "decoder": params}
    if prepared.classifier is not None:
        stored["classifier"] = prepared.classifier._asdict()
    return jax.tree.map(np.asarray, stored)
