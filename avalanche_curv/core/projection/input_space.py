"""Gradient projection memory: the span of what enters each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core import layer_kinds
from avalanche_curv.core.eigen import spectrum
from avalanche_curv.core.layers import Layers, Tap
from avalanche_curv.core.options import check_count, check_seed
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.projection.blocks import Layout
from avalanche_curv.core.projection.protection import Demand, Finding, Found, Protection, check_cut, some_of
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.structures.cuts import Cut, Energy
from avalanche_curv.core.subspace import Share, Subspace

Moment = Float[Tensor, "d d"]


@dataclass(frozen=True)
class InputSpace(Protection):
    """The span of the inputs of each linear and convolutional layer (Saha et al. 2021, gradient projection memory).

    Where no output of a layer W a + b changes for any input a of the past, nothing after it changes either: it is
    enough that the rows of (ΔW | Δb) stay orthogonal to all (a, 1), as the gradients of later tasks are made to be. A
    convolution sees patches; one with groups has one space for all of them.

    With `Energy(e)` the top eigenvectors of M = mean (a, 1)(a, 1)ᵀ outside of what is held already join it, as few as
    hold e of tr M together with that (the paper's eq. 9); with `Rank(k)` those of M itself. Several `cuts` are for the
    layers in order, the last one for all that follow. M is of `examples`, drawn by `seed` (None takes all).

    Parameters of other layers, of layers that are called more than once, share their weights or are bypassed, have no
    input space here: see `ProtectedSpace` for what happens to them. The eigenvectors of M take d³ operations, for a
    convolution with d = in · kernel up to 1,000 or so within seconds.
    """

    cuts: Cut | tuple[Cut, ...] = Energy(0.97, most_pairs=10_000)  # noqa: RUF009  a frozen value
    examples: int | None = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.cuts, Sequence):
            object.__setattr__(self, "cuts", tuple(self.cuts))
        if not self._cuts:
            raise ValueError("InputSpace needs at least one cut, such as Energy(0.97); got none.")
        for cut in self._cuts:
            check_cut("InputSpace", cut)
        check_seed(self.seed)
        if self.examples is not None:
            check_count("InputSpace(examples=...)", self.examples)

    def find(self, risk: EmpiricalRisk, experience: int) -> Found:
        part = some_of(risk, self.examples, self.seed, experience)
        layers = Layers.of(part)
        moments, called = _moments(part, layers)
        findings = [
            Inputs(layers.names[layer], _layout(layers, layer), moment, self._cut(number), experience)
            for number, (layer, moment) in enumerate(moments.items())
        ]
        others = [layer for layer in layers.names if layer in called - moments.keys()]
        return Found(findings, (*(name for layer in others for name in layers.trainable(layer)), *layers.rest))

    def demands(self, space: ParameterSpace) -> dict[str, Demand]:
        """Of every layer that may have an input space: whether it has is known when it is called."""
        found: dict[str, Demand] = {}
        for name, shape in zip(space.names, space.shapes):
            if len(shape) > 1:
                d = shape[1:].numel() + 1
                found[name.rpartition(".")[0]] = Demand(d, min(d, self._cut(len(found)).most()))
        return found

    @property
    def _cuts(self) -> tuple[Cut, ...]:
        return self.cuts if isinstance(self.cuts, tuple) else (self.cuts,)

    def _cut(self, number: int) -> Cut:
        return self._cuts[min(number, len(self._cuts) - 1)]


@dataclass(frozen=True)
class Inputs(Finding):
    """The second moment of the inputs of one layer, and which part of it is to be kept."""

    key: str
    layout: Layout
    moment: Moment
    cut: Cut
    experience: int

    def joins(self, subspace: Subspace, outer: Layout) -> Subspace:
        moment = self._within(outer).to(subspace.rows.device)
        trace = float(moment.trace())
        joined = subspace.joined(self._new(subspace, moment, trace).to(subspace.rows))
        rows = joined.rows.double()
        values, vectors = _falling(rows @ moment @ rows.T)
        own = self.cut.count(values, min(trace, float(values.sum())))
        return joined.with_share(Share(vectors[:own], values[:own], trace, self.experience))

    def _new(self, subspace: Subspace, moment: Moment, trace: float) -> Float[Tensor, "m d"]:
        """What joins the span of earlier inputs."""
        if not isinstance(self.cut, Energy):
            values, vectors = _falling(moment)
            return vectors[: self.cut.count(values, trace)]
        rows = subspace.rows.double()
        left = moment - rows.T @ (rows @ moment)
        left = left - (left @ rows.T) @ rows
        values, vectors = _falling(left)
        held = (trace - values.sum()).clamp(min=0)
        return vectors[: max(0, self.cut.count(torch.cat([held[None], values]), trace) - 1)]

    def _within(self, outer: Layout) -> Moment:
        own, whole = self.layout.columns, outer.columns
        if own == whole:
            return self.moment
        at = whole.positions(own).to(self.moment.device)
        moment = self.moment.new_zeros(whole.size, whole.size)
        moment[at[:, None], at] = self.moment
        return moment


def _moments(risk: EmpiricalRisk, layers: Layers) -> tuple[dict[nn.Module, Moment], set[nn.Module]]:
    """Mean (a, 1)(a, 1)ᵀ of each linear and convolutional layer in float64, over examples and positions, in the order
    of the model, of what multiplies trainable parameters; and all layers that are called."""
    sums: dict[nn.Module, Moment] = {}
    called: set[nn.Module] = set()
    for inputs, _ in risk:
        with torch.no_grad(), layers.tapped() as taps:
            risk.outputs(inputs)
        for tap in taps:
            called.add(tap.layer)
            if isinstance(tap.layer, nn.Linear | nn.modules.conv._ConvNd):
                own = _moment(layers, tap, len(inputs)) / risk.examples
                sums[tap.layer] = sums[tap.layer] + own if tap.layer in sums else own
    return {layer: sums[layer] for layer in layers.names if layer in sums}, called


def _moment(layers: Layers, tap: Tap, examples: int) -> Moment:
    """Σ over examples of the mean over positions."""
    inputs = layer_kinds.surely_prepared(tap.layer, tap.inputs, examples)
    groups = getattr(tap.layer, "groups", 1)
    rows = inputs.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2)
    places = layers.places(tap.layer)
    parts = [rows] if "weight" in places else []
    if "bias" in places:
        parts.append(torch.ones_like(rows[:, :1]))
    whole = torch.cat(parts, dim=1)
    return (whole.T @ whole).double() / (len(whole) / examples)


def _layout(layers: Layers, layer: nn.Module) -> Layout:
    shapes = dict(zip(layers.space.names, layers.space.shapes))
    places = layers.places(layer)
    names = tuple(places[short] for short in ("weight", "bias") if short in places)
    return Layout(ParameterSpace(names, tuple(shapes[name] for name in names)), stacked=True)


def _falling(matrix: Moment) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Eigenvalues of a positive semi-definite matrix, largest first, and its eigenvectors as rows."""
    values, vectors = spectrum((matrix + matrix.T) / 2)
    return values.flip(0).clamp(min=0), vectors.flip(1).T
