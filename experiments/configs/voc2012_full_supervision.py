"""Full supervision on PASCAL VOC 2012, with the network of voc2012_sec.py.

    python -m experiments.train --config=experiments/configs/voc2012_full_supervision.py --config.data.root=TFDS --workdir=runs/voc2012_full_supervision
    python -m experiments.evaluate --checkpoint=runs/voc2012_full_supervision --split=val --crf

Expected time on one H100: 10 to 20 minutes, an estimate on paper (docs/original.md). Nobody has run this
configuration on VOC 2012 yet. It has masks: an upper bound, not a method of the table.
"""

from lcrf_jax.experiments.configs import voc2012_sec


def get_config():
    """Configuration of full supervision."""
    config = voc2012_sec.get_config()
    config.method = "full_supervision"
    return config
