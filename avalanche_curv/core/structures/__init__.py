"""Structures: how much of a curvature matrix is kept."""

from avalanche_curv.core.structures.base import Matrix, Structure
from avalanche_curv.core.structures.block_diagonal import BlockDiagonal, BlockDiagonalMatrix
from avalanche_curv.core.structures.dense import Dense, DenseMatrix
from avalanche_curv.core.structures.diagonal import Diagonal, DiagonalMatrix

__all__ = [
    "BlockDiagonal",
    "BlockDiagonalMatrix",
    "Dense",
    "DenseMatrix",
    "Diagonal",
    "DiagonalMatrix",
    "Matrix",
    "Structure",
]
