"""The definitions in float64 NumPy: loops, dictionaries and enumeration, slow and plain."""

import itertools
from typing import NamedTuple

import numpy as np


def guide_features(image, position_width, colour_width):
    """[m, 2 + C] rows (row, column, channels), each in units of its width."""
    image = np.asarray(image, np.float64)
    return np.array([
        [row / position_width, column / position_width, *(image[row, column] / colour_width)]
        for row in range(image.shape[0])
        for column in range(image.shape[1])
    ])


def gaussian_kernel(features_a, features_b=None):
    features_b = features_a if features_b is None else features_b
    differences = np.float64(features_a)[:, None] - np.float64(features_b)[None]
    return np.exp(-np.square(differences).sum(axis=-1) / 2)


def dense_kernel(image, params, normalisation):
    """Each Gaussian normalised with its self-pairs, then the weighted sum, then a diagonal of zeros."""
    total = 0
    for weight, features in (
        (params.bilateral_weight,
         guide_features(image, params.bilateral_position_width, params.bilateral_colour_width)),
        (params.gaussian_weight, guide_features(image, params.gaussian_position_width, 1.0)[:, :2]),
    ):
        kernel = gaussian_kernel(features)
        sums = kernel.sum(axis=1)
        divisors = {"none": 1.0, "row": sums[:, None], "symmetric": np.sqrt(np.outer(sums, sums))}
        total = total + weight * kernel / divisors[normalisation]
    np.fill_diagonal(total, 0)
    return total


def potts(num_classes):
    return 1.0 - np.eye(num_classes)


def pairwise_energy(probs, kernel, compatibility=None):
    """Every unordered pair once; a pair has the mean of the two entries of kernel and compatibility."""
    num_pixels, num_classes = np.shape(probs)
    compatibility = potts(num_classes) if compatibility is None else np.float64(compatibility)
    energy = 0.0
    for i in range(num_pixels):
        for j in range(i):
            for a, b in np.ndindex(num_classes, num_classes):
                weight = (kernel[i, j] + kernel[j, i]) / 2 * (compatibility[a, b] + compatibility[b, a]) / 2
                energy += weight * probs[i, a] * probs[j, b]
    return energy


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    unnormalised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=-1, keepdims=True)


def mean_field(unary_logits, kernel, num_iterations, compatibility=None):
    """Probabilities after parallel updates, with loops over pairs."""
    unary_logits = np.asarray(unary_logits, np.float64)
    num_pixels, num_classes = unary_logits.shape
    compatibility = potts(num_classes) if compatibility is None else compatibility
    probs = softmax(unary_logits)
    for _ in range(num_iterations):
        costs = np.zeros_like(probs)
        for i, j in np.ndindex(num_pixels, num_pixels):
            if i != j:
                costs[i] += kernel[i, j] * compatibility @ probs[j]
        probs = softmax(unary_logits - costs)
    return probs


def labellings(num_pixels, num_classes):
    """[num_classes ** num_pixels, num_pixels] all of them."""
    return np.array(list(itertools.product(range(num_classes), repeat=num_pixels)))


def labelling_energies(kernel, num_classes, compatibility=None):
    """Pairwise energy of every labelling: sum over i < j of k_ij mu(z_i, z_j)."""
    compatibility = potts(num_classes) if compatibility is None else compatibility
    every = labellings(len(kernel), num_classes)
    energies = np.zeros(len(every))
    for i in range(len(kernel)):
        for j in range(i):
            energies += kernel[i, j] * compatibility[every[:, i], every[:, j]]
    return energies


def log_partition(kernel, num_classes, compatibility=None):
    """log Z of the prior, by enumeration."""
    return np.logaddexp.reduce(-labelling_energies(kernel, num_classes, compatibility))


def factorised_log_probs(probs):
    """log q(z) of every labelling under independent pixels."""
    probs = np.asarray(probs, np.float64)
    every = labellings(*probs.shape)
    with np.errstate(divide="ignore"):
        return np.log(probs)[np.arange(len(probs)), every].sum(axis=1)


def kl_to_prior(probs, kernel, compatibility=None):
    """KL(q || p) with log Z: the sum over all labellings of q (log q - log p)."""
    num_classes = np.shape(probs)[1]
    log_q = factorised_log_probs(probs)
    log_p = -labelling_energies(kernel, num_classes, compatibility)
    log_p = log_p - log_partition(kernel, num_classes, compatibility)
    possible = np.isfinite(log_q)
    return np.sum(np.exp(log_q[possible]) * (log_q - log_p)[possible])


def permutohedral_filter(features, values):
    """Splat, blur and slice on a dictionary of lattice points; with the integral of the Gaussian."""
    narrowing = 1.04
    features, values = narrowing * np.float64(features), np.float64(values)
    d = features.shape[1]
    corners = d + 1
    elevation = np.zeros((corners, d))
    for i in range(d):
        elevation[: i + 1, i] = 1
        elevation[i + 1, i] = -(i + 1)
        elevation[:, i] *= np.sqrt(2 / 3) * corners / np.sqrt((i + 1) * (i + 2))
    simplices, table = [], {}
    for feature, value in zip(features, values, strict=True):
        simplex = _simplex(elevation @ feature)
        simplices.append(simplex)
        for vertex, weight in simplex:
            table[vertex] = table.get(vertex, 0) + weight * value
    for axis in range(corners):
        step = np.ones(corners, int)
        step[axis] -= corners
        table = {
            vertex: value + (table.get(tuple(vertex + step), 0) + table.get(tuple(vertex - step), 0)) / 2
            for vertex, value in table.items()
        }
    sliced = np.array([sum(weight * table[vertex] for vertex, weight in simplex) for simplex in simplices])
    mass = 2**corners * (1.5 / narrowing**2) ** (d / 2) / np.sqrt(corners)
    return sliced * (2 * np.pi) ** (d / 2) / mass, len(table)


def cells(features, sizes):
    """[m] number of the box of feature space that each row lies in, and the means of the rows in each box."""
    members = {}
    for i, feature in enumerate(features):
        members.setdefault(tuple(np.floor(feature / np.asarray(sizes)).tolist()), []).append(i)
    numbers = np.zeros(len(features), int)
    for number, rows in enumerate(members.values()):
        numbers[rows] = number
    return numbers, np.array([np.mean(features[rows], axis=0) for rows in members.values()])


def _simplex(point):
    """Corners, as tuples, and barycentric weights of the lattice simplex around a point of the hyperplane."""
    corners = len(point)
    base = corners * np.round(point / corners).astype(int)
    excess = base.sum() // corners
    order = np.argsort(-(point - base), kind="stable")
    if excess > 0:
        base[order[-excess:]] -= corners
    elif excess < 0:
        base[order[:-excess]] += corners
    order = np.argsort(-(point - base), kind="stable")
    simplex, rest = [], 1.0
    for k in range(1, corners):
        vertex = base + k
        vertex[order[corners - k:]] -= corners
        larger, smaller = order[corners - 1 - k], order[corners - k]
        weight = ((point - base)[larger] - (point - base)[smaller]) / corners
        simplex.append((tuple(vertex.tolist()), weight))
        rest -= weight
    simplex.append((tuple(base.tolist()), rest))
    assert np.allclose(sum(weight * np.array(vertex) for vertex, weight in simplex), point)
    return simplex


def smooth_image(seed, height, width, noise=4.0):
    """[H, W, 3] a picture of soft blobs with an edge across it and a little noise, in 0..255."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    image = np.zeros((height, width, 3))
    for _ in range(8):
        y, x, size = rng.uniform(0, 1, 2).tolist() + [rng.uniform(0.08, 0.3)]
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * size**2))
        image += blob[..., None] * rng.uniform(-120, 120, 3)
    image += 128 + np.where(rows + 0.4 * columns > 0.6, 40, 0)[..., None]
    return np.clip(image + noise * rng.standard_normal(image.shape), 0, 255)


def tag_log_likelihood(name, labels, tags, **options):
    """log p(y | z, x) by its definition, class by class, its probabilities mixed with a little of their opposite."""
    labels, total = np.asarray(labels, np.float64), 0.0
    num_pixels, num_classes = labels.shape
    for k in range(num_classes):
        z = labels[:, k]
        if name == "noisy_or":
            absent = 1 - 1e-6
            for share in z:
                absent *= 1 - options.get("rho", 0.1) * share
            pi, epsilon = 1 - absent, 0.0
        elif name == "max_pool":
            flip = options.get("flip_probability", 1e-6)
            pi, epsilon = max(z), flip
        elif name == "log_mean_exp":
            r = options.get("sharpness", 5.0)
            pi, epsilon = np.log(sum(np.exp(r * share) for share in z) / num_pixels) / r, 1e-6
        elif name == "area":
            alpha = options.get("foreground_share", 0.1) if k else options.get("background_share", 0.3)
            pi, epsilon = sigmoid(options.get("beta", 20.0) * (sum(z) / num_pixels - alpha)), 0.0
        elif name == "gwrp":
            decay = options.get("foreground_decay", 0.996) if k else options.get("background_decay", 0.999)
            decay = decay ** (options.get("reference_cells", 1681) / num_pixels)
            weights = [decay**rank for rank in range(num_pixels)]
            ranked = sorted(z, reverse=True)
            pi, epsilon = sum(w * share for w, share in zip(weights, ranked)) / sum(weights), 1e-6
        elif name == "frozen_classifier":
            if k == 0:
                continue
            bias = np.broadcast_to(options["bias"], num_classes - 1)[k - 1]
            scores = [z[j] * options["class_maps"][j][k - 1] for j in range(num_pixels)]
            pi, epsilon = sigmoid(options.get("scale", 1.0) * sum(scores) / num_pixels + bias), 0.0
        pi = epsilon + (1 - 2 * epsilon) * pi
        total += np.log(pi) if tags[k] else np.log(1 - pi)
    return total


def sigmoid(x):
    return 1 / (1 + np.exp(-np.float64(x)))


def class_evidence(
    class_maps, peaks, tags, background_level, sharpness, floor, saliency=None, saliency_weight=0.0, objectness=None,
    objectness_weight=0.0,
):
    """[m, K] evidence of each pixel for each class, pixel by pixel."""
    rows, class_maps = [], np.asarray(class_maps, np.float64)
    for j, scores in enumerate(class_maps):
        salient = 0.5 if saliency is None else saliency[j]
        row = [background_level**sharpness * np.exp(saliency_weight * (0.5 - salient))]
        ratios = [min(max(score / peak, floor), 1.0) for score, peak in zip(scores, peaks)]
        present = [ratio for ratio, tag in zip(ratios, tags[1:]) if tag]
        factor = 1.0
        if objectness is not None and present:
            factor = (max(objectness[j], 1e-4) / max(present) ** 0.75) ** (objectness_weight / len(present))
        for ratio, tag in zip(ratios, tags[1:]):
            row.append((min(max(ratio * factor, floor), 1.0) if tag else floor) ** sharpness)
        rows.append(np.array(row) / sum(row))
    return np.array(rows)


def cue_evidence(cues, tags, confidence, absent_level):
    """[m, K] evidence of each pixel for each class, pixel by pixel."""
    rows = []
    for cue in cues:
        if 0 <= cue < len(tags):
            row = [confidence if k == cue else (1 - confidence) / (len(tags) - 1) for k in range(len(tags))]
        else:
            row = [1.0 if tag else absent_level for tag in tags]
        rows.append(np.array(row) / sum(row))
    return np.array(rows)


def expectation(function, probs):
    """E_q f(z) over every labelling z as one-hot [m, K], under independent pixels."""
    one_hot = np.eye(np.shape(probs)[1])[labellings(*np.shape(probs))]
    return np.sum(np.exp(factorised_log_probs(probs)) * np.array([float(function(z)) for z in one_hot]))


def expectation_and_gradient(function, logits):
    """E_q f(z) and its gradient in the logits: the sum over every labelling of q f and of q f times z - phi."""
    probs = softmax(logits)
    one_hot = np.eye(probs.shape[1])[labellings(*probs.shape)]
    weighted = np.exp(factorised_log_probs(probs)) * np.array([float(function(z)) for z in one_hot])
    return weighted.sum(), np.tensordot(weighted, one_hot - probs, axes=1)


def log_tag_probability(log_likelihood, kernel, num_classes, compatibility=None):
    """log p(y | x) = log sum_z p(z | x) p(y | z, x), by enumeration of the one-hot z."""
    one_hot = np.eye(num_classes)[labellings(len(kernel), num_classes)]
    log_likelihoods = [float(log_likelihood(z)) for z in one_hot]
    return enumeration(log_likelihoods, kernel, num_classes, compatibility).log_tag_probability


class Enumeration(NamedTuple):
    """log Z(x), log p(y | x), log p(z | x, y) of every labelling, and the posterior's marginals [m, K]."""

    log_partition: float
    log_tag_probability: float
    log_posterior: np.ndarray
    marginals: np.ndarray


def enumeration(log_likelihoods, kernel, num_classes, compatibility=None):
    """What the sum over all labellings gives, from log p(y | z, x) of each of them."""
    energies = labelling_energies(kernel, num_classes, compatibility)
    log_joint = np.asarray(log_likelihoods, np.float64) - energies
    log_partition, total = np.logaddexp.reduce(-energies), np.logaddexp.reduce(log_joint)
    posterior = np.exp(log_joint - total)
    columns = labellings(len(kernel), num_classes).T
    marginals = np.array([np.bincount(labels, posterior, minlength=num_classes) for labels in columns])
    return Enumeration(log_partition, total - log_partition, log_joint - total, marginals)


def conv(x, kernel, stride=1, dilation=1, groups=1):
    """Convolution of [H, W, C] with a kernel [O, C / groups, k, k], zeros outside, SAME as in TensorFlow."""
    x, kernel = np.float64(x), np.float64(kernel)
    k, reach = kernel.shape[-1], (kernel.shape[-1] - 1) * dilation + 1
    height, width = (-(-size // stride) for size in x.shape[:2])
    missing = [max((n - 1) * stride + reach - size, 0) for n, size in zip((height, width), x.shape[:2])]
    x = np.pad(x, [(n // 2, n - n // 2) for n in missing] + [(0, 0)])
    result = np.zeros((height, width, kernel.shape[0]))
    for row, column in np.ndindex(height, width):
        patch = x[row * stride:, column * stride:][:reach:dilation, :reach:dilation]
        if groups == 1:
            result[row, column] = kernel.reshape(len(kernel), -1) @ patch.transpose(2, 0, 1).ravel()
        else:
            result[row, column] = np.sum(kernel[:, 0].transpose(1, 2, 0) * patch, axis=(0, 1))
    assert patch.shape[:2] == (k, k) and groups in (1, x.shape[2])
    return result


def depthwise_conv(x, kernel, stride, dilation):
    """The same with a kernel [k, k, C], one for each channel."""
    return conv(x, np.transpose(kernel, (2, 0, 1))[:, None], stride, dilation, groups=x.shape[-1])


def efficientnet_lite(state, x, repeats=(1, 2, 2, 3, 3, 4, 1), last_stride=32):
    """Taps of one image [H, W, 3] from a published state dict: convolution, batch norm, ReLU6 in turn."""

    def normalised(x, name):
        fields = ("weight", "bias", "running_mean", "running_var")
        weight, bias, mean, variance = (np.float64(state[f"{name}.{field}"]) for field in fields)
        return (x - mean) / np.sqrt(variance + 1e-3) * weight + bias

    def relu6(x):
        return np.minimum(np.maximum(x, 0), 6)

    x = relu6(normalised(conv(x, state["_conv_stem.weight"], 2), "_bn0"))
    starts = np.cumsum((0, *repeats))
    first_of_stage = dict(zip(starts[:7], (1, 2, 2, 2, 1, 2, 1)))
    tap_of_block = dict(zip(starts[[2, 3, 5, 7]] - 1, ("s4", "s8", "s16", "s32")))
    taps, dilation = {}, 1
    for block in range(starts[-1]):
        name, inputs = f"_blocks.{block}.", x
        stride = first_of_stage.get(block, 1)
        if block == starts[5] and last_stride == 16:
            stride = 1
        if block:
            x = relu6(normalised(conv(x, state[name + "_expand_conv.weight"]), name + "_bn0"))
        x = conv(x, state[name + "_depthwise_conv.weight"], stride, dilation, groups=x.shape[-1])
        x = relu6(normalised(x, name + "_bn1"))
        x = normalised(conv(x, state[name + "_project_conv.weight"]), name + "_bn2")
        if x.shape == inputs.shape:
            x = x + inputs
        if block == starts[5] and last_stride == 16:
            dilation = 2
        tap = tap_of_block.get(block)
        if tap:
            taps[tap] = x
    taps["head"] = relu6(normalised(conv(x, state["_conv_head.weight"]), "_bn1"))
    return taps
