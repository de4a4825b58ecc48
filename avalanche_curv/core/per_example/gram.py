"""The rows G of a curvature C = GᵀG, M of them, and their Gram matrix GGᵀ, without holding them where layers allow.

C and GGᵀ share their non-zero eigenvalues: with GGᵀu = λu and ‖u‖ = 1, v = Gᵀu / √λ is an eigenvector of C.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

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
COLUMNS = 2**16  # that are summed at once in float64


class Rows(ABC):
    """The columns of G that belong to one layer, or to the parameters that no layer explains."""

    @abstractmethod
    def gram(self) -> Float[Tensor, "M M"]:
        """Their part of GGᵀ."""

    @abstractmethod
    def gram_in_float64(self) -> Float[Tensor, "M M"]:
        """Their part of GGᵀ, with products in float64."""

    @abstractmethod
    def lifted(self, weights: Float[Tensor, "M k"]) -> dict[str, Float[Tensor, "k p"]]:
        """Their part of (Gᵀ W)ᵀ, by parameter."""

    @abstractmethod
    def only(self, names: Collection[str]) -> Rows | None:
        """The columns of some parameters, if there are any."""


@dataclass(frozen=True)
class PlainRows(Rows):
    """The columns themselves, side by side."""

    sizes: dict[str, int]
    rows: Float[Tensor, "M p"]

    def gram(self) -> Tensor:
        return self.rows @ self.rows.T

    def gram_in_float64(self) -> Tensor:
        """Summed over some columns at a time, so that no copy of all rows is made."""
        parts = (columns.double() for columns in self.rows.split(COLUMNS, dim=1))
        return reduce(add, (part @ part.T for part in parts))

    def lifted(self, weights: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.sizes, (weights.T @ self.rows).split(list(self.sizes.values()), dim=1)))

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

    def gram(self) -> Tensor:
        examples, columns, _ = self.sensitivities.shape
        b = self.sensitivities.flatten(0, 1)
        a = self.inputs @ self.inputs.T if "weight" in self.names else b.new_zeros(examples, examples)
        a = a + 1 if "bias" in self.names else a
        return (b @ b.T).mul_(a.repeat_interleave(columns, 0).repeat_interleave(columns, 1))

    def gram_in_float64(self) -> Tensor:
        return replace(self, inputs=self.inputs.double(), sensitivities=self.sensitivities.double()).gram()

    def lifted(self, weights: Tensor) -> dict[str, Tensor]:
        examples, columns, _ = self.sensitivities.shape
        mixed = torch.einsum("nrk,nro->kno", weights.view(examples, columns, -1), self.sensitivities)
        parts = {}
        if "weight" in self.names:
            parts[self.names["weight"]] = (mixed.mT @ self.inputs).flatten(1)
        if "bias" in self.names:
            parts[self.names["bias"]] = mixed.sum(1)
        return parts

    def only(self, names: Collection[str]) -> OuterRows | None:
        kept = {short: name for short, name in self.names.items() if name in names}
        return replace(self, names=kept) if kept else None


def plain_size(layers: Layers) -> int:
    """The number of parameters whose rows have to be formed."""
    flat = {name for layer in layers.flat for name in layers.trainable(layer)}
    return sum(size for name, size in zip(layers.space.names, layers.space.sizes) if name not in flat)


def rows_of(curvature: OutputCurvature, risk: EmpiricalRisk, layers: Layers) -> list[Rows]:
    """All of G, its rows in the order of examples, then of the columns of S."""
    collected: dict[nn.Module, list[tuple[Tensor, ...]]] = {}
    for piece in layer_passes(curvature, layers, risk):
        columns = [column for some in piece.columns for column in some]
        for tap, of_tap in zip(piece.taps, zip(*columns)):
            part = _inputs_and_sensitivities if tap.layer in layers.flat else _rows_in_order
            collected.setdefault(tap.layer, []).append(part(layers, tap, of_tap, piece.examples))
    scale = risk.examples**-0.5
    found: list[Rows] = []
    for layer, parts in collected.items():
        names = layers.places(layer)
        joined = [torch.cat(tensors) for tensors in zip(*parts)]
        joined[-1] *= scale
        if layer in layers.flat:
            found.append(OuterRows(names, joined[0], joined[1]))
        else:
            found.append(PlainRows(_sizes(layers, names.values()), joined[0]))
    if layers.rest:
        rest = torch.cat(list(curvature.rows(risk, layers.rest)))
        found.append(PlainRows(_sizes(layers, layers.rest), rest))
    return found


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
    v = grams[0].new_zeros(weights.shape[1], space.size)
    places = dict(zip(space.names, v.split(space.sizes, dim=1)))
    for some in rows:
        for name, part in some.lifted(weights).items():
            places[name].copy_(part)
    squares = sum((part.double().square().sum(1) for part in v.split(COLUMNS, dim=1)), v.new_zeros(len(v)).double())
    v /= squares.sqrt().to(v)[:, None]
    order = squares.argsort(descending=True)
    falling = torch.equal(order, torch.arange(len(order), device=order.device))
    return squares[order].to(v), v if falling else v[order]


def _inputs_and_sensitivities(layers: Layers, tap: Tap, columns: Sequence[Tensor], examples: int) -> tuple[Tensor, ...]:
    return tap.inputs, torch.stack(list(columns), dim=1)


def _rows_in_order(layers: Layers, tap: Tap, columns: Sequence[Tensor], examples: int) -> tuple[Tensor, ...]:
    of_column = [layers.rows(tap, b, examples) for b in columns]
    names = layers.trainable(tap.layer)
    rows = [torch.cat([parts[name].flatten(1) for name in names], dim=1) for parts in of_column]
    return (torch.stack(rows, dim=1).flatten(0, 1),)


def _sizes(layers: Layers, names: Iterable[str]) -> dict[str, int]:
    known = dict(zip(layers.space.names, layers.space.sizes))
    return {name: known[name] for name in names}
