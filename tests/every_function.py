"""Every public function of the rooms of the bound and of the baselines, with arguments that it takes, for tests of all."""

import functools
import importlib
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference
from hypothesis import strategies as st

from lcrf_jax import baselines, bound
from lcrf_jax.baselines import saliency
from lcrf_jax.bound import arguments, pooling
from lcrf_jax.bound.estimators import ESTIMATORS
from lcrf_jax.numerics import promote_float

DTYPES = ("float32", "float16", "bfloat16", "int8", "int32")


class Call(NamedTuple):
    """A function of arrays alone, the names of these, and whether it loops, so that it is costly without jit."""

    function: object
    arrays: tuple
    loops: bool = False


def call(function, *arrays, loops=False, **settings):
    return Call(functools.partial(function, **settings) if settings else function, arrays, loops)


def with_key(function, **settings):
    """The function with a fixed key in front."""
    return lambda *arrays: function(jax.random.key(0), *arrays, **settings)


def estimated(estimator):
    """The estimate of a likelihood, as a function of logits and tags."""
    return lambda logits, tags: ESTIMATORS[estimator](
        jax.random.key(0), logits, lambda z: bound.gwrp(z, tags), num_samples=2
    )


def of_labels_and_more(function):
    """Metropolis-Hastings with a likelihood of the tags."""
    return lambda indices, kernel, logits, tags: function(
        jax.random.key(0), indices, kernel, logits, num_blocks=4, log_likelihood=lambda z: bound.noisy_or(z, tags)
    )


BOUND = {
    "ElboTerms": call(lambda probs: bound.ElboTerms(promote_float(probs).sum(), 1.0, 2.0, 3.0).reweighted(entropy=0.5), "probs"),
    "area": call(bound.area, "labels", "tags"),
    "block_groups": call(lambda logits: bound.block_groups(len(logits), 3, block=2), "logits"),
    "categorical": call(with_key(bound.categorical), "logits"),
    "class_evidence": call(bound.class_evidence, "class_maps", "peaks", "tags", background_level=0.2),
    "class_evidence, saliency": call(
        lambda maps, peaks, tags, salient: bound.class_evidence(
            maps, peaks, tags, background_level=0.2, saliency=salient, saliency_weight=2.0),
        "class_maps", "peaks", "tags", "saliency"),
    "class_evidence, objectness": call(
        lambda maps, peaks, tags, objects: bound.class_evidence(
            maps, peaks, tags, background_level=0.2, objectness=objects, objectness_weight=1.0),
        "class_maps", "peaks", "tags", "saliency"),
    "cue_evidence": call(bound.cue_evidence, "cues", "tags", confidence=0.9),
    "elbo": call(
        lambda logits, kernel, tags: bound.elbo(jax.random.key(0), logits, kernel, lambda z: bound.gwrp(z, tags)),
        "logits", "kernel", "tags"),
    "evidence": call(bound.evidence, "labels", "tags", "evidence"),
    "expected_evidence": call(bound.expected_evidence, "logits", "tags", "evidence"),
    "expected_log_prob": call(bound.expected_log_prob, "logits", "labels"),
    "expected_max_pool": call(bound.expected_max_pool, "logits", "tags"),
    "frozen_classifier": call(
        lambda labels, tags, maps, bias: bound.frozen_classifier(labels, tags, maps, bias=bias),
        "labels", "tags", "class_maps", "bias"),
    "gibbs": call(with_key(bound.gibbs, num_sweeps=2, num_blocks=4), "indices", "kernel", "logits", loops=True),
    "gibbs, likelihood": call(of_labels_and_more(bound.gibbs), "indices", "kernel", "logits", "tags", loops=True),
    "gumbel_softmax": call(with_key(bound.gumbel_softmax, temperature=0.5), "logits"),
    "gumbel_softmax, groups": call(
        lambda logits, groups: bound.gumbel_softmax(jax.random.key(0), logits, temperature=0.5, groups=groups),
        "logits", "groups"),
    "gumbel_softmax_likelihood": call(estimated("gumbel_softmax"), "logits", "tags"),
    "gwrp": call(bound.gwrp, "labels", "tags"),
    "log_evidence": call(bound.log_evidence, "evidence"),
    "log_mean_exp": call(bound.log_mean_exp, "labels", "tags"),
    "max_pool": call(bound.max_pool, "labels", "tags"),
    "mean_likelihood": call(estimated("mean"), "logits", "tags"),
    "noisy_or": call(bound.noisy_or, "labels", "tags"),
    "ranked_mean": call(lambda labels: pooling.ranked_mean(labels, np.full(np.shape(labels)[-1:], 0.9)), "labels"),
    "reinforce_likelihood": call(estimated("reinforce"), "logits", "tags"),
    "smooth_maximum": call(pooling.smooth_maximum, "logits"),
    "straight_through": call(with_key(bound.straight_through, temperature=0.5), "logits"),
    "straight_through_likelihood": call(estimated("straight_through"), "logits", "tags"),
}
BASELINES = {
    "barrier_distance": call(saliency.barrier_distance, "logits", loops=True),
    "barrier_saliency": call(saliency.barrier_saliency, "image", loops=True),
    "border_contrast": call(saliency.border_contrast, "image", loops=True),
    "cam_log_probs": call(baselines.cam_log_probs, "class_maps", "bias"),
    "ccnn_distribution": call(baselines.ccnn_distribution, "logits", "tags", loops=True),
    "ccnn_loss": call(baselines.ccnn_loss, "logits", "tags", loops=True),
    "constrain_loss": call(baselines.constrain_loss, "probs", "kernel", loops=True, num_iterations=2),
    "em_adapt_labels": call(with_key(baselines.em_adapt_labels), "logits", "tags", loops=True),
    "expand_loss": call(baselines.expand_loss, "probs", "tags"),
    "floored_probs": call(baselines.floored_probs, "logits"),
    "ilp_log_probs": call(baselines.ilp_log_probs, "logits"),
    "lab_colours": call(saliency.lab_colours, "image"),
    "label_cross_entropy": call(baselines.label_cross_entropy, "logits", "cues"),
    "localisation_cues": call(baselines.localisation_cues, "class_maps", "peaks", "tags", "saliency"),
    "majority_labels": call(baselines.majority_labels, "indices", "segments"),
    "mil_lse_loss": call(baselines.mil_lse_loss, "logits", "tags"),
    "mil_lse_scores": call(baselines.mil_lse_scores, "logits"),
    "saliency_target": call(baselines.saliency_target, "saliency", "tags"),
    "sec_loss": call(baselines.sec_loss, "logits", "tags", "cues", "kernel", loops=True, num_iterations=2),
    "seed_loss": call(baselines.seed_loss, "probs", "cues"),
    "soft_cross_entropy": call(baselines.soft_cross_entropy, "logits", "labels"),
    "tagged_labels": call(baselines.tagged_labels, "logits", "tags"),
}
EVERY = {**BOUND, **BASELINES}


def public_functions():
    """The names of the functions that the rooms export, and of those of the modules that they do not export."""
    exported = {name for room in (bound, baselines) for name in room.__all__ if callable(getattr(room, name))}
    tuples = {"ConstrainedDistribution", "GibbsSamples"}
    unchecked = {"smooth_maximum_parts", "ranks", "log_absences"}
    of_modules = {
        name for module in (saliency, pooling) for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert importlib.import_module("lcrf_jax.bound.arguments") is arguments
    return (exported | of_modules) - tuples - unchecked


def arguments_of(num_pixels, num_classes, *, dtype="float32", seed=0, scale=1.0):
    """Dict of every array that a function of `EVERY` takes: as a photograph might give them, in NumPy but for bfloat16."""
    rng = np.random.default_rng(seed)
    m, k = num_pixels, num_classes
    logits, integral = scale * rng.normal(size=(m, k)), np.issubdtype(np.dtype(jnp.dtype(dtype)), np.integer)
    kernel = rng.uniform(0, 0.2, (m, m))
    probs = np.eye(k)[logits.argmax(axis=1)] if integral else reference.softmax(logits)
    arrays = {
        "logits": logits,
        "labels": probs,
        "probs": 0.05 / k + 0.95 * reference.softmax(logits),
        "tags": rng.random(k) < 0.5,
        "class_maps": scale * rng.normal(0.5, 1, (m, k - 1)) if k > 1 else np.zeros((m, 0)),
        "peaks": scale * rng.uniform(0.5, 3, k - 1),
        "bias": scale * rng.normal(size=k - 1),
        "evidence": rng.uniform(0, 1, (m, k)) ** 3,
        "saliency": rng.random(m),
        "kernel": kernel + kernel.T,
        "image": np.round(rng.uniform(0, 255 if dtype != "int8" else 127, (m, k, 3))),
    }
    most = 127 if integral else 6e4 if dtype == "float16" else np.inf
    arrays = {name: array if array.dtype == bool else np.clip(array, -most, most) for name, array in arrays.items()}
    arrays = {name: array if array.dtype == bool else array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
    if integral:
        arrays["probs"] = arguments_of(m, k, seed=seed, scale=scale)["probs"]  # integers above 0 that sum to 1 are none
    arrays["cues"] = rng.choice([*range(k), 255], m).astype(np.uint8)
    arrays["indices"] = rng.integers(0, k, m)
    arrays["groups"] = rng.integers(0, m, m)
    arrays["segments"] = rng.integers(0, 3, (m, 1))
    return arrays


def of_call(name, arrays):
    """The arrays of a function in their order."""
    chosen = [arrays[array] for array in EVERY[name].arrays]
    return [chosen[0].reshape(-1, 1), chosen[1]] if name == "majority_labels" else chosen


def traced(name, arrays):
    """The function applied to arrays that are known: what is checked is checked, and nothing is computed."""
    chosen = of_call(name, arrays)
    if name == "majority_labels":  # of NumPy
        return EVERY[name].function(*chosen)
    return jax.eval_shape(lambda: EVERY[name].function(*chosen))


@functools.cache
def _program(name):
    return jax.jit(EVERY[name].function)


def computed(name, arrays):
    """Its value, in one program."""
    return (EVERY[name].function if name == "majority_labels" else _program(name))(*of_call(name, arrays))


def check_types(name):
    """Under strict promotion, with every type, mixed ones and float64 enabled: float32 but where float64 comes in."""
    for with_float64 in (False, True):
        with jax.enable_x64(with_float64):
            for dtype in (*DTYPES, *(["float64"] if with_float64 else [])):
                _check_type(name, dtype, arguments_of(5, 3, dtype=dtype))
    with jax.enable_x64(True):
        double, single = (arguments_of(5, 3, dtype=dtype) for dtype in ("float64", "float32"))
        for array in EVERY[name].arrays:
            traced(name, {**single, array: double[array]})
            traced(name, {**double, array: single[array]})


def _check_type(name, dtype, arrays):
    for leaf in jax.tree.leaves(traced(name, arrays)):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and name != "cue_evidence":  # which is made of numbers alone
            assert leaf.dtype == ("float64" if dtype == "float64" else "float32"), (name, dtype, leaf.dtype)


SIZES = ((1, 1, "float32"), (2, 40, "bfloat16"), (64, 5, "float32"), (7, 2, "float16"), (3, 3, "int32"))
SCALES = (0.0, 1.0, 30.0, 1e4, 1e30)
UNCHECKED = {
    ("logits", "block_groups"), ("probs", "ElboTerms"),  # of which only the size is taken, or the sum
}  # fmt: skip
MAPS = ("class_evidence", "class_evidence, saliency", "class_evidence, objectness", "cam_log_probs", "localisation_cues")  # of a foreground class


def spoilt(array, kind, position):
    """An array with one value, or with a shape, that it must not have."""
    at = position % max(1, array.size)
    values = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "negative": -1.0, "huge": 3e38, "above one": 1.5}
    if kind in values:
        if not np.issubdtype(array.dtype, np.floating) and array.dtype.kind != "V" or not array.size:
            return array
        array = np.array(array)
        with np.errstate(over="ignore"):
            array.reshape(-1)[at] = values[kind]
        return array
    other = {
        "batch": lambda: array[None], "flat": lambda: array.reshape(-1), "transposed": lambda: array.T,
        "empty": lambda: array[:0], "words": lambda: np.full(array.shape, "a"), "one more": lambda: np.concatenate([array, array[:1]]),
        "complex": lambda: array.astype(np.complex64), "one axis more": lambda: array[..., None],
    }
    return other[kind]()


KINDS = (None, "nan", "inf", "-inf", "negative", "huge", "above one", "batch", "flat", "transposed", "empty", "words",
         "one more", "complex", "one axis more")
IN_VALUE = KINDS[1:7]
EXAMPLES = {
    "size": st.integers(0, len(SIZES) - 1),
    "scale": st.integers(0, len(SCALES) - 1),
    "seed": st.integers(0, 99),
    "kind": st.one_of(st.none(), st.sampled_from(KINDS)),
    "position": st.integers(0, 9999),
}


_TAKEN = set()  # (name, size, scale) of what loops and was traced as it should be: that takes long, and depends on no seed


def check_property(name, size, scale, seed, kind, position):
    """Finite, or an error that says what was expected; NaN never goes in unnoticed, and what is right is not refused."""
    size = (0, 3)[size % 2] if EVERY[name].loops else max(size, 1) if name in MAPS else size  # loops take long to compile
    *shape, dtype = SIZES[size]
    arrays = arguments_of(*shape, dtype=dtype, seed=seed, scale=SCALES[scale])
    array = EVERY[name].arrays[position % len(EVERY[name].arrays)]
    if kind is not None:
        before = arrays[array]
        arrays[array] = spoilt(before, kind, position // len(EVERY[name].arrays))
    try:
        if kind is not None or not EVERY[name].loops or (name, size, scale) not in _TAKEN:
            traced(name, arrays)
    except (ValueError, TypeError) as error:
        if (array, name) in UNCHECKED:
            return
        assert kind is not None, f"{name} refuses what is right: {error}"
        assert "expected" in str(error), f"{name} does not say what it expects: {error}"
        return
    if kind is None:
        _TAKEN.add((name, size, scale))
    is_float = kind == "nan" and np.isnan(np.asarray(arrays[array], np.float32)).any()
    assert not is_float or (array, name) in UNCHECKED, f"{name} takes NaN in {array}"
    if kind is not None and kind not in IN_VALUE or (array, name) in UNCHECKED:
        return
    for leaf in jax.tree.leaves(computed(name, arrays)):
        assert not np.isnan(np.asarray(leaf, np.float64)).any(), f"{name} gives NaN"
        assert np.isfinite(leaf).all() or kind in ("-inf", "huge"), f"{name} is not finite"
