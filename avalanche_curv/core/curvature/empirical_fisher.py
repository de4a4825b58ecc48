"""Outer products of gradients at observed labels: of single examples, and of mini-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.operators import GramOperator, Operator
from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.nested import examples as number_of
from avalanche_curv.core.options import check_count, settle
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk


@dataclass(frozen=True)
class EmpiricalFisher(OutputCurvature):
    """(1/N) Σ_i g_i g_iᵀ, with g_i the gradient of example i at its observed label. It is not the Fisher."""

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Nested, generator: torch.Generator) -> Tensor:
        return loss.gradient(outputs, targets)[:, :, None]


@dataclass(frozen=True)
class BatchedEmpiricalFisher(Curvature):
    """(1/B) Σ_b ḡ_b ḡ_bᵀ, with ḡ_b the mean gradient of mini-batch b: what common code calls EWC.

    It shrinks as `batch_size` grows and is kept for comparison; with batch_size=1 it is the `EmpiricalFisher`.
    """

    batch_size: int

    is_semidefinite = True

    def __post_init__(self) -> None:
        settle(self, batch_size=check_count)

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return GramOperator(torch.cat(list(self.rows(risk))))

    def row_count(self, risk: EmpiricalRisk) -> int:
        """B, the number of mini-batches, which give a row each."""
        return self.terms(risk.examples)

    def rows(self, risk: EmpiricalRisk) -> Iterator[Float[Tensor, "1 P"]]:
        """ḡ_b / √B, one row at a time."""
        for x, y in risk.rebatched(self.batch_size):
            yield risk.summed_gradient(x, y)[None] / (number_of(y) * self.terms(risk.examples) ** 0.5)

    def terms(self, examples: int) -> int:
        """B, the number of mini-batches that this number of examples makes; the last may be smaller."""
        return -(-examples // self.batch_size)

    def check_shards(self, counts: Sequence[int]) -> None:
        """Raises ValueError where a mini-batch would lie on two shards of these numbers of examples."""
        last = max(shard for shard, count in enumerate(counts) if count)
        if any(count % self.batch_size for count in counts[:last]):
            raise ValueError(
                f"BatchedEmpiricalFisher({self.batch_size}) needs a multiple of {self.batch_size} examples on every "
                f"rank but the last, so that no mini-batch lies on two; they have {list(counts)}. Move examples, or "
                "use EmpiricalFisher()."
            )
