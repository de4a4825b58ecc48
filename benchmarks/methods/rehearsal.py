"""Methods that store a fraction of the examples, to train on them or to constrain gradients by them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from avalanche.training import DER, ICaRL
from avalanche.training.plugins import AGEMPlugin, GDumbPlugin, GEMPlugin, ReplayPlugin, SupervisedPlugin
from torch import Tensor, nn

from avalanche_curv.core.quadratic.policies import part_seed
from avalanche_curv.core.risk.batches import random_part
from benchmarks.methods.base import Learner, Method, common
from benchmarks.training import stacked

SAMPLED = 256  # examples behind A-GEM's reference gradient (Chaudhry et al. 2019, for MNIST)


@dataclass(frozen=True)
class Rehearsal(Method):
    """Avalanche's Replay with a memory of `fraction` of all examples."""

    fraction: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [ReplayPlugin(mem_size=round(self.fraction * examples))]


@dataclass(frozen=True)
class GDumb(Method):
    """Avalanche's GDumb (Prabhu et al. 2020): trains anew in each experience, on a class-balanced memory alone."""

    fraction: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [GDumbPlugin(mem_size=round(self.fraction * examples))]


@dataclass(frozen=True)
class DarkReplay(Method):
    """Avalanche's DER (Buzzega et al. 2020): replay of logits with weight `strength` (α) and of labels with weight
    `labels` (β, positive in DER++)."""

    strength: float
    fraction: float
    labels: float = 0.0

    @property
    def strategy(self) -> type:
        return DER

    def options(self, learner: Learner) -> dict[str, Any]:
        memory = round(self.fraction * learner.examples)
        return {"mem_size": memory, "alpha": self.strength, "beta": self.labels}


@dataclass(frozen=True)
class NearestMean(Method):
    """Avalanche's iCaRL (Rebuffi et al. 2017), with the last linear layer of the model as its classifier.

    It trains with a loss of its own, binary cross-entropy with distillation, in place of the learner's criterion.
    """

    fraction: float
    has_example_loss: ClassVar[bool] = False

    def build(self, learner: Learner) -> Any:
        """Raises ValueError where the model has no linear layer to split before."""
        features, classifier = split(learner.model)
        return ICaRL(
            feature_extractor=features,
            classifier=classifier,
            optimizer=learner.optimizer,
            memory_size=round(self.fraction * learner.examples),
            buffer_transform=None,
            fixed_memory=True,
            **common(learner, [ClassOrder(learner.classes)]),
        )


class ClassOrder(SupervisedPlugin):
    """The classes in the order in which they came, which iCaRL asks an experience's benchmark for: only one of
    Avalanche's older kind knows."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.order: list[int] = []
        self.counts: list[int] = []

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        new = [int(label) for label in strategy.experience.classes_in_this_experience]
        self.order += new
        self.counts.append(len(new))
        strategy.experience.benchmark = SimpleNamespace(
            n_classes_per_exp=[*self.counts, self.classes - len(self.order)], classes_order=self.order
        )


def split(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The model without its last linear layer, which is replaced in place by an identity, and that layer.

    >>> features, classifier = split(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)))
    >>> features(torch.zeros(1, 3)).shape, classifier
    (torch.Size([1, 5]), Linear(in_features=5, out_features=2, bias=True))
    """
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or not linear[-1][0]:
        raise ValueError("iCaRL splits a model before its last linear layer, and this model has none inside it.")
    name, classifier = linear[-1]
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    return model, classifier


@dataclass(frozen=True)
class MemoryReplay(Method):
    """Adds strength · Σ_t L_t(θ) of stored examples, all of them at each step: what a quadratic model stands for.

    The examples are those that a policy with the same `fraction` and `seed` stores.
    """

    strength: float
    fraction: float
    seed: int = 0

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        return [MemoryLoss(self.strength, self.fraction, self.seed)]


class MemoryLoss(SupervisedPlugin):
    """Adds strength · Σ_t L_t(θ) of the stored examples of each experience t to the loss, all of them at each step."""

    def __init__(self, strength: float, fraction: float, seed: int) -> None:
        super().__init__()
        self.strength, self.fraction, self.seed = strength, fraction, seed
        self.memory: list[tuple[Tensor, Tensor]] = []

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        if self.memory:
            inputs, targets = zip(*self.memory)
            outputs = strategy.model(torch.cat(inputs)).split([len(y) for y in targets])
            losses = [strategy._criterion(out, y) for out, y in zip(outputs, targets)]
            strategy.loss = strategy.loss + self.strength * torch.stack(losses).sum()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        dataset = strategy.experience.dataset.eval()
        part = random_part(len(dataset), self.fraction, part_seed(self.seed, len(self.memory)))
        self.memory.append(stacked(dataset, part.tolist()))


@dataclass(frozen=True)
class GEM(Method):
    """Avalanche's Gradient Episodic Memory (Lopez-Paz & Ranzato 2017); `strength` is the paper's γ. Each experience
    leaves `fraction` of its examples."""

    strength: float
    fraction: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        plugin = GEMPlugin(patterns_per_experience=0, memory_strength=self.strength)
        return [PartOfEach(plugin, self.fraction), plugin]


@dataclass(frozen=True)
class AGEM(Method):
    """Avalanche's Averaged GEM (Chaudhry et al. 2019). Each experience leaves `fraction` of its examples."""

    fraction: float

    def plugins(self, examples: int) -> list[SupervisedPlugin]:
        plugin = AGEMPlugin(patterns_per_experience=0, sample_size=SAMPLED)
        return [PartOfEach(plugin, self.fraction), plugin]


class PartOfEach(SupervisedPlugin):
    """Lets a plugin that comes after it keep a fraction of each experience, in place of a fixed number."""

    def __init__(self, plugin: Any, fraction: float) -> None:
        super().__init__()
        self.plugin, self.fraction = plugin, fraction

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.plugin.patterns_per_experience = round(self.fraction * len(strategy.experience.dataset))
