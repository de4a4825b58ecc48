"""Gradients in closed form, added to those that training gave, for all parameters at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def add_to_gradients(parameters: Sequence[nn.Parameter], directions: Sequence[Tensor], weight: float) -> None:
    """p.grad += weight · direction for each p; where it has none, that is its gradient."""
    add_to([gradient_of(parameter) for parameter in parameters], directions, weight)


def add_to(gradients: Sequence[Tensor], directions: Sequence[Tensor], weight: float) -> None:
    """gradient += weight · direction for each, in the gradient's dtype."""
    if gradients:
        added = [direction.to(gradient.dtype) for gradient, direction in zip(gradients, directions)]
        torch._foreach_add_([*gradients], added, alpha=weight)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient, to be changed in place; zeros from now on where it had none. Raises TypeError for a sparse one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.layout != torch.strided:
        raise TypeError(
            f"The gradient of a parameter of shape {tuple(parameter.shape)} is sparse, and a regulariser changes every "
            "entry. Leave the parameter out, as by exclude=(nn.Embedding,), or make its module with sparse=False."
        )
    return parameter.grad


def differences(parameters: Sequence[nn.Parameter], others: Sequence[Tensor]) -> list[Tensor]:
    """p − o for each pair, detached."""
    values = [parameter.detach() for parameter in parameters]
    return [*torch._foreach_sub(values, [*others])] if values else []


def in_full(values: Tensor) -> Tensor:
    """Half precision as float32, in which sums over many entries stay finite and exact enough."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Σ ‖t‖²; zero of no tensors."""
    squares = [in_full(tensor).square().sum() for tensor in tensors]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum() if squares else torch.zeros(())
