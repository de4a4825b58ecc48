"""Elastic weight consolidation without task boundaries."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.options import Fixed, Setting, check_number
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.regularizer import (
    Regularizer,
    at_least_float32,
    by_name,
    cloned,
    extended,
    gradient_of,
    sum_of,
)
from avalanche_curv.plasticity.mitigators.streaming_pass import streamed


class StreamingEWC(Regularizer):
    """R(θ) = ½ Σ_i F_i (θ_i − θ̄_i)², with gradient F (θ − θ̄), F and θ̄ moving averages over the steps.

    F averages the squares of the gradients that training gives, before this penalty is added, and θ̄ the parameters:

        F ← β_F F + (1 − β_F) g²,   F̂ = F / (1 − β_F^t),   θ̄ ← β_θ θ̄ + (1 − β_θ) θ,

    with β_F `importance_decay` and β_θ `anchor_decay`. It is the streaming form of EWC (Kirkpatrick et al. 2017) that
    Elsayed & Mahmood (2024) compare with, who tune both decays; 0.999 for both is this package's default. F is
    corrected for its start at zero, as moments are in Adam; θ̄ starts at the first θ and needs none. In a parameter
    that grows, t counts the gradients of each entry.

    g is the gradient of a mini-batch's mean loss: F is the *batched* empirical Fisher (`BatchedEmpiricalFisher`), which
    shrinks with the batch size, and not the Fisher. Attach it before other regularisers: g holds what they have added
    already. With `every=n` averages take every n-th gradient only. A parameter without a gradient keeps its averages,
    and has no penalty before its first. `CurvatureEWCPlugin` is the form with task boundaries, where the past is
    measured and does not fade.

    Raises ValueError for a decay outside [0, 1); for the other options see `Regularizer`.
    """

    importance_decay = Fixed[float](partial(check_number, at_least=0, below=1, hint="Try 0.999."))  # as corrected for
    anchor_decay = Setting(partial(check_number, at_least=0, below=1, hint="Try 0.999."))
    importances, anchors = Setting[dict[str, Tensor]](by_name), Setting[dict[str, Tensor]](by_name)
    counts = Setting[dict[str, int | Tensor]](by_name)

    def __init__(
        self,
        strength: float,
        *,
        importance_decay: float = 0.999,
        anchor_decay: float = 0.999,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(strength, every=every, include=include, exclude=exclude)
        self.importance_decay, self.anchor_decay = importance_decay, anchor_decay
        self.importances = {}  # F, by name
        self.anchors = {}  # θ̄
        self.counts = {}  # t, by entry where the parameter has extended

    def penalty(self, model: nn.Module) -> Tensor:
        known = {name: p for name, p in self.parameters(model).items() if name in self.counts}
        self._fit(known)
        squares = {name: (at_least_float32(p) - self.anchors[name]).square() for name, p in known.items()}
        return sum_of([
            0.5 * (self.importances[name] / self._correction(name) * square).sum() for name, square in squares.items()
        ])

    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        known = {name: p for name, p in parameters.items() if p.grad is not None or name in self.counts}
        if not known:
            return
        self._fit(known)
        given = [name for name, p in known.items() if p.grad is not None]
        for name in given:
            self.counts[name] = self.counts.get(name, 0) + 1
        gradients, corrections = [gradient_of(p) for p in known.values()], [self._correction(name) for name in known]
        values = [at_least_float32(p.detach()) for p in known.values()]
        importances, anchors = ([of[name] for name in known] for of in (self.importances, self.anchors))
        weights = [weight if isinstance(correction, Tensor) else weight / correction for correction in corrections]
        keep, nearer = self.importance_decay, 1 - self.anchor_decay
        alike = len(given) == len(known) and not any(isinstance(correction, Tensor) for correction in corrections)
        if alike and streamed(gradients, values, importances, anchors, weights, keep, nearer):
            return
        if given:
            squared = [at_least_float32(gradient) for gradient, name in zip(gradients, known) if name in given]
            averaged = [self.importances[name] for name in given]
            torch._foreach_mul_(averaged, keep)
            torch._foreach_addcmul_(averaged, squared, squared, value=1 - keep)
        pulls = [*torch._foreach_sub(values, anchors)]
        for pull, correction in zip(pulls, corrections):
            if isinstance(correction, Tensor):
                pull.div_(correction)
        torch._foreach_addcmul_(gradients, pulls, importances, weights)
        torch._foreach_lerp_(anchors, values, nearer)

    def _fit(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Gives averages the shapes of the parameters: new entries have no importance, and are their own anchors."""
        for name, parameter in parameters.items():
            value, known = at_least_float32(parameter.detach()), self.anchors.get(name)
            if known is None or known.shape != value.shape:
                self.importances[name] = extended(self.importances.get(name), torch.zeros_like(value))
                self.anchors[name] = extended(known, value)
                if known is not None:
                    counts = torch.zeros_like(known) + self.counts.get(name, 0)
                    self.counts[name] = extended(counts, torch.zeros_like(value))
            elif known.device != value.device or known.dtype != value.dtype:
                self.importances[name], self.anchors[name] = self.importances[name].to(value), known.to(value)

    def _correction(self, name: str) -> float | Tensor:
        """The bias correction 1 − β_F^t of F; where t = 0, F is zero and t = 1 serves as well."""
        count = self.counts[name]
        if isinstance(count, Tensor):
            return 1 - self.importance_decay ** count.to(self.anchors[name]).clamp(min=1)
        return 1 - self.importance_decay**count

    def state_dict(self) -> dict[str, Any]:
        averages = {"importances": cloned(self.importances), "anchors": cloned(self.anchors)}
        return {**super().state_dict(), **averages, "counts": copy.deepcopy(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.importances, self.anchors = cloned(state["importances"]), cloned(state["anchors"])
        self.counts = copy.deepcopy(state["counts"])
