r"""Write images of the embedded set as a folder of photographs with tags, to try the way of your own photographs.

    python -m experiments.example_folder --out=photos

FOLDER/images/*.jpg, FOLDER/tags.csv, and masks of a fifth of them in FOLDER/masks/*.png.
"""

import csv

from absl import flags
from PIL import Image

from lcrf_jax.data.opening import open_source
from lcrf_jax.machine.files import naming
from lcrf_jax.machine.progress import say
from lcrf_jax.pictures.palette import save_index_png

from . import reporting

_OUT = flags.DEFINE_string("out", None, "Folder to write; made if it is not there.")
_NUM = flags.DEFINE_integer("num", 60, "Number of images.", lower_bound=20)


def main(argv):
    """Write images, tags and masks."""
    reporting.no_more_arguments(argv)
    out = reporting.folder_to_write(_OUT.value)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty; give another folder, or remove it")
    with naming(out):
        write_folder(out)


def write_folder(out):
    """Write all of it."""
    for folder in ("images", "masks"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    source = open_source("textures", "train", masks=True, seed=0, num_train=_NUM.value)
    rows = [["image", "tags"]]
    for number in range(len(source)):
        example, name = source[number], f"{number:04}"
        Image.fromarray(example.image).save(out / "images" / f"{name}.jpg", quality=95)
        present = [label for label, tag in zip(source.class_names[1:], example.tags[1:], strict=True) if tag]
        rows.append([f"images/{name}.jpg", ";".join(present)])
        if number % 5 == 0:
            save_index_png(out / "masks" / f"{name}.png", example.mask)
    (out / "classes.txt").write_text("\n".join(source.class_names) + "\n", encoding="utf-8")
    with (out / "tags.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    say(f"{len(source)} images, tags.csv, classes.txt and {(len(source) + 4) // 5} masks in {out}")


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    reporting.run(main)
