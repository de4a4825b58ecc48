"""Quadratic models of single examples where all parameters lie in linear layers: gradients stay products b aᵀ."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.operators import factor_of
from avalanche_curv.core.fidelity.examples import ExampleModels, OutputModels, joined, output_increase
from avalanche_curv.core.fidelity.measures import Comparison, GradientProducts
from avalanche_curv.core.nested import Nested
from avalanche_curv.core.nested import examples as number_of
from avalanche_curv.core.per_example.layers import LayerDiffers, Layers, Tap, linear_layers
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.trust import nearby, right_way


class LayerwiseModels(ExampleModels):
    """The quadratic models with C_x = Jᵀ S Sᵀ J, of networks of linear layers: without any [N, P] matrix, for the
    examples of several risks over one parameter space.

    What depends on the anchors alone is computed once: the layers' inputs, the graph from their outputs Z to f, and
    that of w ↦ (∂f/∂Z)ᵀw, whose derivative in w is the Jacobian product that propagates a displacement.
    """

    def __init__(self, curvature: OutputCurvature, *risks: tuple[EmpiricalRisk, Layers]) -> None:
        self.curvature, self.risk, self.risks = curvature, risks[0][0], risks
        self._anchored: list[_AnchoredBatch] | None = None
        self._plain: list[OutputModels] | None = None  # in place of these, where layers turn out to differ

    def __getstate__(self) -> dict[str, Any]:
        """Autograd graphs are not stored: they are computed again."""
        return {**self.__dict__, "_anchored": None}

    @in_own_precision
    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        if self._plain is None:
            try:
                return self._compare(parameters)
            except LayerDiffers:  # for some examples, or at these parameters
                self._anchored = None
                self._plain = [OutputModels(self.curvature, risk) for risk, _ in self.risks]
        return joined([models.compare(parameters) for models in self._plain])

    @torch.enable_grad()
    def _compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        if self._anchored is None:
            self._anchored = [batch for pair in self.risks for batch in self._anchor(*pair)]
        return _compared([batch.measure(parameters) for batch in self._anchored])

    def _anchor(self, risk: EmpiricalRisk, layers: Layers) -> list[_AnchoredBatch]:
        generator = self.curvature.generator()
        return [_AnchoredBatch(self.curvature, risk, layers, x, y, generator) for x, y in risk]


def layered(curvature: Curvature, risk: EmpiricalRisk) -> Layers | None:
    """The layers by which `LayerwiseModels` measures a risk; None for a kind that is not given in the outputs, for a
    model with other parameters than those of linear layers, and where torch's derivatives of what lies between the
    layers are not those of plain reverse mode, on a few examples."""
    layers = linear_layers(risk) if isinstance(curvature, OutputCurvature) else None
    if layers is None or not isinstance(curvature, OutputCurvature):
        return None
    trial, own, kind = risk.trial(), layers, curvature
    moved = trial.space.flatten(nearby(trial)).detach()

    def tried(models: ExampleModels) -> list[Tensor]:
        found = models.compare(moved)
        return [part for one in (found.quadratic, found.linear) for part in (one.increase, one.gamma)]

    ways = {"layers": lambda: tried(LayerwiseModels(kind, (trial, own)))}
    way = right_way(risk, "fidelity", ways, lambda: tried(OutputModels(kind, trial)), "outputs")
    return layers if way == "layers" else None


class _Measured(NamedTuple):
    """Of n examples: the change of their losses, linear and quadratic increase; inner products of each of L layers."""

    actual: Float[Tensor, "n"]
    linear: Float[Tensor, "n"]
    quadratic: Float[Tensor, "n"]
    gradients: Float[Tensor, "5 5 L n"]
    inputs: Float[Tensor, "5 L n"]
    kinds: Float[Tensor, "2 L n"]


class _AnchoredBatch:
    """One batch at the anchor, ready to be compared."""

    def __init__(
        self,
        curvature: OutputCurvature,
        risk: EmpiricalRisk,
        layers: Layers,
        x: Nested,
        y: Nested,
        generator: torch.Generator,
    ) -> None:
        self.risk, self.layers, self.x, self.y = risk, layers, x, y
        with torch.enable_grad(), layers.tapped(number_of(y)) as self.taps:
            self.outputs = risk.outputs(x)
        layers.check_calls(self.taps, number_of(y))
        values = self.outputs.detach()
        self.loss = risk.loss.per_example(values, y)
        self.residual = risk.loss.gradient(values, y)
        self.factor = factor_of(curvature, risk, values, y, generator)
        with torch.enable_grad():
            self.weights = torch.zeros_like(values, requires_grad=True)
            self.pullback = _sensitivities(self.outputs, self.taps, self.weights, keep=True)
        self.gradients = [_GradientRows(slope) for slope in self._pulled(self.residual)]
        self.inputs = [_InputRows(tap) for tap in self.taps]
        self.kinds = _kinds(layers, self.taps).to(values)[:, :, None].expand(-1, -1, number_of(y))

    def measure(self, parameters: Float[Tensor, "P"]) -> _Measured:
        values = self.risk.space.split(parameters)
        taps, true, loss = self._truth(values)
        change = self._output_change(taps, dict(zip(self.risk.space.names, values)))
        curved, linear, quadratic = output_increase(self.factor, self.residual, change)
        grams = [rows.gram(*pair) for rows, *pair in zip(self.gradients, true, self._pulled(curved))]
        inputs = [rows.products(tap.inputs) for rows, tap in zip(self.inputs, taps)]
        return _Measured(
            loss - self.loss, linear, quadratic, torch.stack(grams, dim=2), torch.stack(inputs, dim=1), self.kinds
        )

    def _pulled(self, cotangent: Float[Tensor, "N C"]) -> tuple[Tensor, ...]:
        """B of each layer for the scalar Σ_i cotangent_iᵀ f_i."""
        return _sensitivities(self.outputs, self.taps, cotangent, keep=False)

    def _truth(self, values: list[Tensor]) -> tuple[list[Tap], tuple[Tensor, ...], Tensor]:
        """Inputs and outputs of its layers, B and losses of the past function at other parameters."""
        with self.risk.holding(values):
            with self.layers.tapped(len(self.y)) as taps:
                outputs = self.risk.outputs(self.x)
            self.layers.check_calls(taps, len(self.y))
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
        names = self.layers.places(then.layer)
        if not names:
            return None
        if _same(now.inputs, then.inputs):
            return now.outputs.detach() - then.outputs.detach()
        trained = {short: parameters[name] for short, name in names.items()}
        everything: dict[str, Any] = {"bias": None, **dict(then.layer.named_parameters(recurse=False)), **trained}
        return F.linear(then.inputs, everything["weight"], everything["bias"]).sub_(then.outputs.detach())


def _sensitivities(
    outputs: Float[Tensor, "N C"], taps: list[Tap], cotangent: Float[Tensor, "N C"], *, keep: bool
) -> tuple[Tensor, ...]:
    """∂(Σ_i cotangent_iᵀ f_i)/∂Z of each layer; `keep` makes it differentiable in the cotangent."""
    return torch.autograd.grad(
        outputs, [tap.outputs for tap in taps], cotangent,
        retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True,
    )


class _GradientRows:
    """For one layer: the true b, both predictions b' (bend, and bend + slope), and b − b' for both, as rows in memory
    used again. Every inner product is taken of these rows, for none may be left to a difference of larger ones."""

    def __init__(self, slope: Float[Tensor, "N out"]) -> None:
        self.slope = slope
        self.rows = torch.stack([slope] * 5, dim=1)

    def gram(self, true: Float[Tensor, "N out"], bend: Float[Tensor, "N out"]) -> Float[Tensor, "5 5 N"]:
        """The inner products of the five for each example."""
        now, plain, sloped, from_plain, from_sloped = self.rows.unbind(1)
        now.copy_(true)
        plain.copy_(bend)
        torch.add(bend, self.slope, out=sloped)
        torch.sub(true, bend, out=from_plain)
        torch.sub(from_plain, self.slope, out=from_sloped)
        return _gram(self.rows)


class _InputRows:
    """For one layer: the inputs a of now, a' of the anchor, and e = a − a', as rows in memory used again."""

    def __init__(self, then: Tap) -> None:
        self.then = then
        self.rows: Tensor | None = None

    def products(self, now: Float[Tensor, "N in"]) -> Float[Tensor, "5 N"]:
        """a·a, a'·a', a·a', a'·e and e·e."""
        if _same(now, self.then.inputs):
            return self.then.input_squares
        if self.rows is None:
            self.rows = torch.stack([self.then.inputs] * 3, dim=1)
        self.rows[:, 0] = now
        torch.sub(now, self.then.inputs, out=self.rows[:, 2])
        g = _gram(self.rows)
        return torch.stack([g[0, 0], g[1, 1], g[0, 1], g[1, 2], g[2, 2]])


def _kinds(layers: Layers, taps: list[Tap]) -> Float[Tensor, "2 L"]:
    """Whether weight and bias of each layer are trainable, as 0 or 1."""
    trained = [layers.places(tap.layer) for tap in taps]
    return torch.tensor([[float(kind in names) for names in trained] for kind in ("weight", "bias")])


def _compared(parts: list[_Measured]) -> Comparison:
    """The comparison of all examples from their inner products: ‖b aᵀ‖², ‖b' a'ᵀ‖², ⟨b aᵀ, b' a'ᵀ⟩ and
    ‖b aᵀ − b' a'ᵀ‖² for true (b, a) and predicted (b', a'), with b' = bend and bend + slope, summed over layers."""
    if len({part.inputs.shape[1] for part in parts}) > 1:  # some examples pass through fewer layers
        return joined([_compared([part]) for part in parts])
    actual, linear, quadratic, g, (aa, tt, at, te, ee), (weight, bias) = (torch.cat(of, dim=-1) for of in zip(*parts))
    predicted = torch.stack([g[1, 1], g[2, 2]])  # ‖b'‖²
    inner = torch.stack([g[0, 1], g[0, 2]])  # b·b'
    shift = torch.stack([g[3, 3], g[4, 4]])  # ‖b − b'‖²
    mixed = torch.stack([g[3, 0], g[4, 0]])  # (b − b')·b
    # b aᵀ − b' a'ᵀ = (b − b') a'ᵀ + b eᵀ, which does not cancel when the two are close
    products = GradientProducts(
        (g[0, 0] * (weight * aa + bias)).sum(0).expand_as(quadratic).expand(2, -1),
        (predicted * (weight * tt + bias)).sum(1),
        (inner * (weight * at + bias)).sum(1),
        (weight * (shift * tt + 2 * mixed * te + g[0, 0] * ee) + bias * shift).sum(1),
    )
    return Comparison.of(products, actual, torch.stack([quadratic, quadratic + linear]))


def _gram(rows: Float[Tensor, "N m k"]) -> Float[Tensor, "m m N"]:
    """All inner products of the m rows of each example."""
    return (rows @ rows.mT).permute(1, 2, 0)


def _same(now: Tensor, then: Tensor) -> bool:
    """Whether both are the very inputs of the model, as in a first layer."""
    return now.data_ptr() == then.data_ptr()
