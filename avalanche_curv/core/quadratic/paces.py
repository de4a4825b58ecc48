"""How an optimizer turns gradients into steps, coordinate by coordinate, and which curvature makes these diverge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.quadratic.model import QuadraticModel
from avalanche_curv.core.risk.parameters import ParameterSpace, canonical_parameters


@dataclass(frozen=True)
class Descent:
    """What decides the stability of SGD on the parameters of one group: the `rate` lr · (1 − dampening), the largest
    stable rate · curvature, `limit`, and the number of the `group`, None for parameters that no group steps."""

    rate: float
    limit: float
    group: int | None

    @property
    def pace(self) -> float:
        """rate / limit: the curvature of 1 / pace is the largest that is stable."""
        return self.rate / self.limit


AT_REST = Descent(0.0, 2.0, None)
ADAM = (torch.optim.Adam, torch.optim.AdamW)


def descents(*optimizers: torch.optim.Optimizer) -> list[tuple[Descent, frozenset[int]]] | None:
    """The descent of each parameter group, and which trainable parameters it steps, by identity; those of several
    optimizers are counted through. An optimizer that scales its steps by their size, such as Adam, has none; None where
    all do."""
    found = []
    for number, (rate, momentum, dampening, nesterov, *trained) in enumerate(rates(*optimizers)):
        limit = 2 * (1 + momentum) / ((1 + 2 * momentum) if nesterov else 1)
        found.append((Descent(rate * (1 - dampening), limit, number), frozenset(trained)))
    return found or None


def rates(*optimizers: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    """What decides the `descents`: the learning rate, momentum, dampening and Nesterov's flag of each parameter group
    of SGD, and which trainable parameters it steps, by identity."""
    return [
        (float(group["lr"]), float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]),
         *[id(p) for p in group["params"] if p.requires_grad])
        for optimizer in optimizers if isinstance(optimizer, torch.optim.SGD) for group in optimizer.param_groups
    ]  # fmt: skip


@in_own_precision
def adam_paces(
    optimizer: torch.optim.Optimizer, model: nn.Module, space: ParameterSpace
) -> Float[Tensor, "P"] | None:
    """R [P] with which Adam and AdamW are stable on strength · ½ δᵀCδ up to strength 1 / λ_max(R^½ C R^½), as long as
    their second moments v stay what they are:

        R_i = lr (1 − β₁) / ((2 + 2 β₁) P_i),   P_i = √(v_i / (1 − β₂ᵗ)) + ε   (Cohen et al. 2022, equation 2).

    Zero for parameters that were never stepped. None for another optimizer, and for one that has made no step yet.
    """
    if not isinstance(optimizer, ADAM) or not optimizer.state:
        return None
    paces = {id(p): torch.zeros_like(p.detach()) for p in model.parameters()}
    for group in optimizer.param_groups:
        beta = float(group["betas"][0])
        for parameter in group["params"]:
            if parameter.requires_grad and "exp_avg_sq" in optimizer.state.get(parameter, {}):
                scale = step_scale(optimizer, group, parameter)
                paces[id(parameter)] += scale * ((1 - beta) / (2 + 2 * beta))
    return space.flatten(space.cut({name: paces[id(p)] for name, p in canonical_parameters(model).items()}))


def step_scale(optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: Tensor) -> Tensor | float:
    """By what one step of `optimizer` multiplies the gradient of a parameter of one of its groups: lr / P for Adam and
    AdamW, with P from its second moments (see `adam_paces`); the learning rate for others, and before the first step.
    Momentum is left out."""
    rate, state = float(group["lr"]), optimizer.state.get(parameter, {})
    if not isinstance(optimizer, ADAM) or "exp_avg_sq" not in state:
        return rate
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    corrected = second / (1 - float(group["betas"][1]) ** float(state["step"]))
    return rate / (corrected.sqrt() + float(group["eps"]))


@in_own_precision
def share_of_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, past: QuadraticModel, strength: float
) -> float:
    """‖S strength · ∇q‖_C / ‖S ∇‖_C: how much of the next step comes from the penalty strength · q, both measured by
    the curvature of the past, ‖v‖_C² = vᵀ C v.

    ∇ are the gradients that the parameters of `model` have now, that of the penalty included, and S is the scale of
    each coordinate (`step_scale`). The plain length would not do: Adam moves all coordinates alike, and the few on
    which the past depends are little of it. NaN where no gradient is left in these.

    >>> from avalanche_curv.core.structures.diagonal import DiagonalMatrix
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> past = QuadraticModel(ParameterSpace.of(model), torch.zeros(2), DiagonalMatrix(torch.tensor([3.0, 1.0])))
    >>> model.weight.grad = torch.tensor([[0.0, 50.0]])
    >>> round(share_of_step(torch.optim.SGD(model.parameters(), lr=0.1), model, past, strength=2.0), 6)
    0.21166
    """
    pulls = dict(zip(past.space.names, past.space.split(strength * past.gradient_at(past.displacement(model)))))
    pull, step = ({name: torch.zeros_like(part) for name, part in pulls.items()} for _ in range(2))
    names = {id(parameter): name for name, parameter in canonical_parameters(model).items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            if parameter.grad is not None and name in pulls:
                corner = tuple(slice(0, n) for n in pulls[name].shape)  # a parameter that has grown since
                scale = step_scale(optimizer, group, parameter)
                scale = scale[corner] if isinstance(scale, Tensor) else scale
                pull[name] += scale * pulls[name]
                step[name] += scale * parameter.grad.to_dense()[corner]
    vectors = (past.space.flatten([*parts.values()]).to(past.anchor) for parts in (pull, step))
    own, whole = (abs(float(past.curvature.quadratic_form(vector))) for vector in vectors)
    return math.sqrt(own / whole) if whole else math.nan
