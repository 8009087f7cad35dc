"""PASCAL VOC 2012 with image tags alone on frozen DINOv2 ViT-B/14: 518 x 518 in, 37 x 37 x 21 out.

    python -m experiments.train --config=experiments/configs/voc2012_dinov2.py --config.data.root=TFDS --workdir=runs/voc2012_dinov2
    python -m experiments.evaluate --checkpoint=runs/voc2012_dinov2 --split=val --crf

Expected time on one H100: see docs/backbones.md, an estimate on paper. Nobody has run this configuration on VOC 2012 yet, and no
score is claimed. Settings of the objective are those of voc2012.py, with widths of the kernel for the larger input.

--config.network.backbone=dinov2_vits14 --config.weights=hf:facebook/dinov2-small is the smaller one.
"""

from lcrf_jax.experiments.configs import base, voc2012


def get_config():
    """Configuration of DINOv2."""
    config = base.get_config()
    voc2012.set_data(config)
    config.weights = "hf:facebook/dinov2-base"
    config.network.backbone = "dinov2_vitb14"
    config.network.last_stride = 14
    set_taps(config)
    set_sizes(config, size=518, grid=37)
    return config


def set_taps(config):
    """Three depths of one grid, for a vision transformer of twelve blocks."""
    config.network.taps = ("s32", "block9", "block6")
    config.network.widths = (256, 256, 256)


def set_sizes(config, size, grid):
    """What the configurations of other backbones share: the objective of voc2012.py, and sizes that follow the input's."""
    config.input_size = size
    config.inference.input_sizes = (size,)
    config.class_maps.grid = grid
    config.objective.likelihood_options.evidence.background_level = 0.12
    config.objective.likelihood_weight = 1.5
    scale = size / 224  # of the widths of voc2012.py
    config.objective.kernel = base.kernel(0.3, round(56.0 * scale, 1), 13.0, 0.1, round(17.0 * scale, 1))
    config.epochs, config.rounds = (20,), 1
    config.optimizer.warmup_steps = 500
