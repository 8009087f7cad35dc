r"""Write photographs and tags as shards: few large files with an index, for data sets of many photographs.

    python -m experiments.shards --data=FOLDER --out=SHARDS
    python -m experiments.shards --config=CONFIG --config.data.root=FOLDER --out=SHARDS --shard_megabytes=256

What check_data refuses is refused here. The training split and that of the masks are written, each photograph as the file that it
is, with masks where all of a split have one. The same command goes on where it was interrupted or killed, and refuses a folder that
holds something else. Train from them with --config=experiments/configs/shards.py --config.data.root=SHARDS.
"""

from absl import flags

from lcrf_jax.data.example import Source
from lcrf_jax.data.parts import whole_of
from lcrf_jax.data.sharding import write_shards
from lcrf_jax.machine.entries import size_text
from lcrf_jax.machine.progress import image_progress, say
from lcrf_jax.train.splits import DEFAULT_VAL_SPLIT, checked_split

from . import configuring, reporting

_DATA = flags.DEFINE_string("data", None, "Folder of the photographs; sets config.data.root.")
_OUT = flags.DEFINE_string("out", None, "Folder of the shards; made if it is not there.")
_MEGABYTES = flags.DEFINE_float("shard_megabytes", 256.0, "A shard is closed when it has so many megabytes.", lower_bound=0.001)
_CONFIG = configuring.define("config", "folder")


def opened(config, split):
    """A split that can be read, with masks where all of its photographs have one."""
    try:
        return checked_split(config, split, masks=True)
    except FileNotFoundError as error:
        source = checked_split(config, split, masks=False)
        say(f"{split}: without masks, for they are not there for all: {error}")
        return source


def sources_of(config) -> dict[str, Source]:
    """The splits to write: that of training and that of the masks, both whole."""
    data = config["data"]
    names = [split if data["kind"] == "tfds" else whole_of(split) for split in (data["train_split"], data["val_split"]) if split]
    sources = {}
    for split in dict.fromkeys(names):
        try:
            sources[split] = opened(config, split)
        except FileNotFoundError as error:
            if split != DEFAULT_VAL_SPLIT or not sources:
                raise
            say(f"no split {split}: {error}")
    return sources


def main(argv):
    """Write, and tell what there is."""
    reporting.no_more_arguments(argv)
    out = reporting.run_folder(_OUT.value, "out")
    sources = sources_of(reporting.plain_settings(_CONFIG.value, root=_DATA.value))
    with image_progress("shards", sum(map(len, sources.values()))) as done:
        index = write_shards(sources, out, shard_bytes=round(_MEGABYTES.value * 1e6), progress=done)
    for split, about in index["splits"].items():
        size = sum(shard["bytes"] for shard in about["shards"])
        masks = "with" if about["masks"] else "without"
        say(f"{split}: {about['photographs']} photographs {masks} masks, {len(about['shards'])} shards, {size_text(size)}")
    say(f"train with --config=experiments/configs/shards.py --config.data.root={_OUT.value}")


if __name__ == "__main__":
    flags.mark_flag_as_required("out")
    reporting.run(main, keep_compiled=False)
