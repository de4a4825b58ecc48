"""Quadratic pictures of single examples around one anchor, by Jacobian-vector products instead of loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from avalanche_curv.core.curvature import Curvature, Hessian, OutputCurvature
from avalanche_curv.core.examples import chunk_size, outputs_of, parameters_of, pulled_back
from avalanche_curv.core.fidelity import Comparison, Fidelity, GradientProducts
from avalanche_curv.core.layers import LinearLayers, Tap
from avalanche_curv.core.risk import EmpiricalRisk, as_matrix


class Pictures(ABC):
    """For each example x of a risk: increase(x) = g_xᵀδ + ½ δᵀ C_x δ around the frozen parameters."""

    risk: EmpiricalRisk

    @abstractmethod
    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        """Pictures against the truth of the frozen past function at other parameters."""


def pictures_of(curvature: Curvature, risk: EmpiricalRisk) -> Pictures:
    """The fastest way to measure pictures with this curvature on this model.

    Raises TypeError for a kind without a per-example form.
    """
    check_per_example(curvature)
    if isinstance(curvature, Hessian):
        return HessianPictures(risk)
    if not isinstance(curvature, OutputCurvature):
        raise TypeError(f"{type(curvature).__name__} has no per-example form.")
    layers = LinearLayers.of(risk)
    return OutputPictures(curvature, risk) if layers is None else LayerPictures(curvature, risk, layers)


def check_per_example(curvature: Curvature) -> None:
    """Raises TypeError for a kind whose curvature of a single example is not known."""
    if isinstance(curvature, OutputCurvature) or (isinstance(curvature, Hessian) and curvature.psd is None):
        return
    raise TypeError(
        f"Fidelity compares single examples with their own curvature, which {curvature} does not define. "
        "Use GGN(), Fisher(), EmpiricalFisher(), Hessian() without psd, or a subclass of OutputCurvature."
    )


class OutputPictures(Pictures):
    """For C_x = Jᵀ S Sᵀ J on any model: u = J δ by one forward-mode product, then ½ ‖Sᵀu‖² and Jᵀ S Sᵀ u."""

    def __init__(self, curvature: OutputCurvature, risk: EmpiricalRisk) -> None:
        self.curvature, self.risk = curvature, risk

    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        generator = self.curvature.generator()
        here, there = parameters_of(self.risk), parameters_of(self.risk, parameters)
        step = parameters_of(self.risk, parameters - self.risk.anchor)
        parts = []
        with torch.no_grad():
            for x, y in self.risk:
                factor = self.curvature.factor(self.risk.loss, self.risk.outputs(x), y, generator)
                size = chunk_size(self.risk, 3)
                for piece in zip(x.split(size), y.split(size), factor.split(size)):
                    parts.append(self._chunk(here, there, step, *piece))
        return joined(parts)

    def _chunk(self, here: dict, there: dict, step: dict, x: Tensor, y: Tensor, factor: Tensor) -> Comparison:
        outputs, loss = outputs_of(self.risk), self.risk.loss
        now = outputs(there, x)
        then, change = jvp(lambda p: outputs(p, x), (here,), (step,))
        residual = loss.gradient(then, y)
        curved, linear, quadratic = output_increase(factor, residual, change)
        true = pulled_back(self.risk, there, x, loss.gradient(now, y)[:, :, None])[:, 0]
        pulled = pulled_back(self.risk, here, x, torch.stack([curved, residual], dim=2))
        actual = loss.per_example(now, y) - loss.per_example(then, y)
        return Comparison(
            GradientProducts.of(true, pulled[:, 0]).fidelity(actual, quadratic),
            GradientProducts.of(true, pulled.sum(1)).fidelity(actual, quadratic + linear),
        )


class HessianPictures(Pictures):
    """For C_x = ∇²ℓ(x, ·): H_x δ as the forward derivative of the per-example gradient."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        self.risk = risk

    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        here, there = parameters_of(self.risk), parameters_of(self.risk, parameters)
        step = parameters_of(self.risk, parameters - self.risk.anchor)
        size = chunk_size(self.risk, 3)
        pieces = (piece for x, y in self.risk for piece in zip(x.split(size), y.split(size)))
        with torch.no_grad():
            return joined([self._chunk(here, there, step, x, y) for x, y in pieces])

    def _chunk(self, here: dict, there: dict, step: dict, x: Tensor, y: Tensor) -> Comparison:
        outputs, loss = outputs_of(self.risk), self.risk.loss

        def one(p: dict, x: Tensor, y: Tensor) -> Tensor:
            return loss.per_example(outputs(p, x[None]), y[None])[0]

        def bend(x: Tensor, y: Tensor) -> Any:
            return jvp(lambda p: grad(one)(p, x, y), (here,), (step,))

        slopes, products = (_rows(part) for part in vmap(bend)(x, y))
        true = _rows(vmap(grad(one), in_dims=(None, 0, 0))(there, x, y))
        displacement = torch.cat([part.reshape(-1) for part in step.values()])
        # the ½ belongs to `half_product`, the one place that states it for single examples
        quadratic, linear = half_product(products, displacement), slopes @ displacement
        actual = loss.per_example(outputs(there, x), y) - loss.per_example(outputs(here, x), y)
        return Comparison(
            GradientProducts.of(true, products).fidelity(actual, quadratic),
            GradientProducts.of(true, products + slopes).fidelity(actual, quadratic + linear),
        )


class LayerPictures(Pictures):
    """`OutputPictures` where all parameters lie in linear layers: per-example gradients stay outer products b aᵀ.

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
            self.pullback = torch.autograd.grad(
                self.outputs, [t.outputs for t in self.taps], self.weights,
                create_graph=True, allow_unused=True, materialize_grads=True,
            )
        self.slopes = self._pulled(self.residual)

    def compare(self, parameters: Float[Tensor, "P"]) -> Comparison:
        change = self._output_change(parameters - self.risk.anchor)
        curved, linear, quadratic = output_increase(self.factor, self.residual, change)
        bends = self._pulled(curved)
        taps, true, loss = self._truth(parameters)
        actual = loss - self.loss
        predictions = ((bends, quadratic), ([b + s for b, s in zip(bends, self.slopes)], quadratic + linear))
        return Comparison(
            *(self._products(taps, true, parts).fidelity(actual, increase) for parts, increase in predictions)
        )

    def _pulled(self, cotangent: Float[Tensor, "N C"]) -> list[Tensor]:
        """B of each layer for the scalar Σ_i cotangent_iᵀ f_i."""
        outputs = [tap.outputs for tap in self.taps]
        return list(
            torch.autograd.grad(
                self.outputs, outputs, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    def _output_change(self, displacement: Float[Tensor, "P"]) -> Float[Tensor, "N C"]:
        """u = J δ: each layer's own change A δWᵀ + δb, propagated to the outputs."""
        step = dict(zip(self.risk.space.names, self.risk.space.split(displacement)))
        changes = []
        for tap in self.taps:
            change = torch.zeros_like(tap.outputs)
            for name in self.layers.trainable(tap.layer):
                change = change + (tap.inputs @ step[name].T if step[name].ndim == 2 else step[name])
            changes.append(change)
        pairs = [(p, c) for p, c in zip(self.pullback, changes) if p.requires_grad]
        functions, seeds = zip(*pairs)
        (change,) = torch.autograd.grad(functions, self.weights, seeds, retain_graph=True)
        return change

    def _truth(self, parameters: Float[Tensor, "P"]) -> tuple[list[Tap], list[Tensor], Tensor]:
        """Taps, B and losses of the past function at `parameters`."""
        with self.layers.tapped() as taps:
            values = parameters_of(self.risk, parameters)
            outputs = as_matrix(functional_call(self.risk.model, values, (self.x,)))
        loss = self.risk.loss.per_example(outputs.detach(), self.y)
        residual = self.risk.loss.gradient(outputs.detach(), self.y)
        sensitivities = torch.autograd.grad(
            outputs, [tap.outputs for tap in taps], residual, allow_unused=True, materialize_grads=True
        )
        return taps, list(sensitivities), loss

    def _products(self, taps: list[Tap], true: list[Tensor], predicted: list[Tensor]) -> GradientProducts:
        """Sums over layers of products of the outer products b aᵀ (true) and b' a'ᵀ (predicted)."""
        sums = [torch.zeros_like(self.loss) for _ in range(4)]
        for now, then, b, b_then in zip(taps, self.taps, true, predicted):
            for product, total in zip(_outer_products(self.layers, now, then, b, b_then), sums):
                total += product
        return GradientProducts(*sums)


def _outer_products(
    layers: LinearLayers, now: Tap, then: Tap, b: Tensor, b_then: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """‖b aᵀ‖², ‖b' a'ᵀ‖², ⟨b aᵀ, b' a'ᵀ⟩ and ‖b aᵀ − b' a'ᵀ‖² for weight and bias together, without cancellation."""
    kinds = {name.rsplit(".", 1)[-1] for name in layers.trainable(now.layer)}
    weight, bias = float("weight" in kinds), float("bias" in kinds)
    a, a_then, d, e = now.inputs, then.inputs, b - b_then, now.inputs - then.inputs

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(1)

    distance = weight * (dot(d, d) * dot(a, a) + 2 * dot(d, b_then) * dot(a, e) + dot(b_then, b_then) * dot(e, e))
    return (
        dot(b, b) * (weight * dot(a, a) + bias),
        dot(b_then, b_then) * (weight * dot(a_then, a_then) + bias),
        dot(b, b_then) * (weight * dot(a, a_then) + bias),
        distance + bias * dot(d, d),
    )


def output_increase(
    factor: Float[Tensor, "N C R"], residual: Float[Tensor, "N C"], change: Float[Tensor, "N C"]
) -> tuple[Tensor, Tensor, Tensor]:
    """S Sᵀu, the linear increase (∇_f ℓ)ᵀu and the quadratic increase ½ ‖Sᵀu‖², for the output change u = J δ."""
    curved = torch.einsum("ncr,nr->nc", factor, torch.einsum("ncr,nc->nr", factor, change))
    return curved, (residual * change).sum(1), half_product(curved, change)


def half_product(products: Float[Tensor, "N k"], direction: Tensor) -> Float[Tensor, "N"]:
    """½ vᵀ(C v) for each row, the increase of a purely quadratic picture."""
    return 0.5 * (products * direction).sum(1)


def joined(parts: list[Comparison]) -> Comparison:
    """The comparison of all examples from those of its pieces, detached."""
    return Comparison(*(_joined([getattr(part, name) for part in parts]) for name in ("quadratic", "linear")))


def _joined(parts: list[Fidelity]) -> Fidelity:
    return Fidelity(
        *(torch.cat([getattr(p, name).detach() for p in parts]) for name in ("actual", "increase", "gamma", "alpha"))
    )


def _rows(parts: dict[str, Tensor]) -> Float[Tensor, "N P"]:
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)
