"""How Kronecker-factored matrices are added: a sum of products is no product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.eigen import spectrum
from avalanche_curv.core.options import check_count, check_kind, optional, settle
from avalanche_curv.core.state import Storable
from avalanche_curv.core.structures.kronecker_terms import Corrected, Factors, KroneckerTerm, without_rounding

Weights = tuple[Float[Tensor, "n"], Float[Tensor, "n"]]


class KroneckerSum(Storable, ABC):
    """Which terms stand for the sum of the terms of one layer."""

    grows: bool = False
    """Whether a sum takes more memory with every term."""

    keeps_range: bool = True
    """Whether what stands for a sum of positive semi-definite terms reaches, in its range, all that the sum reaches."""

    @abstractmethod
    def of(self, terms: tuple[KroneckerTerm, ...]) -> tuple[KroneckerTerm, ...]:
        """The terms that stand for a sum of terms, oldest first, with the same trace."""


class OnePair(KroneckerSum):
    """One term in the place of all, so that memory and step time stay those of the first:
    S = Σ_i A_i ⊗ G_i ≈ c A ⊗ G with A = Σ_i x_i A_i, G = Σ_i y_i G_i and weights x, y ≥ 0; c keeps the trace.

    The pair of positive semi-definite terms is positive semi-definite, and that of multiples of one term is exact. For
    terms with corrected eigenvalues (`EKFAC`) the pair, then of their partial traces, gives the eigenvectors Q alone,
    and the eigenvalues are exact: Λ = diag(Qᵀ S Q).
    """

    def of(self, terms: tuple[KroneckerTerm, ...]) -> tuple[KroneckerTerm, ...]:
        known = [term for term in terms if term.trace() != 0]
        if len(terms) == 1 or not known:
            return terms[:1]
        return tuple(known) if len(known) == 1 else (self._merged(known),)

    @abstractmethod
    def weights(self, pairs: list[Factors]) -> Weights:
        """x and y [n], up to a factor."""

    def _merged(self, terms: list[KroneckerTerm]) -> KroneckerTerm:
        pairs = [term.factors() for term in terms]
        x, y = (w / w.mean() for w in self.weights(pairs))
        a, g = _weighted(x, [pair.a for pair in pairs]), _weighted(y, [pair.g for pair in pairs])
        merged = Factors(a, g, any(term.spans for term in terms))
        if all(term.is_product for term in terms):
            return merged.scaled(sum(term.trace() for term in terms) / merged.trace())
        _, q_g, q_a = merged.eigen()
        diagonals = [term.diagonal_in(q_g, q_a) for term in terms]
        values = without_rounding(_weighted(torch.ones(len(terms)), diagonals))
        return Corrected(values, q_g, q_a, spans=merged.spans)


@dataclass(frozen=True)
class PartialTraces(OnePair):
    """The pair of the partial traces of S: x_i = tr G_i and y_i = tr A_i, so that A = Σ_i tr(G_i) A_i, c = 1 / tr S.

    The pair has the partial traces of S, so that terms that are merged one by one give what all of them give at once,
    each by its trace. Among products it is the one nearest to S / tr S in relative entropy, as the product of the
    marginals is to a joint distribution. With t_i = tr A_i tr G_i, no term holds a direction by less than t_i / tr S of
    its curvature there: the cross terms are positive semi-definite.
    """

    def weights(self, pairs: list[Factors]) -> Weights:
        x, y = (torch.stack([side.double().trace() for side in sides]) for sides in zip(*((p.g, p.a) for p in pairs)))
        return x, y


@dataclass(frozen=True)
class PiWeighted(OnePair):
    """The pair of the least trace before c: x_i = √(tr G_i / tr A_i) and y_i = 1 / x_i (Martens & Grosse 2015,
    arXiv:1503.05671, section 6.3, there for two terms).

    With x_i y_i = 1 the trace of a pair is that of S and of cross terms Σ_{i≠j} x_i y_j tr A_i tr G_j, which is least
    for these weights: (Σ_i √t_i)² in all, of the traces t_i of the terms. So c = Σ_i t_i / (Σ_i √t_i)² ≥ 1 / n, and as
    the cross terms are positive semi-definite, c A ⊗ G ⪰ c S: no direction is held by less than c times its curvature.

    Terms that are merged one by one do not weigh alike: as the k-th of terms of one trace the newest has the weight
    1 / (1 + √(k − 1)) in each factor instead of 1 / k, and what came long before fades. `PartialTraces` weighs alike.
    """

    def weights(self, pairs: list[Factors]) -> Weights:
        x = torch.stack([(pair.g.double().trace() / pair.a.double().trace()).sqrt() for pair in pairs])
        return x, 1 / x


@dataclass(frozen=True)
class FrobeniusOptimal(OnePair):
    """The pair nearest to S in the Frobenius norm, up to the factor c: the first singular vectors Σ x_i vec A_i and
    Σ y_i vec G_i of the rearranged sum Σ_i vec(A_i) vec(G_i)ᵀ (Van Loan & Pitsianis 1993).

    With the Gram matrices K_A = [⟨A_i, A_j⟩] and K_G = [⟨G_i, G_j⟩], n × n, x is the first eigenvector of K_G K_A and
    y = K_A x. Entries of Gram matrices of positive semi-definite matrices are ≥ 0, and so are those of x and y (Perron
    and Frobenius). Terms whose factors lie apart from those of the larger ones get small weights, at the worst zero.
    """

    keeps_range = False

    def weights(self, pairs: list[Factors]) -> Weights:
        k_a, k_g = (_gram([getattr(pair, side) for pair in pairs]) for side in "ag")
        values, vectors = spectrum(k_a)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        x = (k_g @ root @ spectrum(root @ k_g @ root)[1][:, -1]).abs()
        return x, k_a @ x


def _weighted(weights: Float[Tensor, "n"], parts: list[Tensor]) -> Tensor:
    return sum((float(w) * part for w, part in zip(weights, parts)), torch.zeros_like(parts[0]))


def _gram(factors: list[Tensor]) -> Float[Tensor, "n n"]:
    rows = torch.stack([factor.reshape(-1) for factor in factors]).double()
    return rows @ rows.T


@dataclass(frozen=True)
class KeepTerms(KroneckerSum):
    """All terms: exact, and memory and step time grow with their number, or up to `most` terms, of which the first is
    the oldest ones `merged`.

    >>> KeepTerms(most=3).grows
    False
    """

    most: int | None = None
    merged: OnePair = PartialTraces()

    def __post_init__(self) -> None:
        settle(self, most=optional(partial(check_count, hint="For one pair take sums=PartialTraces().")))
        check_kind("merged", self.merged, OnePair, "PartialTraces()")
        if self.most == 1:
            raise ValueError(f"KeepTerms(most=...) must be at least 2; got 1. For one pair take sums={self.merged!r}.")

    @property
    def grows(self) -> bool:  # type: ignore[override]
        """Unless `most` bounds the terms."""
        return self.most is None

    @property
    def keeps_range(self) -> bool:  # type: ignore[override]
        """As what is merged does."""
        return self.merged.keeps_range

    def of(self, terms: tuple[KroneckerTerm, ...]) -> tuple[KroneckerTerm, ...]:
        if self.most is None or len(terms) <= self.most:
            return terms
        oldest = len(terms) - self.most + 1
        return (*self.merged.of(terms[:oldest]), *terms[oldest:])
