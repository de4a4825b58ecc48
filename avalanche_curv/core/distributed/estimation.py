"""The curvature of the mean loss over the examples of all ranks."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError, OutputCurvature
from avalanche_curv.core.curvature.empirical_fisher import BatchedEmpiricalFisher
from avalanche_curv.core.curvature.hessian import Hessian, PositivePart
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.distributed.risk import ShardedRisk
from avalanche_curv.core.eigen import WHOLE, Pairs, top_of_matrix, top_of_operator
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.core.risk.empirical_risk import as_matrix
from avalanche_curv.core.risk.losses import ExampleLoss
from avalanche_curv.core.structures.base import Matrix, Structure
from avalanche_curv.core.structures.block_diagonal import BlockDiagonal
from avalanche_curv.core.structures.dense import Dense
from avalanche_curv.core.structures.diagonal import Diagonal
from avalanche_curv.core.structures.flat_spectrum import FlatSpectrum, flattened
from avalanche_curv.core.structures.kronecker import EKFAC, Kronecker
from avalanche_curv.core.structures.low_rank import LowRank, LowRankMatrix
from avalanche_curv.core.structures.matrix_free import MatrixFree, MatrixFreeMatrix, OperatorTerm
from avalanche_curv.core.structures.rules import check_pair, structured


def estimate_sharded(
    curvature: Curvature, structure: Structure, risk: ShardedRisk, *, gradient: bool = False
) -> QuadraticModel:
    """`estimate` of the risk of all ranks' examples: the same model on every rank, and the same as in one process.

    C = Σ_r (N_r / N) C_r is linear in the examples, and so is every number of Diagonal, Dense, Kronecker (A and G each
    by itself, of which the product would not be) and of blocks of these: those are added over ranks. Other structures
    take products of C, which are added over ranks: they agree with one process as far as its search for eigenpairs is
    accurate, to rounding up to 1,000 parameters. Products of a `MatrixFree` matrix go on talking to all ranks.

    Draws of a Monte-Carlo Fisher are those of one process that passes over the examples of rank 0, then of rank 1, ...
    Raises what `estimate` raises, on all ranks; ValueError where they disagree about what is to be estimated, or
    where mini-batches of `BatchedEmpiricalFisher` would reach over two ranks; TypeError for EKFAC.
    """
    _check(curvature, structure, risk)
    matrix = slope = None
    if risk.is_finite:
        matrix = _matrix(curvature, structure, risk)
        psd = _mending(curvature, matrix)
        matrix = matrix if psd is None else matrix.map_spectrum(psd)
        slope = risk.gradient() if gradient else None
    if matrix is None or not matrix.is_finite() or (slope is not None and not slope.isfinite().all()):
        raise NonFiniteCurvatureError(
            f"{curvature} of {risk.examples} examples on {risk.ranks.size} ranks holds NaN or infinity, so the model "
            "or its inputs do on one of them. Look for diverged weights (lower the learning rate or the strength) and "
            "for NaN in the data."
        )
    return QuadraticModel(risk.own.space, risk.own.anchor, matrix, slope)


def _check(curvature: Curvature, structure: Structure, risk: ShardedRisk) -> None:
    risk.ranks.agree({"curvature": _written(curvature), "structure": _written(structure)})
    check_pair(curvature, structure)
    if isinstance(structure, EKFAC):
        raise TypeError(
            "EKFAC() is not estimated over ranks: its eigenvalues belong to eigenvectors that are known only after all "
            "ranks have spoken. Use Kronecker(), Diagonal(), BlockDiagonal(), LowRank(...), Dense() or MatrixFree()."
        )
    if isinstance(curvature, BatchedEmpiricalFisher):
        _check_mini_batches(curvature.batch_size, risk.counts)
    structure.check(risk.own.space, risk.own.anchor.element_size())


def _check_mini_batches(size: int, counts: tuple[int, ...]) -> None:
    last = max(rank for rank, count in enumerate(counts) if count)
    if any(count % size for count in counts[:last]):
        raise ValueError(
            f"BatchedEmpiricalFisher({size}) needs a multiple of {size} examples on every rank but the last, so that "
            f"no mini-batch lies on two; they have {list(counts)}. Move examples, or use EmpiricalFisher()."
        )


def _matrix(curvature: Curvature, structure: Structure, risk: ShardedRisk) -> Matrix:
    """C before a Hessian's spectrum is mended."""
    if _is_linear(structure):
        return _summed(curvature, structure, risk)
    if isinstance(structure, LowRank):
        return _low_rank(curvature, structure, risk)
    if isinstance(structure, FlatSpectrum):
        matrix = _low_rank(curvature, structure.basis, risk)
        psd = _mending(curvature, matrix)
        return flattened(matrix if psd is None else matrix.map_spectrum(psd))
    if isinstance(structure, MatrixFree):
        return _matrix_free(curvature, structure, risk)
    return structure.from_operator(_operator(curvature, risk), risk.own)


def _is_linear(structure: Structure) -> bool:
    """Whether all that the matrix stores is a mean over examples."""
    if isinstance(structure, BlockDiagonal):
        return _is_linear(structure.block)
    return isinstance(structure, (Dense, Diagonal, Kronecker))


def _summed(curvature: Curvature, structure: Structure, risk: ShardedRisk) -> Matrix:
    """Each stored number is the weighted sum of those of the ranks."""
    weight = _weight(curvature, risk)
    matrix = risk.ranks.together(lambda: structured(_of_rank(curvature, risk), structure, risk.own))
    risk.ranks.agree({f"numbers of {structure}": str([tuple(t.shape) for t in matrix.tensors()])})
    for tensor in matrix.tensors():  # which are new
        tensor.copy_(risk.ranks.sum(tensor * weight))
    return matrix


def _low_rank(curvature: Curvature, structure: LowRank, risk: ShardedRisk) -> LowRankMatrix:
    space, anchor = risk.own.space, risk.own.anchor
    if space.size <= WHOLE:
        whole = _summed(curvature, Dense(), risk).dense()
        return structure.matrix(lambda count: top_of_matrix(whole, count), space.size, whole.diagonal())
    operator = _operator(curvature, risk)

    def top(count: int) -> Pairs:
        return top_of_operator(operator, anchor, count)

    diagonal = _summed(curvature, Diagonal(), risk).tensors()[0] if structure.needs_diagonal else None
    return structure.matrix(top, space.size, diagonal)


def _matrix_free(curvature: Curvature, structure: MatrixFree, risk: ShardedRisk) -> MatrixFreeMatrix:
    if structure.fraction < 1:
        risk = risk.select(random_part(risk.examples, structure.fraction, structure.seed))
    every = replace(structure, fraction=1.0)
    own = risk.ranks.together(lambda: structured(_of_rank(curvature, risk), every, risk.own))
    operator = _Summed(_Products(own), risk, _weight(curvature, risk))
    return MatrixFreeMatrix(own.size, risk.own.anchor.new_empty(0), (OperatorTerm(operator),))


def _operator(curvature: Curvature, risk: ShardedRisk) -> Operator:
    own = risk.ranks.together(lambda: _of_rank(curvature, risk).operator(risk.own))
    return _Summed(own, risk, _weight(curvature, risk))


@dataclass(frozen=True)
class _Summed:
    """Σ_r w_r C_r, to be multiplied with the same columns on all ranks."""

    own: Operator
    risk: ShardedRisk
    weight: float

    @property
    def size(self) -> int:
        return self.own.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return self.risk.ranks.sum_of(lambda: self.own.matmat(matrix) * self.weight, matrix)


@dataclass(frozen=True)
class _Products:
    """A matrix as an operator."""

    matrix: Matrix

    @property
    def size(self) -> int:
        return self.matrix.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        return torch.stack([self.matrix.product(column) for column in matrix.T], dim=1)


def _of_rank(curvature: Curvature, risk: ShardedRisk) -> Curvature:
    """The kind on this rank: draws begin where those of the ranks before it end."""
    if not isinstance(curvature, OutputCurvature):
        return curvature
    own, (_, targets) = risk.own, next(iter(risk.own))
    return with_draws_after(curvature, risk.before, own.loss, as_matrix(own.one_output), targets)


def _weight(curvature: Curvature, risk: ShardedRisk) -> float:
    """The weight of this rank's C_r in the mean: its share of the examples, or of the mini-batches."""
    if not isinstance(curvature, BatchedEmpiricalFisher):
        return risk.share
    batches = [-(-count // curvature.batch_size) for count in risk.counts]
    return batches[risk.ranks.rank] / sum(batches)


def _mending(curvature: Curvature, matrix: Matrix) -> PositivePart | None:
    """How the spectrum is mended: that of a Hessian, where it can be."""
    return curvature.psd if isinstance(curvature, Hessian) and matrix.is_finite() else None


def _written(option: object) -> str:
    """An option as ranks compare it: an object that does not say its values would show its address."""
    return repr(option) if is_dataclass(option) else type(option).__qualname__

CHUNK = 4096  # examples whose draws are skipped at once


def with_draws_after(
    curvature: OutputCurvature, examples: int, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Tensor
) -> OutputCurvature:
    """The kind with its draws as they are after a number of examples of the shape of the given ones; itself if it
    draws none. Draws of a kind come one example after another, so that they do not depend on the batch size."""
    later = _Later(curvature, examples, loss, outputs[:1].detach(), targets[:1])
    return later if examples and later.draws else curvature


@dataclass(frozen=True)
class _Later(OutputCurvature):
    curvature: OutputCurvature
    skipped: int
    loss: ExampleLoss
    outputs: Float[Tensor, "1 C"]
    targets: Tensor

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return self.curvature.factor(loss, outputs, targets, generator)

    def generator(self) -> torch.Generator:
        generator = self.curvature.generator()
        for start in range(0, self.skipped, CHUNK):
            self._skip(min(CHUNK, self.skipped - start), generator)
        return generator

    @property
    def draws(self) -> bool:
        """Whether S takes anything from the generator."""
        generator = self.curvature.generator()
        before = generator.get_state()
        self._skip(1, generator)
        return not torch.equal(before, generator.get_state())

    def _skip(self, examples: int, generator: torch.Generator) -> None:
        outputs, targets = (t.expand(examples, *t.shape[1:]) for t in (self.outputs, self.targets))
        with torch.no_grad():
            self.curvature.factor(self.loss, outputs, targets, generator)
