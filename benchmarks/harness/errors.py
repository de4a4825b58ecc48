"""The errors that the command line shows as one line."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")
ONE_LINE = 400  # characters of choices that still stand in one paragraph


class UsageError(Exception):
    """The request cannot be met, and the message says what to ask for instead. Exit status 2, no traceback."""


def unknown(what: str, given: str, choices: Iterable[str]) -> str:
    """The message for a name that is not among the choices, with the nearest ones; of many choices, each has a line.

    >>> unknown("experiment", "refrsh", ["compare", "refresh"])
    "unknown experiment 'refrsh'; did you mean 'refresh'? Choices: compare, refresh."
    >>> unknown("strategy", "ewc", ["EWC", "CurvatureEWC Fisher, merge"])
    "unknown strategy 'ewc'; did you mean 'EWC'? Choices: CurvatureEWC Fisher, merge; EWC."
    """
    names = sorted(choices)
    near = nearest(given, names)
    guess = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    between = "; " if any("," in name for name in names) else ", "
    listed = between.join(names)
    return f"unknown {what} '{given}'{guess} Choices:" + (
        f" {listed}." if len(listed) <= ONE_LINE else "".join(f"\n  {name}" for name in names)
    )


def nearest(given: str, names: Sequence[str], most: int = 3) -> list[str]:
    """The same name but for case, spaces and dashes, else those that begin or end with it, else the one spelt most like
    it.

    >>> known = ["EWC", "EWC online", "JointTraining", "split_mnist"]
    >>> [nearest(given, known) for given in ("SplitMNIST", "joint", "online EWC", "ewcs", "?")]
    [['split_mnist'], ['JointTraining'], ['EWC online'], ['EWC'], []]
    """
    plain = {name: _plain(name) for name in names}
    asked = _plain(given)
    same = [name for name in names if plain[name] == asked]
    longer = [name for name in names if asked and (plain[name].startswith(asked) or plain[name].endswith(asked))]
    alike = difflib.get_close_matches(asked, plain.values(), n=1)
    return same or longer[:most] or [name for name in names if plain[name] in alike]


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()


def selected(what: str, choices: Mapping[str, T], names: Sequence[str] | None) -> list[T]:
    """The choices of those names, in their own order, or all without names. Raises UsageError for an unknown name.

    >>> selected("row", {"a": 1, "b": 2}, ["b", "a"]), selected("row", {"a": 1, "b": 2}, None)
    ([1, 2], [1, 2])
    """
    for name in names or ():
        if name not in choices:
            raise UsageError(unknown(what, name, choices))
    return [choice for name, choice in choices.items() if names is None or name in names]
