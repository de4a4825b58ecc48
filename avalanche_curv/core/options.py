"""Checks of the values of options, and their short form in text."""

from __future__ import annotations

import math
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1.

    >>> is_count(3), is_count(2.5), is_count(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_count(name: str, value: object) -> None:
    """Raises ValueError unless `value` is an integer of at least 1.

    >>> check_count("every", 0)
    Traceback (most recent call last):
    ValueError: every must be an integer of at least 1; got 0.
    """
    if not is_count(value):
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")


def check_kind(name: str, value: object, kind: type, example: str) -> None:
    """Raises TypeError unless `value` is an instance of `kind`; the message names the option and shows an `example`.

    >>> from avalanche_curv import Projection, StepProjection
    >>> check_kind("projection", StepProjection, Projection, "StepProjection()")
    Traceback (most recent call last):
    TypeError: projection must be a Projection; got \
<class 'avalanche_curv.core.projection.projections.StepProjection'>. Call it: StepProjection().
    """
    if not isinstance(value, kind):
        hint = f"Give a value such as {example}."
        if isinstance(value, type):
            hint = f"Call it: {example if example.startswith(value.__name__) else value.__name__ + '()'}."
        raise TypeError(f"{name} must be a {kind.__name__}; got {value!r}. {hint}")


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no truth value.

    >>> is_number(0.5), is_number("0.5"), is_number(float("nan"))
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_seed(value: object) -> None:
    """Raises ValueError unless `value` is an integer from 0 to 2³¹ − 1.

    >>> check_seed(-1)
    Traceback (most recent call last):
    ValueError: seed must be an integer from 0 to 2³¹ − 1; got -1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < 2**31:
        raise ValueError(f"seed must be an integer from 0 to 2³¹ − 1; got {value!r}.")


def in_short(option: Any) -> str:
    """A dataclass as it would be written: without the fields that hold their defaults.

    >>> from avalanche_curv import Fisher, Rank
    >>> in_short(Fisher()), in_short(Fisher(samples=2)), in_short(Rank(3))
    ('Fisher()', 'Fisher(samples=2)', 'Rank(k=3)')
    """
    shown = (field for field in fields(option) if getattr(option, field.name) != field.default)
    return f"{type(option).__name__}({', '.join(f'{f.name}={getattr(option, f.name)!r}' for f in shown)})"
