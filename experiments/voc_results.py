r"""Pack masks for the evaluation server of PASCAL VOC, in its layout.

    python -m experiments.predict --checkpoint=RUN --images=VOCdevkit/VOC2012/JPEGImages \
        --list=VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt --out=masks [--crf]
    python -m experiments.voc_results --masks=masks --list=VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt --out=results.tar.gz

The archive holds results/VOC2012/Segmentation/comp6_test_cls/<id>.png for every image of the list. Each mask is opened: a
missing one, another size than its photograph, or a label above 20 is an error that names it. comp6 is for methods that use
any data but the test images, as pretrained weights are; --competition=comp5 is for methods trained on VOC 2012 alone.
"""

import contextlib
import gzip
import io
import os
import pathlib
import tarfile

import numpy as np
from absl import flags

from lcrf_jax.data.example import VOID
from lcrf_jax.data.files.images import image_size
from lcrf_jax.data.files.masks import read_mask
from lcrf_jax.data.files.tags import some
from lcrf_jax.data.sources.devkit import CLASSES, listed
from lcrf_jax.machine.files import parsed_json
from lcrf_jax.machine.locks import own_folder
from lcrf_jax.machine.progress import image_progress, say
from lcrf_jax.pictures.palette import index_picture

from . import reporting
from .predictions import SETTINGS_FILE

_MASKS = flags.DEFINE_string("masks", None, "Folder that experiments.predict has written.")
_LIST = flags.DEFINE_string("list", None, "List of the images, such as test.txt of the development kit.")
_OUT = flags.DEFINE_string("out", None, "Archive to write, .tar.gz or .tgz.")
_COMPETITION = flags.DEFINE_enum("competition", "comp6", ("comp5", "comp6"), "What the method was trained on.")


def main(argv):
    """Check every mask and write the archive."""
    reporting.no_more_arguments(argv)
    masks, out = pathlib.Path(_MASKS.value), pathlib.Path(_OUT.value)
    if not out.name.endswith((".tar.gz", ".tgz")):
        raise ValueError(f"--out: expected a name that ends with .tar.gz or .tgz, got {out.name!r}")
    names = listed(pathlib.Path(_LIST.value))
    _check_classes(masks)
    photographs = _photographs(masks)
    missing = [name for name in names if not (masks / f"{name}.png").is_file()]
    if missing:
        raise FileNotFoundError(f"{masks} has no mask of {some(missing)} ({len(missing)} of {len(names)}); run predict with the same --list")
    folder = f"results/VOC2012/Segmentation/{_COMPETITION.value}_{pathlib.Path(_LIST.value).stem}_cls"
    out.parent.mkdir(parents=True, exist_ok=True)
    with own_folder(out.parent, ".unfinished-") as unfinished, image_progress("masks", len(names)) as done:
        with open(unfinished / out.name, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed, \
                tarfile.open(fileobj=packed, mode="w") as archive:  # fmt: skip
            for name in names:
                content = _checked(masks / f"{name}.png", photographs.get(name))
                entry = tarfile.TarInfo(f"{folder}/{name}.png")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
                done(1)
        os.replace(unfinished / out.name, out)
    say(f"{len(names)} masks in {folder}")
    say(str(out))


def _check_classes(masks):
    """The masks must be of the 21 classes; predict has left word of that."""
    path = masks / SETTINGS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give --masks the folder that experiments.predict has written")
    try:
        classes = list(map(str, parsed_json(path.read_text(encoding="utf-8"))["class_names"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); restore it from a copy, or predict anew with --overwrite") from error
    if tuple(classes) != CLASSES:
        raise ValueError(f"{masks} has masks of other classes than VOC 2012: {', '.join(classes)}")


def _photographs(masks):
    """The photograph of each mask, as predict has written down."""
    records = {}
    for path in masks.glob("predictions*.jsonl"):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut short
                record = parsed_json(line)
                records[pathlib.Path(record["mask"]).stem] = pathlib.Path(record["image"])
    return records


def _checked(path, photograph):
    """A mask as a palette PNG."""
    mask = read_mask(path, len(CLASSES))
    if (mask == VOID).any():
        raise ValueError(f"{path}: label {VOID} is no class; a prediction has one for every pixel")
    if photograph is not None and photograph.is_file() and image_size(photograph) != mask.shape:
        size = "x".join(map(str, image_size(photograph)[::-1]))
        raise ValueError(f"{path} is {mask.shape[1]}x{mask.shape[0]} and its photograph {photograph} {size} pixels; predict it anew")
    content = io.BytesIO()
    index_picture(np.asarray(mask)).save(content, format="PNG")
    return content.getvalue()


if __name__ == "__main__":
    flags.mark_flags_as_required(["masks", "list", "out"])
    reporting.run(main)
