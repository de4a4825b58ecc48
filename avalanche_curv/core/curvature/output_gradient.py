"""Gradients of the output of each example's observed class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from avalanche_curv.core.curvature.base import OutputCurvature
from avalanche_curv.core.losses import ExampleLoss
from avalanche_curv.core.nested import Nested, are_classes, described


@dataclass(frozen=True)
class OutputGradient(OutputCurvature):
    """(1/N) Σ_i ∇f_i ∇f_iᵀ, with f_i the output of example i for its observed class: the gradients whose span
    orthogonal gradient descent leaves alone (Farajtabar et al. 2020, the variant of the ground truth logit).

    Raises TypeError for targets that are no classes.
    """

    def factor(self, loss: ExampleLoss, outputs: Tensor, targets: Nested, generator: torch.Generator) -> Tensor:
        if not are_classes(targets) or outputs.shape[1] < 2:
            raise TypeError(
                f"OutputGradient needs one class for each example, and an output for each class; got targets of "
                f"{described(targets)}, {outputs.shape[1]} outputs. Use GGN() instead."
            )
        classes = torch.arange(outputs.shape[1], device=outputs.device)
        return (targets[:, None] == classes).to(outputs)[:, :, None]
