"""The one door to curvlinops. Operators sum over examples there; the mean is taken here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # a dependency of curvlinops still uses torch.jit
    from curvlinops import GGNLinearOperator, xtrace

COLUMNS = 16  # a matrix product maps over all columns at once: this bounds its memory


@dataclass(frozen=True)
class MeanOperator:
    """(1/N) times a curvlinops operator that sums over N examples."""

    summed: Any
    examples: int

    @property
    def size(self) -> int:
        return self.summed.shape[1]

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M, a few columns at a time."""
        with torch.no_grad():
            parts = [self.summed @ part for part in matrix.split(COLUMNS, dim=1)]
        return torch.cat(parts, dim=1) / self.examples


def output_operator(risk: EmpiricalRisk, data: list[tuple[Tensor, Tensor]]) -> MeanOperator:
    """(1/N) Σ_i J_iᵀ S_i S_iᵀ J_i, as the GGN of ½ Σ_i ‖S_iᵀ f_i‖²; `data` holds inputs and S [n, C, R] by batch."""
    return _mean(GGNLinearOperator, risk, _HalfSquare(), data)


def _mean(operator: Any, risk: EmpiricalRisk, loss: nn.Module, data: list) -> MeanOperator:
    summed = operator(
        _Function(risk), loss, risk.parameters, data, num_data=risk.examples, check_deterministic=False
    )
    return MeanOperator(summed, risk.examples)


class _Function(nn.Module):
    """The outputs [N, C] as a function of a list of parameters; the model's own modules stay out of sight."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__()
        self.risk, self.held = risk, nn.ParameterList(risk.parameters)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.risk.outputs_at(list(self.held), inputs)


class _HalfSquare(nn.Module):
    reduction = "sum"

    def forward(self, outputs: Tensor, factor: Float[Tensor, "N C R"]) -> Tensor:
        return 0.5 * torch.einsum("nc,ncr->nr", outputs, factor).square().sum()


def trace_from_products(
    matmat: Callable[[Float[Tensor, "P k"]], Float[Tensor, "P k"]], size: int, products: int, seed: int
) -> float:
    """XTrace (Epperly et al. 2024) of a matrix in float64, from an even number of products below its size. Random
    vectors come from `seed`; torch's global random state stays as it is.

    Raises torch.linalg.LinAlgError where the matrix is exactly of a lower rank than half of the products.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return float(xtrace(_OnCPU(size, matmat), products))


@dataclass(frozen=True)
class _OnCPU:
    """What `xtrace` asks of a matrix; it draws from the global generator of the matrix' device, here the CPU's."""

    size: int
    matmat: Callable[[Tensor], Tensor]
    dtype: torch.dtype = torch.float64

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __matmul__(self, matrix: Tensor) -> Tensor:
        return self.matmat(matrix)
