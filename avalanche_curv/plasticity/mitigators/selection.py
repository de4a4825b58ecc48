"""Which parameters of a model are meant, by name or by type of module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from avalanche_curv.core.risk.parameters import canonical_name

ParameterSelector: TypeAlias = str | type[nn.Module]
"""A parameter's or a module's canonical name, "*" and "?" allowed, or a type of module."""


@dataclass(frozen=True)
class Selection:
    """The parameters that `include` names (all where it is empty) and `exclude` does not.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    >>> [name for name, _ in Selection(exclude=(nn.LayerNorm, "*.bias")).of(model)]
    ['0.weight']
    """

    include: tuple[ParameterSelector, ...] = ()
    exclude: tuple[ParameterSelector, ...] = ()

    def __post_init__(self) -> None:
        for kept in (*self.include, *self.exclude):
            if not isinstance(kept, str) and not (isinstance(kept, type) and issubclass(kept, nn.Module)):
                raise TypeError(
                    f"include and exclude hold names such as 'head' or '*.bias' and types of modules such as "
                    f"nn.LayerNorm; got {kept!r}."
                )

    def of(self, model: nn.Module, known: dict[str, bool] | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters with their names, each once; a tied one by the first name that is selected. `known` keeps
        which names are, for later calls with the same modules."""
        known = {} if known is None else known
        seen: set[int] = set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in seen:
                continue
            if name not in known:
                known[name] = self._takes(model, name)
            if known[name]:
                seen.add(id(parameter))
                yield name, parameter

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for a name or a type that the model has not."""
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for kept in (*self.include, *self.exclude):
            if any(_fits(kept, model, name) for name in names):
                continue
            wanted = kept if isinstance(kept, str) else kept.__name__
            known = {canonical_name(name) for name in names} | {canonical_name(n).rpartition(".")[0] for n in names}
            near = get_close_matches(wanted, [name for name in known if name], n=3)
            near = near or sorted(known - {""})[:8]
            raise ValueError(
                f"{type(model).__name__} has no parameter that {wanted!r} selects. Did you mean one of {near}?"
            )

    def _takes(self, model: nn.Module, name: str) -> bool:
        if not self.include and not self.exclude:
            return True
        included = not self.include or any(_fits(kept, model, name) for kept in self.include)
        return included and not any(_fits(kept, model, name) for kept in self.exclude)


def listed(kept: Iterable[ParameterSelector]) -> tuple[ParameterSelector, ...]:
    """What `include` or `exclude` holds. Raises TypeError for a single name or type."""
    if isinstance(kept, (str, type)):
        raise TypeError(f"include and exclude each take a list of names and types of modules; got {kept!r} alone.")
    return tuple(kept)


def _fits(kept: ParameterSelector, model: nn.Module, name: str) -> bool:
    """Whether a parameter, or a module that holds it, is the one that is meant."""
    parts = name.split(".")
    if isinstance(kept, str):
        known = canonical_name(name).split(".")
        return any(fnmatchcase(".".join(known[: n + 1]), kept) for n in range(len(known)))
    return any(isinstance(model.get_submodule(".".join(parts[:n])), kept) for n in range(len(parts)))
