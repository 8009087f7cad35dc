"""Doubts about the names of classes that were found in tags: what may be a slip is asked, not guessed.

A list of classes, ``classes.txt``, is the answer: names that stand in one are confirmed, and no question is asked.
"""

from __future__ import annotations

import collections
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
MASK_WORDS = frozenset((  # folders of masks, and what is added to the name of a photograph for its mask
    "mask", "masks", "label", "labels", "annotation", "annotations", "annot", "gt", "gts", "groundtruth", "groundtruths", "seg",
    "segs", "segm", "segmentation", "segmentations", "segmentationclass", "segmentationclassaug", "segmentationclassraw",
    "segmentationobject", "trimaps",
))  # fmt: skip
PLACES = MASK_WORDS.union((
    "image", "images", "img", "imgs", "photo", "photos", "photographs", "picture", "pictures", "jpegimages", "data",
    "dataset", "train", "training", "val", "valid", "validation", "test", "testing", "raw", "processed", "originals", "thumbs",
    "thumbnails", "export", "exports", "jpegs", "jpgs", "jpg", "jpeg", "png", "pngs", "download", "downloads", "backup",
))  # fmt: skip
_ALSO_CLASSES = frozenset(("train", "raw", "processed"))
_JOINTS = re.compile(r"[\s|/,;+&_.()!\u2013\u2014\u2022\u00b7\u060c\-]+")
_BETWEEN = frozenset(("and", "und", "et"))
_ODD = re.compile(r"[|/\\,;*~^@\[\]{}\"<>=:\u3001\u2022\u060c\x00-\x1f\x7f]|\w\s*\+\s*\w|(^|\s)#|^['`]|['`]$")
_SCORE = re.compile(r"(.*[^\W\d_][\W_]*?|)[\W_]*((0|^|(?<=[\s:=]))[.,]\d+|1[.,]0+|\d+([.,]\d+)?\s*%)\W*")  # ring 0.9, ring: 95 %
_IRREGULAR = {"men": "man", "women": "woman", "people": "person", "persons": "person", "children": "child", "mice": "mouse",
              "feet": "foot", "geese": "goose", "teeth": "tooth", "leaves": "leaf", "wolves": "wolf", "knives": "knife"}  # fmt: skip
_ALPHABETS = "\u0590"  # the letters before it are Latin, Greek and Cyrillic: words in which a slip is one letter of many
FEW = 20  # in small folders a tag that was joined, or a plural, is no rarer than the others
_STATES = frozenset(("occupied", "full", "filled", "not empty", "non-empty", "partial", "half", "half full", "half-full"))
_NO_CLASS = re.compile(
    r"(19|20)\d\d[-_. ]?[01]\d[-_. ]?[0-3]\d|\d{3}_?(canon|nikon|nd\d+\w*|_?pana|msdcf|olymp|apple|gopro|fuji|media|pentx|photo|eos\w*)"
    r"|dcim|(new folder|untitled folder|neuer ordner)( ?\(?\d+\)?)?|.+ - copy( ?\(\d+\))?|.+ \(\d+\)"
)
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
    choose = "give the folders of one class one name" if of_folders else "choose one"
    lines: list[str] = []
    spelt: dict[str, str] = {}
    for name in sorted(used):
        same = spelt.setdefault(spelling(name), name)
        if same != name:
            lines.append(f"{used[name]}: the tags {same!r} and {name!r} differ in spelling alone; {choose}")
    distinct = sorted(spelt.values())
    lines += [f"{used[name]}: {doubt}; {CONFIRM}" for name in distinct
              if (doubt := name_doubt(name, distinct, counts, of_folders=of_folders))]  # fmt: skip
    lines += _orders(used, distinct, _apart(of_folders))
    for at, name in enumerate(distinct):
        for other in distinct[at + 1 :]:
            if are_twins(name, other, counts.get(name, 0), counts.get(other, 0)):
                lines.append(
                    f"{used[other]}: the tags {name!r} ({counts.get(name, 0)} photographs) and {other!r} "
                    f"({counts.get(other, 0)}) may be one class; {choose}, or {CONFIRM}"
                )
    if distinct and all(re.fullmatch(r"[\d.]+", name) for name in distinct):
        rename = "name the folders by their classes" if of_folders else "write the names of classes"
        lines.append(f"{used[distinct[0]]}: all tags are numbers ({', '.join(distinct[:6])}); {rename}, or {CONFIRM}")
    return lines


def name_doubt(
    name: str, others: Collection[str], counts: Mapping[str, int] | None = None, *, of_folders: bool = False
) -> str | None:
    """What is odd about one name of a tag.

    Args:
      name: the name.
      others: the names of tags or classes that there are.
      counts: how many photographs have each; without them a name that is made of others is odd at any number.
      of_folders: whether the names are those of folders.
    Returns:
      What it may be and the remedy, or None.
    """
    return _odd_name(name, others, of_folders) or _joined(name, others, counts, _apart(of_folders))


def spelling(name: str) -> str:
    """A name without differences of letter case, forms of letters, spaces and underscores.

    Args:
      name: of a class.
    Returns:
      The plain name; two classes with the same one are the same class.
    """
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def are_twins(name: str, other: str, count: int, other_count: int) -> bool:
    """Whether two names of classes may be one: a plural, accents and signs apart, or a slip of a letter where one is rare.

    Args:
      name, other: of the classes.
      count, other_count: their numbers of photographs; words that are near, such as horse and house, or glass and glasses,
        are two classes where both are common.
    Returns:
      True or False.
    """
    if re.findall(r"\d+", name) != re.findall(r"\d+", other):
        return False  # part 1, part 2
    if _letters(name) == _letters(other):
        return len(_letters(name)) > 1 and not _letters(name).isdigit()  # C# and C++, 1 and -1 are two
    words, others = _words(name), _words(other)
    different = [pair for pair in zip(words, others, strict=False) if pair[0] != pair[1]]
    if len(words) != len(others) or len(different) != 1:
        return False
    one, two = sorted(different[0], key=len)
    rare, often = sorted((count, other_count))
    if len(one) > 2 and not one.endswith("s") and two == one + "s":
        return one[-1].isalpha()
    if _singular(one) == _singular(two) or (two == one + "es" and one.endswith(("s", "x", "z"))):
        return 3 * rare <= often or (rare < FEW and not one.endswith("ss"))
    if len(one) < 5 or max(one + two) >= _ALPHABETS or re.search(r"\d", one + two):
        return False
    if _exchanged(one, two) or re.sub(r"(.)\1+", r"\1", one) == re.sub(r"(.)\1+", r"\1", two):
        return 3 * rare <= often
    return _one_letter(one, two) and (10 * rare <= often and rare <= 2 or 50 * rare <= often or len(one) > 6 and 3 * rare <= often)


def _is_odd(name: str) -> bool:
    """Whether a name has letters that separate tags or belong to other text, also in their wide forms."""
    return _ODD.search(unicodedata.normalize("NFKC", name)) is not None


def _apart(of_folders: bool) -> str:
    """The remedy for tags that were joined."""
    return "rename the folder, or write a tags.csv" if of_folders else "separate tags by semicolons"


def _odd_name(name: str, others: Collection[str], of_folders: bool) -> str | None:
    plain = spelling(name)
    if plain in NO_TAG or _letters(name) in _NO_TAG_LETTERS:
        if plain == "empty" and any(spelling(other) in _STATES for other in others):
            return None
        return f"the tag {name!r} looks like a word for no tag; leave the tags of these photographs empty" + (
            " (put them into a folder 'background')" if of_folders else "")  # fmt: skip
    if plain in BACKGROUNDS or name.casefold() in BACKGROUNDS:
        return f"the tag {name!r} looks like the background; " + (
            "name the folder 'background'" if of_folders else "leave it out, or write 'background'")  # fmt: skip
    if of_folders and _is_place(plain, [other for other in others if other != name]):
        return f"the folder {name!r} does not look like a class; write a tags.csv, or put a folder for each class into FOLDER"
    if scored := _SCORE.fullmatch(unicodedata.normalize("NFKC", name)):
        instead = f"write its name alone ({scored[1]!r})" if scored[1] else "leave it out"
        return f"the tag {name!r} looks like a score; {instead}, and only tags whose score is high enough"
    if _is_odd(name):
        return f"the tag {name!r} looks like several tags or other text; {_apart(of_folders)}"
    return None


def _is_place(plain: str, others: Collection[str]) -> bool:
    """Whether a folder has the name of a split, a camera, a day or a kind of file; some of these words are classes too."""
    if plain in _ALSO_CLASSES and others:
        return any(_stem(spelling(other)) in PLACES or _NO_CLASS.fullmatch(spelling(other)) for other in others)
    return _stem(plain) in PLACES or _NO_CLASS.fullmatch(plain) is not None


def _stem(plain: str) -> str:
    """Without the numbers at its end: train2017, images 1."""
    return re.sub(r"[\W\d_]+$", "", plain)


def _joined(name: str, others: Collection[str], counts: Mapping[str, int] | None, apart: str) -> str | None:
    """A tag that is made of other tags, and not more common than they are: 'ring star' beside 'ring' and 'star'."""
    known = {tuple(_pieces(other)): other for other in others if other != name}
    parts = _made_of(_pieces(name), known)
    if len(parts) < 2:
        return None
    if counts is not None:
        count, least = counts.get(name, 0), min(counts.get(part, 0) for part in parts)
        if 3 * count > least and (count >= FEW or count > 2 * least):
            return None
    among = " and ".join(repr(tag) for tag in dict.fromkeys(parts))
    return f"the tag {name!r} has the tag{'s' if len(set(parts)) > 1 else ''} {among} in it; {apart}"


def _pieces(name: str) -> list[str]:
    parts = _JOINTS.split(unicodedata.normalize("NFKC", name).casefold())
    return [part for part in parts if part and part not in _BETWEEN]


def _made_of(pieces: list[str], known: Mapping[tuple[str, ...], str]) -> list[str]:
    """The tags that make up a row of words, none if a word is left over."""
    ways: list[list[str] | None] = [[]]  # of the first words
    for end in range(1, len(pieces) + 1):
        ways.append(next(([*before, known[key]] for start in range(end)
                          if (before := ways[start]) is not None and (key := tuple(pieces[start:end])) in known), None))  # fmt: skip
    return ways[-1] or []


def _orders(used: Mapping[str, str], names: list[str], apart: str) -> list[str]:
    """Words that come in several tags, first in one and last in another, are tags that were joined.

    'ring star', 'star dots' and 'ring dots' are; 'sea lion' and 'lion cub' have words of their own.
    """
    words = {name: parts for name in names if not _is_odd(name) and len(parts := spelling(name).split()) > 1}
    uses = collections.Counter(word for parts in words.values() for word in set(parts))
    shared = {name: parts for name, parts in words.items() if len(set(parts)) > 1 and all(uses[word] > 1 for word in parts)}
    first = {parts[0]: name for name, parts in shared.items()}
    return [
        f"{used[name]}: the tags {first[parts[-1]]!r} and {name!r} look like tags joined by spaces; {apart}, or {CONFIRM}"
        for name, parts in shared.items()
        if parts[-1] in first and first[parts[-1]] != name
    ]


def _letters(name: str) -> str:
    """Letters and digits alone; accents are left out of Latin letters, elsewhere they make other letters."""
    kept = ""
    for sign in unicodedata.normalize("NFKD", name).casefold():
        if unicodedata.category(sign).startswith("M"):
            kept += sign if kept and kept[-1] >= "\u0370" else ""
        elif sign.isalnum():
            kept += sign
    return kept


def _words(name: str) -> list[str]:
    return [letters for word in re.split(r"[\s_]+", name) if (letters := _letters(word))]


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
