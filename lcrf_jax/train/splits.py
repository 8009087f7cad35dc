"""The splits of the data that a configuration names, looked at before anything is computed from them."""

from collections.abc import Mapping
from typing import Any

from lcrf_jax.data.check import everywhere, listed, usable
from lcrf_jax.data.example import PartOfSource, Source
from lcrf_jax.data.files.tags import some
from lcrf_jax.data.opening import open_source
from lcrf_jax.data.parts import whole_of
from lcrf_jax.machine.errors import SettingError
from lcrf_jax.machine.progress import image_progress, say
from lcrf_jax.train.methods import method_of

# That of experiments/configs/base.py: who leaves it there may have no masks.
DEFAULT_VAL_SPLIT = "val"


def open_split(config: Mapping[str, Any], split: str, *, masks: bool) -> Source:
    """A split as it is, without a look at its files.

    Args:
      config: dict with "data" ("kind", "root", "options" and, if it is not "error", "on_bad_image").
      split: its name.
      masks: whether examples carry masks.

    Returns:
      lcrf_jax.data.example.Source.

    Raises:
      FileNotFoundError: if the data is missing.
      ValueError: if it is not as expected; the message names the file.
    """
    data = config["data"]
    options = dict(data["options"])
    if data["kind"] == "folder" and data.get("on_bad_image") == "skip":
        options["missing_images"] = "skip"
    return open_source(data["kind"], split, root=data["root"], masks=masks, **options)


def checked_split(config: Mapping[str, Any], split: str, *, masks: bool) -> Source:
    """A split that can be read, as far as that is cheap to tell: heads of photographs, and all of those with masks.

    With "on_bad_image" of "skip" every file is decoded, those that cannot be read are left out, and all are named.

    Args:
      config: see `open_split`.
      split: its name.
      masks: whether examples carry masks.

    Returns:
      lcrf_jax.data.example.Source.

    Raises:
      FileNotFoundError: if the data is missing.
      ValueError: if it is not as expected, or files cannot be read and are not to be skipped; the message names them.
    """
    source, mode = open_split(config, split, masks=masks), config["data"].get("on_bad_image", "error")
    if mode == "skip" and not hasattr(source, "paths"):
        raise SettingError(
            f"data.on_bad_image: 'skip' leaves out files that cannot be read, and the source {config['data']['kind']!r} has no "
            "files of single photographs; use 'error'"
        )
    not_taken, untagged = getattr(source, "not_taken", ""), getattr(source, "untagged", ())
    if not_taken and split == config["data"].get("train_split"):
        say(f"data: {not_taken}")
    if untagged and split == config["data"].get("train_split"):
        say(f"data: {len(untagged)} photographs have no row in the tag file and are left out")
    with image_progress(f"reading {split}", len(source)) as done:
        source, problems, doubts = usable(source, mode, decode=masks, progress=done)
    if problems:
        say(f"{split}: {len(problems)} photographs cannot be used and are left out:\n{listed(problems)}")
    for doubt in doubts:
        say(f"warning: {doubt}")
    missing = getattr(source, "left_out", 0)
    if missing:
        say(f"{split}: {missing} rows of tag file or lists have no photograph and are left out")
    return source


def open_data(config: Mapping[str, Any]) -> tuple[Source, Source | None]:
    """The training source (tags only, unless the method needs masks) and the source of the validation masks.

    Args:
      config: dict with "data" ("train_split", "val_split" and what `open_split` needs) and "method".

    Returns:
      (train, val); val is None if the split is "" or, with its name left at "val", the data has none or no masks for it.

    Raises:
      FileNotFoundError: if the training data is missing.
      SettingError: if another split was named and is not there, or has no masks, or is a part that shares examples with that
        of training.
      ValueError: if it is not as expected; the message names the file.
    """
    data = config["data"]
    by_masks = "masks" in method_of(config).inputs
    train = checked_split(config, data["train_split"], masks=by_masks)
    for line in () if by_masks else everywhere(train):
        say(f"warning: {line}")
    try:
        val = checked_split(config, data["val_split"], masks=True) if data["val_split"] else None
    except FileNotFoundError as error:
        if whole_of(data["val_split"]) != DEFAULT_VAL_SPLIT:
            raise SettingError(
                f"data.val_split={data['val_split']}: {error}. Without validation: --config.data.val_split="
            ) from error
        say(f"no validation: {error}")
        val = None
    if val is not None:
        refuse_shared(train, val)
    return train, val


def refuse_shared(train: Source, val: Source) -> None:
    """Refuse parts of one split that share examples: a score would be one of masks of what is trained on.

    Args:
      train: the training source.
      val: the source that is scored.

    Raises:
      SettingError: if one of them is a part of a split that both are of, and they share examples; the message names some.
    """
    if not {*"[]"} & {*train.split, *val.split} or whole_of(train.split) != whole_of(val.split):
        return
    shared = sorted({*getattr(train, "listed_names", train.names)} & {*getattr(val, "listed_names", val.names)})
    if shared:
        raise SettingError(
            f"data.val_split: {val.split} and the training split {train.split} share {len(shared)} examples ({some(shared)}): what is "
            "scored would be trained on; name parts that share none, such as train[0::2] and train[1::2]"
        )


def without_masks(config: Mapping[str, Any], train: Source) -> Source:
    """The training source as methods that learn from tags have it: features know nothing of masks.

    Args:
      config: see `open_split`.
      train: the training source.

    Returns:
      The same examples without masks.
    """
    if not train.masks:
        return train
    plain = open_split(config, config["data"]["train_split"], masks=False)
    if plain.names == train.names:
        return plain
    position = {name: row for row, name in enumerate(plain.names)}
    return PartOfSource(plain, [position[name] for name in train.names])
