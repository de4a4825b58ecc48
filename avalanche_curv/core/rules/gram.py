"""Dense matrices and blocks as sums of outer products of rows."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature import BatchedEmpiricalFisher, OutputCurvature
from avalanche_curv.core.estimate import rule
from avalanche_curv.core.examples import curvature_rows
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.structures import BlockDiagonal, BlockDiagonalMatrix, Dense, DenseMatrix, Structure

Rows = Iterable[Float[Tensor, "n P"]]


@rule(OutputCurvature, Dense)
def dense_from_rows(curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk) -> DenseMatrix:
    """Σ GᵀG over per-example rows."""
    return _dense(curvature_rows(curvature, risk), risk)


@rule(OutputCurvature, BlockDiagonal)
def blocks_from_rows(curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk) -> BlockDiagonalMatrix:
    """Σ GᵀG within each parameter."""
    return _blocks(curvature_rows(curvature, risk), risk)


@rule(BatchedEmpiricalFisher, Dense)
def dense_of_batches(curvature: BatchedEmpiricalFisher, structure: Structure, risk: EmpiricalRisk) -> DenseMatrix:
    """GᵀG of the mini-batch gradients."""
    return _dense(curvature.gradients(risk), risk)


@rule(BatchedEmpiricalFisher, BlockDiagonal)
def blocks_of_batches(
    curvature: BatchedEmpiricalFisher, structure: Structure, risk: EmpiricalRisk
) -> BlockDiagonalMatrix:
    """GᵀG of the mini-batch gradients within each parameter."""
    return _blocks(curvature.gradients(risk), risk)


def _dense(rows: Rows, risk: EmpiricalRisk) -> DenseMatrix:
    total = risk.anchor.new_zeros(risk.space.size, risk.space.size)
    for part in rows:
        total.addmm_(part.T, part)
    return DenseMatrix(total)


def _blocks(rows: Rows, risk: EmpiricalRisk) -> BlockDiagonalMatrix:
    totals = [risk.anchor.new_zeros(size, size) for size in risk.space.sizes]
    for part in rows:
        for total, block in zip(totals, part.split(risk.space.sizes, dim=1)):
            total.addmm_(block.T, block)
    return BlockDiagonalMatrix(tuple(totals))
