"""MIL+ILP on PASCAL VOC 2012, with the network of voc2012_sec.py.

    python -m experiments.train --config=experiments/configs/voc2012_mil_ilp.py --config.data.root=TFDS --workdir=runs/voc2012_mil_ilp
    python -m experiments.evaluate --checkpoint=runs/voc2012_mil_ilp --split=val

Expected time on one H100: 10 to 20 minutes, an estimate on paper (docs/original.md). Published for val, smoothed in superpixels: 36.6.
Nobody has run this configuration on VOC 2012 yet. The paper's network is
another one (Overfeat, 400 x 400).
"""

from lcrf_jax.experiments.configs import voc2012_sec


def get_config():
    """Configuration of MIL+ILP."""
    config = voc2012_sec.get_config()
    config.method = "mil_ilp"
    return config
