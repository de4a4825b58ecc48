"""The quadratic model of past loss: estimated, kept up to date by a policy, and added to training as a penalty."""

from avalanche_curv.core.quadratic.adaptive import AdaptiveRefresh
from avalanche_curv.core.quadratic.damping import Damping, StepBound, Tikhonov
from avalanche_curv.core.quadratic.estimate import estimate
from avalanche_curv.core.quadratic.looks import AllStored, Look, RandomPart
from avalanche_curv.core.quadratic.merging import merged_parameters
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.quadratic.policies import Accumulate, Merge, Past, Policy, Refresh, RefreshEvent
from avalanche_curv.core.quadratic.regularizer import CurvatureRegularizer
from avalanche_curv.core.quadratic.renewals import Everything, Renewal, SlopeAlone
from avalanche_curv.core.quadratic.stability import (
    Guard,
    RescaleIfUnstable,
    StopIfUnstable,
    StrengthSuggestion,
    UnstablePenaltyError,
    WarnIfUnstable,
    suggest_strength,
)
from avalanche_curv.core.quadratic.strength import Evidence, StrengthRule, TaskEvidence, task_evidence
from avalanche_curv.core.quadratic.trust import AbsoluteError, RatioBand, RelativeError, Trust

__all__ = [
    "AbsoluteError",
    "Accumulate",
    "AdaptiveRefresh",
    "AllStored",
    "CurvatureRegularizer",
    "Damping",
    "Everything",
    "Evidence",
    "Guard",
    "Look",
    "Merge",
    "Past",
    "Policy",
    "QuadraticModel",
    "RandomPart",
    "RatioBand",
    "Refresh",
    "RefreshEvent",
    "RelativeError",
    "Renewal",
    "RescaleIfUnstable",
    "SlopeAlone",
    "StepBound",
    "StopIfUnstable",
    "StrengthRule",
    "StrengthSuggestion",
    "TaskEvidence",
    "Tikhonov",
    "Trust",
    "UnstablePenaltyError",
    "WarnIfUnstable",
    "estimate",
    "merged_parameters",
    "suggest_strength",
    "task_evidence",
]
