r"""Break the library in one place after the other and list the tests that notice.

    python tests/mutations.py [--only=WORD]

Each mutation is made in a copy of the repository, and the tests of what is broken are run on it until one fails.
A mutation that no test catches ends the program with exit code 1. All of them take about an hour on two cores.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Tests that are run for a mutation in a file, in this order and until one fails: those that enumerate first.
TESTS = {
    "baselines/ccnn.py": ("baselines",),
    "baselines/em_adapt.py": ("baselines",),
    "baselines/labels.py": ("baselines", "values_of_baselines"),
    "baselines/mil.py": ("baselines",),
    "baselines/saliency.py": ("values_of_baselines", "saliency"),
    "baselines/sec.py": ("baselines", "values_of_baselines"),
    "baselines/stc.py": ("baselines",),
    "bound/arguments.py": ("values_of_bound", "values_of_baselines"),
    "bound/chains.py": ("gibbs", "gibbs_limits"),
    "bound/estimators.py": ("elbo", "estimators", "gibbs"),
    "bound/likelihoods.py": ("gradients_alive", "likelihoods", "estimators"),
    "bound/objective.py": ("objectives", "objective_estimators"),
    "bound/pixel_evidence.py": ("pixel_evidence", "objectives"),
    "bound/pooling.py": ("gradients_alive", "likelihoods"),
    "bound/sampling.py": ("values_of_bound", "estimators", "sampling"),
    "crf/energy.py": ("elbo", "energy", "derivatives", "easy_calls"),
    "crf/exact.py": ("elbo", "kernels"),
    "crf/image_kernels.py": ("invariants", "mean_field"),
    "crf/inference.py": ("elbo", "mean_field", "easy_calls"),
    "crf/iterations.py": ("elbo", "mean_field", "invariants", "easy_calls", "derivatives"),
    "crf/kernel.py": ("elbo", "filters", "energy", "invariants", "easy_calls"),
    "crf/lattice.py": ("lattice", "filters", "energy", "mean_field"),
    "crf/lattice_building.py": ("lattice", "filters", "invariants", "easy_calls"),
    "crf/linear.py": ("derivatives",),
    "crf/loss.py": ("easy_calls",),
    "crf/params.py": ("easy_calls", "kernels"),
    "data/check.py": ("check", "mask_doubts"),
    "data/files/depth.py": ("depth",),
    "data/files/finding.py": ("finding", "folder"),
    "data/files/images.py": ("voc", "depth"),
    "data/files/masks.py": ("folder", "voc", "depth"),
    "data/files/names.py": ("names",),
    "data/files/tags.py": ("folder",),
    "data/loader.py": ("pipeline",),
    "data/sources/devkit.py": ("voc_weak",),
    "data/sources/listing.py": ("folder", "names"),
    "data/sources/lists.py": ("finding", "folder"),
    "data/sources/mask_files.py": ("finding",),
    "data/sources/tfds.py": ("tfds_source",),
    "machine/cache.py": ("cache",),
    "machine/compilation.py": ("compilation",),
    "machine/contents.py": ("contents",),
    "machine/entries.py": ("entries",),
    "machine/locks.py": ("locks", "faults", "cache"),
    "machine/processes.py": ("processes", "process_faults"),
    "machine/signals.py": ("signals", "faults"),
    "metrics.py": ("confusion_sums", "metrics"),
    "nets/inputs.py": ("features", "original", "voc2012"),
    "nets/network.py": ("decoder", "inference", "features", "runs"),
    "nets/naming.py": ("weights", "vision_transformer"),
    "nets/objectness.py": ("objectness",),
    "nets/original.py": ("original",),
    "nets/resnet.py": ("resnet",),
    "nets/tables.py": ("weights", "vision_transformer", "resnet"),
    "nets/vision_transformer.py": ("vision_transformer",),
    "nets/vgg.py": ("weights",),
    "nets/weights.py": ("weights",),
    "numerics.py": ("values_of_bound", "every_function_of_bound", "elbo", "numerics"),
    "pictures/report.py": ("html_report",),
    "predict/export.py": ("export",),
    "predict/outputs.py": ("inference",),
    "predict/resizing.py": ("inference",),
    "predict/segmenter.py": ("frozen_weights",),
    "predict/tiling.py": ("tiling",),
    "runfolder/checkpoints.py": ("damage", "checkpoints", "faults"),
    "runfolder/damage.py": ("damage",),
    "runfolder/description.py": ("faults",),
    "train/class_maps.py": ("features",),
    "train/features.py": ("features",),
    "train/fit.py": ("faults", "runs"),
    "train/plan.py": ("methods", "runs", "preparation"),
    "train/posteriors.py": ("runs", "posteriors", "frozen_weights"),
    "train/spread.py": ("spread", "frozen_weights"),
    "train/splits.py": ("check",),
    "train/step.py": ("training",),
}


NO_TESTS = 5  # how pytest ends where a lane has none


class Mutation(NamedTuple):
    """What is broken, the file of lcrf_jax, the text that stands there once, and what it becomes."""

    name: str
    file: str
    old: str
    new: str


MUTATIONS = [
    # signs
    Mutation("sign of the entropy in the bound", "bound/estimators.py", "+ self.entropy * entropy", "- self.entropy * entropy"),
    Mutation("sign of the pairwise energy in the bound", "bound/estimators.py", "- self.pairwise_energy * pairwise",
             "+ self.pairwise_energy * pairwise"),
    Mutation("sign of log Z in the bound", "bound/estimators.py", "self.reweighted() - self.log_partition",
             "self.reweighted() + self.log_partition"),
    Mutation("sign of the log-likelihood in the bound", "bound/estimators.py", "return self.log_likelihood * likelihood",
             "return -self.log_likelihood * likelihood"),
    Mutation("sign of the entropy", "numerics.py", "return -jnp.sum(probs * jnp.where(", "return jnp.sum(probs * jnp.where("),
    Mutation("sign of the entropy in the KL", "crf/energy.py", "compatibility=compatibility) - entropy(logits).sum()",
             "compatibility=compatibility) + entropy(logits).sum()"),
    Mutation("sign of the Potts costs", "crf/energy.py", "return values.sum(axis=-1, keepdims=True) - values",
             "return values - values.sum(axis=-1, keepdims=True)"),
    Mutation("sign of the message of mean field", "crf/iterations.py", "return probs, log_unary - message",
             "return probs, log_unary + message"),
    Mutation("sign of the energy's gradient", "crf/energy.py", "derivative = jnp.vdot(gradient, tangents[0]) if",
             "derivative = -jnp.vdot(gradient, tangents[0]) if"),
    Mutation("sign of the Gumbel noise", "bound/sampling.py", "        return logits + noise\n", "        return logits - noise\n"),
    Mutation("the kernel's gradient is never sought", "crf/energy.py", "    if leaves:\n", "    if False:\n"),
    Mutation("the derivative of a linear map is transposed", "crf/linear.py", "functools.partial(transpose, structure), values",
             "functools.partial(function, structure), values"),
    Mutation("exact: the derivative in the features is lost", "crf/exact.py", "y - _filtered_in_blocks(block_size, jnp.exp, features, x)",
             "y - _filtered_in_blocks(block_size, jnp.exp, jax.lax.stop_gradient(features), x)"),
    Mutation("a derivative that does not exist is taken for zero", "crf/linear.py", "    if any(map(is_sought, jax.tree.leaves(tangents))):",
             "    if False:"),
    Mutation("lattice: self-pairs over vertices that are missing", "crf/lattice_building.py",
             "total = total + jnp.where(exists(vertices_of, ordered, side), ends, 0)", "total = total + ends"),
    Mutation("lattice: long paths left out of the self-pairs", "crf/lattice_building.py", "_LONGEST_PATH_OF_SMALL, _SMALL = 3, 6, 64**2", "_LONGEST_PATH_OF_SMALL, _SMALL = 1, 1, 1"),
    Mutation("lattice: features that float32 cannot place", "crf/lattice_building.py", "within = jnp.max(jnp.abs(features)) *", "within = 0 *"),
    Mutation("dropping: row sums of one order", "crf/kernel.py",
             "if self.bilateral is not None and self.bilateral.has_two_orders:", "if False:"),
    Mutation("dropping: entries below 0 are not counted", "crf/kernel.py", "jnp.maximum(-matrix, 0).sum(axis=1).max()",
             "0 * jnp.maximum(-matrix, 0).sum(axis=1).max()"),
    Mutation("dropping: the bound of the kernel is not asked", "crf/iterations.py",
             "lowest = jnp.minimum(drop_below, 1 / (math.e * positive)) * jnp.exp(-negative)", "lowest = drop_below"),
    Mutation("anchors: messages beyond what weights >= 0 can give", "crf/iterations.py", "if row_sums is not None:", "if False:"),
    Mutation("forms: channels are not asked", "crf/image_kernels.py", " or num_channels > _LATTICE_CHANNELS:", ":"),
    Mutation("capacity: not made larger", "crf/inference.py", 'if form != "lattice" or isinstance(needed, jax.core.Tracer) or not bool(needed > 0):', "if True:"),
    Mutation("posterior: an overflow looks like an answer", "crf/inference.py", "jnp.where(overflowed, log_unary, result.logits)", "result.logits"),
    Mutation("posterior: the change of the update before", "crf/iterations.py", "change = jnp.max(jnp.abs(jax.nn.softmax(new, axis=-1) - probs))",
             "change = jnp.max(jnp.abs(jax.nn.softmax(logits, axis=-1) - probs))"),
    Mutation("posterior: free energy without the unary", "crf/inference.py", " - expected_unary,", ","),
    Mutation("checks: energies are taken for logits", "numerics.py", "if unsure and np.all(np.abs(np.exp(", "if False and np.all(np.abs(np.exp("),
    Mutation("checks: asymmetric costs", "crf/energy.py", "if apart.max() <= 1e-5 * np.abs(costs).max():", "if True:"),
    Mutation("checks: negative weights", "crf/params.py", 'check_number(name, getattr(params, name), minimum=0, remedy=remedy)', "pass"),
    Mutation("checks: matrices with NaN", "crf/kernel.py", 'check_finite("kernel", kernel, "look at what it was computed from")', "pass"),
    Mutation("loss: widths of the image on the coarse grid", "crf/loss.py", "params.at_stride(stride),", "params,"),
    Mutation("arrays: rows are written where the first ones are", "machine/cache.py",
             "[self.first : self.first + count] = values", "[:count] = values"),
    Mutation("record: the features of a view are those of another", "train/features.py",
             "array[position] for tap, array", "array[0] for tap, array"),
    Mutation("plan: simple rounds take all images", "train/plan.py",
             "images=tuple(images_of_round(method, this, tags) for this in rounds)", "images=tuple(None for this in rounds)"),
    Mutation("lattice: an overflow looks like an answer", "crf/kernel.py", "jnp.where(self.overflowed(), jnp.nan, self.bilateral_diagonal)",
             "self.bilateral_diagonal"),
    Mutation("sign of the score of reinforce", "bound/estimators.py", "jnp.sum((fixed - fixed.mean()) * log_q)",
             "jnp.sum((fixed.mean() - fixed) * log_q)"),
    Mutation("sign of the Gibbs sampler's kernel", "bound/chains.py", "mean = product(block.rows, one_hot) +",
             "mean = -product(block.rows, one_hot) +"),
    Mutation("absent and present tags exchanged in the closed form", "bound/likelihoods.py",
             "jnp.where(tags, _one_minus_exp(log_absent), jnp.exp(log_absent))",
             "jnp.where(tags, jnp.exp(log_absent), _one_minus_exp(log_absent))"),
    # factors: pairs counted twice or half
    Mutation("energy without the factor 1/2 (each pair twice)", "crf/energy.py", "return sum(jax.tree.leaves(products)) / 2",
             "return sum(jax.tree.leaves(products))"),
    Mutation("energy beside its gradient without the factor 1/2", "crf/energy.py", "value = jnp.vdot(probs, gradient) / 2",
             "value = jnp.vdot(probs, gradient)"),
    Mutation("energy's gradient with a factor 1/2", "crf/energy.py", "derivative = jnp.vdot(gradient, tangents[0]) if",
             "derivative = jnp.vdot(gradient, tangents[0]) / 2 if"),
    Mutation("messages of mean field doubled", "crf/iterations.py", "return probs, log_unary - message",
             "return probs, log_unary - 2 * message"),
    Mutation("Gibbs sampler's kernel doubled", "bound/chains.py", "mean = product(block.rows, one_hot) +",
             "mean = 2 * product(block.rows, one_hot) +"),
    Mutation("reinforce without the factor of the leave-one-out baseline", "bound/estimators.py",
             "* log_q) / (num_samples - 1)", "* log_q) / num_samples"),
    Mutation("entropy with logarithms to base 2", "numerics.py", "jnp.where(probs > 0, log_probs, 0)",
             "jnp.where(probs > 0, log_probs / 0.6931472, 0)"),
    # self-pairs
    Mutation("self-pairs left in a dense matrix", "crf/kernel.py", "return product - jnp.diagonal(matrix)[:, None] * values",
             "return product"),
    Mutation("self-pairs left in the kernel of an image", "crf/kernel.py",
             "        total = self._self_pairs(values)", "        total = jnp.zeros_like(values)"),
    Mutation("self-pairs left in the splatted energy", "crf/kernel.py",
             "return bilateral, gaussian, self._self_pairs(values)", "return bilateral, gaussian, jnp.zeros_like(values)"),
    Mutation("self-pairs left in dense_kernel", "crf/exact.py",
             "return jnp.where(jnp.eye(height * width, dtype=bool), 0, kernel)", "return kernel"),
    Mutation("self-pairs left in the Gibbs sampler", "bound/chains.py",
             "kernel = jnp.where(jnp.eye(num_pixels, dtype=bool), 0, (kernel + kernel.T) / 2)",
             "kernel = (kernel + kernel.T) / 2"),
    Mutation("Gibbs sampler's field without its own diagonal", "bound/chains.py",
             "mean = product(block.rows, one_hot) + block.diagonal[:, None] * one_hot[block.pixels]",
             "mean = product(block.rows, one_hot)"),
    # temperature and noise
    Mutation("temperature left out", "bound/sampling.py", "(perturbed - largest) / jnp.asarray(temperature, perturbed.dtype)",
             "(perturbed - largest)"),
    Mutation("temperature inverted", "bound/sampling.py", "(perturbed - largest) / jnp.asarray(temperature, perturbed.dtype)",
             "(perturbed - largest) * jnp.asarray(temperature, perturbed.dtype)"),
    Mutation("temperature squared", "bound/sampling.py", "(perturbed - largest) / jnp.asarray(temperature, perturbed.dtype)",
             "(perturbed - largest) / jnp.asarray(temperature, perturbed.dtype) ** 2"),
    Mutation("temperature on the logits alone", "bound/sampling.py", "        return logits + noise\n",
             "        return logits + 0.5 * noise\n"),
    Mutation("temperature not handed on by the estimator", "bound/estimators.py",
             "gumbel_softmax(sample_key, logits, temperature=temperature, groups=groups)",
             "gumbel_softmax(sample_key, logits, temperature=1.0, groups=groups)"),
    Mutation("the temperature's schedule runs backwards", "bound/objective.py", "return first * (last / first) **",
             "return last * (first / last) **"),
    Mutation("one key for all samples", "bound/estimators.py", "jax.vmap(function)(jax.random.split(key, num_samples))",
             "jax.vmap(lambda _: function(key))(jax.random.split(key, num_samples))"),
    # tests of the chain, weights of the objective
    Mutation("Metropolis test left out", "bound/chains.py",
             "accepted = jnp.log(jax.random.uniform(test_key, dtype=gain.dtype)) < gain", "accepted = True"),
    Mutation("Metropolis test upside down", "bound/chains.py", "log_likelihood(proposed) - log_likelihood(one_hot)",
             "log_likelihood(one_hot) - log_likelihood(proposed)"),
    Mutation("gradient through the marginals", "bound/estimators.py",
             "promote_together(logits, jax.lax.stop_gradient(target_probs))", "promote_together(logits, target_probs)"),
    Mutation("pairwise weight applied to the entropy too", "bound/objective.py", 'entropy=config["entropy_weight"]',
             'entropy=config["entropy_weight"] * config["pairwise_weight"]'),
    Mutation("powers of the further likelihoods left out", "bound/objective.py", "sum(weight * function(value) for",
             "sum(function(value) for"),
    Mutation("salient pixels taken for background", "bound/pixel_evidence.py", "* (0.5 - salient)",
             "* (salient - 0.5)"),
    Mutation("objectness of images of several classes as of one", "bound/pixel_evidence.py", "/ jnp.maximum(tags[1:].sum(), 1)", "/ jnp.maximum(1, 1)"),
    Mutation("objectness beside all of the maps", "bound/pixel_evidence.py", "** _OF_MAPS)", "** (0 * _OF_MAPS))"),
    Mutation("an object is what the border is", "nets/objectness.py", "unlike = -jnp.einsum", "unlike = jnp.einsum"),
    Mutation("the evidence has no word in later rounds", "train/posteriors.py", "        if evidence_weight:\n", "        if False:\n"),
    Mutation("posteriors of maps without the CRF's weight", "train/posteriors.py",
             "unary = unary_weight * _log_evidence(evidence", "unary = 2 * _log_evidence(evidence"),
    Mutation("the classifier's word on the background", "predict/outputs.py", "log_probs - log_probs.max(axis=-1, keepdims=True)", "log_probs"),
    Mutation("confidence of a cue for every class", "bound/pixel_evidence.py",
             "jnp.where(of_class, confidence, (1 - confidence) / max(1, len(tags) - 1))",
             "jnp.where(of_class, confidence, confidence)"),
    # the compared methods
    Mutation("method: smooth maximum of MIL without its mean", "baselines/mil.py", "    return largest + below\n",
             "    return largest + below + jnp.log(len(logits)) / sharpness\n"),
    Mutation("method: the image-level prior left out", "baselines/mil.py", "promote_float(logits) + prior", "promote_float(logits)"),
    Mutation("method: shares of EM-Adapt rounded down", "baselines/em_adapt.py", "jnp.ceil(shares", "jnp.floor(shares"),
    Mutation("method: absent classes left in the E-step", "baselines/em_adapt.py", "takes = present[label] & (deficit",
             "takes = (deficit"),
    Mutation("method: absent classes left in the latent distribution", "baselines/ccnn.py",
             "logits = jnp.where(present, logits, _ABSENT)",
             "logits = logits"),
    Mutation("method: slack of CCNN without a bound", "baselines/ccnn.py", "jnp.where(present, jnp.asarray(slack, dtype), 0.0)",
             "jnp.where(present, jnp.inf, 0.0)"),
    Mutation("method: upper bound of the background left out", "baselines/ccnn.py",
             "jnp.where(with_foreground, jnp.asarray(background_most, dtype), 1.0)", "jnp.ones(num_classes, dtype)"),
    Mutation("method: steps of CCNN the wrong way", "baselines/ccnn.py", "shifts + jnp.log(least) - log_areas,",
             "shifts - jnp.log(least) + log_areas,"),
    Mutation("method: soft targets with a gradient", "baselines/labels.py", "    probs = jax.lax.stop_gradient(probs)\n",
             ""),
    Mutation("method: the larger of two cues wins", "baselines/sec.py", "jnp.argmin(sizes, axis=1)", "jnp.argmax(sizes, axis=1)"),
    Mutation("method: decays of SEC exchanged", "baselines/sec.py",
             "background=background_decay, foreground=foreground_decay, dtype=probs",
             "background=foreground_decay, foreground=background_decay, dtype=probs"),
    Mutation("method: absent classes of SEC by their mean", "baselines/sec.py", "-jnp.log1p(-peaks)",
             "-jnp.log1p(-probs.mean(axis=0))"),
    Mutation("method: divergence of SEC the other way round", "baselines/sec.py",
             "jnp.exp(log_refined) * (log_refined - log_probs)", "jnp.exp(log_probs) * (log_probs - log_refined)"),
    Mutation("method: saliency for the background", "baselines/stc.py", "salient * share + (1 - salient)",
             "(1 - salient) * share + salient"),
    Mutation("method: labels outside the tags", "baselines/stc.py", "jnp.where(tagged, ", "jnp.where(tagged | True, "),
    Mutation("method: barrier by the last pixel alone", "baselines/saliency.py", "jnp.maximum(high, value), jnp.minimum(low, value)",
             "value, jnp.minimum(low, value)"),
    # runs: nothing lost, nothing twice
    Mutation("run: a step without a finite loss counts", "train/step.py", "usable = finite & (", "usable = (finite | True) & ("),
    Mutation("run: the gradient is not looked at", "train/step.py",
             'finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])',
             'finite = jnp.isfinite(metrics["gradient_norm"] * 0)'),
    Mutation("run: too many skipped steps are forgotten", "train/step.py", "(state.skipped[1] < max_skipped)",
             "(state.skipped[1] < 10 * max_skipped)"),
    Mutation("run: parts of a batch are not averaged", "train/step.py", "leaf / accumulation_steps", "leaf / 1"),
    Mutation("run: shares of a batch are strided", "data/loader.py", "order[batch * batch_size + process * size + row]",
             "order[batch * batch_size + row * num_processes + process]"),
    Mutation("run: the data go on one batch too late", "data/loader.py", "min(first * size, num_positions)",
             "min((first + 1) * size, num_positions)"),
    Mutation("run: features are noted before they are written", "machine/cache.py", 'json.dumps({"rows": self.first,',
             'json.dumps({"rows": self.first + 4,'),
    Mutation("run: the space of the features is not reserved", "machine/cache.py", "os.posix_fallocate(", "str("),
    Mutation("run: arrays that another run has finished are made again", "machine/cache.py",
             "        if arrays is not None:\n            shutil.rmtree(unfinished", "        if False:\n            shutil.rmtree(unfinished"),
    Mutation("run: a lock that was removed is held", "machine/locks.py", "if not held or _is_at(file, path):", "if True:"),
    Mutation("run: what is in use is removed", "machine/entries.py", "        if not (free or free is None and", "        if not (True or free is None and"),
    Mutation("run: faults that pass are damage", "runfolder/damage.py", "return error.errno not in _PROVEN", "return False"),
    Mutation("run: the save that is replaced goes at once", "runfolder/checkpoints.py",
             "os.rename(self.run_dir / which / str(step), aside)", "shutil.rmtree(self.run_dir / which / str(step))"),
    Mutation("run: touched files are others", "machine/contents.py", "return digest.hexdigest()", "return digest.hexdigest() + str(fact[2])"),
    Mutation("run: nobody is asked for the lock", "machine/locks.py", "fcntl.LOCK_EX | fcntl.LOCK_NB)\n            return True",
             "fcntl.LOCK_UN)\n            return True"),
    Mutation("run: folders of others are removed", "machine/locks.py", "        if held:\n            shutil.rmtree(folder",
             "        if True:\n            shutil.rmtree(folder"),
    Mutation("run: counts of 32 bits", "machine/processes.py", "np.ascontiguousarray(counts, np.int64)",
             "np.ascontiguousarray(counts, np.int64) % 2**32"),
    Mutation("run: the second signal is ignored", "machine/signals.py", "        if self.signum:\n", "        if False:\n"),
    Mutation("run: the state is not saved on a signal", "train/fit.py", "if saving or signum:", "if saving:"),
    Mutation("run: the data start over", "train/fit.py", "batches.set_state(data_state)", "batches.get_state()"),
    Mutation("run: names of the wrong batches", "train/fit.py", "start = step - in_a_row + 1", "start = step - in_a_row + 2"),
    Mutation("run: another seed goes on", "runfolder/description.py", '"method", "seed",', '"method",'),
    Mutation("run: a full disk is not looked at", "runfolder/checkpoints.py", "if 1.1 * needed > free:", "if needed > 10**18 + free:"),
    Mutation("run: a failed save is silent", "runfolder/checkpoints.py",
             "            raise self._failed(manager.directory, error) from error\n        which =",
             "            del error\n        which ="),
    # what people bring
    Mutation("data: photographs are not turned", "data/files/images.py", "return turn if turn in range(1, 9) else 1", "return 1"),
    Mutation("data: 16 bits cut off at the top", "data/files/depth.py", "integers >> (depth - 8)", "integers & 255"),
    Mutation("data: every deep picture has 16 bits", "data/files/depth.py", "if top < 1 << depth)", "if depth == 16)"),
    Mutation("data: thumbnails are photographs", "data/files/images.py", "image.seek(areas.index(max(areas)))", "image.seek(0)"),
    Mutation("data: a word for no tag is a class", "data/files/names.py",
             "if plain in NO_TAG or _letters(name) in _NO_TAG_LETTERS:", "if not name:"),
    Mutation("data: tags of other tags are classes", "data/files/names.py", "if len(parts) < 2:", "if parts:"),
    Mutation("data: folders of systems hold photographs", "data/files/finding.py",
             'name.casefold().startswith((".", "@", "#", "$", "__macosx"))', 'name.startswith(".")'),
    Mutation("data: links are entered before folders", "data/files/finding.py",
             "(links if entry.is_symlink() else waiting)", "(waiting if entry.is_symlink() else links)"),
    Mutation("data: JPEG masks are exact", "data/sources/mask_files.py", "[path for path in there if is_exact(path)]", "list(there)"),
    Mutation("data: the second column of a list is dropped", "data/sources/lists.py", "masks[found] = line.mask", "masks.pop(found, 0)"),
    Mutation("data: untagged classes in masks are passed over", "data/check.py",
             'if others and getattr(source, "untagged_in_masks", "tell") == "tell":', "if others and not source.masks:"),
    Mutation("data: background is a tag", "data/files/tags.py", "name and name.casefold() != BACKGROUND and", "name and"),
    Mutation("data: rows may contradict each other", "data/files/tags.py", "set(rows[image].tags) != set(row.tags)", "False"),
    Mutation("data: of several photographs the first is meant", "data/files/finding.py",
             "return self._shorter.get(name) or", "return self._shorter.get(name, [])[:1] or"),
    Mutation("data: photographs without masks are held out", "data/sources/lists.py",
             "[name for name in order if name in with_mask]", "[name for name in order if with_mask]"),
    Mutation("data: the letter case of names counts", "data/files/finding.py", "return sorted(self._plain.get(name, ()))", "return []"),
    Mutation("data: a colour that is no class is the next one", "data/files/masks.py", "wrong = known[order][at] != keys", "wrong = keys < 0"),
    Mutation("data: masks of colours without their order", "data/files/masks.py", "np.uint8)[order][at]", "np.uint8)[at]"),
    Mutation("data: the object of a trimap is the background", "data/sources/tfds.py", "[0, present[0], 0, VOID]", "[0, 0, present[0], VOID]"),
    Mutation("data: what cannot be read stays", "data/check.py", "[reading.problem is None for reading in readings]", "[True for reading in readings]"),
    Mutation("data: masks are not looked at before training", "train/splits.py", "decode=masks, progress=done", "decode=False, progress=done"),
    Mutation("data: tiles are not blended", "predict/tiling.py", "/ max(overlap * length, 1), 1)", "* 1e9, 1)"),
    Mutation("data: tiles count twice", "predict/tiling.py", "weight[: tall - done] = total[done:].copy(), weight[done:].copy()",
             "weight[: tall - done] = total[done:].copy() * 2, weight[done:].copy()"),
    Mutation("data: large photographs are enlarged by the corner", "predict/resizing.py",
             "centres = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)",
             "centres = np.clip(np.arange(pixels) * cells / pixels, 0, cells - 1)"),
    Mutation("data: names break out of the report", "pictures/report.py", "autoescape=True", "autoescape=False"),
    Mutation("nets: depthwise kernels transposed", "nets/naming.py", "kernel[:, 0].transpose(1, 2, 0)", "kernel[:, 0].transpose(2, 1, 0)"),
    Mutation("nets: kernels transposed", "nets/naming.py", "else kernel.transpose(2, 3, 1, 0)", "else kernel.transpose(3, 2, 1, 0)"),
    Mutation("nets: bias without the mean", "nets/naming.py", "shift - mean * gain", "shift"),
    Mutation("nets: projection before the depthwise convolution", "nets/tables.py",
             '("conv_pw", "conv_dw", "conv_pwl")', '("conv_pwl", "conv_dw", "conv_pw")'),
    Mutation("nets: the first naming for every file", "nets/naming.py", "return max(tables, key=", "return min(tables[:1], key="),
    Mutation("nets: VGG16 in another order of colours", "nets/vgg.py", "MEAN, STD = (0.485, 0.456, 0.406)", "MEAN, STD = (0.406, 0.456, 0.485)"),
    Mutation("nets: no dilation in the large field", "nets/vgg.py", "dilation = 2 if block == 4", "dilation = 1 if block == 4"),
    Mutation("nets: the large field pools two cells wide", "nets/vgg.py", "window_shape=(3, 3)", "window_shape=(2, 2)"),
    Mutation("nets: a tap after its pooling", "nets/vgg.py", 'if self.last_stride == 32 else x', 'if self.last_stride == 8 else x'),
    Mutation("nets: quick-GELU of another slope", "nets/vision_transformer.py", "jax.nn.sigmoid(1.702 * taken)", "jax.nn.sigmoid(taken)"),
    Mutation("nets: GELU by its approximation", "nets/vision_transformer.py", "approximate=False", "approximate=True"),
    Mutation("nets: attention not divided", "nets/vision_transformer.py", " / np.sqrt(queries.shape[-1])", ""),
    Mutation("nets: positions with the other cubic", "nets/vision_transformer.py", "_cubic(places - taken, -0.75)", "_cubic(places - taken, -0.5)"),
    Mutation("nets: positions across and down", "nets/vision_transformer.py", '"ia,jb,abc->ijc"', '"ib,ja,abc->ijc"'),
    Mutation("nets: registers among the patches", "nets/vision_transformer.py", "front.shape[1]\n", "1\n"),
    Mutation("nets: queries, keys and values in another order", "nets/naming.py",
             "for prefix in self.theirs])", "for prefix in self.theirs[::-1]])"),
    Mutation("nets: the first block of a dilated stage is dilated too", "nets/resnet.py", "(stride, before)", "(stride, dilation)"),
    Mutation("nets: ResNet with the epsilon of EfficientNet", "nets/tables.py", "_RESNET_EPSILON = 1e-5", "_RESNET_EPSILON = 1e-3"),
    Mutation("nets: transposed convolution shifted by a cell", "nets/original.py", "rows[2] + _from_before(rows[0], 3)", "rows[0] + _from_before(rows[2], 3)"),
    Mutation("nets: no standardisation", "nets/original.py", "centred / jnp.sqrt(", "centred * jnp.sqrt("),
    Mutation("nets: dilation of the large field", "nets/original.py", '("fc6", self.widths[0], 3, 12)', '("fc6", self.widths[0], 3, 6)'),
    Mutation("devkit: no masks of val", "data/sources/devkit.py", 'ade1", ("val",), "SegmentationClass"', 'ade1", ("val",), None'),
    Mutation("devkit: parts of persons are objects", "data/sources/devkit.py", 'root.iterfind("object")', 'root.iter()'),
    Mutation("devkit: difficult objects left out", "data/sources/devkit.py", 'for element in root.iterfind("object")}',
             'for element in root.iterfind("object") if element.findtext("difficult") == "0"}'),
    Mutation("devkit: val is a part of train_aug", "data/sources/devkit.py", "- set(self.ids(\"val\") or ())", "- set()"),
    Mutation("devkit: SBD before VOC's own masks", "data/sources/devkit.py", "path = own if own.is_file() else self._sbd", "path = self._sbd"),
    Mutation("devkit: void is a class", "data/sources/devkit.py", "- {0, VOID}", "- {0}"),
    Mutation("devkit: lists unsorted", "data/sources/devkit.py", "join(sorted(ids)).encode()", "join(ids).encode()"),
    Mutation("export: the mean of sizes is their sum", "predict/export.py", "total / len(segmenter.input_sizes)", "total"),
    Mutation("export: no antialiasing", "predict/export.py", '"cubic", precision', '"cubic", antialias=False, precision'),
    Mutation("export: cells at their corners", "predict/export.py", "cells / pixels - 0.5", "cells / pixels"),
    Mutation("export: noise stays without a number", "predict/export.py", "jnp.isnan(refined).any()", "jnp.isnan(refined).all() & False"),
    Mutation("nets: the guide of an odd size is cut", "nets/inputs.py", "-(-side // stride)", "side // stride"),
    Mutation("programs: what is cut off stays", "machine/compilation.py", "and not _is_whole(content)", "and False"),
    Mutation("programs: what has changed stays", "machine/compilation.py", "before.get(path.name, digest) != digest or ", ""),
    Mutation("programs: the newest go first", "machine/compilation.py", "in sorted(sizes)", "in sorted(sizes, reverse=True)"),
    Mutation("programs: a switch without effect", "machine/compilation.py", 'switch == "0" or chosen', "chosen"),
    Mutation("programs: every network is the same", "nets/network.py", "json.dumps(self.description, sort_keys=True)", '""'),
    Mutation("programs: a segmenter is closed over its weights", "predict/segmenter.py",
             'return _network_features(beside(images)["backbone"], images, **static)',
             'return jax.jit(lambda images: _network_features(beside(images)["backbone"], images, **static))(images)'),
    Mutation("programs: functions of rows are closed over their weights", "train/spread.py",
             "return functools.partial(function, *jax.device_put(fixed), **static), batch_size",
             "return jax.jit(functools.partial(function, *jax.device_put(fixed), **static)), batch_size"),
    Mutation("spread: batches are made smaller for many devices", "train/spread.py", "count * batch_size", "batch_size"),
    Mutation("classifier: kept whatever the tags", "train/class_maps.py", '"tags": digest, **identity', "**identity"),
    Mutation("classifier: kept whatever the penalty", "train/class_maps.py", '"l2": l2, "tags"', '"tags"'),
    Mutation("nets: posteriors of images without their mirror", "train/posteriors.py", "images[:, :, ::-1]), guide", "images), guide"),
    Mutation("alive: probabilities of tags clipped", "bound/likelihoods.py", "jnp.log(_EPSILON + (1 - 2 * _EPSILON) * right)",
             "jnp.log(jnp.clip(right, _EPSILON, 1 - _EPSILON))"),
    Mutation("alive: no leak of the noisy or but a bound", "bound/likelihoods.py", "jnp.log(_one_minus_exp(log_absent)), log_absent",
             "jnp.log(-jnp.expm1(jnp.minimum(log_absent - jnp.log1p(-_EPSILON), jnp.log1p(-_EPSILON)))), log_absent"),
    Mutation("alive: the derivative of expm1 far from 0", "bound/likelihoods.py", "1 - jnp.exp(x))", "-jnp.expm1(x))"),
    Mutation("alive: evidence kept above a bound", "bound/likelihoods.py", "jnp.log(jnp.sum(labels * found, axis=1) + LEAST_EVIDENCE)",
             "jnp.log(jnp.maximum(jnp.sum(labels * found, axis=1), LEAST_EVIDENCE))"),
    Mutation("alive: a probability rounds to 1 in the closed form", "bound/pooling.py",
             "jnp.where(is_top, jnp.where(possible, of_top, _IMPOSSIBLE), of_others)", "jnp.log(-jnp.expm1(jnp.minimum(log_probs, -1e-7)))"),
    Mutation("alive: an impossible class without a guard", "bound/pooling.py", "jnp.where(possible, of_top, _IMPOSSIBLE)", "of_top - 1e9 * ~possible * jnp.inf"),
    Mutation("alive: a small sharpness loses its digits", "bound/pooling.py", "small = growth > -0.5", "small = growth > 0.5"),
    Mutation("sums: digits are not carried", "metrics.py", "middle = middle + low // _DIGIT", "middle = middle + 0"),
    Mutation("sums: the second digit is not carried", "metrics.py", "high = high + middle // _DIGIT", "high = high + 0"),
    Mutation("sums: bad labels of the other image are forgotten", "metrics.py", "_added(self.bad, other.bad, -1)", "self.bad"),
    Mutation("sums: bad labels wrap", "metrics.py", "_added(self.bad, other.bad, -1)", "(self.bad + other.bad) * jnp.uint32(2**30)"),
    Mutation("sums: bad labels score", "metrics.py", "valid = (union > 0) & ~jnp.any(confusion.bad > 0)", "valid = union > 0"),
    Mutation("sums: bad labels become counts", "metrics.py", "        if np.any(bad):", "        if False:"),
    Mutation("sums: labels of 64 bits wrap", "metrics.py", "kept = xp.where(inside, kept, xp.full_like(kept, no_class))", "kept = kept + 0"),
    Mutation("sums: scores of 32 bits", "metrics.py", "counts = jnp.asarray(confusion).astype(jnp.float32) if on_device", "counts = jnp.asarray(confusion) if on_device"),
    Mutation("checks: labels that are logits", "bound/arguments.py", '    check_probs("labels", labels)\n', ""),
    Mutation("checks: tags of any number", "bound/arguments.py", "np.all((values == 0) | (values == 1))", "True"),
    Mutation("checks: integers of any type", "bound/arguments.py", "if not xp.issubdtype(array.dtype, xp.integer):", "if False:"),
    Mutation("checks: targets that are impossible", "bound/arguments.py", "wanted & (log_probs == -jnp.inf)", "wanted & (log_probs == jnp.inf)"),
    Mutation("checks: samples of anything", "bound/sampling.py", '    check_logits("logits", logits)\n', ""),
    Mutation("checks: images of any range", "baselines/saliency.py", "_lab_colours(checked_colours(image, colour_max=colour_max))",
             "_lab_colours(promote_float(image))"),
    Mutation("checks: numbers of JAX are none", "numerics.py", "return known_number(value.item())", "return None"),
    Mutation("checks: whole numbers", "numerics.py", "if whole and known != math.floor(known):", "if False:"),
    Mutation("types: the narrower of two", "numerics.py", "jnp.float64 if any(array.dtype == jnp.float64 for array in typed)", "jnp.float64 if False"),
]


def copied(folder):
    """A copy of what the tests need."""
    for name in ("lcrf_jax", "tests", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)


def first_failure(folder, file):
    """Name of the first test that fails with a mutation in this file, or None."""
    tests = [next((folder / "tests").rglob(f"test_{name}.py")) for name in TESTS[file]]
    for lane in ("not slow", "slow"):
        command = [sys.executable, "-m", "pytest", "-q", "-m", lane, "-x", "-p", "no:cacheprovider", *tests]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        failed = re.findall(r"^(?:FAILED|ERROR) tests/(\S+)", ended.stdout, re.MULTILINE)
        if bool(failed) != (ended.returncode not in (0, NO_TESTS)):
            raise RuntimeError(f"pytest ended with {ended.returncode} and without naming a test:\n{ended.stdout[-2000:]}")
        if failed:
            return failed[0]
    return None


def main():
    """Run the mutations and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run only the mutations whose name has this word in it")
    only = parser.parse_args().only
    survived = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        copied(folder)
        for mutation in MUTATIONS:
            if only not in mutation.name:
                continue
            path = folder / "lcrf_jax" / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                sys.exit(f"{mutation.name}: expected once in {mutation.file}, found {text.count(mutation.old)}: {mutation.old}")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            caught = first_failure(folder, mutation.file)
            path.write_text(text, encoding="utf-8")
            survived += [] if caught else [mutation.name]
            print(f"| {mutation.name} | {caught or 'NOT CAUGHT'} |", flush=True)
    if survived:
        sys.exit(f"not caught: {survived}")


if __name__ == "__main__":
    main()
