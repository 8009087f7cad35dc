"""Masks among photographs, by their names: a problem in training, left out of predictions; and which mask is whose."""

import os

import numpy as np
import pytest
from PIL import Image

from experiments import prediction_plan
from lcrf_jax.data.files import names as words
from lcrf_jax.data.files.mask_names import masks_among
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.listing import scan_folder


def save(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((6, 8), np.uint8)).save(path)


def predicted(folder, out):
    planned = prediction_plan.planned_outputs([str(folder)], out, overlays=False, probabilities=False)
    return [os.path.relpath(path, folder) for path, _ in planned]


def tagged(root, *names):
    (root / "tags.csv").write_text("image,tags\n" + "".join(f"{name},{('ring', '')[at % 2]}\n" for at, name in enumerate(names)))
    (root / "classes.txt").write_text("background\nring\n")


@pytest.mark.parametrize("mask", ["{}_mask", "{}_mask_1", "{}_masks", "{}_label", "{}-gt", "{}_seg", "{} groundtruth", "mask_{}", "{}_MASK"])
def test_masks_beside_their_photographs(tmp_path, mask, capsys):
    photographs = [f"{name}/{name} ({at}).png" for name in ("benign", "normal") for at in (1, 2)]
    masks = [os.path.join(os.path.dirname(name), mask.format(os.path.basename(name)[:-4]) + ".png") for name in photographs]
    save(tmp_path, *photographs, *masks)
    with pytest.raises(ValueError, match="4 pictures have the names of photographs beside them and a word for masks") as told:
        FolderSource(tmp_path, "train")
    assert str(told.value).endswith("to " + str(tmp_path / "masks" / "benign" / "benign (1).png") + ", else rename them")
    assert predicted(tmp_path, tmp_path / "out") == photographs
    assert "4 masks beside their photographs are left out (benign/" in capsys.readouterr().out
    for photograph, path in zip(photographs, masks, strict=True):
        (tmp_path / "masks" / photograph).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).rename(tmp_path / "masks" / photograph)
    (tmp_path / "classes.txt").write_text("background\nbenign\nnormal\n")
    assert not scan_folder(tmp_path).problems and len(scan_folder(tmp_path).masks) == 4


@pytest.mark.parametrize("name", ["masks", "Mask", "labels", "annotations", "ground_truth", "GroundTruth", "gt", "seg", "segmentations",
                                  "SegmentationClass", "Segmentation masks", "masks_v2", "lung_masks", "SegmentationClassRaw"])  # fmt: skip
def test_folders_of_masks_at_any_depth(tmp_path, name, capsys):
    photographs = [f"{kind}/images/{kind}-{at}.jpg" for kind in ("COVID", "Normal") for at in range(3)]
    masks = [f"{kind}/{name}/{kind}-{at}.png" for kind in ("COVID", "Normal") for at in range(3)]
    save(tmp_path, *photographs, *masks)
    with pytest.raises(ValueError) as told:
        FolderSource(tmp_path, "train")
    assert f"the folder 'COVID/{name}' holds 3 pictures with the names of photographs; if these are masks, move them, " in str(told.value)
    assert f"COVID/{name}/COVID-0.png to {tmp_path / 'masks' / 'COVID' / 'images' / 'COVID-0.png'}, else" in str(told.value)
    assert predicted(tmp_path, tmp_path / "out") == photographs
    assert f"COVID/{name}/ holds masks (3 with the names of photographs) and is left out" in capsys.readouterr().out
    tagged(tmp_path, *photographs)
    assert len(scan_folder(tmp_path).problems) == 2  # asked for, as there is no folder of masks
    save(tmp_path, "masks/COVID/images/COVID-0.png")
    assert not scan_folder(tmp_path).problems  # they have no tags: nothing is trained on them
    tagged(tmp_path, *photographs, masks[0])
    assert len(scan_folder(tmp_path).problems) == 1


def test_classes_that_are_named_like_masks_are_photographs():
    for pictures in (
        ["mask/a1.jpg", "mask/a2.jpg", "cat/b1.jpg"],  # no name in common
        ["with_mask/1.jpg", "without_mask/1.jpg"],
        ["gas mask/1.jpg", "cat/1.jpg", "dog/1.jpg"],  # numbered in each folder, and no format of masks
        ["cat/bigmask.jpg", "cat/big.jpg", "cat/ski mask.jpg"],
        ["masks/a.png", "masks/b.png"],
        ["label/1.png", "label/2.png", "label/3.png", "cat/1.png"],
    ):
        assert masks_among(pictures) == {}, pictures
    save_as = masks_among(["x/images/1.png", "y/images/1.png", "x/masks/1.png", "y/masks/1_mask.png"])
    assert save_as == {"x/masks": {"x/masks/1.png": "x/images/1.png"}, "y/masks": {"y/masks/1_mask.png": "y/images/1.png"}}


def test_prediction_leaves_out_what_training_does(tmp_path, capsys):
    photographs = [f"ring/ring{at}.jpg" for at in range(3)]
    save(tmp_path, *photographs, *(f"masks/ring/ring{at}.png" for at in range(3)))
    assert predicted(tmp_path, tmp_path / "out") == photographs
    assert "masks/ holds masks (3 with the names of photographs) and is left out" in capsys.readouterr().out
    (tmp_path / "masks").rename(tmp_path / "labels")
    tagged(tmp_path, *photographs)
    assert list(scan_folder(tmp_path, mask_folder="labels").images) == predicted(tmp_path, tmp_path / "out") == photographs
    pattern = [f"{tmp_path}/*/*/*.png"]  # what is asked for by its name alone is taken
    assert len(prediction_plan.planned_outputs(pattern, tmp_path / "out", overlays=False, probabilities=False)) == 3


@pytest.mark.parametrize("name", ["areas", "png", "painted/by hand"])
def test_prediction_knows_the_folder_of_masks_that_the_run_was_trained_with(tmp_path, capsys, name):
    """Names alone do not tell it: photographs may lie in such a folder elsewhere."""
    folder, out, data = tmp_path / "data", tmp_path / "out", {"root": str(tmp_path / "data"), "options": {"mask_folder": name}}
    save(folder, "a.jpg", "x/b.jpg", f"{name}/a.png", f"{name}/x/b.png")

    def planned(*patterns, data=data):
        found = prediction_plan.planned_outputs(list(map(str, patterns)), out, overlays=False, probabilities=False, data=data)
        return sorted(path.relative_to(folder).as_posix() for path, _ in found)

    for pattern in (folder, tmp_path, f"{folder}/**/*"):
        assert planned(pattern) == ["a.jpg", "x/b.jpg"], pattern
        assert name in capsys.readouterr().out
    assert len(planned(folder / name)) == 2  # what is asked for by its name alone is taken
    assert len(planned(folder, data={"root": "/elsewhere", "options": {"mask_folder": name}})) == 4
    tagged(folder, "a.jpg", "x/b.jpg")
    assert planned(folder, data={"root": "/moved", "options": {"mask_folder": name}}) == ["a.jpg", "x/b.jpg"]
    assert planned(folder, data={"root": None, "options": {}}) == planned(folder, data={}) != ["a.jpg", "x/b.jpg"]


def test_one_list_of_words_for_masks():
    for word in words.MASK_WORDS:
        assert word in words.PLACES and masks_among(["images/a.png", f"{word}/a.png"]) == {word: {f"{word}/a.png": "images/a.png"}}


@pytest.mark.parametrize("image, mask", [("data/photos/a0.jpg", "a0.png"), ("images/a0.jpg", "val/a0.png"), ("a0.jpg", "a0.jpg.png"),
                                         ("images/a0.jpg", "images/A0.JPG.png"), ("x/y/a0.jpg", "gt/deep/A0.tif")])  # fmt: skip
def test_a_name_that_one_photograph_and_one_mask_have_is_enough(tmp_path, image, mask):
    save(tmp_path, image, f"masks/{mask}", "x/b.jpg")
    tagged(tmp_path, image, "x/b.jpg")
    found = scan_folder(tmp_path)
    assert found.masks == {image: tmp_path / "masks" / mask} and not found.problems


def test_a_name_that_several_have_is_told_with_its_place(tmp_path):
    save(tmp_path, "data/x/a0.jpg", "data/y/a0.jpg", "masks/a0.png")
    tagged(tmp_path, "data/x/a0.jpg")  # the other one, which has no tags, might be meant
    [line] = scan_folder(tmp_path).problems
    assert line.endswith(f"a0.png may be the mask of data/x/a0.jpg: for data/x/a0.jpg put it at {tmp_path / 'masks' / 'data' / 'x' / 'a0.png'}")
    save(tmp_path, "b.jpg", "masks/b.png")
    tagged(tmp_path, "data/x/a0.jpg", "data/y/a0.jpg", "b.jpg")
    found = scan_folder(tmp_path)
    assert len(found.masks) == 1 and not found.problems
    assert "a0.png may be the mask of data/x/a0.jpg, data/y/a0.jpg: for data/x/a0.jpg put it at" in found.not_taken


@pytest.mark.parametrize("end", ["jpg", "webp", "pbm"])
def test_masks_of_lists_are_in_formats_that_are_exact(tmp_path, end):
    save(tmp_path, "images/a.png", "images/b.png")
    (tmp_path / "gt").mkdir()
    (tmp_path / "gt" / f"a.{end}").touch()
    tagged(tmp_path, "a", "b")
    (tmp_path / "val.txt").write_text(f"images/a.png gt/a.{end}\n")
    with pytest.raises(ValueError, match=f"val.txt, line 1: the mask .*a.{end} is in a format that does not keep labels exact; save masks as PNG"):
        FolderSource(tmp_path, "val", masks=True)


def test_a_folder_in_the_place_of_a_mask_or_a_photograph_is_told(tmp_path):
    tagged(tmp_path, "a.png", "b.png")
    save(tmp_path, "a.png", "b.png", "masks/a.png")
    (tmp_path / "masks/b.png").mkdir()
    (tmp_path / "c.jpg").mkdir()
    found = scan_folder(tmp_path)
    assert list(found.masks) == ["a.png"]
    assert f"{tmp_path / 'masks'}: 1 folders have names of masks and are none (b.png); put the file in its place" in found.not_taken
    assert "folders with names of photographs, which are none: c.jpg" in found.not_taken
