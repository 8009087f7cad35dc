"""Cats and dogs of the Oxford-IIIT Pet data set, from their species alone; by TensorFlow Datasets.

    tfds build oxford_iiit_pet --file_format=array_record --data_dir=TFDS
    python -m experiments.train --config=experiments/configs/oxford_iiit_pet.py --config.data.root=TFDS --workdir=runs/pets

The first line needs TensorFlow and a network, once. Every photograph shows one cat or one dog, so nothing in the tags tells an
animal from what is always around it: expect less than on photographs with various tags. Nobody has measured it here. A tenth of
the test split is scored, on the trimaps of the data set.

References: Parkhi et al. 2012, Cats and Dogs.
"""

from lcrf_jax.experiments.configs import base, voc_animals


def get_config():
    """Configuration for cats and dogs."""
    config = voc_animals.get_config()
    config.data.kind = "tfds"
    config.data.train_split, config.data.val_split = "train", "test[:10%]"
    config.data.options = base.options(name="oxford_iiit_pet", labels="species", mask_meaning="trimap")
    return config
