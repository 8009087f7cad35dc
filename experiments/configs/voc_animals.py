"""Photographs of animals and people (a part of PASCAL VOC 2012) with image tags.

    python -m experiments.train --config=experiments/configs/voc_animals.py --config.data.root=FOLDER --workdir=RUN
    python -m experiments.evaluate --checkpoint=RUN --data=FOLDER --split=val --crf
"""

from experiments.configs import base


def get_config():
    """Configuration for photographs."""
    config = base.get_config()
    config.data.kind = "folder"
    config.class_maps.extra_sizes = (448,)
    config.objective.likelihood_options.evidence.background_level = 0.12
    config.objective.likelihood_weight = 1.5
    config.eval_every_epochs = 4
    config.posterior.kernel.bilateral_weight = 4.0
    config.posterior.kernel.bilateral_colour_width = 8.0
    config.inference.kernel.bilateral_weight = 4.0
    config.inference.kernel.bilateral_colour_width = 8.0
    return config
