"""At which times parameters shrink and are perturbed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from avalanche_curv.core.options import is_count


class When(ABC):
    """At which steps parameters shrink and are perturbed."""

    reuse: int = 1

    @abstractmethod
    def after_step(self, steps: int) -> bool:
        """Whether after the optimiser's step with this number, from 1."""

    def after_task(self) -> bool:
        """Whether at the end of each task."""
        return False


@dataclass(frozen=True)
class EveryStep(When):
    """After each step (Dohare et al. 2024, with weight decay for shrinking).

    Drawing all noise afresh would cost a third of a small network's step. So twice as many normal numbers as needed
    are drawn once for `reuse` steps, and each step takes as many in a row, from a random place and with a random sign.
    Within a step the noise is independent and normal, and numbers of different steps are uncorrelated.
    `reuse=1` draws afresh.
    """

    reuse: int = 64

    def __post_init__(self) -> None:
        if not is_count(self.reuse):
            raise ValueError(f"reuse must be at least 1 step; got {self.reuse!r}. 1 draws noise afresh at each.")

    def after_step(self, steps: int) -> bool:
        return True


@dataclass(frozen=True)
class EverySteps(When):
    """After every `n`-th step."""

    n: int

    def __post_init__(self) -> None:
        if not is_count(self.n):
            raise ValueError(f"n must be at least 1 step; got {self.n!r}. For each step, use EveryStep().")

    def after_step(self, steps: int) -> bool:
        return steps % self.n == 0


@dataclass(frozen=True)
class AfterTask(When):
    """At the end of each task, before the next is learned (Ash & Adams 2020). A loop of one's own has to call
    `after_task(model, optimizer)`."""

    def after_step(self, steps: int) -> bool:
        return False

    def after_task(self) -> bool:
        return True
