"""Curvature of the loss at reversed outputs: the importance of EWC-DR."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from avalanche_curv.core import Curvature, EmpiricalRisk, Operator, Structure
from avalanche_curv.core.risk.forward import Forward
from avalanche_curv.core.structures.base import Matrix
from avalanche_curv.core.structures.rules import curvature_matrix, rule


@dataclass(frozen=True)
class Reversed(Curvature):
    """The curvature `kind` of the risk (1/N) Σ_i ℓ(−f(x_i), y_i), whose outputs are reversed.

    With `EmpiricalFisher()` and cross-entropy, (1/N) Σ_i g_i g_iᵀ with g_i = J_iᵀ (e_y − softmax(−f_i)): of an example
    that the model is sure of, e_y − softmax(−f_i) has length 1 or more, where that of the empirical Fisher goes to 0.
    Of two classes it is p² ∇m ∇mᵀ, with m = f_y − f_other and p the probability of the observed class; the exact Fisher
    is p (1 − p) ∇m ∇mᵀ. With `BatchedEmpiricalFisher(b)` it is what the public code squares: the gradient of the mean
    over a mini-batch.

    Liu & Chang 2026, "Elastic Weight Consolidation Done Right for Continual Learning" (arXiv 2603.18596): in their code
    `logits = logits * -1` before the cross-entropy at observed labels, in the pass that estimates importance.
    """

    kind: Curvature

    @property
    def is_semidefinite(self) -> bool:  # type: ignore[override]
        return self.kind.is_semidefinite

    def operator(self, risk: EmpiricalRisk) -> Operator:
        return self.kind.operator(reversed_risk(risk))


@dataclass(frozen=True)
class Negative:
    """−f, for a model that is called by `forward`, or as model(x) without one."""

    forward: Forward | None

    def __call__(self, model: Any, inputs: Any) -> Tensor:
        return -(model(inputs) if self.forward is None else self.forward(model, inputs))


def reversed_risk(risk: EmpiricalRisk) -> EmpiricalRisk:
    """The same examples, loss and parameters, with −f for f."""
    return replace(risk, forward=Negative(risk.forward), verdicts={})


@rule(Reversed, Structure)
def of_reversed(curvature: Reversed, structure: Structure, risk: EmpiricalRisk) -> Matrix:
    """By the rule of the kind within."""
    return curvature_matrix(curvature.kind, structure, reversed_risk(risk))
