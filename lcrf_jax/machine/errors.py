"""Errors that users can mend, and how a program knows them from its own faults.

`UserError` is the base of those that are meant for users and nobody else. Much of what is wrong with files and settings is
a ValueError, for those who use the library; `for_users` tells these from the ValueErrors of JAX, of NumPy and of our own
faults, which have a traceback.
"""

import difflib
import dis
import pathlib
from collections.abc import Collection

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# Rooms whose functions take arrays: what they refuse is a mistake of the caller, not of the one who gave the files.
PURE = ("numerics.py", "crf", "bound", "metrics.py", "baselines")
_RAISE = dis.opmap["RAISE_VARARGS"]


class UserError(Exception):
    """Something that the user can mend; the message says what is wrong, what was expected and the remedy."""


class SettingError(UserError, ValueError):
    """A setting, option or flag that cannot be, or that nothing would use."""


def nearest(name: str, known: Collection[str]) -> str:
    """A question for the end of a message, whether another name was meant; empty where none is near.

    Args:
      name: as it was given.
      known: names that there are.

    Returns:
      "; did you mean 'NAME'?", or "".
    """
    found = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def for_users(error: BaseException) -> bool:
    """Whether an error is to be told in one line, without a traceback.

    That are those of `UserError`; those of the operating system, which name a file or a host; and the ValueErrors that the
    house raises itself, by a raise statement outside the pure rooms.

    Args:
      error: as it was caught.

    Returns:
      bool.
    """
    if isinstance(error, UserError | OSError):
        return True
    return isinstance(error, ValueError) and _raised_by_the_house(error)


def _raised_by_the_house(error):
    at = error.__traceback__
    if at is None:
        return False
    while at.tb_next is not None:
        at = at.tb_next
    code = at.tb_frame.f_code
    file = pathlib.Path(code.co_filename).resolve()
    if file.is_relative_to(PACKAGE):
        inside = file.relative_to(PACKAGE).parts[0] not in PURE
    else:
        inside = file.is_relative_to(PACKAGE.parent / "experiments")
    return inside and code.co_code[at.tb_lasti] == _RAISE
