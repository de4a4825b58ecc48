"""What of a task is protected: the recipe, and what it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from avalanche_curv.core.projection.blocks import Layout
from avalanche_curv.core.projection.subspace import Subspace
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.losses import ExampleLoss
from avalanche_curv.core.risk.parameters import ParameterSpace


class Finding(ABC):
    """What a recipe finds of one task in one matrix of parameters, which goes by `key` from task to task."""

    key: str
    layout: Layout

    @abstractmethod
    def joins(self, subspace: Subspace, outer: Layout) -> Subspace:
        """The subspace of earlier tasks, over the columns of `outer`, with what this one adds."""


@dataclass(frozen=True)
class TaskFindings:
    """What matters to one task: its findings, and the names of parameters that matter but of which no directions are
    known."""

    findings: Sequence[Finding]
    uncovered: tuple[str, ...] = ()


@dataclass(frozen=True)
class BasisBound:
    """How much of a block a recipe may add: up to `most` directions of `dimension` numbers."""

    dimension: int
    most: int


class Protection(ABC):
    """Which directions matter to a task, and so are closed to later ones.

    A recipe of your own names them by block (`find`), and says beforehand how many they may be (`demands`).
    """

    @abstractmethod
    def find(self, risk: EmpiricalRisk, experience: int) -> TaskFindings:
        """What matters to the task whose risk, frozen at the end of its training, is given; tasks count from 0."""

    def check_loss(self, loss: ExampleLoss) -> None:  # noqa: B027  most need no more of a loss than that it is known
        """Raises ValueError for a loss that the directions cannot be had of."""

    @abstractmethod
    def demands(self, space: ParameterSpace) -> dict[str, BasisBound]:
        """By the keys of `find`, how much one task of a model with these parameters may add."""


def some_of(risk: EmpiricalRisk, count: int | None, seed: int, experience: int) -> EmpiricalRisk:
    """The risk of `count` of its examples, drawn for each experience by `seed`, in batches of the same size; of all of
    them where they are fewer."""
    if count is None or count >= risk.examples:
        return risk
    chosen = risk.select(random_part(risk.examples, count / risk.examples, part_seed(seed, experience)))
    return chosen.rebatched(len(next(iter(risk))[1]))
