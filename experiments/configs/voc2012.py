"""The original experiment: frozen VGG16, 224 x 224 in, 56 x 56 x 21 out, PASCAL VOC 2012 with image tags alone.

    python -m experiments.build_voc --devkit=VOCdevkit --data_dir=TFDS
    python -m experiments.train --config=experiments/configs/voc2012.py --config.data.root=TFDS --workdir=runs/voc2012
    python -m experiments.evaluate --checkpoint=runs/voc2012 --split=val

Expected time on one H100: 10 to 20 minutes, an estimate on paper (docs/original.md); nobody has measured it. Published for val,
without refinement: 50.4, mean over 21 classes. Nobody has run this configuration on VOC 2012 yet.

Of the original are network, data and bound. Not published, and ours: everything below that is marked so, and what base.py has;
optimiser, likelihood and schedule were chosen on other photographs (voc_animals.py).
"""

from lcrf_jax.experiments.configs import base


def get_config():
    """Configuration of the original system."""
    config = base.get_config()
    set_data(config)
    config.network.backbone = "vgg16"
    config.network.last_stride = 16
    config.network.taps = ("s16", "s8", "s4")
    config.network.decoder = "original"
    config.network.widths = (512, 512, 256, 512)
    config.network.dropout = 0.0
    config.input_size = 224
    config.inference.input_sizes = (224,)

    config.class_maps.extra_sizes = (320,)  # ours
    config.class_maps.grid = 56
    config.objective.likelihood_options.evidence.background_level = 0.12  # ours
    config.objective.likelihood_weight = 1.5  # ours
    config.objective.kernel = base.kernel(0.3, 56.0, 13.0, 0.1, 17.0)  # ours, in pixels of the input
    config.epochs, config.rounds = (20,), 1  # ours
    config.optimizer.warmup_steps = 500  # ours
    return config


def set_data(config):
    """What all configurations of VOC 2012 share: the data, and features that are computed in every step."""
    config.data.kind = "tfds"
    config.data.train_split, config.data.val_split = "train_aug", "val"
    config.data.options = base.options(name="voc_weak/boxes", labels="labels")
    config.weights = "hf:timm/vgg16.tv_in1k"
    config.cache.features = False  # those of train_aug would fill 50 GB
    config.views.num_views = 10  # ours: whole, mirrored, and eight crops
    config.inference.mirror = False
    config.batch_size = 16  # ours
    config.num_threads = 8
    config.eval_every_epochs = 5
