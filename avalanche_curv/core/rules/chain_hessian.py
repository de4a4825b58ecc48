"""The exact diagonal of the Hessian of a chain of layers, at the price of a few passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.structures import DiagonalMatrix

CHUNK = 1000  # examples at once


def diagonal_by_units(risk: EmpiricalRisk) -> DiagonalMatrix | None:
    """(1/N) Σ_i of the second derivatives of ℓ_i in each weight and bias of an `nn.Sequential` whose parameters all lie
    in linear layers on vectors; None for any other model.

    Such a layer z = W x + b meets the loss of an example through z alone and linearly, so that
    ∂²ℓ/∂W_ij² = x_j² ∂²ℓ/∂z_i² and ∂²ℓ/∂b_i² = ∂²ℓ/∂z_i². That takes one backward pass for each unit, through what
    follows it, where products of the Hessian take one for each weight.
    """
    chain = _chain(risk)
    if chain is None:
        return None
    total = torch.zeros_like(risk.anchor)
    views = dict(zip(risk.space.names, risk.space.split(total)))
    for x, y in risk.rebatched(CHUNK):
        for name, inputs, curved in _layers(chain, risk, x, y):
            parts = {f"{name}.weight": curved.T @ inputs.square(), f"{name}.bias": curved.sum(0)}
            for parameter, part in parts.items():
                if parameter in views:
                    views[parameter] += part
    return DiagonalMatrix(total / risk.examples)


def _chain(risk: EmpiricalRisk) -> nn.Sequential | None:
    """The model, if it is such a chain and each of its weights is used once."""
    model = risk.model
    if type(model) is not nn.Sequential:
        return None
    owners = [module for module in model for _ in module.parameters()]
    if len(owners) > len([*model.parameters()]) or not all(type(module) is nn.Linear for module in owners):
        return None
    signal, _ = next(iter(risk))
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear) and signal.ndim != 2:
                return None
            signal = module(signal[:1])
    return model


def _layers(chain: nn.Sequential, risk: EmpiricalRisk, x: Tensor, y: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each linear layer its name, its inputs [N, in] and ∂²ℓ_i/∂z_i² [N, out]."""
    signal = x
    for place, module in enumerate(chain):
        with torch.no_grad():
            inputs, signal = signal, module(signal)
        if isinstance(module, nn.Linear):
            yield str(place), inputs, unmixed(_following(chain[place + 1 :], risk, y), signal)


def _following(rest: nn.Module, risk: EmpiricalRisk, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The losses of examples from what enters the rest of the chain."""
    return lambda signal: risk.loss.per_example(rest(signal), y)


@torch.enable_grad()
def unmixed(function: Callable[[Tensor], Tensor], places: Float[Tensor, "N n"]) -> Float[Tensor, "N n"]:
    """∂²f_i/∂z_ij² of a function that treats each row z_i by itself.

    >>> unmixed(lambda z: z.pow(3).sum(1), torch.tensor([[1.0, 2.0]]))
    tensor([[ 6., 12.]])
    """
    places = places.detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(places).sum(), places, create_graph=True)
    columns = [
        torch.autograd.grad(part.sum(), places, retain_graph=True)[0][:, unit]
        for unit, part in enumerate(slope.unbind(1))
    ]
    return torch.stack(columns, dim=1)
