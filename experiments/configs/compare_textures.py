"""All methods on the embedded set.

    python -m experiments.compare --config=experiments/configs/compare_textures.py --methods=all --workdir=DIR

As textures.py, with batches of half the size and fewer epochs, so that all of it is done in under half an hour
on two cores. What the compared methods set for themselves is as for the photographs (compare_voc_animals.py): nothing of
it was chosen here.
"""

from experiments.configs import compare_voc_animals, textures


def get_config():
    """Configuration of the comparison on the embedded set."""
    config = textures.get_config()
    config.batch_size = 8
    config.epochs = (2, 2)
    compare_voc_animals.set_baselines(config.baselines)
    return config
