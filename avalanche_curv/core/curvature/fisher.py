"""The Fisher information, exact or by Monte Carlo."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from avalanche_curv.core.curvature.base import OutputCurvature
from avalanche_curv.core.losses import ExampleLoss, Factor
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.options import check_count, check_seed, optional, settle


@dataclass(frozen=True)
class Fisher(OutputCurvature):
    """The Fisher information (1/N) Σ_i E_{y ~ p(y | x_i)} [∇ log p ∇ log pᵀ]: labels come from the model.

    Exact by default (type 2: the expectation in closed form; equal to the GGN for softmax cross-entropy and squared
    error). `Fisher(samples=m, seed=s)` is its unbiased Monte-Carlo estimate with m labels an example, whose draws do
    not depend on the batch size. Observed labels are not used: with them it would be `EmpiricalFisher`
    (Kunstner et al. 2019). Raises ValueError for a loss that is no log-likelihood (class weights).
    """

    samples: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.samples is None and self.seed is not None:
            raise ValueError("Fisher(seed=...) draws nothing without samples: give samples=m, or drop the seed.")
        samples = partial(check_count, hint="Leave it out for the exact Fisher.")
        settle(self, samples=optional(samples), seed=optional(check_seed))

    def check_loss(self, loss: ExampleLoss) -> None:
        loss.check_likelihood()
        if self.samples is None:
            loss.check_expectation()

    def factor(
        self, loss: ExampleLoss, outputs: Tensor, targets: Nested, generator: torch.Generator
    ) -> Factor | Tensor:
        self.check_loss(loss)
        if self.samples is None:
            return loss.fisher_factor(outputs, targets)
        draws = len(outputs), self.samples, loss.draws(outputs, targets)
        uniform = torch.rand(*draws, generator=generator, dtype=torch.float64)
        found = loss.sample_gradients(outputs, targets, uniform.to(outputs))
        return found if self.samples == 1 else found / self.samples**0.5
