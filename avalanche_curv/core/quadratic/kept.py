"""The past that a learner keeps: how it takes in tasks, and what is refused before they are trained."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from avalanche_curv.core.curvature.base import Curvature
from avalanche_curv.core.options import Fixed, Setting, check_kind, check_number, in_short
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.quadratic.penalty import check_bounded
from avalanche_curv.core.quadratic.policies import Past, Policy
from avalanche_curv.core.quadratic.strength import StrengthRule
from avalanche_curv.core.risk.batches import untouched_randomness
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import unwrapped
from avalanche_curv.core.structures import Structure

LOG = logging.getLogger("avalanche_curv")


class KeptPast:
    """A past and what makes it of tasks: a curvature, a structure, a policy, and a rule where one chooses the strength.

    It may be set at any time. Where something raises, it stays as it was. Raises TypeError or ValueError for unusable
    options and for a past that the policy cannot go on from.
    """

    past = Setting[Past](partial(check_kind, kind=Past, example="Past()"))
    curvature = Fixed[Curvature](partial(check_kind, kind=Curvature, example="Fisher()"))
    structure = Fixed[Structure](partial(check_kind, kind=Structure, example="Diagonal()"))
    policy = Fixed[Policy](partial(check_kind, kind=Policy, example="Accumulate()"))
    rule = Fixed[StrengthRule | None]()

    def __init__(
        self, past: Past, curvature: Curvature, structure: Structure, policy: Policy, rule: StrengthRule | None
    ) -> None:
        self.curvature, self.structure, self.policy, self.rule = curvature, structure, policy, rule
        check_bounded(curvature, structure)
        self.past = past
        self._own: Past | None = None  # the newest that was made here, and not given or loaded
        self.check_past(past)

    def check_past(self, past: Past) -> None:
        """Raises ValueError for a past that the policy cannot go on from, and TypeError for one, given or loaded, of
        another structure, unless it is estimated anew from what it stores."""
        self.policy.check_past(past)
        if past is not self._own and past.model is not None and not (past.stored and self.rule is None):
            self.structure.check_past(past.model.curvature)

    def check_risk(self, risk: EmpiricalRisk) -> None:
        """Raises what would keep the examples of `risk` from being absorbed, by doing it with the few that it holds."""
        self.curvature.check_loss(risk.loss)
        space = risk.space if self.past.model is None else risk.space.union(self.past.model.space)
        self.structure.check(space, risk.anchor.element_size())
        self.policy.check_risk(risk, self.curvature, self.structure)
        if self.past is not self._own:
            self._check_given(risk)

    def _check_given(self, risk: EmpiricalRisk) -> None:
        """Raises what would keep a past, given or loaded, from going on with the examples of `risk`."""
        self.check_past(self.past)
        found, past = estimate(self.curvature, self.structure, risk), self.past.model
        if past is not None and not self.past.stored:
            try:
                _ = past + found
            except TypeError as error:
                kind, structure = type(past.curvature).__name__, in_short(self.structure)
                raise TypeError(
                    f"The past of {kind} cannot go on with structure={structure}: {error} Give the structure that the "
                    "past was made with."
                ) from error
        if self.rule is not None:
            self.rule.check(risk, self.curvature, self.structure, self.policy, past)

    def check_parts(self, updates: int) -> None:
        """Raises TypeError or ValueError where parts of a task of so many updates each cannot be absorbed."""
        if self.rule is not None:
            raise TypeError(
                f"{type(self.rule).__name__} chooses the strength at the ends of tasks, which this stream hides. "
                "Split it with access_task_boundaries=True, or give the strength as a number."
            )
        self.policy.check_parts(self.structure, updates)

    def absorb(
        self, risk: EmpiricalRisk, strength: float, share: float | None, policy: Policy | None, examples: int | None
    ) -> float:
        """Takes in the loss of a task, or of a part that is the `share` of one, by `policy` where that is not the own
        one. Returns the strength for the next task: what the rule chooses after one with this `strength` on `examples`,
        by default those of `risk`, or the same."""
        policy, chosen = policy or self.policy, strength
        if self.rule is not None and self.past.model is not None:
            found = self.rule.next(
                strength, self.past.model, self.past.widened(risk), self.curvature, self.structure,
                examples or risk.examples,
            )
            chosen = check_number(f"the strength that {self.rule!r} chose", found, at_least=0)
        if share is None:
            past = policy.absorb(self.past, risk, self.curvature, self.structure)
        else:
            past = policy.absorb_part(self.past, risk, self.curvature, self.structure, share)
        self.past = self._own = past
        return chosen

    def follow(self, model: nn.Module) -> None:
        """Takes the past where the model is, which may have been moved to another device or floating point type."""
        past = self.past.model
        if past is not None and (moved := past.following(model)) is not past:
            own = self.past is self._own
            self.past = replace(self.past, model=moved)
            self._own = self.past if own else None

    @torch.enable_grad()
    def revise(self, model: nn.Module, updates: int) -> None:
        """Lets the policy revise the past after so many updates of a task, where it `revises`."""
        with untouched_randomness():
            revised = self.policy.revise(self.past, unwrapped(model), updates, self.curvature, self.structure)
        for event in revised.refreshes[len(self.past.refreshes) :]:
            LOG.info("Refresh in experience %d after %d updates: %s", event.experience, event.iteration, event.reason)
        if revised is not self.past:
            self.past = self._own = revised
