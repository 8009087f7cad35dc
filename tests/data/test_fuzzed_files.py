"""Files that are damaged at random: each is read, or refused by an error that names the file. Nothing else is raised."""

import io
import json
import pathlib
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from lcrf_jax.data.files.images import image_size, read_image
from lcrf_jax.data.files.masks import read_colours, read_mask
from lcrf_jax.data.files.tags import read_classes, read_tag_file
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.lists import read_lists

pytestmark = pytest.mark.slow
COMMON = settings(
    derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)


def saved(array, form, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def samples():
    """One small file of each kind."""
    forms = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF", "ppm": "PPM", "tga": "TGA",
             "qoi": "QOI", "pcx": "PCX", "sgi": "SGI", "dds": "DDS"}  # fmt: skip
    forms |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    forms |= {"avif": "AVIF"} if features.check("avif") else {}
    files = {f"a.{end}": saved(RGB, form) for end, form in forms.items()}
    files["deep.png"] = saved(RGB[..., 0].astype(np.uint16) * 16, "PNG")
    files["deep.tif"] = saved(RGB[..., 0].astype(np.uint16) * 16, "TIFF", compression="tiff_lzw")
    files["float.tif"] = saved(RGB[..., 0] / np.float32(255), "TIFF")
    files["turned.tif"] = saved(RGB, "TIFF", tiffinfo={274: 6})
    exif = Image.Exif()
    exif[0x0112] = 6
    files["turned.jpg"] = saved(RGB, "JPEG", exif=exif)
    frames = [Image.fromarray(RGB[:4, :4])]
    files["pages.tif"] = saved(RGB, "TIFF", save_all=True, append_images=frames)
    files["moving.webp"] = saved(RGB, "WEBP", save_all=True, append_images=[Image.fromarray(RGB[::-1])])
    return files


FILES = samples()
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 10**6), st.integers(0, 255)),
        st.tuples(st.just("cut"), st.integers(0, 10**6), st.just(0)),
        st.tuples(st.just("repeat"), st.integers(0, 10**6), st.integers(1, 40)),
        st.tuples(st.just("drop"), st.integers(0, 10**6), st.integers(1, 40)),
    ),
    max_size=6,
)


def changed(data, changes):
    data = bytearray(data)
    for kind, at, value in changes:
        at %= len(data) + 1
        if kind == "set" and at < len(data):
            data[at] = value
        elif kind == "cut":
            del data[at:]
        elif kind == "repeat":
            data[at:at] = data[at : at + value]
        elif kind == "drop":
            del data[at : at + value]
    return bytes(data)


def refusal(read, path):
    """What reading returns, or None if it is refused as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about damage
        try:
            return read(path)
        except (ValueError, FileNotFoundError) as error:
            assert str(path) in str(error), f"does not name the file: {error!r}"
            assert type(error) in (ValueError, FileNotFoundError) or type(error).__module__.startswith("lcrf_jax"), repr(error)
            return None


@settings(COMMON, max_examples=1000)
@given(name=st.sampled_from(sorted(FILES)), changes=CHANGES)
def test_damaged_photographs(tmp_path, name, changes):
    path = tmp_path / name
    path.write_bytes(changed(FILES[name], changes))
    image, size = refusal(read_image, path), refusal(image_size, path)
    if image is not None:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
        assert size is not None
    if not changes:
        assert image.shape[:2] == size


@settings(COMMON, max_examples=400)
@given(mode=st.sampled_from(["L", "P", "1", "I;16", "RGB", "LA"]), end=st.sampled_from(["png", "tif", "bmp", "gif"]), changes=CHANGES,
       colours=st.booleans())  # fmt: skip
def test_damaged_masks(tmp_path, mode, end, changes, colours):
    labels = np.random.default_rng(1).integers(0, 3, (6, 5)).astype(np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(labels) if mode == "I;16" else Image.fromarray(labels).convert(mode)
    path = tmp_path / f"mask.{end}"
    try:
        image.save(path)
    except (OSError, KeyError):
        return  # this format has no such mode
    path.write_bytes(changed(path.read_bytes(), changes))
    known = {(0, 0, 0): 0, (1, 1, 1): 1, (2, 2, 2): 2} if colours else None
    mask = refusal(lambda path: read_mask(path, 3, colours=known), path)
    if mask is not None:
        assert mask.dtype == np.uint8 and mask.ndim == 2 and set(np.unique(mask)) <= {0, 1, 2, 255}
    if not changes and mode in ("L", "I;16") and end != "gif" and mask is not None:
        np.testing.assert_array_equal(mask, labels)


TEXTS = {
    "tags.csv": b"image,tags\na.png,ring;star\nbarn/b.png,\nc,ring\n",
    "semicolons.csv": b"sep=;\nimage;tags\na.png;ring,star\nc;\"ring;star\"\n",
    "tags.tsv": b"image\ttags\na.png\tring|star\n",
    "tags.json": b'{"a.png": ["ring", "star"], "c": []}',
    "tags.jsonl": b'{"image": "a.png", "tags": ["ring"]}\n{"image": "c", "tags": "ring;star"}\n',
    "classes.txt": b"background\nring\nstar\n",
    "colours.csv": b"class,colour\nbackground,#000000\nring,#ff0000\nvoid,#ffffff\n",
    "val.txt": b"/a.png /masks/a.png\nbarn/b\n",
}
TEXT_CHANGES = st.lists(
    st.tuples(
        st.integers(0, 300), st.integers(0, 12),
        st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"\n", b"\r\n", b",", b";", b"\t", b"\0", b"\xef\xbb\xbf", b"\xff\xfe",
                                                          b"[", b"{", b"}", b"\\", b"..", b"/", b" ", b"1e999", b"null", b"\xc3\xa9"])),
    ), max_size=5,
)  # fmt: skip


@settings(COMMON, max_examples=1000)
@given(name=st.sampled_from(sorted(TEXTS)), changes=TEXT_CHANGES)
def test_damaged_tags_lists_and_classes(tmp_path, name, changes):
    data = TEXTS[name]
    for at, dropped, added in changes:
        at %= len(data) + 1
        data = data[:at] + added + data[at + dropped :]
    path = tmp_path / name
    path.write_bytes(data)
    read = {"classes.txt": read_classes, "colours.csv": lambda path: read_colours(path, ("background", "ring")),
            "val.txt": lambda path: read_lists(path.parent, ("val",))}.get(name, read_tag_file)  # fmt: skip
    found = refusal(read, path)
    assert found is not None or changes
    if read is read_tag_file and found is not None:
        for image, row in found.items():
            assert image and all(tag and tag == tag.strip() and "," not in tag for tag in row.tags), (image, row)


@settings(COMMON, max_examples=200)
@given(name=st.sampled_from(["tags.csv", "classes.txt", "val.txt", "colours.csv"]), changes=TEXT_CHANGES)
def test_folders_with_damaged_text(tmp_path_factory, name, changes):
    root = pathlib.Path(tmp_path_factory.getbasetemp()) / "fuzzed"
    for place in ("a.png", "barn/b.png", "c.png", "masks/a.png", "masks/c.png"):
        if not (root / place).exists():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(root / place)
    for other in ("tags.csv", "classes.txt", "val.txt"):
        (root / other).write_bytes(TEXTS[other])
    (root / "colours.csv").unlink(missing_ok=True)
    data = TEXTS[name]
    for at, dropped, added in changes:
        at %= len(data) + 1
        data = data[:at] + added + data[at + dropped :]
    (root / name).write_bytes(data)
    try:
        source = FolderSource(root, "train")
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), repr(error)
        assert str(root) in str(error) or "no photograph has a tag" in str(error), str(error)
        return
    assert len(source.tags) == len(source) and source.tags.shape[1] == len(source.class_names) >= 2
    json.dumps([source.names, source.class_names])
