"""docs/settings.md: every setting of experiments/configs/base.py with its default and its comment there.

    .venv/bin/python docs/tools/settings_page.py

writes the page anew. A test says when it is not current, and when a setting has no word.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "settings.md"

KERNEL = (
    "bilateral_weight", "bilateral_position_width", "bilateral_colour_width", "gaussian_weight", "gaussian_position_width",
)  # fmt: skip

HEAD = """# Every setting

The defaults of `experiments/configs/base.py`; a configuration changes what differs. Each can be changed on the command line, `--config.NAME=VALUE`:

    python -m experiments.train --config=experiments/configs/folder.py --config.data.root=FOLDER --workdir=RUN \\
        --config.seed=1 --config.epochs="(2,2,2)" --config.inference.mirror=False

A name that is not there, and a value out of its range, are refused before anything is read. `RUN/config.json` keeps all of them. A kernel has five
fields, here in their order: `bilateral_weight`, `bilateral_position_width`, `bilateral_colour_width`, `gaussian_weight`, `gaussian_position_width`;
each is a setting of its own, as `--config.inference.kernel.bilateral_weight=5.0`.
"""

SECTIONS = {
    "": "The run",
    "data": "Data",
    "network": "Network",
    "views": "Views of a training image",
    "cache": "Cache",
    "classifier": "Tag classifier",
    "class_maps": "Class maps",
    "objective": "The bound",
    "baselines": "Compared methods",
    "linear": "The linear network before the first round",
    "posterior": "Posteriors between the rounds",
    "optimizer": "Optimiser",
    "inference": "Masks",
}

# What base.py says of a group of options and not of each, or says by a name that speaks for itself.
WORDS = {
    "seed": "of all that is drawn: first weights, order, noise",
    "input_size": "side in pixels of the square that the network sees",
    "num_threads": "that read photographs",
    "log_every_steps": "metrics are written so often",
    "eval_every_epochs": "scored on val so often, and after the last epoch of a round",
    "epochs": "one number for each round",
    "data.root": "folder of the photographs",
    "data.train_split": "what is trained on",
    "data.options": "depend on the kind; see [your own photographs](photographs.md)",
    "network.last_stride": "of the backbone's last stage, which is dilated below 32",
    "network.taps": "stages of the backbone that the decoder sees, from coarse to fine; the last one is the grid of the logits",
    "network.widths": "channels of the decoder, one number for each tap",
    "network.dropout": "in the decoder",
    "views.num_views": "how many of them",
    "views.seed": "of the crops",
    "views.scale_range": "area of a crop, as a share of the image",
    "views.ratio_range": "width over height of a crop, in units of the image's own",
    "classifier.l2": "weight decay of the linear classifier",
    "class_maps.grid": "cells along a side",
    "objective.likelihood_options.evidence.saliency_weight": "of `class_evidence`; above 0 it needs the classifier's gradient for every training image",
    "objective.likelihood_options.evidence.objectness_weight": "of `class_evidence`; at most 1 as a rule; objectness costs nothing",
    "objective.likelihood_options.evidence": "of `class_evidence`",
    "objective.likelihood_options.frozen_classifier": "of `likelihoods.frozen_classifier`",
    "objective.likelihood_options.gwrp": "of `likelihoods.gwrp`",
    "objective.likelihood_options.area": "of `likelihoods.area`",
    "objective.likelihood_options.noisy_or": "of `likelihoods.noisy_or`",
    "objective.likelihood_options.log_mean_exp": "of `likelihoods.log_mean_exp`",
    "objective.temperature": "of relaxed samples",
    "objective.num_samples": "of labels for each image and step",
    "objective.anneal_epochs": "until the final temperature",
    "objective.entropy_weight": "factor of the entropy",
    "objective.pairwise_weight": "factor of the pairwise energy",
    "objective.pairwise_warmup_epochs": "over which the pairwise weight rises from 0",
    "baselines.mil_ilp": "of `mil_lse_loss`",
    "baselines.em_adapt": "of `em_adapt_labels`",
    "baselines.ccnn": "of `ccnn_loss`",
    "baselines.cam": "of `cam_log_probs`",
    "baselines.sec": "of `sec_loss`",
    "baselines.cues.foreground_level": "share of a map's peak over which a cell is a cue",
    "baselines.cues.background_share": "share of the cells that are cues of the background",
    "baselines.superpixels": "of the superpixels of Felzenszwalb and Huttenlocher",
    "baselines.saliency.image_size": "side of the image that it is computed on",
    "baselines.saliency": "of `barrier_saliency`",
    "linear.learning_rate": "of AdamW, at the start; it falls to 0",
    "linear.weight_decay": "of AdamW",
    "posterior.num_iterations": "of mean field",
    "optimizer.learning_rate": "of AdamW, at its peak",
    "optimizer.warmup_steps": "until the peak",
    "optimizer.final_share": "of the peak, at the end of the cosine",
    "optimizer.weight_decay": "decoupled, of every parameter",
    "optimizer.clip_norm": "largest norm of the gradient",
    "inference.input_sizes": "of the network; several are averaged",
    "inference.mirror": "average with the mirror image",
    "inference.unary_weight": "factor of the network's log-probabilities",
    "inference.num_iterations": "of mean field",
}


def comments_of(source: str) -> dict[str, str]:
    """What base.py says of its settings.

    Args:
      source: the text of base.py.

    Returns:
      By the dotted name, the comment at the end of the line and the lines before it. That of `options(...)` is of all of
      its entries.
    """
    found: dict[str, str] = {}
    before: list[str] = []
    for line in source[source.index("def get_config") :].splitlines():
        if only := re.fullmatch(r"    # (.*)", line):
            before.append(only[1])
            continue
        if setting := re.match(r"    config\.([\w.]+) = (?:(?!  # ).)*(?:  # (.*))?", line):
            said = [" ".join(before)] if before else []
            said += [setting[2]] if setting[2] else []
            if said:
                found[setting[1]] = "; ".join(part.rstrip(".") for part in said)
        before = []
    return found


def flat(config, prefix=""):
    """The settings of a configuration, a kernel as one.

    Args:
      config: a ConfigDict.
      prefix: of the names.

    Yields:
      (dotted name, value)
    """
    for name in config:
        value, dotted = config[name], f"{prefix}{name}"
        if not hasattr(value, "items"):
            yield dotted, value
        elif "bilateral_weight" in value:
            yield f"{dotted}.*", ", ".join(f"{value[field]:g}" for field in KERNEL)
        elif dotted == "data.options":
            yield f"{dotted}.*", ""
        else:
            yield from flat(value, f"{dotted}.")


def word(name: str, comments: dict[str, str]) -> str:
    """What is said of a setting.

    Args:
      name: its dotted name.
      comments: of base.py.

    Returns:
      Its own comment and word, or those of the nearest group that it is in; empty if there is none.
    """
    parts = name.removesuffix(".*").split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        said = [text[prefix] for text in (WORDS, comments) if prefix in text]
        if said:
            return "; ".join(said)
    return ""


def page() -> str:
    """The page.

    Returns:
      Markdown.
    """
    sys.path.insert(0, str(ROOT))
    from experiments.configs import base

    comments = comments_of((ROOT / "experiments/configs/base.py").read_text(encoding="utf-8"))
    rows: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for name, value in flat(base.get_config()):
        section = name.partition(".")[0] if "." in name else ""
        shown = value if name.endswith("*") else repr(value)
        said = word(name, comments).replace("|", "\\|")
        rows[section].append(f"| `{name}` | {f'`{shown}`' if shown else ''} | {said} |")
    tables = [f"## {title}\n\n| setting | default | |\n|---|---|---|\n" + "\n".join(rows[key]) for key, title in SECTIONS.items()]
    return "\n".join([HEAD, "\n\n".join(tables)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
