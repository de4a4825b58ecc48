"""Structures: how much of a curvature matrix is kept."""

from avalanche_curv.core.structures.base import Matrix, Structure
from avalanche_curv.core.structures.block_diagonal import BlockDiagonal, BlockDiagonalMatrix, PerLayer, PerParameter
from avalanche_curv.core.structures.dense import Dense, DenseMatrix
from avalanche_curv.core.structures.diagonal import Diagonal, DiagonalMatrix
from avalanche_curv.core.structures.kronecker import EKFAC, KeepTerms, Kronecker, KroneckerMatrix, PiWeighted
from avalanche_curv.core.structures.low_rank import Energy, FlatSpectrum, LowRank, LowRankMatrix, Rank
from avalanche_curv.core.structures.matrix_free import MatrixFree, MatrixFreeMatrix

__all__ = [
    "EKFAC",
    "BlockDiagonal",
    "BlockDiagonalMatrix",
    "Dense",
    "DenseMatrix",
    "Diagonal",
    "DiagonalMatrix",
    "Energy",
    "FlatSpectrum",
    "KeepTerms",
    "Kronecker",
    "KroneckerMatrix",
    "LowRank",
    "LowRankMatrix",
    "Matrix",
    "MatrixFree",
    "MatrixFreeMatrix",
    "PerLayer",
    "PerParameter",
    "PiWeighted",
    "Rank",
    "Structure",
]
