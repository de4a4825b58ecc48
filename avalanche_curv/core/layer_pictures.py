"""Pictures of single examples where all parameters lie in linear layers: gradients stay outer products b aᵀ."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call

from avalanche_curv.core.curvature import OutputCurvature
from avalanche_curv.core.fidelity import Comparison, GradientProducts
from avalanche_curv.core.layers import LinearLayers, Tap
from avalanche_curv.core.pictures import Pictures, joined, output_increase
from avalanche_curv.core.risk import EmpiricalRisk, as_matrix


class LayerPictures(Pictures):
    """C_x = Jᵀ S Sᵀ J without any [N, P] matrix.

    What depends on the anchor alone is computed once: the layers' inputs, the graph from their outputs Z to f, and
    that of w ↦ (∂f/∂Z)ᵀw, whose derivative in w is the Jacobian product that propagates a displacement.
    """

    def __init__(self, curvature: OutputCurvature, risk: EmpiricalRisk, layers: LinearLayers) -> None:
        self.curvature, self.risk, self.layers = curvature, risk, layers
        self._anchored: list[_AnchoredBatch] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Autograd graphs are not stored: they are computed again."""
        return {**self.__dict__, "_anchored": None}

    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        if self._anchored is None:
            generator = self.curvature.generator()
            self._anchored = [_AnchoredBatch(self, x, y, generator) for x, y in self.risk]
        with torch.enable_grad():
            return joined([batch.compare(parameters) for batch in self._anchored])


class _AnchoredBatch:
    """One batch at the anchor, ready to be compared."""

    def __init__(self, pictures: LayerPictures, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        self.risk, self.layers, self.x, self.y = pictures.risk, pictures.layers, x, y
        self.names = [name for name, p in self.risk.model.named_parameters() if p.requires_grad]
        with torch.enable_grad(), self.layers.tapped() as self.taps:
            self.outputs = self.risk.outputs(x)
        values = self.outputs.detach()
        self.loss = self.risk.loss.per_example(values, y)
        self.residual = self.risk.loss.gradient(values, y)
        self.factor = pictures.curvature.factor(self.risk.loss, values, y, generator)
        with torch.enable_grad():
            self.weights = torch.zeros_like(values, requires_grad=True)
            self.pullback = _sensitivities(self.outputs, self.taps, self.weights, keep=True)
        self.slopes = self._pulled(self.residual)

    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        change = self._output_change(parameters - self.risk.anchor)
        curved, linear, quadratic = output_increase(self.factor, self.residual, change)
        # both predictions of a gradient at once: without and with the linear term
        predicted = [torch.stack([bend, bend + slope]) for bend, slope in zip(self._pulled(curved), self.slopes)]
        taps, true, loss = self._truth(parameters)
        products = _sum_over_layers(self.layers, taps, self.taps, true, predicted)
        return Comparison.of(products, loss - self.loss, torch.stack([quadratic, quadratic + linear]))

    def _pulled(self, cotangent: Float[Tensor, "N C"]) -> tuple[Tensor, ...]:
        """B of each layer for the scalar Σ_i cotangent_iᵀ f_i."""
        return _sensitivities(self.outputs, self.taps, cotangent, keep=False)

    def _output_change(self, displacement: Float[Tensor, "P"]) -> Float[Tensor, "N C"]:
        """u = J δ: each layer's own change A δWᵀ + δb, propagated to the outputs."""
        step = dict(zip(self.risk.space.names, self.risk.space.split(displacement)))
        changes = [_layer_change(tap, {n: step[n] for n in self.layers.trainable(tap.layer)}) for tap in self.taps]
        reached = [(p, c) for p, c in zip(self.pullback, changes) if p.requires_grad and c is not None]
        functions, seeds = zip(*reached)
        (change,) = torch.autograd.grad(functions, self.weights, seeds, retain_graph=True)
        return change

    def _truth(self, parameters: Float[Tensor, "P"]) -> tuple[list[Tap], tuple[Tensor, ...], Tensor]:
        """Taps, B and losses of the past function at `parameters`."""
        values = dict(zip(self.names, self.risk.space.split(parameters)))
        with self.layers.tapped() as taps:
            outputs = as_matrix(functional_call(self.risk.model, values, (self.x,)))
        loss = self.risk.loss.per_example(outputs.detach(), self.y)
        residual = self.risk.loss.gradient(outputs.detach(), self.y)
        return taps, _sensitivities(outputs, taps, residual, keep=False), loss


def _sensitivities(
    outputs: Float[Tensor, "N C"], taps: list[Tap], cotangent: Float[Tensor, "N C"], *, keep: bool
) -> tuple[Tensor, ...]:
    """∂(Σ_i cotangent_iᵀ f_i)/∂Z of each layer; `keep` makes it differentiable in the cotangent."""
    return torch.autograd.grad(
        outputs, [tap.outputs for tap in taps], cotangent,
        retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True,
    )


def _layer_change(tap: Tap, step: dict[str, Tensor]) -> Float[Tensor, "N out"] | None:
    """A δWᵀ + δb for the trainable parts of one layer, None where it has none."""
    terms = [tap.inputs @ part.T if part.ndim == 2 else part.expand_as(tap.outputs) for part in step.values()]
    return sum(terms[1:], terms[0]) if terms else None


def _sum_over_layers(
    layers: LinearLayers, now: list[Tap], then: list[Tap], true: tuple[Tensor, ...], predicted: list[Tensor]
) -> GradientProducts:
    """Products of the per-example gradients b aᵀ (true, now) with b' a'ᵀ (predicted, at the anchor)."""
    terms = [_outer_products(layers, *parts) for parts in zip(now, then, true, predicted)]
    return GradientProducts(*(torch.stack(parts).sum(0) for parts in zip(*terms)))


def _outer_products(
    layers: LinearLayers, now: Tap, then: Tap, b: Float[Tensor, "N out"], b_then: Float[Tensor, "2 N out"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """‖b aᵀ‖², ‖b' a'ᵀ‖², ⟨b aᵀ, b' a'ᵀ⟩ and ‖b aᵀ − b' a'ᵀ‖² for weight and bias together.

    The last as ‖(b − b') aᵀ + b' (a − a')ᵀ‖², which does not cancel when the two are close.
    """
    kinds = {name.rsplit(".", 1)[-1] for name in layers.trainable(now.layer)}
    weight, bias = float("weight" in kinds), float("bias" in kinds)
    a, a_then, d, e = now.inputs, then.inputs, b - b_then, now.inputs - then.inputs
    predicted, inputs, shift = _dot(b_then, b_then), _dot(a, a), _dot(d, d)
    distance = shift * inputs + 2 * _dot(d, b_then) * _dot(a, e) + predicted * _dot(e, e)
    return (
        (_dot(b, b) * (weight * inputs + bias)).expand_as(predicted),
        predicted * (weight * _dot(a_then, a_then) + bias),
        _dot(b, b_then) * (weight * _dot(a, a_then) + bias),
        weight * distance + bias * shift,
    )


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)
