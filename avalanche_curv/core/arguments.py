"""Arguments that are checked where they are given: their kinds, and their order."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from itertools import permutations
from typing import Any, TypeVar

from avalanche_curv.core.hints import known_arguments
from avalanche_curv.core.options import check_kind, in_short

F = TypeVar("F", bound=Callable[..., Any])


def takes(**kinds: tuple[type, str]) -> Callable[[F], F]:
    """Makes a function check that these arguments of it, where they are given, are of these types: by name a type and
    an example of it. It raises TypeError otherwise, with the order where that is what is wrong.

    >>> @takes(count=(int, "3"), name=(str, "'fc1'"))
    ... def freeze(count, name): ...
    >>> freeze("fc1", 3)
    Traceback (most recent call last):
    TypeError: freeze(count, name) takes these in this order; got 'fc1', 3.
    >>> freeze(0.5, "fc1")
    Traceback (most recent call last):
    TypeError: count must be an int; got 0.5. Give a value such as 3.
    """

    def decorated(function: F) -> F:
        places = {name: place for place, name in enumerate(inspect.signature(function).parameters) if name in kinds}
        if missing := kinds.keys() - places.keys():
            raise TypeError(f"{function.__qualname__} has no argument {missing}.")
        checked_names: Any = known_arguments(function)

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {name: args[place] for name, place in places.items() if place < len(args)}
            given |= {name: value for name, value in kwargs.items() if name in kinds}
            if not all(isinstance(value, kinds[name][0]) for name, value in given.items()):
                _refuse(function.__qualname__.rpartition("<locals>.")[2], given, kinds)
            return checked_names(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorated


def _refuse(label: str, given: dict[str, Any], kinds: dict[str, tuple[type, str]]) -> None:
    wanted = [kinds[name][0] for name in given]
    if any(all(map(isinstance, order, wanted)) for order in permutations(given.values())):
        got = ", ".join(map(in_short, given.values()))
        raise TypeError(f"{label}({', '.join(given)}) takes these in this order; got {got}.")
    for name, value in given.items():
        check_kind(name, value, *kinds[name])


def outside() -> int:
    """The `stacklevel` with which the function that calls this warns of the line outside of this package that led to
    it."""
    level, frame = 1, sys._getframe(1)
    own = ("avalanche_curv", "contextlib")  # which enters our context managers
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in own:
        level, frame = level + 1, frame.f_back
    return level
