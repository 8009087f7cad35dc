"""STC on PASCAL VOC 2012, with the network of voc2012_sec.py.

    python -m experiments.train --config=experiments/configs/voc2012_stc.py --config.data.root=TFDS --workdir=runs/voc2012_stc
    python -m experiments.evaluate --checkpoint=runs/voc2012_stc --split=val --crf

Expected time on one H100: 10 to 20 minutes, an estimate on paper (docs/original.md). Published for val: 49.8.
Nobody has run this configuration on VOC 2012 yet. The paper's first network is trained
on 40,000 simple images from elsewhere; here it is the images of train_aug with a single tag.
"""

from lcrf_jax.experiments.configs import voc2012_sec


def get_config():
    """Configuration of STC."""
    config = voc2012_sec.get_config()
    config.method = "stc"
    return config
