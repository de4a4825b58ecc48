"""Checks of the values of options, attributes that may be set or may not, and the short form of options in text.

A check takes the name of an option and a value, raises where the value is unusable, and returns it in the plain form in
which it is kept: `int` and `float` for numbers of NumPy, so that options that are equal have equal hashes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from numbers import Integral, Real
from typing import Any, Generic, TypeVar, overload

from torch import Tensor

T = TypeVar("T")


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1.

    >>> is_count(3), is_count(2.5), is_count(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def check_count(name: str, value: Any, hint: str = "") -> int:
    """`value` as an int. Raises ValueError unless it is an integer of at least 1; the message ends with the `hint`.

    >>> check_count("every", 0, "1 measures at each step.")
    Traceback (most recent call last):
    ValueError: every must be an integer of at least 1; got 0. 1 measures at each step.
    """
    if not is_count(value):
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}. {hint}".rstrip())
    return int(value)


def check_whole(name: str, value: Any) -> int:
    """`value` as an int. Raises ValueError unless it is an integer of at least 0."""
    if not (is_count(value) or (isinstance(value, Integral) and not isinstance(value, bool) and int(value) == 0)):
        raise ValueError(f"{name} must be an integer of at least 0; got {value!r}.")
    return int(value)


def check_number(
    name: str,
    value: Any,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    hint: str = "",
) -> float:
    """`value` as a float. Raises ValueError unless it is a finite number within these limits; the message ends with the
    `hint`.

    >>> check_number("decay", 1, at_least=0, below=1, hint="Try 0.999.")
    Traceback (most recent call last):
    ValueError: decay must be a finite number, at least 0, below 1; got 1. Try 0.999.
    """
    if not (is_number(value) and at_least <= value <= at_most and above < value < below):
        limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
        shown = "".join(f", {which} {limit:g}" for which, limit in limits.items() if math.isfinite(limit))
        raise ValueError(f"{name} must be a finite number{shown}; got {value!r}. {hint}".rstrip())
    return float(value)


def check_fraction(name: str, value: Any) -> float:
    """`value` as a float. Raises ValueError unless it is a number in (0, 1], a part of the examples.

    >>> check_fraction("fraction", 0)
    Traceback (most recent call last):
    ValueError: fraction must lie in (0, 1]; got 0. 0.1 keeps one example in ten.
    """
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name} must lie in (0, 1]; got {value!r}. 0.1 keeps one example in ten.")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """`value` as a bool. Raises TypeError unless it is True or False."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False; got {value!r}.")
    return bool(value)


def check_kind(name: str, value: Any, kind: type, example: str) -> Any:
    """`value`. Raises TypeError unless it is an instance of `kind`; the message names the option and shows an
    `example`.

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
    return value


def is_number(value: object) -> bool:
    """Whether `value` is a finite number that a float can hold, and no truth value.

    >>> is_number(0.5), is_number("0.5"), is_number(float("nan")), is_number(10**400)
    (True, False, False, False)
    """
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_seed(name: str, value: Any) -> int:
    """`value` as an int. Raises ValueError unless it is an integer from 0 to 2³¹ − 1.

    >>> check_seed("seed", -1)
    Traceback (most recent call last):
    ValueError: seed must be an integer from 0 to 2³¹ − 1; got -1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < 2**31:
        raise ValueError(f"{name} must be an integer from 0 to 2³¹ − 1; got {value!r}.")
    return int(value)


Check = Callable[[str, Any], T]
"""Takes the name of an option and a value, and returns the value as it is kept, or raises."""


def optional(check: Check[T]) -> Check[T | None]:
    """The check that also lets None pass."""
    return lambda name, value: None if value is None else check(name, value)


def settle(option: Any, **checks: Check[Any]) -> None:
    """Checks fields of a frozen dataclass and keeps what the checks return, for its `__post_init__`."""
    for name, check in checks.items():
        value = check(f"{type(option).__name__}({name}=...)", getattr(option, name))
        object.__setattr__(option, name, value)


class Setting(Generic[T]):
    """An attribute that may be assigned at any time and acts from its next use on. Each assignment is checked, that in
    the constructor included.

    >>> class Metric:
    ...     every = Setting(check_count)
    ...     def __init__(self, every):
    ...         self.every = every
    >>> metric = Metric(2)
    >>> metric.every = 0
    Traceback (most recent call last):
    ValueError: every must be an integer of at least 1; got 0.
    >>> metric.every
    2
    """

    def __init__(self, check: Check[T]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Setting[T]: ...
    @overload
    def __get__(self, instance: Any, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if self.name not in instance.__dict__:
            raise AttributeError(f"{owner.__name__}.{self.name} has not been set yet.")
        return instance.__dict__[self.name]

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = self.check(self.name, value)


class Fixed(Setting[T]):
    """An attribute that the constructor sets and nothing after it, since something is made from it.

    >>> class Plugin:
    ...     curvature = Fixed()
    ...     def __init__(self, curvature):
    ...         self.curvature = curvature
    >>> Plugin("GGN").curvature = "Fisher"
    Traceback (most recent call last):
    AttributeError: curvature of a Plugin cannot be changed, since it has been used already. Make a new Plugin.
    """

    def __init__(self, check: Check[T] = lambda name, value: value) -> None:
        super().__init__(check)

    def __set__(self, instance: Any, value: Any) -> None:
        if self.name in instance.__dict__:
            raise AttributeError(_fixed(instance, self.name))
        super().__set__(instance, value)


class Forwarded:
    """An attribute of an object that this one holds, for an option that its constructor hands on.

    >>> class Plugin:
    ...     strength = Forwarded("mitigator")
    ...     def __init__(self, strength):
    ...         from avalanche_curv import L2
    ...         self.mitigator = L2(strength)
    >>> plugin = Plugin(0.5)
    >>> plugin.strength = 2
    >>> plugin.mitigator.strength
    2.0
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else getattr(getattr(instance, self.holder), self.name)

    def __set__(self, instance: Any, value: Any) -> None:
        try:
            setattr(getattr(instance, self.holder), self.name, value)
        except FrozenInstanceError as error:
            raise AttributeError(_fixed(instance, self.name)) from error


def _fixed(instance: Any, name: str) -> str:
    kind = type(instance).__name__
    return f"{name} of a {kind} cannot be changed, since it has been used already. Make a new {kind}."


class ByValue:
    """A frozen dataclass (with `eq=False`) that may hold tensors: equal, and of equal hash, where all values are."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash((type(self), _values(self)))


def _values(option: Any) -> tuple[Any, ...]:
    values = (getattr(option, field.name) for field in fields(option))
    return tuple((v.shape, *v.flatten().tolist()) if isinstance(v, Tensor) else v for v in values)


def in_short(option: Any) -> str:
    """A dataclass as it would be written: without the fields that hold their defaults.

    >>> from avalanche_curv import Fisher, Rank
    >>> in_short(Fisher()), in_short(Fisher(samples=2)), in_short(Rank(3))
    ('Fisher()', 'Fisher(samples=2)', 'Rank(k=3)')
    """
    shown = (field for field in fields(option) if getattr(option, field.name) != field.default)
    return f"{type(option).__name__}({', '.join(f'{f.name}={getattr(option, f.name)!r}' for f in shown)})"
