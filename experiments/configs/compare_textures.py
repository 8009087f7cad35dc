"""All methods on the embedded set.

    python -m experiments.compare --config=experiments/configs/compare_textures.py --methods=all --workdir=DIR

As textures.py, at 160 pixels in place of 192 and for six epochs in place of seven, so that all methods are done in half an
hour on two cores. What the compared methods set for themselves is as for the photographs (compare_voc_animals.py): nothing of
it was chosen here.
"""

from lcrf_jax.experiments.configs import compare_voc_animals, textures

INPUT_SIZE = 160


def get_config():
    """Configuration of the comparison on the embedded set."""
    config = textures.get_config()
    compare_voc_animals.set_baselines(config.baselines)
    scale = INPUT_SIZE / config.input_size
    for kernel in (config.objective.kernel, config.posterior.kernel, config.baselines.sec.kernel):
        kernel.bilateral_position_width *= scale
        kernel.gaussian_position_width *= scale
    config.epochs = (3, 3)
    config.class_maps.grid = INPUT_SIZE // 8
    config.input_size, config.inference.input_sizes = INPUT_SIZE, (INPUT_SIZE,)
    return config
