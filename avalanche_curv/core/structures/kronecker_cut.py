"""Kronecker terms of which the leading eigenvectors are kept, and the mean of all other eigenvalues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.structures.cuts import Cut
from avalanche_curv.core.structures.kronecker_terms import (
    Adder,
    Corrected,
    Factors,
    KroneckerTerm,
    in_rows,
)


@dataclass(frozen=True)
class LeadingPart(KroneckerTerm):
    """Λ on the changes u_i v_jᵀ of r columns u_i of U and s columns v_j of V, and elsewhere the means of what was cut:
    ρ_i on u_i vᵀ and κ_j on u v_jᵀ for all u, v orthogonal to these, and τ on u vᵀ. The trace stays.

    With X = Uᵀ W, Y = W V and Z = Uᵀ W V the product with a change W is
    τ W + U ((ρ − τ) ∘ X) + (Y ∘ (κ − τ) + U ((Λ − ρ − κ + τ) ∘ Z)) Vᵀ, 4 (r + s) out · in operations instead of
    2 (out + in) out · in. `values` is [[Λ, ρ], [κ, τ]].
    """

    values: Float[Tensor, "r+1 s+1"]
    g: Float[Tensor, "out r"]
    a: Float[Tensor, "in s"]
    is_product: bool = False

    def adder(self, own: Float[Tensor, "out in"], widths: Sequence[int]) -> Adder:
        middle, rows, columns = self._differences()
        (out, r), (inputs, s) = self.g.shape, self.a.shape
        y, z, x_and_v = in_rows(out, s, own), in_rows(r, s, own), in_rows(r + s, inputs, own)
        left = torch.cat([self.g * rows, y], dim=1)  # U (ρ − τ), and what stands before Vᵀ
        before, x, x_and_v[r:] = left[:, r:], x_and_v[:r], self.a.T
        sides = x_and_v.split([*widths], dim=1)

        def add(to: list[Tensor]) -> Tensor:
            z.addmm_(self.g.T, y.addmm_(own, self.a, beta=0), beta=0).mul_(middle)
            before.copy_(y).mul_(columns).addmm_(self.g, z)
            x.addmm_(self.g.T, own, beta=0)
            for place, right in zip(to, sides):
                place.addmm_(left, right)
            return torch.linalg.vector_norm(x, dim=1).square() @ rows + (before * y).sum()

        return add

    def scaled(self, factor: float) -> LeadingPart:
        return replace(self, values=self.values * factor)

    def placed(self, rows: Tensor, columns: Tensor, out: int, inputs: int) -> KroneckerTerm:
        """Itself where nothing has grown; whole elsewhere, since the new coordinates get no mean."""
        return self if (out, inputs) == (len(self.g), len(self.a)) else self.whole().placed(rows, columns, out, inputs)

    def map_spectrum(self, function: Callable[[Tensor], Tensor]) -> LeadingPart:
        return replace(self, values=function(self.values), is_product=False)

    def whole(self) -> Corrected:
        """With all eigenvectors, of which those that were cut are any."""
        (r, s), (out, inputs) = (n.shape[1] for n in (self.g, self.a)), (len(self.g), len(self.a))
        rows = torch.arange(out, device=self.g.device).clamp(max=r)
        columns = torch.arange(inputs, device=self.a.device).clamp(max=s)
        values = self.values[rows[:, None], columns]
        return Corrected(values, _completed(self.g), _completed(self.a), self.is_product)

    def eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.whole().eigen()

    def factors(self) -> Factors:
        return self.whole().factors()

    def diagonal_in(self, g: Tensor, a: Tensor) -> Tensor:
        return self.whole().diagonal_in(g, a)

    def dense(self) -> Tensor:
        return self.whole().dense()

    def trace(self) -> float:
        return self.whole().trace()

    @property
    def work(self) -> int:
        return 4 * (self.g.shape[1] + self.a.shape[1])

    def tensors(self) -> tuple[Tensor, ...]:
        return self.values, self.g, self.a

    @cached_property
    def level(self) -> float:
        """τ, read once, since reading it waits for a GPU."""
        return float(self.values[-1, -1])

    def _differences(self) -> tuple[Tensor, Tensor, Tensor]:
        """Λ − ρ − κ + τ [r, s], ρ − τ [r] and κ − τ [s]."""
        rows, columns, rest = self.values[:-1, -1], self.values[-1, :-1], self.values[-1, -1]
        return self.values[:-1, :-1] - rows[:, None] - columns + rest, rows - rest, columns - rest


def leading_part(term: KroneckerTerm, cut: Cut) -> KroneckerTerm:
    """The term cut to its leading eigenvectors; itself where a product would not become cheaper, and where its layer
    has grown since it was estimated: of what came later it knows no eigenvalue to average.

    The squared error in the Frobenius norm is the sum of (λ − mean)² over each of the parts whose mean is kept; all of
    it lies between 0 and the largest eigenvalue that was cut.
    """
    if isinstance(term, LeadingPart) or not term.spans:
        return term
    values, g, a = term.eigen()
    rows, columns = (values.sum(dim).argsort(descending=True) for dim in (1, 0))
    values = values[rows[:, None], columns]
    r, s = cut.corner(values)
    with_means = _averaging(r, g) @ values @ _averaging(s, a).T
    kept = g[:, rows[:r]].contiguous(), a[:, columns[:s]].contiguous()
    part = LeadingPart(with_means, *kept, term.is_product)
    if part.work >= term.work:
        return term
    if trace := float(values.double().sum()):
        share = float(values[:r, :s].double().sum()) / trace
        cut.warn_if_short(share, f"leading {r} and {s} eigenvectors of a layer's two Kronecker factors hold together")
    return part


def _averaging(kept: int, like: Float[Tensor, "n n"]) -> Float[Tensor, "kept+1 n"]:
    """Takes the first entries of a vector as they are, and then the mean of all others; 0 where there are none."""
    matrix = torch.eye(kept + 1, len(like), dtype=like.dtype, device=like.device)
    matrix[kept] = 0
    matrix[kept, kept:] = 1 / max(1, len(like) - kept)
    return matrix


def _completed(columns: Float[Tensor, "n r"]) -> Float[Tensor, "n n"]:
    """Orthonormal columns, and others that complete them to a basis."""
    basis = torch.linalg.qr(columns.double(), mode="complete").Q.to(columns)
    return torch.cat([columns, basis[:, columns.shape[1] :]], dim=1)
