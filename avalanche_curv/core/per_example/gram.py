"""The rows G of a curvature C = GᵀG, M of them, and their Gram matrix GGᵀ, without holding them where layers allow.

C and GGᵀ share their non-zero eigenvalues: with GGᵀu = λu and ‖u‖ = 1, v = Gᵀu / √λ is an eigenvector of C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor, nn

from avalanche_curv.core.curvature.base import Curvature, OutputCurvature
from avalanche_curv.core.eigen import Pairs
from avalanche_curv.core.per_example.layers import Layers, Tap, by_layers
from avalanche_curv.core.per_example.passes import layer_passes
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace

GRAM_BYTES = 2**30  # of rows that are held at once
FEW_COLUMNS = 64  # of S of one example: each takes a backward pass, less than a product through graphs
COLUMNS = 2**16  # that are summed at once in float64


class Rows(ABC):
    """The columns of G that belong to one layer, or to the parameters that no layer explains."""

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence[Any], scale: float) -> Rows:
        """The rows of several sets of examples, one after the other, times a number."""

    @abstractmethod
    def gram(self) -> Float[Tensor, "M M"]:
        """Their part of GGᵀ."""

    @abstractmethod
    def gram_in_float64(self) -> Float[Tensor, "M M"]:
        """Their part of GGᵀ, with products in float64."""

    @abstractmethod
    def times(self, vectors: Mapping[str, Float[Tensor, "k p"]]) -> Float[Tensor, "M k"]:
        """Their part of G Vᵀ, for vectors V in the parameters."""

    @abstractmethod
    def lift(self, weights: Float[Tensor, "M k"], total: Mapping[str, Float[Tensor, "k p"]]) -> None:
        """Adds their part of (Gᵀ W)ᵀ to `total`, by parameter."""

    @abstractmethod
    def only(self, names: Collection[str]) -> Rows | None:
        """The columns of some parameters, if there are any."""


@dataclass(frozen=True)
class PlainRows(Rows):
    """The columns themselves, side by side."""

    sizes: dict[str, int]
    rows: Float[Tensor, "M p"]

    @classmethod
    def joined(cls, parts: Sequence[Any], scale: float) -> PlainRows:
        return cls(parts[0].sizes, torch.cat([part.rows for part in parts]).mul_(scale))

    def gram(self) -> Tensor:
        return self.rows @ self.rows.T

    def gram_in_float64(self) -> Tensor:
        """Summed over some columns at a time, so that no copy of all rows is made."""
        parts = (columns.double() for columns in self.rows.split(COLUMNS, dim=1))
        return reduce(add, (part @ part.T for part in parts))

    def times(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.rows @ torch.cat([vectors[name] for name in self.sizes], dim=1).T

    def lift(self, weights: Tensor, total: Mapping[str, Tensor]) -> None:
        parts = (weights.T @ self.rows).split(list(self.sizes.values()), dim=1)
        for name, part in zip(self.sizes, parts):
            total[name].add_(part)

    def only(self, names: Collection[str]) -> PlainRows | None:
        parts = zip(self.sizes, self.rows.split(list(self.sizes.values()), dim=1))
        kept = {name: part for name, part in parts if name in names}
        sizes = {name: part.shape[1] for name, part in kept.items()}
        return PlainRows(sizes, torch.cat(list(kept.values()), dim=1)) if kept else None


@dataclass(frozen=True)
class OuterRows(Rows):
    """Rows b_nr a_nᵀ of the weight of a linear layer on matrices, and b_nr of its bias: never formed."""

    names: dict[str, str]
    inputs: Float[Tensor, "N in"]
    sensitivities: Float[Tensor, "N R out"]

    @classmethod
    def joined(cls, parts: Sequence[Any], scale: float) -> OuterRows:
        inputs, sensitivities = (torch.cat([*some]) for some in zip(*((p.inputs, p.sensitivities) for p in parts)))
        return cls(parts[0].names, inputs, sensitivities.mul_(scale))

    def gram(self) -> Tensor:
        examples, columns, _ = self.sensitivities.shape
        b = self.sensitivities.flatten(0, 1)
        a = self.inputs @ self.inputs.T if "weight" in self.names else b.new_zeros(examples, examples)
        a = a + 1 if "bias" in self.names else a
        return (b @ b.T).mul_(a.repeat_interleave(columns, 0).repeat_interleave(columns, 1))

    def gram_in_float64(self) -> Tensor:
        return replace(self, inputs=self.inputs.double(), sensitivities=self.sensitivities.double()).gram()

    def times(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """B_n (V a_n), with V a_n for all examples at once."""
        examples, _, out = self.sensitivities.shape
        count = len(next(iter(vectors.values())))
        changes = self.inputs.new_zeros(examples, count * out)
        if "weight" in self.names:
            torch.mm(self.inputs, vectors[self.names["weight"]].reshape(count * out, -1).T, out=changes)
        if "bias" in self.names:
            changes += vectors[self.names["bias"]].reshape(-1)
        # from the left, which takes 0.4 of the time of products with single columns
        return (changes.view(examples, count, out) @ self.sensitivities.mT).mT.flatten(0, 1)

    def lift(self, weights: Tensor, total: Mapping[str, Tensor]) -> None:
        examples, columns, _ = self.sensitivities.shape
        mixed = (weights.view(examples, columns, -1).mT @ self.sensitivities).transpose(0, 1)
        if "weight" in self.names:
            for part, of_example in zip(total[self.names["weight"]], mixed):
                part.view(mixed.shape[2], -1).addmm_(of_example.T, self.inputs)
        if "bias" in self.names:
            total[self.names["bias"]].add_(mixed.sum(1))

    def only(self, names: Collection[str]) -> OuterRows | None:
        kept = {short: name for short, name in self.names.items() if name in names}
        return replace(self, names=kept) if kept else None


class RowsOperator:
    """C = (1/N) Σ GᵀG by rows that are held, those of some examples after the other: nothing goes through the model
    again, so that a product takes less than a gradient pass, a third of one through a graph made anew.

    Args:
        pieces: the rows of some examples, by layer.
        space: the parameters.
        examples: N.
    """

    def __init__(self, pieces: Iterable[Sequence[Rows]], space: ParameterSpace, examples: int) -> None:
        self.pieces, self.space, self.examples = [*pieces], space, examples

    @property
    def size(self) -> int:
        return self.space.size

    def matmat(self, matrix: Float[Tensor, "P k"]) -> Float[Tensor, "P k"]:
        """C M."""
        return self.lift(self.times(matrix.T), matrix.T).T

    def times(self, vectors: Float[Tensor, "k P"]) -> Iterator[Float[Tensor, "M k"]]:
        """G Vᵀ, the rows of one piece after the other."""
        views = self._by_name(vectors)
        return (reduce(add, (part.times(views) for part in rows)) for rows in self.pieces)

    def lift(self, weights: Iterable[Float[Tensor, "M k"]], like: Float[Tensor, "k P"]) -> Float[Tensor, "k P"]:
        """(Gᵀ W)ᵀ / N, from W for one piece after the other; `like` has its shape and type."""
        total = like.new_zeros(like.shape)
        views = self._by_name(total)
        for rows, own in zip(self.pieces, weights):
            for part in rows:
                part.lift(own, views)
        return total.div_(self.examples)

    def _by_name(self, vectors: Float[Tensor, "k P"]) -> dict[str, Float[Tensor, "k p"]]:
        return dict(zip(self.space.names, vectors.split(self.space.sizes, dim=1)))


def lifted(rows: Sequence[Rows], space: ParameterSpace, weights: Float[Tensor, "M k"]) -> Float[Tensor, "k P"]:
    """(Gᵀ W)ᵀ, zero in parameters that have no rows."""
    total = weights.new_zeros(weights.shape[1], space.size)
    views = dict(zip(space.names, total.split(space.sizes, dim=1)))
    for part in rows:
        part.lift(weights, views)
    return total


def plain_size(layers: Layers) -> int:
    """The number of parameters whose rows have to be formed."""
    flat = {name for layer in layers.flat for name in layers.trainable(layer)}
    return sum(size for name, size in zip(layers.space.names, layers.space.sizes) if name not in flat)


def row_pieces(curvature: OutputCurvature, risk: EmpiricalRisk, layers: Layers) -> Iterator[dict[nn.Module, Rows]]:
    """The rows of √N G in the layers, of some examples after the other: in the order of examples, then of the columns
    of S."""
    for piece in layer_passes(curvature, layers, risk):
        columns = [column for some in piece.columns for column in some]
        found: dict[nn.Module, Rows] = {}
        for tap, of_tap in zip(piece.taps, zip(*columns)):
            names = layers.owned[tap.layer]
            if tap.layer in layers.flat:
                found[tap.layer] = OuterRows(names, tap.inputs, torch.stack(of_tap, dim=1))
            else:
                rows = _rows_in_order(layers, tap, of_tap, piece.examples)
                found[tap.layer] = PlainRows(_sizes(layers, names.values()), rows)
        yield found


def rows_of(curvature: OutputCurvature, risk: EmpiricalRisk, layers: Layers) -> list[Rows]:
    """All of G, its rows in the order of examples, then of the columns of S."""
    collected: dict[nn.Module, list[Rows]] = {}
    for piece in row_pieces(curvature, risk, layers):
        for layer, rows in piece.items():
            collected.setdefault(layer, []).append(rows)
    found = [type(parts[0]).joined(parts, risk.examples**-0.5) for parts in collected.values()]
    if layers.rest:
        rest = torch.cat(list(curvature.rows(risk, layers.rest)))
        found.append(PlainRows(_sizes(layers, layers.rest), rest))
    return found


def rows_operator(curvature: Curvature, risk: EmpiricalRisk) -> RowsOperator | None:
    """C by its rows, where all parameters lie in layers and the rows fit into 1 GiB; None elsewhere."""
    count = curvature.row_count(risk)
    if not isinstance(curvature, OutputCurvature) or count is None or count > FEW_COLUMNS * risk.examples:
        return None

    def held(layers: Layers) -> RowsOperator | None:
        linear = (layer for layer in layers.flat if isinstance(layer, nn.Linear))
        flat = sum(risk.examples * layer.in_features + count * layer.out_features for layer in linear)
        if layers.rest or (flat + count * plain_size(layers)) * risk.anchor.element_size() > GRAM_BYTES:
            return None
        pieces = ([*piece.values()] for piece in row_pieces(curvature, risk, layers))
        return RowsOperator(pieces, risk.space, risk.examples)

    return by_layers(risk, held)


def gram_rows(curvature: Curvature, risk: EmpiricalRisk, most: int, besides: int = 0) -> list[Rows] | None:
    """G of any kind that has rows; None where it has none, or where they do not fit.

    Args:
        curvature: the kind.
        risk: the examples, at their anchor.
        most: how many rows there may be.
        besides: the number of other rows that are held at the same time, which count too.
    """
    own = curvature.row_count(risk)
    if own is None or own + besides > most:
        return None
    most_formed = GRAM_BYTES // ((own + besides) * risk.anchor.element_size())
    if isinstance(curvature, OutputCurvature):
        return by_layers(
            risk, lambda layers: rows_of(curvature, risk, layers) if plain_size(layers) <= most_formed else None
        )
    if risk.space.size > most_formed:
        return None
    return [PlainRows(dict(zip(risk.space.names, risk.space.sizes)), torch.cat(list(curvature.rows(risk))))]


def top_pairs(rows: Sequence[Rows], space: ParameterSpace, count: int) -> Pairs:
    """The top eigenpairs of GᵀG, with λ = ‖Gᵀu‖² summed in float64; fewer where the rank of G is smaller."""
    grams = [part.gram() for part in rows]
    gram = sum((part.double() for part in grams[1:]), grams[0].double()).cpu().numpy()
    size = len(gram)
    if not np.isfinite(gram).all():
        return grams[0].new_full((1,), torch.nan), grams[0].new_full((1, space.size), torch.nan)
    first = max(0, size - count)
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=[first, size - 1])
    kept = values > size * torch.finfo(grams[0].dtype).eps * max(values[-1], 0)
    weights = torch.as_tensor(vectors[:, kept][:, ::-1].copy()).to(grams[0])
    v = lifted(rows, space, weights)
    squares = sum((part.double().square().sum(1) for part in v.split(COLUMNS, dim=1)), v.new_zeros(len(v)).double())
    v /= squares.sqrt().to(v)[:, None]
    order = squares.argsort(descending=True)
    falling = torch.equal(order, torch.arange(len(order), device=order.device))
    return squares[order].to(v), v if falling else v[order]


def _rows_in_order(layers: Layers, tap: Tap, columns: Sequence[Any], examples: int) -> Float[Tensor, "M p"]:
    of_column = [layers.rows(tap, b, examples) for b in columns]
    names = layers.trainable(tap.layer)
    rows = [torch.cat([parts[name].flatten(1) for name in names], dim=1) for parts in of_column]
    return torch.stack(rows, dim=1).flatten(0, 1)


def _sizes(layers: Layers, names: Iterable[str]) -> dict[str, int]:
    known = dict(zip(layers.space.names, layers.space.sizes))
    return {name: known[name] for name in names}
