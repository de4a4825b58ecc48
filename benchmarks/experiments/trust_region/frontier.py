"""The methods of the frontier of accuracy against processor time and bytes held: replay, adaptive refresh and both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avalanche.benchmarks.utils import concat_datasets
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ExemplarsBuffer

from avalanche_curv import AdaptiveRefresh, Diagonal, Fisher, RelativeError, SlopeAlone
from avalanche_curv.core.quadratic.policies import Drawing, part_seed
from avalanche_curv.core.risk.batches import random_part
from benchmarks.methods import Method, Ours, Rehearsal

REPLAY, ADAPTIVE, BOTH = "Replay", "adaptive refresh", "both"
TOLERANCE, SHARE = 0.2, 0.3  # chosen on seed 1000; the strength beside Replay


def methods(fraction: float) -> dict[str, Method]:
    """By name: those that store this part of all training examples."""
    policy = AdaptiveRefresh(RelativeError(TOLERANCE), renew=SlopeAlone(512), fraction=fraction)
    ours = Ours(1.0, Fisher(samples=1), Diagonal(), policy)
    return {
        REPLAY: Rehearsal(fraction),
        ADAPTIVE: ours,
        BOTH: WithReplay(SHARE, ours.curvature, ours.structure, policy),
    }


@dataclass(frozen=True)
class WithReplay(Ours):
    """CurvatureEWC beside Avalanche's Replay of the examples that its policy stores."""

    policy: Drawing

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        stored = StoredByPolicy(self.policy, examples)
        return [*super().plugins(examples), ReplayPlugin(mem_size=examples, storage_policy=stored)]


class StoredByPolicy(ExemplarsBuffer):
    """Those examples of each experience that a policy takes in."""

    def __init__(self, policy: Drawing, examples: int) -> None:
        super().__init__(examples)
        self.policy, self.experiences = policy, 0

    def post_adapt(self, agent_state: Any, exp: Any) -> None:
        dataset = exp.dataset
        part = random_part(len(dataset), self.policy.fraction, part_seed(self.policy.seed, self.experiences))
        kept = [self.buffer] if self.experiences else []  # type: ignore[has-type]
        self.buffer = concat_datasets([*kept, dataset.subset(part.tolist())])
        self.experiences += 1

    def resize(self, strategy: Any, new_size: int) -> None:
        """All is kept."""
