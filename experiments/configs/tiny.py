"""A trial of about a minute on two cores, on the embedded set with a small random backbone: does everything work?

    python -m experiments.train --config=experiments/configs/tiny.py --workdir=runs/tiny

The mIoU is about 0.11: random features tell no class from another, and all is called background.
"""

from lcrf_jax.experiments.configs import base


def get_config():
    """Configuration of the trial run."""
    config = base.get_config()
    config.data.kind = "textures"
    config.data.options = base.options(seed=0, size=96, num_train=64, num_val=16)
    config.network.backbone = "small"
    config.network.widths = (32, 24, 16)
    config.input_size = 96
    config.class_maps.extra_sizes = (128,)
    config.class_maps.grid = 12
    config.epochs = (1, 1)
    config.optimizer.warmup_steps = 5
    config.batch_size = 8
    config.log_every_steps = 4
    config.eval_every_epochs = 1
    config.save_every_steps = 2
    config.inference.input_sizes = (96,)
    return config
