"""Doubts about the names of classes that were found in tags: what may be a slip is asked, not guessed.

A list of classes, ``classes.txt``, is the answer: names that stand in one are confirmed, and no question is asked.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping

NO_TAG = frozenset((
    "none", "n/a", "na", "nan", "-", "--", "---", "null", "nil", "no tag", "no tags", "notag", "notags", "untagged",
    "no label", "no labels", "nolabel", "unlabeled", "unlabelled", "not labeled", "not labelled", "unknown",
    "unclassified", "empty", "nothing", "no class", "no object", "no objects", "undefined", "not available", "todo",
    "tbd", "?", ".", "0", "false", "void", "ignore", "(none)", "<none>", "[]", "{}", "keine", "aucun", "ninguno",
    "nessuno",
))  # fmt: skip
BACKGROUNDS = frozenset(("bg", "back ground", "backgrounds", "_background_", "__background__", "hintergrund"))
MASK_PLACES = frozenset((
    "mask", "masks", "label", "labels", "annotation", "annotations", "segmentationclass", "segmentationobject",
    "gt", "groundtruth",
))  # fmt: skip
PLACES = MASK_PLACES.union((
    "image", "images", "img", "imgs", "photo", "photos", "photographs", "picture", "pictures", "jpegimages", "data",
    "dataset", "train", "training", "val", "valid", "validation", "test", "testing",
))  # fmt: skip
_JOINTS = re.compile(r"[\s|/,;+&_.\-]+")
_ODD = re.compile(r"[|/\\,;+&*#~^@\[\]{}\"<>=:\u3001\x00-\x1f\x7f]|^['`]|['`]$")
_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "persons": "person", "children": "child", "mice": "mouse",
              "feet": "foot", "geese": "goose", "teeth": "tooth", "leaves": "leaf", "wolves": "wolf", "knives": "knife"}  # fmt: skip
_ENDINGS = ("s", "es", "n", "en", "x")
CONFIRM = "if it is meant so, write a classes.txt (background, then a class a line)"


def name_doubts(used: Mapping[str, str], counts: Mapping[str, int], *, of_folders: bool) -> list[str]:
    """What looks wrong about the names of tags.

    Args:
      used: where each tag was met first, by its name.
      counts: how many photographs have it.
      of_folders: whether the tags are names of folders.
    Returns:
      One line for each doubt: where, the tag, what it may be, and the remedy.
    """
    lines: list[str] = []
    spelt: dict[str, str] = {}
    for name in sorted(used):
        same = spelt.setdefault(spelling(name), name)
        if same != name:
            lines.append(f"{used[name]}: the tags {same!r} and {name!r} differ in spelling alone; choose one")
    distinct = sorted(spelt.values())
    lines += [f"{used[name]}: {doubt}; {CONFIRM}" for name in distinct
              if (doubt := name_doubt(name, distinct, of_folders=of_folders))]  # fmt: skip
    lines += _orders(used, distinct)
    for at, name in enumerate(distinct):
        for other in distinct[at + 1 :]:
            if are_twins(name, other, counts.get(name, 0), counts.get(other, 0)):
                lines.append(
                    f"{used[other]}: the tags {name!r} ({counts.get(name, 0)} photographs) and {other!r} "
                    f"({counts.get(other, 0)}) may be one class; choose one, or {CONFIRM}"
                )
    if distinct and all(re.fullmatch(r"[\d.]+", name) for name in distinct):
        lines.append(f"{used[distinct[0]]}: all tags are numbers ({', '.join(distinct[:6])}); write the names of classes, or {CONFIRM}")
    return lines


def name_doubt(name: str, others: Collection[str], *, of_folders: bool = False) -> str | None:
    """What is odd about one name of a tag.

    Args:
      name: the name.
      others: the names of tags or classes that there are.
      of_folders: whether the names are those of folders.
    Returns:
      What it may be and the remedy, or None.
    """
    return _odd_name(name, of_folders) or _joined(name, {spelling(other): other for other in others})


def spelling(name: str) -> str:
    """A name without differences of letter case, forms of letters, spaces and underscores.

    Args:
      name: of a class.
    Returns:
      The plain name; two classes with the same one are the same class.
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def are_twins(name: str, other: str, count: int, other_count: int) -> bool:
    """Whether two names of classes may be one: a plural, an accent, signs, letters exchanged or doubled, or a rare slip.

    Args:
      name, other: of the classes.
      count, other_count: their numbers of photographs; a letter that is another one is a slip only where one is rare.
    Returns:
      True or False.
    """
    one, two = sorted((_letters(name), _letters(other)), key=len)
    if not one:
        return False
    if one == two or _singular(one) == _singular(two):
        return True
    if re.sub(r"\D", "", one) != re.sub(r"\D", "", two):
        return False  # part 1, part 2
    if len(one) >= 3 and two.startswith(one) and two[len(one) :] in _ENDINGS:
        return True
    if len(one) >= 4 and (_exchanged(one, two) or re.sub(r"(.)\1+", r"\1", one) == re.sub(r"(.)\1+", r"\1", two)):
        return True
    rare, often = sorted((count, other_count))
    return len(one) >= 5 and rare <= max(1, often // 10) and often > rare and _one_letter(one, two)


def _is_odd(name: str) -> bool:
    """Whether a name has letters that separate tags or belong to other text, also in their wide forms."""
    return _ODD.search(unicodedata.normalize("NFKC", name)) is not None


def _odd_name(name: str, of_folders: bool) -> str | None:
    plain = spelling(name)
    if plain in NO_TAG or _letters(name) in _NO_TAG_LETTERS:
        return f"the tag {name!r} looks like a word for no tag; leave the tags of these photographs empty" + (
            " (put them into a folder 'background')" if of_folders else "")  # fmt: skip
    if plain in BACKGROUNDS or name.casefold() in BACKGROUNDS:
        return f"the tag {name!r} looks like the background; leave it out, or write 'background'"
    if of_folders and plain in PLACES:
        return f"the folder {name!r} does not look like a class; write a tags.csv, or put a folder for each class into FOLDER"
    if _is_odd(name):
        return f"the tag {name!r} looks like several tags or other text; separate tags by semicolons"
    return None


def _joined(name: str, spelt: Mapping[str, str]) -> str | None:
    """A tag with other tags in it: 'ring star' beside 'ring'."""
    parts = [part for part in _JOINTS.split(unicodedata.normalize("NFKC", name).casefold()) if part and part != "and"]
    known = [spelt[part] for part in parts if part in spelt and spelt[part] != name]
    if len(parts) < 2 or not known:
        return None
    among = " and ".join(repr(tag) for tag in dict.fromkeys(known))
    return f"the tag {name!r} has the tag{'s' if len(set(known)) > 1 else ''} {among} in it; separate tags by semicolons"


def _orders(used: Mapping[str, str], names: list[str]) -> list[str]:
    """Words that begin one tag and end another, 'ring star' and 'star dots', are tags that were joined."""
    words = {name: spelling(name).split() for name in names if not _is_odd(name)}
    first = {parts[0]: name for name, parts in words.items() if len(parts) > 1}
    return [
        f"{used[name]}: the tags {first[parts[-1]]!r} and {name!r} look like tags joined by spaces; separate tags by "
        f"semicolons, or {CONFIRM}"
        for name, parts in words.items()
        if len(parts) > 1 and parts[-1] in first and first[parts[-1]] != name
    ]


def _letters(name: str) -> str:
    """Letters and digits alone, without accents."""
    apart = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in apart if letter.isalnum())


_NO_TAG_LETTERS = frozenset(letters for word in NO_TAG if (letters := _letters(word)))


def _singular(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses", "zes", "oes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _exchanged(one: str, two: str) -> bool:
    """Whether two neighbouring letters are exchanged."""
    different = [at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b]
    return len(one) == len(two) and len(different) == 2 and different[1] == different[0] + 1 and sorted(one) == sorted(two)


def _one_letter(one: str, two: str) -> bool:
    """Whether a letter is another one, or one is missing in the shorter word."""
    if len(one) == len(two):
        return sum(a != b for a, b in zip(one, two, strict=True)) == 1
    return len(two) == len(one) + 1 and any(two[:at] + two[at + 1 :] == one for at in range(len(two)))
