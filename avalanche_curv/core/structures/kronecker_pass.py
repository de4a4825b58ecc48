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
from avalanche_curv.core.structures.kronecker_terms import Adder, KroneckerTerm, in_rows
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
    stands in one matrix with its bias, and all memory that products write to is made once: in fresh memory, and with
    some thirty operations for each layer, a product of cut factors takes half as long again as its multiplications.
    What takes no product of matrices, the slope g, d and the levels of cut factors, is one pass over memory where it
    can be (`OnePass`).

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
        self.space, self.anchors = space, space.split(self.anchor)
        self.slopes, self.diagonal = (None if part is None else space.split(part) for part in (slope, diagonal))
        parts, self._places = dict(zip(space.names, self.anchors)), {name: list[Tensor]() for name in space.names}
        self._layers, levels = list[tuple[FactoredLayer, list[Adder]]](), dict.fromkeys(space.names, 0.0)
        for layer in layers:
            change, views = layer.room(parts)
            widths = [view.numel() // len(change) for view in views.values()]
            self._layers.append((layer, [term.adder(change, widths) for term in layer.terms]))
            for name, view in views.items():
                self._places[name].append(view)
                levels[name] += sum(term.level for term in layer.terms)
        for name in (name for name, found in self._places.items() if not found):
            self._places[name].append(torch.zeros_like(parts[name]))
        self._changes = [found[0] for found in self._places.values()]  # δ in the shapes of the parameters
        self._levels = [*levels.values()] if any(levels.values()) else None
        self._sums, self._one_pass = list[Tensor](), None
        if self._levels or diagonal is not None or slope is not None:
            self._one_pass = OnePass(
                anchor, diagonal, space.shapes, slope, levels=self._levels or (), places=self._changes
            )

    def add_product(self, change: Sequence[Tensor], to: Sequence[Tensor]) -> None:
        """Adds C δ to tensors in the shapes of the parameters, for δ in these shapes."""
        for places, part in zip(self._places.values(), change):
            for place in places:
                place.copy_(part)
        self._beside(to, None)
        self._multiply(to)

    def _is_usable(self) -> bool:
        return True

    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> Tensor:
        summed = adds and self.slopes is not None  # g and C δ first, as where they are by themselves
        if summed and not self._sums:
            self._sums = [torch.empty_like(anchor) for anchor in self.anchors]
        to, onto = (self._sums, False) if summed else (gradients, adds)
        if self._one_pass is not None and self._is_single and self._one_pass._is_usable():
            form: Tensor | float = self._one_pass._written(to, parameters, onto)
        else:
            for places, parameter, anchor in zip(self._places.values(), parameters, self.anchors):
                for place in places:
                    torch.sub(parameter, anchor, out=place)
            if not onto:
                torch._foreach_zero_([*to])
            form = self._beside(to, self.slopes)
        form = self._multiply(to) + form
        if summed:
            torch._foreach_add_([*gradients], self._sums)
        return form

    @property
    def _is_single(self) -> bool:
        """Whether each parameter is in one layer."""
        return all(len(places) == 1 for places in self._places.values())

    def _multiply(self, to: Sequence[Tensor]) -> Tensor:
        """Adds what takes products of matrices."""
        by_name = dict(zip(self.space.names, to))
        forms = [add(layer.columns(by_name)) for layer, adders in self._layers for add in adders]
        return torch.stack(forms).sum() if forms else self.anchor.new_zeros(())

    def _beside(self, to: Sequence[Tensor], slopes: Sequence[Tensor] | None) -> Tensor | float:
        """Adds what takes none."""
        form: Tensor | float = 0.0
        if self._levels or self.diagonal is not None:
            pulls = torch._foreach_mul(self._changes, self._levels or [0.0] * len(self._changes))
            if self.diagonal is not None:
                torch._foreach_addcmul_(pulls, self._changes, self.diagonal)
            torch._foreach_add_([*to], pulls)
            form = self._with(pulls)
        if slopes is not None:
            torch._foreach_add_([*to], [*slopes])
            form = form + 2 * self._with(slopes)
        return form

    def _with(self, vector: Sequence[Tensor]) -> Tensor:
        """The inner product of δ with a vector in the shapes of the parameters."""
        return torch.stack([(part * change).sum() for part, change in zip(vector, self._changes)]).sum()
