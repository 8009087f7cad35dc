"""The command `lcrf`: `lcrf NAME` runs the program that `python -m experiments.NAME` runs in a clone.

What lists the programs imports neither JAX nor a program, and answers at once.
"""

import importlib.util
import os
import runpy
import signal
import sys
from collections.abc import Sequence

from lcrf_jax.machine.errors import nearest

# What one calls it: (module of experiments, what it does), in the order of use.
COMMANDS = {
    "check": ("check_data", "read photographs, tags and masks, and tell what is wrong"),
    "train": ("train", "train on photographs and their tags"),
    "evaluate": ("evaluate", "score a run on a split with masks"),
    "predict": ("predict", "write masks of photographs"),
    "demo": ("demo", "a page where one drops a photograph and sees its mask"),
    "export": ("export", "write a trained run as one file"),
    "compare": ("compare", "train every method alike, and write the tables"),
    "ablation": ("ablation", "train variations of an objective, and compare them"),
    "estimators": ("estimators", "bias and variance of the gradient estimators"),
    "bench": ("bench", "speed, memory and accuracy on this machine"),
    "weights": ("weights", "check the weights of a backbone, and show what they give"),
    "shards": ("shards", "write photographs and tags as shards, for data sets of many files"),
    "cache": ("cache", "what is kept on this machine, and removing it"),
    "example-folder": ("example_folder", "write a folder of photographs and tags to try"),
    "build-voc": ("build_voc", "make the data set voc_weak of PASCAL VOC"),
    "voc-results": ("voc_results", "pack masks for the evaluation server of PASCAL VOC"),
    "export-onnx": ("export_onnx", "write a trained run as ONNX, in an environment of its own"),
}
PACKAGES = ("lcrf_jax.experiments", "experiments")  # installed; in a clone that is not


def usage() -> str:
    """The commands with a line each.

    Returns:
      A text of several lines.
    """
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join([
        "lcrf: masks from photographs and their tags, by latent conditional random fields", "", "  lcrf COMMAND [--flag=value ...]", "",
        *lines, "", "lcrf COMMAND --help tells its flags, and lcrf --version the version. The first steps with photographs of your own:", "",
        "  lcrf check --data=FOLDER",
        "  lcrf train --config=folder --config.data.root=FOLDER --workdir=RUN",
        "  lcrf predict --checkpoint=RUN --images=FOLDER --out=MASKS --crf",
    ])  # fmt: skip


def module_of(command: str) -> str:
    """The module of `experiments` that a command runs.

    Args:
      command: as it was typed, `check` or `check_data`.

    Returns:
      Its name.

    Raises:
      ValueError: if there is none; the message names the nearest.
    """
    modules = {name: module for name, (module, _) in COMMANDS.items()}
    modules |= {module: module for module in modules.values()}
    name = command if command in modules else command.replace("-", "_")
    if name in modules:
        return modules[name]
    question = nearest(command, modules).removeprefix("; ")
    raise ValueError(f"there is no command {command!r}: {f'{question} ' if question else ''}lcrf --help lists them")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
      arguments: those after `lcrf`; None takes them from the command line.

    Raises:
      SystemExit: when the command has ended, with its exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:
        given = [*given[1:2], "--help"]
    if not given or given[0] in ("--help", "-h", "-help", "--helpshort", "--helpfull"):
        _print(usage())
    elif given[0] in ("--version", "-V", "version"):
        _print(f"lcrf_jax {sys.modules[__package__].__version__}")
    else:
        _run(given)


def _run(given):
    try:
        module = module_of(given[0])
    except ValueError as error:
        sys.exit(f"error: {error}")
    package = next((name for name in PACKAGES if _is_there(name)), None)
    if package is None:
        sys.exit("error: the programs are not installed beside lcrf_jax: pip install '.[train]' in your clone")
    sys.argv = ["lcrf", *given[1:]]
    runpy.run_module(f"{package}.{module}", run_name="__main__", alter_sys=True)


def _is_there(package):
    return importlib.util.find_spec(package) is not None


def _print(text):
    """Print a text for a reader who may be gone: `lcrf | head -1`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)


if __name__ == "__main__":
    main()
