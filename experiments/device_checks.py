"""The checks of `experiments.bench device`: what a device computes against the same function on the CPU.

Pure functions are compared with themselves in float64 on the CPU. Samples and train steps have no float64 of the same
random bits: they are compared with float32 on the CPU, and where the device is the CPU with nothing but a second run.
"""

import contextlib
import functools
import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lcrf_jax
from lcrf_jax.bound.likelihoods import EXPECTATIONS, IMAGE_LIKELIHOODS, TAG_LIKELIHOODS
from lcrf_jax.crf.image_kernels import FORMS
from lcrf_jax.machine.errors import UserError
from lcrf_jax.nets.network import BACKBONES, build_network
from lcrf_jax.nets.vgg import VGG16, preprocess
from lcrf_jax.train import fit
from lcrf_jax.train.methods import METHODS
from lcrf_jax.train.preparation import prepare

from .configs import base, tiny
from .crf_measurements import network_like
from .device_report import Check, Part

# Sums in another order, in float32. The CRF asks for products in full float32 everywhere.
TOLERANCES = {"exact": 1e-4, "anchors": 1e-3, "lattice": 1e-3}
LIKELIHOOD, SAMPLE = 1e-4, 1e-5
# Convolutions are in JAX's default precision: float32 on CPU, TF32 on recent GPUs, bfloat16 on TPU.
NETWORK = {"cpu": 1e-4, "gpu": 1e-2, "tpu": 5e-2}
STEP = {"cpu": 1e-4, "gpu": 3e-2, "tpu": 1e-1}
BFLOAT16 = 5e-2
GRID, NUM_CLASSES = (20, 24), 5
# Of more labels some are dropped, by a switch between loops that takes long to compile: with one form, for it is the same
# with all of them.
REFINED_CLASSES = {"exact": 8, "anchors": 5, "lattice": 5}
# Cells of neither lattice nor anchors end on a pixel or a colour: rounding moves no pixel into another cell.
PARAMS = lcrf_jax.KernelParams(5.0, 7.31, 12.71, 1.0, 1.7)
FLOAT64, FLOAT32, ITSELF = "float64 on the CPU", "float32 on the CPU", "the device itself"


def all_checks(folder) -> list[Check]:
    """Every check, the most telling first; a folder for what training keeps on disk."""
    cpu()
    def form(name, cost):
        return Check(f"{name} kernel", cost, functools.partial(form_parts, name))

    refined = [Check(f"{name} kernel, from an image", 5.0, functools.partial(refine_parts, name)) for name in sorted(FORMS)]
    likelihoods = [
        Check(f"likelihood {name}", 1.0, functools.partial(likelihood_parts, name))
        for name in [*TAG_LIKELIHOODS, *IMAGE_LIKELIHOODS, *(f"expected {name}" for name in EXPECTATIONS)]
    ]
    trained = [name for name, method in METHODS.items() if method.objective]
    trained.sort(key=lambda name: name != "latent_crf")
    steps = [Check(f"train step {name}", 10.0, functools.partial(step_parts, name, folder)) for name in trained]
    return [
        form("exact", 3.0),
        Check("samples", 2.0, sample_parts),
        form("lattice", 10.0),
        *likelihoods,
        steps[0],
        form("anchors", 4.0),
        Check("network", 4.0, bfloat16_parts),
        Check("vgg16", 4.0, vgg_parts),
        *refined,
        *steps[1:],
    ]


def cpu():
    """The CPU as a device, which is there unless JAX was told to leave it out."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise UserError(
            "JAX_PLATFORMS: expected cpu among them, which the device is compared with; add it at the end, as in "
            f"JAX_PLATFORMS=cuda,cpu ({str(error).splitlines()[0]})"
        ) from error


def platform():
    """cpu, gpu or tpu; another one is measured as a TPU, whose tolerances are the widest."""
    name = {"cuda": "gpu", "rocm": "gpu"}.get(jax.default_backend(), jax.default_backend())
    return name if name in NETWORK else "tpu"


def largest_error(found, expected) -> float:
    """Largest difference as a share of the largest value of the reference; infinite where something is not finite."""
    found, expected = (np.asarray(value, np.float64) for value in (found, expected))
    if found.shape != expected.shape:
        raise ValueError(f"shapes differ: {found.shape} on the device, {expected.shape} of the reference")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def same_bits(one, other) -> bool:
    """Whether two arrays are equal to the last bit."""
    return np.asarray(one).tobytes() == np.asarray(other).tobytes()


def twice(function, *arguments):
    """Two results of the same compiled program, as NumPy arrays."""
    program = jax.jit(function).lower(*arguments).compile()
    return [jax.tree.map(np.asarray, program(*arguments)) for _ in range(2)]


def in_float64(function, *arguments):
    """The result of a function on the CPU in float64."""

    def wide(leaf):
        return np.asarray(leaf, np.float64) if np.issubdtype(np.asarray(leaf).dtype, np.floating) else leaf

    with jax.enable_x64(True), jax.default_device(cpu()):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(wide, arguments)))


def in_float32(function, *arguments):
    """The result of a function on the CPU as it is."""
    with jax.default_device(cpu()):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def parts_of(results, expected, tolerance, reference) -> list[Part]:
    """Parts of two results, dicts of arrays, and of what is expected; None where the device is its own reference."""
    first, second = results
    parts = []
    for name, found in first.items():
        itself = expected is None
        error = largest_error(found, found if itself else expected[name])
        known = None if itself and np.isfinite(error) else error
        parts.append(Part(name, known, tolerance, same_bits(found, second[name]), ITSELF if itself else reference))
    return parts


def picture(height, width, seed=0):
    """[height, width, 3] float32 in 0..255: smooth colours, an edge and a little noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    image = np.full((height, width, 3), 128.0)
    for _ in range(8):
        y, x, size = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.08, 0.3)
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * size**2))
        image += blob[..., None] * rng.uniform(-120, 120, 3)
    image += np.where(rows + 0.4 * columns > 0.6, 40, 0)[..., None] + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.float32)


def _inputs(num_classes=NUM_CLASSES, unary="every class"):
    """(image, unary [H, W, K]) of the checks of the CRF."""
    image = picture(*GRID)
    return image, network_like(image.astype(np.uint8), num_classes, unary)


def form_parts(form) -> list[Part]:
    """Energy, gradient and mean field of a form of the kernel, with the build."""

    def function(image, unary):
        kernel = FORMS[form](image, PARAMS)
        probs = jax.nn.softmax(unary)
        energy, gradient = jax.value_and_grad(lcrf_jax.pairwise_energy)(probs, kernel)
        posterior = jnp.exp(lcrf_jax.mean_field(unary, kernel, num_iterations=5))
        return {"pairwise energy": energy, "its gradient": gradient, "mean_field": posterior}

    arguments = _inputs()
    return parts_of(twice(function, *arguments), in_float64(function, *arguments), TOLERANCES[form], FLOAT64)


def refine_parts(form) -> list[Part]:
    """Refinement with a form of the kernel, of an image with labels that are improbable everywhere."""

    def function(image, unary):
        return {"refine": jnp.exp(lcrf_jax.refine(image, unary, PARAMS, form=form, num_iterations=5))}

    arguments = _inputs(REFINED_CLASSES[form], "3 classes")
    return parts_of(twice(function, *arguments), in_float64(function, *arguments), TOLERANCES[form], FLOAT64)


def likelihood_parts(name) -> list[Part]:
    """A likelihood and its gradient in the logits."""
    rng = np.random.default_rng(1)
    cells, classes = 60, 5
    logits = rng.normal(0, 2, (cells, classes)).astype(np.float32)
    tags = np.array([True, True, False, True, False])
    maps = rng.normal(0, 3, (cells, classes - 1)).astype(np.float32)
    positive = rng.uniform(0.01, 1, (cells, classes)).astype(np.float32)
    given = {"frozen_classifier": maps, "evidence": positive}.get(name.removeprefix("expected "))
    options = {"bias": -1.0} if name == "frozen_classifier" else {}
    of_logits = name.startswith("expected ")  # the others are of labels
    known = EXPECTATIONS if of_logits else TAG_LIKELIHOODS | IMAGE_LIKELIHOODS
    likelihood = known[name.removeprefix("expected ")]

    def function(logits, *more):
        def value(logits):
            return likelihood(logits if of_logits else jax.nn.softmax(logits), tags, *more, **options)

        found, gradient = jax.value_and_grad(value)(logits)
        return {"value": found, "gradient": gradient}

    arguments = (logits,) if given is None else (logits, given)
    return parts_of(twice(function, *arguments), in_float64(function, *arguments), LIKELIHOOD, FLOAT64)


def sample_parts() -> list[Part]:
    """Random bits, and the samples that are made of them by one key."""

    def function(seed, logits):
        key = jax.random.key(seed)
        return {
            "random bits": jax.random.bits(key, (64,)),
            "gumbel_softmax": lcrf_jax.gumbel_softmax(key, logits, temperature=0.5),
            "straight_through": lcrf_jax.straight_through(key, logits, temperature=0.5),
            "categorical": lcrf_jax.categorical(key, logits),
        }

    logits = np.random.default_rng(2).normal(0, 2, (500, 6)).astype(np.float32)
    arguments = np.uint32(3), logits
    expected = None if platform() == "cpu" else in_float32(function, *arguments)
    return parts_of(twice(function, *arguments), expected, SAMPLE, FLOAT32)


def tiny_config(method, folder, num_devices):
    """The smallest configuration that trains a method."""
    config = tiny.get_config()
    batch_size = num_devices * -(-8 // num_devices)
    config.data.options = base.options(seed=0, size=96, num_train=batch_size, num_val=1)
    config.network.taps, config.network.widths = ("head", "s16"), (16, 12)
    config.network.dropout = 0.0
    config.class_maps.extra_sizes, config.class_maps.grid = (), 6
    config.batch_size = batch_size
    config.epochs = (2, 2)  # enough for the rounds of every method
    config.cache.directory = str(folder)
    config.method = method
    return config.to_dict()


def prepared_quietly(config):
    """What training is prepared with, without its lines on the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return prepare(config)


def step_parts(method, folder) -> list[Part]:
    """The terms of the loss and the gradient of the first train step of a method."""
    prepared = prepared_quietly(tiny_config(method, pathlib.Path(folder), jax.device_count()))
    step, state, variables, batch, key = fit.first_step(prepared)
    begins = jax.tree.map(np.asarray, state)
    program = step.lower(state, variables, batch, key).compile()
    placed = [jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), begins, state) for _ in range(2)]
    results = [_of_step(program(state, variables, batch, key)) for state in placed]
    expected = None
    if platform() != "cpu":
        step, other, *arguments = fit.first_step(prepared, devices=[cpu()])
        state = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), begins, other)
        expected = _of_step(step(state, *arguments))
    return parts_of(results, expected, STEP[platform()], FLOAT32)


def _of_step(result):
    """The loss with its terms, and the gradient, which is the optimiser's first moment after one step."""
    state, metrics = jax.tree.map(np.asarray, result)
    moments = optax.tree.get(state.opt_state, "mu")
    gradient = np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(moments)])
    if not np.any(gradient):
        raise ValueError("the gradient of every weight is 0")
    return {"loss": np.array([metrics[name] for name in sorted(metrics)]), "gradient": gradient}


def _random_weights(shapes, seed=4):
    """Weights for which the values of a network keep their size, the same on every device."""
    rng = np.random.default_rng(seed)

    def weight(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1e4
        return (rng.standard_normal(leaf.shape, np.float32) * np.sqrt(2 / fan_in)).astype(np.float32)

    return jax.tree.map(weight, shapes)


def vgg_parts(side=224) -> list[Part]:
    """VGG16 with random weights."""
    module, image = VGG16(), picture(side, side)[None]
    shapes = jax.eval_shape(module.init, jax.random.key(0), image)

    def function(variables, image):
        taps = module.apply(variables, preprocess(image).astype(image.dtype))
        return {f"forward at {side}": taps["s32"]}

    arguments = _random_weights(shapes), image
    reference = in_float64 if platform() == "cpu" else in_float32
    expected = reference(function, *arguments)
    name = FLOAT64 if platform() == "cpu" else FLOAT32
    return parts_of(twice(function, *arguments), expected, NETWORK[platform()], name)


def bfloat16_parts(side=96) -> list[Part]:
    """The small network with products in bfloat16 against float32 on the same device, and that against the CPU."""
    settings = {"backbone": "small", "last_stride": 16, "taps": ["head", "s16"], "widths": [16, 12], "dropout": 0.0,
                "num_classes": 7}  # fmt: skip
    image = picture(side, side)[None]

    def forward(dtype):
        network = build_network(settings | {"compute_dtype": dtype})
        return network, lambda params, variables, image: {
            f"logits in {dtype}": network.logits(params, variables, network.features(variables, image))
        }

    network, plain = forward("float32")
    module = BACKBONES["small"].module(last_stride=16)
    variables = _random_weights(jax.eval_shape(module.init, jax.random.key(0), image))
    features = jax.eval_shape(network.features, variables, image)
    params = _random_weights(jax.eval_shape(network.init, jax.random.key(0), variables, features))
    arguments = params, variables, image
    full = twice(plain, *arguments)
    expected = None if platform() == "cpu" else in_float32(plain, *arguments)
    half = twice(forward("bfloat16")[1], *arguments)
    like = {"logits in bfloat16": full[0]["logits in float32"]}
    return [
        *parts_of(full, expected, NETWORK[platform()], FLOAT32),
        *parts_of(half, like, BFLOAT16, "float32 on the device"),
    ]

