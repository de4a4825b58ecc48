"""Symmetric matrices over the changes of one layer that are Kronecker products, and how sums of them are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import Pairs, spectrum
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.state import Storable
from avalanche_curv.core.structures.base import Matrix

Change = tuple[Float[Tensor, "out in"] | None, Float[Tensor, "out"] | None]
"""Of a layer's weight and of its bias, as far as they are trainable; in one matrix the bias is the last column."""


class KroneckerTerm(Storable, ABC):
    """A symmetric matrix over changes of one layer, [out, in] with the bias."""

    @abstractmethod
    def product(self, weight: Tensor | None, bias: Tensor | None) -> Change:
        """The matrix times a change, in memory of its own."""

    @abstractmethod
    def scaled(self, factor: float) -> KroneckerTerm:
        """factor times the matrix."""

    @abstractmethod
    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> KroneckerTerm:
        """The matrix over larger changes, in which those of this one stand at some rows and columns; zero elsewhere."""

    @abstractmethod
    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerTerm:
        """`function` of the eigenvalues."""

    @abstractmethod
    def eigen(self) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out out"], Float[Tensor, "in in"]]:
        """Λ, Q_G and Q_A: the eigenvalue Λ_ij belongs to the change q_i q_jᵀ."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "d d"]:
        """All entries, over changes in row-major order."""

    @abstractmethod
    def trace(self) -> float:
        """The sum of the eigenvalues."""

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""


@dataclass(frozen=True)
class Factors(KroneckerTerm):
    """W ↦ G W A."""

    a: Float[Tensor, "in in"]
    g: Float[Tensor, "out out"]

    def product(self, weight: Tensor | None, bias: Tensor | None) -> Change:
        turned = _times(weight, bias, self.a)
        return (
            None if weight is None else self.g @ turned[:, : weight.shape[1]],
            None if bias is None else self.g @ turned[:, -1],
        )

    def scaled(self, factor: float) -> Factors:
        return replace(self, g=self.g * factor)

    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> Factors:
        g, a = self.g.new_zeros(out, out), self.a.new_zeros(inputs, inputs)
        g[rows[:, None], rows], a[columns[:, None], columns] = self.g, self.a
        return Factors(a, g)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerTerm:
        values, g, a = self.eigen()
        return Corrected(function(values), g, a)

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        (of_g, g), (of_a, a) = (spectrum(factor) for factor in (self.g, self.a))
        return torch.outer(of_g, of_a).to(self.a), g.to(self.a), a.to(self.a)

    def dense(self) -> Tensor:
        return torch.kron(self.g, self.a)

    def trace(self) -> float:
        return float(self.a.double().trace() * self.g.double().trace())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.a, self.g


@dataclass(frozen=True)
class Corrected(KroneckerTerm):
    """W ↦ Q_G (Λ ∘ (Q_Gᵀ W Q_A)) Q_Aᵀ."""

    values: Float[Tensor, "out in"]
    g: Float[Tensor, "out out"]
    a: Float[Tensor, "in in"]

    def product(self, weight: Tensor | None, bias: Tensor | None) -> Change:
        turned = self.g @ (self.g.T @ _times(weight, bias, self.a)).mul_(self.values)
        return (
            None if weight is None else turned @ self.a[: weight.shape[1]].T,
            None if bias is None else turned @ self.a[-1],
        )

    def scaled(self, factor: float) -> Corrected:
        return replace(self, values=self.values * factor)

    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> Corrected:
        """Eigenvectors keep their number: only their entries get new places."""
        g, a = self.g.new_zeros(out, self.g.shape[1]), self.a.new_zeros(inputs, self.a.shape[1])
        g[rows], a[columns] = self.g, self.a
        return Corrected(self.values, g, a)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerTerm:
        return replace(self, values=function(self.values))

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.values, self.g, self.a

    def dense(self) -> Tensor:
        vectors = torch.kron(self.g, self.a)
        return (vectors * self.values.reshape(-1)) @ vectors.T

    def trace(self) -> float:
        return float(self.values.double().sum())

    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.g, self.a


class KroneckerSum(Storable, ABC):
    """How two Kronecker-factored matrices are added: a sum of products is no product."""

    grows: bool = False
    """Whether a sum takes more memory with every term."""

    @abstractmethod
    def of(self, terms: tuple[KroneckerTerm, ...]) -> tuple[KroneckerTerm, ...]:
        """The terms that stand for a sum of terms."""


@dataclass(frozen=True)
class KeepTerms(KroneckerSum):
    """Exact: one pair of factors for each summand, so that memory and step time grow with their number."""

    grows = True

    def of(self, terms: tuple[KroneckerTerm, ...]) -> tuple[KroneckerTerm, ...]:
        return terms


@dataclass(frozen=True)
class PiWeighted(KroneckerSum):
    """One pair of factors, around the minimum of the exact sum: A₁⊗G₁ + A₂⊗G₂ ≈ c (A₁ + π A₂) ⊗ (G₁ + G₂ / π).

    π = √(tr A₁ tr G₂ / (tr A₂ tr G₁)) minimises the bound on the cross terms (Martens & Grosse 2015, section 6.3); c
    keeps the trace of the sum, which the cross terms would double for equal summands.
    """

    def of(self, terms: tuple[KroneckerTerm, ...]) -> tuple[KroneckerTerm, ...]:
        return terms if len(terms) == 1 else (reduce(_pi_weighted, terms),)


def _times(weight: Tensor | None, bias: Tensor | None, matrix: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
    """[W, b] M, without putting the two together."""
    if weight is None:
        return torch.outer(bias, matrix[0]) if bias is not None else matrix[:0]
    if bias is None:
        return weight @ matrix
    return torch.addmm(torch.outer(bias, matrix[-1]), weight, matrix[:-1])


def _pi_weighted(first: KroneckerTerm, second: KroneckerTerm) -> KroneckerTerm:
    if not (isinstance(first, Factors) and isinstance(second, Factors)):
        raise TypeError("Only plain Kronecker factors can be merged; keep the terms with Kronecker(KeepTerms()).")
    one, two = first.trace(), second.trace()
    if one == 0 or two == 0:
        return second if one == 0 else first
    ratio = (first.a.trace() * second.g.trace() / (second.a.trace() * first.g.trace())).sqrt()
    merged = Factors(first.a + ratio * second.a, first.g + second.g / ratio)
    return merged.scaled((one + two) / merged.trace())


@dataclass(frozen=True)
class FactoredLayer(Storable):
    """The names of a layer's weight and bias, as far as they are trainable, and the terms of its curvature. A weight
    that is held `transposed` is [in, out]."""

    weight: str | None
    bias: str | None
    terms: tuple[KroneckerTerm, ...]
    transposed: bool = False

    def product(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Σ_j G_j W A_j in the shapes of the parameters."""
        weight = None if self.weight is None else self.matrix(parts[self.weight])
        bias = None if self.bias is None else parts[self.bias]
        total: dict[str, Tensor] = {}
        for term in self.terms:
            for name, part in zip((self.weight, self.bias), term.product(weight, bias)):
                if name is not None and part is not None:
                    total[name] = total[name].add_(part) if name in total else part
        if self.transposed and self.weight is not None:
            total[self.weight] = total[self.weight].T.contiguous()
        return {name: part.view(parts[name].shape) for name, part in total.items()}

    def matrix(self, weight: Tensor) -> Float[Tensor, "out in"]:
        """A weight, or any tensor in its place, as one matrix."""
        return weight.T if self.transposed else weight.flatten(1)

    def places(self, parts: dict[str, Tensor]) -> Float[Tensor, "out in"]:
        """The change as one matrix."""
        weight = [] if self.weight is None else [self.matrix(parts[self.weight])]
        bias = [] if self.bias is None else [parts[self.bias][:, None]]
        return torch.cat(weight + bias, dim=1)

    def each(self, function: Callable[[KroneckerTerm], KroneckerTerm]) -> FactoredLayer:
        """`function` of every term."""
        return replace(self, terms=tuple(function(term) for term in self.terms))


@dataclass(frozen=True)
class KroneckerMatrix(Matrix):
    """C = diag(d) + Σ_j A_j ⊗ G_j over the parameters of some layers, whose entries of d are zero."""

    space: ParameterSpace
    layers: tuple[FactoredLayer, ...]
    diagonal: Float[Tensor, "P"]
    sums: KroneckerSum = KeepTerms()

    @property
    def size(self) -> int:
        return self.space.size

    def product(self, vector: Tensor) -> Tensor:
        return self.space.flatten(self.products(vector, self.space))

    def products(self, vector: Tensor, space: ParameterSpace) -> list[Tensor]:
        parts = self._parts(vector)
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            for name, part in layer.product(parts).items():
                found[name] = found[name].add_(part) if name in found else part
        if self._has_diagonal:
            for name, diagonal in self._parts(self.diagonal).items():
                found[name] = found[name].addcmul_(diagonal, parts[name]) if name in found else diagonal * parts[name]
        return [found[name] if name in found else torch.zeros_like(part) for name, part in parts.items()]

    def plus(self, other: Matrix) -> KroneckerMatrix:
        if not isinstance(other, KroneckerMatrix) or self.space != other.space:
            raise TypeError(f"A Kronecker matrix can be added to one of the same space; got {type(other).__name__}.")
        layers: dict[tuple[str | None, str | None], FactoredLayer] = {}
        for layer in (*self.layers, *other.layers):
            key = layer.weight, layer.bias
            layers[key] = replace(layer, terms=(*layers[key].terms, *layer.terms)) if key in layers else layer
        return replace(self, layers=tuple(layers.values()), diagonal=self.diagonal + other.diagonal)

    def compressed(self) -> KroneckerMatrix:
        if all(self.sums.of(layer.terms) is layer.terms for layer in self.layers):
            return self
        return replace(self, layers=tuple(replace(layer, terms=self.sums.of(layer.terms)) for layer in self.layers))

    def scaled(self, factor: float) -> KroneckerMatrix:
        layers = tuple(layer.each(lambda term: term.scaled(factor)) for layer in self.layers)
        return replace(self, layers=layers, diagonal=self.diagonal * factor)

    def embedded(self, inner: ParameterSpace, outer: ParameterSpace) -> KroneckerMatrix:
        diagonal = self.diagonal.new_zeros(outer.size)
        diagonal[outer.positions(inner).to(diagonal.device)] = self.diagonal
        old, new = dict(zip(inner.names, inner.shapes)), dict(zip(outer.names, outer.shapes))

        def place(layer: FactoredLayer) -> FactoredLayer:
            rows, columns, out, inputs = _places(layer, old, new)
            rows, columns = rows.to(diagonal.device), columns.to(diagonal.device)
            return layer.each(lambda term: term.placed(rows, columns, out, inputs))

        return KroneckerMatrix(outer, tuple(place(layer) for layer in self.layers), diagonal, self.sums)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> KroneckerMatrix:
        if any(len(layer.terms) > 1 for layer in self.layers):
            raise TypeError("The eigenvalues of a sum of Kronecker products are not at hand.")
        layers = tuple(layer.each(lambda term: term.map_spectrum(function)) for layer in self.layers)
        return replace(self, layers=layers, diagonal=function(self.diagonal))

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
        """From the factors' eigenvectors where each layer has one term and lies outside the diagonal."""
        places = [self._where(layer) for layer in self.layers]
        if any(len(layer.terms) > 1 or self.diagonal[at].any() for layer, at in zip(self.layers, places)):
            return super().top(count)
        found = []
        for layer, at in zip(self.layers, places):
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
        return layer.places(self._parts(torch.arange(self.size, device=self.diagonal.device)))


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
