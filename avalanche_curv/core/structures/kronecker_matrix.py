"""The curvature of all layers of a model, each a sum of Kronecker products, beside a diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs, relative_eigenvalues
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix
from avalanche_curv.core.structures.cuts import Cut
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.kronecker_cut import leading_part
from avalanche_curv.core.structures.kronecker_pass import FactoredLayer, KroneckerPass
from avalanche_curv.core.structures.kronecker_sums import KeepTerms, KroneckerSum


@dataclass(frozen=True)
class KroneckerMatrix(Matrix):
    """C = diag(d) + Σ_j A_j ⊗ G_j over the parameters of some layers, whose entries of d are zero."""

    space: ParameterSpace
    layers: tuple[FactoredLayer, ...]
    diagonal: Float[Tensor, "P"]
    sums: KroneckerSum = KeepTerms()  # noqa: RUF009  a frozen value
    cut: Cut | None = None

    @property
    def size(self) -> int:
        return self.space.size

    def product(self, vector: Tensor) -> Tensor:
        return self.space.flatten(self.products(vector, self.space))

    def products(self, vector: Tensor, space: ParameterSpace) -> list[Tensor]:
        parts = space.split(vector)
        found = [torch.zeros_like(part) for part in parts]
        self._pass(vector).add_product(parts, found)
        return found

    def gradient_pass(self, anchor: Tensor, slope: Tensor | None) -> KroneckerPass:
        return self._pass(anchor, slope)

    def _pass(self, anchor: Tensor, slope: Tensor | None = None) -> KroneckerPass:
        diagonal = self.diagonal if self._has_diagonal else None
        return KroneckerPass(self.space, self.layers, diagonal, anchor, slope)

    def plus(self, other: Matrix) -> KroneckerMatrix:
        if not isinstance(other, KroneckerMatrix) or self.space != other.space:
            raise TypeError(f"A Kronecker matrix can be added to one of the same space; got {type(other).__name__}.")
        layers: dict[tuple[str | None, str | None], FactoredLayer] = {}
        for layer in (*self.layers, *other.layers):
            key = layer.weight, layer.bias
            layers[key] = replace(layer, terms=(*layers[key].terms, *layer.terms)) if key in layers else layer
        return replace(self, layers=tuple(layers.values()), diagonal=self.diagonal + other.diagonal)

    def compressed(self) -> KroneckerMatrix:
        """With the terms that stand for those of each layer, and these cut."""
        layers = tuple(self._compressed(layer) for layer in self.layers)
        return self if all(a is b for a, b in zip(layers, self.layers)) else replace(self, layers=layers)

    def _compressed(self, layer: FactoredLayer) -> FactoredLayer:
        terms = self.sums.of(layer.terms)
        if self.cut is not None:
            terms = tuple(leading_part(term, self.cut) for term in terms)
        same = len(terms) == len(layer.terms) and all(a is b for a, b in zip(terms, layer.terms))
        return layer if same else replace(layer, terms=terms)

    @property
    def keeps_range(self) -> bool:  # type: ignore[override]
        """As its sums do."""
        return self.sums.keeps_range

    def scaled(self, factor: float) -> KroneckerMatrix:
        layers = tuple(layer.each(lambda term: term.scaled(factor)) for layer in self.layers)
        return replace(self, layers=layers, diagonal=self.diagonal * factor)

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> KroneckerMatrix:
        diagonal = outer.embedded(self.diagonal, inner)
        old, new = dict(zip(inner.names, inner.shapes)), dict(zip(outer.names, outer.shapes))

        def place(layer: FactoredLayer) -> FactoredLayer:
            rows, columns, out, inputs = _places(layer, old, new)
            rows, columns = rows.to(diagonal.device), columns.to(diagonal.device)
            return layer.each(lambda term: term.placed(rows, columns, out, inputs))

        layers = tuple(place(layer) for layer in self.layers)
        return KroneckerMatrix(outer, layers, diagonal, self.sums, self.cut)

    def grown(self, inner: ParameterSpace, outer: ParameterSpace, outputs: tuple[str, ...]) -> KroneckerMatrix:
        for layer in self.layers:
            parts = {layer.weight, layer.bias} - {None}
            if missing := parts - {*outputs} if parts & {*outputs} else set():
                raise ValueError(f"Weight and bias of a head grow together: outputs={outputs} lacks {missing.pop()!r}.")
        whole, known = self.embedded(inner, outer), len(inner.rows(outputs))
        layers = tuple(
            layer.each(lambda term: term.grown(known)) if {layer.weight, layer.bias} & {*outputs} else layer
            for layer in whole.layers
        )
        diagonal = DiagonalMatrix(self.diagonal).grown(inner, outer, outputs).values  # zero where a layer is factored
        return replace(whole, layers=layers, diagonal=diagonal)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerMatrix:
        if any(len(layer.terms) > 1 for layer in self.layers):
            raise TypeError("The eigenvalues of a sum of Kronecker products are not at hand.")
        layers = tuple(layer.each(lambda term: term.map_spectrum(function)) for layer in self.layers)
        return replace(self, layers=layers, diagonal=function(self.diagonal))

    def relative_to(self, past: Matrix, rounding: float) -> Tensor | None:
        """Where every layer of both is a Kronecker product: G v = β G'v and A u = α A'u give μ = αβ of the change v uᵀ.
        On the range of C alone: the Schur complement of a Kronecker product is none."""
        if not isinstance(past, KroneckerMatrix) or not (self._is_one_product and past._is_one_product):
            return None
        own = {(layer.weight, layer.bias): layer.terms[0].factors() for layer in self.layers}
        seen = past.diagonal > 0
        found = [self.diagonal[seen].double() / past.diagonal[seen].double()]
        for layer in past.layers:
            if (layer.weight, layer.bias) not in own:
                return None
            new, old = own[layer.weight, layer.bias], layer.terms[0].factors()
            g, a = (
                relative_eigenvalues(*pair, rounding, schur=False) for pair in ((new.g, old.g), (new.a, old.a))
            )
            found.append(torch.outer(g, a).reshape(-1))
        return torch.cat(found)

    @property
    def _is_one_product(self) -> bool:
        return self.is_decomposed and all(layer.terms[0].is_product for layer in self.layers)

    @property
    def is_decomposed(self) -> bool:  # type: ignore[override]
        """Where each layer has one term, and lies outside of the diagonal and of the other layers."""
        names = [name for layer in self.layers for name in (layer.weight, layer.bias) if name is not None]
        apart = len(names) == len({*names}) and all(len(layer.terms) == 1 for layer in self.layers)
        return apart and not any(self.diagonal[self._where(layer)].any() for layer in self.layers)

    def dense(self) -> Tensor:
        whole = self.diagonal.diag()
        for layer in self.layers:
            where = self._where(layer).reshape(-1)
            for term in layer.terms:
                whole[where[:, None], where] += term.dense()
        return whole

    def trace(self) -> float:
        terms = (term for layer in self.layers for term in layer.terms)
        return float(self.diagonal.double().sum()) + sum(term.trace() for term in terms)

    def top(self, count: int) -> Pairs:
        """From the factors' eigenvectors where these are those of C."""
        if not self.is_decomposed:
            return super().top(count)
        found = []
        for layer in self.layers:
            at = self._where(layer)
            values, g, a = layer.terms[0].eigen()
            for index in values.reshape(-1).abs().argsort(descending=True)[:count]:
                row, column = divmod(int(index), values.shape[1])
                found.append((values[row, column], at, torch.outer(g[:, row], a[:, column])))
        for index in self.diagonal.abs().argsort(descending=True)[:count]:
            found.append((self.diagonal[index], index, self.diagonal.new_ones(())))
        found = sorted(found, key=lambda pair: -abs(float(pair[0])))[:count]
        vectors = self.diagonal.new_zeros(len(found), self.size)
        for vector, (_, at, entries) in zip(vectors, found):
            vector[at] = entries
        return torch.stack([value for value, _, _ in found]), vectors

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.diagonal, *(t for layer in self.layers for term in layer.terms for t in term.tensors()))

    @cached_property
    def _has_diagonal(self) -> bool:
        return bool(self.diagonal.any())

    def _parts(self, vector: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.space.names, self.space.split(vector)))

    def _where(self, layer: FactoredLayer) -> Tensor:
        """The coordinates [out, in] of a layer's change."""
        numbers = torch.arange(self.size, device=self.diagonal.device)
        return torch.cat(layer.columns(self._parts(numbers)), dim=1)


def _places(
    layer: FactoredLayer, old: dict[str, torch.Size], new: dict[str, torch.Size]
) -> tuple[Tensor, Tensor, int, int]:
    """The rows and columns of a layer's old change in its new one, and the shape of the new one."""
    out, columns, inputs = 0, [], 0
    if layer.weight is not None:
        was, (out, *rest) = old[layer.weight], new[layer.weight]
        if layer.transposed:
            was, (out, *rest) = was[::-1], new[layer.weight][::-1]
        inputs = math.prod(rest)
        columns.append(torch.arange(inputs).view(rest)[tuple(slice(0, n) for n in was[1:])].reshape(-1))
        rows = was[0]
    if layer.bias is not None:
        rows, out = old[layer.bias][0], new[layer.bias][0]
        columns.append(torch.tensor([inputs]))
        inputs += 1
    return torch.arange(rows), torch.cat(columns), out, inputs
