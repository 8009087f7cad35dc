"""`bench device`: its time, its rows, its files, and once in a process that all checks pass on the CPU."""

import contextlib
import io
import json
import re
import threading
import types

import jax
import numpy as np
import programs
import pytest

from experiments import device_checks, device_measurements, device_report, measuring
from experiments.device_measurements import Costs, Measured, Measurement, Peaks, loop_factors, roofline_share
from experiments.device_report import Budget, Check, Found, Part, rows_of
from lcrf_jax.bound.likelihoods import EXPECTATIONS, IMAGE_LIKELIHOODS, TAG_LIKELIHOODS
from lcrf_jax.crf.image_kernels import FORMS
from lcrf_jax.machine.errors import UserError
from lcrf_jax.train.methods import METHODS
from lcrf_jax.train.plan import check_without_data

TIMING = measuring.Timing(100.0, 90.0, 150.0)


class Clock:
    """Seconds that go on when told so."""

    def __init__(self):
        self.now = 7.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def part(error=1e-6, same=True, name="energy"):
    return Part(name, error, 1e-4, same, "float64 on the CPU")


def test_work_fits_while_its_corrected_guess_ends_before_the_time(clock):
    budget = Budget(100, clock)  # five seconds are kept for the files
    assert budget.fits(95) and not budget.fits(95.1)
    clock.now += 60
    assert budget.spent() == 60 and budget.fits(35) and not budget.fits(36)
    budget.done(10, 20)  # twice as long as guessed
    assert budget.factor() == 2 and budget.fits(17) and not budget.fits(18)
    assert budget.fits(35, factor=1.0)
    budget.done(1000, 10)  # a fast device: never below a fifth
    assert budget.factor() == 0.2


def test_the_start_of_the_process_is_a_part_of_the_time(clock):
    assert Budget(100, clock, already=30.0).spent() == 30
    assert 0 < device_report.process_age() < 1e5


def test_of_a_short_time_a_tenth_is_kept(clock):
    assert Budget(20, clock).fits(18) and not Budget(20, clock).fits(18.1)


@pytest.mark.parametrize(("parts", "platform", "passed", "message"), [
    ([part()], "cpu", [True], ""),
    ([part(2e-4)], "cpu", [False], "too far from the reference"),
    ([part(float("inf"))], "gpu", [False], "too far from the reference"),
    ([part(None)], "cpu", [True], ""),
    ([part(same=False)], "cpu", [False], "a second run gave other bits"),
    ([part(same=False)], "gpu", [True], ""),
    ([part(same=False), part(1.0)], "tpu", [True, False], ""),
])  # fmt: skip
def test_a_row_fails_by_its_error_and_on_a_cpu_by_its_bits(parts, platform, passed, message):
    rows = rows_of(Check("exact kernel", 1.0, lambda: parts), platform)
    assert [row.passed for row in rows] == passed and rows[0].message == message
    assert rows[0].name == "exact kernel: energy"
    assert [row.again for row in rows] == ["bits equal" if each.same else "bits differ" for each in parts]


def raising():
    raise RuntimeError("the device is lost\nand here is much more of it")


def test_a_check_that_raises_is_a_failed_row_and_the_others_go_on(clock, capsys):
    report = measuring.Report()
    checks = [Check("first", 1.0, raising), Check("second", 1.0, lambda: [part()])]
    found = Found()
    device_report.checks_table(report, checks, Budget(100, clock), "cpu", found)
    assert [row.passed for row in found.rows] == [False, True] and found.checks_left == []
    assert found.rows[0].message == "RuntimeError: the device is lost"
    out = capsys.readouterr().out
    assert re.search(r"^ +first +- +- +FAILED", out, re.MULTILINE)
    assert "first failed: RuntimeError: the device is lost" in out and "much more" not in out
    assert found.summary() == "checks: 1 of 2 passed; 1 of 1 repeated to the same bits; FAILED: first"


def test_an_error_without_words_is_named_by_its_kind():
    assert device_report.first_line(MemoryError()) == "MemoryError"


def test_checks_without_time_are_told(clock):
    def slow():
        clock.now += 90
        return [part()]

    checks = [Check("long", 50.0, slow), Check("late", 50.0, raising), Check("short", 1.0, lambda: [part()])]
    found = Found()
    device_report.checks_table(measuring.Report(), checks, Budget(100, clock), "cpu", found)
    assert len(found.rows) == 2 and found.checks_left == found.for_json()["skipped"] == ["late"]
    assert found.summary().endswith("; 1 skipped: no time left")


@pytest.mark.parametrize(("kind", "name"), [
    ("NVIDIA H100 80GB HBM3", "NVIDIA-H100-80GB-HBM3"), ("cpu", "cpu"), ("TPU v5 lite/pod", "TPU-v5-lite-pod"), ("../..", "unknown"),
])  # fmt: skip
def test_the_name_of_a_device_is_safe_for_files(kind, name):
    assert device_report.safe_name(kind) == name


def test_both_files_hold_what_was_found(tmp_path):
    report = measuring.Report()
    rows = rows_of(Check("kernel", 1.0, lambda: [part(float("inf"))]), "cpu") + rows_of(Check("other", 1.0, raising), "cpu")
    report.table("Checks.", device_report.CHECK_COLUMNS).row(*device_report.cells(rows[0]))
    measured = Measured(TIMING, 2.0, None, None, 3e9, 8)
    results = {"device": "NVIDIA H100", "checks": rows, "measurements": [measured._asdict() | {"name": "field"}], "skipped": ["x"]}
    paths = device_report.write(tmp_path / "new folder", report, results)
    assert [path.name for path in paths] == ["device-NVIDIA-H100.md", "device-NVIDIA-H100.json"]
    assert "| kernel: energy | inf | 1e-04 | FAILED | bits equal |" in paths[0].read_text()
    found = json.loads(paths[1].read_text())
    assert found["checks"][0]["error"] == "inf" and found["checks"][1]["message"] == "RuntimeError: the device is lost"
    assert found["measurements"][0]["timing"]["median"] == 100.0 and found["measurements"][0]["operations"] is None
    assert found["skipped"] == ["x"]


def test_the_description_names_versions_device_and_settings(monkeypatch):
    jax.devices()  # those of all tests: they would be made with the flags below, if this one came first
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    monkeypatch.setenv("A_SECRET", "of nobody")
    about = device_report.description(["device", "--seconds=20"], 20.0)
    assert about["device"] == jax.devices()[0].device_kind and about["versions"]["jax"] == jax.__version__
    assert about["command"] == "python -m experiments.bench device --seconds=20" and about["seconds"] == 20.0
    assert about["flags"]["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true" and "A_SECRET" not in about["flags"]
    json.dumps(about)


def measurement(run=raising, family="field", units=1.0, name="mean field"):
    return Measurement(name, family, "41x41", 8, units, 10.0, 2.0, run)


def test_costs_are_guessed_and_then_learned_within_a_family():
    costs = Costs(factor=1.5)
    assert costs.of(measurement()) == 15 + 4 * 3  # four calls at the least
    assert costs.of(measurement(units=0.01)) == 15 + 7 * 0.03
    costs.done(measurement(units=0.5), Measured(TIMING, 3.0, None, None, None, 8), 4.0)
    # .1 s for half a unit, and 4 s less four calls before.
    np.testing.assert_allclose(costs.of(measurement(units=5.0)), 3.6 + 4 * 1.0)
    assert costs.of(measurement(family="energy")) == 15 + 4 * 3


def test_measurements_are_told_with_their_rates_failures_and_what_was_left_out(clock, capsys):
    one = Measured(TIMING, 2.0, 5_000_000, 4e9, 1e9, 8, "a lattice overflowed")
    given = [
        measurement(lambda: one), measurement(raising, name="broken"), measurement(units=1000.0, name="too long"),
        measurement(lambda: one._replace(operations=None, traffic=None, planned=None, note=""), family="other", name="unknown"),
    ]  # fmt: skip
    peaks = Peaks({"float32, all digits": 1e11}, 2e10)
    found = Found()
    found.measurements_left = [device_measurements.title_of(each) for each in given]
    device_measurements.measurements_table(measuring.Report(), given, Budget(100, clock), peaks, found)
    results = found.measurements
    assert found.measurements_left == ["too long, 41x41, batch 8"]
    assert results[0]["roofline_share"] == pytest.approx(0.5)  # 50 ms of traffic, 40 ms of operations, in 100 ms
    assert results[1] == {"name": "broken, 41x41, batch 8", "error": "RuntimeError: the device is lost"}
    assert results[2]["roofline_share"] is None
    out = capsys.readouterr().out
    assert re.search(r"mean field +41x41 +8 +100 \(90.0\) 150 +80.0 +2.00 +5.00 +40.0 +10.0 +50.0$", out, re.MULTILINE)
    assert re.search(r"unknown +41x41 +8 +100 \(90.0\) 150 +80.0 +2.00 +- +- +- +-$", out, re.MULTILINE)
    assert "mean field, 41x41, batch 8: a lattice overflowed" in out


def test_without_time_not_even_the_peaks_are_measured(clock):
    budget, found = Budget(20, clock), Found()
    clock.now += 19
    device_measurements.measure(measuring.Report(), [measurement()], budget, found)
    assert found.measurements_left == ["peaks", "mean field, 41x41, batch 8"]
    assert not found.measurements and not found.peaks


def test_when_the_time_is_over_what_was_found_is_written_and_the_program_left(capsys):
    ended = threading.Event()
    codes = []

    def leave(code):
        codes.append(code)
        ended.set()

    def finish():
        print("what was found")
        return 3

    with device_report.Deadline(0.01, finish, leave), contextlib.redirect_stdout(io.StringIO()):
        assert ended.wait(30)
    assert codes == [3] and capsys.readouterr().out == "what was found\n"
    ended.clear()
    with device_report.Deadline(0.01, lambda: 1 / 0, leave):  # it ends even if nothing can be written
        assert ended.wait(30)
    assert codes == [3, 1]


def test_work_that_is_done_in_time_is_not_ended():
    with device_report.Deadline(3600, raising, raising) as deadline:
        pass
    deadline._end()  # a timer that went off just then


def test_the_roofline_is_the_longer_of_operations_and_traffic():
    peaks = Peaks({"float32": 1e9}, 1e9)
    assert roofline_share(Measured(TIMING, 0, None, 5e7, 1e7, 1), peaks, "float32") == pytest.approx(0.5)
    assert roofline_share(Measured(TIMING, 0, None, 1e7, 2e7, 1), peaks, "float32") == pytest.approx(0.2)


def test_the_bodies_of_loops_count_as_often_as_they_run():
    def function(x):
        return jax.lax.fori_loop(0, 10, lambda _, y: y @ x, x) + jax.jit(lambda y: y @ y)(x)

    operations, traffic = loop_factors(jax.make_jaxpr(function)(np.ones((64, 64), np.float32)))
    assert operations == pytest.approx(11 / 2, rel=0.02) and 4 < traffic < 6
    assert loop_factors(jax.make_jaxpr(lambda x: x + 1)(1.0)) == (1, 1)


@pytest.mark.parametrize(("found", "expected", "error"), [
    ([1.0, 2.0], [1.0, 4.0], 0.5), ([0.0, 0.0], [0.0, 0.0], 0.0), ([np.nan, 1], [1, 1], np.inf), ([1, 1], [np.inf, 1], np.inf),
])  # fmt: skip
def test_the_largest_error_is_a_share_of_the_largest_value(found, expected, error):
    assert device_checks.largest_error(found, expected) == error


def test_other_shapes_are_no_numbers_to_compare():
    with pytest.raises(ValueError, match=r"shapes differ: \(2,\) on the device, \(3,\)"):
        device_checks.largest_error(np.zeros(2), np.zeros(3))


def test_bits_differ_where_numbers_are_equal():
    assert device_checks.same_bits(np.float32([1, np.nan]), np.float32([1, np.nan]))
    assert not device_checks.same_bits(np.float32([0.0]), np.float32([-0.0]))


def test_without_a_reference_only_what_is_not_finite_has_an_error():
    found = {"fine": np.ones(2), "wrong": np.array([np.nan, 1])}
    fine, wrong = device_checks.parts_of((found, found), None, 1e-4, "nothing")
    assert fine.error is None and fine.reference == "the device itself" and wrong.error == np.inf


def test_every_form_likelihood_and_method_is_checked(tmp_path):
    names = [check.name for check in device_checks.all_checks(tmp_path)]
    assert len(names) >= 20
    assert {f"{form} kernel" for form in FORMS} < set(names)
    assert {f"likelihood {name}" for name in (*TAG_LIKELIHOODS, *IMAGE_LIKELIHOODS)} < set(names)
    assert {f"likelihood expected {name}" for name in EXPECTATIONS} < set(names)
    trained = {f"train step {name}" for name, method in METHODS.items() if method.objective}
    assert trained == {name for name in names if name.startswith("train step")}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.objective])
def test_the_smallest_configuration_trains_every_method(method, tmp_path):
    check_without_data(device_checks.tiny_config(method, tmp_path, 1))


@pytest.mark.slow
def test_the_step_of_a_method_with_three_rounds_is_checked(tmp_path):
    loss, gradient = device_checks.step_parts("stc", tmp_path)
    assert loss.same and gradient.same and loss.error is gradient.error is None


def test_without_the_cpu_it_says_how_to_have_it(monkeypatch):
    def devices(platform):
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(device_checks, "jax", types.SimpleNamespace(devices=devices))
    with pytest.raises(UserError, match="JAX_PLATFORMS: expected cpu among them.*JAX_PLATFORMS=cuda,cpu"):
        device_checks.cpu()


@pytest.fixture
def few_checks(monkeypatch):
    """One check, and no time for measurements."""
    given = [Check("kernel", 0.1, lambda: [part()])]
    monkeypatch.setattr(device_checks, "all_checks", lambda folder: given)
    monkeypatch.setattr(device_measurements, "_PEAKS_COST", 1e6)
    monkeypatch.setattr(device_report, "process_age", lambda: 0.0)  # that of the tests' process
    return given


def test_the_program_writes_both_files_and_ends_well(few_checks, tmp_path):
    code, out, err = programs.run("bench", "device", "--seconds=20", f"--out={tmp_path / 'out'}")
    assert code == 0, err
    assert out.rstrip().endswith("checks: 1 of 1 passed; 1 of 1 repeated to the same bits")
    assert "Skipped, as no time was left: peaks; train step" in out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["device-cpu.json", "device-cpu.md"]


def test_a_failed_check_is_exit_code_1_and_all_is_written(few_checks, tmp_path):
    few_checks.append(Check("broken", 0.1, raising))
    code, out, _ = programs.run("bench", "device", "--seconds=20", f"--out={tmp_path}")
    assert code == 1 and out.rstrip().endswith("FAILED: broken")
    found = json.loads((tmp_path / "device-cpu.json").read_text())
    assert [row["passed"] for row in found["checks"]] == [True, False] and found["command"].startswith("python -m experiments.bench")


@pytest.mark.parametrize(("call", "images"), [
    (lambda: device_measurements.mean_field((8, 9), 2), 2), (lambda: device_measurements.energies((8, 9)), 4),
])  # fmt: skip
def test_the_measured_programs_take_batches(monkeypatch, call, images):
    """Nothing is compiled: only their shapes are asked for."""

    def shapes_of(function, number, *given):
        return number, jax.eval_shape(function, *given)

    monkeypatch.setattr(device_measurements, "_measured", shapes_of)
    number, (results, overflowed) = call()
    assert number == images and overflowed.shape == (images,)
    shapes = [leaf.shape for leaf in jax.tree.leaves(results)]
    assert shapes == ([(2, 8, 9)] if images == 2 else [(4,), (4, 8, 9, 21)])
