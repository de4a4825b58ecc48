"""Checks of the values of options, attributes that may be set or may not, and the short form of options in text.

A check takes the name of an option and a value, raises where the value is unusable, and returns it in the plain form in
which it is kept: `int` and `float` for numbers of NumPy, so that options that are equal have equal hashes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from typing import Any, Generic, TypeVar, overload

from torch import Tensor

from avalanche_curv.core.hints import called, known_arguments

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
    TypeError: projection must be a Projection; got the class StepProjection. Did you mean StepProjection()?
    """
    if not isinstance(value, kind):
        got, hint = in_short(value), f"Give a value such as {example}."
        got = f"the class {got}" if isinstance(value, type) else got
        if isinstance(value, type) and issubclass(value, kind):
            meant = example if example.startswith(f"{value.__name__}(") and " or " not in example else called(value)
            hint = f"Did you mean {meant}?"
        article = "an" if kind.__name__[0].lower() in "aeiou" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}; got {got}. {hint}")
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
        except AttributeError as error:  # of a frozen value, or of a `Fixed` attribute
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


def in_short(value: Any) -> str:
    """A value as it would be written, in one line: of an option the arguments that are not defaults, and the type alone
    of what has no short form.

    >>> from avalanche_curv import Fisher, Rank
    >>> in_short(Fisher()), in_short(Fisher(samples=2)), in_short(Rank(3))
    ('Fisher()', 'Fisher(samples=2)', 'Rank(k=3)')
    """
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple):
        return f"({', '.join(map(in_short, value))}{',' * (len(value) == 1)})"
    if is_dataclass(value) and not isinstance(value, OneLine):
        return f"{type(value).__name__}({', '.join(_arguments(value))})"
    text = repr(value)
    plain = type(value).__repr__ is not object.__repr__ and "\n" not in text and len(text) <= LONGEST
    return text if plain or isinstance(value, OneLine) else f"<{type(value).__name__}>"


LONGEST = 80  # characters of one argument


def _arguments(value: Any) -> Iterator[str]:
    """The constructor's arguments that `value` holds under their names and that are not the defaults."""
    for name, parameter in inspect.signature(type(value)).parameters.items():
        held = getattr(value, name, parameter.default)
        if held is not parameter.default and (parameter.default is None or held != parameter.default):
            yield f"{name}={in_short(held)}"


def counted(count: int, what: str) -> str:
    """A number of things in words.

    >>> counted(1, "refresh"), counted(2, "refresh"), counted(0, "experience")
    ('1 refresh', '2 refreshes', '0 experiences')
    """
    return f"{count} {what}{'' if count == 1 else 'es' if what.endswith('sh') else 's'}"


class OneLine:
    """What has a `repr` of one line: the arguments of its constructor that are not defaults, unless it says otherwise
    in `described`. Subclasses keep it, dataclasses among them.

    >>> from avalanche_curv import L2, GGN, Past
    >>> L2(1e-3, every=10), Past()
    (L2(strength=0.001, every=10), Past())
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = cls.__repr__  # type: ignore[method-assign]  # its own, which a dataclass does not replace

    def described(self) -> Iterable[str]:
        """What stands between the brackets."""
        return _arguments(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.described())})"


class Configured(OneLine):
    """What is made from options: its `repr` is one line, and an argument that its constructor does not take is an error
    that names the one that is meant (`known_arguments`)."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = known_arguments(cls.__init__)  # type: ignore[method-assign]
