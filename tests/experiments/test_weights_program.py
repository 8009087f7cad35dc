"""The program that loads and tries the weights of a backbone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import assert_refused, run
from safetensors.numpy import save_file

SHAPES = {"stem": (3, 3, 3, 12), "s4": (3, 3, 12, 16), "s8": (3, 3, 16, 24), "s16": (3, 3, 24, 32), "s32": (3, 3, 32, 48), "head": (1, 1, 48, 96)}
SMALL = sum(int(np.prod(shape)) + shape[-1] for shape in SHAPES.values())


@pytest.mark.slow
def test_weights_are_shown_with_their_hash_and_what_they_give():
    ended = run("weights", "--backbone=small", "--size=64")
    assert ended.code == 0, ended.err
    assert "small of random, sha256 " in ended.out and f"{SMALL:,} parameters" in ended.out
    assert "kernel [3, 3, 3, 12]" in ended.out and "picture of 64 x 64, last stride 16, (x - 127) / 128: " in ended.out
    assert "s8       [8, 8, 24]" in ended.out and ended.last_line.startswith("forward digest ")
    assert run("weights", "--backbone=small", "--size=64").out == ended.out
    assert_refused(run("weights", "--backbone=small", "--size=64", "--sha256=000"), "sha256: expected 000, got [0-9a-f]{64}; the file is another")


def test_files_that_do_not_fit_are_told_in_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"conv1.weight": np.zeros((64, 3, 3, 3), np.float32)}, path)
    ended = run("weights", "--backbone=resnet50", f"--source={path}")
    assert_refused(ended, r"does not hold the weights of resnet50: 264 of 265 names are missing: bn1.weight, .*"
                   r"; 1 of 265 arrays have another shape: conv1.weight is \[64, 3, 3, 3\] and not \[64, 3, 7, 7\]")  # fmt: skip


@pytest.mark.parametrize(("given", "message"), [
    (("--backbone=resnet18",), "backbone: expected one of .*resnet50.* got 'resnet18'"),
    ((), "backbone: expected one of .* got None"),
    (("--backbone=dinov2_vits14", "--size=224", "--last_stride=16"), r"last_stride: expected one of \(14,\), got 16"),
    (("--backbone=dinov2_vits14", "--size=220"), "size: expected a multiple of 14, 32 or more, got 220"),
    (("--backbone=clip_vitb16",), "clip_vitb16 is not installed as a package; give config.weights a file"),
    (("--backbone=small", "more"), "unknown arguments"),
])  # fmt: skip
def test_what_cannot_be_is_refused(given, message):
    assert_refused(run("weights", *given), message)


def test_operations_are_those_of_the_products():
    """A dense layer of 5 x 7 on 3 rows: 2 x 3 x 5 x 7."""
    import flax.linen as nn

    from experiments.weights import operations

    module = nn.Conv(7, (1, 1), use_bias=False)
    variables = {"params": {"kernel": jax.ShapeDtypeStruct((1, 1, 3, 7), jnp.float32)}}
    assert operations(module, variables, 4) == 2 * 16 * 3 * 7


def test_a_tap_that_is_not_finite_is_named():
    import types

    from experiments.weights import show_forward
    from lcrf_jax.nets.network import BACKBONES

    module = types.SimpleNamespace(apply=lambda variables, x: {"s32": x / 0})
    with pytest.raises(ValueError, match="s32: not all numbers are finite; the weights are of no use"):
        show_forward(BACKBONES["small"], module, {}, 32)
