r"""Weights of a backbone: found, read, compared with what the network wants, and tried on one picture.

    python -m experiments.weights --backbone=efficientnet_lite0
    python -m experiments.weights --backbone=dinov2_vits14 --source=hf:facebook/dinov2-small@REVISION
    python -m experiments.weights --backbone=resnet50 --source=model.safetensors --sha256=FIRST_DIGITS
    python -m experiments.weights --sizes

A file with names missing or arrays of other shapes is refused, all of them listed. Otherwise it prints the sha256 of the file, the
shapes of the parameters, what a forward pass costs, and what it gives for a picture that is made here: least, greatest,
mean and standard deviation of each tap, which agree on other machines to about four digits, and a digest of the bits.
`--sizes` prints the table of docs/backbones.md instead; it needs no weights.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict

from lcrf_jax.machine.progress import say
from lcrf_jax.nets.network import BACKBONES
from lcrf_jax.nets.weights import hub_commit, load_weights
from lcrf_jax.train.step import count_parameters

from . import reporting

_BACKBONE = flags.DEFINE_string("backbone", None, "Its name, as in config.network.backbone.")
_SOURCE = flags.DEFINE_string("source", "", "As config.weights: a file, hf:REPOSITORY@REVISION, random; nothing for a package.")
_LAST_STRIDE = flags.DEFINE_integer("last_stride", None, "As config.network.last_stride; 16 or what there is, by default.")
_SIZE = flags.DEFINE_integer("size", None, "Side of the picture in pixels; 224 by default.")
_SHA256 = flags.DEFINE_string("sha256", None, "What the file's sha256 must begin with.")
_SIZES = flags.DEFINE_bool("sizes", False, "Print the sizes of every backbone.")

DIGITS = 12


def picture(size):
    """[size, size, 3] uint8, ramps of whole numbers: the same everywhere."""
    rows, columns, colours = np.indices((size, size, 3))
    return np.abs((5 * rows + 3 * columns + 85 * colours) % 510 - 255).astype(np.uint8)


def usual_stride(backbone):
    """16, or the one that there is."""
    return 16 if 16 in backbone.last_strides else backbone.last_strides[0]


def module_of(backbone, last_stride, size):
    """The linen module, once stride and size are checked."""
    if last_stride not in backbone.last_strides:
        raise ValueError(f"last_stride: expected one of {backbone.last_strides}, got {last_stride}")
    if size < 32 or size % backbone.size_step:
        raise ValueError(f"size: expected a multiple of {backbone.size_step}, 32 or more, got {size}")
    return backbone.module(last_stride=last_stride)


def operations(module, variables, size):
    """Floating-point operations of a forward pass, as XLA counts them before it optimises."""
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return float(jax.jit(module.apply).lower(variables, image).cost_analysis()["flops"])


def show_sizes():
    """The table of docs/backbones.md."""
    say("| backbone | last stride | parameters, millions | side | GFLOP |\n|---|---|---|---|---|")
    for name, backbone in BACKBONES.items():
        last_stride = usual_stride(backbone)
        module, size = backbone.module(last_stride=last_stride), nearest(backbone, 320)
        variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
        costs = operations(module, variables, size) / 1e9
        say(f"| `{name}` | {last_stride} | {count_parameters(variables) / 1e6:.2f} | {size} | {costs:.1f} |")


def nearest(backbone, size):
    """The side nearest to `size` that the backbone takes."""
    return max(round(size / backbone.size_step), 1) * backbone.size_step


def show_shapes(variables):
    """Every parameter with its shape, those of one layer in a line."""
    layers = {}
    for path, array in flatten_dict(variables["params"], sep="/").items():
        layer, _, name = path.rpartition("/")
        layers.setdefault(layer or name, []).append(f"{name} {list(array.shape)}")
    for layer, arrays in layers.items():
        say(f"  {layer:24} {', '.join(arrays)}")


def show_forward(backbone, module, variables, size):
    """What the network makes of the picture."""
    taps = jax.jit(module.apply)(variables, backbone.preprocess(picture(size)[None]))
    digest = hashlib.sha256()
    for tap in [tap for tap in backbone.taps if tap in taps]:
        values = np.asarray(taps[tap])
        digest.update(values.tobytes())
        numbers = ", ".join(
            f"{name} {value:.4g}"
            for name, value in (("least", values.min()), ("greatest", values.max()), ("mean", values.mean()), ("std", values.std()))
        )
        say(f"  {tap:8} {list(values.shape[1:])!s:16} {numbers}")
        if not np.isfinite(values).all():
            raise ValueError(f"{tap}: not all numbers are finite; the weights are of no use")
    say(f"forward digest {digest.hexdigest()[:DIGITS]}, of the bits of all taps: the same on this kind of machine and version alone")


def main(argv):
    """Load, compare, show."""
    reporting.no_more_arguments(argv)
    if _SIZES.value:
        show_sizes()
        return
    if _BACKBONE.value not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(sorted(BACKBONES))}, got {_BACKBONE.value!r}")
    backbone = BACKBONES[_BACKBONE.value]
    last_stride = usual_stride(backbone) if _LAST_STRIDE.value is None else _LAST_STRIDE.value
    size = nearest(backbone, 224) if _SIZE.value is None else _SIZE.value
    module = module_of(backbone, last_stride, size)
    source = _SOURCE.value or backbone.weights
    variables, digest = load_weights(_BACKBONE.value, module, source)
    if _SHA256.value and not digest.startswith(_SHA256.value.lower()):
        raise ValueError(f"sha256: expected {_SHA256.value}, got {digest}; the file is another one")
    say(f"{_BACKBONE.value} of {source or 'its package'}, sha256 {digest[:DIGITS]}")
    for name, commit in hub_commit(source).items():
        say(f"{name} at {commit}")
    show_shapes(variables)
    say(f"{count_parameters(variables):,} parameters")
    say(f"picture of {size} x {size}, last stride {last_stride}, {backbone.normalisation}: {operations(module, variables, size) / 1e9:.2f} GFLOP")
    show_forward(backbone, module, variables, size)


if __name__ == "__main__":
    reporting.run(main, keep_compiled=False)
