"""Configurations on the command line: names, lists, --print_config, and what follows from the input size."""

import shlex

import pytest
from programs import ROOT, run

from experiments import configuring
from experiments.configs import base, tiny
from lcrf_jax.machine.errors import SettingError

TINY = str(ROOT / "experiments" / "configs" / "tiny.py")


def test_a_configuration_is_found_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configuring.found("tiny") == TINY and configuring.found(TINY) == TINY
    (tmp_path / "tiny").mkdir()  # a folder is no configuration
    assert configuring.found("tiny") == TINY
    (tmp_path / "mine.py").write_text("")
    assert configuring.found("mine.py:small") == "mine.py:small"
    assert {"folder", "textures", "voc2012"} <= set(configuring.names())


@pytest.mark.parametrize(("given", "end"), [
    ("foldr", "; did you mean 'folder'?"), ("experiments/configs/tiny.py", "; did you mean --config=tiny?"), ("elsewhere/zzz.py", "voc_animals"),
])  # fmt: skip
def test_a_configuration_that_is_not_there(tmp_path, monkeypatch, given, end):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=f"^--config={given}: there is no such file, and no configuration of this name among base, ") as told:
        configuring.found(given)
    assert str(told.value).endswith(end) and "\n" not in str(told.value)


def test_names_become_paths_in_either_way_of_writing():
    assert configuring.with_paths(["train", "--config=tiny", "--x"]) == ["train", f"--config={TINY}", "--x"]
    assert configuring.with_paths(["train", "-config", "tiny", "--", "--config=zzz"]) == ["train", "-config", TINY, "--", "--config=zzz"]


@pytest.mark.parametrize(("typed", "value"), [
    ("head,s16", ("head", "s16")), ("[head, s16]", ("head", "s16")), ("('head', 's16')", ("head", "s16")), ("head", ("head",)),
    ("4,4", (4, 4)), ("(320,)", (320,)), ("320", (320,)), ("0.4,1.0", (0.4, 1.0)), ("()", ()),
])  # fmt: skip
def test_lists_as_they_are_typed(typed, value):
    assert configuring._Tuple().parse(typed) == value


@pytest.mark.parametrize(("arguments", "message"), [
    (["--config=tiny", "--config.sed=1"], "error: config.sed: there is no such setting; did you mean 'seed'?"),
    (["--config=tiny", "--config.network.tap=1"], "error: config.network.tap: there is no such setting; did you mean 'network.taps'?"),
    (["--config=tiny", "--config.batch_size=0"], "error: batch_size: expected a finite number >= 1, got 0; --print_config says what it means"),
    (["--config.seed=1"], "error: --config.seed: of which configuration? Give --config=FILE, or --config=NAME with one of "),
])  # fmt: skip
def test_wrong_settings_end_with_one_line(arguments, message, tmp_path):
    ended = run("train", *arguments, f"--workdir={tmp_path / 'run'}")
    assert ended.code == 1 and ended.err.startswith(message) and ended.err.count("\n") == 1 and "\\n" not in ended.err


def test_the_printed_configuration_can_be_pasted():
    """Every setting, sorted; all of them given as flags are the same configuration again."""
    printed = run("train", "--config=tiny", "--print_config", "--config.network.taps=head,s8", "--config.data.root=a b's")
    assert printed.code == 0, printed.err
    lines = printed.out.splitlines()
    given = [shlex.split(line, comments=True)[0] for line in lines]
    assert given == sorted(given, key=lambda flag: flag.partition("=")[0])
    assert "--config.network.taps=head,s8" in given and "--config.data.root=a b's" in given and "--config.epochs=1,1" in given
    assert next(line for line in lines if line.startswith("--config.num_threads"))
    assert any(line.startswith("--config.batch_size=8 ") and "# of all devices together" in line for line in lines)
    assert run("train", "--config=tiny", *given, "--print_config").out == printed.out


def test_every_setting_that_the_defaults_explain_is_explained():
    told = configuring.helps((ROOT / "experiments/configs/base.py").read_text(encoding="utf-8"))
    assert told["objective.estimator"].startswith("Of E_q log p(y|z,x): gumbel_softmax") and "maximum likelihood" in told["objective.estimator"]
    assert "input" in told["posterior.kernel"] and "network" not in told  # a group is explained as one where it is set as one


def test_what_follows_from_the_input_size(capsys):
    config = tiny.get_config()
    config.input_size = 192
    configuring.follow_input_size(config, 96, ["input_size", "class_maps.grid", "posterior.kernel"])
    assert config.inference.input_sizes == (192,) and config.class_maps.extra_sizes == (256,)
    assert config.class_maps.grid == 12 and config.posterior.kernel.bilateral_position_width == 80.0  # given: they stay
    assert config.objective.kernel.bilateral_position_width == 160.0 and config.objective.kernel.gaussian_position_width == 48.0
    assert config.objective.kernel.bilateral_colour_width == 13.0 and config.inference.kernel == base.get_config().inference.kernel
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "input_size 96 -> 192, and with it, where you set nothing else: inference.input_sizes=(192,), class_maps.extra_sizes=(256,), "
        "widths of kernels on the input x 2"
    )
    before = config.to_dict()
    configuring.follow_input_size(config, 192, ["input_size"])
    assert config.to_dict() == before and capsys.readouterr().out == ""


def test_widths_that_are_whole_numbers_follow_too():
    config = tiny.get_config()
    config.objective.kernel = base.kernel(1, 81, 13, 1, 3)
    config.input_size = 64
    configuring.follow_input_size(config.lock(), 96, ["input_size"])
    assert config.objective.kernel.bilateral_position_width == 54.0 and config.objective.kernel.gaussian_position_width == 2.0
    assert config.is_locked and config.is_type_safe


def test_sizes_of_the_input_are_those_that_every_backbone_takes():
    config = base.get_config()
    config.input_size = 250
    values = base.at_input_size(config, 320)
    assert values["inference.input_sizes"] == (250,) and values["class_maps.grid"] == 31
    config.class_maps.extra_sizes = (448, 20)
    assert base.at_input_size(config, 320)["class_maps.extra_sizes"] == (352, 32)


def test_progress_is_chosen_by_a_flag_and_a_wrong_word_is_refused():
    ended = run("train", "--config=tiny", "--progress=loud")
    assert ended.code == 1 and "auto|lines|json|quiet" in ended.out + ended.err
