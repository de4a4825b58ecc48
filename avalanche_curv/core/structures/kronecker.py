"""Kronecker-factored curvature of linear and convolutional layers, beside a diagonal for all other parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.structures.base import Matrix, Structure, check_limit, check_memory
from avalanche_curv.core.structures.kronecker_terms import KeepTerms, Sum

if TYPE_CHECKING:
    from avalanche_curv.core.curvature import Operator
    from avalanche_curv.core.risk import EmpiricalRisk


class Factorised(Structure):
    """What KFAC and EKFAC share: a recipe for matrices that hold Kronecker factors of layers."""

    max_bytes: int
    corrections: ClassVar[int]  # numbers beside the factors for each parameter

    if TYPE_CHECKING:

        @property
        def sums(self) -> Sum:
            """How two matrices are added."""
            ...

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> Matrix:
        raise TypeError(f"{type(self).__name__} needs S of each example: products alone give no Kronecker factors.")

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        """As if every weight of two or more axes, with its bias, lay in a layer that can be factorised."""
        return (space.size + sum(self._numbers(space, *pair) for pair in zip(space.names, space.shapes))) * itemsize

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        """Refuses what is certain, a matrix with a bias; the others are known, and checked, when layers are."""
        certain = [
            (name, shape) for name, shape in zip(space.names, space.shapes)
            if len(shape) == 2 and _bias(name) in space.names
        ]
        self.check_bytes(sum(self._numbers(space, name, shape) for name, shape in certain) * itemsize)

    def check_bytes(self, needed: int) -> None:
        """Raises MemoryError for a matrix over the limit."""
        remedy = "Use LowRank(Rank(20)) or Diagonal(), or raise max_bytes."
        check_memory(f"{type(self).__name__}()", needed, self.max_bytes, remedy)

    def _numbers(self, space: ParameterSpace, name: str, shape: torch.Size) -> int:
        """Held for the layer of one weight, beside the diagonal."""
        if len(shape) < 2 or name.rpartition(".")[2] != "weight":
            return 0
        inputs = shape.numel() // shape[0] + (_bias(name) in space.names)
        return inputs**2 + shape[0] ** 2 + self.corrections * inputs * shape[0]


@dataclass(frozen=True)
class Kronecker(Factorised):
    """KFAC: for each linear or convolutional layer C ≈ A ⊗ G over its weight and bias together; Σ (in + 1)² + out²
    numbers, up to `max_bytes`.

    A = (1 / NT) Σ_{n,t} a_nt a_ntᵀ of the layer's inputs, with a 1 appended for the bias, and
    G = (1 / N) Σ_{n,t,r} b_ntr b_ntrᵀ of the sensitivities to the columns s_r of S, over T positions (Martens & Grosse
    2015, arXiv:1503.05671; Grosse & Martens 2016, arXiv:1602.01407; "expand" of Eschenhagen et al. 2023). The kind
    decides the columns: `Fisher()` gives type-2, `Fisher(samples=1)` Monte-Carlo and `EmpiricalFisher()` empirical
    factors.

    All other parameters get the exact diagonal: norm layers, embeddings, grouped convolutions, bare tensors, the
    projections of attention, layers that are called twice or share their weight. A model without any layer to factorise
    is refused (TypeError), and so is a curvature that is no OutputCurvature.

    Sums keep a list of terms and are exact; `sums=PiWeighted()` merges them into one.
    """

    sums: Sum = KeepTerms()  # noqa: RUF009  a frozen value
    max_bytes: int = 4 * 2**30

    corrections: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_limit("Kronecker", self.max_bytes)
        if not isinstance(self.sums, Sum):
            raise TypeError(f"Kronecker takes KeepTerms() or PiWeighted(); got {self.sums!r}.")


@dataclass(frozen=True)
class EKFAC(Factorised):
    """KFAC with corrected eigenvalues: C ≈ Q Λ Qᵀ with Q = Q_A ⊗ Q_G the eigenvectors of the Kronecker factors and
    Λ = diag(Qᵀ C Q) exact (George et al. 2018, arXiv:1806.03884), so that its trace is that of C. Numbers: those of
    KFAC, and one for each parameter. The same layers and refusals as `Kronecker`. Sums keep a list of terms."""

    max_bytes: int = field(default=4 * 2**30, kw_only=True)

    corrections: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_limit("EKFAC", self.max_bytes)

    @property
    def sums(self) -> Sum:
        return KeepTerms()


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"
