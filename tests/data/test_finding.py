"""What is found below a folder, what is left out and told, and what is near to something that is missing."""

import os
import shutil
import socket

import numpy as np
import pytest
from PIL import Image, features

from experiments import prediction_plan
from lcrf_jax.data.files.finding import PhotographFinder, files_below, meant_path, nearest, not_taken
from lcrf_jax.data.files.images import extensions, is_photograph, read_image
from lcrf_jax.data.sources.folder import FolderSource
from lcrf_jax.data.sources.listing import scan_folder
from lcrf_jax.train import splits

CLASSES = "background\nring\nstar\n"
SYSTEM = ("@eaDir", "#recycle", "$RECYCLE.BIN", ".thumbnails", "__MACOSX", "System Volume Information", "lost+found")


def save(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), 10 * number, np.uint8)).save(path)


def tagged(root, *names):
    (root / "tags.csv").write_text("image,tags\n" + "".join(f"{name},{('ring', 'star')[at % 2]}\n" for at, name in enumerate(names)))
    (root / "classes.txt").write_text(CLASSES)


def predicted(folder, out):
    planned = prediction_plan.planned_outputs([str(folder)], out, overlays=False, probabilities=False)
    return [os.path.relpath(path, folder) for path, _ in planned]


@pytest.mark.parametrize("name", ["a.jpg", "a.jfif", "a.jpe", "a.JPEG", "a.webp", "a.jp2", "a.j2k", "a.avif", "a.bmp", "a.tif", "a.gif",
                                  "a.ppm", "a.tga", "a.qoi", "a.pcx", "a.sgi", "a.dds"])  # fmt: skip
def test_every_format_that_pillow_opens(tmp_path, name, capsys):
    if name.endswith("avif") and not features.check("avif") or name.endswith(("jp2", "j2k")) and not features.check("jpg_2000"):
        pytest.skip("this Pillow was built without it")
    save(tmp_path, name)
    tagged(tmp_path, "a")
    assert FolderSource(tmp_path, "train").names == (name,) and read_image(tmp_path / name).shape == (6, 8, 3)
    assert predicted(tmp_path, tmp_path / "out") == [name] and capsys.readouterr().out == ""


def test_formats_that_need_other_programs_or_have_no_pixels_are_not_read():
    assert not {".eps", ".pdf", ".wmf", ".h5", ".grib", ".mpg", ".svg", ".txt", ""} & set(extensions())
    assert is_photograph("x.JPEG") and not is_photograph("jpg")


def test_what_systems_leave_behind_is_no_photograph(tmp_path, capsys):
    save(tmp_path, "cat/1.png", "dog/2.png", "dog/#3.png", "dog/@4.png", *(f"{name}/9.png" for name in SYSTEM), "dog/@eaDir/2.png")
    for name in ("._1.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / "cat" / name).touch()
    found = scan_folder(tmp_path)
    assert found.class_names == ("background", "cat", "dog") and not found.problems
    assert found.images == ("cat/1.png", "dog/#3.png", "dog/2.png", "dog/@4.png")
    assert found.not_taken == ("folders of the system not entered: #recycle, $RECYCLE.BIN, .thumbnails, @eaDir, "
                               "System Volume Information, __MACOSX and 1 more")  # fmt: skip
    assert predicted(tmp_path, tmp_path / "out") == sorted(found.images) and "@eaDir" in capsys.readouterr().out


def test_files_that_are_not_taken_are_counted_by_their_kinds(tmp_path, capsys):
    save(tmp_path, "a.png", "b.png")
    for name in ("1.heic", "2.HEIC", "x/3.svg", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    tagged(tmp_path, "a", "b")
    expected = "4 files not taken: 2 .heic (install the package pillow-heif, or save them as JPEG), 1 without an extension, 1 .svg (drawings"
    line = scan_folder(tmp_path).not_taken
    assert sorted(line.split(", ")) == sorted(f"{expected}; save them as PNG)".split(", "))
    predicted(tmp_path, tmp_path / "out")
    assert "4 files not taken: 2 .heic" in capsys.readouterr().out
    splits.open_data({"method": "latent_crf", "data": {
        "kind": "folder", "root": str(tmp_path), "train_split": "train", "val_split": "", "options": {}}})  # fmt: skip
    assert capsys.readouterr().out.count("4 files not taken: 2 .heic") == 1
    tagged(tmp_path, "a", "1.heic")
    with pytest.raises(ValueError, match="no photograph '1.heic'; 1.heic is there, but .heic is not read: install the package pillow-heif"):
        FolderSource(tmp_path, "train", missing_images="error")


def test_hidden_photographs_are_told(tmp_path):
    save(tmp_path, "a.png", ".b.png", "._a.png")
    (tmp_path / ".c.jpg.icloud").touch()
    line = not_taken(files_below(tmp_path))
    assert line == "2 files not taken: 1 .icloud (not on this machine; download them), 1 hidden photographs"


def test_a_photograph_that_may_not_be_read(tmp_path, monkeypatch):
    def shut(*_, **__):
        raise PermissionError(13, "Permission denied")

    save(tmp_path, "a.png")
    monkeypatch.setattr(Image, "open", shut)
    with pytest.raises(ValueError, match=r"a.png may not be read \(Permission denied\); change its permissions"):
        read_image(tmp_path / "a.png")


def test_a_photograph_that_was_saved_in_a_format_that_is_not_read(tmp_path):
    save(tmp_path, "a02.jpg", "a11.jpg")
    (tmp_path / "a01.heic").touch()
    tagged(tmp_path, "a01.jpg", "a11.jpg")
    with pytest.raises(ValueError, match="no photograph 'a01.jpg'; a01.heic is there, but .heic is not read"):
        FolderSource(tmp_path, "train")


def test_a_folder_with_nothing_that_can_be_read_says_what_is_there(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no photographs .*\(1 file not taken: 1 .heic \(install the package"):
        scan_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no photographs .*\(1 file not taken: 1 .heic"):
        predicted(tmp_path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"--images: .*empty holds no photographs \(.jpg.*\), at any depth$"):
        predicted(tmp_path / "empty", tmp_path / "out")


def test_links_are_followed_by_training_masks_and_prediction_alike(tmp_path):
    away = tmp_path / "away"
    save(away, "photos/a.png", "photos/b.png", "masks/a.PNG", "masks/b.PNG")
    for name in ("a", "b"):
        Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(away / "masks" / f"{name}.PNG")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "photos").symlink_to(away / "photos")
    (folder / "masks").symlink_to(away / "masks")
    (folder / "again").symlink_to(folder)
    (away / "photos" / "up").symlink_to(folder)
    tagged(folder, "a", "b")
    assert FolderSource(folder, "val", masks=True, val_share=0.99).names == ("photos/a.png", "photos/b.png")
    assert predicted(folder, tmp_path / "out") == ["photos/a.png", "photos/b.png"]
    (tmp_path / "link").symlink_to(folder)
    assert predicted(tmp_path / "link", tmp_path / "out") == ["photos/a.png", "photos/b.png"]
    pattern = prediction_plan.planned_outputs([f"{folder}/**/*.png"], tmp_path / "out", overlays=False, probabilities=False)
    assert sorted(path.name for path, _ in pattern) == ["a.png", "b.png"]


def test_a_folder_goes_by_its_own_path_and_not_by_that_of_a_link(tmp_path):
    save(tmp_path, "real/a.png")
    (tmp_path / "a link").symlink_to(tmp_path / "real")
    assert files_below(tmp_path).files == ("real/a.png",)


def test_pipes_sockets_and_links_to_nowhere_do_not_hang(tmp_path):
    save(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket has to be short
        try:
            listening.bind("s.png")
        finally:
            os.chdir(here)
        found = files_below(tmp_path)
    assert found.files == ("a.png",) and found.special == ("pipe.png", "s.png")
    assert not_taken(found) == "2 files not taken: 2 pipes, sockets or devices"
    (tmp_path / "lost.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    assert files_below(tmp_path).files == ("a.png", "lost.png", "self.png")
    with pytest.raises(FileNotFoundError, match="lost.png is a link to .*gone.png, which is not there"):
        read_image(tmp_path / "lost.png")
    with pytest.raises(FileNotFoundError, match="self.png is a link to"):
        read_image(tmp_path / "self.png")
    with pytest.raises(FileNotFoundError, match="pipe.png is a pipe, socket or device"):
        read_image(tmp_path / "pipe.png")


def test_folders_that_may_not_be_read_are_told(tmp_path, monkeypatch):
    def scandir(path, scandir=os.scandir):
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    save(tmp_path, "a.png", "shut/b.png")
    monkeypatch.setattr(os, "scandir", scandir)
    assert not_taken(files_below(tmp_path)) == "folders that may not be read: shut"


@pytest.mark.parametrize("end", ["PNG", "tif", "TIFF", "bmp", "gif"])
def test_masks_of_any_case_and_exact_format(tmp_path, end):
    save(tmp_path, "barn/A01.jpg", "barn/b.jpg")
    (tmp_path / "Masks" / "barn").mkdir(parents=True)
    for name in ("a01", "b"):
        Image.fromarray(np.eye(6, 8, dtype=np.uint8) * 2).save(tmp_path / "Masks" / "barn" / f"{name}.{end}")
    tagged(tmp_path, "A01", "b")
    source = FolderSource(tmp_path, "val", masks=True, val_share=0.99)
    assert source.names == ("barn/A01.jpg", "barn/b.jpg") and source[0].mask[1, 1] == 2


def test_masks_that_are_not_exact_or_several_are_problems(tmp_path):
    save(tmp_path, "a.png", "b.png", "masks/a.jpg", "masks/b.png", "masks/b.webp", "masks/other.png")
    tagged(tmp_path, "a", "b")
    found = scan_folder(tmp_path)
    assert "1 masks are in formats that do not keep labels exact (a.jpg); save masks as PNG" in found.problems[0]
    assert "1 masks have the name of no photograph with tags (other.png)" in found.not_taken
    save(tmp_path, "masks/b.bmp")
    assert "b.png, b.bmp are masks of b.png; keep one" in scan_folder(tmp_path).problems[0].replace("b.bmp, b.png", "b.png, b.bmp")
    shutil.rmtree(tmp_path / "masks")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "a.npy").touch()
    assert "holds 1 files and no picture (a.npy); save masks as PNG" in scan_folder(tmp_path).problems[0]


def test_masks_in_another_folder_are_asked_for(tmp_path):
    save(tmp_path, "images/a.jpg", "images/b.jpg", "labels/a.png", "labels/b.png")
    tagged(tmp_path, "images/a.jpg", "images/b.jpg")
    assert "the folder 'labels' holds pictures with the names of photographs" in scan_folder(tmp_path).problems[0]
    assert not scan_folder(tmp_path, mask_folder="labels").problems and len(scan_folder(tmp_path, mask_folder="labels").masks) == 2
    with pytest.raises(FileNotFoundError, match=r"mask_folder: .*labls is no folder; .*did you mean .*labels\?"):
        scan_folder(tmp_path, mask_folder="labls")


def test_lists_with_a_column_of_masks(tmp_path):
    save(tmp_path, "JPEGImages/x 1.jpg", "JPEGImages/y.jpg", "JPEGImages/z.jpg")
    (tmp_path / "SegAug").mkdir()
    for name in ("x 1", "y"):
        Image.fromarray(np.eye(6, 8, dtype=np.uint8)).save(tmp_path / "SegAug" / f"{name}.png")
    tagged(tmp_path, "x 1", "z", "y")
    (tmp_path / "val.txt").write_text("/JPEGImages/x 1.jpg /SegAug/x 1.png\nJPEGImages\\y.jpg\tSegAug\\y.png\n")
    source = FolderSource(tmp_path, "val", masks=True, val_share=0.99)
    assert source.names == ("JPEGImages/x 1.jpg", "JPEGImages/y.jpg") and source[1].mask[1, 1] == 1
    assert FolderSource(tmp_path, "train").names == ("JPEGImages/z.jpg",)
    (tmp_path / "val.txt").write_text("/JPEGImages/y.jpg /SegAug/Y.png\n")
    with pytest.raises(ValueError, match=r"val.txt, line 1: there is no mask .*SegAug/Y.png; did you mean .*SegAug/y.png\?"):
        FolderSource(tmp_path, "val", masks=True, val_share=0.99)


def test_a_list_for_prediction_may_have_a_column_of_masks(tmp_path):
    save(tmp_path, "x 1.jpg", "y.jpg", "z.jpg")
    planned = prediction_plan.planned_outputs([str(tmp_path)], tmp_path / "out", overlays=False, probabilities=False)
    (tmp_path / "list.txt").write_text("/x 1.jpg /masks/x 1.png\ny.jpg\tmasks/y.png\n")
    assert [path.name for path, _ in prediction_plan.chosen(planned, tmp_path / "list.txt")] == ["x 1.jpg", "y.jpg"]
    (tmp_path / "list.txt").write_text("y.jpeg\n")
    with pytest.raises(ValueError, match=r"line 1: 'y.jpeg' is not among --images; did you mean .*y.jpg'\?"):
        prediction_plan.chosen(planned, tmp_path / "list.txt")


def test_files_in_any_letter_case(tmp_path):
    save(tmp_path, "Barn/IMG_1.JPG", "b.png")
    (tmp_path / "Tags.CSV").write_text("image,tags\nbarn/img_1.jpg,ring\nB.png,star\n")
    (tmp_path / "VAL.txt").write_text("img_1\n")
    found = scan_folder(tmp_path)
    assert found.images == ("Barn/IMG_1.JPG", "b.png") and not found.problems and found.splits["val"].tolist() == [0]
    assert PhotographFinder(["a.png", "A.png"]).candidates("a.png") == ["a.png"]
    assert PhotographFinder(["a.png", "A.png"]).candidates("a.PNG") == ["A.png", "a.png"]


def test_the_nearest_thing_is_named(tmp_path):
    there = ["masks/A01.PNG", "barn/b.jpg", "tags.csv"]
    for name, expected in (("masks/a01.png", there[0]), ("barn/b.tif", there[1]), ("x/b.jpg", there[1]), ("x/b.bmp", there[1]),
                           ("tag.csv", there[2]), ("elephant", None), ("masks/a02.png", None)):  # fmt: skip
        assert nearest(name, there) == expected
    (tmp_path / "photos").mkdir()
    (tmp_path / "tags.csv").touch()
    assert meant_path(tmp_path / "photo").endswith("/photos?") and meant_path(tmp_path / "photos" / "Tags.csv").endswith("/tags.csv?")
    assert meant_path(tmp_path / "Photos" / "deep" / "x").endswith("/photos?") and meant_path(tmp_path / "zebra") == ""
    assert meant_path(tmp_path / "photos") == meant_path(tmp_path / "tags.csv") == ""  # they are there
    with pytest.raises(FileNotFoundError, match=r"photo does not exist.*did you mean .*photos\?"):
        scan_folder(tmp_path / "photo")
    with pytest.raises(FileNotFoundError, match=r"no file fits the pattern .*; did you mean .*tags.csv\?"):
        predicted(tmp_path / "tag.csv", tmp_path / "out")


def test_names_with_spaces_around_them_are_found_as_tag_files_write_them():
    finder = PhotographFinder([" lead.jpg", "a/trail .jpg", "plain.jpg"])
    for name, path in (("lead.jpg", " lead.jpg"), (" lead.jpg", " lead.jpg"), ("lead", " lead.jpg"), ("a/trail", "a/trail .jpg"), ("plain", "plain.jpg")):
        assert finder.candidates(name) == [path]
    assert sorted(PhotographFinder([" x.jpg", "b/x.jpg"]).candidates("x.jpg")) == [" x.jpg", "b/x.jpg"]
    assert PhotographFinder([" x.jpg", "x.jpg"]).candidates("x.jpg") == ["x.jpg"]
