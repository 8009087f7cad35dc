"""The embedded procedural set: everything from image tags, on a laptop, in minutes.

    python -m experiments.train --config=experiments/configs/textures.py --workdir=runs/textures
    python -m experiments.evaluate --checkpoint=runs/textures --split=val --crf
"""

from experiments.configs import base


def get_config():
    """Configuration of the embedded set."""
    config = base.get_config()
    config.data.kind = "textures"
    config.data.options = base.options(seed=0, size=128, num_train=2000, num_val=500)
    return config
