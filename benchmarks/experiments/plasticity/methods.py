"""What is compared: what works against the loss of plasticity, as a plain description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from avalanche_curv.plasticity.mitigators import Mitigator, Regularizer
from avalanche_curv.plasticity.mitigators.crelu import CReLU
from avalanche_curv.plasticity.mitigators.parseval import Parseval
from avalanche_curv.plasticity.mitigators.redo import ReDO
from avalanche_curv.plasticity.mitigators.shrink_perturb import AfterTask, ShrinkAndPerturb
from benchmarks.experiments.plasticity.presets import Setting


@dataclass(frozen=True)
class Method:
    """Plain training with ReLU. `begins_anew`: a new network and optimiser for each task."""

    begins_anew: ClassVar[bool] = False

    def activation(self) -> nn.Module:
        """A new nonlinearity for each layer."""
        return nn.ReLU()

    def mitigator(self, setting: Setting, seed: int) -> Mitigator | None:
        return None

    def begin_task(self, mitigator: Mitigator | None, setting: Setting, number: int, steps: int) -> None:
        """Called before task `number`, from 0, of so many steps: for methods that know when tasks begin."""


@dataclass(frozen=True)
class FromScratch(Method):
    """The reference: what a network that has learned nothing before makes of each task."""

    begins_anew = True


@dataclass(frozen=True)
class Concatenated(Method):
    """CReLU in the place of ReLU after as many units, so that the layers after it read twice as many."""

    def activation(self) -> nn.Module:
        return CReLU()


@dataclass(frozen=True)
class Regularised(Method):
    """A regulariser of all parameters."""

    regularizer: type[Regularizer]
    strength: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return self.regularizer(self.strength)


@dataclass(frozen=True)
class Orthogonal(Method):
    """Parseval regularisation of all layers but the last, as in its source."""

    strength: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return Parseval(self.strength, exclude=(setting.network.output,))


@dataclass(frozen=True)
class Perturbed(Method):
    """θ ← (1 − s) θ + s ε at every step, ε of the spread of initial values: s of the way to a network drawn anew."""

    strength: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return ShrinkAndPerturb(self.strength, self.strength, seed=seed)


@dataclass(frozen=True)
class PerturbedAfterTask(Method):
    """θ ← (1 − s) θ + s ε at the end of each task, which it has to know, s = `part`: the form of Ash & Adams 2020."""

    part: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return ShrinkAndPerturb(self.part, self.part, when=AfterTask(), seed=seed)


@dataclass(frozen=True)
class Recycled(Method):
    """ReDO once a task, after half of its steps (rounded up), so that accuracy is not measured just after."""

    threshold: float

    def mitigator(self, setting: Setting, seed: int) -> Mitigator:
        return ReDO(self.threshold, every=setting.task_steps, seed=seed)

    def begin_task(self, mitigator: Mitigator | None, setting: Setting, number: int, steps: int) -> None:
        """Set the mitigator's count of steps so that its period ends half-way through a task of any length."""
        if mitigator is not None:
            due = (number + 1) * setting.task_steps
            mitigator.load_state_dict(mitigator.state_dict() | {"steps": due - (steps - steps // 2)})
