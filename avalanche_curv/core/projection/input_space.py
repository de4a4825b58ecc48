"""Protected directions: the span of the inputs of each layer (gradient projection memory)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from avalanche_curv.core.curvature.base import NonFiniteCurvatureError
from avalanche_curv.core.eigen import spectrum
from avalanche_curv.core.nested import examples as number_of
from avalanche_curv.core.nested import leaves
from avalanche_curv.core.options import check_count, check_kind, check_seed, optional, settle
from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.per_example.counting import Counting
from avalanche_curv.core.per_example.layers import Layers, Tap, by_layers
from avalanche_curv.core.projection.blocks import Layout
from avalanche_curv.core.projection.protection import BasisBound, Finding, Protection, TaskFindings, some_of
from avalanche_curv.core.projection.subspace import Subspace, TaskShare, gram, tolerance
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.cuts import Cut, Energy


@dataclass(frozen=True)
class InputSpace(Protection):
    """Protects the span of the inputs of each linear and convolutional layer (Saha et al. 2021, gradient projection
    memory), the `Conv1D` of GPT-2 among them.

    Where no output of a layer W a + b changes for any input a of the past, nothing after it changes either: it is
    enough that the rows of (ΔW | Δb) stay orthogonal to all (a, 1), as the gradients of later tasks are made to be. A
    convolution sees patches; one with groups has one space for all of them.

    With `Energy(e)` the top eigenvectors of M = mean (a, 1)(a, 1)ᵀ outside of what is held already join it, as few as
    hold e of tr M together with that (the paper's eq. 9); with `Rank(k)` those of M itself. Several `cuts` are for the
    trainable layers in the order of the model, the last one for all that follow. M is of `examples`, drawn by `seed`
    (None takes all). Padding, and what else the loss leaves out by `ignore_index`, has no part in it
    (`core.per_example.counting` says which positions count).

    By default the directions that hold 95 % of M join, at most 1,000 of them a task. `Energy(1.0)` keeps all but
    rounding. Outputs that have grown are closed, from the end of their first task on, to the inputs of all tasks.

    Parameters of other layers, of layers that are called more than once, share their weights or are bypassed, have no
    input space here: see `ProtectedSpace` for what happens to them. Eigenvectors take m³ operations for m rows or
    columns, whichever are fewer: seconds up to 1,000 of them, minutes beyond 4,000 (convolutions of 512 channels).

    Raises TypeError for cuts that are none, ValueError for no cut and for counts and seeds that are none.
    """

    cuts: Cut | tuple[Cut, ...] = Energy(0.95, most_pairs=1000)  # noqa: RUF009  a frozen value
    examples: int | None = 300
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.cuts, Sequence):
            object.__setattr__(self, "cuts", tuple(self.cuts))
        if not self._cuts:
            raise ValueError("InputSpace needs at least one cut, such as Energy(0.95); got none.")
        for cut in self._cuts:
            check_kind("each of cuts", cut, Cut, "Energy(0.95)")
        settle(self, seed=check_seed, examples=optional(check_count))

    def find(self, risk: EmpiricalRisk, experience: int) -> TaskFindings:
        part = some_of(risk, self.examples, self.seed, experience)
        return by_layers(part, lambda layers: self._found(part, layers, experience))

    def _found(self, part: EmpiricalRisk, layers: Layers, experience: int) -> TaskFindings:
        roots, called = input_roots(part, layers)
        findings = [
            Inputs(layers.names[layer], layout_of(layers, layer), root, self._cut(number), experience)
            for number, (layer, root) in enumerate(roots.items())
        ]
        others = [layer for layer in layers.names if layer in called - roots.keys()]
        return TaskFindings(findings, (*(name for layer in others for name in layers.trainable(layer)), *layers.rest))

    def bounds(self, space: ParameterSpace) -> dict[str, BasisBound]:
        """How much one task may add for every layer that may have an input space, which is known when it is called."""
        found, shapes = dict[str, BasisBound](), dict(zip(space.names, space.shapes))
        for name, shape in shapes.items():
            if len(shape) > 1:
                outputs = shapes.get(f"{name.removesuffix('weight')}bias", shape[:1]).numel()  # [out, in] or [in, out]
                d = shape.numel() // outputs + 1
                found[name.rpartition(".")[0]] = BasisBound(d, min(d, max(cut.most() for cut in self._cuts)))
        return found

    @property
    def _cuts(self) -> tuple[Cut, ...]:
        return self.cuts if isinstance(self.cuts, tuple) else (self.cuts,)

    def _cut(self, number: int) -> Cut:
        return self._cuts[min(number, len(self._cuts) - 1)]


Root = Float[Tensor, "m d"]
"""R with RᵀR = M, the mean of (a, 1)(a, 1)ᵀ over the inputs a of a layer."""


@dataclass(frozen=True)
class Inputs(Finding):
    """The inputs of one layer as a root of their second moment, and the cut that says how much of them is kept."""

    key: str
    layout: Layout
    root: Root
    cut: Cut
    experience: int

    def added_to(self, subspace: Subspace, outer: Layout) -> Subspace:
        root = self.layout.widened(self.root, outer).to(subspace.rows.device)
        trace = float(root.square().sum())
        joined = subspace.joined(self._new(subspace, root, trace).to(subspace.rows))
        values, vectors = _falling(root @ joined.rows.double().T, subspace.rows.dtype)
        reached = trace if not isinstance(self.cut, Energy) else min(trace, float(values.sum()) / self.cut.fraction)
        own = self.cut.count(values, reached)
        return joined.with_share(TaskShare(vectors[:own], values[:own], trace, self.experience))

    def _new(self, subspace: Subspace, root: Root, trace: float) -> Float[Tensor, "l d"]:
        """The directions that join the span of earlier inputs."""
        if not isinstance(self.cut, Energy):
            values, vectors = _falling(root, subspace.rows.dtype)
            return vectors[: self.cut.count(values, trace)]
        rows = subspace.rows.double()
        values, vectors = _falling(root - (root @ rows.T) @ rows, subspace.rows.dtype)
        if self.cut.fraction == 1:
            return vectors[: self.cut.most_pairs]
        missing = float(values.sum()) - (1 - self.cut.fraction) * trace
        return vectors[: self.cut.count(values, missing / self.cut.fraction)] if missing > 0 else vectors[:0]


@dataclass
class _InputMoment:
    """Inputs as rows while these are fewer than their entries, as Σ (a, 1)(a, 1)ᵀ after that."""

    rows: list[Tensor] = field(default_factory=list)
    moment: Float[Tensor, "d d"] | None = None

    def add(self, rows: Float[Tensor, "n d"]) -> None:
        self.rows.append(rows)
        if self.moment is not None or sum(len(part) for part in self.rows) > rows.shape[1]:
            for part in self.rows:
                own = gram(part.T)
                self.moment = own if self.moment is None else self.moment + own
            self.rows = []

    def root(self) -> Root:
        if self.moment is None:
            return torch.cat(self.rows).double()
        values, vectors = spectrum(self.moment)
        return (vectors * values.clamp(min=0).sqrt()).T


def input_roots(risk: EmpiricalRisk, layers: Layers) -> tuple[dict[nn.Module, Root], set[nn.Module]]:
    """The root R in float64 of each linear and convolutional layer, over examples and positions, in the order of the
    model; and all layers that are called. Raises NonFiniteCurvatureError for a model or inputs that hold NaN or
    infinity, and LayerDiffers (see `by_layers`)."""
    seen: dict[nn.Module, _InputMoment] = {}
    called: set[nn.Module] = set()
    finite = bool(risk.anchor.isfinite().all())
    for inputs, targets in risk:
        count, counted = number_of(targets), risk.loss.counted(targets)
        with torch.set_grad_enabled(counted is not None and counted.ndim > 1), layers.tapped(count) as taps:
            outputs = risk.outputs(inputs)
        layers.check_calls(taps, count)
        finite = finite and all(bool(t.isfinite().all()) for t in (*leaves(inputs), outputs))  # no layer explains NaN
        called |= {tap.layer for tap in taps}
        counting = Counting.of(risk.loss, taps, targets)
        counting.note_all(risk.loss, outputs, targets)
        for tap in taps:
            if isinstance(tap.layer, _ConvNd) or layer_kinds.takes_tokens(tap.layer):
                rows = _rows(layers, tap, count)
                rows = rows * (count / len(rows) / risk.examples) ** 0.5
                seen.setdefault(tap.layer, _InputMoment()).add(_that_count(rows, counting.shares(tap.layer, rows)))
    roots = {layer: seen[layer].root() for layer in layers.names if layer in seen}
    if not (finite and all(root.isfinite().all() for root in roots.values())):
        raise NonFiniteCurvatureError(
            f"What {risk.examples} examples give in the layers holds NaN or infinity, so the model or its inputs do. "
            "Look for diverged weights (lower the learning rate) and for NaN in the data."
        )
    return roots, called


def layout_of(layers: Layers, layer: nn.Module) -> Layout:
    """The layout (W | b) of the trainable parameters of a layer, (Wᵀ | b) of one whose weight is [in, out]."""
    shapes = dict(zip(layers.space.names, layers.space.shapes))
    places = layers.owned[layer]
    names = tuple(places[short] for short in ("weight", "bias") if short in places)
    space = ParameterSpace(names, tuple(shapes[name] for name in names))
    return Layout(space, stacked=True, transposed=layer_kinds.is_transposed(layer))


def _rows(layers: Layers, tap: Tap, examples: int) -> Float[Tensor, "n d"]:
    """(a, 1) for each example and position, and each group of a convolution; without the part that multiplies frozen
    parameters."""
    inputs = layer_kinds.surely_prepared(tap.layer, tap.inputs, examples)
    groups = getattr(tap.layer, "groups", 1)
    rows = inputs.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2)
    places = layers.owned[tap.layer]
    parts = [rows] if "weight" in places else []
    if "bias" in places:
        parts.append(torch.ones_like(rows[:, :1]))
    return torch.cat(parts, dim=1)


def _that_count(rows: Float[Tensor, "n d"], shares: Float[Tensor, "N T"] | None) -> Float[Tensor, "m d"]:
    """The rows of positions that count, each times the root of its share."""
    if shares is None:
        return rows
    groups = len(rows) // shares.numel()
    roots = shares.sqrt()[:, None].expand(-1, groups, -1).reshape(-1, 1)
    return (rows * roots)[roots[:, 0] > 0]


def _falling(root: Root, kind: torch.dtype) -> tuple[Float[Tensor, "n"], Float[Tensor, "n d"]]:
    """The eigenvalues of RᵀR that are more than the rounding of inputs of this type, largest first, and eigenvectors as
    rows; from the smaller of RᵀR and RRᵀ."""
    wide = root.shape[1] > len(root)
    values, vectors = spectrum(root @ root.T if wide else root.T @ root)
    kept = values > tolerance(kind) ** 2 * values.max() if len(values) else values > 0
    values, rows = values[kept].flip(0), vectors[:, kept].flip(1).T
    return values, rows @ root / values.sqrt()[:, None] if wide else rows
