"""Structures: how much of a curvature matrix is kept."""

from avalanche_curv.core.structures.base import Matrix, Structure
from avalanche_curv.core.structures.block_diagonal import BlockDiagonal, PerLayer, PerParameter, WholeModel
from avalanche_curv.core.structures.cuts import Energy, Rank
from avalanche_curv.core.structures.dense import Dense
from avalanche_curv.core.structures.diagonal import Diagonal
from avalanche_curv.core.structures.flat_spectrum import FlatSpectrum
from avalanche_curv.core.structures.kronecker import EKFAC, Kronecker
from avalanche_curv.core.structures.kronecker_sums import FrobeniusOptimal, KeepTerms, PartialTraces, PiWeighted
from avalanche_curv.core.structures.low_rank import LowRank
from avalanche_curv.core.structures.matrix_free import MatrixFree
from avalanche_curv.core.structures.rules import rule
from avalanche_curv.core.structures.weight_sharing import Expand, Reduce

__all__ = [
    "EKFAC",
    "BlockDiagonal",
    "Dense",
    "Diagonal",
    "Energy",
    "Expand",
    "FlatSpectrum",
    "FrobeniusOptimal",
    "KeepTerms",
    "Kronecker",
    "LowRank",
    "Matrix",
    "MatrixFree",
    "PartialTraces",
    "PerLayer",
    "PerParameter",
    "PiWeighted",
    "Rank",
    "Reduce",
    "Structure",
    "WholeModel",
    "rule",
]
