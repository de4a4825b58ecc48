"""Which entry of a model's parameters each coordinate of a vector is, also after the model has grown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avalanche_curv.core.arguments import takes
from avalanche_curv.core.state import Storable


def canonical_name(name: str) -> str:
    """The name of a parameter without what wrappers add to it (`DataParallel`, `torch.compile`).

    >>> canonical_name("module._orig_mod.head.weight")
    'head.weight'
    """
    while name.startswith(("module.", "_orig_mod.")):
        name = name.split(".", 1)[1]
    return name.replace("._orig_mod.", ".")


def canonical_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` by their canonical names, in the order of `named_parameters()`."""
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


class NamedParameters:
    """`canonical_parameters` of one model at any time. They are searched for again only where a module or parameter of
    it was added, taken away or replaced: the search is felt in every step of a small model.

    >>> model = nn.Sequential(nn.Linear(3, 2))
    >>> named = NamedParameters(model)
    >>> list(named()), named() is named()
    (['0.weight', '0.bias'], True)
    >>> _ = model.append(nn.Linear(2, 1, bias=False))
    >>> list(named())
    ['0.weight', '0.bias', '1.weight']
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: list[tuple[dict[str, Any], dict[str, Any]]] = []  # what modules hold, and what they held
        self._named: dict[str, nn.Parameter] = {}

    def __call__(self) -> dict[str, nn.Parameter]:
        if not self._hold():
            held = [own for module in self.model.modules() for own in (module._parameters, module._modules)]
            self._kept, self._named = [(now, dict(now)) for now in held], canonical_parameters(self.model)
        return self._named

    def _hold(self) -> bool:
        for now, then in self._kept:
            if len(now) != len(then):
                return False
            for name, what in then.items():
                if now.get(name) is not what:
                    return False
        return bool(self._kept)


@dataclass(frozen=True)
class ParameterSpace(Storable):
    """The trainable parameters of a model as the coordinates of one vector of size P.

    Coordinates follow `named_parameters()`. A later model is read through the same space: parameters are found by
    canonical name, a parameter that has grown is cut to the shape it had here, and new parameters are not read. Those
    of size 0 have no coordinates, and count as new when they grow.

    >>> space = ParameterSpace.of(nn.Linear(3, 2))
    >>> space.names, space.size
    (('weight', 'bias'), 8)
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    @takes(model=(nn.Module, "the model that is trained"))
    def of(cls, model: nn.Module) -> ParameterSpace:
        """The space of the parameters of `model` that require a gradient. Raises ValueError if there is none."""
        return cls.of_parameters(model, [(n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()])

    @classmethod
    def of_parameters(cls, model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> ParameterSpace:
        """The space of some named parameters of `model`. Raises ValueError if there is none."""
        trainable = [(canonical_name(name), parameter.shape) for name, parameter in parameters]
        if not trainable:
            raise ValueError(
                f"{type(model).__name__} has no trainable parameter: a quadratic model needs at least one. "
                "Set requires_grad=True on parameters that training may move, or name frozen ones with include=[...]."
            )
        names, shapes = zip(*trainable)
        if len(set(names)) < len(names):
            raise ValueError(f"Parameters share a name among {names}. Rename the submodule called 'module'.")
        return cls(names, shapes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of coordinates of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """P, the number of coordinates."""
        return sum(self.sizes)

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """The parameters of `model`, attached to its graph, each cut to the shape it has in this space.

        Raises ValueError if one is missing or has become smaller.
        """
        return self.cut(canonical_parameters(model))

    def cut(self, current: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors of this space's parameters, from a mapping by canonical name, each cut to its shape here.

        Raises ValueError if one is missing or has become smaller.
        """
        return [_cut(name, current.get(name), shape) for name, shape in zip(self.names, self.shapes)]

    def vector(self, model: nn.Module) -> Float[Tensor, "P"]:
        """The parameters of `model` as one detached vector (a copy)."""
        return self.flatten([t.detach() for t in self.tensors(model)])

    def flatten(self, tensors: list[Tensor]) -> Float[Tensor, "P"]:
        """One vector from tensors of this space's shapes; half precision becomes float32."""
        vector = torch.cat([t.reshape(-1) for t in tensors])
        return vector.float() if vector.dtype in (torch.float16, torch.bfloat16) else vector

    def split(self, vector: Float[Tensor, "*k P"]) -> list[Tensor]:
        """Views of `vector`, one for each parameter, with this space's shapes; leading axes are kept."""
        parts = vector.split(self.sizes, dim=-1)
        return [part.reshape((*vector.shape[:-1], *shape)) for part, shape in zip(parts, self.shapes)]

    def union(self, other: ParameterSpace) -> ParameterSpace:
        """The smallest space that holds both, in the order of this one, then of what only `other` has."""
        theirs = dict(zip(other.names, other.shapes))
        shapes = {name: _larger(shape, theirs.pop(name, shape)) for name, shape in zip(self.names, self.shapes)}
        shapes |= theirs
        return ParameterSpace(tuple(shapes), tuple(shapes.values()))

    def rows(self, names: Iterable[str]) -> Int[Tensor, "r k"]:
        """For each row of these parameters, which have as many rows, the indices of its coordinates."""
        starts, shapes = dict(zip(self.names, _starts(self.sizes))), dict(zip(self.names, self.shapes))
        return torch.cat([
            starts[name] + torch.arange(math.prod(shapes[name])).view(shapes[name][0], -1) for name in names
        ], dim=1)  # fmt: skip

    def positions(self, inner: ParameterSpace) -> Int[Tensor, "Q"]:
        """For each coordinate of `inner`, which this space must hold, its index here."""
        starts = dict(zip(self.names, _starts(self.sizes)))
        shapes = dict(zip(self.names, self.shapes))
        return torch.cat([
            starts[name] + torch.arange(math.prod(shapes[name])).view(shapes[name])[_corner(shape)].reshape(-1)
            for name, shape in zip(inner.names, inner.shapes)
        ])

    def embedded(self, values: Float[Tensor, "*k Q"], inner: ParameterSpace) -> Float[Tensor, "*k P"]:
        """Vectors over `inner`, which this space must hold, in this space: zero in the coordinates that it lacks."""
        result = values.new_zeros(*values.shape[:-1], self.size)
        result[..., self.positions(inner).to(values.device)] = values
        return result


def _starts(sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _corner(shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(0, n) for n in shape)


def _larger(a: torch.Size, b: torch.Size) -> torch.Size:
    return torch.Size(max(m, n) for m, n in zip(a, b))


def _cut(name: str, parameter: Tensor | None, shape: torch.Size) -> Tensor:
    if parameter is None:
        raise ValueError(
            f"Parameter '{name}' of the anchored model is not in the model any more. A quadratic model needs the "
            "parameters it was estimated on: keep their names, or estimate it anew."
        )
    if parameter.shape == shape:
        return parameter
    if parameter.ndim != len(shape) or any(new < old for new, old in zip(parameter.shape, shape)):
        raise ValueError(
            f"Parameter '{name}' had shape {tuple(shape)} at the anchor and has {tuple(parameter.shape)} now. "
            "Parameters may grow by appending along an axis; estimate the quadratic model anew after other changes."
        )
    return parameter[_corner(shape)]
