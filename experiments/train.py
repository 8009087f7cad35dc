r"""Train the inference network from image tags.

    python -m experiments.train --config=experiments/configs/textures.py --workdir=runs/textures
    python -m experiments.train --config=experiments/configs/voc_animals.py --config.data.root=FOLDER --workdir=RUN

A workdir that holds an unfinished run continues it, to the same parameters as without the interruption; Ctrl-C and SIGTERM
save first. One that holds a finished run is scored again. docs/scaling.md tells how to use many devices and hosts. The folder gets checkpoints (last/, best/), config.json,
metrics.jsonl, tensorboard/ (where tensorboardX is installed), report.html, results_SPLIT.json and pictures_SPLIT.png.
The last line printed is the mIoU of the best parameters without refinement.
"""

import functools
import time

from absl import flags

from lcrf_jax.data.check import MODES
from lcrf_jax.data.example import data_identity
from lcrf_jax.machine.entries import total_line
from lcrf_jax.machine.progress import say
from lcrf_jax.runfolder.description import check_data, check_description
from lcrf_jax.train import fit, preparation
from lcrf_jax.train.beginning import check_start
from lcrf_jax.train.splits import open_data

from . import configuring, reporting

_CONFIG = configuring.define("config")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; made if it is not there.")
_ON_BAD_IMAGE = flags.DEFINE_enum(
    "on_bad_image", None, MODES, "What to do with photographs that cannot be read; sets config.data.on_bad_image."
)
reporting.define_process_flags()


def main(argv):
    """Prepare, train, evaluate the best parameters."""
    reporting.no_more_arguments(argv)
    started = time.monotonic()
    if _ON_BAD_IMAGE.value is not None:
        _CONFIG.value.data.on_bad_image = _ON_BAD_IMAGE.value
    config = reporting.plain_settings(_CONFIG.value)
    workdir = reporting.run_folder(_WORKDIR.value)
    if (steps := check_start(workdir, config)) is not None:
        say(f"{workdir} is finished: all {steps} steps are done; nothing is trained")
        if steps:
            say(f"to train on, make the last round longer: the last number of --config.epochs={','.join(map(str, config['epochs']))}")
        if config.get("weights"):
            say(f"config.weights={config['weights']} is not read: the run holds the weights it was trained with")
        train, val = open_data(config)
        check_data(workdir, {"train": data_identity(train)})
    else:
        train, val = trained(config, workdir)
    for source in (train, val):
        if getattr(source, "left_out", 0):
            say(f"{source.left_out} photographs of {source.split} were left out, as told at the beginning")
    reporting.evaluate_run(workdir, val, crf=False, started=started, unscored=train, data=config["data"])


def trained(config, workdir):
    """Train a run to its end; its sources."""
    prepared = preparation.prepare(config, check=functools.partial(check_description, workdir))
    say(
        f"{len(prepared.train)} training images with tags of {len(prepared.train.class_names) - 1} classes; "
        f"logits {prepared.plan.grid} x {prepared.plan.grid}; {fit.num_trainable(prepared):,} trainable weights"
    )
    fit.train(prepared, workdir)
    say(reporting.as_called(total_line(prepared.plan.cache_directory)))
    return prepared.train, prepared.val


if __name__ == "__main__":
    configuring.require("workdir")
    reporting.run(main)
