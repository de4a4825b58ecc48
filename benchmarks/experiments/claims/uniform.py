"""The identity as a curvature: every weight is as important as any other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core import Curvature, Diagonal, EmpiricalRisk, Operator
from avalanche_curv.core.structures.diagonal import DiagonalMatrix
from avalanche_curv.core.structures.rules import rule


@dataclass(frozen=True)
class Uniform(Curvature):
    """I, whatever the loss: the penalty is λ/2 ‖δ‖², what is left of any importance whose entries are all cut at one
    value."""

    is_semidefinite = True

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return _Identity(risk.space.size)


@dataclass(frozen=True)
class _Identity:
    size: int

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return matrix.clone()


@rule(Uniform, Diagonal)
def diagonal_of_ones(curvature: Uniform, structure: Diagonal, risk: EmpiricalRisk) -> DiagonalMatrix:
    return DiagonalMatrix(torch.ones_like(risk.anchor))
