"""What of a model the examples of a task use: heads and norm layers of other tasks are left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from avalanche_curv.core.risk import EmpiricalRisk


@torch.enable_grad()
def parts_in_use(risk: EmpiricalRisk) -> tuple[frozenset[str], tuple[str, ...]]:
    """The names of the trainable parameters that the outputs depend on, and of the modules called that keep running
    statistics; seen on two examples."""
    inputs, _ = next(iter(risk))
    called: set[nn.Module] = set()

    def note(module: nn.Module, *_: Any) -> None:
        called.add(module)

    keeping = {n: m for n, m in risk.base.named_modules() if getattr(m, "running_mean", None) is not None}
    hooks = [module.register_forward_hook(note) for module in keeping.values()]
    try:
        outputs = risk.outputs(inputs[:2])
    finally:
        for hook in hooks:
            hook.remove()
    gradients = torch.autograd.grad(outputs.sum(), risk.parameters, allow_unused=True)
    used = frozenset(name for name, gradient in zip(risk.space.names, gradients) if gradient is not None)
    return used, tuple(name for name, module in keeping.items() if module in called)
