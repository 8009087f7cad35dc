"""Configurations on the command line: by name, with lists of words, printed, and sizes that follow from the input size.

A program defines its flag by `define`, and `experiments.reporting.run` calls `with_paths` before the flags are parsed,
`explained` where that fails and `settle` after it.
"""

import importlib.util
import pathlib
import re
import shlex
import sys

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from lcrf_jax.machine.errors import SettingError, nearest
from lcrf_jax.machine.files import at_home
from lcrf_jax.machine.progress import say
from lcrf_jax.runfolder.segments import flat_settings

from .configs import base

CONFIGS = pathlib.Path(__file__).parent / "configs"
_WORD = r"[A-Za-z_][\w.:@/-]*"
_WORDS = re.compile(rf"[(\[]?\s*({_WORD}(?:\s*,\s*{_WORD})*)\s*,?\s*[)\]]?")
_ASSIGNED = re.compile(r"    config\.([\w.]+) = (.*?)(?:  # (.*))?")
_HELP_AT = 56  # column of what --print_config says of a setting

flags.disclaim_key_flags()  # --help tells them of the program that calls `define`


def define(name="config", default=None, text="Configuration: a name, such as folder, or a file of your own."):
    """The flag of a configuration and of its settings, and --print_config."""
    config_flags.register_flag_parser_for_type(tuple, _Tuple())
    flags.DEFINE_bool(f"print_{name}", False, "Print every setting of the configuration as a flag, and end.")
    return config_flags.DEFINE_config_file(name, default and str(CONFIGS / f"{default}.py"), text, lock_config=True)


def require(*names):
    """Flags that must be given, but not where the configuration is only printed."""
    flags.mark_flag_as_required("config")
    for name in names:
        flags.register_validator(
            name, lambda value: value is not None or flags.FLAGS.print_config, f"Flag --{name} must have a value other than None."
        )


class _Tuple(tuple_parser.TupleParser):
    """Tuples as they are typed: head,s16 are two words, and so are [head,s16] and ('head', 's16')."""

    def parse(self, argument):
        words = _WORDS.fullmatch(argument.strip()) if isinstance(argument, str) else None
        return tuple(re.split(r"\s*,\s*", words[1])) if words else super().parse(argument)


def names():
    """Names of the configurations that come with the programs."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__")


def found(value):
    """The file of a configuration that is given by its name or its path.

    Raises SettingError where there is neither.
    """
    path, colon, rest = value.partition(":")
    if at_home(path).is_file():
        return f"{at_home(path)}{colon}{rest}"
    if path in names():
        return f"{CONFIGS / path}.py{colon}{rest}"
    name = pathlib.Path(path).stem
    near = f"; did you mean --config={name}?" if name in names() else nearest(name, names())
    raise SettingError(f"--config={value}: there is no such file, and no configuration of this name among {', '.join(names())}{near}")


def with_paths(argv):
    """The arguments with the file of the configuration where its name was given.

    Raises SettingError where there are settings and no configuration.
    """
    argv, at = list(argv), 0
    if (given := _given_settings(argv)) and "config" in flags.FLAGS and not _config_of(argv):
        raise SettingError(f"--config.{given[0]}: of which configuration? Give --config=FILE, or --config=NAME with one of {', '.join(names())}")
    while at < len(argv) and argv[at] != "--":
        given = re.fullmatch(r"(--?config)(?:=(.*))?", argv[at], re.DOTALL)
        if given and given[2] is not None:
            argv[at] = f"{given[1]}={found(given[2])}"
        elif given and at + 1 < len(argv):
            argv[at + 1] = found(argv[at + 1])
        at += 1
    return argv


def _config_of(argv):
    """Name or file of the configuration that arguments give, or its default."""
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        if given := re.fullmatch(r"--?config(?:=(.*))?", word, re.DOTALL):
            return after if given[1] is None else given[1]
    return flags.FLAGS["config"].default


def _given_settings(argv):
    """Names of the settings that arguments set."""
    return [match[1] for word in argv if (match := re.match(r"--?(?:no)?config\.([\w.]+)", word))]


def explained(argv, error):
    """In plain words why arguments could not be parsed, where it is a setting that the configuration does not have; or None."""
    if not (given := _given_settings(argv)) or not isinstance(error, AttributeError | KeyError):
        return None
    try:
        known = flat_settings(_loaded(found(_config_of(argv))).to_dict())
    except (OSError, AttributeError, TypeError, ValueError, ImportError):
        return None
    groups = {name.rpartition(".")[0] for name in known}
    for name in given:
        if name not in known and name not in groups and not any(group.startswith(f"{name}.") for group in groups):
            return f"config.{name}: there is no such setting{nearest(name, known) or '; --print_config prints all'}"
    return None


def _loaded(value):
    """The configuration of a file, as it is without the settings of the command line."""
    path, colon, rest = value.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([rest] if colon else []))


def settle():
    """After the flags are parsed: what follows from the input size, and --print_config, which ends the program."""
    if "config" not in flags.FLAGS or not isinstance(config := flags.FLAGS["config"].value, ConfigDict):
        return
    given = config_flags.get_override_values(flags.FLAGS["config"])
    if "input_size" in given:
        follow_input_size(config, _loaded(flags.FLAGS["config"].config_filename).input_size, given)
    if flags.FLAGS.print_config:
        say(printed(config))
        sys.exit(0)


def follow_input_size(config, before, given):
    """Settings in pixels and cells of the input follow a change of its size, but for those that were given too."""
    size = config.input_size
    if not isinstance(size, int) or size < 1 or size == before:
        return
    changes, widths = [], False
    for name, value in base.at_input_size(config, before).items():
        group, _, last = name.rpartition(".")
        holder = _at(config, group)
        if holder is None or holder.get(last) in (None, value) or any(f"{name}.".startswith(f"{one}.") for one in given):
            continue
        with holder.ignore_type():  # a width may be written as a whole number
            holder[last] = value
        if group.endswith("kernel"):
            widths = True
        else:
            changes.append(f"{name}={_text(value)}")
    changes += [f"widths of kernels on the input x {size / before:.3g}"] if widths else []
    if changes:
        say(f"input_size {before} -> {size}, and with it, where you set nothing else: {', '.join(changes)}")


def _at(config, dotted):
    for part in filter(None, dotted.split(".")):
        config = config.get(part) if isinstance(config, ConfigDict) else None
    return config


def printed(config):
    """Every setting as a flag that can be pasted, sorted, with what `base.py` says of it."""
    texts = helps((CONFIGS / "base.py").read_text(encoding="utf-8"))
    lines = []
    for name, value in sorted(flat_settings(config.to_dict()).items()):
        flag = f"--config.{name}={shlex.quote(_text(value))}"
        told = next((texts[part] for part in _itself_and_groups(name) if part in texts), "")
        lines.append(f"{flag:<{_HELP_AT}}  # {told}" if told else flag)
    return "\n".join(lines)


def _itself_and_groups(name):
    while name:
        yield name
        name = name.rpartition(".")[0]


def _text(value):
    """A value as the command line takes it."""
    if isinstance(value, tuple | list):
        words = ",".join(map(str, value))
        return words if value and (len(value) > 1 or isinstance(value[0], str)) else repr(tuple(value))
    return str(value)


def helps(source):
    """dict from the names of settings, and of groups that are set as a whole, to the comments above and beside them."""
    texts, above = {}, []
    for line in source.splitlines():
        comment = re.fullmatch(r"    # (.*)", line)
        if comment:
            above.append(comment[1])
            continue
        setting = _ASSIGNED.fullmatch(line)
        told = " ".join([*above, *([setting[3]] if setting and setting[3] else [])])
        if setting and told and not setting[2].startswith("ConfigDict()"):
            texts[setting[1]] = told
        above = []
    return texts
