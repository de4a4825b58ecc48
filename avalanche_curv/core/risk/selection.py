"""The selection of parameters by name or by type of module."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from avalanche_curv.core.arguments import outside
from avalanche_curv.core.options import settle
from avalanche_curv.core.risk.parameters import canonical_name
from avalanche_curv.core.state import Storable

ParameterSelector: TypeAlias = str | type[nn.Module]
"""Selects parameters: the canonical name of a parameter or a module, "*" and "?" allowed, or a type of module."""


@dataclass(frozen=True)
class Selection(Storable):
    """The parameters of a model that `include` selects (all where it is empty) and `exclude` does not.

    Raises TypeError for selectors that are neither a name nor a type of module.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> [name for name, _ in Selection(exclude=(nn.LayerNorm, "*.bias")).of(model)]
    ['0.weight']
    """

    include: tuple[ParameterSelector, ...] = ()
    exclude: tuple[ParameterSelector, ...] = ()

    def __post_init__(self) -> None:
        settle(self, include=lambda _, value: _as_selectors(value), exclude=lambda _, value: _as_selectors(value))
        for selector in (*self.include, *self.exclude):
            if not isinstance(selector, str) and not (isinstance(selector, type) and issubclass(selector, nn.Module)):
                raise TypeError(
                    f"include and exclude hold names such as 'head' or '*.bias' and types of modules such as "
                    f"nn.LayerNorm; got {selector!r}."
                )

    def of(self, model: nn.Module, known: dict[str, bool] | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """The selected parameters with their names, each once; a tied one by the first name that is selected. `known`
        caches which names are selected, for later calls with the same modules."""
        known = {} if known is None else known
        seen: set[int] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in seen:
                continue
            if name not in known:
                known[name] = self._includes(model, name)
            if known[name]:
                seen.add(id(parameter))
                yield name, parameter

    def in_space(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """The parameters of `model` by the names of `named_parameters()` that a quadratic model is made of: those that
        `include` selects, also where they are frozen (`requires_grad=False`), or without `include` all trainable ones;
        less those that `exclude` selects, and those of size 0."""
        trains = (lambda p: p.is_floating_point()) if self.include else (lambda p: p.requires_grad)
        chosen = {id(p) for _, p in self.of(model) if p.numel() and trains(p)}
        return [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) in chosen]

    def frozen(self, model: nn.Module) -> tuple[str, ...]:
        """The canonical names of the parameters that would be selected if they were not frozen; none where `include`
        says which are."""
        if self.include:
            return ()
        frozen = ((n, p) for n, p in self.of(model) if not p.requires_grad)
        return tuple(canonical_name(name) for name, p in frozen if p.is_floating_point() and p.numel())

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a selector that fits no parameter of `model`."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for selector in (*self.include, *self.exclude):
            if any(_selects(selector, model, name) for name in names):
                continue
            wanted = selector if isinstance(selector, str) else selector.__name__
            known = {canonical_name(name) for name in names} | {canonical_name(n).rpartition(".")[0] for n in names}
            near = get_close_matches(wanted, [name for name in known if name], n=3)
            near = near or sorted(known - {""})[:8]
            raise ValueError(
                f"{type(model).__name__} has no parameter that {wanted!r} selects. Did you mean one of {near}?"
            )

    def _includes(self, model: nn.Module, name: str) -> bool:
        if not self.include and not self.exclude:
            return True
        included = not self.include or any(_selects(selector, model, name) for selector in self.include)
        return included and not any(_selects(selector, model, name) for selector in self.exclude)


def selection_of(include: Iterable[ParameterSelector], exclude: Iterable[ParameterSelector]) -> Selection:
    """The selection of two lists of selectors. Raises TypeError for a single name or type, and for what is neither."""
    return Selection(_as_selectors(include), _as_selectors(exclude))


def _as_selectors(selectors: Iterable[ParameterSelector]) -> tuple[ParameterSelector, ...]:
    """The selectors of `include` or `exclude` as a tuple. Raises TypeError for what is no list of them."""
    if isinstance(selectors, (str, type)) or not isinstance(selectors, Iterable):
        raise TypeError(
            f"include and exclude each take a list of names and types of modules, as ['head', nn.LayerNorm]; got "
            f"{selectors!r}. Leave either out, or give (), for no restriction."
        )
    return tuple(selectors)


def training(names: Collection[str], model: nn.Module) -> tuple[str, ...]:
    """Those of the canonical `names` whose parameters require a gradient in `model`."""
    if not names:
        return ()
    known = {*names}
    trained = (canonical_name(name) for name, p in model.named_parameters() if p.requires_grad)
    return tuple(name for name in trained if name in known)


def warn_unprotected(names: Sequence[str]) -> None:
    """Warns that the parameters of these names train without a past that knows them, with the remedy."""
    warnings.warn(
        f"Parameters train that were frozen (requires_grad=False) when the past was absorbed, so that nothing of it "
        f"holds them: {in_words(names)}. Absorb the past with include=[...], which takes in parameters that train "
        'later: include=["*"] is all of them.',
        UserWarning,
        stacklevel=outside(),
    )


class Unprotected:
    """Warns once of each set of parameters that train although the past does not know them."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def say(self, names: Sequence[str]) -> None:
        """`names` are those that train so now; nothing happens for those that were said before."""
        if not self._said.issuperset(names):
            self._said.update(names)
            warn_unprotected(names)


def in_words(names: Sequence[str]) -> str:
    """The first four of these names, and how many more there are.

    >>> in_words(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d and 2 more'
    """
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _selects(selector: ParameterSelector, model: nn.Module, name: str) -> bool:
    """Whether `selector` fits the parameter `name`, or a module that holds it."""
    parts = name.split(".")
    if isinstance(selector, str):
        known = canonical_name(name).split(".")
        return any(fnmatchcase(".".join(known[: n + 1]), selector) for n in range(len(known)))
    return any(isinstance(model.get_submodule(".".join(parts[:n])), selector) for n in range(len(parts)))
