"""What each optimiser of a model adds to its gradients before a step."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from avalanche_curv.core.attachment import stepped_by

Pull = tuple[nn.Parameter, Tensor]
"""A parameter, and what is to be added to the gradient of its first entries along each axis."""


@dataclass(frozen=True)
class Part:
    """What one optimiser is to add in its next step: until then its gradients must be those of the same backward pass,
    which `witness` shows, the smallest of its parameters."""

    pulls: list[Pull]
    witness: nn.Parameter
    gradient: Tensor | None
    passes: list[None] = field(default_factory=list)
    """One for each backward pass since this part waits, which may be in the same gradient after zeroing it in place."""

    @classmethod
    def of(cls, optimizer: Optimizer, pulls: list[Pull]) -> Part:
        own = stepped_by(optimizer)
        witness = min((p for group in optimizer.param_groups for p in group["params"]), key=torch.numel)
        return cls([(p, pull) for p, pull in pulls if id(p) in own], witness, witness.grad)

    def wait(self) -> None:
        """Counts backward passes from now on, for as long as this part lives."""
        passes = self.passes
        hook = self.witness.register_post_accumulate_grad_hook(lambda _: passes.append(None))
        weakref.finalize(self, hook.remove)

    @property
    def is_stale(self) -> bool:
        """Whether the gradients are new ones; those that were only scaled or clipped are not."""
        return self.witness.grad is not self.gradient or bool(self.passes)


@torch.no_grad()
def add_to_gradients(pulls: list[Pull], scale: Tensor | None) -> None:
    """p.grad += scale · pull for each parameter p, in its dtype; a missing gradient counts as zero, and a sparse one
    becomes dense."""
    gradients, added = [], []
    for parameter, pull in pulls:
        pull = (pull if scale is None else pull * scale.to(pull.device)).to(parameter.dtype)
        if parameter.grad is None and parameter.shape == pull.shape:
            parameter.grad = pull
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.layout != torch.strided:
            parameter.grad = parameter.grad.to_dense()
        whole = parameter.shape == pull.shape
        gradients.append(parameter.grad if whole else parameter.grad[tuple(map(slice, pull.shape))])
        added.append(pull)
    if gradients:
        torch._foreach_add_(gradients, added)
