"""EM-Adapt on PASCAL VOC 2012, with the network of voc2012_sec.py.

    python -m experiments.train --config=experiments/configs/voc2012_em_adapt.py --config.data.root=TFDS --workdir=runs/voc2012_em_adapt
    python -m experiments.evaluate --checkpoint=runs/voc2012_em_adapt --split=val --crf

Expected time on one H100: 10 to 20 minutes, an estimate on paper (docs/original.md). Published for val: 33.8.
Nobody has run this configuration on VOC 2012 yet. The paper trains all of
VGG16.
"""

from lcrf_jax.experiments.configs import voc2012_sec


def get_config():
    """Configuration of EM-Adapt."""
    config = voc2012_sec.get_config()
    config.method = "em_adapt"
    return config
