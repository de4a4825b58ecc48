"""The error that the command line shows as one line."""

import difflib
from collections.abc import Iterable


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
