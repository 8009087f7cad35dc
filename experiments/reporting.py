"""What the experiments share: opening a run for scoring, tables, pictures, and errors without a traceback."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import signal
import sys
import time
import traceback
from typing import NamedTuple

import numpy as np
from absl import app, flags, logging

from lcrf_jax.command import COMMANDS
from lcrf_jax.data.files.shard_files import has_shards
from lcrf_jax.data.parts import InParts, in_parts
from lcrf_jax.machine import processes, progress, signals
from lcrf_jax.machine.cache import default_directory
from lcrf_jax.machine.compilation import keep_programs
from lcrf_jax.machine.errors import SettingError, UserError, for_users
from lcrf_jax.machine.files import at_home, parsed_json, write_whole
from lcrf_jax.machine.progress import say, show
from lcrf_jax.metrics import format_iou_table, iou_per_class, mean_iou
from lcrf_jax.pictures.palette import picture_grid
from lcrf_jax.predict import evaluation
from lcrf_jax.predict.model import trained
from lcrf_jax.predict.segmenter import make_segmenter
from lcrf_jax.runfolder.description import effective_changes, has_parameters
from lcrf_jax.runfolder.digests import params_digest
from lcrf_jax.train.settings import check_names, check_settings
from lcrf_jax.train.splits import checked_split

from . import configuring
from .configs import base
from .run_report import data_in_words, write_run_report

NUM_PICTURES = 8


def define_process_flags():
    """Flags of a program that can run as several processes, see `lcrf_jax.machine.processes`."""
    flags.DEFINE_bool("distributed", False, "Run as one of several processes; clusters that JAX knows need no more.")
    flags.DEFINE_string("coordinator", None, "Of several processes: host:port of process 0.")
    flags.DEFINE_integer("num_processes", None, "Of several processes: how many.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Of several processes: number of this one, from 0 on.", lower_bound=0)


def join_processes():
    """Become one of several processes if the flags say so."""
    values = flags.FLAGS.flag_values_dict()
    given = [values.get(name) for name in ("coordinator", "num_processes", "process_id")]
    if values.get("distributed"):
        processes.join(*given)
    elif any(value is not None for value in given):
        raise ValueError("--coordinator, --num_processes and --process_id are of use with --distributed alone")


def run(main, *, join=join_processes, keep_compiled=True):
    """Run an experiment; what the user can mend ends with one line and exit code 1, anything else with its traceback.

    What is compiled is kept for the next start, but not where compiling is measured.
    """

    def guarded(argv):
        signals.raise_on_termination()
        if flags.FLAGS["progress"].present:
            os.environ[progress.VARIABLE] = flags.FLAGS.progress  # of the processes that this one starts, too
        try:
            join()
            signals.raise_on_termination()  # JAX has its own handler once the processes are joined
            configuring.settle()
            if keep_compiled:
                with contextlib.suppress(OSError):  # no home; who needs the cache is told so
                    keep_programs(default_directory())
            main(argv)
            signals.all_is_done()
        except Exception as error:
            if not for_users(error):
                if not processes.is_alone():
                    _leave(traceback.format_exc())
                raise
            logging.debug("traceback", exc_info=True)
            _leave(as_called(f"error: {error}"))
        except KeyboardInterrupt as request:
            show(str(request) or "interrupted; what was saved before is kept", sys.stderr)
            code = 128 + getattr(request, "signum", signal.SIGINT)
            signals.leave(code) if processes.is_alone() else sys.exit(code)

    def parsed(argv):
        try:
            return flags.FLAGS(configuring.with_paths(last_of_each(argv)))
        except flags.Error as error:
            missing = re.search(r"Flag --(\w+) must have a value other than None", str(error))
            if not missing:
                sys.exit(f"error: {error}; --helpshort lists the flags")
            name = missing[1]
            sys.exit(f"error: --{name} is missing, which is: {flags.FLAGS[name].help.rstrip('.')}; give --{name}=...")
        except SettingError as error:
            sys.exit(f"error: {error}")
        except BrokenPipeError:  # --help | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        except (AttributeError, KeyError, TypeError, OSError, ImportError) as error:
            sys.exit(f"error: {configuring.explained(argv, error) or f'the flags or the configuration are wrong: {error}'}")

    if "progress" not in flags.FLAGS:
        flags.DEFINE_enum("progress", None, progress.WAYS, "A bar or lines of text (auto), lines, JSON lines, or none (quiet).")
    logging.set_verbosity(logging.WARNING)
    program = sys.modules["__main__"]
    program.__doc__ = program.__doc__ and as_called(program.__doc__)  # what --help shows
    app.run(guarded, flags_parser=parsed)


def as_called(text):
    """A text that names programs and configurations, with the names that they have where they are installed."""
    if not __package__.startswith("lcrf_jax."):
        return text
    commands = {module: name for name, (module, _) in COMMANDS.items()}
    text = re.sub(r"python -m experiments\.(\w+)", lambda found: f"lcrf {commands.get(found[1], found[1])}", text)
    return re.sub(r"\bexperiments/configs/(\w+)\.py", r"\1", text)


def last_of_each(argv):
    """The arguments without the earlier ones of a setting that is given several times: the last one counts, as of any flag.

    ml_collections would join the values of tuples.
    """
    given, at = [], 0
    while at < len(argv) and argv[at] != "--":
        name = re.fullmatch(r"--?(config\.[\w.]+)(=.*)?", argv[at], re.DOTALL)
        apart = name and name[2] is None and at + 1 < len(argv) and not argv[at + 1].startswith("--")  # --config.epochs (1,1)
        count = 2 if apart else 1
        given.append((name and name[1], argv[at : at + count]))
        at += count
    last = {name: number for number, (name, _) in enumerate(given)}
    kept = [part for number, (name, part) in enumerate(given) if name is None or last[name] == number]
    return [*(argument for part in kept for argument in part), *argv[at:]]


def _leave(message):
    """End with a message; one of several processes does not wait for the others, which could wait for it for ever."""
    if processes.is_alone():
        sys.exit(message)
    show(message, sys.stderr)
    os._exit(1)


def no_more_arguments(argv):
    """Refuse arguments that are no flags: they are typing errors."""
    if len(argv) > 1:
        raise ValueError(f"unknown arguments {argv[1:]}; see --help")


def run_folder(value, flag="workdir"):
    """The folder that a flag names: a shell does not know what ~ is within --workdir=~/run."""
    if not value.strip():
        raise SettingError(f"--{flag}: expected a folder, got an empty name; is a variable not set?")
    return at_home(value)


def folder_to_write(value, flag="out"):
    """The folder that a flag names, which need not be there; refused where a file stands in its place or above it."""
    folder = run_folder(value, flag)
    there = next(filter(os.path.lexists, (folder, *folder.parents)), None)
    if there is not None and not there.is_dir():
        kind = "a file" if there.exists() else "a link that leads nowhere"
        where = "" if there == folder else f": {there}"
        raise SettingError(f"--{flag}={folder}{where} is {kind}; give a folder, which is made if it is not there")
    return folder


def plain_settings(config, *, root=None):
    """A configuration as a plain dict, of the data in `root` if that is given; refuses unknown names and impossible numbers."""
    if root is not None:
        config.data.root = root
    settings = config.to_dict()
    check_names(settings, base.get_config().to_dict())
    check_settings(settings)
    return settings


def check_same_settings(folder, config):
    """Refuse to go on with a run of other settings: it would stand in a table under the wrong name.

    Where the data lies, and how the work is done, may change: see `lcrf_jax.runfolder.description.PLACES`.
    """
    if not (folder / "config.json").exists() or not has_parameters(folder):  # what was to be trained binds nobody
        return
    changes = effective_changes(folder, config)
    if changes:
        groups = sorted({text.split()[0].split(".")[1] for text in changes})
        raise ValueError(
            f"{folder} holds a run with another setting of {groups} ({'; '.join(changes)}); choose another --workdir"
        )


def load_segmenter(run_dir, which="best", *, change_inference=dict):
    """(Segmenter, description, parameters) of what `lcrf_jax.load` takes; its settings of inference may be changed."""
    description, params = trained(run_dir, which=which)
    changed = {**description, "inference": change_inference(description["inference"])}
    return make_segmenter(changed, params), description, params


def open_for_scoring(description, root, split):
    """(the named split with its masks, what data that is): of the folder `root`, or of the data of the run."""
    own = description["training"]["data"]
    data = dict(own)
    if root and data["kind"] == "tfds":
        data["root"] = root
    elif root:
        kind = "shards" if has_shards(root) else "folder"
        data |= {"kind": kind, "root": root, "options": data["options"] if data["kind"] == kind else {}}
    source = checked_split({"data": data}, split, masks=True)
    if list(source.class_names) != description["class_names"]:
        raise ValueError(
            f"the run knows the classes {description['class_names']}, the data has {list(source.class_names)}; "
            "evaluate on data with the same class list in the same order"
        )
    return source, own if same_place(data, own) else data


def same_place(one, other):
    """Whether two settings of data mean the same folder."""
    return one["kind"] == other["kind"] and one["root"] == other["root"] or bool(
        one["root"] and other["root"] and _resolved(one["root"]) == _resolved(other["root"])
    )


def _resolved(folder):
    return pathlib.Path(os.path.realpath(at_home(folder)))  # of a link in a circle the path as it is


def place_in_names(data, own):
    """What the names of files end with that tell of other data than the run's own; "" for its own."""
    if same_place(data, own):
        return ""
    folder = _resolved(data["root"])
    name = re.sub(r"[^\w.-]+", "-", folder.name).strip("-.") or "data"
    # Two folders of one name are two.
    return f"_{name[:60]}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]}"


def whole_or_parts(source, num_parts):
    """What is scored: a source, or the parts SPLIT[k::num_parts] of it if there are to be several."""
    try:
        return source if num_parts == 1 else in_parts(source, num_parts)
    except SettingError as error:
        raise SettingError(f"--{error}; a part needs an image") from error


def part_counts(scored, matrices):
    """dict from each part to its number of images and its counts; empty where a split is scored as a whole.

    Args:
      scored: see `whole_or_parts`.
      matrices: dict from a name to [P, K, K] counts.
    """
    if not isinstance(scored, InParts):
        return {}
    return {split: {"images": int((scored.numbers == k).sum())} | {name: each[k] for name, each in matrices.items()}
            for k, split in enumerate(scored.splits)}  # fmt: skip


def parts_table(parts):
    """A line for each part: its images, and its mIoU by name."""
    if not parts:
        return ""
    names = [name for name in next(iter(parts.values())) if name != "images"]
    width = max(len("part"), *map(len, parts))
    lines = ["  ".join([f"{'part':<{width}}", f"{'images':>6}", *(f"{name:>7}" for name in names)])]
    for split, part in parts.items():
        means = [_rounded(mean_iou(part[name]), 3) for name in names]
        cells = ["-" if mean is None else f"{mean:.3f}" for mean in means]
        lines.append("  ".join([f"{split:<{width}}", f"{part['images']:>6}", *(f"{cell:>7}" for cell in cells)]))
    return "\n".join(["", *lines])


def evaluate_run(run_dir, source, *, crf, tags_given=False, started=None, unscored=None, data=None, num_parts=1, out=None):
    """Score what was trained, print the table, write results.json, the picture grid and the report, and print their paths.

    They are written to `out`, by default the folder of the run. Without a source that has masks there is no score, and the report
    shows images of `unscored`. Files that tell of other `data` than that of the run have its name in theirs.
    """
    run_dir, scored = at_home(run_dir), source if source is None else whole_or_parts(source, num_parts)
    segmenter, description, params = load_segmenter(run_dir)
    own = description["training"]["data"]
    data = own if data is None else data
    folder = run_dir if out is None else out
    used = description["supervision"] + " for training, " + ("tags" if tags_given else "no tags") + " at test time"
    report = {"run_dir": run_dir, "description": description, "segmenter": segmenter, "used": used,
              "tags_given": tags_given, "data": data}  # fmt: skip
    if source is None:
        if processes.is_first():
            say("drawing the report")
            write_run_report(folder / "report.html", source=unscored, matrices={}, image_scores=None, **report)
            say(f"report      {folder / 'report.html'} (for a browser)\ncheckpoint  {run_dir}; no masks to score it on")
        return
    files, digest = _files_of_scores(folder, source.split, data, own, crf=crf, tags_given=tags_given), params_digest(params)
    if out is not None:
        _refuse_results_of_others(files, run_dir, digest)
    scores = evaluation.evaluate(segmenter, scored, crf=crf, num_samples=NUM_PICTURES, use_tags=tags_given)
    if not processes.is_first():
        return
    table = format_iou_table(scores.plain, segmenter.class_names, refined=scores.refined)
    report["parts"] = part_counts(scored, scores.parts) if scored is not source else {}
    say(f"\n{len(source)} images of {source.split}, {data_in_words(data)}\nsupervision: {used}\n{table}{parts_table(report['parts'])}")
    _write_scores(files, scores, source, crf=crf, report=report, digest=digest)
    say(f"\npictures    {files.pictures}\nreport      {files.page} (for a browser)\nresults     {files.results}\n"
        f"checkpoint  {run_dir}")  # fmt: skip
    if started is not None:
        say(f"time        {time.monotonic() - started:.0f} s")
    say(f"\n{table.splitlines()[-1]}")


def _refuse_results_of_others(files, run_dir, digest):
    """Refuse to write over the results of another model, or into the folder of another run."""
    folder = files.results.parent
    if (folder / "config.json").exists() and _resolved(folder) != _resolved(run_dir):
        raise ValueError(f"--out={folder} is the folder of another run; give one of its own")
    before = None
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        before = parsed_json(files.results.read_text(encoding="utf-8"))["params_sha256"]
    if before not in (None, digest):
        raise ValueError(f"{files.results} is of another model; give another --out, or remove it")


class _Files(NamedTuple):
    """What tells of a score; `refined` are the results of the same with refinement, whether they are there or not."""

    results: pathlib.Path
    pictures: pathlib.Path
    page: pathlib.Path
    refined: pathlib.Path


def _files_of_scores(folder, split, data, own, *, crf, tags_given):
    place = place_in_names(data, own)
    suffix = place + ("_crf" if crf else "") + ("_tags_given" if tags_given else "")
    same = split == own["val_split"] and not tags_given and not place
    return _Files(
        folder / f"results_{split}{suffix}.json",
        folder / f"pictures_{split}{suffix}.png",
        folder / ("report.html" if same else f"report_{split}{suffix}.html"),
        folder / f"results_{split}{place}_crf{'_tags_given' if tags_given else ''}.json",
    )


def _write_scores(files, scores, source, *, crf, report, digest):
    """Write results, pictures and the report, as many of them as can be; an error tells of the others."""
    names = report["segmenter"].class_names
    refined = _refined_before(files.refined, scores.plain) if scores.refined is None else scores.refined
    matrices = {"network": scores.plain} | ({} if refined is None else {"refined": refined})
    known = dict(zip(evaluation.sample_positions(len(source), NUM_PICTURES), scores.samples, strict=True))
    text = _results_text(scores, source, names, crf=crf, report=report, digest=digest)

    def write_page():
        write_run_report(
            files.page, source=source, matrices=matrices, image_scores=scores.image_scores, known_samples=known, **report
        )

    wrong = [
        _written(files.results, lambda: write_whole(files.results, text)),
        _written(files.pictures, lambda: picture_grid(scores.samples, files.pictures, class_names=names)),
        _written(files.page, write_page),
    ]
    if any(wrong):
        raise UserError("; ".join(filter(None, wrong)) + ". The scores stand above; make room, make the folder writable or copy "
                        "the run to one that is, and run the same command again")  # fmt: skip


def _written(path, write):
    """Write a file; None, or why it could not be."""
    try:
        write()
    except OSError as error:
        return f"{path} could not be written ({error.strerror or error})"
    return None


def _results_text(scores, source, class_names, *, crf, report, digest):
    """The content of results.json."""
    data = {name: report["data"][name] for name in ("kind", "root", "options")}
    results = {"split": source.split, "images": len(source), "data": data, "crf": crf, "supervision": report["used"],
               "params_sha256": digest}  # fmt: skip
    for name, matrix in (("plain", scores.plain), ("refined", scores.refined)):
        if matrix is not None:
            results[name] = _score(matrix, class_names)
    if report["parts"]:
        results["parts"] = {
            split: {name: value if name == "images" else _score(value, class_names) for name, value in part.items()}
            for split, part in report["parts"].items()
        }
    return json.dumps(results, indent=1) + "\n"


def _score(matrix, class_names):
    """What results.json says of a confusion matrix."""
    ious = [_rounded(value, 4) for value in iou_per_class(matrix)]
    return {"miou": _rounded(mean_iou(matrix), 4), "iou": dict(zip(class_names, ious)), "confusion": np.asarray(matrix).tolist()}


def _rounded(value, digits):
    """A score for JSON, which knows no NaN."""
    return None if np.isnan(value) else round(float(value), digits)


def _refined_before(path, plain):
    """The refined counts of an earlier evaluation of the same parameters on the same images, or None."""
    try:
        before = parsed_json(path.read_text(encoding="utf-8"))
        same = np.array_equal(before["plain"]["confusion"], plain)
        return np.array(before["refined"]["confusion"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
