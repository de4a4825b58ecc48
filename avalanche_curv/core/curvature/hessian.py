"""The exact Hessian of past loss, and how its spectrum is made positive semi-definite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp

from avalanche_curv.core.curvature.base import Curvature, M
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.curvature.second_derivatives import held_still, hessian_operator
from avalanche_curv.core.nested import Nested, index, split
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.jacobians import example_rows, loss_of_one, over_examples, parameters_of
from avalanche_curv.core.risk.trust import directions, right_way


class PositivePart(ABC):
    """How an indefinite symmetric matrix is made positive semi-definite, eigenvalue by eigenvalue."""

    @abstractmethod
    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """The eigenvalues of the positive semi-definite matrix, in place of `eigenvalues`, of the same shape."""


@dataclass(frozen=True)
class Clip(PositivePart):
    """Negative eigenvalues become zero: the nearest positive semi-definite matrix in the Frobenius norm."""

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.clamp_min(0)


@dataclass(frozen=True)
class Absolute(PositivePart):
    """Eigenvalues become their absolute values (Dauphin et al. 2014)."""

    def __call__(self, eigenvalues: Tensor) -> Tensor:
        return eigenvalues.abs()


@dataclass(frozen=True)
class Hessian(Curvature):
    """∇²L, the exact second derivative. It may be indefinite: `psd=Clip()` or `psd=Absolute()` mends its structured
    form (the eigenvalues of a dense matrix or of each block, the entries of a diagonal); with `psd=None` the penalty
    may reward moving away from the anchor without bound."""

    psd: PositivePart | None = None

    def __post_init__(self) -> None:
        if self.psd is not None and not isinstance(self.psd, PositivePart):
            raise TypeError(f"Hessian(psd=...) takes Clip(), Absolute() or None; got {self.psd!r}.")

    @property
    def is_known_of_examples(self) -> bool:  # type: ignore[override]
        """Whether the curvature of single examples is defined: it is not with `psd`, which acts on the mean."""
        return self.psd is None

    @property
    def is_mended(self) -> bool:
        """Whether `psd` is given."""
        return self.psd is not None

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return hessian_operator(risk)

    def mended(self, matrix: M) -> M:
        """`psd` of the eigenvalues of an estimate; the matrix itself where it is not finite, as eigh fails on NaN."""
        return matrix if self.psd is None or not matrix.is_finite() else matrix.map_spectrum(self.psd)

    def unmended(self) -> Hessian:
        return Hessian()

    def example_expansion(
        self, risk: EmpiricalRisk, inputs: Nested, targets: Nested, displacement: Float[Tensor, "P"]
    ) -> tuple[Float[Tensor, "n P"], Float[Tensor, "n P"]]:
        """∇ℓ_i(a) and ∇²ℓ_i(a) δ, each [n, P], of n examples at the anchor a; the second is the forward derivative of
        the first along δ. Raises TypeError with `psd`."""
        if self.psd is not None:
            return super().example_expansion(risk, inputs, targets, displacement)
        x, y = index(risk.few, slice(2))
        step = directions(risk.space.size, like=risk.anchor).index_fill(0, held_still(risk), 0)
        ways = {"forward": lambda: [*_forward(risk, x, y, step)]}
        way = right_way(risk, "expansion", ways, lambda: [*_one_by_one(risk, x, y, step)], "loop")
        still = held_still(risk)
        expanded = _forward if way == "forward" else _one_by_one
        slopes, products = expanded(risk, inputs, targets, displacement.index_fill(0, still, 0))
        return slopes, products.index_fill(1, still, 0)


def _forward(
    risk: EmpiricalRisk, inputs: Nested, targets: Nested, displacement: Float[Tensor, "P"]
) -> tuple[Float[Tensor, "n P"], Float[Tensor, "n P"]]:
    """∇ℓ_i and ∇²ℓ_i δ of all examples at once."""
    here, step = parameters_of(risk), parameters_of(risk, displacement)
    gradient = grad(loss_of_one(risk))
    expanded = over_examples(lambda x, y: jvp(lambda p: gradient(p, x, y), (here,), (step,)), inputs, targets)
    slopes, products = (example_rows(parts) for parts in expanded)
    return slopes, products


def _one_by_one(
    risk: EmpiricalRisk, inputs: Nested, targets: Nested, displacement: Float[Tensor, "P"]
) -> tuple[Float[Tensor, "n P"], Float[Tensor, "n P"]]:
    """∇ℓ_i and ∇²ℓ_i δ of one example after the other."""
    ones = [replace(risk, batches=(pair,)) for pair in split((inputs, targets), 1)]
    products = [hessian_operator(one).matmat(displacement[:, None])[:, 0] for one in ones]
    return torch.stack([one.gradient() for one in ones]), torch.stack(products)
