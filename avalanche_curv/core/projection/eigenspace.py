"""Protected directions: the top eigenvectors of a curvature of the past loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.curvature.fisher import Fisher
from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.options import check_count, check_kind, check_seed, optional, settle
from avalanche_curv.core.projection.blocks import Layout
from avalanche_curv.core.projection.protection import BasisBound, Finding, Protection, TaskFindings, some_of
from avalanche_curv.core.projection.subspace import Subspace, remainder
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.block_diagonal import BlockDiagonal, Grouping, WholeModel
from avalanche_curv.core.structures.cuts import Cut, Rank
from avalanche_curv.core.structures.diagonal import Diagonal
from avalanche_curv.core.structures.low_rank import LowRank, LowRankMatrix
from avalanche_curv.core.structures.rules import check_pair, has_rule

UNBOUNDED = 2**62  # bytes: `ProtectedSpace.check` has a limit for the union, before the task is trained


@dataclass(frozen=True)
class Eigenspace(Protection):
    """Protects the top eigenspace of a curvature, in which the past loss is curved most: `Rank(k)` of its eigenvectors,
    or those that hold `Energy(e)` of its trace.

    C is that of `examples` of the task, drawn by `seed` (None takes all). `per` says whether there is one basis over
    all parameters, `WholeModel()`, in memory k P, or one for each layer from the diagonal blocks of C, `PerLayer()`, in
    memory Σ k_l P_l, for whose choice curvature between layers does not count. Directions whose curvature is below 1e-5
    of the largest (in float32; 3e-5 where a Gram matrix is decomposed) count as none and stay free, but for a `Rank(k)`
    of at least as many directions as there are, which closes the block altogether.

    With `OutputGradient()` and a rank of as many directions as there are examples it is orthogonal gradient descent
    (Farajtabar et al. 2020): the span, to that accuracy, of the gradients of each example's true output.

    Raises TypeError or ValueError for options of the wrong kind, and for a curvature without a rule for low rank or,
    with `Energy`, without a trace.
    """

    curvature: Curvature = Fisher()  # noqa: RUF009  a frozen value
    cut: Cut = Rank(20)  # noqa: RUF009
    per: Grouping = WholeModel()  # noqa: RUF009
    examples: int | None = 300
    seed: int = 0

    def __post_init__(self) -> None:
        check_kind("cut", self.cut, Cut, "Rank(20)")
        settle(self, seed=check_seed, examples=optional(check_count))
        check_kind("curvature", self.curvature, Curvature, "Fisher()")
        check_kind("per", self.per, Grouping, "WholeModel() or PerLayer()")
        check_pair(self.curvature, self._structure)

    def find(self, risk: EmpiricalRisk, experience: int) -> TaskFindings:
        part = some_of(risk, self.examples, self.seed, experience)
        found = estimate(self.curvature, self._structure, part).curvature
        diagonal = self._diagonal(part)
        return TaskFindings([
            Eigenvectors(
                self.per.key(space.names[0]), Layout(space), *self._kept(matrix),
                math.nan if diagonal is None else float(diagonal[part.space.positions(space)].sum()), experience,
            )
            for space, matrix in found.in_blocks(part.space) if isinstance(matrix, LowRankMatrix)
        ])

    def _kept(self, matrix: LowRankMatrix) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m"]]:
        """The directions that are protected, and the curvature along them."""
        if not self.cut.takes_all(matrix.size):
            bent = matrix.nonzero()
            return bent.vectors, bent.values
        others = remainder(torch.eye(matrix.size).to(matrix.vectors), matrix.vectors)
        return torch.cat([matrix.vectors, others]), torch.cat([matrix.values, matrix.values.new_zeros(len(others))])

    def check_loss(self, loss: ExampleLoss) -> None:
        self.curvature.check_loss(loss)

    def bounds(self, space: ParameterSpace) -> dict[str, BasisBound]:
        return {
            self.per.key(part.names[0]): BasisBound(part.size, min(part.size, self.cut.most()))
            for part in self.per.spaces(space)
        }

    @property
    def _structure(self) -> LowRank | BlockDiagonal:
        whole = LowRank(self.cut, max_bytes=UNBOUNDED)
        return whole if isinstance(self.per, WholeModel) else BlockDiagonal(self.per, whole, UNBOUNDED)

    def _diagonal(self, risk: EmpiricalRisk) -> Float[Tensor, "P"] | None:
        """The exact diagonal of the curvature in float64; None where it would take P products, or may be indefinite."""
        if not (self.curvature.is_semidefinite and has_rule(self.curvature, Diagonal())):
            return None
        return estimate(self.curvature, Diagonal(), risk).curvature.tensors()[0].double()


@dataclass(frozen=True)
class Eigenvectors(Finding):
    """Eigenpairs of one block of a curvature, and the trace of all of the block."""

    key: str
    layout: Layout
    rows: Float[Tensor, "m d"]
    values: Float[Tensor, "m"]
    trace: float
    experience: int

    def added_to(self, subspace: Subspace, outer: Layout) -> Subspace:
        return subspace.plus(self.layout.widened(self.rows, outer), self.values, self.trace, self.experience)
