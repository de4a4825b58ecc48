"""Elastic weight consolidation without task boundaries."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.options import is_number
from avalanche_curv.plasticity.mitigators.gradients import gradient_of, in_full
from avalanche_curv.plasticity.mitigators.initial import copies, grown
from avalanche_curv.plasticity.mitigators.regularizer import Regularizer
from avalanche_curv.plasticity.mitigators.selection import ParameterSelector


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
    """

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
        for name, decay in (("importance_decay", importance_decay), ("anchor_decay", anchor_decay)):
            if not (is_number(decay) and 0 <= decay < 1):
                raise ValueError(f"{name} must lie in [0, 1), the weight of the past; got {decay!r}. Try 0.999.")
        self.importance_decay, self.anchor_decay = float(importance_decay), float(anchor_decay)
        self.importances: dict[str, Tensor] = {}  # F, by name
        self.anchors: dict[str, Tensor] = {}  # θ̄
        self.counts: dict[str, int | Tensor] = {}  # t, by entry where the parameter has grown

    def penalty(self, model: nn.Module) -> Tensor:
        known = {name: p for name, p in self.parameters(model).items() if name in self.counts}
        self._fit(known)
        terms = [
            0.5 * (self.importances[name] / self._mass(name) * (in_full(p) - self.anchors[name]).square()).sum()
            for name, p in known.items()
        ]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else torch.zeros(())

    def _add(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        known = {name: p for name, p in parameters.items() if p.grad is not None or name in self.counts}
        if not known:
            return
        self._fit(known)
        self._average(known)
        anchors, gradients = [self.anchors[name] for name in known], [gradient_of(p) for p in known.values()]
        values = [in_full(p.detach()) for p in known.values()]
        pulls, masses = [*torch._foreach_sub(values, anchors)], [self._mass(name) for name in known]
        for pull, mass in zip(pulls, masses):
            if isinstance(mass, Tensor):
                pull.div_(mass)
        weights = [weight if isinstance(mass, Tensor) else weight / mass for mass in masses]
        torch._foreach_addcmul_(gradients, pulls, [self.importances[name] for name in known], weights)
        torch._foreach_lerp_(anchors, values, 1 - self.anchor_decay)

    def _average(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """F, with the squares of gradients that training gave."""
        given = {name: in_full(gradient_of(p)) for name, p in parameters.items() if p.grad is not None}
        if not given:
            return
        gradients = [*given.values()]
        importances = [self.importances[name] for name in given]
        torch._foreach_mul_(importances, self.importance_decay)
        torch._foreach_addcmul_(importances, gradients, gradients, value=1 - self.importance_decay)
        for name in given:
            self.counts[name] = self.counts.get(name, 0) + 1

    def _fit(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Averages in the shapes of the parameters: new entries weigh nothing yet, and are their own anchors."""
        for name, parameter in parameters.items():
            value, known = in_full(parameter.detach()), self.anchors.get(name)
            if known is None or known.shape != value.shape:
                self.importances[name] = grown(self.importances.get(name), torch.zeros_like(value))
                self.anchors[name] = grown(known, value)
                if known is not None:
                    counts = torch.zeros_like(known) + self.counts.get(name, 0)
                    self.counts[name] = grown(counts, torch.zeros_like(value))
            elif known.device != value.device or known.dtype != value.dtype:
                self.importances[name], self.anchors[name] = self.importances[name].to(value), known.to(value)

    def _mass(self, name: str) -> float | Tensor:
        """1 − β_F^t, the weight of all that F averages; where that is nothing yet, any."""
        count = self.counts[name]
        if isinstance(count, Tensor):
            return 1 - self.importance_decay ** count.to(self.anchors[name]).clamp(min=1)
        return 1 - self.importance_decay**count

    def state_dict(self) -> dict[str, Any]:
        kept = {"importances": copies(self.importances), "anchors": copies(self.anchors)}
        return {**super().state_dict(), **kept, "counts": copy.deepcopy(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.importances, self.anchors = copies(state["importances"]), copies(state["anchors"])
        self.counts = copy.deepcopy(state["counts"])
