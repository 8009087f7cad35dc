"""SEC on PASCAL VOC 2012: VGG16 with a large field, 321 x 321 in, 41 x 41 x 21 out.

    python -m experiments.train --config=experiments/configs/voc2012_sec.py --config.data.root=TFDS --workdir=runs/voc2012_sec
    python -m experiments.evaluate --checkpoint=runs/voc2012_sec --split=val --crf

Expected time on one H100: 10 to 20 minutes, an estimate on paper (docs/original.md). Published for val, with refinement: 50.7.
Nobody has run this configuration on VOC 2012 yet.

Losses, cue levels, decays, kernel and batch are those of the paper. Not as there: the backbone stays frozen and the last layers
start at random, where SEC trains all of VGG16 from its ImageNet weights by SGD; cues are made by the tag classifier here.
--config.baselines.cues.file=FILE takes others, such as the published ones.
"""

from lcrf_jax.experiments.configs import base, voc2012


def get_config():
    """Configuration of SEC."""
    config = base.get_config()
    voc2012.set_data(config)
    set_large_field(config)
    config.method = "sec"
    config.batch_size = 15
    config.epochs = (12,)  # 8,460 steps; the paper has 8,000
    return config


def set_large_field(config):
    """The network of SEC, EM-Adapt, CCNN and STC, as far as it can be with a frozen backbone."""
    config.network.backbone = "vgg16"
    config.network.last_stride = 8
    config.network.taps = ("s16",)
    config.network.decoder = "large_field"
    config.network.widths = (1024, 1024)
    config.network.dropout = 0.5
    config.input_size = 321
    config.class_maps.grid = 41
    config.inference.input_sizes = (321,)
    config.inference.kernel = base.kernel(10.0, 80.0, 13.0, 3.0, 3.0)
    config.optimizer.warmup_steps = 500  # ours
