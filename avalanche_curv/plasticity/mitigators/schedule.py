"""Schedules, which say at what times a mitigator changes parameters, and the mitigators that have one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.optim import Optimizer

from avalanche_curv.core.options import Setting, check_count, check_kind, settle
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.base import Mitigator


class Schedule(ABC):
    """The times at which a `ScheduledMitigator` works; `reuse` is the number of steps that share one pool of noise."""

    reuse: int = 1

    @abstractmethod
    def after_step(self, steps: int) -> bool:
        """Whether to work after the optimiser's step number `steps`, counted from 1."""

    def after_task(self) -> bool:
        """Whether to work at the end of each task."""
        return False


@dataclass(frozen=True)
class EveryStep(Schedule):
    """After each step (for `ShrinkAndPerturb` as in Dohare et al. 2024, with weight decay for shrinking).

    Drawing all of its noise afresh would cost a third of a small network's step. So twice as many normal numbers as
    needed are drawn once for `reuse` steps, and each step takes as many in a row, from a random place and with a random
    sign. Within a step the noise is independent and normal, and numbers of different steps are uncorrelated.
    `reuse=1` draws afresh. Raises ValueError for `reuse` below 1.
    """

    reuse: int = 64

    def __post_init__(self) -> None:
        settle(self, reuse=partial(check_count, hint="1 draws noise afresh at each step."))

    def after_step(self, steps: int) -> bool:
        return True


@dataclass(frozen=True)
class EverySteps(Schedule):
    """After every `n`-th step. Raises ValueError for `n` below 1."""

    n: int

    def __post_init__(self) -> None:
        settle(self, n=partial(check_count, hint="For each step, use EveryStep()."))

    def after_step(self, steps: int) -> bool:
        return steps % self.n == 0


@dataclass(frozen=True)
class AfterTask(Schedule):
    """At the end of each task, before the next is learned. `MitigatorPlugin` does so by itself; other loops have to
    call the mitigator's `after_task(model, optimizer)`."""

    def after_step(self, steps: int) -> bool:
        return False

    def after_task(self) -> bool:
        return True


class ScheduledMitigator(Mitigator):
    """Changes the selected parameters themselves, at the times that `when` says. A new one defines `apply`.

    Raises TypeError for another schedule.
    """

    when = Setting[Schedule](partial(check_kind, kind=Schedule, example="EveryStep(), EverySteps(n) or AfterTask()"))

    def __init__(
        self,
        when: Schedule,
        *,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        self.when = when

    @abstractmethod
    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Changes the selected parameters once, now; given `optimizer`, only those that it steps."""

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().after_step(model, optimizer)
        if self.when.after_step(self.steps):
            self.apply(model, optimizer)

    @property
    def acts_between_tasks(self) -> bool:
        return self.when.after_task()

    def after_task(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.when.after_task():
            self.apply(model, optimizer)
