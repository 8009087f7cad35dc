"""Options of data: each kind has its own."""

import pytest

from lcrf_jax.data.opening import SOURCES, open_source
from lcrf_jax.data.options import check_options, known_options
from lcrf_jax.machine.errors import SettingError


def test_the_options_of_each_kind():
    assert set(known_options("textures")) == {"scene", "seed", "size", "num_train", "num_val"}
    assert {"tags", "classes", "mask_folder", "colours", "val_share", "split_seed"} < set(known_options("folder"))
    assert {"name", "image", "labels", "mask", "mask_meaning"} == set(known_options("tfds"))
    for kind in SOURCES:
        assert not {"root", "split", "masks", "lists"} & set(known_options(kind))


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("textures", {"nonsense_option": 3}, r"'textures' does not know one of \['nonsense_option'\]: it has seed, size, num_train"),
    ("textures", {"num_trian": 3}, r"\['num_trian'\].*did you mean 'num_train'\?"),
    ("textures", {"val_share": 0.5}, "val_share is an option of 'folder'"),
    ("voc", {"val_share": 0.5}, "'voc' does not know one of"),
    ("folder", {"name": "oxford"}, "name is an option of 'tfds'"),
    ("folder", {"lists": ("train",)}, r"'folder' does not know one of \['lists'\]"),
    ("tfds", {"label": "x"}, "did you mean 'labels'"),
])
def test_others_are_refused_with_the_nearest_or_the_kind_that_has_them(kind, options, message):
    with pytest.raises(SettingError, match=message):
        check_options(kind, options)
    with pytest.raises(SettingError, match=message):  # before the folder is looked at
        open_source(kind, "train", root="nowhere", **options)


def test_a_kind_that_there_is_not():
    with pytest.raises(ValueError, match=r"unknown source 'folders': expected one of .*; did you mean 'folder'\?"):
        open_source("folders", "train")
