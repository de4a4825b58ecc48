"""Pictures of single examples where all parameters lie in linear layers: gradients stay outer products b aᵀ."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avalanche_curv.core.curvature import OutputCurvature
from avalanche_curv.core.fidelity import Comparison, GradientProducts
from avalanche_curv.core.layers import LinearLayers, Tap
from avalanche_curv.core.pictures import Pictures, joined, output_increase
from avalanche_curv.core.risk import EmpiricalRisk


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
        with torch.enable_grad(), self.layers.tapped() as self.taps:
            self.outputs = self.risk.outputs(x)
        values = self.outputs.detach()
        self.loss = self.risk.loss.per_example(values, y)
        self.residual = self.risk.loss.gradient(values, y)
        self.factor = pictures.curvature.factor(self.risk.loss, values, y, generator)
        with torch.enable_grad():
            self.weights = torch.zeros_like(values, requires_grad=True)
            self.pullback = _sensitivities(self.outputs, self.taps, self.weights, keep=True)
        self.gradients = [_GradientRows(slope) for slope in self._pulled(self.residual)]

    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        values = self.risk.space.split(parameters)
        taps, true, loss = self._truth(values)
        change = self._output_change(taps, dict(zip(self.risk.space.names, values)))
        curved, linear, quadratic = output_increase(self.factor, self.residual, change)
        grams = [rows.gram(*pair) for rows, *pair in zip(self.gradients, true, self._pulled(curved))]
        products = _sum_over_layers(self.layers, taps, self.taps, grams)
        return Comparison.of(products, loss - self.loss, torch.stack([quadratic, quadratic + linear]))

    def _pulled(self, cotangent: Float[Tensor, "N C"]) -> tuple[Tensor, ...]:
        """B of each layer for the scalar Σ_i cotangent_iᵀ f_i."""
        return _sensitivities(self.outputs, self.taps, cotangent, keep=False)

    def _truth(self, values: list[Tensor]) -> tuple[list[Tap], tuple[Tensor, ...], Tensor]:
        """Taps, B and losses of the past function at other parameters."""
        with self.layers.tapped() as taps:
            outputs = self.risk.outputs_at(values, self.x)
        loss = self.risk.loss.per_example(outputs.detach(), self.y)
        residual = self.risk.loss.gradient(outputs.detach(), self.y)
        return taps, _sensitivities(outputs, taps, residual, keep=False), loss

    def _output_change(self, now: list[Tap], parameters: dict[str, Tensor]) -> Float[Tensor, "N C"]:
        """u = J δ: each layer's own change A δWᵀ + δb, propagated to the outputs."""
        changes = [self._layer_change(*taps, parameters) for taps in zip(now, self.taps)]
        reached = [(p, c) for p, c in zip(self.pullback, changes) if p.requires_grad and c is not None]
        functions, seeds = zip(*reached)
        (change,) = torch.autograd.grad(functions, self.weights, seeds, retain_graph=True)
        return change

    def _layer_change(self, now: Tap, then: Tap, parameters: dict[str, Tensor]) -> Float[Tensor, "N out"] | None:
        """A Wᵀ + b − Z with the weight and bias of now, on the inputs A and outputs Z of the anchor."""
        names = self.layers.trainable(then.layer)
        if not names:
            return None
        if _same(now.inputs, then.inputs):
            return now.outputs.detach() - then.outputs.detach()
        held = {name.rsplit(".", 1)[-1]: parameters[name] for name in names}
        weight, bias = held.get("weight", then.layer.weight), held.get("bias", then.layer.bias)
        return F.linear(then.inputs, weight, bias).sub_(then.outputs.detach())


def _sensitivities(
    outputs: Float[Tensor, "N C"], taps: list[Tap], cotangent: Float[Tensor, "N C"], *, keep: bool
) -> tuple[Tensor, ...]:
    """∂(Σ_i cotangent_iᵀ f_i)/∂Z of each layer; `keep` makes it differentiable in the cotangent."""
    return torch.autograd.grad(
        outputs, [tap.outputs for tap in taps], cotangent,
        retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True,
    )


class _GradientRows:
    """For one layer, b − b' with the linear term, the bend and the slope of b', as rows in memory that is used again."""

    def __init__(self, slope: Float[Tensor, "N out"]) -> None:
        self.rows = torch.stack([slope, slope, slope], dim=1)

    def gram(self, true: Float[Tensor, "N out"], bend: Float[Tensor, "N out"]) -> Float[Tensor, "3 3 N"]:
        """The inner products of the three for each example."""
        difference, middle, slope = self.rows.unbind(1)
        middle.copy_(bend)
        torch.sub(true, bend, out=difference).sub_(slope)
        return _gram(self.rows)


def _sum_over_layers(
    layers: LinearLayers, now: list[Tap], then: list[Tap], grams: list[Float[Tensor, "3 3 N"]]
) -> GradientProducts:
    """Products of the per-example gradients b aᵀ (true, now) with b' a'ᵀ (predicted, at the anchor)."""
    terms = [_outer_products(layers, *parts) for parts in zip(now, then, grams)]
    return GradientProducts(*(torch.stack(parts).sum(0) for parts in zip(*terms)))


def _outer_products(
    layers: LinearLayers, now: Tap, then: Tap, g: Float[Tensor, "3 3 N"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """‖b aᵀ‖², ‖b' a'ᵀ‖², ⟨b aᵀ, b' a'ᵀ⟩ and ‖b aᵀ − b' a'ᵀ‖² for weight and bias, with b' = bend and bend + slope.

    The last as ‖(b − b') aᵀ + b' (a − a')ᵀ‖², which does not cancel when the two are close. `g` holds the products of
    d = b − b' with the linear term, of bend and of slope.
    """
    kinds = {name.rsplit(".", 1)[-1] for name in layers.trainable(now.layer)}
    weight, bias = float("weight" in kinds), float("bias" in kinds)
    shift = torch.stack([g[0, 0] + 2 * g[0, 2] + g[2, 2], g[0, 0]])  # ‖b − b'‖²
    mixed = torch.stack([g[0, 1] + g[1, 2], g[0, 1] + g[0, 2]])  # (b − b')·b'
    size = torch.stack([g[1, 1], g[1, 1] + 2 * g[1, 2] + g[2, 2]])  # ‖b'‖²
    aa, ae, ee = _input_products(now, then)
    return (
        (shift + 2 * mixed + size) * (weight * aa + bias),
        size * (weight * (aa - 2 * ae + ee) + bias),
        (mixed + size) * (weight * (aa - ae) + bias),
        weight * (shift * aa + 2 * mixed * ae + size * ee) + bias * shift,
    )


def _input_products(now: Tap, then: Tap) -> tuple[Tensor, Tensor, Tensor]:
    """a·a, a·e and e·e with e = a − a'."""
    if _same(now.inputs, then.inputs):
        squares = then.input_squares
        return squares, torch.zeros_like(squares), torch.zeros_like(squares)
    g = _gram(torch.stack([now.inputs, now.inputs - then.inputs], dim=1))
    return g[0, 0], g[0, 1], g[1, 1]


def _gram(rows: Float[Tensor, "N m k"]) -> Float[Tensor, "m m N"]:
    """All inner products of the m rows of each example."""
    return (rows @ rows.mT).permute(1, 2, 0)


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether both are the very inputs of the model, as in a first layer."""
    return now.data_ptr() == then.data_ptr()
