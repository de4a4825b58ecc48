"""The rows G of an averaged curvature: those of each function, one function below the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.averaged import AveragedCurvature
from avalanche_curv.core.curvature import BatchedEmpiricalFisher, OutputCurvature
from avalanche_curv.core.gram import OuterRows, PlainRows, Rows, plain_size, rows_of
from avalanche_curv.core.layers import Layers
from avalanche_curv.core.parameters import ParameterSpace
from avalanche_curv.core.risk import EmpiricalRisk
from avalanche_curv.core.rules.low_rank import GRAM_BYTES


def rows_of_all(averaged: AveragedCurvature, most: int) -> list[Rows] | None:
    """G with C = GᵀG, layer by layer; None where the kind has no rows, or where they are more than `most` or do not
    fit."""
    if isinstance(averaged.curvature, BatchedEmpiricalFisher):
        return _rows_of_batches(averaged, averaged.curvature, most)
    if not isinstance(averaged.curvature, OutputCurvature):
        return None
    columns = [_columns(averaged.curvature, risk) for risk in averaged.functions]
    rows = sum(n * risk.examples for n, risk in zip(columns, averaged.functions))
    if rows > most or len(set(columns)) > 1:
        return None
    layers = [Layers.of(risk) for risk in averaged.functions]
    if not _fits(rows, max(plain_size(own) for own in layers), averaged):
        return None
    parts = [
        _Part(rows_of(averaged.curvature, risk, own), risk.examples, columns[0], weight**0.5)
        for risk, own, weight in zip(averaged.functions, layers, averaged.weights)
    ]
    return joined(parts)


def lifted_rows(rows: Sequence[Rows], space: ParameterSpace, u: Float[Tensor, "k M"]) -> Float[Tensor, "k P"]:
    """Gᵀu / ‖Gᵀu‖ for each row u: eigenvectors of GᵀG from those of GGᵀ."""
    parts = {name: part for some in rows for name, part in some.lifted(u.T).items()}
    missing = u.new_zeros(len(u), 1)
    v = torch.cat([parts.get(name, missing.expand(-1, n)) for name, n in zip(space.names, space.sizes)], dim=1)
    return v / v.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class _Part:
    """The rows of one function, and their weight in the mean over all: √(N_f / N)."""

    rows: list[Rows]
    examples: int
    columns: int
    scale: float


def joined(parts: list[_Part]) -> list[Rows] | None:
    """The rows of all functions. A layer that a function does not use has rows of zeros there. None where a parameter
    lies in a layer of one form for one function, and of another for another."""
    if len(parts) == 1:
        return parts[0].rows
    outer: dict[tuple[str, ...], dict[int, OuterRows]] = {}
    plain: dict[tuple[str, ...], dict[int, PlainRows]] = {}
    for number, part in enumerate(parts):
        for some in part.rows:
            if isinstance(some, OuterRows):
                outer.setdefault(tuple(some.names.values()), {})[number] = some
            elif isinstance(some, PlainRows):
                plain.setdefault(tuple(some.sizes), {})[number] = some
    names = [name for layer in (*outer, *plain) for name in layer]
    if len(set(names)) < len(names):
        return None
    return [*(_below(own, parts) for own in outer.values()), *(_plain_below(own, parts) for own in plain.values())]


def _below(own: dict[int, OuterRows], parts: list[_Part]) -> OuterRows:
    """The rows of one layer, by the number of the function that they are of."""
    known = next(iter(own.values()))
    a, b = known.inputs, known.sensitivities
    inputs = [own[i].inputs if i in own else a.new_zeros(part.examples, a.shape[1]) for i, part in enumerate(parts)]
    sensitivities = [
        part.scale * own[i].sensitivities if i in own else b.new_zeros(part.examples, *b.shape[1:])
        for i, part in enumerate(parts)
    ]
    return OuterRows(known.names, torch.cat(inputs), torch.cat(sensitivities))


def _plain_below(own: dict[int, PlainRows], parts: list[_Part]) -> PlainRows:
    known = next(iter(own.values()))
    g = known.rows
    rows = [
        part.scale * own[i].rows if i in own else g.new_zeros(part.examples * part.columns, g.shape[1])
        for i, part in enumerate(parts)
    ]
    return PlainRows(known.sizes, torch.cat(rows))


def _rows_of_batches(averaged: AveragedCurvature, curvature: BatchedEmpiricalFisher, most: int) -> list[Rows] | None:
    """The mini-batch gradients of each function."""
    space = averaged.space
    rows = sum(-(-risk.examples // curvature.batch_size) for risk in averaged.functions)
    if rows > most or not _fits(rows, space.size, averaged):
        return None
    parts = [
        weight**0.5 * torch.cat(list(curvature.gradients(risk)))
        for risk, weight in zip(averaged.functions, averaged.weights)
    ]
    return [PlainRows(dict(zip(space.names, space.sizes)), torch.cat(parts))]


def _fits(rows: int, formed: int, averaged: AveragedCurvature) -> bool:
    return rows * formed * averaged.like.element_size() <= GRAM_BYTES


def _columns(curvature: OutputCurvature, risk: EmpiricalRisk) -> int:
    """R, the number of columns of S."""
    x, y = next(iter(risk))
    with torch.no_grad():
        outputs = risk.outputs(x[:1])
    return curvature.factor(risk.loss, outputs, y[:1], curvature.generator()).shape[2]
