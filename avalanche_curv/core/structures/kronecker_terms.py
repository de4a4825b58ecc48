"""Symmetric matrices over the changes of one layer that are Kronecker products, and how sums of them are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import spectrum

Change = tuple[Float[Tensor, "out in"] | None, Float[Tensor, "out"] | None]
"""Of a layer's weight and of its bias, as far as they are trainable; in one matrix the bias is the last column."""


class Term(ABC):
    """A symmetric matrix over changes of one layer, [out, in] with the bias."""

    @abstractmethod
    def product(self, weight: Tensor | None, bias: Tensor | None) -> Change:
        """The matrix times a change, in memory of its own."""

    @abstractmethod
    def scaled(self, factor: float) -> Term:
        """factor times the matrix."""

    @abstractmethod
    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> Term:
        """The same over larger changes, in which its own stand at some rows and columns."""

    @abstractmethod
    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Term:
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
class Factors(Term):
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

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Term:
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
class Corrected(Term):
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

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> Term:
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


class Sum(ABC):
    """How two Kronecker-factored matrices are added: a sum of products is no product."""

    @abstractmethod
    def of(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """The terms that stand for a sum of terms."""


@dataclass(frozen=True)
class KeepTerms(Sum):
    """Exact: one pair of factors for each summand, so that memory and step time grow with their number."""

    def of(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return terms


@dataclass(frozen=True)
class PiWeighted(Sum):
    """One pair of factors, around the minimum of the exact sum: A₁⊗G₁ + A₂⊗G₂ ≈ c (A₁ + π A₂) ⊗ (G₁ + G₂ / π).

    π = √(tr A₁ tr G₂ / (tr A₂ tr G₁)) minimises the bound on the cross terms (Martens & Grosse 2015, section 6.3); c
    keeps the trace of the sum, which the cross terms would double for equal summands.
    """

    def of(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        return terms if len(terms) == 1 else (reduce(_pi_weighted, terms),)


def _times(weight: Tensor | None, bias: Tensor | None, matrix: Float[Tensor, "in k"]) -> Float[Tensor, "out k"]:
    """[W, b] M, without putting the two together."""
    if weight is None:
        return torch.outer(bias, matrix[0]) if bias is not None else matrix[:0]
    if bias is None:
        return weight @ matrix
    return torch.addmm(torch.outer(bias, matrix[-1]), weight, matrix[:-1])


def _pi_weighted(first: Term, second: Term) -> Term:
    if not (isinstance(first, Factors) and isinstance(second, Factors)):
        raise TypeError("Only plain Kronecker factors can be merged; keep the terms with Kronecker(KeepTerms()).")
    one, two = first.trace(), second.trace()
    if one == 0 or two == 0:
        return second if one == 0 else first
    ratio = (first.a.trace() * second.g.trace() / (second.a.trace() * first.g.trace())).sqrt()
    merged = Factors(first.a + ratio * second.a, first.g + second.g / ratio)
    return merged.scaled((one + two) / merged.trace())
