"""Gradient projection memory: the span of what enters each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avalanche_curv.core.layers import Layers
from avalanche_curv.core.options import check_count, check_kind, check_seed
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.projection.inputs import Inputs, input_roots, layout_of
from avalanche_curv.core.projection.protection import Demand, Found, Protection, some_of
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.structures.cuts import Cut, Energy


@dataclass(frozen=True)
class InputSpace(Protection):
    """The span of the inputs of each linear and convolutional layer (Saha et al. 2021, gradient projection memory).

    Where no output of a layer W a + b changes for any input a of the past, nothing after it changes either: it is
    enough that the rows of (ΔW | Δb) stay orthogonal to all (a, 1), as the gradients of later tasks are made to be. A
    convolution sees patches; one with groups has one space for all of them.

    With `Energy(e)` the top eigenvectors of M = mean (a, 1)(a, 1)ᵀ outside of what is held already join it, as few as
    hold e of tr M together with that (the paper's eq. 9); with `Rank(k)` those of M itself. Several `cuts` are for the
    trainable layers in the order of the model, the last one for all that follow. M is of `examples`, drawn by `seed`
    (None takes all).

    `Energy(1.0)` keeps all but rounding. Outputs that have grown are closed, from the end of their first task on, to
    the inputs of all tasks.

    Parameters of other layers, of layers that are called more than once, share their weights or are bypassed, have no
    input space here: see `ProtectedSpace` for what happens to them. Eigenvectors take m³ operations for m rows or
    columns, whichever are fewer: seconds up to 1,000 of them, minutes beyond 4,000 (convolutions of 512 channels).
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
            check_kind("each of cuts", cut, Cut, "Energy(0.97)")
        check_seed(self.seed)
        if self.examples is not None:
            check_count("InputSpace(examples=...)", self.examples)

    def find(self, risk: EmpiricalRisk, experience: int) -> Found:
        part = some_of(risk, self.examples, self.seed, experience)
        layers = Layers.of(part)
        roots, called = input_roots(part, layers)
        findings = [
            Inputs(layers.names[layer], layout_of(layers, layer), root, self._cut(number), experience)
            for number, (layer, root) in enumerate(roots.items())
        ]
        others = [layer for layer in layers.names if layer in called - roots.keys()]
        return Found(findings, (*(name for layer in others for name in layers.trainable(layer)), *layers.rest))

    def demands(self, space: ParameterSpace) -> dict[str, Demand]:
        """Of every layer that may have an input space: whether it has is known when it is called."""
        found: dict[str, Demand] = {}
        for name, shape in zip(space.names, space.shapes):
            if len(shape) > 1:
                d = shape[1:].numel() + 1
                found[name.rpartition(".")[0]] = Demand(d, min(d, max(cut.most() for cut in self._cuts)))
        return found

    @property
    def _cuts(self) -> tuple[Cut, ...]:
        return self.cuts if isinstance(self.cuts, tuple) else (self.cuts,)

    def _cut(self, number: int) -> Cut:
        return self._cuts[min(number, len(self._cuts) - 1)]
