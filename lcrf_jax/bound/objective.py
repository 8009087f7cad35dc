"""The objective of the latent CRF by configuration, for one image: (key, logits, record, step) -> (loss, terms)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcrf_jax.bound import estimators, likelihoods
from lcrf_jax.bound.chains import gibbs
from lcrf_jax.bound.pixel_evidence import class_evidence, cue_evidence, log_evidence
from lcrf_jax.bound.sampling import block_groups
from lcrf_jax.crf.energy import pairwise_energy
from lcrf_jax.crf.exact import dense_kernel
from lcrf_jax.crf.image_kernels import FORMS, image_kernel
from lcrf_jax.crf.params import KernelParams
from lcrf_jax.numerics import check_count, check_number, entropy, promote_float

_NO_CHAIN = 255


def uses_chains(config: Mapping[str, Any]) -> bool:
    """Whether the objective of a run keeps the states of Markov chains.

    Args:
      config: dict with "method" and "objective".

    Returns:
      bool.
    """
    return config["method"] == "latent_crf" and config["objective"]["estimator"] == "mcmc"


def empty_chains(num_views: int, num_images: int, grid: int) -> jax.Array:
    """The chains at the start of a run: that of a view starts from a sample of q when the view is first seen.

    Args:
      num_views: views of each image.
      num_images: images of the training split.
      grid: cells along a side of the logits.

    Returns:
      [num_views, num_images, grid, grid] uint8.

    Raises:
      ValueError: if a number is smaller than 1 or not whole.
    """
    sizes = {"num_views": num_views, "num_images": num_images, "grid": grid}
    num_views, num_images, grid = (
        check_count(name, size, minimum=1, remedy="count what the split has") for name, size in sizes.items()
    )
    return jnp.full((num_views, num_images, grid, grid), _NO_CHAIN, jnp.uint8)


class _Observed(NamedTuple):
    """p(y | z, x) of one record: log p of labels, E_q of it as a function of logits, and what factorises of it.

    Two of them can be None: the expectation, where it has no closed form; the [m, K] log-potentials of the pixels,
    where the likelihood does not factorise.
    """

    log_likelihood: Callable[[jax.Array], jax.Array]
    expectation: Callable[[jax.Array], jax.Array] | None
    log_potentials: jax.Array | None


def _observed(config, record):
    """The likelihood of the configuration: one of them, or a product with powers of further ones."""
    first = _factor(config["likelihood"], config, record)
    further = [(weight, _factor(name, config, record)) for name, weight in _further(config)]
    return _product([(1.0, first), *further]) if further else first


def _further(config):
    """(name, weight) of the further likelihoods that take part."""
    return [(name, weight) for name, weight in config["further_likelihoods"].items() if weight]


def _product(factors):
    """The product of likelihoods raised to their weights."""

    def summed(functions):
        return lambda value: sum(weight * function(value) for (weight, _), function in zip(factors, functions))

    log_likelihoods = [factor.log_likelihood for _, factor in factors]
    expectations = [factor.expectation for _, factor in factors]
    # The further likelihoods are functions of the whole image, so the product does not factorise over the pixels.
    return _Observed(summed(log_likelihoods), None if None in expectations else summed(expectations), None)


def _factor(name, config, record):
    tags = record.tags
    options = config["likelihood_options"].get(name, {})
    if name == "evidence":
        evidence = _pixel_evidence(record, options, config["cue_confidence"])
        return _Observed(
            lambda labels: likelihoods.evidence(labels, tags, evidence),
            lambda logits: likelihoods.expected_evidence(logits, tags, evidence),
            log_evidence(evidence),
        )
    if name == "frozen_classifier":
        maps = _pixels(record.class_maps)
        options = {"bias": record.bias, **options}
        return _Observed(lambda labels: likelihoods.frozen_classifier(labels, tags, maps, **options), None, None)
    likelihood, expectation = likelihoods.TAG_LIKELIHOODS[name], likelihoods.EXPECTATIONS.get(name)
    return _Observed(
        lambda labels: likelihood(labels, tags, **options),
        None if expectation is None else lambda logits: expectation(logits, tags, **options),
        None,
    )


def _pixel_evidence(record, options, cue_confidence):
    """[m, K], that of an earlier round or made of the class maps, and of cues where these are used.

    The options, such as `background_level`, are those of `class_evidence`.
    """
    if record.pixel_evidence is not None:
        return _pixels(record.pixel_evidence)
    tags = record.tags
    if options.get("saliency_weight"):
        options = {**options, "saliency": record.gradient_saliency.reshape(-1)}
    if options.get("objectness_weight"):
        options = {**options, "objectness": record.objectness.reshape(-1)}
    evidence = class_evidence(_pixels(record.class_maps), record.peaks, tags, **options)
    if not cue_confidence:
        return evidence
    cues = cue_evidence(record.cues.reshape(-1), tags, confidence=cue_confidence)
    evidence *= cues.astype(evidence.dtype)
    return evidence / evidence.sum(axis=-1, keepdims=True)


def _pixels(grid):
    """[h, w, C] as [m, C]."""
    return grid.reshape(-1, grid.shape[-1])


def _check_objective(config):
    """Refuse a configuration of the objective that cannot be trained with, before anything is computed."""
    known = {
        "likelihood": {*likelihoods.TAG_LIKELIHOODS, *likelihoods.IMAGE_LIKELIHOODS},
        "estimator": {*estimators.ESTIMATORS, "exact", "mcmc"},
        "pairwise_form": {"", *FORMS},
    }
    for name, values in known.items():
        if config[name] not in values:
            raise ValueError(f"objective.{name}: expected one of {sorted(values)}, got {config[name]!r}")
    _check_likelihoods(config)
    _check_estimator(config)


def _check_likelihoods(config):
    for name, weight in config["further_likelihoods"].items():
        at = f"objective.further_likelihoods.{name}"
        check_number(at, weight, minimum=0, remedy="0 leaves it out")
        if name not in likelihoods.TAG_LIKELIHOODS:
            raise ValueError(f"{at}: expected one of {sorted(likelihoods.TAG_LIKELIHOODS)}, got {name!r}")
        if weight and name == config["likelihood"]:
            remedy = "raise objective.likelihood_weight, or choose another"
            raise ValueError(f"{at}: {name} is the likelihood already; {remedy}")
    saliency_weight = config["likelihood_options"].get("evidence", {}).get("saliency_weight", 0)
    at = "objective.likelihood_options.evidence.saliency_weight"
    check_number(at, saliency_weight, minimum=0, remedy="2 is usual, 0 leaves saliency out")
    if config["cue_confidence"] and config["likelihood"] != "evidence":
        raise ValueError(
            f"objective.cue_confidence: cues are a part of the likelihood 'evidence', got {config['likelihood']!r}; "
            "set it to 0, which leaves them out"
        )
    remedy = "0.97 is usual, 0 is without cues"
    check_number("objective.cue_confidence", config["cue_confidence"], minimum=0, remedy=remedy)
    if config["cue_confidence"] >= 1:
        raise ValueError(
            f"objective.cue_confidence: expected a probability below 1, got {config['cue_confidence']}; 0.97 is usual"
        )


def _check_estimator(config):
    estimator = config["estimator"]
    names = [config["likelihood"], *(name for name, _ in _further(config))]
    if estimator == "exact" and not likelihoods.EXPECTATIONS.keys() >= set(names):
        raise ValueError(
            f"objective.estimator: 'exact' needs a likelihood whose expectation has a closed form, one of "
            f"{sorted(likelihoods.EXPECTATIONS)}, got {', '.join(map(repr, names))}; use reinforce for an unbiased "
            "estimate"
        )
    least = 2 if estimator == "reinforce" else 1
    for name, minimum, whole, remedy in (
        ("num_samples", least, True, f"{estimator} needs {least}"),
        ("noise_block", 1, True, "1 is independent noise"),
        ("num_sweeps", 1, True, "5 is the default"),
        ("final_temperature", 0, False, "0 keeps the temperature"),
        ("anneal_epochs", 0, False, "give the epochs until the final temperature"),
        ("pairwise_warmup_epochs", 0, False, "0 is no warm-up"),
    ):
        check_number(f"objective.{name}", config[name], minimum=minimum, whole=whole, remedy=remedy)
    check_number("objective.temperature", config["temperature"], minimum=0, strict=True, remedy="1 is the default")
    if config["noise_block"] > 1 and estimator not in ("gumbel_softmax", "straight_through"):
        raise ValueError(
            f"objective.noise_block: expected 1 with the estimator {estimator!r}, got {config['noise_block']}; "
            "blocks are for gumbel_softmax and straight_through"
        )
    needed = {"pairwise_stride": 0, "pairwise_form": "", "entropy_weight": 1}
    wrong = {name: config[name] for name, value in needed.items() if config[name] != value}
    if estimator == "mcmc" and wrong:
        raise ValueError(
            "objective: the estimator 'mcmc' samples the posterior itself, on the grid of the logits and with a dense "
            f"kernel: it needs {needed}, got {wrong}"
        )


def latent_crf_objective(
    config: Mapping[str, Any], *, stride: float, steps_per_epoch: int
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """The negative bound of one image, divided by its number of cells, with the weights of the configuration.

    With all weights 1 this is the bound, up to log Z(x); other weights give a re-weighted objective. If the guide
    is finer than the logits, the pairwise energy is that of the bilinearly interpolated logits, per pixel of the guide,
    times the number of cells. The three terms then keep their proportions.

    The estimator "mcmc" has another objective: minus E log q under p(y|z,x)^a p(z|x)^b, where a and b are the weights
    of likelihood and pairwise term. Each view has a Markov chain that continues from step to step; see
    `lcrf_jax.bound.chains` and `lcrf_jax.bound.estimators.expected_log_prob`. Its record has the state of the chain as
    "chain", and its terms have the next state.

    Args:
      config: Mapping with "likelihood", a name of `lcrf_jax.bound.likelihoods`, and "likelihood_options", a dict from
        such a name to keyword arguments (those of "evidence" are for `class_evidence`), "further_likelihoods", a dict
        from names of `likelihoods.TAG_LIKELIHOODS` to the powers in which these multiply the first, 0 for none,
        "cue_confidence" (of `cue_evidence`, multiplied to that of the class maps; 0 for none), "estimator" (a key of
        `lcrf_jax.bound.estimators.ESTIMATORS`, "exact" for likelihoods with a closed form, or "mcmc"), "temperature",
        "final_temperature" (reached along a geometric path after "anneal_epochs" of each round; 0 for none),
        "num_samples", "noise_block" (side of the blocks of cells that share their noise), "num_sweeps" (of mcmc, in
        each step), "likelihood_weight", "entropy_weight", "pairwise_weight", "pairwise_warmup_epochs",
        "pairwise_stride" (pixels of the input per cell of the guide, 0 for the grid of the logits), "pairwise_form"
        (a key of `lcrf_jax.crf.image_kernels.FORMS`, or "" for the default) and "kernel", the fields of `KernelParams`
        in pixels of the network's input.
      stride: pixels of the input per cell of the logits.
      steps_per_epoch: for the warm-up of the pairwise weight and the temperature.

    Returns:
      Function (key, logits [h, w, K], record, step) -> (loss, dict of terms in nats per cell).

    Raises:
      ValueError: if a name is unknown, settings do not go together, or a number is out of range.
    """
    _check_objective(config)
    check_number("steps_per_epoch", steps_per_epoch, minimum=1, remedy="give the steps in which an epoch is seen")
    kernel_params = KernelParams(**config["kernel"]).at_stride(config["pairwise_stride"] or stride)
    warmup_steps = config["pairwise_warmup_epochs"] * steps_per_epoch

    def pairwise_weight(step):
        reached = jnp.minimum(1.0, promote_float(step + 1) / warmup_steps) if warmup_steps else 1.0
        return config["pairwise_weight"] * reached

    if config["estimator"] == "mcmc":
        return functools.partial(_chain_objective, config, kernel_params, pairwise_weight)

    def estimator_at(step, observed, grid):
        if config["estimator"] == "exact":
            return lambda key, logits, log_likelihood: observed.expectation(logits)
        groups = block_groups(*grid, config["noise_block"]) if config["noise_block"] > 1 else None
        return functools.partial(
            estimators.ESTIMATORS[config["estimator"]],
            temperature=_temperature(config, step, steps_per_epoch),
            num_samples=config["num_samples"],
            groups=groups,
        )

    def energy_per_cell(logits, guide):
        # The kernel holds no parameter, and its gradient would double the cost of the step.
        kernel = jax.lax.stop_gradient(image_kernel(guide, kernel_params, form=config["pairwise_form"] or None))
        fine = jax.image.resize(logits, (*guide.shape[:2], logits.shape[-1]), "linear")
        return pairwise_energy(jax.nn.softmax(_pixels(fine), axis=-1), kernel) / (guide.shape[0] * guide.shape[1])

    def objective(key, logits, record, step):
        observed, grid = _observed(config, record), logits.shape[:2]
        estimator = estimator_at(step, observed, grid)
        terms = estimators.elbo(key, _pixels(logits), None, observed.log_likelihood, estimator=estimator)
        num_cells = grid[0] * grid[1]
        terms = terms._replace(pairwise_energy=num_cells * energy_per_cell(logits, record.guide))
        loss = -terms.reweighted(
            likelihood=config["likelihood_weight"], entropy=config["entropy_weight"], pairwise=pairwise_weight(step)
        )
        reported = ("log_likelihood", "entropy", "pairwise_energy")
        return loss / num_cells, {name: getattr(terms, name) / num_cells for name in reported}

    return objective


def _temperature(config, step, steps_per_epoch):
    """The temperature of a step: constant, or along a geometric path to the final one."""
    first, last = config["temperature"], config["final_temperature"] or config["temperature"]
    num_steps = config["anneal_epochs"] * steps_per_epoch
    if first == last or not num_steps:
        return last
    return first * (last / first) ** jnp.minimum(1.0, promote_float(step) / num_steps)


def _chain_objective(config, kernel_params, pairwise_weight, key, logits, record, step):
    """-E log q under the posterior: a few sweeps on from the state of the view's chain."""
    observed, (height, width, _) = _observed(config, record), logits.shape
    start_key, chain_key = jax.random.split(key)
    logits = _pixels(logits)
    chain = record.chain.reshape(-1)
    start = jnp.where(chain == _NO_CHAIN, jax.random.categorical(start_key, logits), chain.astype(jnp.int32))
    weight, potentials = config["likelihood_weight"], observed.log_potentials
    kernel = pairwise_weight(step) * dense_kernel(record.guide, kernel_params)
    samples = gibbs(
        chain_key,
        start,
        kernel,
        jnp.zeros_like(logits) if potentials is None else weight * potentials,
        log_likelihood=None if potentials is not None else lambda z: weight * observed.log_likelihood(z),
        num_sweeps=config["num_sweeps"],
        # A likelihood that does not factorise accepts or rejects a block as a whole.
        num_blocks=8 if potentials is not None else max(8, len(logits) // 8),
    )
    log_prob = estimators.expected_log_prob(logits, samples.marginals) / (height * width)
    labels = samples.labels.reshape(height, width).astype(jnp.uint8)
    return -log_prob, {"log_prob": log_prob, "entropy": entropy(logits).mean(), "chain": labels}
