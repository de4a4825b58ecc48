"""What enters and leaves each linear layer: per-example gradients as outer products, never formed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.parameters import ParameterSpace, canonical_name
from avalanche_curv.core.risk import EmpiricalRisk


@dataclass
class Tap:
    """One linear layer in one forward pass: inputs A [N, in] and outputs Z [N, out]."""

    layer: nn.Linear
    inputs: Float[Tensor, "N in"]
    outputs: Float[Tensor, "N out"]

    @cached_property
    def input_squares(self) -> Float[Tensor, "5 N"]:
        """a·a, a'·a', a·a', a'·e and e·e for inputs that do not change: a' = a and e = 0."""
        squares, zeros = torch.linalg.vecdot(self.inputs, self.inputs), self.inputs.new_zeros(len(self.inputs))
        return torch.stack([squares, squares, squares, zeros, zeros])


@dataclass(frozen=True)
class LinearLayers:
    """The linear layers that hold every trainable parameter of a frozen model.

    With B = ∂(Σ_i s_i)/∂Z, the gradient of s_i in the weight is b_i a_iᵀ and in the bias b_i, so that sums of squares
    and inner products over P coordinates need no [N, P] matrix (Goodfellow 2015, arXiv:1510.01799).
    """

    space: ParameterSpace
    names: dict[nn.Linear, str]

    @classmethod
    def of(cls, risk: EmpiricalRisk) -> LinearLayers | None:
        """The layers of the risk's model, or None where some parameter is used in another way.

        That is: outside a linear layer, in a layer called twice or on more than matrices, or through a shared tensor.
        """
        found = {m: canonical_name(n) for n, m in risk.base.named_modules() if isinstance(m, nn.Linear)}
        layers = cls(risk.space, found)
        if any(not name.endswith(("weight", "bias")) for layer in found for name in layers.trainable(layer)):
            return None
        owned = [name for layer in found for name in layers.trainable(layer)]
        return layers if sorted(owned) == sorted(risk.space.names) and layers._explain_gradient(risk) else None

    def trainable(self, layer: nn.Linear) -> list[str]:
        """The names of the trainable parameters of `layer`."""
        prefix = f"{self.names[layer]}." if self.names[layer] else ""
        return [prefix + name for name, p in layer.named_parameters(recurse=False) if p.requires_grad]

    @contextmanager
    def tapped(self) -> Iterator[list[Tap]]:
        """Collects a tap for each call of a layer while the context is open."""
        taps: list[Tap] = []

        def collect(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            if isinstance(layer, nn.Linear):
                taps.append(Tap(layer, (*args, *named.values())[0].detach(), output))
            return output.clone()  # what follows may write in place

        handles = [layer.register_forward_hook(collect, with_kwargs=True) for layer in self.names]
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()

    def gradient_parts(self, tap: Tap, sensitivity: Float[Tensor, "N out"]) -> dict[str, Tensor]:
        """The gradient of Σ_i s_i in the layer's trainable parameters, from B."""
        full = {"weight": sensitivity.T @ tap.inputs, "bias": sensitivity.sum(0)}
        return {name: full[name.rsplit(".", 1)[-1]] for name in self.trainable(tap.layer)}

    def squared_parts(self, tap: Tap, squares: Float[Tensor, "N out"]) -> dict[str, Tensor]:
        """Σ_i (∇s_i)² in the layer's trainable parameters, from B²."""
        return self.gradient_parts(Tap(tap.layer, tap.inputs.square(), tap.outputs), squares)

    def _explain_gradient(self, risk: EmpiricalRisk) -> bool:
        """Whether outer products reproduce a gradient on a few examples: false for any use this cannot see.

        It is the gradient of a fixed combination of the outputs, since that of the loss vanishes at a minimum.
        """
        inputs, _ = next(iter(risk))
        with torch.enable_grad(), self.tapped() as taps:
            outputs = risk.outputs(inputs[:3])
            mixed = (outputs * torch.linspace(1, 2, outputs.numel()).to(outputs).view_as(outputs)).sum()
        if len({tap.layer for tap in taps}) != len(taps) or any(tap.inputs.ndim != 2 for tap in taps):
            return False
        sensitivities = torch.autograd.grad(
            mixed, [tap.outputs for tap in taps], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        explained: dict[str, Tensor] = {}
        for tap, sensitivity in zip(taps, sensitivities):
            explained |= self.gradient_parts(tap, sensitivity)
        exact = torch.autograd.grad(mixed, risk.parameters, allow_unused=True, materialize_grads=True)
        return all(
            bool((explained.get(name, torch.zeros_like(part)) - part).norm() <= 1e-3 * part.norm())
            for name, part in zip(risk.space.names, exact)
        )
