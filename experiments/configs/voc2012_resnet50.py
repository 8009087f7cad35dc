"""PASCAL VOC 2012 with image tags alone on frozen ResNet-50: 320 x 320 in, 40 x 40 x 21 out.

    python -m experiments.train --config=experiments/configs/voc2012_resnet50.py --config.data.root=TFDS --workdir=runs/voc2012_resnet50
    python -m experiments.evaluate --checkpoint=runs/voc2012_resnet50 --split=val --crf

Expected time on one H100: see docs/backbones.md, an estimate on paper. Nobody has run this configuration on VOC 2012 yet, and no
score is claimed. The last stage is dilated to stride 16; logits lie at stride 8.
"""

from lcrf_jax.experiments.configs import base, voc2012, voc2012_dinov2


def get_config():
    """Configuration of ResNet-50."""
    config = base.get_config()
    voc2012.set_data(config)
    voc2012_dinov2.set_sizes(config, size=320, grid=40)
    config.weights = "hf:timm/resnet50.a1_in1k"
    config.network.backbone = "resnet50"
    config.network.last_stride = 16
    config.network.taps = ("s32", "s16", "s8")
    config.network.widths = (256, 192, 128)
    return config
