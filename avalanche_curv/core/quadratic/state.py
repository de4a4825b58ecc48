"""The stored examples of a past in its state: batches as tensors, and the model at which they are frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avalanche_curv.core.losses import example_loss
from avalanche_curv.core.risk.batches import Batches
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.forward import Forward, restored_forward
from avalanche_curv.core.risk.frozen import copied_base, frozen_copy
from avalanche_curv.core.risk.selection import Selection, in_words
from avalanche_curv.core.risk.widened import memory_of


def frozen_state(stored: Sequence[EmpiricalRisk]) -> dict[str, Any]:
    """The one model at which stored examples are frozen, as its `state_dict`, and the names of the parameters of their
    space. Raises TypeError where they are frozen at different ones."""
    base = stored[0].base
    if any(risk.base is not base for risk in stored):
        raise TypeError("The stored examples are frozen at different models. Use save_checkpoint, or pickle.")
    return {
        "frozen": {name: memory_of(value).clone() for name, value in base.state_dict().items()},
        "trained": tuple(name for name, parameter in base.named_parameters() if parameter.requires_grad),
    }


def maker_of_risks(
    state: dict[str, Any], model: nn.Module | None, criterion: object, given: Forward | None
) -> Callable[..., EmpiricalRisk]:
    """Makes the risk of stored examples at the model of `frozen_state`, of their batches, selection and way to call the
    model; `given` where that is a function of one's own. Raises ValueError where one of these is missing, or the model
    has other parameters."""
    if model is None or criterion is None:
        raise ValueError("This past holds stored examples: give the `model` and `criterion` that they belong to.")
    base, loss = _base(state["frozen"], {*state["trained"]}, model), example_loss(criterion)
    verdicts: dict[Forward | None, dict[str, Any]] = {}

    def risk(batches: Batches, forward: object, selection: Selection) -> EmpiricalRisk:
        function = restored_forward(forward, given)
        return EmpiricalRisk(base, loss, batches, function, selection, verdicts.setdefault(function, {}))

    return risk


def _base(values: Mapping[str, Tensor], trained: Collection[str], model: nn.Module) -> nn.Module:
    """A frozen copy of `model` with these values, which shares its frozen parameters where they are the same."""
    base = frozen_copy(model)
    parameters = dict(base.named_parameters(remove_duplicate=False))
    same = {
        name for name, parameter in parameters.items()
        if hasattr(parameter, "shared") and name not in trained and name in values
        and torch.equal(parameter, values[name].to(parameter))
    }
    base = copied_base(base, owned=lambda name: name not in same)
    try:
        others = base.load_state_dict({name: v for name, v in values.items() if name not in same}, strict=False)
        missing = [name for name in others.missing_keys if name not in same]
        found = {"Missing keys": missing, "unexpected keys": others.unexpected_keys}
        reason = "; ".join(f"{what} {in_words(names)}" for what, names in found.items() if names)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
    if reason:
        raise ValueError(
            f"{type(model).__name__} is not the model of the stored examples, heads grown as they were: {reason}"
        )
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in trained)
    return base
