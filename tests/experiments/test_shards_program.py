"""`lcrf shards`: what it writes can be checked and trained from, and what it refuses."""

import pytest
from PIL import Image
from programs import SMALL_FOLDER, assert_refused, run

SHARDS = "--config=experiments/configs/shards.py"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs") / "photos"
    assert run("example_folder", f"--out={folder}", "--num=30").code == 0
    return folder


@pytest.fixture(scope="module")
def shards(photographs):
    out = photographs.parent / "shards"
    ended = run("shards", f"--data={photographs}", f"--out={out}", "--shard_megabytes=0.05")
    assert ended.code == 0, ended
    assert "train: 24 photographs without masks, " in ended.out and "val: 6 photographs with masks" in ended.out
    assert "train: without masks, for they are not there for all" in ended.out
    return out


def test_the_check_of_shards_says_what_that_of_the_folder_says(photographs, shards):
    of_folder = run("check_data", f"--data={photographs}")
    of_shards = run("check_data", SHARDS, f"--config.data.root={shards}")
    assert of_shards.code == of_folder.code == 0, of_shards
    assert of_shards.out == of_folder.out and "no problems" in of_shards.out
    wrong = run("check_data", f"--data={shards}")
    assert wrong.code == 1 and "holds shards, and no photographs of their own: use the configuration shards" in wrong.out


def test_the_same_command_again_writes_nothing_and_another_is_refused(photographs, shards):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    again = run("shards", f"--data={photographs}", f"--out={shards}", "--shard_megabytes=0.05")
    assert again.code == 0 and {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    assert_refused(run("shards", f"--data={photographs}", f"--out={shards}"), "other contents: shard_bytes differ; give another folder")
    assert_refused(run("shards", f"--data={photographs}", f"--out={photographs}"), "holds no shards, but classes.txt, images, masks and 1 more")


def test_a_bad_photograph_is_refused_or_left_out(photographs, tmp_path):
    folder = tmp_path / "photos"
    (folder / "a").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(folder / "a" / f"{number}.png")
    (folder / "a" / "3.png").write_bytes(b"no picture")
    assert_refused(run("shards", f"--data={folder}", f"--out={tmp_path / 'out'}"), r"1 of 4 examples of train cannot be used:\n.*3.png")
    ended = run("shards", f"--data={folder}", f"--out={tmp_path / 'out'}", "--config.data.on_bad_image=skip")
    assert ended.code == 0 and "train: 3 photographs without masks" in ended.out and "no split val" in ended.out, ended


@pytest.mark.slow
def test_a_run_on_shards_is_that_on_the_folder(photographs, shards, tmp_path):
    small = [flag for flag in SMALL_FOLDER if not flag.startswith("--config=")]
    flags = *small, f"--config.cache.directory={tmp_path / 'cache'}"
    one = run("train", "--config=experiments/configs/folder.py", f"--config.data.root={photographs}", *flags, f"--workdir={tmp_path / 'one'}")
    other = run("train", SHARDS, f"--config.data.root={shards}", *flags, f"--workdir={tmp_path / 'other'}")
    assert one.code == other.code == 0, other
    assert one.last_line == other.last_line and "mIoU" in one.last_line
    assert "kept on the disk, for they are within config.cache.features_gb=20" in other.out
