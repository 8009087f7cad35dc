"""The models that come with the package, on photographs that come with scikit-image."""

import numpy as np
import pytest
from PIL import Image

import lcrf_jax
from lcrf_jax.predict.model import as_rgb
from lcrf_jax.runfolder.compact import SHIPPED, shipped_models


def test_the_models_are_small_and_named():
    assert shipped_models() == ("animals",)
    assert all(path.stat().st_size < 3e6 for path in SHIPPED.glob("*.npz"))
    with pytest.raises(FileNotFoundError, match="no model of this name comes with the package .*animals.*did you mean 'animals'"):
        lcrf_jax.load("animal")
    with pytest.raises(FileNotFoundError, match="~nobody-of-this-name/run: there is no home folder"):
        lcrf_jax.load("~nobody-of-this-name/run")


@pytest.mark.parametrize(("image", "got"), [
    (np.zeros((0, 50), np.uint8), r"\[0, 50\]"), (np.zeros((40, 0), np.uint8), r"\[40, 0\]"),
    (np.zeros((0, 50, 3), np.uint8), r"\[0, 50, 3\]"), (Image.new("RGB", (0, 5)), "one of 0 x 5"), (Image.new("L", (5, 0)), "one of 5 x 0"),
])
def test_a_photograph_without_pixels_is_refused(image, got):
    with pytest.raises(ValueError, match=f"expected an image .*, got {got}; it has no pixels: look at how it was cut"):
        as_rgb(image)


@pytest.mark.slow
def test_a_cat_and_a_person_are_found():
    data, model = pytest.importorskip("skimage.data"), lcrf_jax.load("animals")
    assert model.class_names == ("background", "cat", "cow", "dog", "horse", "person", "sheep")
    cat = model.segment(data.chelsea()).labels == model.class_names.index("cat")
    assert cat[100:200, 100:300].mean() > 0.95 and cat[:120, -60:].mean() < 0.1  # the face, and the shelf behind it, above
    person = model.segment(data.astronaut()).labels == model.class_names.index("person")
    assert person[60:160, 180:280].mean() > 0.9 and person[:200, 330:].mean() < 0.1  # her face, and the rocket
    assert np.isin(model.segment(data.astronaut(), crf=False).labels, (0, 5)).mean() > 0.95
