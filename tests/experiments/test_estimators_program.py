"""The measurements of gradient estimators: errors by hand, cases by enumeration, and what the program writes."""

import csv
import functools
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import reference

from experiments import estimator_measurements as measurements

TAGS = np.array(measurements.TAGS)
TINY = ("--likelihood=max_pool", "--pixels=4", "--temperatures=0.5", "--samples=2", "--blocks=2", "--repetitions=64")

run = functools.partial(programs.run, "estimators")


def rows_of(folder):
    with (folder / "estimators.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


SLOW_FIXTURES = ("finished",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run with a likelihood of each kind, and its rows."""
    folder = tmp_path_factory.mktemp("out") / "estimators"
    settings = ("--likelihood=evidence", "--likelihood=area", "--pixels=9", "--temperatures=1,0.1", "--samples=1,4")
    more = ("--blocks=3", "--sweeps=1,5", "--couplings=1,30", "--repetitions=512")
    ended = run(f"--workdir={folder}", *settings, *more)
    assert ended.code == 0, ended.err
    return SimpleNamespace(out=ended.out, folder=folder, rows=rows_of(folder))


def chosen(finished, **settings):
    """Rows with these settings; those of noise shared within blocks only if a block is named."""
    settings = {"block": "", **settings}
    rows = [row for row in finished.rows if all(row[name] == str(value) for name, value in settings.items())]
    assert rows, settings
    return rows


def test_there_is_a_row_for_every_setting(finished):
    for likelihood, counts in (("evidence", ("1", "4")), ("area", ("4",))):
        for name in ("gumbel_softmax", "straight_through"):
            found = chosen(finished, likelihood=likelihood, estimator=name)
            settings = [(row["temperature"], row["samples"]) for row in found]
            assert sorted(settings) == sorted((t, s) for t in ("0.1", "1.0") for s in counts)
        samples = [row["samples"] for row in chosen(finished, likelihood=likelihood, estimator="reinforce")]
        assert samples == ["2", "4"][-len(counts):]
        assert len(chosen(finished, likelihood=likelihood, estimator="mean")) == 1
        chains = {(row["coupling"], row["chain"], row["sweeps"])
                  for row in chosen(finished, likelihood=likelihood, estimator="mcmc")}  # fmt: skip
        assert chains == {(c, s, n) for c in ("1.0", "30.0") for s in ("cold", "persistent") for n in ("1", "5")}
    assert len(finished.rows) == 11 + 6 + 1 + 2 * 8


def test_no_bias_is_found_in_reinforce_and_no_variance_in_the_mean(finished):
    for likelihood in ("evidence", "area"):
        for row in chosen(finished, likelihood=likelihood, estimator="reinforce"):
            assert row["bias"] == row["summed bias"] == "" and 0 < float(row["bias_below"]) < float(row["sd"])
        [row] = chosen(finished, likelihood=likelihood, estimator="mean")
        assert float(row["bias"]) > 0.02 and float(row["sd"]) < 1e-5
        assert float(row["rmse"]) == pytest.approx(float(row["bias"]))


def test_relaxed_samples_lose_bias_and_gain_variance_as_the_temperature_falls(finished):
    for likelihood in ("evidence", "area"):
        cold, warm = (
            chosen(finished, likelihood=likelihood, estimator="gumbel_softmax", temperature=t, samples=4)[0]
            for t in (0.1, 1.0)
        )
        assert float(cold["bias"] or cold["bias_below"]) < float(warm["bias"])
        assert float(cold["sd"]) > 2 * float(warm["sd"])
        assert abs(float(cold["value error"])) < abs(float(warm["value error"])) + 0.02


def test_four_samples_have_a_quarter_of_the_variance_of_one(finished):
    one, four = (chosen(finished, likelihood="evidence", estimator="gumbel_softmax", temperature=1.0, samples=s)[0]
                 for s in (1, 4))  # fmt: skip
    # 512 and 128 estimates in 18 directions: each sd is within about 4 %.
    assert float(one["sd"]) / float(four["sd"]) == pytest.approx(2, rel=0.2)
    assert float(one["bias"]) == pytest.approx(float(four["bias"]), rel=0.1)


def test_noise_shared_by_all_pixels_adds_up_in_the_sum_over_pixels_alone(finished):
    """The evidence is a sum over pixels: bias and sd of each pixel's gradient are those of independent noise."""
    settings = {"likelihood": "evidence", "estimator": "gumbel_softmax", "temperature": 1.0, "samples": 4}
    [own], [common] = (chosen(finished, **settings, block=block) for block in ("", 3))
    # 128 estimates: shared noise has fewer directions, and its sd is within about 10 %.
    assert float(own["sd"]) == pytest.approx(float(common["sd"]), rel=0.3)
    assert float(own["bias"]) == pytest.approx(float(common["bias"]), rel=0.1)
    assert float(common["summed sd"]) > 1.5 * float(own["summed sd"])


def test_a_cold_chain_is_biased_and_one_that_has_gone_on_is_not(finished):
    for chain, sweeps, least, most in (("cold", 1, 0.6, 1.2), ("cold", 5, 0.3, 0.8)):
        [row] = chosen(finished, likelihood="evidence", coupling=30.0, chain=chain, sweeps=sweeps)
        assert least < float(row["bias"]) < most
    for likelihood in ("evidence", "area"):
        for row in chosen(finished, likelihood=likelihood, coupling=1.0, chain="persistent"):
            assert row["bias"] == ""


def test_tables_and_figure_are_written(finished):
    text = (finished.folder / "estimators.md").read_text()
    assert text.startswith("Machine: ") and "Seed 0, 512 repetitions." in text
    assert re.search(r"^\| gumbel_softmax \| 9 \| 0\.1 \| 4 \|( [-<\d.]+ \|){7}$", text, re.MULTILINE)
    assert len(re.findall(r"^(?:\| ---: )+\|$", text, re.MULTILINE)) == 5
    assert finished.out.rstrip().endswith(f"figure      {finished.folder / 'estimators.png'}")
    content = (finished.folder / "estimators.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 150_000


@pytest.mark.slow
def test_the_seed_decides_every_number_and_the_tables_do_without_matplotlib(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    folders = [tmp_path / name for name in ("first", "again", "other")]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        code, _, err = run(f"--workdir={folder}", f"--seed={seed}", *TINY)
        assert code == 1 and "pip install matplotlib" in err and ".[figures]" in err and "Traceback" not in err
        assert (folder / "estimators.md").exists() and not (folder / "estimators.png").exists()
    first, again, other = map(rows_of, folders)
    assert len(first) == 5 and first == again
    assert all(row["rmse"] != its["rmse"] for row, its in zip(first, other, strict=True))


@pytest.mark.parametrize(("arguments", "message"), [
    (["--pixels=10"], "error: pixels: expected the square of a side of at least 2, such as 100, got 10"),
    (["--pixels=nine"], r"error: --pixels: expected numbers of at least 4, got \['nine'\]"),
    (["--temperatures=0"], r"error: --temperatures: expected numbers of at least 0.001, got \['0'\]"),
    (["--samples="], r"error: --samples: expected numbers of at least 1, got \[\]"),
    (["--likelihood=noisy_or"], "flag --likelihood=noisy_or: value should be one of <evidence|max_pool|area|gwrp>"),
    (["more"], r"error: unknown arguments \['more'\]"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_wrong_arguments_end_with_one_clear_line(tmp_path, arguments, message):
    code, _, err = run(f"--workdir={tmp_path / 'out'}", "--likelihood=max_pool", *arguments)
    assert code == 1 and re.search(message, err) and "Traceback" not in err, err


def test_errors_by_hand():
    """Batch means 3, 4, 5: pairs 12, 15, 20; without one of them 20, 15, 12, whose jackknife error is 14 / 3."""
    found = measurements.errors([1.0], np.array([[3.0], [4.0], [5.0]]), np.array([2.0, 4.0, 6.0]), 3)
    assert found.bias == pytest.approx(np.sqrt(47 / 3)) and found.bias_below is None
    assert found.sd == pytest.approx(np.sqrt(12 / 6))
    assert found.rmse == pytest.approx(np.sqrt(12 / 9 + 50 / 3))


def test_a_bias_below_three_standard_errors_is_hidden():
    """Batch means 1, 2, 4: pairs 2, 4, 8, of mean 14 / 3; the jackknife error is sqrt(112) / 3."""
    found = measurements.errors([1.0], np.array([[1.0], [2.0], [4.0]]), np.zeros(3), 2)
    assert found.bias is None and found.bias_below == pytest.approx(np.sqrt(14 / 3 + np.sqrt(112)))


def test_the_cosine_is_that_of_the_mean_estimate():
    """(2, 0) and an error of (0, 2): at 45 degrees; an error of (-4, 0) turns it round."""
    for deviation, bias, cosine in (([0.0, 2.0], 1.0, np.sqrt(0.5)), ([-4.0, 0.0], 2.0, -1.0)):
        found = measurements.errors([2.0, 0.0], np.tile(deviation, (4, 1)), np.zeros(4), 2)
        assert found.bias == pytest.approx(bias) and found.cosine == pytest.approx(cosine)


def test_noise_alone_does_not_pass_for_a_bias():
    """Means whose noise has a norm of 1: the bound stays below that, and a bias is hardly ever reported."""
    rng, hidden = np.random.default_rng(0), 0
    for _ in range(300):
        means = rng.normal(size=(32, 400)) * np.sqrt(32 / 400)
        assert np.linalg.norm(means.mean(axis=0)) > 0.8
        found = measurements.errors(np.ones(400) / 20, means, np.ones(32), 8)
        hidden += found.bias is None and found.bias_below < 0.8
    # Beyond three standard errors lie .3 %: 97 % are eight standard errors of the count away.
    assert hidden >= 0.97 * 300


def test_measured_gives_bias_and_deviation_of_a_known_estimator():
    """Gradients exact + shift + noise in 5 x 3 logits, of three different spreads; values 0.5 too large."""
    exact = np.arange(15.0).reshape(5, 3)
    norm, norm_of_sum = np.linalg.norm(exact), np.linalg.norm(exact.sum(axis=0))
    bias, bias_of_sum = 2 * np.sqrt(15) / norm, 10 * np.sqrt(3) / norm_of_sum

    def estimate(key):
        noise = jax.random.normal(key, exact.shape)
        gradients = [exact + shift + spread * noise for shift, spread in ((2.0, 3.0), (2.0, 0.0), (0.0, 3.0))]
        return jnp.full(3, 7.5), jnp.stack(gradients)

    both, shift, noise = measurements.measured(jax.random.key(0), estimate, (7.0, exact), 4096)
    for found in (both, shift):
        # The standard error of the bias is 3 / sqrt(4096) along the shift, over norms of 31 and more.
        assert found.logits.bias == pytest.approx(bias, abs=4 * 3 / 64 / norm)
        assert found.summed.bias == pytest.approx(bias_of_sum, abs=4 * 3 * np.sqrt(5) / 64 / norm_of_sum)
    for found in (both, noise):
        # 4096 x 15 squares of normals: their mean is within sqrt(2 / 61440), the sd within half of that.
        assert found.logits.sd == pytest.approx(3 * np.sqrt(15) / norm, rel=4 * 0.003)
        assert found.summed.sd == pytest.approx(3 * np.sqrt(15) / norm_of_sum, rel=4 * 0.0064)
    assert noise.logits.bias is None and shift.logits.sd < 1e-6
    np.testing.assert_allclose([both.value_error, shift.value_error, noise.value_error], 0.1, rtol=1e-5)


@pytest.mark.slow_except("evidence")
@pytest.mark.parametrize("likelihood", ["evidence", "max_pool", "area", "gwrp"])
def test_exact_gradients_are_those_of_the_sum_over_all_labellings(likelihood):
    case = measurements.make_case(likelihood, 4, 1)
    logits = np.asarray(case.logits, np.float64)

    def enumerated(logits):
        return measurements.enumerated_expectation(case.log_likelihood, logits)

    value, gradient = jax.jit(jax.value_and_grad(case.expectation))(case.logits)
    by_loops = reference.expectation(jax.jit(case.log_likelihood), reference.softmax(logits))
    np.testing.assert_allclose(value, by_loops, rtol=1e-5)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(enumerated))(case.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.slow_except("area")
@pytest.mark.parametrize("likelihood", ["evidence", "area"])
def test_posterior_marginals_are_those_of_the_sum_over_all_labellings(likelihood):
    case = measurements.make_case(likelihood, 4, 1)
    kernel = measurements.crf_kernel(2, 10.0, 1)
    one_hot = np.eye(3)[reference.labellings(4, 3)]
    log_joint = np.array([float(value) for value in jax.vmap(case.log_likelihood)(one_hot)])
    log_joint = log_joint - reference.labelling_energies(np.asarray(kernel, np.float64), 3)
    weights = np.exp(log_joint - np.logaddexp.reduce(log_joint))
    marginals = measurements.posterior_marginals(case, kernel)
    np.testing.assert_allclose(marginals, np.einsum("n,nik->ik", weights, one_hot), rtol=1e-4, atol=1e-6)
    if case.log_potentials is not None:
        of_pixels = np.sum(one_hot * np.asarray(case.log_potentials), axis=(1, 2))
        np.testing.assert_allclose(of_pixels, jax.vmap(case.log_likelihood)(one_hot), rtol=1e-5)


@pytest.mark.parametrize("num_pixels", [9, 100, 1600])
def test_a_class_of_max_pool_is_absent_about_as_often_at_every_size(num_pixels):
    plain = np.random.default_rng(0).normal(size=(num_pixels, 3))
    logits = measurements.rare_classes(plain)
    probs = reference.softmax(logits)
    np.testing.assert_allclose(probs[:, 1:].sum(axis=0), 1, rtol=1e-6)
    absent = np.prod(1 - probs[:, 1:], axis=0)
    assert np.all((0.2 < absent) & (absent < 0.38))
    np.testing.assert_allclose(logits - plain, np.broadcast_to((logits - plain)[0], plain.shape), atol=1e-9)


def test_maps_are_the_same_at_every_size():
    coarse, fine = (measurements.smooth_maps(np.random.default_rng(0), side).reshape(side, side, 2) for side in (2, 6))
    np.testing.assert_allclose(coarse, fine[np.ix_([1, 4], [1, 4])], rtol=1e-9, atol=1e-12)


def test_the_evidence_of_a_class_without_tag_is_small_everywhere():
    potentials = np.asarray(measurements.make_case("evidence", 100, 0).log_potentials)
    assert np.all(potentials[:, 2] < np.log(0.01)) and not np.any(TAGS[2:])
    assert np.ptp(potentials[:, 1]) > 3


def test_sums_over_labellings_end_at_nine_pixels():
    with pytest.raises(ValueError, match="expected at most 9 .* got 16"):
        measurements.make_case("area", 16, 0).expectation(jnp.zeros((16, 3)))
