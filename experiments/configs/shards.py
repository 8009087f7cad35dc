"""Photographs and tags in shards, written by experiments.shards, for data sets of many files.

    python -m experiments.shards --data=FOLDER --out=SHARDS
    python -m experiments.check_data --config=experiments/configs/shards.py --config.data.root=SHARDS
    python -m experiments.train --config=experiments/configs/shards.py --config.data.root=SHARDS --workdir=RUN

The settings are those of folder.py, and so is what is trained: the same photographs in the same order.
"""

from lcrf_jax.experiments.configs import base, folder


def get_config():
    """Configuration for a folder of shards."""
    config = folder.get_config()
    config.data.kind = "shards"
    config.data.options = base.options(untagged_in_masks="tell")
    return config
