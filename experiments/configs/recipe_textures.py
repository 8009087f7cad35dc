"""The recipe of voc_animals.py on embedded images: the weights of its posteriors were chosen with some of them in sight, nothing else.

    python -m experiments.train --config=experiments/configs/recipe_textures.py --workdir=RUN        # one to three objects
    python -m experiments.train --config=experiments/configs/recipe_textures.py:crowd --workdir=RUN  # many small ones, some cut
    python -m experiments.evaluate --checkpoint=RUN --split=val --parts=2 --crf

Evidence, rounds, likelihood, prior and weights are those of the photographs. Lengths in pixels are theirs in proportion to the side
of the image or of the network's input. textures.py has the settings that were chosen for the embedded set.
"""

from lcrf_jax.experiments.configs import base, voc_animals

SCENES = {  # side of the images and of the network's input, training and held-out images
    "few": (128, 192, 2000, 500),
    "crowd": (192, 256, 1000, 300),
}


def get_config(scene="few"):
    """Configuration for one of the scenes of `lcrf_jax.data.sources.textures`."""
    if scene not in SCENES:
        raise ValueError(f"recipe_textures.py: expected one of {', '.join(SCENES)} after the colon, got {scene!r}")
    size, input_size, num_train, num_val = SCENES[scene]
    config = voc_animals.get_config()
    of_image = size / config.input_size
    config.data.kind, config.data.root = "textures", ""
    config.data.options = base.options(scene=scene, seed=0, size=size, num_train=num_train, num_val=num_val)
    config.inference.kernel.bilateral_position_width *= of_image
    before, config.input_size = config.input_size, input_size
    config.update_from_flattened_dict(base.at_input_size(config, before))
    config.least_steps = 150
    return config
