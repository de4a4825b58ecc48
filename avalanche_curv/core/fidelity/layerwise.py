"""Quadratic models of single examples where all parameters lie in linear layers: gradients stay products b aᵀ."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.operators import factor_of
from avalanche_curv.core.fidelity.examples import ExampleModels, OutputModels, joined, output_increase
from avalanche_curv.core.fidelity.measures import Comparison, GradientProducts
from avalanche_curv.core.nested import Nested, cat, leaves, shapes
from avalanche_curv.core.nested import examples as number_of
from avalanche_curv.core.per_example.layers import LayerDiffers, Layers, Tap, linear_layers
from avalanche_curv.core.precision import in_own_precision
from avalanche_curv.core.risk.alike import same_function
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.trust import nearby, right_way

CACHED = 2**18  # numbers that stay in the cache of a processor
AT_ONCE = 1024  # examples in one batch: more make no product of matrices faster


class LayerwiseModels(ExampleModels):
    """The quadratic models with C_x = Jᵀ S Sᵀ J, of networks of linear layers: without any [N, P] matrix, for the
    examples of several risks over one parameter space.

    What depends on the anchors alone is computed once: the layers' inputs, the graph from their outputs Z to f, and
    that of w ↦ (∂f/∂Z)ᵀw, whose derivative in w is the Jacobian product that propagates a displacement.
    """

    def __init__(self, curvature: OutputCurvature, *risks: tuple[EmpiricalRisk, Layers]) -> None:
        self.curvature, self.risk, self.risks = curvature, risks[0][0], risks
        self._anchored: list[_Run] | None = None
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
            self._anchored = _runs([batch for pair in self.risks for batch in self._anchor(*pair)])
        return _compared([run.measure(parameters) for run in self._anchored])

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
    """One batch at its anchor, with the graphs that propagate what changes from there."""

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
            self.pullback = _sensitivities([self.outputs], [self.taps], [self.weights], keep=True)[0]

    def joins(self, other: _AnchoredBatch) -> bool:
        """Whether both have one past function, and examples that fit into one batch and pass through equal layers."""
        same = shapes((self.x, self.y)) == shapes((other.x, other.y)) and self.risk.form == other.risk.form
        return same and self._path() == other._path() and same_function(self.risk, other.risk)

    def _path(self) -> list[tuple[Any, ...]]:
        """The layers that it passes through, with what trains in them."""
        return [(self.layers.names[tap.layer], self.layers.owned[tap.layer]) for tap in self.taps]


class _Truth(NamedTuple):
    """Of N examples at some parameters: inputs A and outputs Z of each layer, B, and losses."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    slopes: list[Tensor]
    loss: Float[Tensor, "N"]

    def part(self, which: slice) -> _Truth:
        """That of some of the examples."""
        inputs, outputs, slopes = ([each[which] for each in of] for of in self[:3])
        return _Truth(inputs, outputs, slopes, self.loss[which])

    @classmethod
    def joined(cls, parts: Sequence[_Truth]) -> _Truth:
        """That of the examples of all parts."""
        inputs, outputs, slopes = ([torch.cat(of) for of in zip(*each)] for each in zip(*(part[:3] for part in parts)))
        return cls(inputs, outputs, slopes, torch.cat([part.loss for part in parts]))


class _Run:
    """Batches of one past function, each at its own anchor, measured at once: the parameters of now are met once.

    What the function is at each anchor is computed in the batch of all, as what it is now: so their difference is zero
    to the bit where no parameter has changed, and has no other rounding than that of the change elsewhere.
    """

    def __init__(self, batches: list[_AnchoredBatch]) -> None:
        self.batches, self.risk, self.layers = batches, batches[0].risk, batches[0].layers
        self.sizes = [number_of(batch.y) for batch in batches]
        self.x, self.y = cat([(b.x, b.y) for b in batches]) if len(batches) > 1 else (batches[0].x, batches[0].y)
        ends = list(accumulate(self.sizes, initial=0))
        self.then = _Truth.joined([
            self._truth(batch.risk.space.split(batch.risk.anchor)).part(slice(*place))
            for batch, place in zip(batches, pairwise(ends))
        ])  # fmt: skip
        raw = {leaf.data_ptr() for leaf in leaves(self.x)}
        self.taps = batches[0].taps
        self.first = [now.data_ptr() in raw for now in self._truth(self.risk.space.split(self.risk.anchor)).inputs]
        self.gradients = [_GradientRows(slope) for slope in self.then.slopes]
        self.inputs = [_InputRows(*pair) for pair in zip(self.then.inputs, self.first)]
        self.kinds = _kinds(self.layers, self.taps).to(self.then.loss)[:, :, None].expand(-1, -1, len(self.then.loss))

    def measure(self, parameters: Float[Tensor, "P"]) -> _Measured:
        values = self.risk.space.split(parameters)
        now = self._truth(values)
        changes = self._output_changes(now, dict(zip(self.risk.space.names, values)))
        found = [output_increase(b.factor, b.residual, change) for b, change in zip(self.batches, changes)]
        curved, linear, quadratic = zip(*found)
        outputs, taps = [b.outputs for b in self.batches], [b.taps for b in self.batches]
        bends = zip(*_sensitivities(outputs, taps, curved, keep=False))
        grams = [rows.gram(true, bend) for rows, true, bend in zip(self.gradients, now.slopes, bends)]
        inputs = [rows.products(a) for rows, a in zip(self.inputs, now.inputs)]
        return _Measured(
            now.loss - self.then.loss, torch.cat(linear), torch.cat(quadratic),
            torch.stack(grams, dim=2), torch.stack(inputs, dim=1), self.kinds,
        )  # fmt: skip

    def _truth(self, values: list[Tensor]) -> _Truth:
        """What the past function is of all examples at these parameters."""
        with self.risk.holding(values), torch.enable_grad():
            with self.layers.tapped(sum(self.sizes)) as taps:
                outputs = self.risk.outputs(self.x)
            self.layers.check_calls(taps, sum(self.sizes))
            loss = self.risk.loss.per_example(outputs.detach(), self.y)
            residual = self.risk.loss.gradient(outputs.detach(), self.y)
            slopes = _sensitivities([outputs], [taps], [residual], keep=False)[0]
        return _Truth([tap.inputs for tap in taps], [tap.outputs.detach() for tap in taps], list(slopes), loss)

    def _output_changes(self, now: _Truth, parameters: dict[str, Tensor]) -> Sequence[Tensor]:
        """u = J δ of each batch: each layer's own change A δWᵀ + δb, propagated to the outputs."""
        changes = [self._layer_change(number, now, parameters) for number in range(len(self.taps))]
        own = zip(*([None] * len(self.sizes) if one is None else one.split(self.sizes) for one in changes))
        reached = [
            (p, c) for batch, some in zip(self.batches, own) for p, c in zip(batch.pullback, some)
            if p.requires_grad and c is not None
        ]  # fmt: skip
        functions, seeds = zip(*reached)
        return torch.autograd.grad(functions, [b.weights for b in self.batches], seeds, retain_graph=True)

    def _layer_change(self, number: int, now: _Truth, parameters: dict[str, Tensor]) -> Float[Tensor, "N out"] | None:
        """A Wᵀ + b − Z with the weight and bias of now, on the inputs A and outputs Z of the anchors."""
        layer, then = self.taps[number].layer, self.then.outputs[number]
        names = self.layers.owned[layer]
        if not names:
            return None
        if self.first[number]:
            return now.outputs[number] - then
        trained = {short: parameters[name] for short, name in names.items()}
        everything: dict[str, Any] = {"bias": None, **dict(layer.named_parameters(recurse=False)), **trained}
        return F.linear(self.then.inputs[number], everything["weight"], everything["bias"]).sub_(then)


def _runs(batches: list[_AnchoredBatch]) -> list[_Run]:
    """Neighbours that join, up to `AT_ONCE` examples."""
    runs: list[list[_AnchoredBatch]] = []
    for batch in batches:
        count = number_of(batch.y) + sum(number_of(one.y) for one in (runs[-1] if runs else []))
        if runs and count <= AT_ONCE and batch.joins(runs[-1][-1]):
            runs[-1].append(batch)
        else:
            runs.append([batch])
    return [_Run(run) for run in runs]


def _sensitivities(
    outputs: Sequence[Tensor], taps: Sequence[list[Tap]], cotangents: Sequence[Tensor], *, keep: bool
) -> list[tuple[Tensor, ...]]:
    """∂(Σ_i cotangent_iᵀ f_i)/∂Z of each layer, for the outputs f [n, C] of each batch; `keep` makes it differentiable
    in the cotangent."""
    found = torch.autograd.grad(
        outputs, [tap.outputs for some in taps for tap in some], cotangents,
        retain_graph=True, create_graph=keep, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    ends = list(accumulate(map(len, taps), initial=0))
    return [found[start:end] for start, end in pairwise(ends)]


class _GradientRows:
    """For one layer: the true b, both predictions b' (bend, and bend + slope), and b − b' for both, as rows. Every
    inner product is taken of these rows, for none may be left to a difference of larger ones. They are of as many
    examples at a time as stay in the cache of a processor."""

    def __init__(self, slope: Float[Tensor, "N out"]) -> None:
        self.slope = slope
        self.rows = slope.new_empty(_size(slope, 5), 5, slope.shape[1])

    def gram(self, true: Float[Tensor, "N out"], bends: Sequence[Tensor]) -> Float[Tensor, "5 5 N"]:
        """The inner products of the five for each example; `bends` are those of consecutive examples."""
        pieces = [piece for bend in bends for piece in bend.split(len(self.rows))]
        sizes = [len(piece) for piece in pieces]
        return torch.cat([*map(self._gram, true.split(sizes), pieces, self.slope.split(sizes))], dim=2)

    def _gram(self, true: Tensor, bend: Tensor, slope: Tensor) -> Float[Tensor, "5 5 n"]:
        rows = self.rows[: len(true)]
        now, plain, sloped, from_plain, from_sloped = rows.unbind(1)
        now.copy_(true)
        plain.copy_(bend)
        torch.add(bend, slope, out=sloped)
        torch.sub(true, bend, out=from_plain)
        torch.sub(from_plain, slope, out=from_sloped)
        return _gram(rows)


class _InputRows:
    """For one layer: the inputs a of now, a' of the anchor, and e = a − a', as rows, of as many examples at a time as
    stay in the cache of a processor; `first` where they are those of the model, which stay."""

    def __init__(self, then: Float[Tensor, "N in"], first: bool) -> None:
        self.then, self.first = then, first
        self.rows = then.new_empty(0 if first else _size(then, 3), 3, then.shape[1])
        squares = torch.linalg.vecdot(then, then)
        self.there = torch.stack([squares] * 3 + [torch.zeros_like(squares)] * 2)

    def products(self, now: Float[Tensor, "N in"]) -> Float[Tensor, "5 N"]:
        """a·a, a'·a', a·a', a'·e and e·e."""
        if self.first:
            return self.there
        pairs = zip(now.split(len(self.rows)), self.then.split(len(self.rows)))
        return torch.cat([self._products(*pair) for pair in pairs], dim=1)

    def _products(self, now: Tensor, then: Tensor) -> Float[Tensor, "5 n"]:
        rows = self.rows[: len(now)]
        rows[:, 0], rows[:, 1] = now, then
        torch.sub(now, then, out=rows[:, 2])
        g = _gram(rows)
        return torch.stack([g[0, 0], g[1, 1], g[0, 1], g[1, 2], g[2, 2]])


def _size(vectors: Float[Tensor, "N k"], rows: int) -> int:
    """How many examples are looked at at a time, of which each has so many rows."""
    return min(len(vectors), max(1, CACHED // (rows * vectors.shape[1])))


def _kinds(layers: Layers, taps: list[Tap]) -> Float[Tensor, "2 L"]:
    """Whether weight and bias of each layer are trainable, as 0 or 1."""
    trained = [layers.owned[tap.layer] for tap in taps]
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
