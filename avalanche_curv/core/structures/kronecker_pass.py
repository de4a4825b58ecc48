"""The gradient of a penalty by Kronecker products, in memory that is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.state import Storable
from avalanche_curv.core.structures.gradient_pass import GradientPass
from avalanche_curv.core.structures.kronecker_terms import Adder, KroneckerTerm, in_rows, whole
from avalanche_curv.core.structures.one_pass import OnePass


@dataclass(frozen=True)
class FactoredLayer(Storable):
    """The names of a layer's weight and bias, as far as they are trainable, and the terms of its curvature. A weight
    that is held `transposed` is [in, out]."""

    weight: str | None
    bias: str | None
    terms: tuple[KroneckerTerm, ...]
    transposed: bool = False

    @property
    def names(self) -> list[str]:
        """Of the weight and the bias, as far as they are trainable."""
        return [name for name in (self.weight, self.bias) if name is not None]

    def columns(self, parts: Mapping[str, Tensor]) -> list[Float[Tensor, "out n"]]:
        """The weight as one matrix and the bias as one column, as views of tensors in the shapes of the parameters."""
        return [self._matrix(parts[name]) if name == self.weight else parts[name][:, None] for name in self.names]

    def room(self, parts: Mapping[str, Tensor]) -> tuple[Float[Tensor, "out in"], dict[str, Tensor]]:
        """Memory for a change as one matrix, and views of it in the shapes of these parts of it, by name."""
        columns = self.columns(parts)
        widths = [part.shape[1] for part in columns]
        whole, views = in_rows(len(columns[0]), sum(widths), columns[0]), {}
        for name, start, width in zip(self.names, (0, widths[0]), widths):
            view = whole[:, start : start + width]
            views[name] = view.T if self.transposed and name == self.weight else view.view(parts[name].shape)
        return whole, views

    def each(self, function: Callable[[KroneckerTerm], KroneckerTerm]) -> FactoredLayer:
        """`function` of every term."""
        return replace(self, terms=tuple(function(term) for term in self.terms))

    def _matrix(self, weight: Tensor) -> Float[Tensor, "out in"]:
        return weight.T if self.transposed else weight.flatten(1)


class KroneckerPass(GradientPass[Tensor]):
    """g + C δ for C = diag(d) + Σ_j A_j ⊗ G_j and δ = θ − a, by itself or added to gradients. The change of each layer
    stands in one matrix with its bias, and so does its pull g + C δ. All memory that products write to is made once: in
    fresh memory, and with some thirty operations for each layer, a product of cut factors takes half as long again as
    its multiplications. What takes no product of matrices, the slope g, d and the levels of cut factors, is one pass
    over memory where it can be (`OnePass`).

    It is for plain parameters of the type and on the device of the anchor.
    """

    def __init__(
        self,
        space: ParameterSpace,
        layers: Sequence[FactoredLayer],
        diagonal: Float[Tensor, "P"] | None,
        anchor: Float[Tensor, "P"],
        slope: Float[Tensor, "P"] | None = None,
    ) -> None:
        super().__init__(anchor, space.shapes)
        self.anchors = space.split(self.anchor)
        self.slopes, self.diagonal = (None if part is None else space.split(part) for part in (slope, diagonal))
        parts, self._adders, self._wholes = dict(zip(space.names, self.anchors)), list[Adder](), list[list[Tensor]]()
        places, levels = {name: list[list[Tensor]]() for name in space.names}, dict.fromkeys(space.names, 0.0)
        for layer in layers:
            (change, changes), (pull, pulls) = layer.room(parts), layer.room(parts)
            self._adders += [term.adder(change, pull) for term in layer.terms]
            self._wholes.append([whole(change), whole(pull)])
            for name in changes:
                places[name].append([changes[name], pulls[name]])
                levels[name] += sum(term.level for term in layer.terms)
        for name in (name for name, found in places.items() if not found):
            places[name].append([torch.zeros_like(parts[name]) for _ in range(2)])
            self._wholes.append([part.reshape(-1) for part in places[name][0]])
        self._changes, self._pulls = (list(some) for some in zip(*(found[0] for found in places.values())))
        numbered = enumerate(places.values())
        self._further = [(n, change, pull) for n, found in numbered for change, pull in found[1:]]
        self._levels, self._one_pass = [*levels.values()], None
        if not self._further:  # each parameter is in one layer
            self._one_pass = OnePass(
                anchor, diagonal, space.shapes, slope, levels=self._levels, places=self._changes
            )

    def add_product(self, change: Sequence[Tensor], to: Sequence[Tensor]) -> None:
        """Adds C δ to tensors in the shapes of the parameters, for δ in these shapes."""
        torch._foreach_copy_(self._changes, [*change])
        self._pull(None)
        self._hand_over(torch._foreach_add_, to)

    def _is_usable(self) -> bool:
        return True

    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> Tensor:
        if self._one_pass is not None and self._one_pass._is_usable():
            sloped: Tensor | float = self._one_pass._written(self._pulls, parameters, False)
            self._multiply()
        else:
            for change, parameter, anchor in zip(self._changes, parameters, self.anchors):
                torch.sub(parameter, anchor, out=change)
            sloped = self._pull(self.slopes)
        self._hand_over(torch._foreach_add_ if adds else torch._foreach_copy_, gradients)
        return torch.stack([change @ pull for change, pull in self._wholes]).sum() + sloped

    def _pull(self, slopes: Sequence[Tensor] | None) -> Tensor | float:
        """Makes the pulls of the changes, and returns slopeᵀδ."""
        for change, pull, level in zip(self._changes, self._pulls, self._levels):
            torch.mul(change, level, out=pull)
        if self.diagonal is not None:
            torch._foreach_addcmul_(self._pulls, self._changes, self.diagonal)
        sloped: Tensor | float = 0.0
        if slopes is not None:
            torch._foreach_add_(self._pulls, [*slopes])
            sloped = torch.stack([(change * slope).sum() for change, slope in zip(self._changes, slopes)]).sum()
        for number, change, pull in self._further:
            change.copy_(self._changes[number])
            pull.zero_()
        self._multiply()
        return sloped

    def _multiply(self) -> None:
        for add in self._adders:
            add()

    def _hand_over(self, how: Callable[[list[Tensor], list[Tensor]], object], to: Sequence[Tensor]) -> None:
        """Pulls to tensors in the shapes of the parameters."""
        how([*to], self._pulls)
        for number, _, pull in self._further:
            to[number].add_(pull)
