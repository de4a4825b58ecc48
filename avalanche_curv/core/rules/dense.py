"""Dense matrices and blocks as sums of outer products of rows."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature import BatchedEmpiricalFisher, OutputCurvature
from avalanche_curv.core.estimate import by_products, rule
from avalanche_curv.core.examples import curvature_rows
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.structures import BlockDiagonal, BlockDiagonalMatrix, Dense, DenseMatrix, Matrix, Structure

Rows = Iterable[Float[Tensor, "n P"]]


@rule(OutputCurvature, Dense)
def dense_from_rows(curvature: OutputCurvature, structure: Structure, risk: EmpiricalRisk) -> DenseMatrix:
    """Σ GᵀG over per-example rows."""
    return _dense(curvature_rows(curvature, risk), risk)


def blocks_from_rows(curvature: OutputCurvature, structure: BlockDiagonal, risk: EmpiricalRisk) -> Matrix:
    """Σ GᵀG within each block, which is dense."""
    return _blocks(structure, curvature_rows(curvature, risk), risk)


@rule(BatchedEmpiricalFisher, Dense)
def dense_of_batches(curvature: BatchedEmpiricalFisher, structure: Structure, risk: EmpiricalRisk) -> DenseMatrix:
    """GᵀG of the mini-batch gradients."""
    return _dense(curvature.gradients(risk), risk)


@rule(BatchedEmpiricalFisher, BlockDiagonal)
def blocks_of_batches(curvature: BatchedEmpiricalFisher, structure: BlockDiagonal, risk: EmpiricalRisk) -> Matrix:
    """GᵀG of the mini-batch gradients within each block, where blocks are dense."""
    if not isinstance(structure.block, Dense):
        return by_products(curvature, structure, risk)
    return _blocks(structure, curvature.gradients(risk), risk)


def _dense(rows: Rows, risk: EmpiricalRisk) -> DenseMatrix:
    total = risk.anchor.new_zeros(risk.space.size, risk.space.size)
    for part in rows:
        total.addmm_(part.T, part)
    return DenseMatrix(total)


def _blocks(structure: BlockDiagonal, rows: Rows, risk: EmpiricalRisk) -> BlockDiagonalMatrix:
    zeros = structure.matrix(risk, lambda _, space: DenseMatrix(risk.anchor.new_zeros(space.size, space.size)))
    for part in rows:
        for at, matrix in zeros.placed:
            block = part[:, at]
            matrix.tensors()[0].addmm_(block.T, block)
    return zeros
