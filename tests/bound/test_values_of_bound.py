"""What is refused where it is known: the message names the argument, the value, its place and what to do."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lcrf_jax import bound
from lcrf_jax.bound import objective, pooling
from lcrf_jax.bound.likelihoods import TAG_LIKELIHOODS
from lcrf_jax.numerics import checked_under_jit

M, K = 6, 3
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(M, K)).astype(np.float32)
LABELS = np.eye(K, dtype=np.float32)[RNG.integers(0, K, M)]
TAGS = np.array([True, True, False])
MAPS, EVIDENCE = RNG.normal(size=(M, K - 1)).astype(np.float32), RNG.random((M, K)).astype(np.float32)
PROBS = np.asarray(jax.nn.softmax(LOGITS))
KERNEL = 0.1 * np.ones((M, M), np.float32)
OF_FOUR_PIXELS = SimpleNamespace(grid=(2, 2), splat=len, blur=len, slice=len, apply=len)  # a kernel
KEY = jax.random.key(0)
INDICES = LABELS.argmax(axis=1)


def with_value(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


CALLS = {
    **{name: (function, {"labels": LABELS, "tags": TAGS}) for name, function in TAG_LIKELIHOODS.items()},
    "frozen_classifier": (bound.frozen_classifier, {"labels": LABELS, "tags": TAGS, "class_maps": MAPS, "bias": 0.0}),
    "evidence": (bound.evidence, {"labels": LABELS, "tags": TAGS, "pixel_evidence": EVIDENCE}),
    "expected_evidence": (bound.expected_evidence, {"logits": LOGITS, "tags": TAGS, "pixel_evidence": EVIDENCE}),
    "expected_max_pool": (bound.expected_max_pool, {"logits": LOGITS, "tags": TAGS}),
    "expected_log_prob": (bound.expected_log_prob, {"logits": LOGITS, "target_probs": PROBS}),
    "class_evidence": (bound.class_evidence, {"class_maps": MAPS, "peaks": np.ones(K - 1), "tags": TAGS, "background_level": 0.2}),
    "cue_evidence": (bound.cue_evidence, {"cues": INDICES, "tags": TAGS, "confidence": 0.9}),
    "log_evidence": (bound.log_evidence, {"pixel_evidence": EVIDENCE}),
    "gumbel_softmax": (bound.gumbel_softmax, {"key": KEY, "logits": LOGITS, "temperature": 0.5}),
    "straight_through": (bound.straight_through, {"key": KEY, "logits": LOGITS, "temperature": 0.5}),
    "categorical": (bound.categorical, {"key": KEY, "logits": LOGITS}),
    "block_groups": (bound.block_groups, {"height": 2, "width": 3, "block": 1}),
    "gibbs": (bound.gibbs, {"key": KEY, "labels": INDICES, "kernel": KERNEL, "unary_logits": LOGITS}),
    "elbo": (bound.elbo, {"key": KEY, "logits": LOGITS, "kernel": None, "log_likelihood": lambda z: bound.gwrp(z, TAGS)}),
    **{
        f"{name}_likelihood": (
            getattr(bound, f"{name}_likelihood"),
            {"key": KEY, "logits": LOGITS, "log_likelihood": lambda z: bound.gwrp(z, TAGS), "num_samples": 2},
        )
        for name in ("gumbel_softmax", "straight_through", "reinforce", "mean")
    },
    "ranked_mean": (pooling.ranked_mean, {"labels": LABELS, "decays": np.full(K, 0.9)}),
    "smooth_maximum": (pooling.smooth_maximum, {"values": LOGITS}),
    "empty_chains": (objective.empty_chains, {"num_views": 1, "num_images": 2, "grid": 3}),
}
ENERGIES = -np.log(PROBS)
OF_LOGITS = [name for name, (_, given) in CALLS.items() if "logits" in given]
OF_LABELS = [*TAG_LIKELIHOODS, "frozen_classifier", "evidence"]
SAMPLED = ("gumbel_softmax_likelihood", "straight_through_likelihood", "gumbel_softmax", "straight_through")


def cases():
    for name in OF_LOGITS:
        yield name, {"logits": with_value(LOGITS, (2, 1), np.nan)}, r"logits: expected numbers below infinity, got nan at \[2, 1\]; look for"
        yield name, {"logits": with_value(LOGITS, (2, 1), np.inf)}, r"logits: .* got inf at \[2, 1\]"
        yield name, {"logits": with_value(np.float64(LOGITS), (2, 1), 1e300)}, r"logits: .* got 1e\+300 at \[2, 1\]; scale .*x64"
        yield name, {"logits": with_value(LOGITS, 3, -np.inf)}, r"logits: .* got -inf in every class at \[3\]; leave one"
        yield name, {"logits": ENERGIES}, "logits: expected logits, got energies -log p.*sign turned"
        yield name, {"logits": PROBS}, "logits: expected logits, got probabilities.*logarithm"
        if name not in ("gumbel_softmax", "straight_through", "categorical"):
            yield name, {"logits": LOGITS[None]}, r"logits: expected shape \[.*\], got \[1, 6, 3\]; flatten .* jax.vmap"
    for name in OF_LABELS:
        yield name, {"labels": with_value(LABELS, (0, 0), np.nan)}, r"labels: expected numbers in .*, got nan at \[0, 0\]; take the softmax"
        yield name, {"labels": LOGITS}, "labels: expected .* take the softmax of logits"
        yield name, {"labels": LABELS / 2}, r"labels: expected rows that sum to 1, got 0.5 at \[0\]"
        yield name, {"labels": LABELS.reshape(-1)}, r"labels: expected shape \[m, K\], got \[18\]; flatten the pixels"
        yield name, {"labels": LABELS.T}, r"tags: expected shape \[6\], got \[3\]; one tag per class"
        yield name, {"tags": np.array([1.0, 0.3, 0.0])}, r"tags: expected a boolean for each class, got 0.3 at \[1\]; mark"
        yield name, {"tags": np.array(["a", "b", "c"])}, "tags: expected real numbers, got <U1"
        yield name, {"tags": None}, r"tags: expected shape \[3\], got \[\]"
    for name in SAMPLED:
        for bad in (-1.0, 0, float("nan"), jnp.float32(-1), np.float32(np.inf), 1e-50):
            yield name, {"temperature": bad}, "temperature: expected a finite number > 0, got .*; for exact samples"
        yield name, {"temperature": "hot"}, "temperature: expected a number, got 'hot'"
        yield name, {"temperature": (1.0, 2.0)}, "temperature: expected a number, got"
        yield name, {"groups": np.full(M, M)}, r"groups: .* got 6 at \[0\]; give the number of a group, below m"
        yield name, {"groups": np.zeros(M)}, "groups: expected integers, got float64"
    for name in (*SAMPLED[:2], "reinforce_likelihood"):
        for bad in (2.5, 0, float("nan"), jnp.float32(2.5), "2", None, (2,)):
            yield name, {"num_samples": bad}, "num_samples: expected "
    for name in ("evidence", "expected_evidence", "log_evidence"):
        yield name, {"pixel_evidence": -EVIDENCE}, r"pixel_evidence: expected finite numbers >= 0, got -.* at \[0, 0\]; for log-prob"
        yield name, {"pixel_evidence": with_value(EVIDENCE, (5, 2), np.inf)}, r"pixel_evidence: .* got inf at \[5, 2\]"


FURTHER = [
    ("elbo", {"kernel": OF_FOUR_PIXELS}, r"logits: expected shape \[4, K\], got \[6, 3\]; flatten"),
    ("noisy_or", {"rho": jnp.float32(1)}, "rho: expected a probability below 1, got 1.0; for a hard or"),
    ("noisy_or", {"rho": 1 - 1e-9}, "rho: expected a probability below 1"),
    ("noisy_or", {"rho": "0.5"}, "rho: expected a number, got '0.5'"),
    ("max_pool", {"flip_probability": jnp.float32(0.5)}, r"flip_probability: expected a number in \(0, 0.5\), got 0.5"),
    ("log_mean_exp", {"sharpness": np.float16(-1)}, "sharpness: expected a finite number > 0, got -1.0; 5 is usual"),
    ("area", {"beta": float("nan")}, "beta: expected a finite number > 0, got nan; 20 is usual"),
    ("area", {"foreground_share": jnp.float32(1.5)}, "foreground_share: expected a number of at most 1, got 1.5"),
    ("gwrp", {"background_decay": -0.1}, "background_decay: expected a finite number > 0"),
    ("gwrp", {"reference_cells": 0}, "reference_cells: expected a finite number >= 1"),
    ("frozen_classifier", {"scale": -1}, "scale: expected a finite number >= 0, got -1"),
    ("frozen_classifier", {"bias": np.array([0.0, np.nan])}, r"bias: expected finite numbers, got nan at \[1\]; give that of"),
    ("frozen_classifier", {"class_maps": with_value(MAPS, (1, 1), np.nan)}, r"class_maps: .* got nan at \[1, 1\]"),
    ("class_evidence", {"class_maps": with_value(MAPS, (1, 1), np.inf)}, r"class_maps: .* got inf at \[1, 1\]"),
    ("class_evidence", {"class_maps": MAPS.T}, r"peaks: expected shape \[6\], got \[2\]"),
    ("class_evidence", {"peaks": np.array([1.0, np.nan])}, r"peaks: .* got nan at \[1\]"),
    ("class_evidence", {"saliency": np.full(M, 2.0)}, r"saliency: expected numbers in 0..1, got 2.0 at \[0\]; bring it"),
    ("class_evidence", {"objectness": np.full(M, 2.0)}, r"objectness: expected numbers in 0..1, got 2.0 at \[0\]; bring it"),
    ("class_evidence", {"saliency_weight": jnp.float32(1)}, r"saliency: expected \[m\] values"),
    ("class_evidence", {"floor": 0}, "floor: expected a finite number > 0"),
    ("cue_evidence", {"cues": INDICES * 1.0}, "cues: expected integers, got float64; give class indices"),
    ("cue_evidence", {"confidence": jnp.float32(1)}, "confidence: expected a probability below 1"),
    ("expected_log_prob", {"target_probs": LOGITS}, "target_probs: expected"),
    ("expected_log_prob", {"logits": with_value(LOGITS, (4, 0), -np.inf)}, r"logits: .*target is not 0, got -inf at \[4, 0\]"),
    ("block_groups", {"height": 2.5}, "height: expected a whole number, got 2.5; sizes are in cells"),
    ("block_groups", {"block": (1, 1)}, "block: expected a number, got"),
    ("empty_chains", {"grid": 0}, "grid: expected a finite number >= 1"),
    ("gibbs", {"labels": with_value(INDICES, 2, K)}, r"labels: expected numbers in 0..2, got 3 at \[2\]; start with a class"),
    ("gibbs", {"labels": INDICES * 1.0}, "labels: expected integers"),
    ("gibbs", {"kernel": with_value(KERNEL, (1, 0), np.nan)}, r"kernel: expected finite numbers, got nan at \[1, 0\]"),
    ("gibbs", {"unary_logits": ENERGIES}, "unary_logits: expected logits, got energies"),
    ("gibbs", {"num_blocks": 2.5}, "num_blocks: expected a whole number, got 2.5"),
    ("gibbs", {"num_sweeps": None}, "num_sweeps: expected a Python int, got None"),
    ("elbo", {"log_partition": float("nan")}, "log_partition: expected finite numbers, got nan"),
    ("elbo", {"logits": PROBS, "estimator": lambda key, logits, function: 0.0}, "got probabilities"),
    ("ranked_mean", {"decays": np.array([0.9, 0.0, 1.0])}, r"decays: .* got 0.0 at \[1\]"),
    ("smooth_maximum", {"values": with_value(LOGITS, (0, 2), -np.inf)}, r"values: .* got -inf at \[0, 2\]"),
]
CASES = [*cases(), *FURTHER]


@pytest.mark.parametrize(("name", "changes", "message"), CASES, ids=[f"{name}-{[*changes]}-{i}" for i, (name, changes, _) in enumerate(CASES)])
def test_what_is_wrong_is_told(name, changes, message):
    function, given = CALLS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        function(**{**given, **changes})


def test_weights_of_the_terms_are_not_negative_or_nan():
    terms = bound.ElboTerms(-1.0, 2.0, 3.0, 0.0)
    for bad in (-1.0, float("nan"), jnp.float32(-1), np.float64(np.inf)):
        for name in ("likelihood", "entropy", "pairwise"):
            with pytest.raises(ValueError, match=f"{name}: expected finite numbers >= 0, got "):
                terms.reweighted(**{name: bad})


ARRAYS = [name for name in CALLS if name not in ("block_groups", "empty_chains")]


@pytest.mark.parametrize("name", ARRAYS)
def test_nothing_is_checked_or_broken_under_jit_vmap_and_grad(name):
    """What is refused outside is computed inside; and what is right goes through all of them."""
    function, given = CALLS[name]
    array = next(key for key in ("logits", "labels", "unary_logits", "pixel_evidence", "class_maps", "cues", "values") if key in given)
    if name == "gibbs":
        array = "unary_logits"
    rest = {key: value for key, value in given.items() if key != array}

    def of_array(values):
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(function(**{array: values}, **rest)))

    values = np.stack([given[array]] * 2)
    assert jax.eval_shape(jax.vmap(of_array), values).shape == (2,)
    if np.issubdtype(values.dtype, np.floating):
        jax.eval_shape(jax.jit(jax.vmap(jax.grad(of_array))), np.full_like(values, np.nan))
    mesh = jax.make_mesh((2,), ("image",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("image")
    jax.eval_shape(jax.shard_map(jax.vmap(of_array), mesh=mesh, in_specs=spec, out_specs=spec), values)


def test_the_checks_run_under_jit_where_they_are_wanted():
    with checked_under_jit():
        checked = jax.jit(functools.partial(bound.gwrp, tags=TAGS))
        checked(LABELS)
        with pytest.raises(jax.errors.JaxRuntimeError, match="labels: expected"):
            checked(LOGITS).block_until_ready()
            jax.effects_barrier()


def test_one_hot_and_relaxed_labels_of_half_precision_are_right():
    for dtype in ("float16", "bfloat16", "int8", "bool"):
        bound.gwrp(jnp.asarray(LABELS, dtype), TAGS)
    rows = np.random.default_rng(1).dirichlet(np.ones(40), 64)
    for dtype in ("float16", "bfloat16"):
        bound.gwrp(jnp.asarray(rows, dtype), np.ones(40, bool))


def test_numbers_of_every_kind_are_numbers():
    for number in (0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5), jnp.array(0.5), np.array(0.5)):
        assert np.isfinite(bound.noisy_or(LABELS, TAGS, rho=number))
        assert np.isfinite(bound.gumbel_softmax(KEY, LOGITS, temperature=number)).all()
    for number in (2, 2.0, np.int64(2), jnp.int32(2), np.float32(2)):
        assert np.isfinite(bound.reinforce_likelihood(KEY, LOGITS, lambda z: bound.gwrp(z, TAGS), num_samples=number))
        assert bound.block_groups(number, 3, block=number).shape == (6,)
