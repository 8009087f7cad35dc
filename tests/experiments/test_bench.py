"""The benchmarks: what they print, and that they measure what they say. Times themselves are never asserted."""

import functools
import json
import pathlib
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import programs
import pytest
from PIL import Image

from experiments import crf_measurements, measuring
from lcrf_jax.crf import image_kernels
from lcrf_jax.crf.params import guide_features

ROOT = pathlib.Path(__file__).resolve().parents[2]
# One size for everything, so that little has to be compiled.
TINY = ("--sizes=16x12", "--num_classes=3", "--parity=16x12", "--pixels=16x12", "--repetitions=2")
NUMBER = r"\d+(?:\.\d+)?"
TIME = rf"{NUMBER} \({NUMBER}\) {NUMBER}"


run = functools.partial(programs.run, "bench")


def last_line(out):
    return out.rstrip("\n").rsplit("\n", 1)[-1]


SLOW_FIXTURES = ("finished",)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A small photograph: smooth colours with edges and a little noise."""
    rows, columns = np.mgrid[:30, :40]
    image = np.stack([rows * 8, columns * 6, 120 + 100 * (rows + columns > 30)], axis=-1)
    image = image + np.random.default_rng(0).normal(0, 4, image.shape)
    path = tmp_path_factory.mktemp("photo") / "a photo.png"
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(path)
    return str(path)


FAKES_MADE = []


class FakeCRF:
    """Stands for the peer: keeps what it was given and returns the unary."""

    def __init__(self, width, height, num_classes):
        self.size, self.terms = (width, height, num_classes), []
        FAKES_MADE.append(self)

    def setUnaryEnergy(self, energies):
        assert energies.dtype == np.float32 and energies.flags.c_contiguous
        self.energies = energies

    def addPairwiseGaussian(self, sxy, compat):
        self.terms.append((sxy, compat))

    def addPairwiseBilateral(self, sxy, srgb, rgbim, compat):
        assert rgbim.dtype == np.uint8 and rgbim.flags.writeable
        self.terms.append((sxy, srgb, compat, rgbim))

    def inference(self, num_iterations):
        assert num_iterations == 10
        return -self.energies


@pytest.fixture(scope="module")
def finished(photo, tmp_path_factory):
    """One run with a peer, and the file it wrote."""
    out = tmp_path_factory.mktemp("out") / "tables.md"
    with pytest.MonkeyPatch.context() as patch:
        peer = types.ModuleType("pydensecrf.densecrf")
        peer.DenseCRF2D = FakeCRF
        patch.setitem(sys.modules, "pydensecrf", types.ModuleType("pydensecrf"))
        patch.setitem(sys.modules, "pydensecrf.densecrf", peer)
        patch.delitem(image_kernels.FORMS, "lattice")  # takes long to compile, and mean field has it
        options = f"--image={photo}", f"--out={out}", "--against=pydensecrf2", "--nofresh_processes"
        ended = run("crf", *TINY, *options)
    return *ended, out


def test_the_table_has_a_row_for_every_form_and_size(finished):
    code, out, err, _ = finished
    assert code == 0, err
    assert re.match(r"Machine: .+, \d+ cores, Python 3\.\d+\.\d+, jax \S+, jaxlib \S+, numpy \S+, \d{4}-\d\d-\d\d", out)
    for form in ("exact", "anchors"):
        row = rf"^ *16x12 +{form}(?: +{TIME}){{5}}(?: +{NUMBER} / {NUMBER}){{2}}(?: +{NUMBER}){{6}}$"
        assert re.search(row, out, re.MULTILINE), (form, out)
    exact = re.search(r"^ *16x12 +exact .*$", out, re.MULTILINE).group().split()
    assert max(map(float, exact[-6:])) <= 0.01
    assert re.search(r"for a second one: 0\.$", out, re.MULTILINE)


def test_mean_field_is_compared_with_the_peer_and_with_exact_mean_field(finished):
    code, out, err, _ = finished
    assert code == 0, err
    for unary in ("every class", "3 classes"):
        row = rf"^ *16x12 +{unary} +{TIME}(?: +{NUMBER}){{3}} +{TIME}(?: +{NUMBER}){{2}} +(\d+\.\d\d)$"
        assert re.search(row, out, re.MULTILINE), (unary, out)
    for name in ("lcrf_jax", "pydensecrf2"):
        assert len(re.findall(rf" {name} +{NUMBER} +{NUMBER}$", out, re.MULTILINE)) == 2
    assert len(re.findall(r" exact mean field with self-pairs +\S+ +0\.00$", out, re.MULTILINE)) == 2
    assert re.search(rf"^ *16x12 +{TIME}(?: +{NUMBER}){{4}}$", out, re.MULTILINE)


def test_the_peer_gets_the_parameters_of_the_library(finished):
    assert finished[0] == 0, finished[2]
    assert {crf.size for crf in FAKES_MADE} == {(16, 12, 3)}
    for crf in FAKES_MADE:
        gaussian, (*bilateral, image) = crf.terms
        assert gaussian == (3, 3) and bilateral == [80, 13, 10]
        assert image.shape == (12, 16, 3) and crf.energies.shape == (3, 192)
        np.testing.assert_allclose(np.exp(-crf.energies).sum(axis=0), 1, rtol=1e-5)


def test_the_last_line_is_the_speed_up_at_the_largest_size(finished):
    _, out, _, _ = finished
    match = re.fullmatch(r"speed-up against pydensecrf2, mean field 16x12x3: (\d+\.\d\d)", last_line(out))
    row = re.search(r"^ *16x12 +every class .* (\S+)$", out, re.MULTILINE)
    assert match.group(1) == row.group(1)


def test_the_tables_are_written_as_markdown(finished):
    _, out, _, path = finished
    assert f"tables      {path}" in out
    text = path.read_text()
    assert text.startswith("Machine: ") and re.search(r"^\| 16x12 \| exact \|( [\d.() /]+ \|){13}$", text, re.MULTILINE)
    assert len(re.findall(r"^(?:\| ---: )+\|$", text, re.MULTILINE)) == 5


@pytest.fixture
def canned(monkeypatch):
    """Jobs that measure nothing."""
    times = dict.fromkeys(("build", "apply", "energy", "energy_with_build", "mean_field"), (2.0, 1.0, 3.0))
    shares = [f"{form}_{what}" for form in ("raw", "symmetric") for what in ("product", "energy", "gradient")]
    others = dict.fromkeys(("compile_energy", "compile_mean_field", "peak_energy", "peak_mean_field", *shares), 0.5)
    unary = {"timings": [(2.0, 1.0, 3.0)], "peaks": [1.0], "changed": 0.1, "differing": None}
    unaries = {"every class": unary, "3 classes": unary}
    results = {
        "reference": 0.0,
        "form": times | others,
        "refinement": {"compile": 1.0, "unaries": unaries},
        "coarse_to_fine": {"timings": [(4.0, 1.0, 3.0), (2.0, 1.0, 3.0)] * 2, "differing": [0.0, 0.01] * 2},
        "recompilations": [1, 0],
        "parity": {name: {"lcrf_jax": [0.0, 0.0]} for name in unaries},
    }
    jobs = {name: lambda result=result, **_: result for name, result in results.items()}
    monkeypatch.setattr(crf_measurements, "JOBS", jobs)


def test_without_the_peer_it_says_how_to_install_it_and_goes_on(canned, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    code, out, err = run("crf", f"--image={photo}", "--nofresh_processes", "--against=pydensecrf2")
    assert code == 0, err
    assert 'pip install "Cython<3" setuptools wheel && pip install --no-build-isolation pydensecrf2' in out
    assert "C++ compiler" in out
    assert last_line(out) == "no comparison was made: pydensecrf2 is not installed"
    assert re.search(rf"^ *500x375 +lattice(?: +{TIME}){{5}}", out, re.MULTILINE)
    assert not re.search(r"^ *161x161 +exact", out, re.MULTILINE)


def test_without_against_no_comparison_is_made(canned, photo):
    code, out, err = run("crf", f"--image={photo}", "--nofresh_processes", "--large")
    assert code == 0, err
    assert last_line(out) == "no comparison was made: see --against" and "pydensecrf2 ms" not in out
    assert re.search(r"^2000x1500 ", out, re.MULTILINE)
    assert re.search(rf"^ *5 +every class +{TIME} +1.00 +2.00$", out, re.MULTILINE)


@pytest.mark.parametrize(("arguments", "message"), [
    (["nothing"], r"error: expected the name of one benchmark, of crf, train, device; got \['nothing'\]"),
    ([], "error: expected the name of one benchmark, of crf, train, device; got none"),
    (["crf", "crf"], "error: expected the name of one benchmark"),
    (["crf", "--sizes=41,x3"], "error: size: expected a side such as 321 or WIDTHxHEIGHT .* got 'x3'"),
    (["crf", "--sizes=41", "--parity=1"], "error: size: expected .* at least 2; got '1'"),
    (["crf", "--against=other"], "flag --against=other: value should be one of <pydensecrf2>"),
    (["crf", "--image=nowhere.png"], "error: .*nowhere.png"),
    (["crf", "--num_classes=1"], "flag --num_classes=1"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_wrong_arguments_end_with_one_clear_line(arguments, message):
    code, _, err = run(*arguments)
    assert code == 1 and re.search(message, err) and "Traceback" not in err, err


def test_without_scikit_image_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    code, _, err = run("crf")
    assert code == 1 and "pip install scikit-image" in err and "--image=FILE" in err


@pytest.mark.slow
def test_a_job_runs_in_a_process_of_its_own(photo, tmp_path):
    arguments = {"photo": photo, "size": (3, 4), "num_classes": 3, "grid_of": 321, "path": str(tmp_path / "exact.npz")}
    seconds = measuring.in_fresh_process("crf_measurements", "reference", arguments)
    assert seconds > 0 and np.load(arguments["path"])["raw"].shape == (12, 3)
    with pytest.raises(ChildProcessError, match="measuring reference with .*failed .exit code 1(.|\n)*nowhere.png"):
        measuring.in_fresh_process("crf_measurements", "reference", arguments | {"photo": "nowhere.png"})


def loop_reference(photo, size, num_classes):
    """The exact sums in float64, pair by pair in NumPy."""
    image, log_probs = crf_measurements.inputs(photo, size, num_classes)
    params, probs = crf_measurements.PARAMS, np.exp(log_probs.astype(np.float64)).reshape(-1, num_classes)
    features = np.asarray(guide_features(
        jnp.asarray(image), position_width=params.bilateral_position_width, colour_width=params.bilateral_colour_width
    ), np.float64)  # fmt: skip
    kernel = np.exp(-np.square(features[:, None] - features[None]).sum(-1) / 2)
    scale = 1 / np.sqrt(kernel.sum(axis=1))
    results = {}
    for name, matrix in (("raw", kernel), ("symmetric", scale[:, None] * kernel * scale)):
        np.fill_diagonal(matrix, 0)
        results[name] = matrix @ probs
    return results


@pytest.mark.slow_except("30")
@pytest.mark.parametrize("sample", [None, 30])
def test_the_exact_sums_are_exact(photo, tmp_path, monkeypatch, sample):
    if sample:
        monkeypatch.setattr(crf_measurements, "ALL_PIXELS", 10)
        monkeypatch.setattr(crf_measurements, "SAMPLE", sample)
    path = str(tmp_path / "exact.npz")
    crf_measurements.reference(photo, (8, 10), 3, 2, path)
    found, expected = np.load(path), loop_reference(photo, (8, 10), 3)
    assert len(np.unique(found["rows"])) == (sample or 80)
    for name in ("raw", "symmetric"):
        np.testing.assert_allclose(found[name], expected[name][found["rows"]], rtol=1e-4)


@pytest.mark.slow_except("30")
@pytest.mark.parametrize("sample", [None, 30])
def test_errors_are_those_of_the_form(photo, tmp_path, monkeypatch, sample):
    """The exact form has none; one that is 1.25 times too large has 25 per cent everywhere."""
    if sample:
        monkeypatch.setattr(crf_measurements, "ALL_PIXELS", 10)
        monkeypatch.setattr(crf_measurements, "SAMPLE", sample)

    def too_large(image, params, **options):
        return image_kernels.exact_image_kernel(
            image, params._replace(bilateral_weight=1.25 * params.bilateral_weight), **options
        )

    path = str(tmp_path / "exact.npz")
    crf_measurements.reference(photo, (8, 10), 3, 2, path)
    image, log_probs = crf_measurements.inputs(photo, (8, 10), 3)
    probs = jnp.exp(log_probs).reshape(-1, 3)
    for builder, error in ((image_kernels.exact_image_kernel, 0), (too_large, 0.25)):
        errors = crf_measurements._errors(builder, image, crf_measurements.PARAMS, probs, np.load(path))
        assert set(errors) == {f"{form}_{what}" for form in ("raw", "symmetric")
                               for what in ("product", "energy", "gradient")}  # fmt: skip
        np.testing.assert_allclose(list(errors.values()), error, atol=1e-4)


def test_the_unaries_are_what_their_names_say(photo):
    for size in ((5, 3), (24, 40)):
        image = crf_measurements.photograph(photo, *size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        for unary in ("every class", "3 classes"):
            log_probs = crf_measurements.network_like(image, 6, unary)
            assert log_probs.shape == (*size, 6) and log_probs.dtype == np.float32
            probs = np.exp(log_probs)
            np.testing.assert_allclose(probs.sum(axis=-1), 1, rtol=1e-5)
            np.testing.assert_array_equal(log_probs, crf_measurements.network_like(image, 6, unary))
            if unary == "every class":
                assert probs.min() > 0.09 / 6
            else:
                assert probs[:, :, 3:].max() < 1e-4 and probs[:, :, :3].max() > 0.9


def test_square_grids_have_the_widths_of_the_photograph():
    assert crf_measurements.params_at((81, 81), 162) == crf_measurements.PARAMS._replace(
        bilateral_position_width=40.0, gaussian_position_width=1.5
    )
    for size in ((162, 162), (500, 500), (81, 80)):
        assert crf_measurements.params_at(size, 162) == crf_measurements.PARAMS


def test_calls_are_timed_in_turns(monkeypatch):
    order, clock = [], iter(range(1000))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock) ** 2 / 1e3)
    monkeypatch.setattr(measuring.time, "process_time", lambda: 2 * len(order) / 1e3)
    first, second = measuring.timings([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b"] * 3
    # The n-th reading of this clock is n^2 ms, so that every call seems to take longer than the one before.
    assert first.cpu == second.cpu == 2
    assert first.least < first.median < second.median


def test_timings_end_early_but_not_before_the_third(monkeypatch):
    calls, clock = [], iter(range(0, 10_000, 10))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(clock))
    measuring.timings([lambda: calls.append(1)], 100)
    assert len(calls) == 3


@pytest.mark.slow
def test_peak_memory_is_that_of_the_call():
    _, small = measuring.with_peak(lambda: None)
    held, large = measuring.with_peak(lambda: np.ones(8_000_000).sum())
    assert held == 8e6 and small < 32 and 50 < large < 96


@pytest.mark.parametrize(("value", "text"), [
    (0.00123, "0.00"), (0.0499, "0.05"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (1234.5, "1234"), (0, "0.00"),
])  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert measuring.number(value) == text


def test_results_survive_json():
    assert json.loads(json.dumps([measuring.Timing(1.0, 2.0, 3.0)])) == [[1.0, 2.0, 3.0]]


@pytest.mark.slow
def test_the_train_step_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("LCRF_JAX_CACHE", str(tmp_path / "cache"))
    code, out, err = run(
        "train", "--config=experiments/configs/tiny.py", "--config.data.options.num_train=24", "--config.data.val_split=",
        "--config.network.taps=('head', 's16')", "--config.network.widths=(16, 12)", "--config.class_maps.grid=6",
        "--config.class_maps.extra_sizes=()", "--repetitions=3", f"--out={tmp_path / 'train.md'}",
    )  # fmt: skip
    assert code == 0, err
    share = float(re.fullmatch(r"checks and saving, at most: ([\d.]+) % of the step", out.rstrip().splitlines()[-1])[1])
    assert share > 0
    text = (tmp_path / "train.md").read_text()
    assert re.search(r"8 images at 6 x 6 logits, 4 device\(s\), \d+,\d+ trainable weights, products in float32", text)
    for row in ("step", "saving, until it is on the disk", "memory of the step on each device",
                "operations of the step on each device", "memory read and written in the step"):  # fmt: skip
        assert re.search(rf"^\| {row} \|.*\d", text, re.MULTILINE), row
