"""The errors that the command line shows as one line."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UsageError(Exception):
    """The request cannot be met, and the message says what to ask for instead. Exit status 2, no traceback."""


def unknown(what: str, given: str, choices: Iterable[str]) -> str:
    """The message for a name that is not among the choices, with the nearest one.

    >>> unknown("experiment", "refrsh", ["compare", "refresh"])
    "unknown experiment 'refrsh'; did you mean 'refresh'? Choices: compare, refresh."
    """
    names = sorted(choices)
    nearest = difflib.get_close_matches(given, names, n=1)
    guess = f"; did you mean '{nearest[0]}'?" if nearest else "."
    return f"unknown {what} '{given}'{guess} Choices: {', '.join(names)}."


def raise_if_the_disk_is_full(error: BaseException, folder: Path) -> None:
    """Raise `UsageError` where an error, or the one that it comes from, says that there was no space left to write."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            place = Path(cause.filename).parent if cause.filename else folder
            raise UsageError(
                f"no space is left on the disk of {place}. What has finished is kept: make space, and the same command "
                "runs the rest."
            ) from error
        cause = cause.__cause__ or cause.__context__


@contextmanager
def telling_of_a_full_disk(folder: Path) -> Iterator[None]:
    """`UsageError` for the error of a write that found no space left; without a file's name it was in the folder."""
    try:
        yield
    except OSError as error:
        raise_if_the_disk_is_full(error, folder)
        raise
