"""A config.json that was edited by hand: each entry that cannot be is refused by name, before anything is computed."""

import json

import numpy as np
import pytest
import small_segmenter
from programs import assert_refused, run, with_entry

import lcrf_jax
from lcrf_jax.baselines import cam_log_probs, ilp_log_probs
from lcrf_jax.nets.network import build_network, unfit_parameters
from lcrf_jax.predict.checks import check_description, check_parameters, told_as_parameters
from lcrf_jax.predict.model import described
from lcrf_jax.predict.outputs import OUTPUTS
from lcrf_jax.predict.segmenter import make_segmenter, segment
from lcrf_jax.runfolder.compact import shipped_models
from lcrf_jax.runfolder.description import CheckpointError

NETWORK = {"backbone": "small", "last_stride": 16, "taps": ["head", "s16"], "widths": [12, 8], "dropout": 0.2, "num_classes": 3}
INFERENCE = {"input_sizes": [96], "mirror": True, "kernel": lcrf_jax.KernelParams()._asdict(), "num_iterations": 3, "unary_weight": 1.0}
NEWER = {"coarse_iterations": 2, "prior_weight": 0.5, "max_side": 640, "class_offsets": [0.0, 0.5, 1.0], "output": "ilp", "output_options": {"sharpness": 5.0}}
DESCRIPTION = {"class_names": ["background", "cat", "dog"], "network": NETWORK, "inference": {**INFERENCE, **NEWER}, "supervision": "tags", "training": {}}


def edited(entry, value, description=DESCRIPTION):
    """A description with another value of the entry of a dotted name."""
    return with_entry(description, entry, value)


WRONG = [
    ("class_names", ["background", "cat"], "expected 3 names, one for each of network.num_classes, got 2"),
    ("class_names", "abc", "expected a list of names, background first, got 'abc'"),
    ("class_names", ["background", "cat", "cat"], "expected each name once, got 'cat' twice"),
    ("class_names", [0, 1, 2], "expected a list of names"),
    ("class_names", ["background", "cat", ""], "expected a list of names"),
    ("network", {}, "expected the entries"),
    ("network.taps", None, "expected the entries"),
    ("network.widths", [12, 0], "expected whole numbers of at least 1"),
    ("network.widths", [12, "8"], "expected whole numbers of at least 1"),
    ("network.num_classes", "3", "expected the entries"),
    ("network.backbone", "smal", "expected one of"),
    ("inference.input_sizes", [], "expected one or more sizes"),
    ("inference.input_sizes", 0, "expected one or more sizes"),
    ("inference.input_sizes", [0], "expected one or more sizes"),
    ("inference.input_sizes", ["96"], "expected one or more sizes"),
    ("inference.input_sizes", [97], "expected a multiple of 32, got 97"),
    ("inference.mirror", "no", "expected true or false, got 'no'"),
    ("inference.num_iterations", -1, "expected a finite number >= 0, got -1"),
    ("inference.num_iterations", "10", "expected a number, got '10'"),
    ("inference.num_iterations", True, "expected a number, got True"),
    ("inference.kernel", None, "expected the weights and widths"),
    ("inference.kernel", {"bilateral_weight": 1.0}, "it has no bilateral_position_width, bilateral_colour_width"),
    ("inference.kernel.foo", 1.0, "there is no such field"),
    ("inference.kernel.bilateral_weight", -1, "expected a finite number >= 0, got -1"),
    ("inference.kernel.bilateral_weight", None, "expected a number, got None"),
    ("inference.kernel.gaussian_position_width", 0, "expected a finite number > 0"),
    ("inference.unary_weight", -1, "expected a finite number >= 0"),
    ("inference.unary_weight", float("nan"), "expected a finite number >= 0"),
    ("inference.max_side", 0, "expected a finite number >= 1"),
    ("inference.max_side", -5, "expected a finite number >= 1"),
    ("inference.max_side", "640", "expected a number, got '640'"),
    ("inference.max_side", None, "expected a number, got None"),
    ("inference.max_side", 640.0, "expected a whole number, got 640.0"),
    ("inference.prior_weight", "x", "expected a number, got 'x'"),
    ("inference.class_offsets", [0.0, 1.0], "expected a list of 3 numbers, one for each class"),
    ("inference.class_offsets", 1.0, "expected a list of 3 numbers"),
    ("inference.class_offsets", [0.0, "1", 1.0], "expected a number, got '1'"),
    ("inference.class_offsets", [0.0, float("inf"), 1.0], "expected a finite number >= 0"),
    ("inference.coarse_iterations", 99, "expected at most num_iterations, 3, got 99"),
    ("inference.coarse_iterations", None, "expected a number, got None"),
    ("inference.output", "foo", "expected one of softmax, ilp, class_maps, got 'foo'"),
    ("inference.output", None, "expected one of softmax"),
    ("inference.output_options", None, "expected the options of the output 'ilp', got None"),
    ("inference.output_options.sharp", 1.0, "no such option; did you mean 'sharpness'"),
    ("inference.output_options.sharpness", "5", "expected a number, got '5'"),
]


@pytest.mark.parametrize("entry, value, message", WRONG, ids=[f"{entry}={value}"[:60] for entry, value, _ in WRONG])
def test_an_entry_that_cannot_be_is_named_with_its_file(entry, value, message):
    with pytest.raises(CheckpointError, match=rf"^RUN/config.json: {entry.split('.')[0]}.*: .*{message}.*; correct it, or restore the file"):
        check_description(edited(entry, value), "RUN/config.json")


def test_an_entry_that_is_needed_and_missing():
    for name in INFERENCE:
        lacking = {key: value for key, value in INFERENCE.items() if key != name}
        with pytest.raises(CheckpointError, match=f"inference: it has no {name}; correct it"):
            check_description({**DESCRIPTION, "inference": lacking}, "config.json")


def test_runs_of_every_version_are_taken():
    check_description(DESCRIPTION, "")
    for name in NEWER:
        check_description({**DESCRIPTION, "inference": {key: value for key, value in INFERENCE.items() if key != name}}, "")
    check_description({**DESCRIPTION, "inference": INFERENCE}, "")
    maps = {"background_level": 0.2, "sharpness": 2.0, "floor": 0.01}
    check_description({**DESCRIPTION, "inference": {**INFERENCE, "output": "class_maps", "output_options": maps}}, "")
    for name in shipped_models():
        described(name)


def test_every_output_with_options_is_known():
    from lcrf_jax.predict import checks

    assert checks._FUNCTIONS == {"ilp": ilp_log_probs, "class_maps": cam_log_probs} and set(OUTPUTS) == {"softmax", *checks._FUNCTIONS}


@pytest.fixture
def folder(checkpoint):
    """A finished run, whose description is put back."""
    path = checkpoint / "config.json"
    before = path.read_text()
    yield checkpoint
    path.write_text(before)


def edit(folder, entry, value):
    path = folder / "config.json"
    path.write_text(json.dumps(edited(entry, value, json.loads(path.read_text()))))


@pytest.mark.parametrize("entry, value", [
    ("network", None), ("inference", None), ("inference", []), ("training", "x"), ("training.data", 3), ("segments", [1]), ("inference.max_side", 0),
    ("versions", []), ("data", 1),
], ids=lambda value: str(value))  # fmt: skip
def test_a_run_that_was_edited_is_refused_in_one_line(folder, entry, value):
    edit(folder, entry, value)
    with pytest.raises(CheckpointError, match=f"^{folder}/config.json: {entry}: expected .*; correct it, or restore the file from a copy"):
        lcrf_jax.load(folder)


def test_programs_refuse_it_too(folder):
    edit(folder, "inference.max_side", 0)
    for program in ("predict", "evaluate"):
        flags = ("--images=docs", f"--out={folder / 'out'}") if program == "predict" else ()
        ended = run(program, f"--checkpoint={folder}", *flags)
        assert_refused(ended, f"^error: {folder}/config.json: inference.max_side: expected a finite number >= 1, got 0")
        assert ended.err.count("\n") == 1


@pytest.mark.parametrize("entry, value, message", [
    ("training.data", {}, "training.data.kind: expected a text, got nothing"), ("training", {}, "training.method: expected a text, got nothing"),
    ("supervision", None, "supervision: expected a text, got None"), ("training.data.options", 3, r"training.data.options: expected an object \{...\}, got 3"),
], ids=str)  # fmt: skip
def test_what_a_score_tells_of_has_to_be_there(folder, entry, value, message):
    edit(folder, entry, value)
    ended = run("evaluate", f"--checkpoint={folder}")
    assert_refused(ended, f"^error: {folder}/config.json: {message}; correct it, or restore the file from a copy")
    assert ended.err.count("\n") == 1


def test_parameters_of_another_number_of_classes(folder):
    names = json.loads((folder / "config.json").read_text())["class_names"]
    edit(folder, "class_names", [*names, "another"])
    edit(folder, "network.num_classes", len(names) + 1)
    with pytest.raises(CheckpointError, match=f"config.json: class_names: expected {len(names)} names, as many as its decoder has classes, got {len(names) + 1}"):
        lcrf_jax.load(folder)


OTHER_NETWORKS = {"widths": [12, 9], "backbone": "vgg16", "last_stride": 32, "taps": ["head", "s8"], "decoder": "original"}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
@pytest.mark.parametrize("crf", [False, True])
def test_parameters_of_another_network_are_told_when_it_is_asked(name, crf):
    description = {"network": {**small_segmenter.NETWORK, name: OTHER_NETWORKS[name]}, "class_names": list("abcd"), "inference": small_segmenter.SETTINGS}
    segmenter = make_segmenter(description, small_segmenter.parameters())
    with pytest.raises(CheckpointError, match=r"^network: the parameters are those of another network .* expected \[.*; correct the entry network"):
        segment(segmenter, np.zeros((40, 50, 3), np.uint8), crf=crf)


def test_parameters_that_fit_are_no_excuse_for_another_error():
    network, params = build_network(small_segmenter.NETWORK), small_segmenter.parameters()
    assert unfit_parameters(small_segmenter.NETWORK, params) == []
    with pytest.raises(KeyError, match="another"), told_as_parameters(network, params):
        raise KeyError("another")


def test_layers_of_a_tap_that_would_be_left_out_without_a_word():
    """Of taps head and s16 with widths that are equal, the network of the head alone takes the parameters."""
    network = {**small_segmenter.NETWORK, "taps": ["head"], "widths": [12]}
    description = {"network": network, "class_names": list("abcd"), "inference": small_segmenter.SETTINGS}
    with pytest.raises(CheckpointError, match="config.json: network.taps: expected 's16' among them, .*, got \\['head'\\]; correct it"):
        check_parameters(description, small_segmenter.parameters(), "config.json")


def test_programs_tell_of_another_network(folder):
    edit(folder, "network.widths", [16, 13])
    for program, flags in (("predict", ("--images=docs/animals.jpg", f"--out={folder / 'out'}")), ("evaluate", ())):
        ended = run(program, f"--checkpoint={folder}", *flags)
        assert_refused(ended, "(^|\n)error: network: the parameters are those of another network")
    edit(folder, "network", {**json.loads((folder / "config.json").read_text())["network"], "widths": [16, 12], "backbone": "vgg16"})
    edit(folder, "network.last_stride", 16)
    assert_refused(run("evaluate", f"--checkpoint={folder}", "--cam", "--tags_given"), "(^|\n)error: network: the parameters are those of another network")
