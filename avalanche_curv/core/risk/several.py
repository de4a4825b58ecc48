"""Risks of several sets of examples around one frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from avalanche_curv.core.nested import examples
from avalanche_curv.core.risk.batches import merged
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk


def joined_risk(risks: Sequence[EmpiricalRisk]) -> EmpiricalRisk:
    """The risk of the examples of all `risks`, in order, which must share the frozen model of the first; in as few
    batches as their shapes allow."""
    if len(risks) == 1:
        return risks[0]
    return replace(risks[0], batches=merged(batch for risk in risks for batch in risk.batches if examples(batch[1])))


def frozen_together(risks: Sequence[EmpiricalRisk], model: nn.Module) -> tuple[EmpiricalRisk, ...]:
    """The given risks, each with its own examples, at one common frozen copy of `model` as it is now, over its selected
    parameters and all that are in the space of one of them already."""
    if not risks:
        return ()
    first = risks[0].frozen_at(model).covering({name for risk in risks for name in risk.space.names})
    return (first, *(risk.at(first) for risk in risks[1:]))
