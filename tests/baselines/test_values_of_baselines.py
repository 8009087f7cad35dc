"""What is refused where it is known: the message names the argument, the value, its place and what to do."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lcrf_jax import baselines
from lcrf_jax.baselines import saliency

M, K = 6, 3
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(M, K)).astype(np.float32)
PROBS = np.asarray(jax.nn.softmax(LOGITS))
TAGS = np.array([True, True, False])
MAPS = RNG.normal(size=(M, K - 1)).astype(np.float32)
CUES = np.array([0, 1, 255, 255, 2, 0])
KERNEL = 0.1 * np.ones((M, M), np.float32)
OF_FOUR_PIXELS = SimpleNamespace(grid=(2, 2), splat=len, blur=len, slice=len, apply=len)  # a kernel
IMAGE = RNG.integers(0, 255, (5, 4, 3)).astype(np.uint8)


def with_value(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


CALLS = {
    "barrier_distance": (saliency.barrier_distance, {"values": LOGITS}),
    "barrier_saliency": (saliency.barrier_saliency, {"image": IMAGE}),
    "border_contrast": (saliency.border_contrast, {"colours": IMAGE}),
    "cam_log_probs": (baselines.cam_log_probs, {"class_maps": MAPS, "image_logits": np.ones(K - 1)}),
    "ccnn_distribution": (baselines.ccnn_distribution, {"logits": LOGITS, "tags": TAGS}),
    "ccnn_loss": (baselines.ccnn_loss, {"logits": LOGITS, "tags": TAGS}),
    "constrain_loss": (baselines.constrain_loss, {"probs": PROBS, "kernel": KERNEL}),
    "em_adapt_labels": (baselines.em_adapt_labels, {"key": jax.random.key(0), "logits": LOGITS, "tags": TAGS}),
    "expand_loss": (baselines.expand_loss, {"probs": PROBS, "tags": TAGS}),
    "floored_probs": (baselines.floored_probs, {"logits": LOGITS}),
    "ilp_log_probs": (baselines.ilp_log_probs, {"logits": LOGITS}),
    "lab_colours": (saliency.lab_colours, {"image": IMAGE}),
    "label_cross_entropy": (baselines.label_cross_entropy, {"logits": LOGITS, "labels": CUES}),
    "localisation_cues": (baselines.localisation_cues, {
        "class_maps": MAPS, "peaks": np.ones(K - 1), "tags": TAGS, "saliency": np.linspace(0, 1, M)}),
    "majority_labels": (baselines.majority_labels, {"labels": CUES[None], "segments": CUES[None]}),
    "mil_lse_loss": (baselines.mil_lse_loss, {"logits": LOGITS, "tags": TAGS}),
    "mil_lse_scores": (baselines.mil_lse_scores, {"logits": LOGITS}),
    "saliency_target": (baselines.saliency_target, {"saliency": np.linspace(0, 1, M), "tags": TAGS}),
    "sec_loss": (baselines.sec_loss, {"logits": LOGITS, "tags": TAGS, "cues": CUES, "kernel": KERNEL}),
    "seed_loss": (baselines.seed_loss, {"probs": PROBS, "cues": CUES}),
    "soft_cross_entropy": (baselines.soft_cross_entropy, {"logits": LOGITS, "probs": PROBS}),
    "tagged_labels": (baselines.tagged_labels, {"logits": LOGITS, "tags": TAGS}),
}


def cases():
    for name, (_, given) in CALLS.items():
        if "logits" in given:
            yield name, {"logits": with_value(LOGITS, (2, 1), np.nan)}, r"logits: expected .*, got nan at \[2, 1\]; look for"
        if "logits" in given and name != "tagged_labels":
            yield name, {"logits": with_value(LOGITS, (2, 1), np.inf)}, r"logits: .* got inf at \[2, 1\]"
            yield name, {"logits": with_value(np.float64(LOGITS), (2, 1), 1e300)}, r"logits: .* got 1e\+300 at \[2, 1\]; scale .*x64"
            yield name, {"logits": -np.log(PROBS)}, "logits: expected logits, got energies -log p.*sign turned"
            yield name, {"logits": PROBS}, "logits: expected logits, got probabilities.*logarithm"
            if name != "floored_probs":
                yield name, {"logits": LOGITS[None]}, r"logits: expected shape \[m, K\], got \[1, 6, 3\]; flatten .* jax.vmap"
        if "probs" in given:
            yield name, {"probs": LOGITS}, "probs: expected .*; take the softmax of logits"
            yield name, {"probs": with_value(PROBS, (0, 1), np.nan)}, r"probs: .* got nan at \[0, 1\]"
        if "tags" in given:
            yield name, {"tags": np.array([1, 2, 0])}, r"tags: expected a boolean for each class, got 2 at \[1\]"
        if "logits" in given and "tags" in given:
            yield name, {"logits": LOGITS.T}, r"tags: expected shape \[6\], got \[3\]; one tag per class"


FURTHER = [
    ("constrain_loss", {"kernel": OF_FOUR_PIXELS}, r"probs: expected shape \[4, K\], got \[6, 3\]; flatten"),
    ("sec_loss", {"kernel": OF_FOUR_PIXELS}, r"logits: expected shape \[4, K\], got \[6, 3\]; flatten"),
    ("barrier_saliency", {"image": IMAGE / 255}, r"image: .* got .*pass colour_max=1"),
    ("barrier_saliency", {"image": IMAGE.astype(np.float32) - 128}, r"image: expected values in 0..255.0, got -1"),
    ("barrier_saliency", {"image": with_value(IMAGE * 1.0, (1, 2, 0), np.nan)}, r"image: expected finite numbers, got nan at \[1, 2, 0\]"),
    ("barrier_saliency", {"image": IMAGE[None]}, r"image: expected shape \[H, W, 3\], got \[1, 5, 4, 3\]"),
    ("barrier_saliency", {"image": IMAGE.transpose(2, 0, 1)}, r"image: expected shape \[H, W, 3\], got \[3, 5, 4\]"),
    ("barrier_saliency", {"contrast": jnp.float32(-1)}, "contrast: expected a finite number > 0, got -1.0"),
    ("barrier_saliency", {"num_passes": 2.5}, "num_passes: expected a whole number"),
    ("barrier_saliency", {"colour_max": None}, "colour_max: expected a number, got None"),
    ("lab_colours", {"image": IMAGE / 255}, "image: .*pass colour_max=1"),
    ("border_contrast", {"colours": np.full((2, 2, 3), np.inf)}, r"colours: .* got inf at \[0, 0, 0\]"),
    ("border_contrast", {"thickness": 1.5}, "thickness: expected a number of at most 1, got 1.5"),
    ("barrier_distance", {"values": with_value(LOGITS, (0, 0), np.nan)}, r"values: .* got nan at \[0, 0\]"),
    ("cam_log_probs", {"image_logits": np.array([0, np.nan])}, r"image_logits: .* got nan at \[1\]"),
    ("cam_log_probs", {"class_maps": with_value(MAPS, (3, 1), np.nan)}, r"class_maps: .* got nan at \[3, 1\]"),
    ("ccnn_loss", {"slack": np.float32(-1)}, "slack: expected a finite number >= 0, got -1.0"),
    ("ccnn_loss", {"background_most": 0.2}, "background_most: expected a finite number >= 0.3, got 0.2"),
    ("ccnn_loss", {"background_most": jnp.float32(0.2), "background_least": jnp.float32(0.4)}, "background_most"),
    ("ccnn_loss", {"num_iterations": 2.5}, "num_iterations: expected a whole number, got 2.5"),
    ("ccnn_distribution", {"logits": with_value(LOGITS, (0, 0), -np.inf)}, r"got -inf at \[0, 0\].*such as -1e4"),
    ("em_adapt_labels", {"foreground_share": jnp.float32(0)}, "foreground_share: expected a finite number > 0, got 0.0"),
    ("expand_loss", {"probs": np.eye(K, dtype=np.float32)[CUES % K]}, r"probs: expected .* got 0.0 at \[0, 1\]; keep them above 0"),
    ("floored_probs", {"min_prob": 0.5}, r"K \* min_prob: expected a number of at most 1, got 1.5"),
    ("floored_probs", {"min_prob": jnp.float32(float("nan"))}, "min_prob: expected a finite number > 0, got nan"),
    ("label_cross_entropy", {"labels": CUES * 1.0}, "labels: expected integers, got float64"),
    ("label_cross_entropy", {"logits": with_value(LOGITS, (0, 0), -np.inf)}, r"logits: .*got -inf at \[0, 0\]; give no target"),
    ("soft_cross_entropy", {"logits": with_value(LOGITS, (1, 2), -np.inf)}, r"logits: .*got -inf at \[1, 2\]; give no target"),
    ("localisation_cues", {"background_share": "0.1"}, "background_share: expected a number, got '0.1'"),
    ("localisation_cues", {"saliency": np.full(M, np.nan)}, r"saliency: .* got nan at \[0\]"),
    ("majority_labels", {"labels": CUES[None] * 1.0}, "labels: expected integers, got float64"),
    ("mil_lse_loss", {"sharpness": (5.0,)}, "sharpness: expected a number, got"),
    ("saliency_target", {"saliency": np.full(M, 1.5)}, r"saliency: expected numbers in 0..1, got 1.5 at \[0\]"),
    ("seed_loss", {"cues": CUES * 1.0}, "cues: expected integers, got float64"),
    ("sec_loss", {"foreground_decay": 0}, "foreground_decay: expected a finite number > 0, got 0"),
    ("sec_loss", {"cues": CUES * 1.0}, "cues: expected integers"),
]
CASES = [*cases(), *FURTHER]


@pytest.mark.parametrize(("name", "changes", "message"), CASES, ids=[f"{name}-{[*changes]}-{i}" for i, (name, changes, _) in enumerate(CASES)])
def test_what_is_wrong_is_told(name, changes, message):
    function, given = CALLS[name]
    with pytest.raises((ValueError, TypeError), match=message):
        function(**{**given, **changes})


@pytest.mark.parametrize("name", [name for name in CALLS if name != "majority_labels"])
def test_nothing_is_checked_or_broken_under_jit_vmap_and_shard_map(name):
    function, given = CALLS[name]
    array = next(iter(given)) if name != "em_adapt_labels" else "logits"
    rest = {key: value for key, value in given.items() if key != array}

    def of_array(values):
        return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(function(**{array: values}, **rest)))

    values = np.stack([given[array]] * 2).astype(np.float32)
    spoilt = np.full_like(values, np.nan)
    assert jax.eval_shape(jax.jit(jax.vmap(of_array)), spoilt).shape == (2,)
    mesh = jax.make_mesh((2,), ("image",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("image")
    jax.eval_shape(jax.shard_map(jax.vmap(of_array), mesh=mesh, in_specs=spec, out_specs=spec), spoilt)


def test_no_hyperparameter_hides_behind_stars():
    """And those of a loss have the defaults of what it is made of."""
    for name, (function, _) in CALLS.items():
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}, name
    for loss, parts in ((baselines.ccnn_loss, [baselines.ccnn_distribution]),
                        (baselines.sec_loss, [baselines.floored_probs, baselines.expand_loss, baselines.constrain_loss])):
        own = {name: p.default for name, p in inspect.signature(loss).parameters.items() if p.default is not p.empty}
        assert own == {
            name: p.default for part in parts
            for name, p in inspect.signature(part).parameters.items() if p.default is not p.empty
        }


def test_hyperparameters_reach_what_a_loss_is_made_of():
    run = jax.jit(lambda: (
        baselines.sec_loss(LOGITS, TAGS, CUES, KERNEL, foreground_decay=0.5, background_decay=0.6, min_prob=1e-2, num_iterations=1),
        sum((
            baselines.seed_loss(baselines.floored_probs(LOGITS, min_prob=1e-2), CUES),
            baselines.expand_loss(baselines.floored_probs(LOGITS, min_prob=1e-2), TAGS, foreground_decay=0.5, background_decay=0.6),
            baselines.constrain_loss(baselines.floored_probs(LOGITS, min_prob=1e-2), KERNEL, num_iterations=1),
        )),
        baselines.sec_loss(LOGITS, TAGS, CUES, KERNEL),
    ))
    together, apart, default = run()
    np.testing.assert_allclose(together, apart, rtol=1e-6)
    assert abs(together - default) > 1e-2


def test_an_image_in_0_to_1_is_the_same_image():
    run = jax.jit(lambda: (saliency.barrier_saliency(IMAGE), saliency.barrier_saliency(IMAGE / np.float32(255), colour_max=1)))
    of_bytes, of_floats = run()
    np.testing.assert_allclose(of_floats, of_bytes, atol=1e-4)


def test_segments_of_any_number_are_segments():
    labels, segments = np.array([[3, 3, 250]], np.uint8), np.array([[2**40, 2**40, 5]])
    found = baselines.majority_labels(labels, segments)
    assert found.dtype == np.uint8 and found.tolist() == [[3, 3, 250]]


def test_logits_far_below_zero_leave_absent_classes_absent():
    """All logits of the present classes below the number that stands for an absent one."""
    logits = LOGITS * 0 - np.float32(1e12)
    found = jax.jit(baselines.ccnn_distribution)(logits, TAGS)
    np.testing.assert_allclose(np.exp(found.log_probs).mean(axis=0)[2], 0)
