"""Methods that keep examples to constrain gradients: each experience leaves `fraction` of its examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avalanche.training.plugins import AGEMPlugin, GEMPlugin, SupervisedPlugin

from benchmarks.methods.base import Method

SAMPLED = 256
"""Examples behind A-GEM's reference gradient (Chaudhry et al. 2019, for MNIST)."""


@dataclass(frozen=True)
class GEM(Method):
    """Avalanche's Gradient Episodic Memory (Lopez-Paz & Ranzato 2017); `strength` is the paper's γ."""

    strength: float
    fraction: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [FractionalGEM(self.fraction, self.strength)]


@dataclass(frozen=True)
class AGEM(Method):
    """Avalanche's Averaged GEM (Chaudhry et al. 2019)."""

    fraction: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [FractionalAGEM(self.fraction)]


class FractionalGEM(GEMPlugin):
    """Keeps a fraction of each experience, in place of a fixed number."""

    def __init__(self, fraction: float, strength: float) -> None:
        super().__init__(patterns_per_experience=0, memory_strength=strength)
        self.fraction = fraction

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.patterns_per_experience = round(self.fraction * len(strategy.experience.dataset))
        super().after_training_exp(strategy, **kwargs)


class FractionalAGEM(AGEMPlugin):
    """Keeps a fraction of each experience, in place of a fixed number."""

    def __init__(self, fraction: float) -> None:
        super().__init__(patterns_per_experience=0, sample_size=SAMPLED)
        self.fraction = fraction

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.patterns_per_experience = round(self.fraction * len(strategy.experience.dataset))
        super().after_training_exp(strategy, **kwargs)
