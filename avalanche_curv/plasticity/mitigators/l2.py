"""L2 regularisation, towards zero and towards the initial parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from avalanche_curv.core.risk.selection import ParameterSelector
from avalanche_curv.plasticity.mitigators.regularizer import (
    InitialValues,
    Regularizer,
    add_to_gradients,
    cloned,
    differences,
    sum_of_squares,
)


class L2(Regularizer):
    """R(θ) = ‖θ‖², with gradient 2θ: L2 regularisation towards zero, as Lewandowski et al. (2024, sec. 4) compare it.

    There is no ½: training with strength s equals `weight_decay=2 * s` of torch's SGD and of Adam, which add it to the
    gradient. `AdamW` decays the parameters themselves, which is another method. Their strengths are 1e-2, 1e-3 and
    1e-4. Norm scales go to zero too; `exclude=(nn.LayerNorm,)` leaves them out. For the options see `Regularizer`.

    >>> L2(1e-3).penalty(nn.Linear(2, 1, bias=False).requires_grad_(False))  # of trainable parameters
    tensor(0.)
    """

    def penalty(self, model: nn.Module) -> Tensor:
        return sum_of_squares([*self.parameters(model).values()])

    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        chosen = [*parameters.values()]
        add_to_gradients(chosen, [parameter.detach() for parameter in chosen], 2 * weight)


class L2Init(Regularizer):
    """R(θ) = ‖θ − θ0‖², with gradient 2 (θ − θ0): regenerative regularisation (Kumar, Marklund & Van Roy 2023).

    θ0 is the value of each parameter when the mitigator was attached or training began; for new heads and rows that
    grew, when `prepare` or a step first sees them. For the options see `Regularizer`.
    """

    def __init__(
        self,
        strength: float,
        *,
        every: int = 1,
        include: Iterable[ParameterSelector] = (),
        exclude: Iterable[ParameterSelector] = (),
    ) -> None:
        super().__init__(strength, every=every, include=include, exclude=exclude)
        self.initial = InitialValues()

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        self.initial.remember(self.parameters(model))

    def penalty(self, model: nn.Module) -> Tensor:
        parameters = self.parameters(model)
        return sum_of_squares([p - first for p, first in zip(parameters.values(), self.initial.of(parameters))])

    def add_penalty_gradient(self, parameters: dict[str, nn.Parameter], model: nn.Module, weight: float) -> None:
        chosen = [*parameters.values()]
        add_to_gradients(chosen, differences(chosen, self.initial.of(parameters)), 2 * weight)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "initial": cloned(self.initial.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.initial.values = cloned(state["initial"])
