r"""Write the network of a trained run as ONNX, in a Python environment of its own.

    python -m venv onnx-env
    onnx-env/bin/pip install -r experiments/onnx_requirements.txt
    onnx-env/bin/python -m experiments.export_onnx --checkpoint=RUN --out=model.onnx

jax2onnx needs an older orbax than training does, so that the two cannot share an environment; run the third line in the folder
of this project. The model takes square photographs, [batch, SIZE, SIZE, 3] float32 RGB in 0..255 (bicubic, antialiased), and gives
probabilities on the network's grid, [batch, g, g, classes], to be enlarged bilinearly; neither resizing nor the dense CRF is in it.
The batch is open. --size is one of the run's input sizes, the first by default. Beside it are model.onnx.json with the classes, the
colours and SIZE, and model.onnx.data with the larger weights, which belongs to it. The program runs the model in onnxruntime and
compares it with JAX; the last line is the largest difference.
"""

import json
import pathlib
import unittest.mock

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnxruntime
from absl import app, flags, logging

from lcrf_jax.nets import efficientnet_lite
from lcrf_jax.nets.efficientnet_lite import same_padding
from lcrf_jax.pictures.palette import palette
from lcrf_jax.predict.model import trained
from lcrf_jax.predict.segmenter import make_segmenter

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run.")
_OUT = flags.DEFINE_string("out", None, "File to write.")
_SIZE = flags.DEFINE_integer("size", None, "Side of the network's square input in pixels.", lower_bound=32)
TOLERANCE = 1e-4


def grouped_convolution(x, kernel, *, stride=1, dilation=1):
    """`lcrf_jax.nets.efficientnet_lite.depthwise_conv` as one operation: XLA is slow at it, ONNX runtimes are not."""
    padding = [same_padding(size, kernel.shape[0], stride, dilation) for size in x.shape[1:3]]
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (stride, stride), padding, rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip


def main(argv):
    """Convert, write, run and compare."""
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        raise app.UsageError(f"arguments that are no flags: {argv[1:]}")
    description, params = trained(_CHECKPOINT.value)
    inference, out = description["inference"], pathlib.Path(_OUT.value)
    if inference.get("output") == "class_maps":
        raise SystemExit("error: class maps have no network of their own to convert; give a run of another method")
    segmenter = make_segmenter({**description, "inference": {**inference, "mirror": False}}, params)
    size = _SIZE.value or segmenter.input_sizes[0]

    def probabilities(images):
        log_probs = segmenter.network_log_probs(images)
        if inference["mirror"]:  # one after the other: jax2onnx loses count of a batch that is put together
            mirrored = segmenter.network_log_probs(images[:, :, ::-1])
            log_probs = (log_probs + mirrored[:, :, ::-1]) / 2
        return jax.nn.softmax(log_probs, axis=-1)

    out.parent.mkdir(parents=True, exist_ok=True)
    with unittest.mock.patch.object(efficientnet_lite, "depthwise_conv", grouped_convolution):
        jax2onnx.to_onnx(
            probabilities, inputs=[jax.ShapeDtypeStruct(("batch", size, size, 3), jnp.float32)], model_name=out.stem,
            input_names=["images"], output_names=["probabilities"], return_mode="file", output_path=str(out),
        )  # fmt: skip
    facts = {"class_names": description["class_names"], "palette": palette(len(segmenter.class_names)).tolist(), "size": size}
    out.with_name(f"{out.name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    whole = make_segmenter(description, params)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (1, 3):
        images = np.float32(np.random.default_rng(batch).integers(0, 256, (batch, size, size, 3)))
        [result] = session.run(None, {session.get_inputs()[0].name: images})
        expected = np.exp(np.asarray(whole.network_log_probs(images)))
        if result.shape != expected.shape:
            raise SystemExit(f"error: onnxruntime gives {list(result.shape)}, JAX {list(expected.shape)}")
        worst = max(worst, float(np.abs(result - expected).max()))
    written = sum(path.stat().st_size for path in (out, out.with_name(f"{out.name}.data")) if path.exists())
    print(f"{out}: {written / 1e6:.1f} MB, [batch, {size}, {size}, 3] -> [batch, {', '.join(map(str, expected.shape[1:]))}]")
    print(f"largest difference of a probability between onnxruntime and JAX: {worst:.1e}")
    if not worst < TOLERANCE:
        raise SystemExit(f"error: expected less than {TOLERANCE:.0e}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "out"])
    app.run(main)
