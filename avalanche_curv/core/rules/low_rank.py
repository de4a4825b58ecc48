"""Top eigenpairs: of the whole matrix where that is small, of the Gram matrix of per-example rows where these are few,
by Lanczos iteration elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from avalanche_curv.core.curvature import BatchedEmpiricalFisher, Curvature, Hessian, OutputCurvature
from avalanche_curv.core.eigen import WHOLE, Pairs, top_of_matrix, top_of_operator
from avalanche_curv.core.estimate import by_products, check_pair, refusal, rule, structured
from avalanche_curv.core.gram import PlainRows, Rows, plain_size, rows_of, top_pairs
from avalanche_curv.core.layers import Layers
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.rules.dense import blocks_from_rows
from avalanche_curv.core.structures import (
    BlockDiagonal,
    Dense,
    Diagonal,
    FlatSpectrum,
    LowRank,
    LowRankMatrix,
    Matrix,
    MatrixFree,
)
from avalanche_curv.core.structures.cuts import Energy
from avalanche_curv.core.structures.flat_spectrum import flattened
from avalanche_curv.core.structures.kronecker import Factorised

GRAM_ROWS = 3000  # the largest Gram matrix that is decomposed
GRAM_BYTES = 2**30  # of rows that are held at once for it


@rule(Curvature, LowRank)
def low_rank(curvature: Curvature, structure: LowRank, risk: EmpiricalRisk) -> LowRankMatrix:
    """From the fastest way to the top pairs; trace and residual from the exact diagonal."""
    size = risk.space.size
    top = _of_whole(curvature, risk) if size <= WHOLE else _of_rows(curvature, risk) or _of_products(curvature, risk)
    diagonal = structured(curvature, Diagonal(), risk).tensors()[0] if structure.needs_diagonal else None
    return structure.matrix(top, size, diagonal)


@rule(OutputCurvature, BlockDiagonal)
def blocks_of_low_rank(curvature: OutputCurvature, structure: BlockDiagonal, risk: EmpiricalRisk) -> Matrix:
    """Each block by the Gram matrix of its own columns, where the rows fit; dense blocks from rows."""
    if isinstance(structure.block, Dense):
        return blocks_from_rows(curvature, structure, risk)
    rows = _rows(curvature, risk) if isinstance(structure.block, LowRank) else None
    if not isinstance(structure.block, LowRank) or rows is None:
        return by_products(curvature, structure, risk)
    recipe = structure.block
    whole = structured(curvature, Diagonal(), risk).tensors()[0] if recipe.needs_diagonal else None

    def block(at: Tensor, space: ParameterSpace) -> Matrix:
        own = [part for part in (some.only(space.names) for some in rows) if part is not None]
        diagonal = None if whole is None else whole[at]
        nothing = risk.anchor.new_zeros(0), risk.anchor.new_zeros(0, space.size)  # a layer that is not called
        return recipe.matrix(lambda count: top_pairs(own, space, count) if own else nothing, space.size, diagonal)

    return structure.matrix(risk, block)


@refusal(Hessian, LowRank)
def no_energy_of_indefinite(curvature: Hessian, structure: LowRank) -> str | None:
    """Where eigenvalues cancel, a part of the trace means nothing."""
    if not isinstance(structure.cut, Energy):
        return None
    return f"{structure.cut} needs a positive semi-definite curvature, and {curvature} may be indefinite. Use Rank(k)."


@refusal(Hessian, FlatSpectrum)
def no_energy_of_indefinite_basis(curvature: Hessian, structure: FlatSpectrum) -> str | None:
    """The same of the basis."""
    return no_energy_of_indefinite(curvature, structure.basis)


@refusal(Curvature, BlockDiagonal)
def blocks_without_factors(curvature: Curvature, structure: BlockDiagonal) -> str | None:
    """Blocks need a structure that can be read out of products, and that goes with the kind."""
    if isinstance(structure.block, (Factorised, MatrixFree, BlockDiagonal)):
        return f"BlockDiagonal takes blocks of Dense, Diagonal, LowRank or FlatSpectrum; got {structure.block}."
    check_pair(curvature, structure.block)
    return None


@rule(Curvature, FlatSpectrum)
def flat_spectrum(curvature: Curvature, structure: FlatSpectrum, risk: EmpiricalRisk) -> LowRankMatrix:
    """The low rank matrix with one eigenvalue for all."""
    matrix = low_rank(curvature, structure.basis, risk)
    psd = curvature.psd if isinstance(curvature, Hessian) else None
    return flattened(matrix if psd is None or not matrix.is_finite() else matrix.map_spectrum(psd))


Top = Callable[[int], Pairs]


def _of_whole(curvature: Curvature, risk: EmpiricalRisk) -> Top:
    whole = structured(curvature, Dense(), risk).dense()
    return lambda count: top_of_matrix(whole, count)


def _of_rows(curvature: Curvature, risk: EmpiricalRisk) -> Top | None:
    rows = _rows(curvature, risk)
    return None if rows is None else lambda count: top_pairs(rows, risk.space, count)


def _rows(curvature: Curvature, risk: EmpiricalRisk) -> list[Rows] | None:
    """The rows of G, where they are known, few, and fit."""
    if isinstance(curvature, BatchedEmpiricalFisher):
        if not _fits(-(-risk.examples // curvature.batch_size), risk.space.size, risk):
            return None
        sizes = dict(zip(risk.space.names, risk.space.sizes))
        return [PlainRows(sizes, torch.cat(list(curvature.gradients(risk))))]
    if isinstance(curvature, OutputCurvature):
        layers = Layers.of(risk)
        if _fits(risk.examples * _columns(curvature, risk), plain_size(layers), risk):
            return rows_of(curvature, risk, layers)
    return None


def _of_products(curvature: Curvature, risk: EmpiricalRisk) -> Top:
    operator = curvature.operator(risk)
    return lambda count: top_of_operator(operator, risk.anchor, count)


def _fits(rows: int, formed: int, risk: EmpiricalRisk) -> bool:
    return rows <= GRAM_ROWS and rows * formed * risk.anchor.element_size() <= GRAM_BYTES


def _columns(curvature: OutputCurvature, risk: EmpiricalRisk) -> int:
    """R, the number of columns of S."""
    x, y = next(iter(risk))
    with torch.no_grad():
        outputs = risk.outputs(x[:1])
    return curvature.factor(risk.loss, outputs, y[:1], curvature.generator()).shape[2]
