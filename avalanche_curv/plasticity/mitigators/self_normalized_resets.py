"""Self-normalised resets, which recycle a unit that is silent for longer than it usually is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from avalanche_curv.core.options import Fixed, Setting, check_count, check_number
from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.recycler import Recycler, at_all
from avalanche_curv.plasticity.mitigators.regularizer import extended
from avalanche_curv.plasticity.mitigators.unit_graph import HiddenLayer


class SelfNormalizedResets(Recycler):
    """Recycles a unit when it has been silent for τ_i steps in a row, which is rare for this unit (Farias & Jozefiak
    2025, arXiv 2410.20098, in the form of the authors' code, whose unit of time is a batch).

    A unit is silent in a step where it is exactly 0 for all examples and positions of its training pass, as it reaches
    the next layers. After every `every`-th step τ_i is renewed from the n silent runs of unit i that ended since then,
    because it fired or was reset:

        r_i = the least r ≥ 1 with #{runs longer than r} ≤ rejection · n,    τ_i ← r_i if r_i < τ_i, else 2 τ_i,

    at most `longest`, with which it begins. So each unit has a test of its own of the hypothesis that it is as active
    as ever, which errs in a part `rejection` of the silent runs of a unit that is. Runs that a reset ends count with
    the length that they had: where these are more than that part, τ_i doubles. A unit without a run has r_i = 1: it
    never was silent, and the next silent step resets it, or never anything else, and it is reset at once.

    What a reset does to a unit, which layers it concerns and `next_layers` says `Recycler`. Units of activations that
    are never exactly 0, such as tanh or GELU, are never reset.

    The source calls `rejection` its sole hyperparameter; 0.02 is what Han et al. (2026) take for it. Its code renews
    thresholds after some tasks, and bounds them likewise. A step takes the sum of the inputs of each reader, and memory
    for `longest` integers for each unit.

    Raises ValueError for a rejection outside (0, 1), for `every` or `longest` below 1 and an unusable seed; for models
    and `next_layers` see `Recycler`.
    """

    rejection = Setting(partial(check_number, above=0, below=1, hint="It is the part of silent runs that is cut off."))
    every = Setting(partial(check_count, hint="1,000 steps give most units some silent runs."))
    longest = Fixed[int](partial(check_count, hint="A unit that is silent for longer is reset whatever it was before."))

    def __init__(
        self,
        rejection: float = 0.02,
        *,
        every: int = 1000,
        longest: int = 1000,
        next_layers: Mapping[str, str | Iterable[str]] | None = None,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(next_layers=next_layers, include=include, exclude=exclude, seed=seed)
        self.rejection, self.every, self.longest = rejection, every, longest
        self._silences: dict[str, Silences] = {}  # by the name of the layer

    def looks_at(self, step: int) -> bool:
        return True

    def to_recycle(
        self, activities: Mapping[HiddenLayer, list[Float[Tensor, "units"]]]
    ) -> dict[HiddenLayer, Bool[Tensor, "units"]]:
        found: dict[HiddenLayer, Tensor] = {}
        for layer, sums in activities.items():
            silent = at_all(sums, lambda activity: activity == 0)
            known = Silences.of(silent, self.longest, self._silences.get(layer.name))
            self._silences[layer.name] = known
            over = known.after_step(silent)
            if over.any():
                found[layer] = over
            if self.steps % self.every == 0:
                known.renew(self.rejection)
        return found

    def state_dict(self) -> dict[str, Any]:
        silences = {name: {key: value.clone() for key, value in vars(s).items()} for name, s in self._silences.items()}
        return {**super().state_dict(), "silences": silences}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._silences = {
            name: Silences(**{key: value.clone() for key, value in parts.items()})
            for name, parts in state["silences"].items()
        }


@dataclass(eq=False)
class Silences:
    """For each unit of a layer the steps for which it has been `silent` now, its `threshold` τ, and how many `runs` of
    each length from 1 have ended since the threshold was renewed."""

    silent: Int[Tensor, "units"]
    threshold: Int[Tensor, "units"]
    runs: Int[Tensor, "units longest"]

    @classmethod
    def of(cls, units: Bool[Tensor, "units"], longest: int, known: Silences | None) -> Silences:
        """`known`, on the device of `units`; new for units that it lacks, and altogether for a layer that shrank."""
        if known is not None and known.runs.device == units.device and known.runs.shape == (len(units), longest):
            return known
        silent = torch.zeros(len(units), dtype=torch.long, device=units.device)
        runs = torch.zeros(len(units), longest, dtype=torch.int32, device=units.device)
        new = cls(silent, torch.full_like(silent, longest), runs)
        if known is None or known.runs.shape[1] != longest:
            return new
        return cls(*(extended(former, like) for former, like in zip(vars(known).values(), vars(new).values())))

    def after_step(self, silent: Bool[Tensor, "units"]) -> Bool[Tensor, "units"]:
        """Counts a step in which these units were silent; returns those whose run has reached the threshold, which
        ends."""
        self._end(~silent & (self.silent > 0))
        self.silent = torch.where(silent, self.silent + 1, 0)
        over = self.silent >= self.threshold
        self._end(over)
        self.silent = torch.where(over, 0, self.silent)
        return over

    def renew(self, rejection: float) -> None:
        """Sets thresholds by the runs that have ended, and forgets these.

        >>> one = Silences(torch.zeros(1).long(), torch.tensor([8]), torch.tensor([[6, 3, 1, 0, 0, 0, 0, 0]]))
        >>> one.renew(0.1)  # one of ten runs is longer than 2
        >>> one.threshold
        tensor([2])
        >>> one.runs[0, 1] = 4
        >>> one.renew(0.1)  # all runs have been cut at 2
        >>> one.threshold
        tensor([4])
        """
        upto = self.runs.cumsum(1)
        ended = upto[:, -1:]
        usual = (ended - upto > rejection * ended).sum(1) + 1
        self.threshold = torch.where(usual < self.threshold, usual, 2 * self.threshold).clamp(max=self.runs.shape[1])
        self.runs = torch.zeros_like(self.runs)

    def _end(self, ending: Bool[Tensor, "units"]) -> None:
        """Counts the present run of these units, which ends."""
        lengths = (self.silent - 1).clamp(min=0)
        self.runs.scatter_add_(1, lengths[:, None], ending[:, None].to(self.runs.dtype))
