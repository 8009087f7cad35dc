"""Scores of the tag classifier's maps, tags given: by a level, and as the labels that training begins with."""

import numpy as np

from lcrf_jax.data.parts import InParts
from lcrf_jax.data.pipeline import prefetched
from lcrf_jax.machine.progress import say
from lcrf_jax.metrics import confusion_matrix, format_iou_table, mean_iou
from lcrf_jax.nets.inputs import square_image
from lcrf_jax.nets.network import build_network
from lcrf_jax.predict.checks import told_as_parameters
from lcrf_jax.predict.model import trained
from lcrf_jax.predict.outputs import restored_classifier
from lcrf_jax.predict.resizing import resized_map
from lcrf_jax.train import preparation
from lcrf_jax.train.class_maps import map_functions, mean_map
from lcrf_jax.train.linear_round import kept_in, log_probs_of_squares, posterior_settings
from lcrf_jax.train.methods import begins_with_posteriors
from lcrf_jax.train.posteriors import posteriors_of_images, settings_of_maps

from . import reporting

CAM_LEVELS = tuple(level / 20 for level in range(2, 15))


def evaluate_cam(run_dir, source, *, tags_given, num_parts=1):
    """Score the class maps of the run's tag classifier, tags given, at the best background level for the split.

    Of several parts the level is the best one for the first, and all are scored at it.
    """
    scored = reporting.whole_or_parts(source, num_parts)
    part_of = scored.numbers if isinstance(scored, InParts) else np.zeros(len(source), int)
    if not tags_given:
        raise ValueError("--cam needs --tags_given: without tags class maps say nothing of which classes are there")
    description, params = trained(run_dir)
    if "classifier" not in params:
        method = description["training"]["method"]
        raise ValueError(f"{run_dir} is a run of {method} and has no tag classifier; give one that has, such as one of cam, sec or latent_crf")
    network, settings = build_network(description["network"]), description["training"]["class_maps"]
    classifier = restored_classifier(params)
    _, from_images = map_functions(network, params["backbone"], classifier.weights, settings["grid"])
    size, num_classes, logits = description["training"]["input_size"], len(source.class_names), []
    matrices = np.zeros((len(CAM_LEVELS), num_parts, num_classes, num_classes), np.int64)
    kinds, probabilities = _of_training(run_dir, description["training"], network, params)
    of_kinds = np.zeros((len(kinds), num_parts, num_classes, num_classes), np.int64)
    for part, example in zip(part_of, prefetched(source), strict=True):
        squares = [square_image(example.image, side)[None] for side in (size, *settings["extra_sizes"])]
        with told_as_parameters(network, {"backbone": params["backbone"]}):
            plain, *others = [np.asarray(from_images(square)) for square in squares]
            maps = mean_map(plain, np.asarray(from_images(squares[0][:, :, ::-1])), others)
        for counts, found in zip(of_kinds, probabilities(squares, example.tags[None], maps), strict=True):
            labels = resized_map(np.asarray(found)[0], example.image.shape[:2]).argmax(axis=-1)
            counts[part] += confusion_matrix(labels, example.mask, num_classes)
        scores = maps[0, ..., :-1]
        logits.append(scores.mean(axis=(0, 1)) + classifier.bias)  # the classifier is linear: the mean of its map
        scores = np.maximum(scores / np.maximum(scores.max(axis=(0, 1)), 1e-6), 0) * example.tags[1:]
        scores = resized_map(scores, example.image.shape[:2])
        for at, level in enumerate(CAM_LEVELS):
            background = np.full((*scores.shape[:2], 1), level, np.float32)
            labels = np.concatenate([background, scores], axis=-1).argmax(axis=-1)
            matrices[at, part] += confusion_matrix(labels, example.mask, num_classes)
    chosen_on = [mean_iou(matrix) for matrix in matrices[:, 0]]
    best = int(np.argmax(np.nan_to_num(chosen_on)))
    where = "this split" if num_parts == 1 else scored.splits[0]
    say(preparation.precision_line(source.split, source, np.stack(logits)))
    for title, counts in zip(kinds, of_kinds, strict=True):
        say(f"\n{title}, tags given")
        table = format_iou_table(counts.sum(axis=0), source.class_names)
        say(f"{table}{reporting.parts_table(reporting.part_counts(scored, {'mIoU': counts}))}")
    say("\nclass maps of the frozen tag classifier, tags given at test time")
    say(f"mIoU by background level{'' if num_parts == 1 else f', {where}'}: "
        + ", ".join(f"{level:g}: {miou:.3f}" for level, miou in zip(CAM_LEVELS, chosen_on, strict=True)))  # fmt: skip
    say(f"{len(source)} images of {source.split}, level {CAM_LEVELS[best]:g}, the best on {where}")
    table = format_iou_table(matrices[best].sum(axis=0), source.class_names)
    say(f"{table}{reporting.parts_table(reporting.part_counts(scored, {'mIoU': matrices[best]}))}")
    if num_parts > 1:
        say(f"\n{table.splitlines()[-1]}")


def _of_training(run_dir, training, network, params):
    """Titles of what a run begins with beside its class maps, and the function that makes it.

    That function takes an image at all sizes, its tags and its class maps with objectness, and returns an array [1, g, g, K] of
    probabilities for each title.
    """
    evidence = training["objective"]["likelihood_options"]["evidence"]
    if not begins_with_posteriors(training) or evidence.get("saliency_weight"):
        return (), lambda squares, tags, maps: ()

    linear = kept_in(run_dir)

    def posteriors(weights, squares, tags, maps, log_probs=None):
        evidence = {"class_maps": maps[..., :-1], "peaks": maps[..., :-1].max(axis=(1, 2)), "objectness": maps[..., -1]}
        return posteriors_of_images(training, weights, network.stride, squares[0], tags, evidence, log_probs)

    def of_maps(squares, tags, maps):
        return (posteriors(settings_of_maps(training), squares, tags, maps),)

    def of_all(squares, tags, maps):
        log_probs = log_probs_of_squares(network, params["backbone"], linear, squares)
        of_linear = posteriors(posterior_settings(training), squares, tags, maps, log_probs)
        return *of_maps(squares, tags, maps), np.exp(log_probs) * tags[:, None, None], of_linear

    if linear is None:
        return ("posteriors of the class maps under the CRF, which the first round learns from",), of_maps
    return (
        "posteriors of the class maps under the CRF, which the linear network learns from",
        "maps of the linear network by themselves, without class maps and CRF",
        "posteriors of the linear network under the CRF, which the first round learns from",
    ), of_all
