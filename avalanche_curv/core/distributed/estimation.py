"""The curvature of the mean loss over the examples of all ranks."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError, OutputCurvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.distributed.risk import ShardedRisk
from avalanche_curv.core.losses import ExampleLoss, Factor
from avalanche_curv.core.nested import Nested, index, repeated
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import as_matrix
from avalanche_curv.core.structures.base import Matrix, Structure, all_finite
from avalanche_curv.core.structures.rules import check_pair, structured


def estimate_sharded(
    curvature: Curvature, structure: Structure, risk: ShardedRisk, *, gradient: bool = False
) -> QuadraticModel:
    """`estimate` of the risk of all ranks' examples: the same model on every rank, and the same as in one process.

    C = Σ_r (N_r / N) C_r is linear in the examples, and so is every number of Diagonal, Dense, Kronecker (A and G each
    by itself, of which the product would not be) and of blocks of these: those are added over ranks. Other structures
    take products of C, which are added over ranks: they agree with one process as far as its search for eigenpairs is
    accurate, to rounding up to 1,000 parameters. Products of a `MatrixFree` matrix go on talking to all ranks. A of
    Kronecker is that of one process where examples without any token that counts are as large a share of every rank's.

    Draws of a Monte-Carlo Fisher are those of one process that passes over the examples of rank 0, then of rank 1, ...,
    as far as examples have one shape; of sentences of several lengths they are others.
    Raises what `estimate` raises, on all ranks; ValueError where they disagree about what is to be estimated, or
    where mini-batches of `BatchedEmpiricalFisher` would reach over two ranks; TypeError for EKFAC.
    """
    _check(curvature, structure, risk)
    matrix = slope = None
    if risk.is_finite:
        matrix = curvature.mended(structure.from_shards(_OverRanks(curvature, risk)))
        slope = risk.gradient() if gradient else None
    if matrix is None or not matrix.is_finite() or (slope is not None and not all_finite(slope)):
        raise NonFiniteCurvatureError(
            f"{curvature} of {risk.examples} examples on {risk.ranks.size} ranks holds NaN or infinity, so the model "
            "or its inputs do on one of them. Look for diverged weights (lower the learning rate or the strength) and "
            "for NaN in the data."
        )
    return QuadraticModel(risk.own.space, risk.own.anchor, matrix, slope, frozen=risk.own.frozen)


def _check(curvature: Curvature, structure: Structure, risk: ShardedRisk) -> None:
    risk.ranks.agree({"curvature": _written(curvature), "structure": _written(structure)})
    check_pair(curvature, structure)
    curvature.check_shards(risk.counts)
    structure.check(risk.own.space, risk.own.anchor.element_size())


@dataclass(frozen=True)
class _OverRanks:
    """C = Σ_r w_r C_r of the examples of all ranks, as structures ask for it."""

    curvature: Curvature
    risk: ShardedRisk

    @property
    def own(self) -> EmpiricalRisk:
        """The examples of this rank."""
        return self.risk.own

    def operator(self) -> Operator:
        """Products of the kind's own operator, summed over ranks."""
        return self._summed(self.risk.ranks.together(lambda: self._of_rank().operator(self.own)))

    def averaged(self, structure: Structure) -> Matrix:
        """Each stored number is the weighted sum of those of the ranks."""
        matrix = self.risk.ranks.together(lambda: structured(self._of_rank(), structure, self.own))
        self.risk.ranks.agree({f"numbers of {structure}": str([tuple(t.shape) for t in matrix.tensors()])})
        for tensor in matrix.tensors():  # which are new
            tensor.copy_(self.risk.ranks.sum(tensor * self._weight))
        return matrix

    def products_with(self, structure: Structure) -> Operator:
        """Products with the matrix of each rank's examples, summed over ranks."""
        return self._summed(self.risk.ranks.together(lambda: structured(self._of_rank(), structure, self.own)))

    def subset(self, fraction: float, seed: int) -> _OverRanks:
        """The curvature of a random part of the examples of all ranks."""
        return replace(self, risk=self.risk.select(random_part(self.risk.examples, fraction, seed)))

    def _summed(self, own: Operator) -> Operator:
        return _Summed(own, self.risk, self._weight)

    def _of_rank(self) -> Curvature:
        """The kind on this rank: draws begin where those of the ranks before it end."""
        if not isinstance(self.curvature, OutputCurvature):
            return self.curvature
        _, targets = next(iter(self.own))
        outputs = as_matrix(self.own.one_output)
        return with_draws_after(self.curvature, self.risk.before, self.own.loss, outputs, targets)

    @property
    def _weight(self) -> float:
        """The weight of this rank's C_r in the mean: its share of the examples, or of the mini-batches."""
        terms = [self.curvature.terms(count) for count in self.risk.counts]
        return terms[self.risk.ranks.rank] / sum(terms)


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


def _written(option: object) -> str:
    """An option as ranks compare it: an object that does not say its values would show its address."""
    return repr(option) if is_dataclass(option) else type(option).__qualname__

CHUNK = 2**20  # outputs of examples whose draws are skipped at once


def with_draws_after(
    curvature: OutputCurvature, examples: int, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Nested
) -> OutputCurvature:
    """The kind with its draws as they are after a number of examples of the shape of the given ones; itself if it
    draws none. Draws of a kind come one example after another, so that they do not depend on the batch size."""
    later = _Later(curvature, examples, loss, *index((outputs.detach(), targets), slice(1)))
    return later if examples and later.draws else curvature


@dataclass(frozen=True)
class _Later(OutputCurvature):
    curvature: OutputCurvature
    skipped: int
    loss: ExampleLoss
    outputs: Float[Tensor, "1 C"]
    targets: Nested

    def factor(
        self, loss: ExampleLoss, outputs: Tensor, targets: Nested, generator: torch.Generator
    ) -> Factor | Tensor:
        return self.curvature.factor(loss, outputs, targets, generator)

    def generator(self) -> torch.Generator:
        generator = self.curvature.generator()
        chunk = max(1, CHUNK // self.outputs.shape[1])
        for start in range(0, self.skipped, chunk):
            self._skip(min(chunk, self.skipped - start), generator)
        return generator

    @property
    def draws(self) -> bool:
        """Whether S takes anything from the generator."""
        generator = self.curvature.generator()
        before = generator.get_state()
        self._skip(1, generator)
        return not torch.equal(before, generator.get_state())

    def _skip(self, examples: int, generator: torch.Generator) -> None:
        outputs, targets = repeated((self.outputs, self.targets), examples)
        with torch.no_grad():
            self.curvature.factor(self.loss, outputs, targets, generator)
