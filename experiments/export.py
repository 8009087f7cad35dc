r"""Write a trained run as one file: one that needs JAX alone, or a small one of what was trained.

    python -m experiments.export --checkpoint=RUN --out=model.stablehlo
    python -m experiments.export --checkpoint=RUN --out=refined.stablehlo --crf --size=375x500

The file is a function from photographs, [batch, height, width, 3] uint8 RGB, to probabilities [batch, height, width, classes]
float32: bicubic squares, network, enlargement and, with --crf, mean field of the dense CRF. Batch, height and width are open; with
--crf height and width are those of --size, since the lattice has a static shape. One file serves CPU, GPU and TPU. To use it:

    import jax, numpy as np
    model = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
    labels = np.asarray(model.call(images)).argmax(-1)

    python -m experiments.export --checkpoint=RUN --out=model.npz --compact

writes decoder and tag classifier in float16, without the frozen backbone, for `lcrf_jax.load("model.npz")`.

Beside the first two, model.stablehlo.json says what the classes and colours are, what the network has learnt from, and which versions wrote
it. The program reads the file back, runs it and compares; the last line is the largest difference of a probability. The photographs
are not made smaller first, as predict does with those above --max_side. experiments/export_onnx.py writes ONNX.
"""

import hashlib
import json
import os

import jax
import numpy as np
from absl import flags

from lcrf_jax.data.files.images import MAX_PIXELS
from lcrf_jax.machine.files import at_home, naming
from lcrf_jax.machine.locks import own_folder
from lcrf_jax.machine.progress import say
from lcrf_jax.pictures.palette import palette
from lcrf_jax.predict.export import PLATFORMS, exported, image_function
from lcrf_jax.predict.model import trained
from lcrf_jax.runfolder.compact import load_compact, save_compact
from lcrf_jax.runfolder.description import library_versions
from lcrf_jax.runfolder.digests import params_digest

from . import reporting

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run, a file of a model, or the name of one that is shipped.")
_OUT = flags.DEFINE_string("out", None, "File to write; its description is written beside it, as OUT.json.")
_CRF = flags.DEFINE_bool("crf", False, "Refine by mean field of the dense CRF; needs --size.")
_SIZE = flags.DEFINE_string("size", None, "HEIGHTxWIDTH of the photographs in pixels; by default any.")
_COMPACT = flags.DEFINE_bool("compact", False, "Write what was trained alone, as .npz for lcrf_jax.load.")
_PLATFORMS = flags.DEFINE_list("platforms", list(PLATFORMS), "Where the file can run.")


def main(argv):
    """Export, write, read back, compare."""
    reporting.no_more_arguments(argv)
    size, out = parsed_size(_SIZE.value), _file_to_write()
    if _COMPACT.value:
        write_compact(_CHECKPOINT.value, out)
        return
    if _CRF.value and size is None:
        raise ValueError("--crf needs --size=HEIGHTxWIDTH: the lattice of the dense CRF has a static shape")
    description, params = trained(_CHECKPOINT.value)
    class_names = description["class_names"]
    function = image_function(description, params, crf=_CRF.value)
    try:
        content = exported(function, size=size, platforms=_PLATFORMS.value).serialize()
    except ImportError as error:
        raise ValueError(f"export needs flatbuffers ({error}): pip install '.[export]' in your clone") from error
    facts = {
        "input": f"uint8 [batch, {'height, width' if size is None else f'{size[0]}, {size[1]}'}, 3], RGB",
        "output": f"float32 [batch, height, width, {len(class_names)}], probabilities",
        "class_names": class_names, "palette": palette(len(class_names)).tolist(),
        "refined": _CRF.value, "platforms": _PLATFORMS.value, "supervision": description.get("supervision"),
        "network": description["network"], "inference": description["inference"],
        "params_sha256": params_digest(params), "sha256": hashlib.sha256(content).hexdigest(), "versions": library_versions(),
    }  # fmt: skip
    with naming(out), own_folder(out.parent, ".unfinished-") as unfinished:
        for path, data in ((out, content), (out.with_name(f"{out.name}.json"), (json.dumps(facts, indent=2) + "\n").encode())):
            (unfinished / path.name).write_bytes(data)
            os.replace(unfinished / path.name, path)
    say(f"{out}: {len(content) / 1e6:.1f} MB, {facts['input']} -> {facts['output']}; for {', '.join(_PLATFORMS.value)}")
    if not _runs_here():
        say("not compared: the file is not for the platform of this machine")
        return
    images = np.random.default_rng(0).integers(0, 256, (2, *(size or (120, 160)), 3), np.uint8)
    again = jax.export.deserialize(bytearray(out.read_bytes())).call(images)
    say(f"largest difference of a probability after reading it back: {np.abs(np.asarray(again) - jax.jit(function)(images)).max():.1e}")


def _file_to_write():
    """The file of --out, its folder made."""
    if not _OUT.value.strip():
        raise ValueError("--out: expected a file, got an empty name; is a variable not set?")
    out = at_home(_OUT.value)
    if out.is_dir():
        raise ValueError(f"--out={out} is a folder; name the file in it")
    with naming(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out={out}: {out.parent} cannot be written to; give another folder")
    return out


def write_compact(checkpoint, out):
    """Write the small file, read it back, and say what its float16 changes."""
    if out.suffix != ".npz" or _CRF.value or _SIZE.value:
        raise ValueError("--compact: expected --out=NAME.npz, without --crf and --size: the file holds what was trained, and who loads it chooses")
    description, params = trained(checkpoint)
    size = save_compact(out, description, params)
    images = np.random.default_rng(0).integers(0, 256, (2, 120, 160, 3), np.uint8)
    one, other = (jax.jit(image_function(*model, crf=False))(images) for model in ((description, params), load_compact(out)))
    say(f"{out}: {size / 1e6:.1f} MB; lcrf_jax.load({str(out)!r}) loads it with the backbone that is installed")
    say(f"largest difference of a probability after reading it back: {np.abs(np.asarray(one) - np.asarray(other)).max():.1e}")


def _runs_here():
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()) in _PLATFORMS.value


def parsed_size(text):
    """(height, width) of "375x500"; None for None."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise ValueError(f"--size: expected HEIGHTxWIDTH in pixels such as 375x500, got {text!r}")
    height, width = map(int, parts)
    if height * width > MAX_PIXELS:
        raise ValueError(f"--size: expected at most {MAX_PIXELS // 10**6} million pixels, as photographs may have, got {text!r}")
    return height, width


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "out"])
    reporting.run(main)
