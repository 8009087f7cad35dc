"""The models that come with the package, on photographs that come with scikit-image."""

import numpy as np
import pytest

import lcrf_jax
from lcrf_jax.runfolder.compact import SHIPPED, shipped_models


def test_the_models_are_small_and_named():
    assert shipped_models() == ("animals",)
    assert all(path.stat().st_size < 3e6 for path in SHIPPED.glob("*.npz"))
    with pytest.raises(FileNotFoundError, match="no model of this name comes with the package .*animals.*did you mean 'animals'"):
        lcrf_jax.load("animal")


@pytest.mark.slow
def test_a_cat_and_a_person_are_found():
    data, model = pytest.importorskip("skimage.data"), lcrf_jax.load("animals")
    assert model.class_names == ("background", "cat", "cow", "dog", "horse", "person", "sheep")
    cat = model.segment(data.chelsea()).labels == model.class_names.index("cat")
    assert cat[100:200, 100:300].mean() > 0.95 and cat[:120, -60:].mean() < 0.1  # the face, and the shelf behind it
    person = model.segment(data.astronaut()).labels == model.class_names.index("person")
    assert person[60:160, 180:280].mean() > 0.9 and person[:200, 330:].mean() < 0.1  # her face, and the rocket
    assert np.isin(model.segment(data.astronaut(), crf=False).labels, (0, 5)).mean() > 0.95
