"""All methods on the embedded set, with a budget that suits two CPU cores.

    python -m experiments.compare --config=experiments/configs/compare_textures.py --methods=all --workdir=DIR

Four epochs in all; otherwise as textures.py. What the compared methods set for themselves is as for the photographs
(compare_voc_animals.py): nothing of it was chosen here.
"""

from experiments.configs import compare_voc_animals, textures


def get_config():
    """Configuration of the comparison on the embedded set."""
    config = textures.get_config()
    config.epochs = (2, 2)
    config.optimizer.warmup_steps = 50
    compare_voc_animals.set_baselines(config.baselines)
    return config
