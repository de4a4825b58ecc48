"""What a kind of curvature is: the symmetric matrix that stands for the second derivative of past loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature._curvlinops import output_operator
from avalanche_curv.core.curvature.operators import Operator, WithFallback
from avalanche_curv.core.curvature.products import Relinearised
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.losses import ExampleLoss


class NonFiniteCurvatureError(FloatingPointError):
    """The estimated curvature holds NaN or infinity."""


class Curvature(ABC):
    """A kind of curvature C(θ) of an empirical risk, always of the mean over examples.

    A kind of your own needs `operator` and nothing else; every structure and policy then works with it.
    """

    @abstractmethod
    def operator(self, risk: EmpiricalRisk) -> Operator:
        """The curvature at the frozen parameters of `risk` as an operator on its parameter space."""

    def check_loss(self, loss: ExampleLoss) -> None:  # noqa: B027  most need no more of a loss than that it is known
        """Raises ValueError for a loss of which this curvature is not defined."""


class OutputCurvature(Curvature, ABC):
    """C = (1/N) Σ_i J_iᵀ S_i S_iᵀ J_i: positive semi-definite, given by a factor S_i in the outputs of each example.

    J_i is the Jacobian of the outputs f(x_i) in the parameters. Fast rules and per-example measurements need S only.
    """

    seed: int | None = None

    @abstractmethod
    def factor(
        self, loss: ExampleLoss, outputs: Float[Tensor, "N C"], targets: Tensor, generator: torch.Generator
    ) -> Float[Tensor, "N C R"]:
        """S_i for each example. `generator` gives the draws of a kind that samples, and is ignored by the others."""

    def generator(self) -> torch.Generator:
        """The source of the draws of one pass over the data: the same at every pass."""
        return torch.Generator().manual_seed(self.seed or 0)

    def operator(self, risk: EmpiricalRisk) -> Operator:
        generator = self.generator()
        with torch.no_grad():
            data = [(x, self.factor(risk.loss, risk.outputs(x), y, generator)) for x, y in risk]
        return WithFallback(output_operator(risk, data), Relinearised(self, risk))
