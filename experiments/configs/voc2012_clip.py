"""PASCAL VOC 2012 with image tags alone on the frozen image tower of CLIP ViT-B/16: 448 x 448 in, 28 x 28 x 21 out.

    python -m experiments.train --config=experiments/configs/voc2012_clip.py --config.data.root=TFDS --workdir=runs/voc2012_clip
    python -m experiments.evaluate --checkpoint=runs/voc2012_clip --split=val --crf

Expected time on one H100: see docs/backbones.md, an estimate on paper. Nobody has run this configuration on VOC 2012 yet, and no
score is claimed. The tag classifier is fitted on patch tokens as for every backbone, unless
--config.classifier.text_embeddings=FILE.npz has the vectors of the class names (docs/backbones.md).
"""

from lcrf_jax.experiments.configs import base, voc2012, voc2012_dinov2


def get_config():
    """Configuration of CLIP."""
    config = base.get_config()
    voc2012.set_data(config)
    config.weights = "hf:timm/vit_base_patch16_clip_224.openai"
    config.network.backbone = "clip_vitb16"
    config.network.last_stride = 16
    voc2012_dinov2.set_taps(config)
    voc2012_dinov2.set_sizes(config, size=448, grid=28)
    return config
