"""The curvature of the mean loss over examples of several past functions at the same parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from avalanche_curv.core.curvature.base import Curvature, NonFiniteCurvatureError
from avalanche_curv.core.per_example.gram import OuterRows, PlainRows, Rows, gram_rows, rows_operator
from avalanche_curv.core.risk.empirical_risk import EmpiricalRisk
from avalanche_curv.core.risk.parameters import ParameterSpace
from avalanche_curv.core.risk.several import joined_risk
from avalanche_curv.core.structures.base import Matrix
from avalanche_curv.core.structures.dense import Dense
from avalanche_curv.core.structures.diagonal import Diagonal
from avalanche_curv.core.structures.matrix_free import MatrixFree
from avalanche_curv.core.structures.rules import has_rule, structured


@dataclass(frozen=True)
class AveragedCurvature:
    """The curvature of the mean loss over all examples of several functions f, such as the heads of a model for several
    tasks, at the same parameters: C = Σ_f (N_f / N) C_f.

    `functions` holds one risk for each function.
    """

    curvature: Curvature
    functions: tuple[EmpiricalRisk, ...]

    @classmethod
    def of(cls, curvature: Curvature, risks: Sequence[EmpiricalRisk]) -> AveragedCurvature:
        """The curvature of the mean loss over all examples of `risks`; those of the same function are joined.

        Raises ValueError for no risk, for risks that do not share one frozen model, and for a loss that the kind of
        curvature cannot be had of.
        """
        _check(curvature, risks)
        by_function: dict[object, list[EmpiricalRisk]] = {}
        for risk in risks:
            by_function.setdefault(risk.forward, []).append(risk)
        return cls(curvature, tuple(joined_risk(same) for same in by_function.values()))

    @property
    def space(self) -> ParameterSpace:
        """The parameters, which all functions share."""
        return self.functions[0].space

    @property
    def like(self) -> Float[Tensor, "P"]:
        """A vector of the space, for its size, type and device: the parameters themselves."""
        return self.functions[0].anchor

    @property
    def examples(self) -> int:
        """N, the number of examples of all functions."""
        return sum(risk.examples for risk in self.functions)

    @property
    def weights(self) -> list[float]:
        """N_f / N, the share of each function in the mean."""
        return [risk.examples / self.examples for risk in self.functions]

    @property
    def is_semidefinite(self) -> bool:
        """Whether no eigenvalue can be negative, as far as the kind says."""
        return self.curvature.is_semidefinite

    def whole(self) -> Float[Tensor, "P P"]:
        """C as a matrix in float64. Raises NonFiniteCurvatureError where it holds NaN or infinity."""
        return self.checked(self._sum(Dense()).dense().double())

    def product(self) -> Callable[[Float[Tensor, "P"]], Float[Tensor, "P"]]:
        """The function v ↦ C v, by rows or through graphs that are kept as long as the function is."""
        held = rows_operator(self.curvature, self.functions[0]) if len(self.functions) == 1 else None
        return self._sum(MatrixFree()).product if held is None else lambda v: held.matmat(v[:, None])[:, 0]

    def exact_trace(self) -> float | None:
        """tr C from the exact diagonal; None where the kind has no cheap rule for that."""
        if not (self.curvature.is_semidefinite and has_rule(self.curvature, Diagonal())):
            return None
        traces = (structured(self.curvature, Diagonal(), risk).tensors()[0].double().sum() for risk in self.functions)
        return sum(weight * float(trace) for weight, trace in zip(self.weights, traces))

    def checked(self, tensor: Tensor) -> Tensor:
        """The tensor, unchanged. Raises NonFiniteCurvatureError where it holds NaN or infinity."""
        if tensor.isfinite().all():
            return tensor
        raise NonFiniteCurvatureError(
            f"{self.curvature} of {self.examples} examples holds NaN or infinity, so the model, its loss or its inputs "
            "do. Look for diverged weights (lower the learning rate or the strength) and for NaN in the data."
        )

    def _sum(self, structure: Dense | MatrixFree) -> Matrix:
        parts = (structured(self.curvature, structure, risk) for risk in self.functions)
        weighted = (part.scaled(weight) for part, weight in zip(parts, self.weights))
        return reduce(lambda total, part: total.plus(part), weighted)


def _check(curvature: Curvature, risks: Sequence[EmpiricalRisk]) -> None:
    if not risks:
        raise ValueError("A landscape needs the risk of some examples; got none. Give one or more.")
    for risk in risks:
        curvature.check_loss(risk.loss)
        if risk.base is not risks[0].base:
            raise ValueError(
                "Several risks have one landscape where they are frozen at the same parameters, but these hold models "
                "of their own. Freeze them alike: landscape(curvature, *(risk.at(newest) for risk in risks))."
            )


def rows_of_all(averaged: AveragedCurvature, most: int) -> list[Rows] | None:
    """The M rows of G with C = GᵀG, layer by layer; None where the kind has no such form, where M > `most`, or where
    the rows do not fit in memory."""
    counts = [averaged.curvature.row_count(risk) for risk in averaged.functions]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return None
    parts = []
    for risk, count, weight in zip(averaged.functions, known, averaged.weights):
        rows = gram_rows(averaged.curvature, risk, most, besides=sum(known) - count)
        if rows is None:
            return None
        parts.append(_Part(rows, risk.examples, count, weight**0.5))
    return joined(parts)


@dataclass(frozen=True)
class _Part:
    """The rows of one function, and `scale` = √(N_f / N), their weight in the mean over all."""

    rows: list[Rows]
    examples: int
    count: int
    scale: float


def joined(parts: list[_Part]) -> list[Rows] | None:
    """The rows of all functions, zero in the layers that a function does not use. None where a parameter lies in layers
    of different forms for two functions."""
    if len(parts) == 1:
        return parts[0].rows
    examples, counts = [part.examples for part in parts], [part.count for part in parts]

    def outer_rows(own: dict[int, OuterRows]) -> OuterRows:
        inputs = _below({i: rows.inputs for i, rows in own.items()}, examples)
        scaled = {i: parts[i].scale * rows.sensitivities for i, rows in own.items()}
        return OuterRows(next(iter(own.values())).names, inputs, _below(scaled, examples))

    def plain_rows(own: dict[int, PlainRows]) -> PlainRows:
        scaled = {i: parts[i].scale * rows.rows for i, rows in own.items()}
        return PlainRows(next(iter(own.values())).sizes, _below(scaled, counts))

    outer: dict[tuple[str, ...], dict[int, OuterRows]] = {}
    plain: dict[tuple[str, ...], dict[int, PlainRows]] = {}
    for number, part in enumerate(parts):
        for some in part.rows:
            if isinstance(some, OuterRows):
                outer.setdefault(tuple(some.names.values()), {})[number] = some
            elif isinstance(some, PlainRows):
                plain.setdefault(tuple(some.sizes), {})[number] = some
    names = [name for layer in (*outer, *plain) for name in layer]
    if len(set(names)) < len(names) or (outer and len({part.count / part.examples for part in parts}) > 1):
        return None
    return [*map(outer_rows, outer.values()), *map(plain_rows, plain.values())]


def _below(rows: dict[int, Tensor], counts: Sequence[int]) -> Tensor:
    """The rows of one layer below each other, by the number of the function that they are of; zeros, so many as it has
    rows elsewhere, for a function that does not use the layer."""
    like = next(iter(rows.values()))
    return torch.cat([rows[i] if i in rows else like.new_zeros(n, *like.shape[1:]) for i, n in enumerate(counts)])
