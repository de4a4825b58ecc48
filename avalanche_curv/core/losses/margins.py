"""The margin losses of torch as functions of outputs and targets that can be differentiated twice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MultiMargin:
    """(w_y / C) Σ_{c≠y} max(0, margin − f_y + f_c)ᵖ for one class y of each example: `MultiMarginLoss`."""

    p: int = 1
    margin: float = 1.0
    weight: Float[Tensor, "C"] | None = None

    def __call__(self, outputs: Float[Tensor, "N C"], targets: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        label = targets.long()[:, None]
        over = (self.margin - outputs.gather(1, label) + outputs).clamp_min(0)
        own = label == torch.arange(outputs.shape[1], device=outputs.device)
        loss = torch.where(own, 0.0, over if self.p == 1 else over.square()).mean(1)
        return loss if self.weight is None else self.weight.to(outputs)[targets.long()] * loss


def multi_label_margin(outputs: Float[Tensor, "N C"], targets: Int[Tensor, "N C"]) -> Float[Tensor, "N"]:
    """(1/C) Σ_j Σ_{c is no target} max(0, 1 − f_{y_j} + f_c) over the targets y_j of each example, which end at the
    first −1: `MultiLabelMarginLoss`. It takes C² numbers for each example."""
    valid = (targets >= 0).long().cumprod(1).bool()
    label = torch.where(valid, targets.long(), 0)
    classes = torch.arange(outputs.shape[1], device=outputs.device)
    is_target = ((label[:, :, None] == classes) & valid[:, :, None]).any(1)
    over = (1 - outputs.gather(1, label)[:, :, None] + outputs[:, None]).clamp_min(0)
    counted = valid[:, :, None] & ~is_target[:, None]
    return torch.where(counted, over, 0.0).sum((1, 2)) / outputs.shape[1]
