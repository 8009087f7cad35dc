"""A small VOCdevkit in the true layout: JPEG photographs, palette masks with void borders, XML, lists."""

import numpy as np
import reference
from PIL import Image

from lcrf_jax.data.sources.devkit import CLASSES
from lcrf_jax.pictures.palette import palette, save_index_png

SIZES = {"train": 4, "aug": 4, "val": 3, "test": 2}
SHOWN = ("cat", "dog", "person", "car")
OBJECT = """  <object>
    <name>{name}</name>
    <pose>Left</pose>
    <truncated>0</truncated>
    <difficult>{difficult}</difficult>
    <bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>
"""


def annotation(name, size, objects):
    """XML as the kit has it; objects are (class, left, top, right, bottom)."""
    body = "".join(
        OBJECT.format(name=cls, left=left, top=top, right=right, bottom=bottom, difficult=int(cls == "person"))
        for cls, left, top, right, bottom in objects
    )
    return (
        f"<annotation>\n  <folder>VOC2012</folder>\n  <filename>{name}.jpg</filename>\n"
        f"  <size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>\n"
        f"  <segmented>1</segmented>\n{body}</annotation>\n"
    )


def picture(seed, size):
    """(image, mask, objects): one or two rectangles of the colours of their classes on a smooth ground."""
    image = reference.smooth_image(seed, *size).astype(np.uint8)
    mask, objects = np.zeros(size, np.uint8), []
    for at in range(1 + seed % 2):
        name = SHOWN[(seed + at) % len(SHOWN)]
        top, left = 6 + 2 * at, 8 + at * size[1] // 2
        bottom, right = size[0] - 10, left + size[1] // 3
        image[top:bottom, left:right] = image[top:bottom, left:right] // 4 + palette(21)[CLASSES.index(name)] // 2 + 60
        mask[top - 1 : bottom + 1, left - 1 : right + 1] = 255
        mask[top:bottom, left:right] = CLASSES.index(name)
        objects.append((name, left + 1, top + 1, right, bottom))
    return image, mask, objects


def write_devkit(folder, sizes=SIZES, lists=True):
    """VOCdevkit in a folder; with `lists` of False the list of train_aug is left out. Returns its path."""
    root = folder / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "Annotations", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    names, seed = {}, 0
    for group, count in sizes.items():
        names[group] = [f"20{7 + at % 4:02}_{1000 * list(sizes).index(group) + at:06}" for at in range(count)]
        for name in names[group]:
            size = (60 + 4 * (seed % 3), 80) if seed % 2 else (80, 60)
            image, mask, objects = picture(seed, size)
            Image.fromarray(image).save(root / "JPEGImages" / f"{name}.jpg", quality=95)
            seed += 1
            if group == "test":
                continue
            (root / "Annotations" / f"{name}.xml").write_text(annotation(name, size, objects))
            if group != "aug":
                save_index_png(root / "SegmentationClass" / f"{name}.png", mask)
            Image.fromarray(mask).save(root / "SegmentationClassAug" / f"{name}.png")
    listed = {"train": names["train"], "val": names["val"], "trainval": names["train"] + names["val"], "test": names["test"]}
    for split, ids in listed.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    if lists:
        lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in names["train"] + names["aug"]]
        (root / "ImageSets" / "Segmentation" / "train_aug.txt").write_text("".join(lines))
    return root.parent
