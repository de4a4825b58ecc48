"""What options accept."""

from __future__ import annotations

import math
from numbers import Integral, Real


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1.

    >>> is_count(3), is_count(2.5), is_count(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def is_number(value: object) -> bool:
    """Whether `value` is a finite number, and no truth value.

    >>> is_number(0.5), is_number("0.5"), is_number(float("nan"))
    (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
