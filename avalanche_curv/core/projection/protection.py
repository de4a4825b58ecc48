"""Which directions of a task are protected: the interface of recipes, and of what they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.projection.blocks import Layout
from avalanche_curv.core.projection.subspace import Subspace
from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace


class Finding(ABC):
    """The directions that one task needs in one matrix of parameters, `layout`. `key` names that matrix from task to
    task.
    """

    key: str
    layout: Layout

    @abstractmethod
    def added_to(self, subspace: Subspace, outer: Layout) -> Subspace:
        """The subspace of earlier tasks, over the columns of `outer`, with the directions of this one."""


@dataclass(frozen=True)
class TaskFindings:
    """What one task needs: `findings`, one for each matrix of parameters, and the names of parameters that it needs but
    of which no directions are known, `uncovered`."""

    findings: Sequence[Finding]
    uncovered: tuple[str, ...] = ()


@dataclass(frozen=True)
class BasisBound:
    """How much one task may add to the basis of one block: up to `most` directions of `dimension` numbers."""

    dimension: int
    most: int


class Protection(ABC):
    """A recipe for the directions that a task needs, and that are closed to later ones.

    One of your own returns them by block (`find`), and says beforehand how many they may be (`bounds`).
    """

    @abstractmethod
    def find(self, risk: EmpiricalRisk, experience: int) -> TaskFindings:
        """The directions that a task needs, from its `risk`, frozen at the end of its training; `experience` is its
        number, from 0. Raises NonFiniteCurvatureError where the model or its inputs hold NaN or infinity."""

    def check_loss(self, loss: ExampleLoss) -> None:  # noqa: B027  most work with any known loss
        """Raises ValueError for a loss whose directions this recipe cannot compute; called before training."""

    @abstractmethod
    def bounds(self, space: ParameterSpace) -> dict[str, BasisBound]:
        """How much one task of a model with these parameters may add, by the keys of its findings."""


def some_of(risk: EmpiricalRisk, count: int | None, seed: int, experience: int) -> EmpiricalRisk:
    """The risk of `count` of the examples of `risk`, drawn for each experience by `seed`, in batches of unchanged size;
    of all of them where `count` is None or they are fewer."""
    if count is None or count >= risk.examples:
        return risk
    chosen = risk.select(random_part(risk.examples, count / risk.examples, part_seed(seed, experience)))
    return chosen.rebatched(len(next(iter(risk))[1]))
