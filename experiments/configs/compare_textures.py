"""All methods on the embedded set.

    python -m experiments.compare --config=experiments/configs/compare_textures.py --methods=all --workdir=DIR

As textures.py. What the compared methods set for themselves is as for the photographs (compare_voc_animals.py): nothing of
it was chosen here.
"""

from experiments.configs import compare_voc_animals, textures


def get_config():
    """Configuration of the comparison on the embedded set."""
    config = textures.get_config()
    compare_voc_animals.set_baselines(config.baselines)
    return config
