"""What is kept of languages seen, and what it adds to the loss of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from avalanche_curv.core import (
    BatchedEmpiricalFisher,
    Curvature,
    Diagonal,
    EmpiricalRisk,
    Merge,
    Past,
    Policy,
    Structure,
)
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.experiments.languages.gpt import Adapted, merged

Windows = tuple[Int[Tensor, "N T"], Int[Tensor, "N T"]]
"""N windows of T bytes, and the byte after each of theirs."""

AT_ONCE = 32  # examples of a pass


def windows(data: UInt8[Tensor, "n"], count: int, context: int, generator: torch.Generator) -> Windows:
    """So many windows of `context` + 1 bytes that begin anywhere."""
    starts = torch.randint(len(data) - context, (count, 1), generator=generator)
    found = data[starts + torch.arange(context + 1)].long()
    return found[:, :-1], found[:, 1:]


class Memory(ABC):
    """What one run keeps."""

    @abstractmethod
    def keep(self, model: nn.Module, data: UInt8[Tensor, "n"], context: int, generator: torch.Generator) -> None:
        """At the end of the training on a language, of which `data` are the bytes."""

    @abstractmethod
    def term(self, model: nn.Module) -> Tensor | float:
        """What is added to the loss of a step."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """The size of all that is kept."""


class Method(ABC):
    """A frozen value from which each run makes its memory."""

    @property
    def grid(self) -> tuple[float, ...]:
        """The strengths that are tried; empty where there is nothing to tune."""
        return ()

    @abstractmethod
    def memory(self, strength: float) -> Memory:
        """An empty one. The strength is that of its term."""

    def stages(self, first: str, others: Sequence[str]) -> list[tuple[str, ...]]:
        """What a model that has learned the first language is trained on in turn."""
        return [(name,) for name in others]


class _Nothing(Memory):
    nbytes = 0

    def keep(self, model: nn.Module, data: Tensor, context: int, generator: torch.Generator) -> None: ...

    def term(self, model: nn.Module) -> float:
        return 0.0


@dataclass(frozen=True)
class Naive(Method):
    """Nothing is kept."""

    def memory(self, strength: float) -> Memory:
        return _Nothing()


@dataclass(frozen=True)
class Joint(Naive):
    """Naive on all languages at once, with as many steps in all: a bound."""

    def stages(self, first: str, others: Sequence[str]) -> list[tuple[str, ...]]:
        return [(first, *others)]


@dataclass(frozen=True)
class Replay(Method):
    """λ times the loss on so many windows, of the first `kept` bytes of the languages seen in equal parts."""

    kept: int
    windows: int

    @property
    def grid(self) -> tuple[float, ...]:
        return 0.1, 0.3, 1.0, 3.0

    def memory(self, strength: float) -> Memory:
        return _Replay(self, strength)


class _Replay(Memory):
    def __init__(self, method: Replay, strength: float) -> None:
        self.method, self.strength = method, strength
        self.texts: list[Tensor] = []

    def keep(self, model: nn.Module, data: Tensor, context: int, generator: torch.Generator) -> None:
        share = self.method.kept // (len(self.texts) + 1)
        self.texts = [text[:share].clone() for text in (*self.texts, data)]
        self.context, self.generator = context, generator

    def term(self, model: nn.Module) -> Tensor | float:
        if not self.texts:
            return 0.0
        each = -(-self.method.windows // len(self.texts))
        drawn = [windows(text, each, self.context, self.generator) for text in self.texts]
        inputs, targets = (torch.cat(part)[: self.method.windows] for part in zip(*drawn))
        return self.strength * nn.functional.cross_entropy(model(inputs), targets)

    @property
    def nbytes(self) -> int:
        return sum(text.nbytes for text in self.texts)


@dataclass(frozen=True)
class L2(Method):
    """λ/2 ‖θ − a‖², with a the weights at the end of the last language."""

    strengths: tuple[float, ...]

    @property
    def grid(self) -> tuple[float, ...]:
        return self.strengths

    def memory(self, strength: float) -> Memory:
        return _L2(strength)


class _L2(Memory):
    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.anchors: list[Tensor] = []

    def keep(self, model: nn.Module, data: Tensor, context: int, generator: torch.Generator) -> None:
        self.anchors = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def term(self, model: nn.Module) -> Tensor | float:
        own = (p for p in model.parameters() if p.requires_grad)
        return self.strength / 2 * sum((p - anchor).square().sum() for p, anchor in zip(own, self.anchors))

    @property
    def nbytes(self) -> int:
        return sum(anchor.nbytes for anchor in self.anchors)


class Seen(ABC):
    """Of which outputs and which weights a quadratic model is."""

    @abstractmethod
    def risk(self, model: nn.Module, batches: Sequence[Windows]) -> EmpiricalRisk:
        """The mean loss over windows, as curvature sees it."""

    @abstractmethod
    def term(self, penalty: Penalty, model: nn.Module) -> Tensor:
        """λ q, with its gradient in what is trained."""


@dataclass(frozen=True)
class EveryByte(Seen):
    """The weights that are trained. The loss of a window is the mean over the bytes after each of its own."""

    def risk(self, model: nn.Module, batches: Sequence[Windows]) -> EmpiricalRisk:
        return EmpiricalRisk.snapshot(model, nn.CrossEntropyLoss(), batches)

    def term(self, penalty: Penalty, model: nn.Module) -> Tensor:
        return penalty(model)


@dataclass(frozen=True)
class LastByte(Seen):
    """The weights that are trained. The loss of a window is that of the byte after the last alone, where a pass for
    each of T times 256 outputs would take too long."""

    def risk(self, model: nn.Module, batches: Sequence[Windows]) -> EmpiricalRisk:
        last = [(inputs, following[:, -1]) for inputs, following in batches]
        return EmpiricalRisk.snapshot(
            model, nn.CrossEntropyLoss(), last, forward=lambda model, inputs: model(inputs)[:, :, -1]
        )

    def term(self, penalty: Penalty, model: nn.Module) -> Tensor:
        return penalty(model)


@dataclass(frozen=True)
class Merged(Seen):
    """The weights W + B A of adapted layers. In A and B a quadratic model sees nothing of A where B = 0, as after the
    first language, and misses the product of both displacements; in W + B A it misses neither, at the size of W."""

    def risk(self, model: nn.Module, batches: Sequence[Windows]) -> EmpiricalRisk:
        return EveryByte().risk(merged(model), batches)

    def term(self, penalty: Penalty, model: nn.Module) -> Tensor:
        """By the chain rule: its gradient is that of Σ ⟨∇q, W + B A⟩ with ∇q constant."""
        own = {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, Adapted)}
        weights = penalty.space.cut(own)
        slopes = penalty.gradients([weight.detach() for weight in weights])
        value = penalty.strength * penalty.last(slopes)
        along = torch.stack([(slope * weight).sum() for slope, weight in zip(slopes, weights)]).sum()
        return value + along - along.detach()


@dataclass(frozen=True)
class Quadratic(Method):
    """λ q(θ), with q the quadratic model of the languages' losses that the policy keeps: all around the newest weights,
    unless another is given. The curvature is that of so many windows."""

    curvature: Curvature
    structure: Structure
    windows: int
    strengths: tuple[float, ...]
    seen: Seen = EveryByte()
    policy: Policy = field(default_factory=Merge)

    @property
    def grid(self) -> tuple[float, ...]:
        return self.strengths

    def memory(self, strength: float) -> Memory:
        return _Quadratic(self, strength)


class _Quadratic(Memory):
    def __init__(self, method: Quadratic, strength: float) -> None:
        self.method, self.strength = method, strength
        self.past = Past()
        self.penalty: Penalty | None = None

    def keep(self, model: nn.Module, data: Tensor, context: int, generator: torch.Generator) -> None:
        own = self.method
        drawn = (part.split(AT_ONCE) for part in windows(data, own.windows, context, generator))
        risk = own.seen.risk(model, list(zip(*drawn)))
        self.past = own.policy.absorb(self.past, risk, own.curvature, own.structure)
        if self.past.model is not None:
            self.penalty = Penalty(self.past.model, self.strength)

    def term(self, model: nn.Module) -> Tensor | float:
        return 0.0 if self.penalty is None else self.method.seen.term(self.penalty, model)

    @property
    def nbytes(self) -> int:
        model = self.past.model
        return 0 if model is None else model.anchor.nbytes + model.curvature.nbytes


def as_forks(batch: int, windows: int, strengths: tuple[float, ...]) -> Quadratic:
    """EWC as forks of trainers have it: F = Σ_t (1/B) Σ_b ḡ_b², with ḡ_b the mean gradient of mini-batch b at the
    labels of the text, and λ/2 Σ_i F_i (θ_i − a_i)² with a single anchor a, the newest weights.

    So does `EWCTrainer` of https://github.com/which47/LLMCL, to which trl's issue 2428 points. There F adds up during
    training, the gradient of the penalty included and step k weighted by 1/k, with no pass of its own; other code has
    the pass that this has, and mostly no ½, which changes λ alone. A batch of N windows makes ḡ², but for the mean
    gradient itself, N times smaller than the squares of single gradients (`EmpiricalFisher`), hence the large λ.
    """
    return Quadratic(BatchedEmpiricalFisher(batch), Diagonal(), windows, strengths)
