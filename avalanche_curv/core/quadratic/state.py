"""The stored examples of a past in its state: batches as tensors, and the model at which they are frozen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from avalanche_curv.core.losses import example_loss
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.frozen import frozen_copy


def frozen_state(stored: Sequence[EmpiricalRisk]) -> dict[str, Any]:
    """The one model at which stored examples are frozen, as its `state_dict`, and the names of the parameters of their
    space. Raises TypeError where they are frozen at different ones."""
    base = stored[0].base
    if any(risk.base is not base for risk in stored):
        raise TypeError("The stored examples are frozen at different models. Use save_checkpoint, or pickle.")
    return {
        "frozen": {name: value.detach().clone() for name, value in base.state_dict().items()},
        "trained": tuple(name for name, parameter in base.named_parameters() if parameter.requires_grad),
    }


def maker_of_risks(state: dict[str, Any], model: nn.Module | None, criterion: object) -> Callable[..., EmpiricalRisk]:
    """Makes the risk of stored examples at the model of `frozen_state`, of their batches and selection. Raises
    ValueError where `model` or `criterion` is missing, or the model has other parameters."""
    if model is None or criterion is None:
        raise ValueError("This past holds stored examples: give the `model` and `criterion` that they belong to.")
    base, loss = frozen_copy(model), example_loss(criterion)
    try:
        base.load_state_dict(state["frozen"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} is not the model of the stored examples, heads grown as they were: {reason}"
        ) from error
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in state["trained"])
    return partial(EmpiricalRisk, base, loss, verdicts={})
