"""All methods on the photographs of voc_animals, with the recipe of voc_animals.py.

    python -m experiments.compare --config=experiments/configs/compare_voc_animals.py --config.data.root=FOLDER \
        --methods=all --seeds=3 --parts=2 --workdir=DIR

Network, steps, class maps and the tag classifier's word at test time are the same for all methods. SEC's cues know background by
objectness, as the evidence of the latent CRF does. What the compared methods set for themselves was chosen on all of val
(docs/comparison.md). No mask of a training photograph is seen. These are not VOC 2012 figures.
"""

from lcrf_jax.experiments.configs import voc_animals


def get_config():
    """Configuration of the comparison on photographs."""
    config = voc_animals.get_config()
    config.data.val_split = "val"  # nothing is chosen while methods are compared
    config.baselines.cues.background_by = "objectness"
    set_baselines(config.baselines)
    return config


def set_baselines(baselines):
    """What was chosen on val of the photographs, see docs/comparison.md; everything else is as in the papers."""
    baselines.mil_ilp.sharpness = 2.0
    baselines.em_adapt.foreground_share = 0.3
    baselines.ccnn.background_most = 0.5
    baselines.cues.foreground_level = 0.3
    baselines.saliency.level = 1.0
