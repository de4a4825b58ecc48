"""What is kept of languages seen, and what it adds to the loss of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from avalanche_curv.core import Accumulate, Curvature, EmpiricalRisk, Past, Structure
from avalanche_curv.core.quadratic.penalty import Penalty
from benchmarks.strategies import decades

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

    @property
    def grid(self) -> tuple[float, ...]:
        return decades(-3, 0)

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


class EveryByte(nn.Module):
    """A model as curvature sees it: the loss of a window is the mean over the bytes after each of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Int[Tensor, "N T"]) -> Tensor:
        return self.module(tokens)

    @staticmethod
    def targets(following: Int[Tensor, "N T"]) -> Tensor:
        return following


class LastByte(EveryByte):
    """The loss of a window is that of the byte after the last alone, where a pass for each of T times 256 outputs would
    take too long."""

    def forward(self, tokens: Int[Tensor, "N T"]) -> Tensor:
        return self.module(tokens)[:, :, -1]

    @staticmethod
    def targets(following: Int[Tensor, "N T"]) -> Tensor:
        return following[:, -1]


@dataclass(frozen=True)
class Quadratic(Method):
    """λ q(θ), with q the sum of the languages' quadratic models. The curvature is that of so many windows."""

    curvature: Curvature
    structure: Structure
    windows: int
    strengths: tuple[float, ...]
    seen: type[EveryByte] = EveryByte

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
        inputs, following = windows(data, own.windows, context, generator)
        batches = list(zip(inputs.split(AT_ONCE), own.seen.targets(following).split(AT_ONCE)))
        risk = EmpiricalRisk.snapshot(own.seen(model), nn.CrossEntropyLoss(), batches)
        self.past = Accumulate().absorb(self.past, risk, own.curvature, own.structure)
        if self.past.model is not None:
            self.penalty = Penalty(self.past.model, self.strength)

    def term(self, model: nn.Module) -> Tensor | float:
        return 0.0 if self.penalty is None else self.penalty(self.method.seen(model))

    @property
    def nbytes(self) -> int:
        model = self.past.model
        return 0 if model is None else model.anchor.nbytes + model.curvature.nbytes
