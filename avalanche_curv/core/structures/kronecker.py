"""Kronecker-factored curvature of linear and convolutional layers, beside a diagonal for all other parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.curvature.operators import Operator
from avalanche_curv.core.options import check_kind, settle
from avalanche_curv.core.per_example import layer_kinds
from avalanche_curv.core.per_example.counting import Counting
from avalanche_curv.core.per_example.layers import Layers, Tap, by_layers
from avalanche_curv.core.per_example.passes import layer_passes
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.structures.base import CurvatureSource, Matrix, Structure, other_options
from avalanche_curv.core.structures.cuts import Cut
from avalanche_curv.core.structures.diagonal import add_squares_of_rows
from avalanche_curv.core.structures.kronecker_matrix import FactoredLayer, KroneckerMatrix
from avalanche_curv.core.structures.kronecker_sums import KroneckerSum, PartialTraces
from avalanche_curv.core.structures.kronecker_terms import Corrected, Factors, without_rounding
from avalanche_curv.core.structures.memory import check_limit, check_memory
from avalanche_curv.core.structures.rules import has_rule, refusal, rule
from avalanche_curv.core.structures.weight_sharing import Expand, WeightSharing

_Names = tuple[str | None, str | None]  # of a weight and of a bias, as far as they are trainable


@dataclass(frozen=True)
class Factorised(Structure):
    """What KFAC and EKFAC share: a recipe for matrices that hold Kronecker factors of layers."""

    sums: KroneckerSum = PartialTraces()  # noqa: RUF009  a frozen value
    max_bytes: int = 4 * 2**30
    sharing: WeightSharing = field(default=Expand(), kw_only=True)
    cut: Cut | None = field(default=None, kw_only=True)

    corrections: ClassVar[int]  # numbers beside the factors for each parameter
    fits_in_blocks = False

    def __post_init__(self) -> None:
        settle(self, max_bytes=check_limit)
        if not isinstance(self.sums, KroneckerSum):
            raise TypeError(
                f"{type(self).__name__} takes PartialTraces(), FrobeniusOptimal(), PiWeighted() or KeepTerms(); "
                f"got {self.sums!r}."
            )
        check_kind("sharing", self.sharing, WeightSharing, "Expand() or Reduce()")
        if self.cut is not None:
            check_kind("cut", self.cut, Cut, "Energy(0.9) or Rank(50)")

    @property
    def sums_grow(self) -> bool:  # type: ignore[override]
        """Whether all terms are kept."""
        return self.sums.grows

    def from_operator(self, operator: Operator, risk: EmpiricalRisk) -> Matrix:
        raise TypeError(f"{type(self).__name__} needs S of each example: products alone give no Kronecker factors.")

    def differs_from(self, matrix: Matrix) -> str | None:
        return other_options(matrix, KroneckerMatrix, sums=self.sums, cut=self.cut)

    def kept(self, matrix: KroneckerMatrix) -> KroneckerMatrix:
        """A matrix of whole factors as this recipe keeps it, and its sums."""
        return replace(matrix, sums=self.sums, cut=self.cut).compressed()

    def bytes(self, space: ParameterSpace, itemsize: int) -> int:
        """At most, as if every weight of two or more axes, with its bias, lay in a layer that can be factorised; where
        there is a cut, of one term of layers that do not grow later."""
        return (space.size + sum(self._held(*shape)[0] for shape in self._layers(space))) * itemsize

    def cost(self, space: ParameterSpace) -> int:
        """Floating point operations of a product with one term of each layer, at most; the loss of an example takes
        six for each parameter, forwards and backwards, in a network of linear layers."""
        return 2 * space.size + sum(out * inputs * self._held(out, inputs)[1] for out, inputs in self._layers(space))

    def check(self, space: ParameterSpace, itemsize: int) -> None:
        """Refuses what is certain, a matrix with a bias; the others are known, and checked, when layers are."""
        certain = [
            shape for name, shape in zip(space.names, space.shapes) if len(shape) == 2 and _bias(name) in space.names
        ]
        self.check_bytes(sum(n**2 + m**2 + self.corrections * n * m for n, m in certain) * itemsize)

    def check_bytes(self, needed: int) -> None:
        """Raises MemoryError for a matrix over the limit."""
        remedy = "Use LowRank(Rank(20)) or Diagonal(), or raise max_bytes."
        check_memory(f"{type(self).__name__}()", needed, self.max_bytes, remedy)

    def _held(self, out: int, inputs: int) -> tuple[int, int]:
        """Numbers that are held for a layer beside the diagonal, and operations of a product for each entry."""
        whole = out**2 + inputs**2 + self.corrections * out * inputs, 2 * (1 + self.corrections) * (out + inputs)
        if self.cut is None:
            return whole
        r, s = (min(n, self.cut.most()) for n in (out, inputs))
        part = out * r + inputs * s + (r + 1) * (s + 1), 4 * (r + s)
        return part if part[1] < whole[1] else whole

    def _layers(self, space: ParameterSpace) -> Iterator[tuple[int, int]]:
        """[out, in] of each, with the bias; of a bias whose weight is frozen [out, 1]."""
        shapes = dict(zip(space.names, space.shapes))
        for name, shape in shapes.items():
            kind, bias = name.rpartition(".")[2], shapes.get(_bias(name))
            if len(shape) > 1 and kind == "weight":
                out, inputs = shape[0], shape.numel() // shape[0]
                out, inputs = (out, inputs) if bias is None or bias[0] == out else (inputs, out)
                yield out, inputs + (bias is not None)
            elif kind == "bias" and f"{name.removesuffix('bias')}weight" not in shapes:
                yield shape[0], 1


@dataclass(frozen=True)
class Kronecker(Factorised):
    """KFAC: for each linear or convolutional layer C ≈ A ⊗ G over its weight and bias together; Σ (in + 1)² + out²
    numbers, up to `max_bytes`.

    A = (1 / NT) Σ_{n,t} a_nt a_ntᵀ of the layer's inputs, with a 1 appended for the bias, and
    G = (1 / N) Σ_{n,t,r} b_ntr b_ntrᵀ of the sensitivities to the columns s_r of S, over T positions (Martens & Grosse
    2015, arXiv:1503.05671; Grosse & Martens 2016, arXiv:1602.01407). That is `sharing=Expand()`, each position as an
    example of its own; `sharing=Reduce()` joins the positions of an example (Eschenhagen et al. 2023). The kind decides
    the columns: `Fisher()` gives type-2, `Fisher(samples=1)` Monte-Carlo and `EmpiricalFisher()` empirical factors.

    Means of inputs are over the positions that count: padding, and what else the loss leaves out by `ignore_index`, is
    as if it were not there, and an example without a position that counts has no part in A. Which positions these are
    where a layer has others than the targets have tokens, says `core.per_example.counting`. A criterion that is a
    function of your own leaves no position out.

    Linear are `nn.Linear`, LoRA's two of an adapter and the `Conv1D` of GPT-2. All other parameters get the exact
    diagonal: norm layers, embeddings and heads tied to them, grouped convolutions, bare tensors, the packed projections
    of `nn.MultiheadAttention`, layers that are called twice or share their weight. A model without any layer to
    factorise is refused (TypeError), and so is a curvature that is no OutputCurvature.

    Sums are one pair for all of the past, whose trace is that of the sum: a step costs after a hundred experiences what
    it costs after one. `sums=KeepTerms()` keeps a list, which is exact, and each term makes a step slower;
    `sums=KeepTerms(most=n)` keeps the newest terms beside one pair of the older ones.

    With `cut=Energy(0.8)` only the leading eigenvectors of A and G are kept, the fewest that hold this part of the
    trace of A ⊗ G between them, and beyond them the means of the eigenvalues, so that the trace stays and no direction
    goes free; `cut=Rank(k)` keeps k of each. Layers of which a product would not become cheaper stay whole, and so do
    terms of a layer that has grown since, as a head of new classes does, whose new outputs have no mean: give such a
    head all outputs from the start, or few inputs.

    One pair, and what is cut, go best with `Merge()`, whose anchor is the newest: with `Accumulate()` the slope of the
    past there acts against a curvature that is the exact one no more (`run ewc_permuted_mnist --part sums`).
    """

    corrections: ClassVar[int] = 0

    def from_shards(self, source: CurvatureSource) -> Matrix:
        matrix = source.averaged(replace(self, cut=None))
        return self.kept(matrix) if isinstance(matrix, KroneckerMatrix) else matrix

    @property
    def is_mean(self) -> bool:  # type: ignore[override]
        """Unless eigenvectors are cut."""
        return self.cut is None


@dataclass(frozen=True)
class EKFAC(Factorised):
    """KFAC with corrected eigenvalues: C ≈ Q Λ Qᵀ with Q = Q_A ⊗ Q_G the eigenvectors of the Kronecker factors and
    Λ = diag(Qᵀ C Q) exact (George et al. 2018, arXiv:1806.03884), so that its trace is that of C. Numbers: those of
    KFAC, and one for each parameter. Layers, refusals, sums, cuts and the readings `sharing` of positions, which
    give the eigenvectors, are those of `Kronecker`."""

    corrections: ClassVar[int] = 1

    def from_shards(self, source: CurvatureSource) -> Matrix:
        raise TypeError(
            "EKFAC() is not estimated over ranks: its eigenvalues belong to eigenvectors that are known only after all "
            "ranks have spoken. Use Kronecker(), Diagonal(), BlockDiagonal(), LowRank(...), Dense() or MatrixFree()."
        )


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"

BLOCK = 128  # columns of a Gram matrix at once: what lies above the diagonal is not computed


@refusal(Curvature, Factorised)
def factors_need_examples(curvature: Curvature, structure: Factorised) -> str | None:
    """A kind without S of each example has no factors, unless somebody registers them."""
    if has_rule(curvature, structure):
        return None
    return (
        f"No {type(structure).__name__} factorisation is known for {curvature}. Use Fisher(), GGN(), EmpiricalFisher() "
        "or a subclass of OutputCurvature; or use Diagonal, LowRank or MatrixFree; or register one with "
        f"@rule({type(curvature).__name__}, {type(structure).__name__})."
    )


@rule(OutputCurvature, Kronecker)
def kronecker(curvature: OutputCurvature, structure: Factorised, risk: EmpiricalRisk) -> KroneckerMatrix:
    """Factors of every layer that has one weight matrix, and the exact diagonal of the others."""
    return structure.kept(_factors(curvature, structure, risk))


def _factors(curvature: OutputCurvature, structure: Factorised, risk: EmpiricalRisk) -> KroneckerMatrix:
    return by_layers(risk, lambda layers: _factorised(curvature, structure, layers, risk))


def _factorised(
    curvature: OutputCurvature, structure: Factorised, layers: Layers, risk: EmpiricalRisk
) -> KroneckerMatrix:
    factors = {
        layer: _Sums(layers, layer, structure.sharing, risk.anchor)
        for layer in layers.names if layer_kinds.is_outer(layer)
    }
    if not factors:
        raise TypeError(
            f"No layer of {type(risk.base).__name__} can be factorised: Kronecker factors are known of linear layers "
            f"and of convolutions without groups that are called once and share no weight. Its parameters are "
            f"{', '.join(risk.space.names[:5])}{', ...' if len(risk.space.names) > 5 else ''}. Use LowRank or Diagonal."
        )
    numbers = sum(s.a.numel() + s.g.numel() + structure.corrections * len(s.a) * len(s.g) for s in factors.values())
    structure.check_bytes((numbers + risk.space.size) * risk.anchor.element_size())
    diagonal = torch.zeros_like(risk.anchor)
    views = dict(zip(risk.space.names, risk.space.split(diagonal)))
    for piece in layer_passes(curvature, layers, risk):
        counting = piece.counting
        for columns in piece.columns:
            for tap, of_tap in zip(piece.taps, zip(*columns)):
                if tap.layer in factors:
                    factors[tap.layer].add_sensitivities(of_tap, piece.examples)
                    for sensitivity in of_tap:
                        counting.note(tap, sensitivity)
                else:
                    for name, part in layers.squares(tap, of_tap, piece.examples).items():
                        views[name] += part
        for tap in piece.taps:
            if tap.layer in factors:
                factors[tap.layer].add_inputs(tap, piece.examples, counting)
    diagonal /= risk.examples
    add_squares_of_rows(views, curvature, risk, layers.rest)
    found = tuple(sums.layer(risk.examples) for sums in factors.values())
    return KroneckerMatrix(risk.space, found, diagonal)


@rule(OutputCurvature, EKFAC)
def ekfac(curvature: OutputCurvature, structure: EKFAC, risk: EmpiricalRisk) -> KroneckerMatrix:
    """A second pass projects per-example gradients on the factors' eigenvectors, b aᵀ ↦ (Q_Gᵀ b) (Q_Aᵀ a)ᵀ."""
    matrix = _factors(curvature, structure, risk)
    layers = Layers.of(risk)
    places = {(place.weight, place.bias): place for place in matrix.layers}
    bases: dict[nn.Module, _Basis] = {}
    for layer in layers.names:
        if layer_kinds.is_outer(layer):
            bases[layer] = _Basis(places[_names(layers, layer)])
    for piece in layer_passes(curvature, layers, risk):
        for columns in piece.columns:
            for tap, of_tap in zip(piece.taps, zip(*columns)):
                if tap.layer in bases:
                    bases[tap.layer].add(tap, of_tap, piece.examples)
    found = tuple(basis.layer_of(risk.examples) for basis in bases.values())
    return structure.kept(KroneckerMatrix(risk.space, found, matrix.diagonal))


class _Sums:
    """Sums of both factors of one layer over examples, while the data pass by."""

    def __init__(self, layers: Layers, layer: nn.Module, sharing: WeightSharing, like: Tensor) -> None:
        self.kind, self.names, self.sharing = layer, _names(layers, layer), sharing
        shapes = dict(zip(layers.space.names, layers.space.shapes))
        held = [shapes[name] for name in self.names if name is not None]
        if self.names[0] is not None and layer_kinds.is_transposed(layer):
            held[0] = held[0][::-1]
        inputs, out = sum(shape[1:].numel() for shape in held), held[0][0]
        self.a, self.g = like.new_zeros(inputs, inputs), like.new_zeros(out, out)
        self.idle = 0  # examples without a position that counts

    def add_inputs(self, tap: Tap, examples: int, counting: Counting) -> None:
        weight, bias = self.names
        ready = layer_kinds.surely_prepared(self.kind, tap.inputs, examples)
        shares = counting.shares(tap.layer, ready)
        idle = 0 if shares is None else int((shares == 0).all(1).sum())
        self.idle += idle
        if weight is not None:
            rows = self.sharing.inputs(ready, shares)
            count = len(rows) // examples
            add_gram(self.a[: rows.shape[1], : rows.shape[1]], rows, 1 / count)
            if bias is not None:
                ones = None if shares is None else self.sharing.inputs(torch.ones_like(ready[:, :1]), shares)
                self.a[-1, :-1] += (rows.sum(0) if ones is None else (ones.T @ rows)[0]) / count
        if bias is not None:
            self.a[-1, -1] += examples - idle

    def add_sensitivities(self, columns: Sequence[Tensor], examples: int) -> None:
        for column in columns:
            b = layer_kinds.positions(self.kind, column, examples)
            add_gram(self.g, self.sharing.sensitivities(b), 1.0)

    def layer(self, examples: int) -> FactoredLayer:
        a, g = _from_lower(self.a) / max(1, examples - self.idle), _from_lower(self.g) / examples
        return FactoredLayer(*self.names, (Factors(a, g),), layer_kinds.is_transposed(self.kind))


class _Basis:
    """Σ (Q_Gᵀ ∇s Q_A)² of one layer, while the data pass by, from its place among the factors."""

    def __init__(self, place: FactoredLayer) -> None:
        self.place, (_, self.g, self.a) = place, place.terms[0].eigen()
        g, a = self.g, self.a
        self.values = g.new_zeros(g.shape[1], a.shape[1])

    def add(self, tap: Tap, columns: Sequence[Tensor], examples: int) -> None:
        ready = layer_kinds.surely_prepared(tap.layer, tap.inputs, examples).to(self.a.dtype)
        weight, bias = self.place.weight, self.place.bias
        one = ready.new_ones(examples, 1, ready.shape[2])
        a = torch.cat([*([ready] if weight else []), *([one] if bias else [])], dim=1)
        size = max(1, layer_kinds.CACHED // self.values.numel())
        b = [layer_kinds.positions(tap.layer, column, examples).to(self.g.dtype) for column in columns]
        if ready.shape[2] == 1:
            squares = torch.stack([(part[:, :, 0] @ self.g).square() for part in b]).sum(0)
            self.values += squares.T @ (a[:, :, 0] @ self.a).square()
            return
        for some_a, *some_b in zip(*(part.split(size) for part in (a, *b))):
            turned = self.a.T @ some_a
            for part in some_b:
                self.values += ((self.g.T @ part) @ turned.mT).square_().sum(0)

    def layer_of(self, examples: int) -> FactoredLayer:
        return replace(self.place, terms=(Corrected(without_rounding(self.values / examples), self.g, self.a),))


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"], factor: float) -> None:
    """Adds factor · RᵀR to the blocks of `total` on and below the diagonal."""
    rows, width = rows.to(total.dtype), rows.shape[1]
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        total[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop], alpha=factor)


def _from_lower(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Symmetric, from what lies on and below the diagonal."""
    lower = matrix.tril()
    return lower + lower.tril(-1).T


def _names(layers: Layers, layer: nn.Module) -> _Names:
    found = layers.owned[layer]
    return found.get("weight"), found.get("bias")
