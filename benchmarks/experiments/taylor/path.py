"""The error of the expansion and that of its diagonal, along the training on a second task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as Folder
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from avalanche_curv import GGN, Diagonal, EmpiricalRisk, Fisher, Hessian, Matrix, MatrixFree, estimate
from benchmarks.experiments.taylor.problems import descend
from benchmarks.harness.experiment import Record

if TYPE_CHECKING:
    from benchmarks.experiments.taylor import Path

BATCH = 64
GROWTH = 1.5  # from one measured step to the next


@dataclass(frozen=True)
class Expansion:
    """L_A(a + δ) ≈ L_A(a) + gᵀδ + ½ δᵀ H δ, with H exact, H's diagonal, and the GGN in its place."""

    risk: EmpiricalRisk
    value: float
    gradient: Tensor
    hessian: Matrix
    diagonal: Matrix
    ggn: Matrix

    @classmethod
    def of(cls, risk: EmpiricalRisk) -> Expansion:
        """The expansion around the frozen parameters."""
        hessian, ggn = (estimate(kind, MatrixFree(), risk).curvature for kind in (Hessian(), GGN()))
        return cls(risk, risk.value(), risk.gradient(), hessian, estimate(Hessian(), Diagonal(), risk).curvature, ggn)

    def errors(self, model: nn.Module) -> dict[str, float]:
        """What each simplification adds at the parameters of `model`, in absolute value; the distance ‖δ‖, the increase
        that these are errors of, and ½ δᵀ diag(H) δ, which EWC predicts of it."""
        delta = self.risk.space.vector(model).to(self.risk.anchor) - self.risk.anchor
        now = EmpiricalRisk.snapshot(model, self.risk.loss, self.risk.batches).value()
        full, diagonal, ggn = (half_form(matrix, delta) for matrix in (self.hessian, self.diagonal, self.ggn))
        slope, increase = float(self.gradient @ delta), now - self.value
        return {
            "distance": float(delta.norm()),
            "increase": increase,
            "predicted": diagonal,
            "taylor": abs(increase - slope - full),
            "diagonal": abs(full - diagonal),
            "slope": abs(slope),
            "ggn": abs(full - ggn),
        }


def half_form(matrix: Any, delta: Tensor) -> float:
    """½ δᵀ C δ."""
    return 0.5 * float(delta @ matrix.product(delta))


def run(path: Path, seed: int, root: Folder | None) -> Iterator[Record]:
    """Errors at steps that grow by half, of stochastic gradient descent on the second task."""
    first, second = path.problem.tasks(seed, root)
    torch.manual_seed(seed)
    model = path.problem.learned(first)
    risk = EmpiricalRisk.snapshot(model, path.problem.criterion, [first])
    expansion, past = Expansion.of(risk), estimate(Fisher(), Diagonal(), risk)
    yield {"metric": "anchor_loss", "value": expansion.value}
    yield {"metric": "anchor_gradient", "value": expansion.gradient.norm()}
    optimizer = torch.optim.SGD(model.parameters(), lr=path.rate)
    found: list[dict[str, float]] = []
    for step in range(1, path.steps + 1):
        penalty = path.strength * past.penalty(model) if path.strength else 0.0
        descend(model, path.problem.criterion, second, BATCH, optimizer, penalty)
        if step in measured_steps(path.steps):
            found.append(expansion.errors(model))
            yield from ({"metric": name, "value": value, "step": step} for name, value in found[-1].items())
    yield from crossover(found)


def crossover(found: Sequence[Mapping[str, float]]) -> Iterator[Record]:
    """Where the error of the expansion first exceeds that of the diagonal, nothing if it never does; and the share of
    the places where it does not."""
    beyond = [errors for errors in found if errors["taylor"] > errors["diagonal"]]
    yield {"metric": "dominated", "value": 1 - len(beyond) / len(found)}
    if beyond:
        yield {"metric": "crossover", "value": beyond[0]["distance"]}
        yield {"metric": "crossover_increase", "value": beyond[0]["increase"]}


def measured_steps(last: int) -> list[int]:
    """1, and each next one half larger, up to the last.

    >>> measured_steps(10)
    [1, 2, 3, 5, 8, 10]
    """
    steps = [1]
    while steps[-1] < last:
        steps.append(min(last, max(steps[-1] + 1, round(GROWTH * steps[-1] + 0.1))))
    return steps
