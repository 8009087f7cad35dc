"""Exported runs: read back in a process without Flax, any size and batch, with and without refinement; ONNX."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from PIL import Image
from programs import ROOT, run
from small_segmenter import NETWORK, SETTINGS, parameters, picture, segmenter

import lcrf_jax
from lcrf_jax.nets.inputs import square_image
from lcrf_jax.predict.export import exported, image_function, squares
from lcrf_jax.predict.segmenter import segment

CLASSES = ["background", "a", "b", "c"]


def description(input_sizes=(64,), mirror=True):
    settings = {**SETTINGS, "input_sizes": list(input_sizes), "mirror": mirror}
    return {"network": NETWORK, "class_names": CLASSES, "inference": settings}


@functools.cache
def plain_function(input_sizes=(64,), mirror=True):
    return image_function(description(input_sizes, mirror), parameters(), crf=False)


def batch(seed, count, height, width):
    return np.stack([picture(seed + at, height, width) for at in range(count)])


def test_squares_are_those_of_pillow_but_for_its_rounding():
    for seed, size in enumerate([(48, 80), (100, 64), (64, 64), (200, 150), (1, 7)]):
        image = picture(seed, *size)
        found = np.asarray(jax.jit(squares, static_argnums=1)(image[None], 64))[0]
        difference = np.abs(found - square_image(image, 64))
        assert difference.max() < 2.5 and difference.mean() < 0.5, size


@pytest.mark.slow_except("input_sizes0-True")
@pytest.mark.parametrize(("input_sizes", "mirror"), [((64,), True), ((64, 96), False)])
def test_the_function_is_the_segmentation_of_each_image(input_sizes, mirror):
    images = batch(0, 2, 48, 72)
    probs = np.asarray(jax.jit(plain_function(input_sizes, mirror))(images))
    assert probs.shape == (2, 48, 72, 4) and probs.dtype == np.float32
    np.testing.assert_allclose(probs.sum(axis=-1), 1, atol=1e-5)
    for image, found in zip(images, probs):
        expected = segment(segmenter(input_sizes, mirror), image, crf=False)
        assert np.abs(found - np.exp(expected.log_probs)).max() < 0.05
        assert (found.argmax(axis=-1) == expected.labels).mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [False, True], ids=["smooth", "noise"])
def test_with_refinement_the_function_is_the_refined_segmentation(noisy):
    images = batch(3, 2, 64, 64)
    if noisy:  # its lattice has more vertices than usual
        images = np.random.default_rng(0).integers(0, 256, (1, 128, 64, 3)).astype(np.uint8)
    refined = np.asarray(jax.jit(image_function(description(mirror=False), parameters(), crf=True))(images))
    assert np.isfinite(refined).all()
    for image, found in zip(images, refined):
        expected = segment(segmenter(), image, crf=True)
        assert (found.argmax(axis=-1) == expected.labels).mean() > 0.97
        assert np.abs(found - np.exp(expected.log_probs)).max() > 0.1


WITHOUT_FLAX = """
    import sys

    class Refused:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("flax", "lcrf_jax", "optax", "orbax", "grain"):
                raise ImportError(f"{name} is not to be imported here")

    sys.meta_path.insert(0, Refused())
    import jax
    import numpy as np

    model = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
    assert set(model.platforms) == {"cpu", "cuda", "tpu"}, model.platforms
    given = np.load(sys.argv[2])
    np.savez(sys.argv[3], **{name: np.asarray(model.call(images)) for name, images in given.items()})
    assert not {"flax", "lcrf_jax"} & set(sys.modules)
"""


def read_back(path, images, tmp_path):
    """What a process that has JAX and NumPy alone makes of images with a file."""
    np.savez(tmp_path / "images.npz", **images)
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_FLAX), str(path), str(tmp_path / "images.npz"), str(tmp_path / "out.npz")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    return np.load(tmp_path / "out.npz")


@pytest.mark.slow
def test_any_batch_height_and_width_in_a_process_without_flax(tmp_path):
    path = tmp_path / "model.stablehlo"
    path.write_bytes(exported(plain_function()).serialize())
    images = {"one": batch(0, 1, 40, 60), "three": batch(1, 3, 75, 33), "point": batch(2, 2, 1, 1)}
    found = read_back(path, images, tmp_path)
    for name, given in images.items():
        expected = np.asarray(jax.jit(plain_function())(given))
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_refinement_at_one_size_in_a_process_without_flax(tmp_path):
    function = image_function(description(), parameters(), crf=True)
    path = tmp_path / "refined.stablehlo"
    path.write_bytes(exported(function, size=(40, 56)).serialize())
    images = {"one": batch(0, 1, 40, 56), "two": batch(5, 2, 40, 56)}
    found = read_back(path, images, tmp_path)
    for name, given in images.items():
        expected = np.asarray(jax.jit(function)(given))
        np.testing.assert_allclose(found[name], expected, atol=1e-5, err_msg=name)
        assert np.abs(found[name] - np.asarray(jax.jit(plain_function())(given))).max() > 0.1


def test_platforms_that_are_not_known_are_refused():
    with pytest.raises(ValueError, match="platforms: expected some of cpu, cuda, tpu, got cpu, gpu"):
        exported(plain_function(), platforms=["cpu", "gpu"])
    with pytest.raises(ValueError, match="got none"):
        exported(plain_function(), platforms=[])
    assert exported(plain_function(), platforms=["cpu"]).platforms == ("cpu",)


@pytest.fixture
def checkpoint(tiny_run):
    return tiny_run[0]


def test_the_program_writes_the_file_and_says_what_it_is(checkpoint, tmp_path):
    ended = run("export", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'new' / 'model.stablehlo'}")
    assert ended.code == 0, ended.err
    difference = float(ended.last_line.rsplit(" ", 1)[-1])
    assert ended.last_line.startswith("largest difference") and difference <= 1e-5
    facts = json.loads((tmp_path / "new" / "model.stablehlo.json").read_text())
    assert facts["class_names"][0] == "background" and len(facts["palette"]) == 7 and facts["refined"] is False
    assert facts["input"] == "uint8 [batch, height, width, 3], RGB" and facts["supervision"] == "image tags"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["model.stablehlo", "model.stablehlo.json"]
    image = picture(0, 50, 70)
    found = read_back(tmp_path / "new" / "model.stablehlo", {"image": image[None]}, tmp_path)["image"]
    Image.fromarray(image).save(tmp_path / "a.png")
    assert run("predict", f"--checkpoint={checkpoint}", f"--images={tmp_path / 'a.png'}", f"--out={tmp_path / 'masks'}").code == 0
    assert (found[0].argmax(axis=-1) == np.asarray(Image.open(tmp_path / "masks" / "a.png"))).mean() > 0.95


def test_the_small_file_is_loaded_as_the_run_is(checkpoint, tmp_path):
    ended = run("export", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'new' / 'model.npz'}", "--compact")
    assert ended.code == 0, ended.err
    assert float(ended.last_line.rsplit(" ", 1)[-1]) < 0.01
    image = picture(0, 50, 70)
    one, other = (lcrf_jax.load(where).segment(image, crf=False) for where in (checkpoint, tmp_path / "new" / "model.npz"))
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=0.01)
    refused = run("export", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'model.stablehlo'}", "--compact")
    assert refused.code == 1 and "--compact: expected --out=NAME.npz" in refused.err


@pytest.mark.parametrize(("flags", "message"), [
    (["--crf"], "--crf needs --size=HEIGHTxWIDTH"),
    (["--size=375"], "--size: expected HEIGHTxWIDTH in pixels such as 375x500, got '375'"),
    (["--size=²x3"], "--size: expected HEIGHTxWIDTH"),
    (["--size=0x5"], "--size: expected HEIGHTxWIDTH"),
    (["--platforms=metal"], "platforms: expected some of cpu, cuda, tpu, got metal"),
])  # fmt: skip
def test_what_the_program_refuses(checkpoint, tmp_path, flags, message):
    ended = run("export", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'model.stablehlo'}", *flags)
    assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err
    assert not (tmp_path / "model.stablehlo").exists()


def test_places_that_cannot_be_written_are_refused_before_anything_is_exported(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "a.npz").mkdir()
    (tmp_path / "file").touch()
    for out, message in (("", "--out: expected a file, got an empty name"), (tmp_path / "a.npz", "is a folder; name the file in it"),
                         (tmp_path / "file" / "b.npz", "a file stands where a folder is to be; give another path")):  # fmt: skip
        ended = run("export", "--checkpoint=nowhere", f"--out={out}", "--compact")
        assert ended.code == 1 and message in ended.err and "Traceback" not in ended.err, ended.err
    assert run("export", f"--checkpoint={checkpoint}", "--out=~/new/m.npz", "--compact").code == 0
    assert (tmp_path / "home/new/m.npz").exists() and sorted(os.listdir(tmp_path)) == ["a.npz", "file", "home"]


# Runs the program, and tells which of the distributions that it and its modules import are not of the closure of a file.
WITH_NOTHING_BESIDE = """
    import ast, re, runpy, sys
    from importlib import metadata

    from packaging.requirements import Requirement

    def required(lines, extras=("",)):
        wanted = [Requirement(line) for line in lines]
        return [(each.name, tuple(each.extras) or ("",)) for each in wanted
                if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)]

    waiting = required(line.strip() for line in open(sys.argv[1]) if line[0] != "#")
    closure = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) not in closure:
            closure.add((name, extras))
            waiting += required(metadata.requires(name) or [], extras)
    named = {re.sub("[-_.]+", "-", name).lower() for name, _ in closure}
    sys.argv[1:] = sys.argv[2:]
    try:
        runpy.run_module("experiments.export_onnx", run_name="__main__", alter_sys=True)
    finally:
        files = ["experiments/export_onnx.py"] + [
            module.__file__ for name, module in list(sys.modules.items()) if name.partition(".")[0] in ("lcrf_jax", "experiments") and getattr(module, "__file__", None)]
        nodes = [node for file in files for node in ast.parse(open(file).read()).body]
        roots = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        roots |= {node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        of_roots = {root: owners for root, owners in metadata.packages_distributions().items() if root in roots - {"lcrf_jax"}}
        assert {"jax", "numpy", "flax", "jax2onnx", "onnxruntime"} <= set(of_roots), of_roots
        for root, owners in of_roots.items():
            assert named & {re.sub("[-_.]+", "-", owner).lower() for owner in owners}, f"{root} is not required"
"""


@pytest.mark.slow
def test_onnx_in_an_environment_of_its_own(checkpoint, tmp_path):
    """As the page says, on top of the packages that are there already; skipped where the others cannot be had."""
    wanted = ROOT / "experiments" / "onnx_requirements.txt"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    paths = [subprocess.run([each, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True,
                            check=True).stdout.strip() for each in (python, sys.executable)]
    pathlib.Path(paths[0], "beside.pth").write_text(f"{paths[1]}\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile", "-r", wanted]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"the packages of onnx_requirements.txt cannot be installed: {installed.stderr.strip()[-300:]}")
    command = [python, "-c", textwrap.dedent(WITH_NOTHING_BESIDE), wanted, f"--checkpoint={checkpoint}", f"--out={tmp_path / 'model.onnx'}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout.split()[-1]) < 1e-4
    assert json.loads((tmp_path / "model.onnx.json").read_text())["size"] == 96


@pytest.mark.parametrize("size", ["99999999x99999999", "0x5", "5", "9" * 5000 + "x2", "-1x3"])
def test_sizes_that_no_photograph_has(size, tmp_path):
    ended = run("export", "--checkpoint=animals", f"--size={size}", "--crf", f"--out={tmp_path / 'a.stablehlo'}")
    assert ended.code == 1 and ended.err.startswith("error: --size: expected "), ended
    assert not list(tmp_path.iterdir())
