"""Shrink and perturb: parameters are drawn towards zero and given fresh noise, at the times that a schedule says."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.options import check_seed, is_count, is_number
from avalanche_curv.plasticity.mitigators.base import Mitigator
from avalanche_curv.plasticity.mitigators.initial import initial_laws
from avalanche_curv.plasticity.mitigators.selection import ParameterSelector


class Schedule(ABC):
    """At which steps parameters shrink and are perturbed."""

    reuse: int = 1

    @abstractmethod
    def after_step(self, steps: int) -> bool:
        """Whether after the optimiser's step with this number, from 1."""

    def after_task(self) -> bool:
        """Whether at the end of each task."""
        return False


@dataclass(frozen=True)
class EveryStep(Schedule):
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
class EverySteps(Schedule):
    """After every `n`-th step."""

    n: int

    def __post_init__(self) -> None:
        if not is_count(self.n):
            raise ValueError(f"n must be at least 1 step; got {self.n!r}. For each step, use EveryStep().")

    def after_step(self, steps: int) -> bool:
        return steps % self.n == 0


@dataclass(frozen=True)
class AfterTask(Schedule):
    """At the end of each task, before the next is learned (Ash & Adams 2020). A loop of one's own has to call
    `after_task(model, optimizer)`."""

    def after_step(self, steps: int) -> bool:
        return False

    def after_task(self) -> bool:
        return True

AT_LEAST = 2**16  # places where the noise of a step may begin, in a pool


class ShrinkAndPerturb(Mitigator):
    """θ ← c + (1 − shrink) (θ − c) + noise · ε, with ε fresh from N(0, std²) (Ash & Adams 2020, there with c = 0).

    std is that of torch's initial values for the layer (`initial_laws`), such as 1 / √(3 fan_in) for the weights and
    biases of linear layers and convolutions, so that `noise` is relative to the initial scale; a model that draws
    values of its own is not known. What torch starts without spread gets no noise: a norm layer's parameters, the
    biases of attention. A norm layer's scale shrinks to c = 1, its initial value, all else to c = 0. A class token, a
    positional or token embedding is shrunk only. What has no role is left alone: slopes of PReLU, single numbers,
    vectors of other modules but their biases, and what a weight is computed from (`weight_norm`).

    `when`: `EveryStep()` by default; `EverySteps(n)`; `AfterTask()`. With shrink 1 and noise 1 the network starts
    anew. At rest under steps alone, entries spread by noise · std / √(2 shrink) for small shrink: the initial scale is
    kept by noise = √(2 shrink). Ash & Adams keep 0.6 or so at each task; each step takes about 1e-6 to 1e-4.
    The optimiser's state stays. Noise comes from `seed` and the number of times alone.

    Parameters in half precision round: shrinking by less than about 2e-3 (bfloat16) or 2e-4 (float16) at a time
    changes nothing. Keep them in float32, as `torch.autocast` does, or shrink more at fewer times.
    """

    def __init__(
        self,
        shrink: float,
        noise: float,
        *,
        when: Schedule = EveryStep(),
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(include=include, exclude=exclude)
        if not (is_number(shrink) and 0 <= shrink <= 1):
            raise ValueError(f"shrink must lie in [0, 1], the part that is taken away; got {shrink!r}.")
        if not (is_number(noise) and noise >= 0):
            raise ValueError(f"noise must be a finite number, at least 0; got {noise!r}. 1 is the initial scale.")
        if not isinstance(when, Schedule):
            raise TypeError(f"when must be EveryStep(), EverySteps(n) or AfterTask(); got {when!r}.")
        check_seed(seed)
        self.shrink, self.noise, self.when, self.seed = float(shrink), float(noise), when, seed
        self.times = 0
        self._chosen: list[Tensor] = []  # the last parameters
        self._laws: dict[Tensor, tuple[float, float]] = {}  # of those that have one
        self._pool: tuple[tuple[int, int], Tensor] | None = None  # made from the seed when it is needed

    def after_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().after_step(model, optimizer)
        if self.when.after_step(self.steps):
            self.apply(model, optimizer)

    def after_task(self, model: nn.Module, optimizer: Optimizer) -> None:
        if self.when.after_task():
            self.apply(model, optimizer)

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Shrink and perturb once, now: the parameters that the optimiser steps, or all without one."""
        chosen: list[Tensor] = [*self.parameters(model, optimizer).values()]
        if len(self._chosen) != len(chosen) or any(p is not known for p, known in zip(chosen, self._chosen)):
            laws = initial_laws(model)
            self._chosen, self._laws = chosen, {p: laws[p] for p in chosen if p in laws}
        if self.shrink and self._laws:
            torch._foreach_mul_([*self._laws], 1 - self.shrink)
            for scale in (p for p, (centre, _) in self._laws.items() if centre):
                scale.add_(self.shrink)
        noisy = [(p, spread) for p, (_, spread) in self._laws.items() if spread]
        if self.noise and noisy:
            self._perturb(noisy)
        self.times += 1

    def _perturb(self, noisy: list[tuple[Tensor, float]]) -> None:
        size = sum(p.numel() for p, _ in noisy)
        begin, sign = self._window(size)
        pool = self._drawn(size, noisy[0][0].device)[begin : begin + size]
        for (parameter, spread), part in zip(noisy, pool.split([p.numel() for p, _ in noisy])):
            parameter.add_(part.view(parameter.shape).to(parameter.device), alpha=sign * self.noise * spread)

    def _window(self, size: int) -> tuple[int, int]:
        """Where this time's noise begins in the pool, and its sign."""
        if self.when.reuse == 1:
            return 0, 1
        draw = random.Random(f"{self.seed} {self.times}")
        return draw.randrange(max(size, AT_LEAST)), draw.choice((-1, 1))

    def _drawn(self, size: int, device: torch.device) -> Tensor:
        """The pool of standard normal numbers that serves this time."""
        key = (self.times // self.when.reuse, size)
        if self._pool is None or self._pool[0] != key or self._pool[1].device != device:
            generator = torch.Generator(device).manual_seed(random.Random(f"{self.seed} {key[0]}").getrandbits(32))
            whole = size if self.when.reuse == 1 else size + max(size, AT_LEAST)
            pool = torch.randn(whole, generator=generator, device=device, dtype=torch.float32)
            self._pool = key, pool
        return self._pool[1]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "times": self.times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.times, self._pool = state["times"], None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_pool": None, "_chosen": [], "_laws": {}}
