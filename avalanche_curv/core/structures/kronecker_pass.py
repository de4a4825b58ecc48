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
from avalanche_curv.core.structures.kronecker_terms import KroneckerTerm, in_rows, whole


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

    It is for plain parameters of the type and on the device of the anchor.
    """

    def __init__(
        self,
        space: ParameterSpace,
        layers: Sequence[FactoredLayer],
        diagonal: Sequence[Tensor] | None,
        anchor: Float[Tensor, "P"],
        slope: Float[Tensor, "P"] | None = None,
    ) -> None:
        super().__init__(anchor, space.shapes)
        self.space, self.anchors = space, space.split(self.anchor)
        self.slopes = None if slope is None else space.split(slope)
        parts, self.places = dict(zip(space.names, self.anchors)), {name: list[Tensor]() for name in space.names}
        slopes, self._beside = dict(zip(space.names, self.slopes or ())), list[tuple[Tensor, Tensor]]()
        self.layers, self.diagonal = [], diagonal
        for layer in layers:
            change, views = layer.room(parts)
            widths = [view.numel() // len(change) for view in views.values()]
            self.layers.append((layer, [term.adder(change, widths) for term in layer.terms]))
            for name, view in views.items():
                self.places[name].append(view)
            if slopes:
                sloped, own = layer.room(parts)
                for name in own.keys() & slopes.keys():
                    own[name].copy_(slopes.pop(name))
                self._beside.append((whole(change), whole(sloped)))
        for name, places in self.places.items():
            if not places:
                places.append(torch.zeros_like(parts[name]))
        self._beside += [(self.places[name][0].reshape(-1), part.reshape(-1)) for name, part in slopes.items()]

    def add_product(self, change: Sequence[Tensor], to: Sequence[Tensor]) -> Tensor:
        """Adds C δ to tensors in the shapes of the parameters, and returns δᵀCδ, for δ in these shapes."""
        for places, part in zip(self.places.values(), change):
            for place in places:
                place.copy_(part)
        return self._summed(to)

    def _is_usable(self) -> bool:
        return True

    def _written(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], adds: bool) -> Tensor:
        for places, parameter, anchor in zip(self.places.values(), parameters, self.anchors):
            for place in places:
                torch.sub(parameter, anchor, out=place)
        if self.slopes is not None:
            (torch._foreach_add_ if adds else torch._foreach_copy_)([*gradients], self.slopes)
        elif not adds:
            torch._foreach_zero_([*gradients])
        form = self._summed(gradients)
        return form + 2 * sum(change @ slope for change, slope in self._beside) if self._beside else form

    def _summed(self, to: Sequence[Tensor]) -> Tensor:
        by_name, forms = dict(zip(self.space.names, to)), []
        for layer, adders in self.layers:
            columns = layer.columns(by_name)
            forms += [add(columns) for add in adders]
        if self.diagonal is not None:
            pulls = [entries * places[0] for entries, places in zip(self.diagonal, self.places.values())]
            torch._foreach_add_([*to], pulls)
            forms.append(self._with(pulls))
        return sum(forms[1:], forms[0])

    def _with(self, vector: Sequence[Tensor]) -> Tensor:
        """The inner product of δ with a vector in the shapes of the parameters."""
        pairs = zip(vector, self.places.values())
        return torch.stack([(part * places[0]).sum() for part, places in pairs]).sum()
