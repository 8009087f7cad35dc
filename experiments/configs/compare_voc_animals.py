"""All methods on the photographs of voc_animals, with a network and a budget that suit two CPU cores.

    python -m experiments.compare --config=experiments/configs/compare_voc_animals.py --config.data.root=FOLDER \
        --methods=all --seeds=3 --parts=2 --workdir=DIR

Logits of 20 x 20 cells, a narrower decoder and four epochs in all; otherwise as voc_animals.py. The latent CRF knows
background by the gradient of the tag classifier too, as SEC does. Nothing is chosen while a method trains, so all of val is
scored, and with --parts=2 its halves as well: settings are chosen on val[0::2] and reported on val[1::2]. What the methods set
for themselves here was chosen earlier, on all of val (docs/comparison.md). No mask of a training photograph is seen. These are
not VOC 2012 figures.
"""

from experiments.configs import voc_animals


def get_config():
    """Configuration of the comparison on photographs."""
    config = voc_animals.get_config()
    config.data.val_split = "val"
    config.network.taps = ("head", "s16")
    config.network.widths = (128, 96)
    config.class_maps.grid = 20
    config.epochs = (2, 2)
    config.optimizer.warmup_steps = 50

    config.objective.estimator = "mean"
    config.objective.likelihood_options.evidence.background_level = 0.13
    config.objective.likelihood_options.evidence.saliency_weight = 2.0
    set_baselines(config.baselines)
    return config


def set_baselines(baselines):
    """What was chosen on val of the photographs, see docs/comparison.md; everything else is as in the papers."""
    baselines.mil_ilp.sharpness = 2.0
    baselines.em_adapt.foreground_share = 0.3
    baselines.ccnn.background_most = 0.5
    baselines.cues.foreground_level = 0.3
    baselines.saliency.level = 1.0
