"""Your own photographs and tags, in a plain folder.

    python -m experiments.check_data --data=FOLDER
    python -m experiments.train --config=experiments/configs/folder.py --config.data.root=FOLDER --workdir=RUN

The settings are those of voc_animals.py, which were chosen on photographs of animals and people, with at least 150 steps in
each of the three rounds for a folder of few photographs. best/ is chosen on all of val, for masks of one's own are few; with many,
--config.data.val_split='val[0::2]' leaves val[1::2] for a score that nothing was chosen by. docs/photographs.md has the whole way.
"""

from lcrf_jax.experiments.configs import base, voc_animals


def get_config():
    """Configuration for a plain folder of photographs."""
    config = voc_animals.get_config()
    config.data.kind, config.data.val_split = "folder", "val"
    config.data.options = base.options(
        tags="", classes="", mask_folder="masks", colours="", val_share=0.2, split_seed=0,
        untagged_in_masks="tell",  # or "accept": masks show classes that their photographs are not tagged with, and it is right
    )  # fmt: skip
    config.least_steps = 150
    return config
