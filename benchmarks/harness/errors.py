"""The errors that the command line shows as one line."""

import difflib
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class UsageError(Exception):
    """The request cannot be met, and the message says what to ask for instead. Exit status 2, no traceback."""


def unknown(what: str, given: str, choices: Iterable[str]) -> str:
    """The message for a name that is not among the choices, with the nearest one.

    >>> unknown("experiment", "refrsh", ["compare", "refresh"])
    "unknown experiment 'refrsh'; did you mean 'refresh'? Choices: compare, refresh."
    >>> unknown("strategy", "EWC", ["SI", "CurvatureEWC Fisher, merge"])
    "unknown strategy 'EWC'. Choices: CurvatureEWC Fisher, merge; SI."
    """
    names = sorted(choices)
    nearest = difflib.get_close_matches(given, names, n=1)
    guess = f"; did you mean '{nearest[0]}'?" if nearest else "."
    between = "; " if any("," in name for name in names) else ", "
    return f"unknown {what} '{given}'{guess} Choices: {between.join(names)}."


def selected(what: str, choices: Mapping[str, T], names: Sequence[str] | None) -> list[T]:
    """The choices of those names, in their own order, or all without names. Raises UsageError for an unknown name.

    >>> selected("row", {"a": 1, "b": 2}, ["b", "a"]), selected("row", {"a": 1, "b": 2}, None)
    ([1, 2], [1, 2])
    """
    for name in names or ():
        if name not in choices:
            raise UsageError(unknown(what, name, choices))
    return [choice for name, choice in choices.items() if names is None or name in names]


def full_disk(error: BaseException | None, folder: Path) -> UsageError | None:
    """What to tell where an error, or the one that it comes from, says that there was no space left to write; without
    a file's name it was in the folder."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            place = Path(error.filename).parent if error.filename else folder
            return UsageError(
                f"no space is left on the disk of {place}. What has finished is kept: make space, and the same command "
                "runs the rest."
            )
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def telling_of_a_full_disk(folder: Path) -> Iterator[None]:
    """`UsageError` for the error of a write that found no space left."""
    try:
        yield
    except OSError as error:
        full = full_disk(error, folder)
        if full is None:
            raise
        raise full from error
