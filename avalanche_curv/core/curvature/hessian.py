"""The exact Hessian of past loss, and how its spectrum is made positive semi-definite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.curvature.products import HessianOperator
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk


class PositivePart(ABC):
    """How an indefinite symmetric matrix is made positive semi-definite, eigenvalue by eigenvalue."""

    @abstractmethod
    def __call__(self, eigenvalues: Tensor) -> Tensor:
        """The new eigenvalues."""


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

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return HessianOperator(risk)
