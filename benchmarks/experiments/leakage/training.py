"""The leakage of a network's drift on permuted digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin, SupervisedPlugin
from torch import nn

from avalanche_curv import Eigenspace, Fisher, OrthogonalProjectionPlugin, PermutedDigits, Rank
from avalanche_curv.core.projection.blocks import Block
from benchmarks.harness.experiment import Record
from benchmarks.training import Steps

if TYPE_CHECKING:
    from benchmarks.experiments.leakage import Training

Values = dict[str, torch.Tensor]
EVERY = 10


def run(config: Training, seed: int) -> list[Record]:
    """Train on all tasks; what leaks in the last one, into the subspace of all before it."""
    experiences = PermutedDigits(config.tasks, seed=seed).train_stream
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    watched = OrthogonalProjectionPlugin(
        Eigenspace(Fisher(), Rank(config.rank), examples=config.examples), projection=config.projection
    )
    watcher = Watcher(watched)
    strategy = Naive(
        model=model, optimizer=config.optimiser.make(model), criterion=nn.CrossEntropyLoss(),
        train_mb_size=config.batch, train_epochs=config.steps,
        plugins=[watched, *config.optimiser.plugins(), watcher, Steps(config.steps)],
        evaluator=EvaluationPlugin(loggers=[]),
    )
    for experience in experiences:
        strategy.train(experience, eval_streams=[])
    overlap = torch.cat([watched.protected.angles(a, b) for b in range(1, config.tasks) for a in range(b)]).cos()
    return [
        {"metric": "overlap", "value": float(overlap.square().mean())},
        {"metric": "step", "value": watcher.of_steps},
        {"metric": "drift", "value": watcher.drift[max(watcher.drift)]},
        *({"metric": "drift/course", "value": value, "step": step} for step, value in watcher.drift.items()),
    ]


class Watcher(SupervisedPlugin):
    """Measures in each experience, in float64 and once all plugins before it have acted: ‖U Δ‖ / ‖Δ‖ of the drift since
    its start, after every tenth step and the first, and √(Σ‖U Δ‖² / Σ‖Δ‖²) over its steps."""

    def __init__(self, watched: OrthogonalProjectionPlugin) -> None:
        super().__init__()
        self.watched = watched
        self.drift: dict[int, float] = {}
        self._blocks: Sequence[Block] = ()
        self._start: Values = {}
        self._before: Values = {}
        self._sums = (0.0, 0.0)

    @property
    def of_steps(self) -> float:
        """√(Σ‖U Δ‖² / Σ‖Δ‖²)."""
        inside, total = self._sums
        return (inside / total) ** 0.5

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self._blocks = tuple(self.watched.protected.blocks.values())
        self._start, self._sums, self.drift = _copy(strategy.model), (0.0, 0.0), {}

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        self._before = _copy(strategy.model)

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        now, step = _copy(strategy.model), strategy.clock.train_exp_iterations + 1  # the clock counts later
        inside, total = self._parts(now, self._before)
        self._sums = (self._sums[0] + inside, self._sums[1] + total)
        if step == 1 or step % EVERY == 0:
            inside, total = self._parts(now, self._start)
            self.drift[step] = (inside / total) ** 0.5

    def _parts(self, now: Values, start: Values) -> tuple[float, float]:
        """‖U Δ‖² and ‖Δ‖²."""
        bases = [(block.layout, block.subspace.rows.double()) for block in self._blocks]
        within = (layout.difference(now, start, rows) @ rows.T for layout, rows in bases)
        return (
            sum(float(part.square().sum()) for part in within),
            sum(float((value - start[name]).square().sum()) for name, value in now.items()),
        )


def _copy(model: nn.Module) -> Values:
    return {name: p.detach().to(torch.float64, copy=True) for name, p in model.named_parameters()}
