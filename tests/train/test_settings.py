"""Every setting is used or refused."""

import pytest

from experiments import reporting
from experiments.configs import base, textures
from lcrf_jax.data.sources.textures import TexturesSource
from lcrf_jax.machine.errors import SettingError, nearest
from lcrf_jax.train.methods import METHODS
from lcrf_jax.train.plan import check_without_data, planned_rounds, resolved_plan
from lcrf_jax.train.settings import check_names, check_settings


def settings(**changes):
    config = textures.get_config().to_dict()
    for path, value in changes.items():
        *groups, name = path.split("__")
        at = config
        for group in groups:
            at = at[group]
        at[name] = value
    return config


@pytest.mark.parametrize(("changes", "message"), [
    ({"batch_size": 0}, r"batch_size: expected a finite number >= 1, got 0"),
    ({"log_every_steps": 0}, "log_every_steps: .*>= 1, got 0"),
    ({"save_every_steps": -1}, "save_every_steps: .*got -1"),
    ({"eval_every_epochs": 0}, "eval_every_epochs: .*got 0"),
    ({"seed": 2**32}, "seed: expected at most 4294967295, got 4294967296"),
    ({"least_steps": 10**12}, "least_steps: expected at most 2147483647, got 1000000000000"),
    ({"inference__num_iterations": 10**12}, "inference.num_iterations: expected at most"),
    ({"baselines__saliency__image_size": 10**9}, "baselines.saliency.image_size: expected at most 12649"),
    ({"seed": -1}, "seed: .*>= 0, got -1"),
    ({"optimizer__learning_rate": float("nan")}, "optimizer.learning_rate: .*got nan"),
    ({"optimizer__learning_rate": 0.0}, "optimizer.learning_rate: .*> 0, got 0"),
    ({"optimizer__clip_norm": 0.0}, "optimizer.clip_norm"),
    ({"posterior__tempering": 0.0}, "posterior.tempering"),
    ({"posterior__num_iterations": 2.5}, "posterior.num_iterations: .*2.5"),
    ({"inference__input_sizes": ()}, r"inference.input_sizes: expected one or more sizes in pixels, .* got \(\)"),
    ({"class_maps__extra_sizes": (0,)}, r"class_maps.extra_sizes: expected sizes in pixels"),
    ({"posterior__kernel__bilateral_position_width": 0.0}, "posterior.kernel.bilateral_position_width: .*> 0"),
    ({"inference__kernel__gaussian_weight": -1.0}, "inference.kernel.gaussian_weight: .*>= 0"),
    ({"inference__kernel": {"sxy": 3}}, "inference.kernel.sxy: there is no such field"),
    ({"rounds": 0}, "rounds: .*>= 1, got 0"),
    ({"data__val_split": "train"}, "data.val_split: expected another split than 'train', which is trained on"),
    ({"data__on_bad_image": "skipp"}, "data.on_bad_image: expected one of error, skip, got 'skipp'; did you mean 'skip'"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_numbers_and_words_that_cannot_be(changes, message):
    with pytest.raises(SettingError, match=message):
        check_settings(settings(**changes))


@pytest.mark.parametrize(("changes", "message"), [
    ({"batch_size": 10**9}, "batch_size, with input_size: an array of .* GiB would be made, and there are .* GiB of memory; lower them"),
    ({"input_size": 10**9}, "input_size: expected at most 12649, the side of an image of 160 million pixels, got 1000000000"),
    ({"inference__input_sizes": (10**9,)}, "inference.input_sizes: expected at most 12649"),
    ({"class_maps__extra_sizes": (10**9,)}, "class_maps.extra_sizes: expected at most 12649"),
    ({"class_maps__grid": 10**9}, "class_maps.grid: expected at most input_size, .*, a cell for each of its pixels, got 1000000000"),
    ({"objective__num_samples": 10**9}, "objective.num_samples, with batch_size and input_size: an array of"),
    ({"network__widths": (10**9, 10**9, 10**9)}, "network.widths, with batch_size: an array of"),
    ({"num_threads": 10**9}, "num_threads: an array of"),
    ({"epochs": (10**10,) * 2, "rounds": 2}, "epochs, least_steps: expected at most 2147483647 steps"),
    ({"epochs": (10**400,) * 2, "rounds": 2}, "epochs, least_steps: expected at most 2147483647 steps"),
    ({"rounds": 10**9}, r"epochs: expected 1000000000 number.*, or --config.rounds=\d if that is meant"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")  # fmt: skip
def test_what_would_take_more_memory_or_steps_than_there_are_is_refused_before_data_is_read(changes, message):
    config = settings(**{"network__taps": ("head", "s16", "s8"), **changes})
    with pytest.raises(SettingError, match=message):
        check_without_data(config)


def test_settings_that_can_be():
    check_settings(settings())
    check_settings({"batch_size": 8})  # what is not there is not looked at


def test_a_name_that_nothing_knows_is_refused_with_the_nearest():
    known = base.get_config().to_dict()
    check_names(settings(), known)  # the options of data are those of their kind
    with pytest.raises(SettingError, match=r"config.epoch: there is no such setting; did you mean 'epochs'\?"):
        check_names(settings(epoch=3), known)
    with pytest.raises(SettingError, match=r"config.optimizer.learning_rat: .* did you mean 'optimizer.learning_rate'\?"):
        check_names(settings(optimizer__learning_rat=3), known)
    assert nearest("zzz", known) == ""


@pytest.mark.parametrize(("epochs", "message"), [
    ((3,), r"epochs: expected 2 number\(s\), .*got \(3,\); write --config.epochs=3,3, or --config.rounds=1 if that is meant"),
    ((2, 3, 4), r"expected 2 number\(s\), .*write --config.epochs=2,3, or --config.rounds=3"),
    (3, r"epochs: expected a tuple of whole numbers, one for each round, such as \(4, 4\), got 3"),
    ((2.5, 1), r"expected a tuple of whole numbers"),
    (("a", "b"), r"expected a tuple of whole numbers"),
])
def test_epochs_of_another_number_of_rounds_are_refused(epochs, message):
    with pytest.raises(SettingError, match=message):
        planned_rounds(settings(epochs=epochs), 160)


def test_rounds_are_what_the_configuration_says():
    assert len(planned_rounds(settings(epochs=(3,), rounds=1), 160)) == 1
    [only] = planned_rounds(settings(epochs=(3,), method="sec"), 160)  # one round, of all the epochs
    assert only.epochs == 3


@pytest.mark.parametrize(("changes", "message"), [
    ({"inference__input_sizes": (192, 100)}, r"inference.input_sizes: expected a multiple of 32, got 100"),
    ({"class_maps__extra_sizes": (16,)}, r"class_maps.extra_sizes: expected a multiple of 32, got 16"),
    ({"method": "ccnn", "baselines__ccnn__slack": -1.0}, r"slack: expected a finite number >= 0"),
    ({"objective__likelihood_options__evidence__sharpnes": 2.0}, "sharpnes"),
    ({"objective__likelihood_options__evidence__background_level": -2.0}, "background_level"),
    ({"objective__likelihood": "gwrp", "objective__likelihood_options__gwrp__foreground_decay": 2.0}, "foreground_decay"),
    ({"method": "sec", "baselines__sec__num_iterations": -1}, "num_iterations"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_what_losses_and_networks_refuse_is_a_setting(changes, message):
    source = TexturesSource("train", num_train=16)
    with pytest.raises(SettingError, match=message):
        resolved_plan(settings(**changes), source.class_names, source.tags)


@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_every_method_can_be(method):
    source = TexturesSource("train", num_train=16)
    assert resolved_plan(settings(method=method), source.class_names, source.tags).method is METHODS[method]


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["straight_through", "reinforce", "mean", "exact", "mcmc"])
def test_the_settings_of_every_estimator_can_be(estimator):
    source = TexturesSource("train", num_train=16)
    given = settings(objective__estimator=estimator, objective__num_samples=2, objective__noise_block=1)
    assert resolved_plan(given, source.class_names, source.tags).config is given


@pytest.mark.parametrize(("name", "value"), [
    ("views__scale_range", (0.4,)), ("views__scale_range", (0.9, 0.4)), ("views__scale_range", (0.4, 0.6, 1.0)),
    ("views__ratio_range", (0.0, 1.0)), ("baselines__cam__background_level", -1.0), ("baselines__sec__min_prob", float("nan")),
])
def test_ranges_and_numbers_that_nothing_would_use(name, value):
    with pytest.raises(SettingError, match=name.replace("__", ".")):
        check_settings(settings(**{name: value}))


def test_folders_that_flags_name(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(reporting.run_folder("~/run")) == "/somewhere/run"
    with pytest.raises(SettingError, match="--workdir: expected a folder, got an empty name"):
        reporting.run_folder(" ")
